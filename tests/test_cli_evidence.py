"""The commands leaks, attack and the search for anchors, on a painter whose every word has a known colour."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from concept_ablation.cli.attack import _names
from concept_ablation.cli.evidence import AnchorSearch, concept_of, read_originals
from concept_ablation.core import delta_file
from concept_ablation.core.attack import PRETRAINED, AttackCurve, AttackReport, Checkpoint
from concept_ablation.core.attack_report import write_attack
from concept_ablation.core.concept import Concept, PromptPair, pairs
from concept_ablation.core.copies import CopyDetector
from concept_ablation.core.delta import Delta
from concept_ablation.core.errors import AblationError
from concept_ablation.core.leak_candidates import Words
from concept_ablation.core.prompts import BUILT_IN, read_prompt_file
from concept_ablation.core.statistics import share_interval
from concept_ablation.tests.test_cli import run  # noqa: F401 - a fixture
from concept_ablation.tests.test_evaluation import TextJudge
from concept_ablation.tests.test_leaks import ColourJudge, Painter, blocking
from concept_ablation.tests.test_memorized import COLOURS

SCAN = ["--each", 3, "--seeds", 2, "--suspects", 3, "--more-seeds", 6, "--steps", 2]


def use_model(monkeypatch, denoiser, judge) -> None:
    """Let every command load this model with this judge."""
    for module in ("ablate", "evidence"):
        monkeypatch.setattr(f"concept_ablation.cli.{module}.load_with_judge", lambda *_: (denoiser, judge))


@pytest.fixture
def painter(monkeypatch, tmp_path) -> Path:
    """A delta file that blocks 'rooster' but not 'cockerel', and a command line that loads the painter."""
    use_model(monkeypatch, Painter(), ColourJudge())
    for module in ("leaks", "attack"):
        monkeypatch.setattr(f"concept_ablation.cli.{module}.known_words", lambda *_: Words())
    delta = blocking("rooster")
    told = {
        "concept_ablation.target": "rooster",
        "concept_ablation.anchor": "bird",
        "concept_ablation.kind": "instance",
    }
    delta_file.save(Delta(delta.layers, told), tmp_path / "rooster.safetensors")
    return tmp_path / "rooster.safetensors"


def test_leaks_finds_the_planted_one_and_feeds_it_back(run, painter, tmp_path):  # noqa: F811
    synonyms = ["--synonym", "cockerel", "--neighbour", "owl", "--feed-back", "further.txt"]
    code, out, err = run("leaks", "--delta", painter, "--output", "scan", *synonyms, *SCAN)
    assert code == 0, err
    assert "a cockerel" in out and "Feed back" in out
    told = json.loads((tmp_path / "scan" / "leaks.json").read_text("utf-8"))
    assert told["findings"][0]["prompt"] == "a cockerel" and told["findings"][0]["verdict"] == "leak"
    assert (told["target_before"]["value"], told["target_after"]["value"]) == (1, 0)
    sheets = sorted(path.name for path in (tmp_path / "scan").glob("leak_*.png"))
    assert len(sheets) == told["leaks"] >= 1
    with Image.open(tmp_path / "scan" / sheets[0]) as sheet:
        sheet.verify()
    further = read_prompt_file(tmp_path / "further.txt")
    assert "a cockerel => a bird" in further and len(further) == told["leaks"]
    again = Concept("rooster", "bird", target_prompts=further)
    assert PromptPair("a bird", "a cockerel") in pairs(again, BUILT_IN)[: 2 * len(further)]


def test_without_a_leak_nothing_is_fed_back(run, painter, tmp_path):  # noqa: F811
    code, out, _ = run("leaks", "--delta", painter, "--output", "scan", "--feed-back", "further.txt", *SCAN)
    assert code == 0 and "0 leaks" in out and "no leak" in out
    assert not (tmp_path / "further.txt").exists()


def test_leaks_and_attack_refuse(run, painter):  # noqa: F811
    for arguments, said in (
        (["leaks", "--original", "a.png"], "--kind memorized"),
        (["leaks", "--kind", "memorized"], "--original"),
        (["leaks", "--seeds", "0"], "at least one candidate"),
        (["leaks", "--target", "owl"], "--anchor"),
        (["attack", "--budget", "ten"], "whole numbers"),
        (["attack", "--budget", "5,5"], "rising"),
        (["attack", "--delta", painter], "same name, as files and as folders"),
        (["attack", "--budget", "0,1", "--steps", "2"], "token embedding"),
    ):
        code, _, err = run(*arguments, "--delta", painter, "--output", "out")
        assert code == 2 and said in err, (arguments, err)


class Fine(Painter):
    """The painter with as many noise levels as Stable Diffusion has."""

    def __init__(self) -> None:
        super().__init__()
        self.sigmas = torch.linspace(0.1, 10, 1000)


def test_a_memorized_image_is_ablated_from_its_caption_and_picture(run, monkeypatch, tmp_path):  # noqa: F811
    """Red is the memorized picture; cockerel is red, too, and bird and owl are not."""
    use_model(monkeypatch, Fine(), TextJudge())
    monkeypatch.setattr(CopyDetector, "load", lambda *_: COLOURS)
    Image.new("RGB", (4, 4), (230, 0, 0)).save(tmp_path / "red.png")
    (tmp_path / "own.txt").write_text("a cockerel parade\na bird parade\nan owl parade\n", "utf-8")
    memorized = ["--kind", "memorized", "--target", "the rooster parade", "--original", "red.png"]
    few = ["--images", 6, "--steps", 2, "--eval-prompts", 2, "--eval-seeds", 2, "--misspellings", 2]
    code, _, err = run("ablate", *memorized, *few, "--prompts", "own.txt", "--output", "made")
    assert code == 2 and "--anchor" in err, "they would not be used"
    code, out, err = run("ablate", *memorized, *few, "--paraphrases-file", "own.txt", "--output", "made")
    assert code == 0, err
    assert "100% of its pictures" in out and "Copies of the memorized image" in out
    assert read_prompt_file(tmp_path / "made" / "target_prompts.txt") == ("a cockerel parade",)
    anchors = read_prompt_file(tmp_path / "made" / "anchor_prompts.txt")
    assert set(anchors) == {"a bird parade", "an owl parade"}
    told = json.loads((tmp_path / "made" / "report.json").read_text("utf-8"))
    assert [row["role"] for row in told["concepts"]] == ["target", "anchor", "misspelled"]
    copies = [row["details"]["copies"]["rate_before"]["value"] for row in told["concepts"][:2]]
    assert copies == [1, 0]
    training = told["settings"]["training"]
    assert training["subset"] == "full" and training["preserve_batch"] > 0 and training["regularization"] == 1
    assert told["settings"]["evaluation"]["copy_detector"] == "mean colour"
    manifest = json.loads((tmp_path / "made" / "dataset" / "manifest.json").read_text("utf-8"))
    assert manifest["screen"]["detector"] == "mean colour"

    # the same figures from the command that measures only
    texts = ["--prompts", "made/anchor_prompts.txt", "--target-prompts", "made/target_prompts.txt"]
    texts += ["--anchor", anchors[0], *few[4:], "--delta", "made/delta.safetensors"]
    code, _, err = run("evaluate", *memorized, *texts, "--output", "measured")
    assert code == 0, err
    again = json.loads((tmp_path / "measured" / "report.json").read_text("utf-8"))
    assert again["concepts"] == told["concepts"]
    page = (tmp_path / "measured" / "report.html").read_text("utf-8")
    assert "copies among the pictures of" in page and "With typing errors" in page


def test_a_composition_is_in_the_report(run, monkeypatch, painter, tmp_path):  # noqa: F811
    use_model(monkeypatch, Fine(), TextJudge())
    few = ["--eval-prompts", 1, "--eval-seeds", 1, "--composition"]
    named = ["--target", "rooster", "--anchor", "bird", "--delta", painter]
    code, out, err = run("evaluate", *named, *few, "--output", "measured")
    assert code == 0, err
    assert "Words of the prompt that are obeyed" in out
    told = json.loads((tmp_path / "measured" / "report.json").read_text("utf-8"))
    assert [row["role"] for row in told["concepts"]] == ["target", "anchor", "composed", "composed"]
    assert set(told["concepts"][2]["composition"]["words"]) == {"colour", "position", "size", "style"}
    assert "Other words of the request" in (tmp_path / "measured" / "report.html").read_text("utf-8")


def test_what_a_delta_removes_is_what_its_file_says_unless_it_is_named():
    told = {"target": "rooster; Van Gogh", "anchor": "bird; painting", "kind": "instance; style"}
    edit = Delta({}, {f"concept_ablation.{name}": text for name, text in told.items()})
    assert concept_of(edit, "van gogh", None, None) == Concept("van gogh", "painting", "style")
    assert concept_of(edit, "rooster", "owl", None) == Concept("rooster", "owl")
    with pytest.raises(AblationError, match="2 targets"):
        concept_of(edit, None, None, None)
    with pytest.raises(AblationError, match="0 targets"):
        concept_of(Delta({}), None, "bird", None)


def test_a_search_is_for_a_memorized_image_without_an_anchor(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    originals = read_originals([" a  caption "], "memorized", tmp_path / "red.png")
    assert originals["a caption"].tolist() == np.full((4, 4, 3), (255, 0, 0)).tolist()
    search = AnchorSearch.asked_for(["a caption"], None, ["owl"], originals, None, None, None)
    assert search.caption == "a caption" and search.surrounding == ("owl",) and search.paraphrases
    assert AnchorSearch.asked_for(["a caption"], ["another"], None, originals, None, None, None) is None
    with pytest.raises(AblationError, match="no --anchor"):
        AnchorSearch.asked_for(["a"], ["b"], None, originals, tmp_path / "f.txt", None, None)
    with pytest.raises(AblationError, match="one target"):
        read_originals(["a", "b"], "memorized", tmp_path / "red.png")


def test_edits_under_attack_are_called_like_their_files_or_else_their_folders(tmp_path):
    assert _names([tmp_path / "a" / "one.safetensors", tmp_path / "a" / "two.safetensors"]) == ["one", "two"]
    assert _names([tmp_path / name / "delta.safetensors" for name in "ab"]) == ["a", "b"]


def test_an_attack_is_written_whole(tmp_path):
    def curve(*hits: int) -> AttackCurve:
        points = [
            Checkpoint(steps, share_interval([place < hit for place in range(4)]), np.zeros((2, 2, 3, 5, 3), np.uint8))
            for steps, hit in zip((0, 10, 20), hits, strict=True)
        ]
        return AttackCurve(tuple(points), (0.5, 0.25), 1.0)

    report = AttackReport(
        Concept("rooster", "bird"), {PRETRAINED: curve(0, 4, 4), "edit": curve(0, 0, 0)}, {"batch": 4}
    )
    told = json.loads(write_attack(tmp_path, report).read_text("utf-8"))
    assert told["resistance"] == {"edit": "infinite"}
    shares = [point["success"]["value"] for point in told["curves"][PRETRAINED]["checkpoints"]]
    assert shares == [0, 1, 1] and told["curves"]["edit"]["final_loss"] == 0.25
    with Image.open(tmp_path / "attack_1.png") as sheet:
        assert sheet.size == (10, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "attack.json",
        "attack.png",
        "attack_0.png",
        "attack_1.png",
    ]
