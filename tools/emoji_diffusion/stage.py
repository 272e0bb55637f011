"""One training stage: steps, moving average, learning rate, checkpoints, logs. What is trained is a function of it.

A checkpoint is one safetensors file with everything that the next step depends on (weights, moving average, optimizer,
random numbers, the plan), so a killed run goes on as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from optimizer import MuonWithAdamW
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from settings import Optimization
from torch import Generator, Tensor, nn

from concept_ablation.core.errors import AblationError, Diverged
from concept_ablation.core.files import replacing

Loss = Callable[[nn.Module, Generator], Tensor]
CHECKPOINT = "checkpoint.safetensors"
START = "start.safetensors"
"""What a stage begins with instead of random weights (`start.py`)."""

FLAT_SHARE = 0.5
"""Part of the time before the learning rate begins to fall."""

_PLAINLY = 1.2
"""A finished stage has spent its minutes only roughly, for they were turned into steps half-way."""

_LOG_EVERY = 20
_PACE_WEIGHT = 0.1
_RNG = "rng"
_PLAN = ("step", "decay_from", "total")


@dataclass(frozen=True)
class Budget:
    """How long a stage trains: an exact number of steps, or minutes of wall-clock time in all its sessions."""

    minutes: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise ValueError("a budget is either minutes or steps")

    def exceeds(self, steps: int, seconds: float) -> bool:
        """Whether it is plainly more than what a finished stage of so many steps was given, in seconds."""
        if self.steps is not None:
            return self.steps > steps
        return self.minutes is not None and self.minutes * 60 > _PLAINLY * seconds


@dataclass(frozen=True)
class Stage:
    """What a stage trains: `loss(model, rng)` is the loss of one fresh batch."""

    name: str
    model: nn.Module
    loss: Loss
    optimization: Optimization
    seed: int


class Log(Protocol):
    """The part of tensorboard's SummaryWriter that is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...

    def close(self) -> None: ...


@dataclass
class _Run:
    """The state of a stage between two steps."""

    model: nn.Module
    average: nn.Module
    optimizer: MuonWithAdamW
    rng: Generator
    step: int = 0
    decay_from: int = 0
    """Step at which the learning rate begins to fall; 0 while that is not decided."""
    total: int = 0
    """Number of steps in all; 0 while that is not decided."""
    seconds: float = 0.0
    given: float = 0.0
    """Seconds that the plan was made for; 0 for one by steps."""
    pace: float = 0.0
    """Seconds of a step, as a moving average of this session; 0 before its second step, for the first is slower."""

    @property
    def finished(self) -> bool:
        return 0 < self.total <= self.step


def train(
    stage: Stage,
    folder: Path,
    budget: Budget,
    *,
    save_every: float = 180.0,
    stop_after: int | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> nn.Module:
    """Train `stage` until its budget is spent, from the checkpoint in `folder` if there is one.

    With minutes, the plan is made on the way: the learning rate begins to fall when `FLAT_SHARE` of the time has
    passed, and falls for as many steps as the rest should give. Until then the budget may be changed by resuming with
    another. A finished stage that is resumed with a larger budget makes a new plan for all of it: where more than half
    is spent, the rate falls from its full height over what is left.

    Args:
        save_every: seconds between checkpoints.
        stop_after: leave without a last checkpoint after this step, as a kill would.
        on_step: told every step and its loss.

    Returns:
        The moving average of the weights.

    Raises:
        AblationError: the checkpoint is of another model.
        Diverged: the loss is no longer finite; the checkpoint is of an earlier step.
    """
    path = folder / CHECKPOINT
    run = _start(stage, path)
    began, done_before, saved = time.monotonic(), run.seconds, time.monotonic()
    first = run.step
    # a machine that became idle half-way finishes before its time is over
    if run.finished and budget.exceeds(run.step, max(run.seconds, run.given)):
        run.decay_from = run.total = 0
    with _open_log(folder, first) as log:
        while not run.finished:
            _plan(run, budget)
            if run.finished:
                break
            stepped = time.monotonic()
            loss = _step(run, stage)
            now = time.monotonic()
            if run.step > first + 1:
                run.pace += (now - stepped - run.pace) * (_PACE_WEIGHT if run.pace else 1)
            run.seconds = done_before + now - began
            if on_step is not None:
                on_step(run.step, loss)
            if run.step == 1 or run.step % _LOG_EVERY == 0:
                samples = (run.step - first) * stage.optimization.batch / (time.monotonic() - began)
                _report(log, stage, run, loss, samples)
            if run.step == stop_after:
                return run.average
            if time.monotonic() - saved > save_every:
                _save(run, path)
                saved = time.monotonic()
    if run.step > first:
        _save(run, path)
        print(f"{stage.name}: {run.step} steps, {run.seconds / 60:.1f} minutes in all", flush=True)
    return run.average.eval()


def load_average(model: nn.Module, folder: Path) -> Any:
    """`model` with the moving average that the stage in `folder` has reached, for use.

    Raises:
        AblationError: the stage has no checkpoint, or one of a model of another size.
    """
    path, start = folder / CHECKPOINT, folder / START
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys() if name.startswith("average.")}  # noqa: SIM118
        _restore(model, stored, "average.", path)
    elif start.is_file():
        _restore(model, load_file(start), "", start)
    else:
        raise AblationError(f"{folder} has no checkpoint: train the stage {folder.name} first.")
    return model.eval().requires_grad_(False)


