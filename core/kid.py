"""Kernel Inception distance: how far the pictures of one model are from those of another, as sets.

The squared maximum mean discrepancy of two sets of features under the kernel k(x, y) = (x·y / D + 1)³, with the
unbiased estimator (Binkowski et al., "Demystifying MMD GANs", ICLR 2018, https://arxiv.org/abs/1801.01401; Gretton et
al., "A Kernel Two-Sample Test", JMLR 2012, equations 3 and 4). What the features are is open: `clip_features`,
`copy_features` and `inception_features` make them from pictures. Figures of different features cannot be compared.
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

from .copies import CopyDetector
from .errors import AblationError
from .metrics import Judge
from .statistics import Estimate, Groups, group_index

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

    @property
    def interval(self) -> Estimate:
        """The value with its normal 95 % interval."""
        return Estimate(self.value, self.value - 1.96 * self.standard_error, self.value + 1.96 * self.standard_error)


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


def kid(
    first: Tensor,
    second: Tensor,
    groups: Groups | None = None,
    *,
    second_groups: Groups | None = None,
    paired: bool = False,
) -> Kid:
    """The distance of two sets of features, from all pairs of rows.

    The standard error is the block jackknife's: the distance without each block in turn (Efron and Stein 1981). It is
    too large rather than too small where the distributions are nearly equal.

    Args:
        first: features [N >= 2, D].
        second: features [M >= 2, D].
        groups: what each row of `first` (and, when paired, of `second`) belongs to, such as its prompt: one block. Left
            out, every row, or every pair of rows, is a block.
        second_groups: the same for `second` when not paired. A label that both sets have is one block.
        paired: whether the i-th rows come from the same prompt and seed, so that M = N. Such rows depend on each other
            and are not compared; without this, an edit that changes nothing would have a distance below 0.

    Raises:
        ValueError: shapes or groups that do not fit.
    """
    x, y = (features.detach().to("cpu", torch.float64) for features in (first, second))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"features must be [N >= 2, D] and [M >= 2, D], not {tuple(x.shape)} and {tuple(y.shape)}")
    rows, columns, count = _blocks(len(x), len(y), groups, second_groups, paired)
    n, m = (torch.bincount(index, minlength=count) for index in (rows, columns))
    parts = (
        (_sums(x, x, rows, rows, count, diagonal=False), n, n, True),
        (_sums(y, y, columns, columns, count, diagonal=False), m, m, True),
        (_sums(x, y, rows, columns, count, diagonal=not paired), n, m, paired),
    )
    whole = sum(
        sign * part.by_row.sum() / _pairs(one.sum(), other.sum(), without_diagonal)
        for sign, (part, one, other, without_diagonal) in zip((1, 1, -2), parts, strict=True)
    )
    left = sum(
        sign * part.without() / _pairs(one.sum() - one, other.sum() - other, without_diagonal)
        for sign, (part, one, other, without_diagonal) in zip((1, 1, -2), parts, strict=True)
    )
    if count < 2 or not bool(torch.isfinite(left).all()):
        return Kid(float(whole), math.nan)
    return Kid(float(whole), math.sqrt((count - 1) / count * float((left - whole).square().sum())))


def clip_features(judge: Judge) -> Features:
    """A judge's embeddings, scaled to length √D: the kernel then takes their cosine, and is not almost linear in it."""
    return lambda images: spherical(judge.embed_images(images))


def copy_features(detector: CopyDetector) -> Features:
    """A copy detector's embeddings, scaled as those of `clip_features`."""
    return lambda images: spherical(detector.embed(images))


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


def _blocks(
    n: int, m: int, groups: Groups | None, second_groups: Groups | None, paired: bool
) -> tuple[Tensor, Tensor, int]:
    """The block of each row of the two sets, int64 [n] and [m], and how many blocks there are."""
    if paired:
        if n != m or second_groups is not None:
            raise ValueError("paired features need two equal lengths and one sequence of groups")
        labels = range(n) if groups is None else groups
        index = torch.from_numpy(group_index([*labels, *labels], 2 * n))
    elif groups is None and second_groups is None:
        index = torch.arange(n + m)
    elif groups is None or second_groups is None:
        raise ValueError("either both sets have groups or neither")
    else:
        if (len(groups), len(second_groups)) != (n, m):
            raise ValueError(f"{len(groups)} and {len(second_groups)} groups for {n} and {m} rows")
        index = torch.from_numpy(group_index([*groups, *second_groups], n + m))
    return index[:n], index[n:], int(index.max()) + 1


def _sums(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor, count: int, *, diagonal: bool) -> _Sums:
    by_row, by_column, inside = (torch.zeros(count, dtype=torch.float64) for _ in range(3))
    for start in range(0, len(x), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        kernel = (x[part] @ y.t() / x.shape[1] + 1).pow(3)
        if not diagonal:
            kernel.diagonal(start).zero_()
        by_row.index_add_(0, rows[part], kernel.sum(1))
        by_column.index_add_(0, columns, kernel.sum(0))
        same = rows[part, None] == columns[None]
        inside.index_add_(0, rows[part], (kernel * same).sum(1))
    return _Sums(by_row, by_column, inside)


def _pairs(one: Tensor, other: Tensor, without_diagonal: bool) -> Tensor:
    """How many pairs a sum has, float64; the sets are equally large where the diagonal is left out."""
    return (one * (other - 1) if without_diagonal else one * other).double()


def spherical(embeddings: Tensor) -> Tensor:
    """Normalised embeddings [N, D] at length √D, where the kernel takes their cosine."""
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
