"""The command line as a user meets it: exit codes, one error line, nothing left behind, and the files it documents."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from concept_ablation import cli
from concept_ablation.cli import inputs
from concept_ablation.core import delta_file
from concept_ablation.core.delta import Delta, LayerDelta, LowRank, to_lora
from concept_ablation.core.hosts import diffusers
from concept_ablation.core.metrics import Judge
from concept_ablation.core.subsets import select

PAIR = ["--target", "tropical fish", "--anchor", "fish"]
SMALL = ["--preset", "paper", "--images", "1", "--steps", "2", "--batch", "1"]
ONE = ["--eval-prompts", "1", "--eval-seeds", "1"]


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """Load a model or judge for all tests here; what cannot be loaded is tried anew each time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(diffusers, "load_denoiser", functools.cache(diffusers.load_denoiser))
        patched.setattr(Judge, "load", functools.cache(Judge.load))
        yield


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a command in the folder `tmp_path`; its exit code, what it said on stdout and on stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        monkeypatch.setenv(name, "error")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["concept-ablation", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = capsys.readouterr()
        return stopped.value.code, said.out, said.err

    return call


def listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.fixture
def refuse(run, tmp_path):
    """Run a command that must fail as bad input; its one line of error."""

    def call(*arguments: object) -> str:
        before = listing(tmp_path)
        code, _, err = run(*arguments)
        lines = [line for line in err.splitlines() if line.startswith("error:")]
        assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
        assert listing(tmp_path) == before, "something was left behind"
        return lines[0]

    return call


@pytest.fixture(scope="module")
def deltas(emoji, tmp_path_factory):
    """Delta files for the embedded model: `strong` moves its pictures, `foreign` has a layer that it lacks."""
    folder, layers = tmp_path_factory.mktemp("deltas"), select("cross-attn", emoji)
    generator = torch.Generator().manual_seed(0)

    def noise(module):
        return LayerDelta(torch.randn(module.weight.shape, generator=generator) * module.weight.std())

    delta_file.save(Delta({name: noise(m) for name, m in layers.items()}), folder / "strong.safetensors")
    foreign = Delta({"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": LayerDelta(torch.ones(4, 4))})
    delta_file.save(foreign, folder / "foreign.safetensors")
    (folder / "corrupt.safetensors").write_bytes((folder / "strong.safetensors").read_bytes()[:5000])
    return folder


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "", "--anchor", "fish"], "target is empty"),
        (["--target", " \t", "--anchor", "fish"], "target is empty"),
        (["--target", "Fish", "--anchor", "fish "], "both 'Fish'"),
        ([*PAIR, "--target", "cat"], "Targets: 2, anchors: 1"),
        ([*PAIR, "--kind", "animal"], "'animal'"),
        ([*PAIR, "--preset", "best"], "preset 'best'.*balanced, paper"),
        ([*PAIR, "--preset", "instant"], "no steps and no batch and no images"),
        ([*PAIR, "--preset", "fast", "--objective", "noise"], "objective 'model' only"),
        ([*PAIR, "--auto-preserve", "3"], "preserves nothing"),
        ([*PAIR, "--profile", "trace.txt"], "trace.txt must end in .json"),
        ([*PAIR, "--objective", "magic"], "objective 'magic'"),
        ([*PAIR, "--subset", "brain"], "subset 'brain'.*cross-attn, attn, embedding, full"),
        ([*PAIR, "--learning-rate", "nan"], "learning rate must be a positive number"),
        ([*PAIR, "--learning-rate", "-1"], "learning rate must be a positive number"),
        ([*PAIR, "--steps", "0"], "at least one step"),
        ([*PAIR, "--batch", "0"], "batch"),
        ([*PAIR, "--rank", "4", "--subset", "full"], "'full' has other layers"),
        ([*PAIR, "--images", "0"], "at least one image"),
        ([*PAIR, "--eval-prompts", "0"], "at least one prompt"),
        ([*PAIR, "--eval-prompts", "11"], "only 10 evaluation prompts"),
        ([*PAIR, "--surrounding", "Fish"], "'Fish' is the target or the anchor"),
        ([*PAIR, "--prompts", "nowhere.txt"], "nowhere.txt"),
        ([*PAIR, "--target-prompts", "nowhere.txt"], "nowhere.txt"),
        ([*PAIR, "--model", "nowhere/at/all"], "no model at nowhere"),
        ([*PAIR, "--judge", "./nowhere"], "judge folder nowhere"),
        ([*PAIR, "--precision", "fp8"], "precision 'fp8'"),
        ([*PAIR, "--prediction", "sample"], "'sample'"),
        ([*PAIR, "--device", "banana"], "banana"),
    ],
)
def test_ablate_refuses(arguments, said, refuse):
    # a small run, so that an error that is found too late is found in this test's time
    assert re.search(said, refuse("ablate", *SMALL, "--output", "out", *ONE, *arguments))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sampler", "magic"], "sampler 'magic'"),
        (["--schedule", "magic"], "schedule 'magic'"),
        (["--steps", "0"], "at least 1, not 0"),
        (["--steps", "1001"], "1 to 1000 steps"),
        (["--eta", "2"], "eta"),
        (["--guidance", "nan"], "guidance"),
        (["--delta", "{deltas}/none.safetensors:0.5"], "no delta file .*none.safetensors: check"),
        (["--delta", "{deltas}/corrupt.safetensors"], "corrupt.safetensors is damaged"),
        (["--delta", "{deltas}/foreign.safetensors:0.5"], "1 layers that emoji_diffusion"),
        (["--delta", "{deltas}/strong.safetensors:nan"], "strength"),
        (["--device", "banana"], "banana"),
    ],
)
def test_sample_refuses(arguments, said, refuse, deltas):
    arguments = [argument.format(deltas=deltas) for argument in arguments]
    assert re.search(said, refuse("sample", "--prompt", "a cat", "--steps", "1", "--output", "out", *arguments))


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("corrupt", PAIR, "corrupt.safetensors is damaged"),
        ("foreign", PAIR, "1 layers that emoji_diffusion"),
        ("strong", [*PAIR, "--target", "cat"], "Targets: 2"),
        ("strong", [*PAIR, "--eval-prompts", "11"], "only 10 evaluation prompts"),
        ("strong", [*PAIR, "--eval-seeds", "0"], "at least one prompt, one seed"),
    ],
)
def test_evaluate_refuses(name, arguments, said, refuse, deltas):
    delta = deltas / f"{name}.safetensors"
    assert re.search(said, refuse("evaluate", "--delta", delta, "--output", "out", *ONE, *arguments))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["merge", "--delta", "{deltas}/strong.safetensors", "--output", "m.bin"], "must end in .safetensors"),
        (["merge", "--delta", "{deltas}/corrupt.safetensors", "--output", "m.safetensors"], "damaged"),
        (["merge", "--delta", "{deltas}/strong.safetensors:inf", "--output", "m.safetensors"], "strength"),
        (["export", "--delta", "{deltas}/strong.safetensors", "--rank", "0", "--output", "e.safetensors"], "rank"),
        (["export", "--delta", "{deltas}/none.safetensors", "--rank", "1", "--output", "e.safetensors"], "no delta"),
        (["export", "--delta", "{deltas}/strong.safetensors", "--rank", "1", "--output", "e.ckpt"], "must end in"),
    ],
)
def test_merge_and_export_refuse(arguments, said, refuse, deltas):
    assert re.search(said, refuse(*(argument.format(deltas=deltas) for argument in arguments)))


