"""Benchmarks that run: on a random model of a few thousand weights, with everything as small as it can be."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from concept_ablation import cli
from concept_ablation.cli import bench as command
from concept_ablation.core import dataset, trainer
from concept_ablation.core.bench import runner, store
from concept_ablation.core.bench.bench import Bench, open_bench, word_groups
from concept_ablation.core.bench.edits import edit_folder, make, without_copies
from concept_ablation.core.bench.experiments import EXPERIMENTS, Selection, plan_jobs
from concept_ablation.core.bench.jobs import run_job
from concept_ablation.core.bench.pace import Pace
from concept_ablation.core.bench.plan import TINY, BenchJob, Edit, Method
from concept_ablation.core.bench.plots import PLOTS
from concept_ablation.core.bench.runner import plan_keys, run, what_is_left
from concept_ablation.core.bench.store import Store, load_pictures, save_pictures
from concept_ablation.core.bench.summary import results
from concept_ablation.core.concept import Concept
from concept_ablation.core.copies import CopyDetector
from concept_ablation.core.errors import AblationError, Interrupted
from concept_ablation.core.hosts.diffusers import ModelHints
from concept_ablation.core.phases import counted
from concept_ablation.core.tasks import ListedTask

AROUND = ("owl", "duck", "eagle", "dove")
ROOSTER = ListedTask("rooster", Concept("rooster", "bird"), AROUND)
MONET = ListedTask("monet", Concept("Monet", "painting", "style"), ("Manet", "Renoir", "Degas", "Dali"))
BUS = ListedTask(
    "bus",
    Concept("Night bus to Marzipan Square, 1931", "a bus", "memorized", anchor_prompts=("a bus", "a bus at night")),
    AROUND,
    "bus.png",
)
TASKS = (ROOSTER, MONET, BUS)
TASK_LIST = "\n".join(
    f"""[[task]]
