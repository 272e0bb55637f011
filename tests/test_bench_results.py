"""What results.json, its tables and its plots say: of the same tasks in every comparison, and of whoever measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from concept_ablation.core.bench import plots
from concept_ablation.core.bench.bench import Bench, open_bench
from concept_ablation.core.bench.experiments import Selection, plan_jobs
from concept_ablation.core.bench.plan import TINY, Method
from concept_ablation.core.bench.runner import Planned, plan_keys
from concept_ablation.core.bench.summary import results
from concept_ablation.core.bench.tables import comparable, mean, objectives, provenance
from concept_ablation.core.errors import AblationError
from concept_ablation.tests.test_bench_run import ROOSTER, ColourJudge

SETTINGS = {"judges": ["J"]}


def row(task: str, target: float, surrounding: dict[str, float] | None = None, **more: object) -> dict[str, Any]:
    """A row of results.json, as far as plots look at it."""
    around = surrounding or {"owl": 1.0}
    shares = {"target": target, "surrounding": sum(around.values()) / len(around)}
    judged = {role: {"before": {"value": 1.0}, "after": {"value": value}} for role, value in shares.items()}
    judged["surrounding_by_name"] = {name: [1.0, value] for name, value in around.items()}
    plain = {"kind": "instance", "seed": 0, "step": None, "objective": "model", "concepts_in_the_edit": 1}
    return {**plain, "task": task, "judges": {"J": judged}, **more}


def bars(figure: Figure) -> dict[str, list[float]]:
    """Heights by label, of the first axes."""
    return {bar.get_label(): [patch.get_height() for patch in bar.patches] for bar in figure.axes[0].containers}


def lines(figure: Figure) -> dict[str, list[float]]:
    """The same of curves."""
    return {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}


def test_rows_are_compared_on_the_tasks_and_seeds_of_all_series():
    rows = [row("a", 0.0, subset="x"), row("b", 0.0, subset="x"), row("a", 0.5, subset="y")]
    assert comparable(rows, lambda one: one["subset"]) == [rows[0], rows[2]]
    rows.append(row("b", 0.5, subset="y", seed=1))
    assert comparable(rows, lambda one: one["subset"]) == [rows[0], rows[2]]
    assert comparable([], lambda one: one["subset"]) == []


def test_a_half_done_comparison_of_subsets_shows_what_both_were_measured_on():
    rows = [row("a", 0.25, subset="x"), row("b", 0.75, subset="x"), row("a", 0.5, subset="y")]
    drawn = bars(plots._subsets({"settings": SETTINGS, "subsets": rows}))
    assert {name: heights[0] for name, heights in drawn.items()} == {"x": 0.25, "y": 0.5}
    assert plots._subsets({"settings": SETTINGS, "subsets": [rows[1], rows[2]]}) is None


def test_a_half_done_comparison_of_objectives_shows_what_all_were_measured_on():
    rows = [row(task, value, objective="x", step=25) for task, value in (("a", 0.25), ("b", 0.75))]
    rows.append(row("a", 0.5, objective="y", step=25))
    drawn = lines(plots._objectives({"settings": SETTINGS, "objectives": rows}))
    assert drawn == {"x": [1.0, 0.25], "y": [1.0, 0.5]}
    assert "| instance | x | target | 0.25 |" in objectives(rows, "J")


def test_a_curve_ends_where_the_training_of_one_task_diverged():
    rows = [
        row(task, value, objective=name, step=step)
        for name in ("x", "y")
        for task, value in (("a", 0.25), ("b", 0.75))
        for step in (25, 50)
        if (name, task, step) != ("y", "b", 50)
    ]
    diverged = {**row("b", 0.0, objective="y", step=50), "judges": {}}
    found = {"settings": SETTINGS, "objectives": [*rows, diverged]}
    assert lines(plots._objectives(found)) == {"x": [1.0, 0.5, 0.5], "y": [1.0, 0.5]}
    assert mean(rows, "J", "target", objective="y", step=50) is None
    assert "| instance | y | target | 0.50 | – |" in objectives(found["objectives"], "J")


def test_one_model_and_one_each_are_compared_on_surrounding_concepts_of_both():
    # "duck" is a target of the model without several concepts, and surrounds nothing in it
    rows = [row("a", 0.0, {"owl": 0.75, "duck": 0.0}), row("b", 0.5, {"owl": 1.0})]
    rows.append(row("a", 0.25, {"owl": 0.5}, concepts_in_the_edit=2))
    drawn = bars(plots._several({"settings": SETTINGS, "several": rows}))
    assert drawn == {"one model each": [0.0, 0.75], "one model": [0.25, 0.5]}
    assert plots._several({"settings": SETTINGS, "several": rows[1:]}) is None
    nothing_left = [row("a", 0.0, {"duck": 1.0}), row("a", 0.25, {"owl": 0.5}, concepts_in_the_edit=2)]
    assert bars(plots._several({"settings": SETTINGS, "several": nothing_left})) == {
        "one model each": [0.0],
        "one model": [0.25],
    }


def test_a_picture_that_some_method_was_not_measured_on_has_no_bars():
    def copied(task: str, method: str, after: float) -> dict[str, Any]:
        copies = {"target": {"before": {"value": 1.0}, "after": {"value": after}}}
        return row(task, 0.0, method=method, copies=copies)

    rows = [copied("a", "full", 0.0), copied("b", "full", 0.25), copied("b", "attn", 0.5)]
    drawn = bars(plots._memorized({"settings": SETTINGS, "memorized": rows}))
    assert drawn == {"pretrained": [1.0], "full": [0.25], "attn": [0.5]}


def test_attacks_are_averaged_over_tasks_that_all_edits_were_attacked_on():
    def attacked(task: str, method: str, share: float) -> dict[str, Any]:
        curve = [{"steps": 0, "success": {"value": 0.0}}, {"steps": 50, "success": {"value": share}}]
        return {"task": task, "method": method, "failed": None, "curves": {"J": curve}}

    rows = [attacked("a", "pretrained", 0.5), attacked("b", "pretrained", 1.0), attacked("a", "balanced", 0.25)]
    rows.append({"task": "b", "method": "balanced", "failed": "No luck."})
    drawn = lines(plots._attack({"settings": SETTINGS, "attack": rows}))
    assert drawn == {"pretrained": [0.0, 0.5], "balanced": [0.0, 0.25]}


def opened(denoiser: object, folder: Path) -> Bench:
    return open_bench(denoiser, [ColourJudge("first")], (ROOSTER,), folder, TINY)


@pytest.fixture
def bench(tiny, tmp_path) -> Bench:
    return opened(tiny, tmp_path / "out")


@pytest.fixture
def planned(bench) -> dict[str, list[Planned]]:
    selection = Selection((ROOSTER,), (Method(),), checkpoints=TINY.checkpoints)
    return plan_keys(bench, plan_jobs(["table", "subsets"], selection))


def stored(key: str, **more: object) -> dict[str, Any]:
    plain = {"key": key, "rows": 10, "seconds": 1.0, "machine": "other", "device": "NVIDIA H200"}
    return {**plain, "result": {"failed": "No luck."}, **more}


def test_results_are_of_the_machines_that_measured_and_name_their_measurements(bench, planned):
    keys = sorted({one.key for found in planned.values() for one in found})
    for key, torch in zip(keys, ("9.8", "9.9"), strict=False):
        bench.store.finish(key, stored(key, torch=torch))
    bench.store.finish("f" * 32, stored("f" * 32, device="another"))
    found = results(bench, planned, (ROOSTER,), {}, {})
    assert found["keys"] == keys[:2] and len(keys) > 2
    assert (found["cost"]["devices"], found["cost"]["torch"]) == (["NVIDIA H200"], ["9.8", "9.9"])
    assert "hours on NVIDIA H200, torch 9.8, torch 9.9;" in provenance(found)
    # older results do not say with which version they were made
    bench.store.finish(keys[0], stored(keys[0]))
    bench.store.finish(keys[1], stored(keys[1]))
    assert "hours on NVIDIA H200;" in provenance(results(bench, planned, (ROOSTER,), {}, {}))


def test_a_folder_with_results_of_another_setup_is_refused(bench, planned, tiny, monkeypatch):
    key = planned["table"][0].key
    setup = {**tiny.setup(), "prediction": "v_prediction"}
    bench.store.finish(key, stored(key, model=tiny.fingerprint(), setup=setup))
    with pytest.raises(
        AblationError, match=r"^The results in .* another setup of the model \(prediction\): give .*\.$"
    ):
        opened(tiny, bench.store.root)
    with monkeypatch.context() as patched:
        patched.setattr(type(tiny), "setup", lambda _: setup)
        opened(tiny, bench.store.root)
    # another model may have another setup, and older results do not say theirs
    bench.store.finish(key, stored(key, model="another", setup=setup))
    opened(tiny, bench.store.root)
    bench.store.finish(key, stored(key))
    opened(tiny, bench.store.root)
