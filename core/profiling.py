"""A trace of a few training steps by PyTorch's profiler, as a Chrome trace for https://ui.perfetto.dev.

Training tells its progress after each step, which is all that is needed to know where steps begin and end: so this
works for every kind of training and none of them knows of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from .errors import AblationError
from .files import replacing, require_writable
from .parallel import current
from .progress import Progress, ProgressCallback
from .trainer import PHASE, TrainSettings

WARM_UP, TRACED = 2, 5
"""Steps that are left out, because they also fill caches, and steps that are traced, at most."""
_SUFFIXES = (".json", ".json.gz")


def check_profile(path: Path, training: TrainSettings | None) -> None:
    """Raise AblationError unless such a training can be traced into `path`, before hours are spent on it."""
    if training is None:
        raise AblationError("There is no training to trace: leave --profile out, or choose a preset that trains.")
    if training.steps < 2:
        raise AblationError(
            "A trace needs at least 2 training steps, because it begins after the first: train for more steps."
        )
    if not path.name.endswith(_SUFFIXES):
        raise AblationError(f"The trace {path.name} must end in {' or '.join(_SUFFIXES)}: give it such a name.")
    require_writable(path.parent)


@contextlib.contextmanager
def profiled(
    path: Path | None, on_progress: ProgressCallback | None, training: TrainSettings | None
) -> Iterator[ProgressCallback | None]:
    """Give the callback for a run, in which `path` is to become the trace of a few of its training steps.

    Args:
        path: the trace, a .json or .json.gz file; None traces nothing. Of several processes the first one is traced.
        on_progress: what the run's progress is passed on to.
        training: the training that will be traced.

    Raises:
        AblationError: as `check_profile`, or the file cannot be written.
    """
    if path is None or not current().first:
        yield on_progress
        return
    check_profile(path, training)
    tracer = _Tracer(path, on_progress)
    try:
        yield tracer
    finally:
        tracer.close()


class _Tracer:
    """A progress callback that profiles on the way; what it started is stopped by `close` at the latest."""

    def __init__(self, path: Path, on_progress: ProgressCallback | None) -> None:
        self._path = path
        self._on_progress = on_progress
        self._profiler: profile | None = None

    def __call__(self, progress: Progress) -> None:
        if progress.phase == PHASE:
            self._after_step(progress)
        if self._on_progress is not None:
            self._on_progress(progress)

    def close(self) -> None:
        """Drop a trace that has not come to its end."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _after_step(self, progress: Progress) -> None:
        first = min(WARM_UP, progress.total - 1)
        last = min(first + TRACED, progress.total)
        if self._profiler is None:
            if progress.step == first:
                kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
                # with a schedule, even of one action, steps are marked in the trace
                self._profiler = profile(activities=kinds, schedule=lambda step: ProfilerAction.RECORD)
                self._profiler.start()
        elif progress.step == last:
            self._write(self._profiler)
        else:
            self._profiler.step()

    def _write(self, profiler: profile) -> None:
        profiler.stop()
        self._profiler = None
        with replacing(self._path) as temporary:
            profiler.export_chrome_trace(str(temporary))
