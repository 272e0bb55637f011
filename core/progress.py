"""How long operations tell the outside where they are, and how the outside stops them.

One callback does both: it is called after every step, and whatever it raises (`Interrupted`, a host program's own
exception) ends the operation through its `finally` blocks, so the model is left as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Progress:
    """Where an operation is: `step` of `total` of `phase` is done."""

    phase: str
    step: int
    total: int
    seconds: float
    """Time spent in this phase so far, in seconds."""
    loss: float | None = None
    latents: Tensor | None = field(default=None, repr=False)
    """While images are drawn: what the batch would be if it were finished now, [B, C, h, w] on the model's device."""

    @property
    def seconds_left(self) -> float:
        """Time that the rest of the phase needs at the mean pace so far."""
        return self.seconds / self.step * (self.total - self.step) if self.step else float("nan")


ProgressCallback = Callable[[Progress], None]


class Reporter:
    """Counts the steps of one phase and calls `callback`, if there is one, after each."""

    def __init__(self, callback: ProgressCallback | None, phase: str, total: int) -> None:
        self._callback = callback
        self._phase = phase
        self._total = total
        self._step = 0
        self._start = time.perf_counter()

    def advance(self, steps: int = 1, *, loss: float | None = None, latents: Tensor | None = None) -> None:
        """Report that `steps` more steps are done.

        Raises:
            Exception: whatever the callback raises in order to cancel.
        """
        self._step += steps
        if self._callback is not None:
            elapsed = time.perf_counter() - self._start
            self._callback(Progress(self._phase, self._step, self._total, elapsed, loss, latents))
