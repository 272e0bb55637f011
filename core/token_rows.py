"""Token embeddings with only the rows in use.

CLIP's vocabulary has 49,408 tokens and emoji captions use some hundreds of them. `pack` replaces the matrix by two
tensors, `<name>.index` (int32 [K]) and `<name>.rows` (fp16 [K, width]); `unpack` gives the whole matrix back, in which
an unused token has the mean of the rows in use: the most neutral embedding there is. The embedded model and its judge
are stored so, which makes them half as large.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

_VOCABULARY = 49408
_INDEX = ".index"
_ROWS = ".rows"


def pack(tensors: Mapping[str, Tensor], name: str, used: Tensor) -> dict[str, Tensor]:
    """`tensors` with only the rows of matrix `name` where `used` [vocabulary] is true."""
    index = used.nonzero().flatten()
    rest = {key: value for key, value in tensors.items() if key != name}
    return {**rest, name + _INDEX: index.to(torch.int32), name + _ROWS: tensors[name][index].contiguous()}


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The opposite of `pack`, for every matrix that was packed; anything else is passed through."""
    whole = {}
    for key, value in tensors.items():
        if key.endswith(_ROWS) and key.removesuffix(_ROWS) + _INDEX in tensors:
            name = key.removesuffix(_ROWS)
            matrix = value.float().mean(0).to(value.dtype).repeat(_VOCABULARY, 1)
            matrix[tensors[name + _INDEX].long()] = value
            whole[name] = matrix
        elif not (key.endswith(_INDEX) and key.removesuffix(_INDEX) + _ROWS in tensors):
            whole[key] = value
    return whole


def read_packed(path: Path) -> dict[str, Tensor] | None:
    """The whole tensors of a safetensors file that `pack` made, or None for any other file.

    Raises:
        SafetensorError: it is no safetensors file.
    """
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
    if not any(name.endswith(_ROWS) and name.removesuffix(_ROWS) + _INDEX in names for name in names):
        return None
    return unpack(load_file(path))
