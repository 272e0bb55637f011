"""The benchmark of speed: what is counted and compared, in which order jobs run, and that a stopped run goes on."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from concept_ablation.core.concept import Concept
from concept_ablation.core.files import write_json
from concept_ablation.core.harvest import HarvestSettings, harvest
from concept_ablation.core.phases import Phase
from concept_ablation.core.samplers import SampleSettings
from concept_ablation.core.statistics import Estimate, share_interval
from concept_ablation.core.tasks import ListedTask, load_tasks
from concept_ablation.core.trainer import TrainSettings

pytest.importorskip("tomllib")

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
CATEGORIES = json.loads((ROOT / "assets" / "emoji_diffusion" / "ablation_hints.json").read_text("utf-8"))["categories"]
CAT = ListedTask("cat", Concept("grumpy cat", "cat"), ("dog", "owl"))


@dataclass
class CoinJudge:
    """Stands for the judge: a picture shows what it is asked for if its brightness is even."""

    name: str = "coin"

    def embed_images(self, images: np.ndarray) -> torch.Tensor:
        even = torch.from_numpy(images.reshape(len(images), -1).sum(1).astype(np.int64)) % 2 == 0
        return torch.stack((even.float(), 1 - even.float()), 1)

    def embed_concept(self, texts) -> torch.Tensor:
        return torch.tensor([0.0, 1.0]) if texts[0] == CAT.concept.anchor else torch.tensor([1.0, 0.0])


@pytest.fixture
def modules(monkeypatch) -> SimpleNamespace:
    """The programs, imported as Python finds them when one of them is run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("job_store", "measuring", "marked", "speed_presets", "speed_reference", "speed_report", "speed")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    found: dict[str, ModuleType] = {name: __import__(name) for name in names}
    return SimpleNamespace(**found)


@pytest.fixture
def bench(modules, make_model, tmp_path):
    """The first part's jobs on the tiny model."""
    changes = {"balanced": {"images": 2, "preserve": 2, "sample": SampleSettings(steps=2)}}
    changes["paper"] = {"images": 3, "sample": SampleSettings(steps=2)}
    sizes = replace(modules.speed_presets.TINY, dataset=changes)
    store = modules.job_store.JobStore(tmp_path)
    return modules.speed_presets.Bench(make_model, CoinJudge(), sizes, store, {"machine": "m"})


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ([], "published"),
        (["--only", "step"], "published"),
        (["--repeats", "1"], "outputs"),
        (["--slow-repeats", "2"], "outputs"),
        (["--batch", "1"], "outputs"),
        (["--only", "tasks", "--steps", "2"], "outputs"),
        (["--tasks", "cat"], "outputs"),
        (["--presets", "fast"], "outputs"),
        (["--tiny"], "outputs/tiny"),
        (["--tiny", "--report"], "outputs/tiny"),
    ],
)
def test_only_a_whole_run_is_published(modules, tmp_path, monkeypatch, given, where):
    speed, written = modules.speed, []
    for name in ("RESULTS", "FOLDER"):
        monkeypatch.setattr(modules.job_store, name, tmp_path / {"RESULTS": "published", "FOLDER": "outputs"}[name])
        monkeypatch.setattr(speed, name, getattr(modules.job_store, name))
    found = {"ratios": {}, "tasks": ["a task"], "environment": {}}
    for part in (tmp_path / "published", tmp_path / "outputs", tmp_path / "outputs" / "tiny"):
        write_json(part / "speed.json", found)
    monkeypatch.setattr(sys, "argv", ["speed.py", *given])
    monkeypatch.setattr(speed, "load_denoiser", lambda: SimpleNamespace(fingerprint=lambda: ""))
    monkeypatch.setattr(speed.Judge, "load", lambda: None)
    monkeypatch.setattr(speed, "measure_tasks", lambda *_: {"tasks": ["a task"]})
    monkeypatch.setattr(speed, "measure_steps", lambda *_: None)
    monkeypatch.setattr(speed, "assemble", lambda *_: found)
    monkeypatch.setattr(speed.speed_report, "write_plot", lambda _, path: written.append(path))
    monkeypatch.setattr(speed.speed_report, "publish", lambda *_: written.append("READMEs"))
    monkeypatch.setattr(speed.speed_report, "section", lambda _: "tables")
    speed.main()
    published = ["READMEs"] if where == "published" else []
    assert written == [tmp_path / where / "speed.png", *published]


