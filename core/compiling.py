"""The network compiled for drawing many pictures in a row, as benchmarks do."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from .denoiser import Denoiser

WORTH = 2_000
"""Network rows from which it pays: compiling takes up to a minute, 6 seconds when PyTorch has it in its cache."""

_BY_NETWORK = "_concept_ablation_compiled"


@contextlib.contextmanager
def compiled(denoiser: Denoiser, rows: int) -> Iterator[None]:
    """Within the block `denoiser.network` is its own compiled form, which shares its modules and parameters: it draws
    about 1.3 times as fast on a CPU, and what differs is rounding.

    It is compiled once for each shape of a batch, whatever `merged` puts into its layers. Without effect for fewer than
    `WORTH` rows, on a GPU (where nobody measured it) and where there is no compiler. Not for training, nor for a delta
    that is attached by hooks to a part of the layers only: each set of hooks would be compiled anew.
    """
    network = denoiser.network
    if rows < WORTH or denoiser.device.type != "cpu" or not _works():
        yield
        return
    if not hasattr(network, _BY_NETWORK):
        # past Module.__setattr__, which would make the network a part of itself
        object.__setattr__(network, _BY_NETWORK, torch.compile(network, dynamic=False))
    denoiser.network = getattr(network, _BY_NETWORK)
    try:
        with warnings.catch_warnings(), torch._dynamo.config.patch(suppress_errors=True):
            # of diffusers' own use of lru_cache, which is harmless; what cannot be compiled is computed as before
            warnings.filterwarnings("ignore", module=r"torch\._dynamo")
            yield
    finally:
        denoiser.network = network


@functools.cache
def _works() -> bool:
    """Whether anything can be compiled here; PyTorch wants a C++ compiler."""
    try:
        torch.compile(_one_more)(torch.zeros(2))
    except Exception:  # every backend has errors of its own
        return False
    return True


def _one_more(value: torch.Tensor) -> Any:
    return value + 1
