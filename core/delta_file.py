"""Delta files: safetensors that stock LoRA loaders read, with a header that says where the edit comes from.

Dense changes are stored as `<layer>.diff` and `<layer>.diff_b`, low-rank ones as `<layer>.lora_up.weight`,
`.lora_down.weight` and `.alpha`. The header has `modelspec.*` fields (Stability's ModelSpec 1.0.1) and
`concept_ablation.*`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .delta import Delta, LayerDelta, LowRank
from .errors import AblationError
from .files import replacing

_SUFFIXES = (".diff", ".diff_b", ".lora_up.weight", ".lora_down.weight", ".alpha")
_UNSUPPORTED = "holds '{key}', a kind of edit that this program does not read: give a delta or a plain LoRA"


def save(delta: Delta, path: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a delta. fp16 is what LoRA files use; `Delta.rounded` gives what will be read back.

    Raises:
        AblationError: a value is NaN or infinite in `dtype`, or the file cannot be written.
    """
    tensors = {key: tensor.detach().cpu().to(dtype).contiguous() for key, tensor in to_tensors(delta).items()}
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise AblationError(
            "The delta holds NaN or infinity and was not saved: train again with a lower learning rate."
        )
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=dict(delta.metadata))


def load(path: Path) -> Delta:
    """Read a delta, or a LoRA in kohya's format, as fp32.

    Raises:
        AblationError: no such file, not a whole safetensors file, or an edit of a kind that is not read.
    """
    if not path.is_file():
        raise AblationError(f"There is no delta file {path}: check the path.")
    if path.suffix != ".safetensors":
        raise AblationError(f"{path.name} is not a .safetensors file: only those are read, because they hold no code.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise AblationError(f"{path.name} is damaged or not a safetensors file: get it again.") from error
    if metadata.get("concept_ablation.architecture") == "sd2":
        # files of before its text encoder had a name of its own
        tensors = {key.replace("text_encoders.clip_l.", "text_encoders.clip_h."): one for key, one in tensors.items()}
    return from_tensors(tensors, metadata, path.name)


def to_tensors(delta: Delta) -> dict[str, Tensor]:
    """The tensors of a delta under the keys that LoRA loaders know."""
    tensors: dict[str, Tensor] = {}
    for name, layer in delta.layers.items():
        if isinstance(layer.weight, LowRank):
            up, down = layer.weight.up, layer.weight.down
            # convolutions store `up` as a 1x1 kernel
            tensors[f"{name}.lora_up.weight"] = up[:, :, None, None] if down.dim() == 4 else up
            tensors[f"{name}.lora_down.weight"] = down
            tensors[f"{name}.alpha"] = torch.tensor(float(up.shape[1]))
        elif layer.weight is not None:
            tensors[f"{name}.diff"] = layer.weight
        if layer.bias is not None:
            tensors[f"{name}.diff_b"] = layer.bias
    return tensors


def from_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> Delta:
    """The inverse of `to_tensors`; `source` is what error messages call the file."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), None)
        if suffix is None:
            raise AblationError(f"{source} {_UNSUPPORTED.format(key=key)}.")
        parts.setdefault(key.removesuffix(suffix), {})[suffix] = tensor
    if not parts:
        raise AblationError(f"{source} is empty: give a delta or a LoRA.")
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise AblationError(f"{source} holds NaN or infinity: get the file again.")
    return Delta({name: _layer(name, part, source) for name, part in parts.items()}, dict(metadata))


def _layer(name: str, part: Mapping[str, Tensor], source: str) -> LayerDelta:
    weight: Tensor | LowRank | None = part.get(".diff")
    up, down = part.get(".lora_up.weight"), part.get(".lora_down.weight")
    alone = up is None and down is None and (weight is not None or ".diff_b" in part)
    whole = ".alpha" not in part or part[".alpha"].numel() == 1
    if not whole or (not alone and (weight is not None or not _are_factors(up, down))):
        raise AblationError(f"{source} has an incomplete or contradictory entry for {name}: get the file again.")
    if up is not None and down is not None:
        rank = down.shape[0]
        alpha = float(part.get(".alpha", torch.tensor(float(rank))).flatten()[0])
        weight = LowRank(up.flatten(1) * (alpha / rank), down)
    return LayerDelta(weight, part.get(".diff_b"))


def _are_factors(up: Tensor | None, down: Tensor | None) -> bool:
    """Whether the two can be multiplied: [out, rank, ...] and [rank, in, ...], of a rank of at least 1."""
    if up is None or down is None or up.dim() < 2 or down.dim() < 2:
        return False
    return up.flatten(1).shape[1] == down.shape[0] > 0
