"""What a host's user has set or patched, as text that is the same in another process: part of a model's fingerprint.

Patches of ComfyUI's and Forge's nodes are functions that remember their settings, so these are looked into as well.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Set
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_TOLD = (*_PLAIN, Tensor, nn.Module, list, tuple, dict, set, frozenset, partial, FunctionType, MethodType)
_LARGEST = 50_000_000
"""Weights of a network that a patch may bring along; a larger one is a model."""
_SEEN: WeakKeyDictionary[FunctionType, dict[int, str]] = WeakKeyDictionary()
"""What functions were when they were first met, by the depth that was left to look into them."""
_DEPTH = 8
"""How far down settings are looked for."""
_PLACE = re.compile(r".*custom_nodes[\\/]")
"""What stands before the name of a custom node in those of its modules: where ComfyUI is installed."""


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
    if isinstance(value, type | BuiltinFunctionType):
        return _name(value)
    if isinstance(value, FunctionType):
        # some remember what they last did: what counts is what they were when they were first seen
        seen = _SEEN.setdefault(value, {})
        if depth not in seen:
            seen[depth] = _function(value, depth)
        return seen[depth]
    name = _name(type(value))
    if isinstance(value, partial | MethodType):
        bound = isinstance(value, MethodType)
        parts = [value.__func__, value.__self__] if bound else [value.func, value.args, value.keywords]
        return f"{name}{described(parts, depth - 1)}"
    if isinstance(value, nn.Module) and sum(one.numel() for one in value.state_dict().values()) <= _LARGEST:
        return f"{name}{described(value.state_dict(), depth - 1)}"
    if isinstance(value, nn.Module) or hasattr(value, "load_device"):
        # the model itself or what manages it, whose fingerprint this is a part of; where it is loaded to is no setting
        return name
    told = {key: one for key, one in getattr(value, "__dict__", {}).items() if isinstance(one, _TOLD)}
    return f"{name}{described(told, depth - 1)}"


def _function(function: FunctionType, depth: int) -> str:
    """A function by its name and what it has from where it was made: its closure and its defaults."""
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # not filled yet
            cells.append(None)
    remembered = [*cells, *(function.__defaults__ or ())]
    return f"{_name(function)}{described(remembered, depth - 1)}"


def _name(value: type | FunctionType | BuiltinFunctionType) -> str:
    return f"{_PLACE.sub('', str(value.__module__))}.{value.__qualname__}"