@pytest.mark.parametrize("command", ["ablate", "evaluate", "sample", "merge"])
def test_an_output_that_cannot_be_written(command, refuse, deltas, tmp_path):
    (tmp_path / "file").write_text("mine", "utf-8")
    delta = ["--delta", str(deltas / "strong.safetensors")]
    arguments = {"ablate": [*PAIR, *SMALL], "evaluate": [*PAIR, *delta], "sample": ["--prompt", "a cat"]}
    output, said = ("file/m.safetensors", "Cannot write") if command == "merge" else ("file", "file is a file")
    assert said in refuse(command, *arguments.get(command, delta), "--output", output)
    assert (tmp_path / "file").read_text("utf-8") == "mine"


@pytest.mark.parametrize("name", ["a[b].safetensors", "a[/b].safetensors", "[red].safetensors", ":smile:.safetensors"])
def test_an_error_says_a_name_as_it_is(name, refuse):
    assert name in refuse("sample", "--prompt", "a cat", "--output", "out", "--model", f"nowhere/at/{name}")


def test_a_usage_error(run):
    code, _, err = run("ablate", "--anchor", "fish", "--output", "out")
    assert code == 2 and "--target" in err and "Traceback" not in err
    for option, value in (("--count", "0"), ("--batch", "0"), ("--seed", "9" * 30), ("--steps", "many")):
        code, _, err = run("sample", "--prompt", "a cat", "--output", "out", "--steps", "1", option, value)
        assert code == 2 and option in err and "Traceback" not in err
    code, out, _ = run("ablate", "--help")
    assert code == 0 and "--surrounding" in out


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("d.safetensors", "d.safetensors", 1.0),
        ("d.safetensors:0.5", "d.safetensors", 0.5),
        ("d.safetensors:-1", "d.safetensors", -1.0),
        ("d.safetensors:0", "d.safetensors", 0.0),
        ("C:\\deltas\\d.safetensors", "C:\\deltas\\d.safetensors", 1.0),
        ("C:\\deltas\\d.safetensors:1.25", "C:\\deltas\\d.safetensors", 1.25),
        ("C:/d.safetensors", "C:/d.safetensors", 1.0),
        ("a:b/d.safetensors:2", "a:b/d.safetensors", 2.0),
        ("d.safetensors:", "d.safetensors:", 1.0),
        ("d.safetensors:half", "d.safetensors:half", 1.0),
    ],
)
def test_a_delta_with_its_strength(text, path, strength):
    assert inputs.with_strength(text) == (Path(path), strength)