def test_a_finished_job_is_not_done_again_until_its_inputs_change(modules, tmp_path):
    store, done = modules.job_store.JobStore(tmp_path), itertools.count()

    def work():
        return {"number": next(done)}

    assert store.run("job", {"a": 1, "b": [2]}, work) == {"number": 0}
    assert store.run("job", {"b": [2], "a": 1}, work) == {"number": 0}
    assert store.run("job", {"a": 2, "b": [2]}, work) == {"number": 1}
    assert store.run("other", {"a": 1, "b": [2]}, work) == {"number": 2}
    with pytest.raises(ZeroDivisionError):
        store.run("job", {"a": 3}, lambda: {"number": 1 / 0})
    assert store.run("job", {"a": 3}, work) == {"number": 3}
    kept = json.loads(store.path("job", {"a": 1, "b": [2]}).read_text("utf-8"))
    assert kept["inputs"] == {"a": 1, "b": [2]}
    assert modules.job_store.environment().keys() >= {"cpu", "cores", "torch", "commit"}


def test_accuracy_resamples_prompts_and_a_change_is_paired(modules):
    measuring = modules.measuring
    rng = np.random.default_rng(0)
    first = {name: rng.integers(2, size=(5, 4)).tolist() for name in ("a", "b")}
    second = {name: [[0] * 4 for _ in range(5)] for name in first}
    groups = np.repeat(np.arange(10), 4)
    flat = np.concatenate([np.ravel(first["a"]), np.ravel(first["b"])]).astype(bool)
    assert measuring.accuracy(first) == share_interval(flat, groups)
    assert measuring.accuracy(first, first).value == pytest.approx(flat.mean())
    change = measuring.accuracy_change([first], [second])
    assert change.value == pytest.approx(-flat.mean()) and change.low <= change.value <= change.high
    same = measuring.accuracy_change([first], [first])
    # paired: no difference, and no more doubt than 40 equal pictures leave
    assert same.value == 0 and same.high == -same.low == pytest.approx(3 / 40, rel=0.05)
    nan = float("nan")
    assert measuring.plain(Estimate(0.5, nan, nan)) == {"value": 0.5, "low": None, "high": None}


def test_a_phase_costs_rows_of_both_passes_or_of_one(modules):
    phases = (Phase("draw", 2.0, 48, 0), Phase("train", 3.0, 20, 12))
    found = modules.measuring.costs(phases, 5.5)
    rows = {name: (phase["seconds"], phase["forward"], phase["trained"]) for name, phase in found.items()}
    assert rows == {"draw": (2.0, 48, 0), "train": (3.0, 8, 12), "rest": (0.5, 0, 0)}


def test_presets_take_turns(modules):
    tasks = [replace(CAT, name="one"), replace(CAT, name="two")]
    order = [
        (task.name, preset, repeat) for task, preset, repeat in modules.speed.turns(tasks, {"a": 2, "b": 1, "c": 2})
    ]
    assert sorted(order) == sorted(
        [(name, preset, repeat) for name in ("one", "two") for preset in "ac" for repeat in (0, 1)]
        + [("one", "b", 0), ("two", "b", 0)]
    )
    assert [preset for name, preset, repeat in order if (name, repeat) == ("one", 0)] == ["a", "b", "c"]
    assert [preset for name, preset, repeat in order if (name, repeat) == ("two", 0)] == ["b", "c", "a"]
    assert [repeat for *_, repeat in order] == sorted(repeat for *_, repeat in order)


