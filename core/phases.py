"""What each phase of a run costs: seconds, and rows that went through the denoising network.

A row is one latent at one noise level under one prompt: a guided sampling step of one image is two of them. Time
depends on the machine, rows do not, so they are what two methods are compared by.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .denoiser import Conditioning, Denoiser
from .parallel import current


@dataclass(frozen=True)
class Phase:
    """One phase of a run, as far as this run did it: what an earlier one had left in a folder costs nothing."""

    name: str
    seconds: float
    forward: int
    """Rows of the forward passes."""
    backward: int
    """Rows of the backward passes. What checkpointing computes again is not counted."""


@dataclass
class Rows:
    """Rows so far."""

    forward: int = 0
    backward: int = 0


@contextlib.contextmanager
def counted(denoiser: Denoiser) -> Iterator[Rows]:
    """Within the block, count the rows that `denoiser` computes. May be nested."""
    rows = Rows()
    outer = vars(denoiser).get("denoise")
    denoise = denoiser.denoise

    def add_backward(count: int) -> None:
        rows.backward += count

    def counting(x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        count = len(x)
        rows.forward += count
        result = denoise(x, sigma, cond)
        if result.requires_grad:
            result.register_hook(lambda gradient: add_backward(count))
        return result

    denoiser.denoise = counting  # type: ignore[method-assign]
    try:
        yield rows
    finally:
        if outer is None:
            del denoiser.denoise
        else:
            denoiser.denoise = outer


class Meter:
    """Collects the phases of one run.

    Attributes:
        phases: those that have ended, in order.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.phases: list[Phase] = []
        self._denoiser = denoiser

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count and time the block as phase `name`. The rows of several processes are added up."""
        start = time.perf_counter()
        with counted(self._denoiser) as rows:
            yield
        forward, backward = current().sum(torch.tensor([rows.forward, rows.backward])).tolist()
        self.phases.append(Phase(name, time.perf_counter() - start, forward, backward))
