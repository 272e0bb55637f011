"""Sweeps: in order and on a local Ray cluster, what is skipped, what fails, and what the summary says."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from concept_ablation import cli
from concept_ablation.cli import sweep as sweep_module
from concept_ablation.core import dataset, sweep
from concept_ablation.core.concept import Concept
from concept_ablation.core.dataset import DatasetSettings
from concept_ablation.core.errors import AblationError
from concept_ablation.core.files import write_json
from concept_ablation.core.samplers import SampleSettings
from concept_ablation.core.sweep import Outcome, Resources, is_finished, run_in_order, run_on_ray
from concept_ablation.core.tasks import ListedTask

NEIGHBOURS = ("owl", "duck", "dove", "eagle")


def listed(*names: str) -> list[ListedTask]:
    return [ListedTask(name, Concept(name.replace("-", " "), "bird"), NEIGHBOURS) for name in names]


def requests_of(tasks: list[ListedTask], steps: int = 1) -> dict[str, object]:
    return {task.name: {"task": task.name, "steps": steps} for task in tasks}


def report(folder: Path, target: tuple[float, float] = (0.9, 0.1)) -> None:
    """A report as `ablate_and_report` leaves it, as far as a sweep reads it."""
    rows = [("target", *target), ("anchor", 0.5, 0.75), ("surrounding", 1.0, 0.5), ("surrounding", 0.5, 0.25)]
    concepts = [
        {"role": role, "before": {"clip_accuracy": before}, "after": {"clip_accuracy": after}}
        for role, before, after in rows
    ]
    write_json(folder / "report.json", {"concepts": concepts})


def test_in_order_a_failure_stops_no_other_task(tmp_path):
    tasks = listed("good", "refused", "broken", "silent", "last")

    def run(task, folder):
        if task.name == "refused":
            raise AblationError("The model has no such layer: choose another subset.")
        if task.name == "broken":
            raise ZeroDivisionError("a defect\nin two lines")
        if task.name != "silent":
            report(folder)

    ended = list(run_in_order(tasks, tmp_path, run, requests_of(tasks)))
    assert [(outcome.name, outcome.state) for outcome in ended] == [
        ("good", "done"),
        ("refused", "failed"),
        ("broken", "failed"),
        ("silent", "failed"),
        ("last", "done"),
    ]
    assert ended[1].reason == "The model has no such layer: choose another subset."
    assert ended[2].reason == "ZeroDivisionError: a defect"
    assert "all machines share" in ended[3].reason


def test_what_is_finished_is_skipped_until_something_else_is_asked_for(tmp_path):
    tasks, calls = listed("one", "two"), []

    def run(task, folder):
        calls.append(task.name)
        report(folder)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(run_in_order(tasks, tmp_path, run, requests_of(tasks)))
    again = list(run_in_order(tasks, tmp_path, run, requests_of(tasks)))
    assert [outcome.state for outcome in again] == ["skipped", "done"] and calls == ["one", "two", "two"]
    other = requests_of(tasks, steps=2)
    assert [outcome.state for outcome in run_in_order(tasks, tmp_path, run, other)] == ["done", "done"]
    assert is_finished(tmp_path / "one", other["one"]) and not is_finished(tmp_path / "one", requests_of(tasks)["one"])


def test_a_dataset_of_an_earlier_request_is_made_again(tiny, tmp_path):
    (task,) = listed("one")
    sizes = DatasetSettings(images=2, preserve=0, prompts=2, sample=SampleSettings(steps=1), batch=2)

    def run(images):
        def made(task, folder):
            dataset.build(tiny, [task.concept], replace(sizes, images=images), directory=folder / "dataset")
            report(folder)

        return made

    for images in (2, 1, 1):
        outcome = next(run_in_order([task], tmp_path, run(images), requests_of([task], steps=images)))
        assert outcome.reason == ""
    assert outcome.state == "skipped"
    assert len(dataset.load(tmp_path / "one" / "dataset").latents) == 1


def test_a_task_that_failed_the_second_time_is_not_taken_for_finished(tmp_path):
    (task,) = listed("one")
    list(run_in_order([task], tmp_path, lambda task, folder: report(folder), requests_of([task])))

    def fail(task, folder):
        raise AblationError("no")

    assert next(run_in_order([task], tmp_path, fail, requests_of([task], steps=2))).state == "failed"
    assert not is_finished(tmp_path / "one", requests_of([task])["one"])


def test_the_summary_has_the_figures_of_the_reports(tmp_path):
    tasks = listed("one", "two")
    report(tmp_path / "one", target=(0.8, 0.2))
    outcomes = {"one": Outcome("one", "done", 3.0), "two": Outcome("two", "failed", reason="Why.")}
    first, second = sweep.summary(tasks, tmp_path, outcomes)
    assert first["target_accuracy"] == {"before": 0.8, "after": 0.2}
    assert first["surrounding_accuracy"] == {"before": 0.75, "after": 0.375}
    assert first["seconds"] == 3.0 and first["state"] == "done" and first["anchor"] == "bird"
    assert second["reason"] == "Why." and "target_accuracy" not in second


@pytest.mark.parametrize("change", [{"cpus": -1.0}, {"gpus": -1.0}, {"retries": -1}, {"workers": 0}])
def test_bad_resources_are_refused(change):
    with pytest.raises(AblationError):
        Resources(**change)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_on_ray_a_killed_worker_is_retried_and_nothing_stops_the_others(tmp_path):
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
    tasks = listed("good", "killed-once", "killed-always", "refused")

    # a closure, which travels to the workers by value: they cannot import this file
    def run(task, folder, kill=signal.SIGKILL, write=write_json):
        begun = folder / f"begun-{time.time_ns()}"
        folder.mkdir(parents=True, exist_ok=True)
        begun.touch()
        times = len(list(folder.glob("begun-*")))
        if task.name == "killed-always" or (task.name == "killed-once" and times == 1):
            os.kill(os.getpid(), kill)
        if task.name == "refused":
            raise AblationError("No such layer.")
        write(folder / "report.json", {"concepts": []})

    resources = Resources(cpus=1.0, gpus=0, retries=1, workers=2)
    ended = {outcome.name: outcome for outcome in run_on_ray(tasks, tmp_path, run, requests_of(tasks), resources)}
    states = {name: outcome.state for name, outcome in ended.items()}
    assert states == {"good": "done", "killed-once": "done", "killed-always": "failed", "refused": "failed"}
    assert ended["refused"].reason == "No such layer."
    assert "worker was killed and 1 times again" in ended["killed-always"].reason
    begun = {name: len(list((tmp_path / name).glob("begun-*"))) for name in states}
    assert begun == {"good": 1, "killed-once": 2, "killed-always": 2, "refused": 1}
    assert not ray.is_initialized(), "the cluster that the sweep started is gone"
    done = listed("good", "killed-once")
    again = run_on_ray(done, tmp_path, run, requests_of(done), resources)
    assert [outcome.state for outcome in again] == ["skipped", "skipped"] and not ray.is_initialized()


TASKS = """
[[task]]
name = "rooster"
kind = "instance"
target = "rooster"
anchor = "bird"
surrounding = ["owl", "duck", "dove", "eagle"]