def test_the_first_part_measures_every_preset_and_goes_on_where_it_was(modules, bench, monkeypatch):
    repeats = {"balanced": 2, "paper": 1}
    part = modules.speed.measure_tasks(bench, [CAT], repeats)
    (row,) = part["tasks"]
    balanced, paper = row["presets"]["balanced"], row["presets"]["paper"]
    assert len(balanced["seconds"]) == 2 and len(paper["seconds"]) == 1
    # 3 pictures of 2 guided steps; 3 training steps of 4 rows, each with a teacher's pass
    assert paper["phases"]["draw"]["forward"] == 3 * 2 * 2
    assert (paper["phases"]["train"]["forward"], paper["phases"]["train"]["trained"]) == (3 * 4, 3 * 4)
    assert part["presets"]["paper"]["forward"] == 12 + 12 and part["presets"]["paper"]["trained"] == 12
    for accuracy in (row["before"]["target_accuracy"], paper["target_accuracy"], balanced["surrounding_accuracy"]):
        assert 0 <= accuracy["value"] <= 1 and accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert part["floor"]["preset"] == "balanced" and len(part["floor"]["repeats"]) == 2
    for name in ("_make", "_hits", "_overhead"):
        monkeypatch.setattr(type(bench), name, lambda *_: pytest.fail("a finished job is done again"))
    assert modules.speed.measure_tasks(bench, [CAT], repeats) == part


def test_the_bare_network_gets_the_rows_of_the_training(modules, make_model, bench):
    model = make_model()
    rows = harvest(model, [CAT.concept], HarvestSettings(2, prompts=2, sample=SampleSettings(steps=2)))
    settings = TrainSettings(steps=3, batch=4, learning_rate=1e-3)
    before = model.fingerprint()
    loop, calls = modules.speed_presets.timed_training(model, rows, settings)
    assert [len(x) for x, *_ in calls] == [4] * 3 and loop > 0
    seen, denoise = [], type(model).denoise

    def spied(x, sigma, cond):
        seen.append((x, torch.is_grad_enabled()))
        return denoise(model, x, sigma, cond)

    model.denoise = spied
    assert modules.speed_presets.bare_steps(model, calls, "cross-attn") > 0
    assert all(x is given and grad for (x, grad), (given, *_) in zip(seen, calls, strict=True))
    assert model.fingerprint() == before and not any(weight.requires_grad for weight in model.network.parameters())
    assert all(weight.grad is None for weight in model.network.parameters())


def preset_row(seconds: float, target: float, near: float) -> dict:
    interval = {"value": target, "low": target - 0.1, "high": target + 0.1}
    around = {"value": near, "low": None, "high": None}
    accuracies = {"target_accuracy": interval, "surrounding_accuracy": around}
    return {"seconds": [seconds], "median_seconds": seconds, "phases": {}, "bytes": 1, **accuracies}


def test_fast_is_compared_with_paper_over_the_same_prompts(modules):
    tasks = [CAT, replace(CAT, name="second")]
    found = {"paper": [[1, 1], [1, 0]], "fast": [[0, 0], [0, 0]]}
    bench = SimpleNamespace(hits=lambda task, preset: dict.fromkeys(("grumpy cat", "dog", "owl"), found[preset]))
    rows = [
        {"presets": {"paper": preset_row(paper, 0.5, 0.5), "fast": preset_row(fast, 0.5, 0.5)}}
        for paper, fast in ((100.0, 1.0), (300.0, 9.0))
    ]
    made = modules.speed._compare(bench, tasks, rows, "paper", "fast")
    assert made["seconds_ratio"] == pytest.approx((0.01 + 0.03) / 2)
    assert made["target_change"]["value"] == made["surrounding_change"]["value"] == -0.75
    assert made["target_no_higher"] and not made["surrounding_no_lower"]


