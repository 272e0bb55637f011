"""Low-rank deltas: where a training of rank r begins, and which rank keeps what an edit does.

A change of rank r of a weight [out, in] is up @ down with up [out, r] and down [r, in] (`delta.LowRank`): LoRA (Hu et
al. 2021, arXiv 2106.09685), whose files every host reads. There are two ways to one: train a dense delta and cut its
singular value decomposition off (`truncated`), or train the factors themselves (`zeros`, `begun`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from .delta import Delta, LayerDelta, LowRank, factorize
from .errors import AblationError

LEARNING_RATE_FACTOR = 10.0
"""What the learning rate of whole matrices is multiplied by for their factors. One step of AdamW moves a product of two
small factors less than it moves a matrix; about ten times is best over many models and ranks (Schulman et al., "LoRA
Without Regret", 2025, https://thinkingmachines.ai/blog/lora/)."""

_NOTHING = 1e-6
"""Singular values below this share of the largest are no direction to begin with: both factors would be 0 there, and
with them both gradients."""


def zeros(layers: Mapping[str, nn.Module], rank: int, seed: int) -> Delta:
    """A delta of rank `rank` that changes nothing yet, on the layers' devices: `up` is 0, `down` uniform with
    the variance 1 / (3 in), as LoRA and peft begin. Weights only; biases have no rank.

    Args:
        layers: linear layers; one that is narrower than `rank` gets its own full rank.
        rank: at least 1.
        seed: of `down`, drawn on the CPU, so that it is the same on every device.

    Raises:
        AblationError: a layer is not linear.
    """
    others = [name for name, module in layers.items() if not isinstance(module, nn.Linear)]
    if others:
        raise AblationError(
            f"A delta of rank {rank} can be trained on linear layers only, and {others[0]} is none: choose the subset "
            "cross-attn or attn, or train whole matrices and compress the delta."
        )
    generator = torch.Generator().manual_seed(seed)
    return Delta({name: LayerDelta(_zeros(module.weight, rank, generator)) for name, module in layers.items()})


@torch.no_grad()
def begun(start: Tensor | LowRank, empty: LowRank) -> LowRank:
    """The best approximation of `start` that has the rank of `empty`, ready to be trained.

    Args:
        start: a weight change [out, in].
        empty: factors as `zeros` makes them. They fill up what is beyond the rank of `start`.
    """
    low = factorize(start).truncated(empty.down.shape[0])
    # the squared length of a row of `down` is its singular value
    values = low.down.square().sum(1)
    filled = int((values > _NOTHING * values[0]).sum())
    up = torch.cat((low.up[:, :filled].to(empty.up), empty.up[:, filled:]), 1)
    return LowRank(up, torch.cat((low.down[:filled].to(empty.down), empty.down[filled:])))


def factorized(delta: Delta) -> Delta:
    """The same delta with every weight of two dimensions or more as its singular value decomposition, so that
    `truncated` gives its best approximations of all ranks at no further cost.
    """
    return replace(
        delta,
        layers={
            name: layer
            if layer.weight is None or len(layer.weight.shape) < 2
            else replace(layer, weight=factorize(layer.weight))
            for name, layer in delta.layers.items()
        },
    )


def truncated(delta: Delta, rank: int) -> Delta:
    """The first `rank` terms of every low-rank weight of `delta`; all else as it is.

    Raises:
        AblationError: rank < 1.
    """
    if rank < 1:
        raise AblationError(f"The rank of a delta must be at least 1, not {rank}.")
    return replace(
        delta,
        layers={
            name: replace(layer, weight=layer.weight.truncated(rank)) if isinstance(layer.weight, LowRank) else layer
            for name, layer in delta.layers.items()
        },
    )


def largest_rank(delta: Delta) -> int:
    """The largest rank of a low-rank weight of `delta`, counting the terms of its factors; 0 if there is none."""
    return max(
        (layer.weight.down.shape[0] for layer in delta.layers.values() if isinstance(layer.weight, LowRank)), default=0
    )


def smallest_rank(kept: Callable[[int], float], keep: float, largest: int) -> tuple[int, dict[int, float]]:
    """The smallest rank that keeps at least `keep` of an effect which does not shrink as the rank grows.

    Tries 1, 2, 4, … until one is enough, then halves the gap to the last that was not: about 2 log2(rank) trials. Of a
    measured effect, which is a little noisy, it finds a rank that keeps enough while a smaller one that was tried does
    not.

    Args:
        kept: the share of the effect that a rank keeps; asked once for each rank.
        keep: the share that is wanted.
        largest: the rank that is everything; the answer if no smaller one is enough.

    Returns:
        The rank, and what was found for each that was tried.
    """
    tried: dict[int, float] = {}

    def enough(rank: int) -> bool:
        if rank not in tried:
            tried[rank] = kept(rank)
        return tried[rank] >= keep

    low, high = 0, 1
    while high < largest and not enough(high):
        low, high = high, 2 * high
    high = min(high, largest)
    enough(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high, tried


def _zeros(weight: Tensor, rank: int, generator: torch.Generator) -> LowRank:
    out, width = weight.shape
    rank = min(rank, out, width)
    bound = 1 / math.sqrt(width)
    down = (2 * torch.rand(rank, width, generator=generator) - 1) * bound
    return LowRank(torch.zeros(out, rank, device=weight.device), down.to(weight.device))