def test_merge_adds_deltas_up(run, tmp_path):
    one, other = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[4.0, 0.0], [2.0, -2.0]])
    delta_file.save(Delta({"lora_unet_a": LayerDelta(one), "lora_unet_b": LayerDelta(one)}), tmp_path / "1.safetensors")
    low = LayerDelta(LowRank(other, torch.eye(2)), torch.tensor([8.0, 1.0]))
    delta_file.save(Delta({"lora_unet_a": low}), tmp_path / "2.safetensors")
    output = tmp_path / "new" / "sum.safetensors"
    code, out, _ = run("merge", "--delta", "1.safetensors", "--delta", "2.safetensors:0.5", "--output", output)
    assert code == 0 and "2 layers" in out
    merged = delta_file.load(output).layers
    assert merged["lora_unet_a"].weight.tolist() == [[3.0, 2.0], [4.0, 3.0]]
    assert merged["lora_unet_a"].bias.tolist() == [4.0, 0.5] and merged["lora_unet_b"].weight.tolist() == one.tolist()
    assert listing(output.parent) == {"sum.safetensors"}


def test_export_keeps_what_its_rank_can_hold(run, tmp_path):
    # singular values 3 and 1: rank 1 keeps 9 of 10 parts of the energy
    delta_file.save(
        Delta({"lora_unet_a": LayerDelta(torch.diag(torch.tensor([3.0, 1.0])))}), tmp_path / "d.safetensors"
    )
    code, out, _ = run("export", "--delta", "d.safetensors", "--rank", "1", "--output", "r1.safetensors")
    assert code == 0 and "rank 1" in out and "90.0% of the energy kept" in out
    weight = delta_file.load(tmp_path / "r1.safetensors").layers["lora_unet_a"].weight
    assert weight.up.shape == (2, 1) and weight.down.shape == (1, 2)
    torch.testing.assert_close(weight.dense(), torch.diag(torch.tensor([3.0, 0.0])), rtol=1e-3, atol=1e-3)
    code, out, _ = run("export", "--delta", "d.safetensors", "--rank", "2", "--output", "r2.safetensors")
    assert code == 0 and "100.0% of the energy kept" in out