def test_the_ratios_come_from_medians_and_each_part_says_with_which_code_it_was_measured(modules):
    sizes = (("ours", 2, 3), ("reference", 8, 4))
    steps = {"cases": {case: {"seconds": s, "peak_gb": gb, "loaded_gb": 2} for case, s, gb in sizes}}
    tasks = {"tasks": [{"name": "x"}], "floor": {"overhead": 0.02}, "fast_against_paper": {"seconds_ratio": 0.01}}
    machine = {"commit": "1"}
    first = modules.speed.assemble(machine, {"tasks": tasks}, {})
    none = dict.fromkeys(("step_over_reference", "memory_over_reference", "memory_beyond_models_over_reference"), None)
    assert first["ratios"] == {"fast_over_paper": 0.01, "overhead": 0.02, **none}
    both = modules.speed.assemble(machine, {"step": steps}, first)
    wanted = {"fast_over_paper": 0.01, "step_over_reference": 0.25, "memory_over_reference": 0.75, "overhead": 0.02}
    assert both["ratios"] == {**wanted, "memory_beyond_models_over_reference": 0.5} and both["tasks"] == tasks["tasks"]
    alone = modules.speed.assemble(machine, {"step": steps}, {})
    assert alone["tasks"] == [] and alone["ratios"]["overhead"] is None
    later = modules.speed.assemble({"commit": "2"}, {"tasks": tasks}, both)
    assert (later["environment"], later["step"]["environment"]) == ({"commit": "2"}, machine)
    assert later["ratios"] == both["ratios"]
    assert modules.speed.assemble({"commit": "3"}, {}, later) == later


def test_the_cases_of_the_second_part_take_turns_in_processes_of_their_own(modules, tmp_path, monkeypatch):
    commands: list[list[str]] = []
    environments: list[dict[str, str] | None] = []

    def run(command, env=None, **options):
        commands.append([str(part) for part in command])
        environments.append(env)
        seconds = [float(len(commands)), float(len(commands) + 1)]
        found = {"seconds": seconds, "median": seconds[0], "loaded_gb": 1.0, "peak_gb": float(len(commands))}
        return SimpleNamespace(stdout=f"a warning\n{json.dumps(found)}\n")

    monkeypatch.setattr(modules.speed.subprocess, "run", run)
    how, store = modules.speed.Steps("tiny", 2, 2, 3), modules.job_store.JobStore(tmp_path)
    part = modules.speed.measure_steps(store, {}, how)
    cases = modules.speed_reference.CASES
    assert [command[2] for command in commands] == [*cases] * 4
    assert all(command[0] == sys.executable and Path(command[1]).name == "speed_reference.py" for command in commands)
    assert commands[0][3:] == ["--batch", "2", "--steps", "2", "--size", "tiny"]
    # the first case was process 1, 7 and 13, and 19 for the memory in use
    found = part["cases"]["reference"]
    assert found["process_gb"] == 7 and found["seconds"] == 7.5 and found["peak_gb"] == 19
    assert environments[:18] == [None] * 18 and "MALLOC_MMAP_THRESHOLD_" in environments[18]
    assert commands[18][3:] == ["--batch", "2", "--steps", "1", "--size", "tiny"]
    assert modules.speed.measure_steps(store, {}, how) == part and len(commands) == 24


@pytest.mark.parametrize(
    "case", ["reference", "reference-plain-attention", "ours", "ours-checkpointing", "ours-up", "ours-up-checkpointing"]
)
def test_a_step_of_each_case_runs(modules, case, monkeypatch):
    reference = modules.speed_reference
    size = reference.Size(8, (32, 64, 64, 64), (32, 32, 32, 32), 64)
    encoded = []
    encode = reference.AutoencoderKL.encode
    monkeypatch.setattr(reference.AutoencoderKL, "encode", lambda self, x: encoded.append(len(x)) or encode(self, x))
    found = reference.measure(case, size, 2, 1, torch.device("cpu"))
    assert len(found["seconds"]) == 1 and found["peak_gb"] >= found["loaded_gb"] > 0
    # the autoencoder runs in the authors' loop only
    assert encoded == ([2, 2] if case.startswith("reference") else [])
    assert torch.get_default_dtype() == torch.float32