def _restore(model: nn.Module, stored: dict[str, Tensor], prefix: str, path: Path) -> None:
    try:
        model.load_state_dict(_under(stored, prefix))
    except RuntimeError as error:
        raise AblationError(f"{path} is of a model of another size: choose another folder.") from error


def _start(stage: Stage, path: Path) -> _Run:
    settings, start = stage.optimization, path.with_name(START)
    if start.is_file() and not path.is_file():
        _restore(stage.model, load_file(start), "", start)
    optimizer = MuonWithAdamW(stage.model, settings.betas, settings.weight_decay)
    average = copy.deepcopy(stage.model).requires_grad_(False)
    run = _Run(stage.model.train(), average, optimizer, torch.Generator().manual_seed(stage.seed))
    for stale in path.parent.glob(f".{path.stem}.*.part{path.suffix}"):
        stale.unlink(missing_ok=True)
    if path.is_file():
        _load(run, path)
    return run


def _plan(run: _Run, budget: Budget) -> None:
    if run.total:
        return
    if budget.steps is not None:
        run.decay_from, run.total = max(1, int(budget.steps * FLAT_SHARE)), budget.steps
    elif budget.minutes is not None and run.pace and run.seconds >= FLAT_SHARE * budget.minutes * 60:
        # the pace of now, for earlier sessions may have shared the machine; at least a tenth for the fall, if the
        # budget was cut after most of it was spent
        left = max(budget.minutes * 60 - run.seconds, 0.1 * run.seconds)
        run.decay_from, run.total = run.step, run.step + max(1, round(left / run.pace))
        run.given = budget.minutes * 60


def _rate(run: _Run, settings: Optimization) -> float:
    warm = min(1.0, (run.step + 1) / settings.warmup)
    if not run.total or run.step < run.decay_from:
        return settings.learning_rate * warm
    return settings.learning_rate * warm * (run.total - run.step) / (run.total - run.decay_from)


def _step(run: _Run, stage: Stage) -> float:
    settings = stage.optimization
    run.model.zero_grad(set_to_none=True)
    loss = stage.loss(run.model, run.rng)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), settings.clip)
    if not torch.isfinite(norm):
        raise Diverged(
            f"The stage {stage.name} diverged at step {run.step}: lower its learning rate in settings.py and resume."
        )
    run.optimizer.step(_rate(run, settings))
    run.step += 1
    # a young average would remember the random start
    _follow(run.average, run.model, min(settings.ema, (1 + run.step) / (10 + run.step)))
    return loss.item()


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for kept, current in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(current)


def _tensors(run: _Run) -> dict[str, Tensor]:
    return {
        _RNG: run.rng.get_state(),
        **{f"model.{name}": value for name, value in run.model.state_dict().items()},
        **{f"average.{name}": value for name, value in run.average.state_dict().items()},
        **{f"optimizer.{name}": value for name, value in run.optimizer.state().items()},
    }


def _save(run: _Run, path: Path) -> None:
    plan = {name: getattr(run, name) for name in (*_PLAN, "seconds", "given")}
    tensors = {name: value.detach().contiguous().clone() for name, value in _tensors(run).items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {key: repr(value) for key, value in plan.items()})


def _load(run: _Run, path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        plan = file.metadata()
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    _restore(run.model, stored, "model.", path)
    _restore(run.average, stored, "average.", path)
    run.optimizer.load_state(_under(stored, "optimizer."))
    run.rng.set_state(stored[_RNG])
    run.step, run.decay_from, run.total = (int(plan[key]) for key in _PLAN)
    run.seconds, run.given = float(plan["seconds"]), float(plan.get("given", 0))


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _report(log: Log | None, stage: Stage, run: _Run, loss: float, samples: float) -> None:
    if log is not None:
        for tag, value in (("loss", loss), ("rate", _rate(run, stage.optimization)), ("samples_per_second", samples)):
            log.add_scalar(f"{stage.name}/{tag}", value, run.step)
    total = run.total or "?"
    print(f"{stage.name} {run.step}/{total}: loss {loss:.4f}, {samples:.1f} samples/s", flush=True)


@contextlib.contextmanager
def _open_log(folder: Path, step: int) -> Iterator[Log | None]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        yield None
        return
    with contextlib.closing(SummaryWriter(str(folder / "tensorboard"), purge_step=step)) as log:
        yield log
