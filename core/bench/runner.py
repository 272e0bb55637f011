"""Working through the jobs of a benchmark until they are done or the time is up."""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import Interrupted
from ..phases import counted
from ..presets import PRESETS
from .bench import Bench
from .edits import reserved
from .jobs import expected_rows, run_job
from .pace import probe, weighted
from .plan import FORMAT, BenchJob, describe
from .units import units


@dataclass(frozen=True)
class Planned:
    """A job and its key."""

    key: str
    job: BenchJob


@dataclass(frozen=True)
class Left:
    """What an experiment still needs."""

    experiment: str
    jobs: int
    done: int
    rows: int
    """Of jobs that are not done; what an earlier experiment needs as well counts there."""


def plan_keys(bench: Bench, experiments: Mapping[str, Sequence[BenchJob]]) -> dict[str, list[Planned]]:
    """The jobs of each experiment with their keys. Costs nothing, so that bad input is found before any work.

    Raises:
        AblationError: no such preset, subset or objective, or fewer evaluation prompts than are asked for.
    """
    for jobs in experiments.values():
        for job in jobs:
            units(job.task, bench.denoiser.prompt_source, bench.protocol, robustness=False)
    return {name: [Planned(bench.key(job), job) for job in jobs] for name, jobs in experiments.items()}


def what_is_left(bench: Bench, plan: Mapping[str, Sequence[Planned]], retry: bool = False) -> list[Left]:
    """What each experiment still needs, in order."""
    counted: set[str] = set()
    found = []
    for name, planned in plan.items():
        keys = {one.key: one.job for one in planned}
        done = {key for key in keys if _done(bench, key, retry)}
        rows = 0
        for key, job in keys.items():
            if key not in done and key not in counted:
                rows += expected_rows(bench, job, key, counted)
            counted.add(key)
        found.append(Left(name, len(keys), len(done), rows))
    return found


def known_rate(bench: Bench, plan: Mapping[str, Sequence[Planned]]) -> float | None:
    """Rows per second over the results that this machine has made on this device, or None."""
    here = platform.node(), _device(bench)
    results = [bench.store.result(key) for key in {one.key for planned in plan.values() for one in planned}]
    made = [one for one in results if one and (one.get("machine"), one.get("device")) == here and one.get("rows")]
    seconds = sum(found["seconds"] for found in made)
    return sum(found["rows"] for found in made) / seconds if seconds else None


def run(
    bench: Bench,
    plan: Mapping[str, Sequence[Planned]],
    on_job: Callable[[int, int, Planned], None] | None = None,
    *,
    retry: bool = False,
    wait: float = 10.0,
) -> str | None:
    """Run all jobs that are not done, those that somebody else works on last.

    Args:
        bench: what the jobs share.
        plan: from `plan_keys`.
        on_job: told (number of jobs that are done, of all, the next one).
        retry: also those that failed.
        wait: seconds between looks at jobs that somebody else works on.

    Returns:
        None if everything is done, otherwise why it stopped.
    """
    every = list({one.key: one for planned in plan.values() for one in planned}.values())
    here: set[str] = set()

    def left() -> list[Planned]:
        # what was run here is not run again in this session, even if it failed and `retry` is set
        return [one for one in every if one.key not in here and not _done(bench, one.key, retry)]

    try:
        if bench.pace.rate is None:
            bench.pace.rate = known_rate(bench, plan) or probe(bench.denoiser)
        while remaining := left():
            worked = False
            for one in remaining:
                bench.pace.check()
                with bench.store.claimed(one.key) as ours, reserved(bench, one.job.edit) as free:
                    if not (ours and free) or _done(bench, one.key, retry):
                        continue
                    if on_job is not None:
                        on_job(len(every) - len(left()), len(every), one)
                    _run_one(bench, one)
                here.add(one.key)
                worked = True
            if not worked:
                _sleep(bench, wait)
    except Interrupted as error:
        return str(error)
    return None


def environment(bench: Bench) -> dict[str, Any]:
    """The model, and where its results are written from; those say themselves where they come from."""
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "device": _device(bench),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "model": bench.denoiser.name,
        "model_sha256": bench.tools.model,
        "presets": sorted(PRESETS),
    }


def _run_one(bench: Bench, one: Planned) -> None:
    start = time.perf_counter()
    with counted(bench.denoiser) as rows:
        result = run_job(bench, one.job, one.key)
    seconds = time.perf_counter() - start
    bench.pace.learn(weighted(rows), seconds)
    made = bench.recipe(one.job.edit) if one.job.edit else None
    value = {
        "format": FORMAT,
        "key": one.key,
        "job": describe(one.job, made),
        "rows": weighted(rows),
        "seconds": round(seconds, 3),
        "machine": platform.node(),
        "device": _device(bench),
        "torch": torch.__version__,
        "model": bench.tools.model,
        "setup": bench.denoiser.setup(),
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "result": result,
    }
    bench.store.finish(one.key, value, keep_scratch=bench.keep_pictures)


def _device(bench: Bench) -> str:
    device = bench.denoiser.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _done(bench: Bench, key: str, retry: bool) -> bool:
    if not retry:
        return bench.store.has_result(key)
    found = bench.store.result(key)
    return found is not None and "failed" not in found["result"]


def _sleep(bench: Bench, seconds: float) -> None:
    """Wait for somebody else, no longer than there is time."""
    time.sleep(max(0.0, min(seconds, bench.pace.seconds_left)))
    bench.pace.check()
