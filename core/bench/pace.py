"""What a benchmark costs: rows of the network, how many it does in a second, and how much time is left.

A row is one latent that passes the network once. A picture of 25 guided steps is 50 rows, for guidance asks the network
with and without the prompt. A row of training counts as three, its backward pass as two of them.
"""

from __future__ import annotations

import time

from ..attack import AttackSettings
from ..denoiser import Denoiser
from ..errors import Interrupted
from ..leaks import ScanSettings
from ..phases import Rows, counted
from ..presets import Recipe
from ..samplers import SampleSettings, draw_images

BACKWARD = 3
"""Rows that a row with its backward pass counts as."""
_BACKWARD_UP = 2.5
"""The same where the backward pass stops before the way down: a fifth of the work of the embedded model's network."""

_FAMILIES = 6
_PROBE = 16
"""Pictures that are drawn to find the speed of an unknown machine."""


def weighted(rows: Rows) -> int:
    """Rows as this module counts them."""
    return rows.forward + (BACKWARD - 1) * rows.backward


class Pace:
    """Rows per second, and a limit of time.

    Args:
        minutes: until everything must have stopped; None for no limit.
        rate: rows per second of earlier work, if any.
        margin: seconds before the limit at which work stops, for what has to be written.
    """

    def __init__(self, minutes: float | None = None, rate: float | None = None, margin: float = 15.0) -> None:
        self.rate = rate
        # at least nine tenths of a short time are for work
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes - min(margin, 6 * minutes)

    @property
    def seconds_left(self) -> float:
        """Until work stops; infinite without a limit."""
        return float("inf") if self._deadline is None else self._deadline - time.monotonic()

    def check(self) -> None:
        """Raise Interrupted when the time is up."""
        if self.seconds_left <= 0:
            raise Interrupted("The time is up: run the benchmark again to go on.")

    def require(self, rows: float) -> None:
        """Raise Interrupted if work that cannot be continued later would not be finished in time."""
        self.check()
        if self.rate and rows / self.rate > self.seconds_left:
            raise Interrupted(
                f"The next work needs about {rows / self.rate / 60:.1f} minutes in one piece: run the benchmark again "
                "with more time."
            )

    def learn(self, rows: int, seconds: float) -> None:
        """Take a finished piece of work into the rate, half of which is what was known before."""
        if rows and seconds > 0:
            measured = rows / seconds
            self.rate = measured if self.rate is None else (self.rate + measured) / 2


def probe(denoiser: Denoiser) -> float:
    """Rows per second, from a few steps of a few pictures (after one that warms up)."""
    steps = min(4, len(denoiser.sigmas))
    draw_images(denoiser, [""] * 2, range(2), SampleSettings(steps=1))
    start = time.perf_counter()
    with counted(denoiser) as rows:
        draw_images(denoiser, ["a picture"] * _PROBE, range(_PROBE), SampleSettings(steps=steps), batch=_PROBE)
    return weighted(rows) / (time.perf_counter() - start)


def sampling_rows(pictures: int, sample: SampleSettings) -> int:
    """Rows of drawing."""
    return pictures * sample.steps * (1 if sample.guidance == 1 else 2)


def training_rows(made: Recipe) -> int:
    """Rows of training, without those of what it trains on. Harvested rows need no teacher."""
    training = made.training
    if training is None:
        return 0
    drawn = made.dataset or made.harvest
    teacher = made.harvest is None
    trained = _BACKWARD_UP if training.subset == "cross-attn-up" else BACKWARD
    asked = (training.objective not in ("noise", "loss-max")) + bool(training.negative_guidance)
    ablating = training.batch * (trained + teacher * asked)
    preserving = training.preserve_batch * (trained + teacher) * bool(drawn and drawn.preserve)
    regularizing = training.batch * trained * bool(training.regularization)
    return round(training.steps * (ablating + preserving + regularizing))


def dataset_rows(made: Recipe, concepts: int) -> int:
    """Rows of drawing or harvesting what a training trains on."""
    if made.harvest is not None:
        taken = made.harvest
        away = taken.trajectories * len(taken.kept) * bool(taken.negative_guidance)
        return sampling_rows(concepts * (taken.trajectories + taken.preserve), taken.sample) + concepts * away
    if made.dataset is not None:
        return sampling_rows(concepts * (made.dataset.images + made.dataset.preserve), made.dataset.sample)
    return 0


def scan_rows(settings: ScanSettings) -> int:
    """Most rows of a leak scan, with the anchor's pictures for a second judge."""
    first = _FAMILIES * settings.each * settings.seeds
    second = (min(settings.suspects, _FAMILIES * settings.each) + 2) * settings.more_seeds
    plain = settings.plain * settings.seeds
    return sampling_rows(2 * (first + second) + plain + settings.more_seeds, settings.sample)


def attack_rows(settings: AttackSettings) -> int:
    """Most rows of an attack on one model."""
    pictures = settings.images + len(settings.checkpoints) * settings.prompts * settings.seeds
    return sampling_rows(pictures, settings.sample) + settings.checkpoints[-1] * settings.batch * BACKWARD
