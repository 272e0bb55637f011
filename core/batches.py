"""Rows for the steps of a training: which ones, and how they reach the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def shuffled(rows: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of `size` rows, each pass in a new order; empty ones if there are no rows."""
    pool = rows[:0]
    while True:
        while len(rows) and len(pool) < size:
            pool = torch.cat((pool, rows[torch.randperm(len(rows), generator=generator)]))
        yield pool[:size]
        pool = pool[size:]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, without the host waiting for what the device still has to do."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
