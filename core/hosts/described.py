"""What a host's user has set or patched, as text that is the same in another process: part of a model's fingerprint.

Patches of ComfyUI's and Forge's nodes are functions that remember their settings, so these are looked into as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_TOLD = (*_PLAIN, Tensor, list, tuple, dict)
_DEPTH = 8
"""How far down settings are looked for."""


def described(value: Any, depth: int = _DEPTH) -> str:
    """A value by what it holds: numbers, texts, tensors, containers of them, functions and what these remember.
    Of anything else its type and its plain attributes.
    """
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return f"{value.dtype}{tuple(value.shape)}{hashlib.sha256(raw.numpy().tobytes()).hexdigest()}"
    if depth == 0:
        return type(value).__qualname__
    if isinstance(value, Mapping):
        pairs = sorted(f"{described(key, depth - 1)}: {described(one, depth - 1)}" for key, one in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, Set):
        return f"{{{', '.join(sorted(described(one, depth - 1) for one in value))}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(described(one, depth - 1) for one in value)}]"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}{described(_remembered(value), depth - 1)}"
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, nn.Module) or hasattr(value, "load_device"):
        # a model or what manages one: where it is loaded to is no setting, and a fingerprint of its own covers the rest
        return name
    told = {key: one for key, one in getattr(value, "__dict__", {}).items() if isinstance(one, _TOLD)}
    return f"{name}{described(told, depth - 1)}"


def _remembered(function: Any) -> list[Any]:
    """The values that a function has from where it was made: its closure, its defaults, its object."""
    cells = []
    for cell in getattr(function, "__closure__", None) or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # not filled yet
            cells.append(None)
    own = getattr(function, "__self__", None)
    return [*cells, *(getattr(function, "__defaults__", None) or ()), *([] if own is None else [own])]