def test_the_model_of_the_second_part_has_the_size_of_sd15(modules):
    with torch.device("meta"):
        models = modules.speed_reference.build(modules.speed_reference.SIZES["sd15"], torch.device("meta"))
    counts = [sum(p.numel() for p in module.parameters()) for module in (models.unet, models.vae, models.text)]
    assert counts == [859_520_964, 83_653_863, 123_060_480]
    assert {p.dtype for p in models.unet.parameters()} == {torch.bfloat16}


def test_the_plot_and_the_table_show_every_preset(modules, tmp_path):
    presets = {"fast": preset_row(2, 0.1, 0.8), "paper": preset_row(90, 0.2, 0.7)}
    before = {f"{what}_accuracy": {"value": 0.9, "low": 0.8, "high": 1.0} for what in ("target", "surrounding")}
    results = {
        "ratios": {"overhead": 0.031, "step_over_reference": 0.4, "memory_over_reference": 0.6},
        "environment": {"gpu": None, "cpu": "a CPU", "threads": 2, "torch": "2", "commit": "abc"},
        "tasks": [{"name": "x", "target": "fox", "anchor": "animal", "before": before, "presets": presets}],
        "before": {"target": before["target_accuracy"], "surrounding": before["surrounding_accuracy"]},
        "presets": {
            name: {
                **row,
                "forward": 1234,
                "trained": 5,
                "phases": {"Encoding": 0.25, name: 7.0},
                "target": row["target_accuracy"],
                "surrounding": row["surrounding_accuracy"],
            }
            for name, row in presets.items()
        },
        "step": {
            "environment": {"gpu": "a GPU", "cpu": "a CPU", "threads": 2, "torch": "2", "commit": "def"},
            "cases": {"ours": {"seconds": 3.21, "peak_gb": 4.5, "loaded_gb": 3.0}},
        },
    }
    report = modules.speed_report
    report.write_plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    lines = report.table(results).splitlines()
    assert lines[2] == "| no edit |  |  |  | 0.90 (0.80 to 1.00) | 0.90 (0.80 to 1.00) |"
    assert lines[3] == "| `fast` | 2.0 | 1,234 | 5 | 0.10 (0.00 to 0.20) | 0.80 |" and len(lines) == 5
    assert "| fox → animal | 0.90 (0.90) | 0.10 (0.80) | 0.20 (0.70) |" in report.tasks(results)
    assert report.phases(results).splitlines()[2:] == ["| `fast` | 0.2 | 7.0 |  |", "| `paper` | 0.2 |  | 7.0 |"]
    assert "| `ours` | 3.2 | 4.50 | 1.50 |" in report.steps(results)
    begin, end = report.MARKERS
    (tmp_path / "README.md").write_text(f"before\n{begin}\nold\n{end}\nafter\n", "utf-8")
    report.publish(results, tmp_path)
    text = (tmp_path / "README.md").read_text("utf-8")
    assert text.startswith(f"before\n{begin}\n| preset |") and text.endswith(f"{end}\nafter\n")
    assert "old" not in text and "commit abc" in text and "fox" not in text
    own = (tmp_path / "benchmarks" / "README.md").read_text("utf-8")
    assert "*A step: measured on a GPU, torch 2, commit def.*" in own
    assert own.startswith("## Speed\n") and "fox → animal" in own and "| 0.031 | 0.400 | 0.600 |" in own


def test_measured_tasks_are_not_those_that_settings_are_chosen_on():
    measured, chosen = (load_tasks(BENCHMARKS / f"{name}_tasks.toml").tasks for name in ("speed", "development"))
    assert len(measured) == 6
    anchors = [
        {task.concept.anchor for task in tasks if task.concept.kind == "instance"} for tasks in (measured, chosen)
    ]
    assert anchors[0].isdisjoint(anchors[1])
    assert {task.concept.target for task in measured}.isdisjoint({"tulip", "duck", *(t.concept.target for t in chosen)})
    order = list(CATEGORIES)
    for task in (*measured, *chosen):
        if task.concept.kind == "instance":
            own = [name for name in order if CATEGORIES[name] == task.concept.anchor]
            left = [name for name in own if name not in (task.concept.target, task.concept.anchor)]
            assert task.concept.target in own and task.surrounding == tuple(left[:5])
