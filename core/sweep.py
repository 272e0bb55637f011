"""Many ablations, one delta each: in order in this process, or at the same time on a Ray cluster.

What one task does is a function `run(task, folder)` that the caller gives: it writes delta and report to the task's own
folder. When it has returned, the request that it answered is written beside them as `task.json`; a task whose folder
holds the same request is not run again, so that a sweep that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .ablation import DATASET_FOLDER
from .errors import AblationError, OtherDataset
from .files import write_json
from .tasks import ListedTask

TASK_FILE, REPORT_FILE, SUMMARY_FILE = "task.json", "report.json", "summary.json"

Run = Callable[[ListedTask, Path], None]


@dataclass(frozen=True)
class Resources:
    """What Ray is asked for.

    Attributes:
        cpus: cores of each task.
        gpus: GPUs of each task, which may be a fraction; None is one if the cluster has any.
        retries: how often a task begins again whose worker was killed or whose machine was lost.
        workers: tasks at the same time, at most; None as many as the cluster has room for.
        address: "auto" or the address of a cluster; None starts one on this machine for as long as the sweep lasts.
    """

    cpus: float = 1.0
    gpus: float | None = None
    retries: int = 2
    workers: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        few = self.workers is not None and self.workers < 1
        if few or self.cpus < 0 or (self.gpus or 0) < 0 or self.retries < 0:
            raise AblationError("A sweep needs at least one worker, and no negative number of cores, GPUs or retries.")


@dataclass(frozen=True)
class Outcome:
    """How a task of a sweep ended."""

    name: str
    state: Literal["done", "skipped", "failed"]
    """"skipped" is a task that an earlier run has done."""
    seconds: float = 0.0
    reason: str = ""
    """Of a failure, one sentence."""


def is_finished(folder: Path, request: Mapping[str, Any]) -> bool:
    """Whether `folder` holds the results of this very request."""
    try:
        told = json.loads((folder / TASK_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return told == json.loads(json.dumps(request)) and (folder / REPORT_FILE).is_file()


def run_in_order(tasks: Sequence[ListedTask], output: Path, run: Run, requests: Mapping[str, Any]) -> Iterator[Outcome]:
    """Run tasks one after another in this process.

    Args:
        tasks: what to do.
        output: parent of the tasks' folders.
        run: does one task.
        requests: what each task is, by name, as JSON has it: when it differs, a task is done again.

    Yields:
        How each task ended, as soon as it has; whatever went wrong in one does not stop the others.
    """
    for task in tasks:
        folder, start = output / task.name, time.perf_counter()
        if is_finished(folder, requests[task.name]):
            yield Outcome(task.name, "skipped")
            continue
        try:
            seconds = _timed(run, task, folder)
        except Exception as error:
            yield Outcome(task.name, "failed", time.perf_counter() - start, _reason(error))
        else:
            yield _finish(task.name, folder, requests[task.name], seconds)


def run_on_ray(
    tasks: Sequence[ListedTask], output: Path, run: Run, requests: Mapping[str, Any], resources: Resources
) -> Iterator[Outcome]:
    """Run tasks on a Ray cluster, which must have this package installed and see `output` under the same path.

    Args: as `run_in_order`, and
        run: is sent to the workers, so it must be a function of a module or one that holds only plain values.
        resources: what each task gets.

    Yields:
        As `run_in_order`; skipped tasks first.

    Raises:
        AblationError: there is no such cluster, or none of its machines can hold a task.
        Exception: whatever is thrown into the iterator; tasks under way are cancelled then.
    """
    waiting = []
    for task in tasks:
        if is_finished(output / task.name, requests[task.name]):
            yield Outcome(task.name, "skipped")
        else:
            waiting.append(task)
    if not waiting:
        return
    import ray

    started = _connect(resources.address)
    try:
        gpus = _gpus(resources)
        remote = ray.remote(_timed).options(num_cpus=resources.cpus, num_gpus=gpus, max_retries=resources.retries)
        running: dict[Any, ListedTask] = {}
        try:
            while waiting or running:
                while waiting and len(running) < (resources.workers or len(tasks)):
                    task = waiting.pop(0)
                    if (output / task.name).is_dir():
                        # an old report must not pass for the results of this run, which may be on another disk
                        (output / task.name / REPORT_FILE).unlink(missing_ok=True)
                    running[remote.remote(run, task, output / task.name)] = task
                (done, *_), _ = ray.wait(list(running), num_returns=1)
                task = running.pop(done)
                try:
                    seconds = ray.get(done)
                except Exception as error:
                    yield Outcome(task.name, "failed", reason=_why(error, resources.retries))
                else:
                    yield _finish(task.name, output / task.name, requests[task.name], seconds)
        finally:
            for left in running:
                ray.cancel(left, force=True)
    finally:
        if started:
            ray.shutdown()


def summary(tasks: Sequence[ListedTask], output: Path, outcomes: Mapping[str, Outcome]) -> list[dict[str, Any]]:
    """One row a task, in the order of the list: how it ended, and of its report the figures of each concept.

    CLIP accuracies, before and after, are in [0, 1]; "surrounding" are the means over the surrounding concepts.
    """
    rows = []
    for task in tasks:
        outcome = outcomes[task.name]
        row: dict[str, Any] = {"name": task.name, "target": task.concept.target, "anchor": task.concept.anchor}
        row |= {"state": outcome.state, "seconds": outcome.seconds, "reason": outcome.reason}
        if outcome.state != "failed":
            report = json.loads((output / task.name / REPORT_FILE).read_text(encoding="utf-8"))
            for role in ("target", "anchor", "surrounding"):
                row[role + "_accuracy"] = _means([entry for entry in report["concepts"] if entry["role"] == role])
        rows.append(row)
    return rows


def _means(concepts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {
        side: sum(entry[side]["clip_accuracy"] for entry in concepts) / len(concepts) for side in ("before", "after")
    }


def _timed(run: Run, task: ListedTask, folder: Path) -> float:
    """Run a task; the seconds that it took, without those that it waited for its turn."""
    start = time.perf_counter()
    if folder.is_file():
        raise AblationError(f"{folder} is a file: move it away, or choose another output folder.")
    # whatever comes of it, what an earlier run has left here is no longer finished
    (folder / TASK_FILE).unlink(missing_ok=True)
    try:
        run(task, folder)
    except OtherDataset:
        # what an earlier request was trained on
        shutil.rmtree(folder / DATASET_FOLDER)
        run(task, folder)
    return time.perf_counter() - start


def _finish(name: str, folder: Path, request: Any, seconds: float) -> Outcome:
    if not (folder / REPORT_FILE).is_file():
        reason = f"Its results are not in {folder}: give an --output folder that all machines share."
        return Outcome(name, "failed", seconds, reason)
    try:
        write_json(folder / TASK_FILE, request)
    except AblationError as error:
        return Outcome(name, "failed", seconds, str(error))
    return Outcome(name, "done", seconds)


def _connect(address: str | None) -> bool:
    """Join a cluster; whether this process has to leave it in the end."""
    import ray

    if ray.is_initialized():
        return False
    # nobody asked for reports to Ray's makers
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        # "local" starts a cluster, also where an environment variable names another one
        if address is None:
            ray.init("local", include_dashboard=False, **quiet)
        else:
            ray.init(address, **quiet)
    except Exception as error:
        # Ray has no type of its own for this: a cluster that starts too slowly raises a bare Exception
        raise AblationError(
            f"No Ray cluster answers at {address or 'this machine'} ({_first_line(error)}): start one with ray start "
            "--head and give its --address, or wait until the machine has less to do."
        ) from error
    return True


def _gpus(resources: Resources) -> float:
    """GPUs of a task."""
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = resources.gpus
    if gpus is None:
        gpus = 1.0 if any(machine.get("GPU", 0) >= 1 for machine in machines) else 0.0
    if not any(machine.get("CPU", 0) >= resources.cpus and machine.get("GPU", 0) >= gpus for machine in machines):
        raise AblationError(
            f"No machine of the cluster has {resources.cpus:g} cores and {gpus:g} GPUs for a task: lower "
            "--cpus-per-task or --gpus-per-task."
        )
    return gpus


def _why(error: Exception, retries: int) -> str:
    """The sentence for a task that Ray could not finish."""
    import ray

    if isinstance(error, ray.exceptions.RayTaskError):
        return _reason(error.cause or error)
    again = f" and {retries} times again" if retries else ""
    return (
        f"Its worker was killed{again} ({_first_line(error)}): see whether the machine has enough memory, and give "
        "--cpus-per-task or --workers so that fewer tasks run at the same time."
    )


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, AblationError) else f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
