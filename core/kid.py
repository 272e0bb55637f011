"""Kernel distance (KID): how far the pictures after an edit lie from those before it, as sets.

The squared maximum mean discrepancy of two sets of features under the kernel k(x, y) = (x·y / D + 1)³, with the
unbiased estimator for pairs (Binkowski et al., "Demystifying MMD GANs", ICLR 2018, https://arxiv.org/abs/1801.01401;
Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, equation 4). What the features are is open: a network's
embeddings (`spherical`) or `inception_features`. Figures of different features cannot be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import AblationError
from .statistics import Groups, group_index

Features = Callable[[np.ndarray], Tensor]
"""Pictures, uint8 [N, height, width, 3] -> features [N, D]."""

_ROWS_AT_ONCE = 1024
_INCEPTION_SIZE = 299
_INCEPTION_BATCH = 32


@dataclass(frozen=True)
class Kid:
    """A kernel distance, 0 in expectation for equal distributions (so that it may be negative), and its error."""

    value: float
    standard_error: float
    """NaN where there are too few blocks to tell."""


@dataclass(frozen=True)
class _Sums:
    """Kernel values between the rows of two sets, summed by block: float64 [G] each."""

    by_row: Tensor
    """Sums over the rows of a block and all columns."""
    by_column: Tensor
    """Sums over the columns of a block and all rows."""
    inside: Tensor
    """Sums over rows and columns of the same block."""

    def without(self) -> Tensor:
        """What is left of the whole sum when each block in turn is left out, [G]."""
        return self.by_row.sum() - self.by_row - self.by_column + self.inside


def kid(first: Tensor, second: Tensor, groups: Groups) -> Kid:
    """The distance of two sets of features, from all pairs of rows.

    The i-th rows come from the same prompt and seed. They depend on each other and are not compared: an edit that
    changes nothing would have a distance below 0.

    The standard error is the block jackknife's: the distance without each block in turn (Efron and Stein 1981). It is
    too large rather than too small where the distributions are nearly equal.

    Args:
        first: features [N >= 2, D].
        second: features [N, D].
        groups: what the i-th rows belong to, such as their prompt, [N]: one block.

    Raises:
        ValueError: shapes or groups that do not fit.
    """
    x, y = (features.detach().to("cpu", torch.float64) for features in (first, second))
    if x.ndim != 2 or x.shape != y.shape or len(x) < 2:
        raise ValueError(f"features must be [N >= 2, D] both, not {tuple(x.shape)} and {tuple(y.shape)}")
    blocks = torch.from_numpy(group_index(groups, len(x)))
    sizes = torch.bincount(blocks)
    count = len(sizes)
    signed = ((1, _sums(x, x, blocks, count)), (1, _sums(y, y, blocks, count)), (-2, _sums(x, y, blocks, count)))
    whole = sum(sign * part.by_row.sum() / _pairs(sizes.sum()) for sign, part in signed)
    left = sum(sign * part.without() / _pairs(sizes.sum() - sizes) for sign, part in signed)
    if count < 2 or not bool(torch.isfinite(left).all()):
        return Kid(float(whole), math.nan)
    return Kid(float(whole), math.sqrt((count - 1) / count * float((left - whole).square().sum())))


def inception_features(weights: Path, device: str | torch.device = "cpu") -> Features:
    """The 2,048 features of the Inception network that FID and KID are defined with, resized as clean-fid does.

    Args:
        weights: the file `inception-2015-12-05.pt`, which clean-fid keeps in /tmp (on Windows in the folder that it is
            run in). It is TorchScript, which is a program: take it from NVIDIA or clean-fid only. Nothing is fetched.
        device: where it runs.

    Returns:
        A function from pictures to fp32 [N, 2048] on the CPU. Features are those of Parmar et al., "On Aliased Resizing
        and Surprising Subtleties in GAN Evaluation" (2022).

    Raises:
        AblationError: the file is missing or is another one.
    """
    if not weights.is_file():
        raise AblationError(
            f"There are no Inception weights at {weights}: pass the path of inception-2015-12-05.pt, or use the "
            "kernel distance over CLIP features."
        )
    device = torch.device(device)
    try:
        layers = torch.jit.load(str(weights), map_location=device).eval().layers
    except (RuntimeError, OSError, ValueError, AttributeError) as error:
        raise AblationError(f"{weights} is not the Inception network: pass inception-2015-12-05.pt.") from error

    @torch.no_grad()
    def embed(images: np.ndarray) -> Tensor:
        parts = [images[start : start + _INCEPTION_BATCH] for start in range(0, len(images), _INCEPTION_BATCH)]
        return torch.cat([layers(_inception_input(part).to(device)).flatten(1).float().cpu() for part in parts])

    return embed


def _sums(x: Tensor, y: Tensor, blocks: Tensor, count: int) -> _Sums:
    """Over all pairs of a row of `x` and one of `y`, both [N, D], but for the i-th ones; `blocks` [N] of `count`."""
    by_row, by_column, inside = (torch.zeros(count, dtype=torch.float64) for _ in range(3))
    for start in range(0, len(x), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        kernel = (x[part] @ y.t() / x.shape[1] + 1).pow(3)
        kernel.diagonal(start).zero_()
        by_row.index_add_(0, blocks[part], kernel.sum(1))
        by_column.index_add_(0, blocks, kernel.sum(0))
        same = blocks[part, None] == blocks[None]
        inside.index_add_(0, blocks[part], (kernel * same).sum(1))
    return _Sums(by_row, by_column, inside)


def _pairs(rows: Tensor) -> Tensor:
    """How many pairs a sum over so many rows of either set has, float64."""
    return (rows * (rows - 1)).double()


def spherical(embeddings: Tensor) -> Tensor:
    """Normalised embeddings [N, D] at length √D: the kernel then takes their cosine, and is not almost linear in it."""
    return embeddings * math.sqrt(embeddings.shape[1])


def _inception_input(images: np.ndarray) -> Tensor:
    """Pictures resized without rounding, fp32 [B, 3, 299, 299] in [-1, 1]."""
    size = (_INCEPTION_SIZE, _INCEPTION_SIZE)
    resized = [
        [
            np.asarray(Image.fromarray(channel.astype(np.float32)).resize(size, Image.Resampling.BICUBIC))
            for channel in image.transpose(2, 0, 1)
        ]
        for image in images
    ]
    return (torch.from_numpy(np.array(resized)).clamp(0, 255) - 128) / 128