name = "{task.name}"
kind = "{task.concept.kind}"
target = "{task.concept.target}"
anchor = "{task.concept.anchor}"
surrounding = {json.dumps(task.surrounding)}
"""
    + (f'anchor_prompts = {json.dumps(task.concept.anchor_prompts)}\npicture = "bus.png"\n' if task.picture else "")
    for task in TASKS
)


class ColourJudge:
    """Stands in for CLIP: pictures are their mean colour, texts a colour of their own."""

    def __init__(self, name: str) -> None:
        self.name, self.model = name, nn.Identity()

    def embed_images(self, images: np.ndarray) -> Tensor:
        return F.normalize(torch.from_numpy(images.mean(axis=(1, 2)) - 127.5).float(), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        seeds = [torch.Generator().manual_seed(zlib.crc32(text.encode())) for text in texts]
        return F.normalize(torch.stack([torch.randn(3, generator=seed) for seed in seeds]), dim=-1)

    def embed_concept(self, texts: Sequence[str]) -> Tensor:
        return F.normalize(self.embed_texts(texts).mean(dim=0), dim=0)


@pytest.fixture
def judge() -> ColourJudge:
    return ColourJudge("first")


@pytest.fixture
def detector() -> CopyDetector:
    """Takes pictures for copies that have about the same colours in the same places."""
    return CopyDetector(
        "colours", lambda images: torch.from_numpy(images[:, ::4, ::4].reshape(len(images), -1) - 127.5)
    )


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "bus.png")
    return folder


@pytest.fixture
def bench(tiny, judge, detector, pictures, tmp_path) -> Bench:
    return open_bench(tiny, [judge], TASKS, tmp_path / "out", TINY, pictures=pictures, detector=detector)


def jobs(bench: Bench, *names: str, tasks=TASKS) -> dict[str, list[runner.Planned]]:
    selection = Selection(tuple(tasks), (Method(),), compare=1, checkpoints=TINY.checkpoints)
    return plan_keys(bench, plan_jobs(names, selection))


def stored(bench: Bench) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text("utf-8")) for path in (bench.store.root / "jobs").glob("*.json")}


def test_the_command_finds_its_own_files():
    assert command.TASK_LIST.is_file()
    assert command.PICTURES.is_dir() and command.VALIDATION_JUDGE.is_dir()


def test_the_command_runs_every_experiment_and_writes_what_it_promises(
    tiny, judge, detector, pictures, tmp_path, monkeypatch, capsys
):
    listed = tmp_path / "tasks.toml"
    listed.write_text(TASK_LIST, encoding="utf-8")
    monkeypatch.setattr(command, "_model", lambda *_: (tiny, ModelHints(categories={"rooster": "bird", "owl": "bird"})))
    monkeypatch.setattr(command, "_judges", lambda *_, **__: [judge, ColourJudge("second")])
    monkeypatch.setattr(command, "_detector", lambda *_: detector)
    output = tmp_path / "out"

    def call(*more: str, code: int = 0) -> str:
        arguments = ["bench", "--tiny", "--compare", "1", "--output", output, "--task-list", listed]
        arguments += ["--pictures", pictures, *more]
        monkeypatch.setattr("sys.argv", ["concept-ablation", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = capsys.readouterr()
        assert stopped.value.code == code, said.err
        return said.out

    planned = call("--plan")
    assert "Left to do" in planned and not (output / "results.json").exists()
    call()
    found = json.loads((output / "results.json").read_text("utf-8"))
    assert {row["task"] for row in found["tasks"]} == {"rooster", "monet", "bus"}
    assert all(counts["done"] == counts["of"] for counts in found["jobs"].values())
    assert set(found["jobs"]) == set(EXPERIMENTS) and found["settings"]["judges"] == [judge.name, "second"]
    jobs = [json.loads(path.read_text("utf-8")) for path in sorted((output / "jobs").glob("*.json"))]
    assert found["keys"] == [job["key"] for job in jobs]
    assert all((job["setup"], job["model"]) == (tiny.setup(), tiny.fingerprint()) for job in jobs)
    failed = [row for name in (*EXPERIMENTS, "tasks") for row in found.get(name, ()) if row.get("failed")]
    assert not failed
    # both judges are the same one, so they cannot disagree
    assert {one["validation"]["agrees"] for one in found["claims"] if one["validation"]} <= {True, None}
    assert len(found["claims"]) == 8 and len(found["goals"]) == 5
    (bus,) = [row for row in found["tasks"] if row["task"] == "bus"]
    assert bus["copies"]["target"]["after"]["n"] == TINY.prompts * TINY.images and "paraphrase" in bus["copies"]
    (rooster,) = [row for row in found["tasks"] if row["task"] == "rooster"]
    assert set(rooster["judges"]["second"]) >= {"target", "anchor", "surrounding", "misspelled", "floor", "words"}
    assert rooster["judges"]["second"] == rooster["judges"][judge.name]
    assert rooster["judges"]["second"]["target"]["kid_error"] >= 0
    assert rooster["judges"]["second"]["target"]["score_before"] and bus["copies"]["target"]["similarity_before"]
    tables = (output / "tables.md").read_text("utf-8")
    for heading in (
        "Goals",
        "claims",
        "Every task",
        "subsets",
        "Memorized",
        "Objectives",
        "leaks",
        "Attack",
        "Other anchors",
    ):
        assert heading in tables
    drawn = {path.stem for path in (output / "plots").glob("*.png")}
    # one instance and one style are too few for a model without several concepts
    assert drawn == set(PLOTS) - {"several"}
    assert not list((output / "scratch").iterdir()) and list(
        (output / "pictures").glob("bus-balanced_full+ranked-*.png")
    )
    again = call("--report")
    assert "Results" in again
    assert json.loads((output / "results.json").read_text("utf-8"))["claims"] == found["claims"]
    # a job that could not be measured is told, and its experiment is not complete
    (job,) = [path for path in (output / "jobs").glob("*.json") if '"scan"' in path.read_text("utf-8")][:1]
    job.write_text(json.dumps({**json.loads(job.read_text("utf-8")), "result": {"failed": "No luck."}}), "utf-8")
    assert "Failed: leaks" in call("--report", code=1)
    counts = json.loads((output / "results.json").read_text("utf-8"))["jobs"]["limits"]
    assert counts["failed"] == 1 and counts["done"] == counts["of"] - 1


def test_rows_are_foreseen_exactly_and_drawn_once(bench):
    planned = jobs(bench, "table", tasks=(ROOSTER,))
    twice = jobs(bench, "table", "subsets", tasks=(ROOSTER,))
    (left,) = what_is_left(bench, planned)
    assert run(bench, planned) is None
    (result,) = stored(bench).values()
    assert result["rows"] == left.rows > 0
    # other subsets need their own pictures after the edit, but neither a dataset nor pictures before it
    table, subsets = what_is_left(bench, twice)
    before = len(list((bench.store.root / "cache" / "pretrained").iterdir()))
    assert (table.rows, table.done) == (0, 1) and subsets.done == 1
    assert run(bench, twice) is None
    assert sum(one["rows"] for one in stored(bench).values()) == left.rows + subsets.rows
    assert len(list((bench.store.root / "cache" / "pretrained").iterdir())) == before
    assert len(list((bench.store.root / "cache" / "datasets").iterdir())) == 1
    with counted(bench.denoiser) as rows:
        assert run(bench, twice) is None
    assert rows.forward == 0


def test_claims_are_decided_by_whole_experiments(bench):
    planned = jobs(bench, "subsets", tasks=(ROOSTER,))
    some = {"subsets": [one for one in planned["subsets"] if one.job.edit.method.subset in ("cross-attn", "embedding")]}
    assert len(some["subsets"]) == 2 and run(bench, some) is None

    def verdict(plan: dict[str, list[runner.Planned]]) -> str:
        found = results(bench, plan, TASKS, {}, {})
        assert len(found["subsets"]) == 2
        return next(one["verdict"] for one in found["claims"] if one["id"] == "embedding-less-robust-to-typos")

    assert verdict(planned) == "not measured" and verdict(some) != "not measured"


@pytest.mark.parametrize("preset", ["fast", "instant"])
def test_presets_that_draw_no_images_are_measured_too(bench, preset):
    selection = Selection((ROOSTER, BUS), (Method(preset),), compare=1, checkpoints=TINY.checkpoints)
    assert selection.default_labels == {"instance": preset, "style": preset, "memorized": "balanced:full+ranked"}
    # comparisons of objectives and subsets, and memorized images, fall back to the preset that has them
    everything = plan_keys(bench, plan_jobs(list(EXPERIMENTS), selection))
    assert {one.job.edit.method.preset for one in everything["subsets"]} == {"balanced"}
    mine = {"table": [one for one in everything["table"] if one.job.edit.method.preset == preset]}
    (left,) = what_is_left(bench, mine)
    assert run(bench, mine) is None
    (found,) = stored(bench).values()
    assert found["rows"] == left.rows and found["result"]["observations"]
    assert found["job"]["objective"] == ("model" if preset == "fast" else None)


def test_a_bench_that_was_killed_goes_on_and_ends_alike(bench, tmp_path):
    planned = jobs(bench, "table", tasks=(ROOSTER,))
    ((one,),) = planned.values()

    def dies(progress) -> None:
        if progress.phase == "Drawing eagle after":
            raise KeyboardInterrupt

    bench.on_progress = dies
    with pytest.raises(KeyboardInterrupt):
        run(bench, planned)
    assert not stored(bench) and not list((bench.store.root / "jobs").glob("*.claim"))
    assert list((bench.store.root / "scratch" / one.key).iterdir())
    bench.on_progress = None
    with counted(bench.denoiser) as rows:
        foreseen = what_is_left(bench, planned)[0].rows
        assert run(bench, planned) is None
    # what was drawn before is not drawn again, and the edit is not made again
    assert rows.forward == foreseen < 100 and rows.backward == 0
    fresh = replace(bench, store=Store(tmp_path / "fresh"))
    assert run(fresh, planned) is None
    results = [stored(each)[one.key]["result"] for each in (bench, fresh)]
    assert results[0]["observations"] == results[1]["observations"]
    assert not (bench.store.root / "scratch" / one.key).exists()


def test_a_bench_stops_when_its_time_is_up(bench):
    planned = jobs(bench, "table")
    bench.pace = Pace(0.0, rate=1000.0)
    assert "time is up" in run(bench, planned)
    assert not stored(bench)
    # a training that would not be finished is not begun, though the time is not up
    bench.pace = Pace(60.0, rate=1e-6)
    assert "in one piece" in run(bench, planned)
    assert not stored(bench) and not list((bench.store.root / "jobs").glob("*.claim"))


def test_time_that_runs_out_within_a_job_keeps_what_was_drawn(bench):
    planned = jobs(bench, "table", tasks=(ROOSTER,))

    def ends(progress) -> None:
        if progress.phase == "Drawing owl before":
            raise Interrupted("The time is up.")

    bench.on_progress = ends
    assert run(bench, planned) == "The time is up."
    assert len(list((bench.store.root / "cache" / "pretrained").iterdir())) == 2
    assert edit_folder(bench, planned["table"][0].job.edit).is_dir()


@pytest.mark.parametrize("what", ["job", "edit"])
def test_jobs_and_edits_of_others_are_left_to_them_until_they_are_silent(bench, monkeypatch, what):
    planned = jobs(bench, "table", tasks=(ROOSTER, MONET))
    theirs, ours = (one.key for one in planned["table"])
    claimed = theirs if what == "job" else edit_folder(bench, planned["table"][0].job.edit).name
    claim = bench.store.claim_path(claimed)
    claim.parent.mkdir(parents=True)
    claim.write_text("elsewhere 1\n", encoding="utf-8")

    def waits(bench_, seconds: float) -> None:
        assert set(stored(bench)) == {ours}
        long_ago = time.time() - 10 * store._STALE
        os.utime(claim, (long_ago, long_ago))

    bench.pace = Pace(None, rate=1e9)
    monkeypatch.setattr(runner, "_sleep", waits)
    assert run(bench, planned) is None
    assert set(stored(bench)) == {theirs, ours} and not claim.exists()


def test_bad_input_of_one_job_does_not_end_the_others(bench, detector):
    every = CopyDetector("everything", lambda images: torch.ones(len(images), 2))
    bench.detector = every
    planned = jobs(bench, "table", tasks=(BUS, ROOSTER))
    assert run(bench, planned) is None
    results = {one["job"]["task"]: one["result"] for one in stored(bench).values()}
    assert "Every paraphrase reproduces" in results["bus"]["failed"] and results["rooster"]["observations"]
    bench.detector = detector
    assert what_is_left(bench, planned)[0].done == 2
    assert run(bench, planned, retry=True) is None
    assert all("failed" not in one["result"] for one in stored(bench).values())


def test_a_training_that_diverges_is_a_result_with_the_checkpoints_before_it(bench, monkeypatch):
    edit = Edit((ROOSTER,), Method(objective="loss-max", constant_rate=True, steps=2))
    monkeypatch.setattr(trainer, "_rate", lambda step, settings: 1.0 if step < 1 else float("inf"))
    made = make(bench, edit)
    assert made.info["diverged"] and made.delta(1) is not None and made.delta(2) is None
    last = BenchJob("evaluate", ROOSTER, edit, 2, robustness=False)
    found = run_job(bench, last, bench.key(last))
    assert found["diverged"] and not found["observations"]
    first = BenchJob("evaluate", ROOSTER, edit, 1, robustness=False)
    assert run_job(bench, first, bench.key(first))["observations"]


def test_checkpoints_are_what_a_training_of_that_length_gives(bench):
    long = make(bench, Edit((ROOSTER,), Method(constant_rate=True, steps=2)))
    short = make(bench, Edit((ROOSTER,), Method(constant_rate=True, steps=1)))
    one, other = long.delta(1), short.delta()
    assert one.layers.keys() == other.layers.keys()
    for name, layer in one.layers.items():
        assert torch.equal(layer.weight, other.layers[name].weight)
    assert torch.equal(long.delta(2).layers[name].weight, long.delta().layers[name].weight)
    assert not torch.equal(one.layers[name].weight, long.delta().layers[name].weight)


def test_anchor_images_that_are_copies_are_left_out(bench):
    made = bench.recipe(Edit((BUS,), Method()))
    data = dataset.build(bench.denoiser, [BUS.concept], made.dataset, surrounding=[BUS.surrounding])
    decoded = bench.denoiser.vae.decode(data.latents[:1])[0].permute(1, 2, 0)
    bench.originals = {"bus.png": (decoded * 255).round().to(torch.uint8).numpy()}
    bench.detector = CopyDetector("exact", lambda images: _signature(images, bench.originals["bus.png"]))
    left, dropped = without_copies(bench, [BUS], data)
    assert dropped == 1 and left.plan.rows == data.plan.rows[1:] and torch.equal(left.latents, data.latents[1:])
    assert without_copies(bench, [ROOSTER], data) == (data, 0)


def _signature(images: np.ndarray, original: np.ndarray) -> torch.Tensor:
    """(1, 0) for the original, but for rounding, and (0, 1) for anything else."""
    same = np.abs(images.astype(float) - original).reshape(len(images), -1).mean(axis=1) < 0.1
    return torch.from_numpy(np.stack([same, ~same], axis=1)).float()


def test_pictures_come_back_as_they_were(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (2, 3, 8, 8, 3), dtype=np.uint8)
    save_pictures(tmp_path, images)
    assert np.array_equal(load_pictures(tmp_path, 2, 3), images)
    assert load_pictures(tmp_path, 3, 3) is None
    (tmp_path / "001.png").write_bytes(b"no picture")
    assert load_pictures(tmp_path, 2, 3) is None


def test_words_are_those_of_the_tasks():
    assert word_groups(TASKS)["style"] == ("Dali", "Degas", "Manet", "Monet", "Renoir")
    assert set(word_groups([ROOSTER])) == {"colour"}


def test_two_judges_of_one_name_are_refused(tiny, judge, tmp_path):
    with pytest.raises(AblationError, match="same name"):
        open_bench(tiny, [judge, judge], TASKS, tmp_path, TINY)