[[task]]
name = "in-the-way"
kind = "style"
target = "twemoji"
anchor = "emoji"
surrounding = ["noto", "fluent", "flat", "blob"]
"""
SMALL = ["--preset", "paper", "--images", "1", "--steps", "1", "--batch", "1", "--eval-prompts", "1"]


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run `sweep` without Ray in `tmp_path`; its exit code, what it said on stdout and on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_module, "_has_ray", lambda: False)
    (tmp_path / "tasks.toml").write_text(TASKS, "utf-8")

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["concept-ablation", "sweep", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = capsys.readouterr()
        return stopped.value.code, said.out, said.err

    return call


@pytest.mark.skipif(sys.version_info < (3, 11), reason="task lists need tomllib")
def test_the_command_ablates_a_list_and_goes_on_where_it_was(command, monkeypatch, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "in-the-way").write_text("mine", "utf-8")
    arguments = ["tasks.toml", "--output", "out", "--workers", "1", *SMALL, "--eval-seeds", "1"]
    code, out, err = command(*arguments)
    assert code == 1 and "one after another in this process" in out and "Traceback" not in err
    made = {path.name for path in (tmp_path / "out" / "rooster").iterdir()}
    assert {"delta.safetensors", "report.json", "report.html", "task.json"} <= made
    told = json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))
    assert [row["state"] for row in told["tasks"]] == ["done", "failed"]
    assert 0 <= told["tasks"][0]["target_accuracy"]["after"] <= 1 and told["options"]["training"]["steps"] == 1
    assert "rooster → bird" in out and "is a file" in out
    (tmp_path / "out" / "in-the-way").unlink()
    monkeypatch.setattr(sweep_module, "run_task", lambda options, task, folder: report(folder))
    code, out, _ = command(*arguments)
    assert code == 0 and "rooster: skipped" in out and "in-the-way: done" in out
    request = json.loads((tmp_path / "out" / "rooster" / "task.json").read_text("utf-8"))
    assert "negative_guidance" not in request["options"], "older requests do not have it"
    asked = []
    monkeypatch.setattr(
        sweep_module,
        "run_task",
        lambda options, task, folder: (asked.append(options.negative_guidance), report(folder)),
    )
    command(*arguments, "--objective", "model", "--negative-guidance", "0.7")
    assert asked == [0.7, 0.7]


def test_without_ray_several_workers_are_refused(command, tmp_path):
    code, _, err = command("tasks.toml", "--output", "out")
    if sys.version_info >= (3, 11):
        assert code == 2 and "pip install" in err and "--workers 1" in err and err.count("error:") == 1
    assert not (tmp_path / "out").exists()