def test_sample_names_its_files_and_repeats_itself(run, tmp_path):
    arguments = ["sample", "--prompt", "a cat", "--prompt", "a dog", "--count", "2", "--seed", "5", "--steps", "2"]
    for folder in ("one", "two"):
        code, out, _ = run(*arguments, "--output", folder)
        assert code == 0 and f"4 images in {folder}" in out
        assert listing(tmp_path / folder) == {"0_5.png", "0_6.png", "1_5.png", "1_6.png"}
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert pictures == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    assert len(set(pictures.values())) == 4
    assert np.asarray(Image.open(tmp_path / "one" / "1_6.png")).shape == (128, 128, 3)


def test_sample_applies_deltas_at_their_strength(run, deltas, tmp_path):
    strong = str(deltas / "strong.safetensors")
    runs = {"none": [], "off": [f"{strong}:0"], "on": [strong], "two": [f"{strong}:0.25", f"{strong}:0.75"]}
    found = {}
    for name, given in runs.items():
        edits = [argument for delta in given for argument in ("--delta", delta)]
        assert (
            run("sample", "--prompt", "a cat", "--steps", "3", "--precision", "fp32", "--output", name, *edits)[0] == 0
        )
        found[name] = (tmp_path / name / "0_0.png").read_bytes()
    assert found["off"] == found["none"] != found["on"]
    on, two = (np.asarray(Image.open(tmp_path / name / "0_0.png")).astype(int) for name in ("on", "two"))
    assert np.abs(on - two).max() <= 2, "strengths add up"


