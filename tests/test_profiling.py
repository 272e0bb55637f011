"""Traces of training steps: whole or absent, of the steps that were meant, for every kind of training."""

from __future__ import annotations

import json

import pytest

from concept_ablation.core.ablation import Task, ablate
from concept_ablation.core.concept import Concept
from concept_ablation.core.errors import AblationError, Interrupted
from concept_ablation.core.presets import recipe
from concept_ablation.core.profiling import profiled
from concept_ablation.core.samplers import SampleSettings

TASK = Task(Concept("grumpy cat", "cat"))
DATASET = {"images": 2, "preserve": 2, "prompts": 2, "sample": SampleSettings(steps=1)}


def small(preset, tiny, steps):
    return recipe(preset, tiny, auto_preserve=0, dataset=DATASET, training={"steps": steps, "batch": 1})


@pytest.mark.parametrize(("preset", "steps", "traced"), [("fast", 9, 5), ("balanced", 3, 1)])
def test_a_trace_holds_the_steps_after_the_first_ones(tiny, tmp_path, preset, steps, traced):
    chosen, seen, path = small(preset, tiny, steps), [], tmp_path / "new" / "trace.json"
    with profiled(path, seen.append, chosen.training) as on_progress:
        ablate(tiny, [TASK], chosen, on_progress=on_progress)
    names = [event.get("name", "") for event in json.loads(path.read_text("utf-8"))["traceEvents"]]
    assert len({name for name in names if name.startswith("ProfilerStep#")}) == traced
    assert any("addmm" in name for name in names) and any("Backward" in name for name in names)
    assert len([progress for progress in seen if progress.phase == "Training"]) == steps
    assert [file.name for file in path.parent.iterdir()] == ["trace.json"]


def test_a_run_that_stops_leaves_no_trace_and_the_next_one_can_begin(tiny, tmp_path):
    chosen, path = small("fast", tiny, 6), tmp_path / "trace.json"

    def stop(progress):
        if progress.phase == "Training" and progress.step == 4:
            raise Interrupted("stop")

    for _ in range(2):
        with pytest.raises(Interrupted), profiled(path, stop, chosen.training) as on_progress:
            ablate(tiny, [TASK], chosen, on_progress=on_progress)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("preset", "steps", "name", "message"),
    [
        ("instant", None, "a.json", "no training to trace"),
        ("fast", 1, "a.json", "at least 2 training steps"),
        ("fast", 5, "a.txt", "must end in .json"),
    ],
)
def test_what_cannot_be_traced_is_said_before_any_work(tiny, tmp_path, preset, steps, name, message):
    training = None if steps is None else small(preset, tiny, steps).training
    with pytest.raises(AblationError, match=message), profiled(tmp_path / name, None, training):
        pytest.fail("it began")
    assert list(tmp_path.iterdir()) == []


def test_without_a_path_nothing_comes_between(tmp_path):
    def callback(progress):
        pass

    with profiled(None, callback, None) as on_progress:
        assert on_progress is callback