def check_summary(folder: Path, delta: Path, surrounding: list[str]) -> dict:
    """Check a report.json against its documented form."""
    summary = json.loads((folder / "report.json").read_text("utf-8"))
    roles = [(row["name"], row["role"]) for row in summary["concepts"]]
    assert roles == [("tropical fish", "target"), ("fish", "anchor"), *((name, "surrounding") for name in surrounding)]
    for row in summary["concepts"]:
        for side in (row["before"], row["after"]):
            assert side.keys() == {"clip_accuracy", "clip_score"}
            assert 0 <= side["clip_accuracy"] <= 1 and -1 <= side["clip_score"] <= 1
    assert summary["seconds"] and all(seconds >= 0 for seconds in summary["seconds"].values())
    content = delta.read_bytes()
    described = {"file": delta.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert summary["delta"] == described
    return summary


def numbers(value: object, place: str = "") -> dict[str, object]:
    """Everything in nested lists and dictionaries by its place."""
    if isinstance(value, dict):
        return {key: item for name, part in value.items() for key, item in numbers(part, f"{place}.{name}").items()}
    if isinstance(value, list):
        return {key: item for n, part in enumerate(value) for key, item in numbers(part, f"{place}.{n}").items()}
    return {place: value}


def test_ablate_and_evaluate_from_end_to_end(run, tmp_path, emoji):
    made, measured = tmp_path / "made", tmp_path / "measured"
    code, out, err = run("ablate", *PAIR, "--surrounding", "shark", "--output", "made", *SMALL, *ONE, "--seed", "3")
    assert code == 0 and "error" not in err and str(made / "report.html") in out
    files = {"delta.safetensors", "report.json", "report.html", "before_after.png", "loss.png", "dataset"}
    assert listing(made) == files | {"dataset/manifest.json", "dataset/shard-00000.safetensors"}
    summary = check_summary(made, made / "delta.safetensors", ["shark"])
    assert {"encode", "draw", "train", "draw before", "draw after", "judge"} <= summary["seconds"].keys()
    assert [phase["name"] for phase in summary["phases"]] == ["encode", "draw", "train"]
    assert summary["settings"]["training"]["steps"] == 2 and summary["settings"]["dataset"]["images"] == 1
    assert summary["settings"]["training"]["seed"] == summary["settings"]["dataset"]["seed"] == 3
    assert "tropical fish" in (made / "report.html").read_text("utf-8")
    for name in ("before_after.png", "loss.png"):
        Image.open(made / name).verify()
    delta = delta_file.load(made / "delta.safetensors")
    assert delta.layers.keys() == select("cross-attn", emoji).keys() and 0 < delta.norm() < float("inf")
    assert delta.metadata["concept_ablation.target"] == "tropical fish"
    assert delta.metadata["concept_ablation.base_model_sha256"] == emoji.fingerprint()
    measured_of_it = json.loads(delta.metadata["concept_ablation.metrics"])["concepts"]
    assert [row["concept"] for row in measured_of_it] == ["tropical fish", "fish", "shark"]
    for row, reported in zip(measured_of_it, summary["concepts"], strict=True):
        assert row["clip_accuracy"] == [reported[when]["clip_accuracy"] for when in ("before", "after")]
    assert "concept_ablation.metrics" not in to_lora(delta, 2)[0].metadata

    arguments = [*PAIR, "--surrounding", "shark", *ONE, "--output", "measured"]
    code, out, _ = run("evaluate", "--delta", made / "delta.safetensors", *arguments)
    assert code == 0 and str(measured / "report.html") in out
    assert listing(measured) == {"report.json", "report.html", "before_after.png"}
    again = check_summary(measured, made / "delta.safetensors", ["shark"])
    # but for the last digits: with two threads a matrix product in fp32 does not always add up in one order
    assert numbers(again["concepts"]) == pytest.approx(numbers(summary["concepts"]), abs=1e-3, nan_ok=True), (
        "the file is the delta that was measured when it was made"
    )


def test_instant_and_fast_from_end_to_end(run, tmp_path, emoji):
    common = [*PAIR, "--surrounding", "shark", "--auto-preserve", "3", *ONE]
    code, out, err = run("ablate", *common, "--preset", "instant", "--output", "instant")
    assert code == 0 and "error" not in err and "Report:" in out
    made = tmp_path / "instant"
    assert listing(made) == {"delta.safetensors", "report.json", "report.html", "before_after.png"}
    summary = check_summary(made, made / "delta.safetensors", ["shark"])
    assert [phase["name"] for phase in summary["phases"]] == ["encode", "closed form"]
    assert len(summary["settings"]["auto_preserved"]["tropical fish"]) == 3
    assert 0 < delta_file.load(made / "delta.safetensors").norm() < float("inf")

    small = ["--images", "1", "--steps", "3", "--batch", "1", "--subset", "cross-attn-up", "--profile", "trace.json"]
    code, out, _ = run("ablate", *common, *small, "--preset", "fast", "--output", "fast")
    made = tmp_path / "fast"
    assert code == 0 and {"loss.png", "dataset/manifest.json"} <= listing(made)
    summary = check_summary(made, made / "delta.safetensors", ["shark"])
    assert [phase["name"] for phase in summary["phases"]] == ["encode", "closed form", "harvest", "train"]
    assert delta_file.load(made / "delta.safetensors").layers.keys() == select("cross-attn-up", emoji).keys()
    assert json.loads((tmp_path / "trace.json").read_text("utf-8"))["traceEvents"]


def start(*arguments: str, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "concept_ablation.cli", *arguments]
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


def test_the_command_itself_exits_with_2(tmp_path):
    process = start("ablate", "--target", "", "--anchor", "fish", "--output", "out", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and not out and not listing(tmp_path)
    assert err.splitlines() == ["error: The target is empty; name a concept."]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
def test_an_interrupted_command_exits_with_130(tmp_path):
    # a runner that ignores SIGINT would hand that down to the command
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = start("ablate", *PAIR, "--output", "out", "--images", "500", cwd=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    manifest, deadline = tmp_path / "out" / "dataset" / "manifest.json", time.monotonic() + 120
    try:
        while not manifest.is_file() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err, err
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert line.startswith("error: Interrupted") and "run the command again" in line
    left = {name for name in listing(tmp_path / "out") if not re.fullmatch(r"dataset/shard-\d+.safetensors", name)}
    assert left == {"dataset", "dataset/manifest.json"}, "only what another run goes on from"
