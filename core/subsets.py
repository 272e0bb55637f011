"""Which weights an edit may touch.

Layers are chosen by patterns on their LoRA names, which are the same in every host. The subsets are the paper's
(section 3.2), `attn`, which its authors added later for stronger removal, and `cross-attn-up`, with which the backward
pass is truncated: nothing before the first layer that is trained has a gradient, so nothing is kept for one there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from . import low_rank
from .concept import Concept, wordings
from .delta import Delta, zeros, zeros_in_rows
from .denoiser import Denoiser
from .errors import AblationError

_UNET = {
    "cross-attn": r"lora_unet_.*_attn2_to_[kv]",
    "attn": r"lora_unet_.*_attn[12]_to_(q|k|v|out_0)",
    "full": r"lora_unet_.*",
    "cross-attn-up": r"lora_unet_(mid_block|up_blocks)_.*_attn2_to_[kv]",
}
_PATTERNS = {"sd1": _UNET, "sd2": _UNET, "sdxl": _UNET}
_TOKEN_EMBEDDING = r"text_encoders\..*\.token_embedding"

SUBSETS: dict[str, str] = {
    "cross-attn": "keys and values of the cross-attention layers",
    "attn": "queries, keys, values and outputs of all attention layers",
    "embedding": "the target's rows of the text encoder's token embedding",
    "full": "every weight of the denoising network",
    "cross-attn-up": "of cross-attn the middle and the way up, where the backward pass stops: less time and memory",
}

NOT_LINEAR = ("embedding", "full")
"""Subsets with other layers than linear ones, which cannot be trained as factors of a given rank."""


def check_subset(subset: str) -> None:
    """Raise AblationError if there is no such subset."""
    if subset not in SUBSETS:
        raise AblationError(f"There is no subset '{subset}': choose one of {', '.join(SUBSETS)}.")


def select(subset: str, denoiser: Denoiser) -> dict[str, nn.Module]:
    """The layers of `subset`, by name, in the model's order.

    Raises:
        AblationError: no such subset, or the model's architecture has none of its layers.
    """
    check_subset(subset)
    pattern = re.compile(_TOKEN_EMBEDDING if subset == "embedding" else _PATTERNS[denoiser.architecture][subset])
    layers = {name: module for name, module in denoiser.layers.items() if pattern.fullmatch(name)}
    if not layers:
        raise AblationError(f"{denoiser.name} has no layers of the subset '{subset}': choose another one.")
    return layers


def empty_delta(subset: str, denoiser: Denoiser, concepts: Iterable[Concept], rank: int = 0, seed: int = 0) -> Delta:
    """A delta of zeros over `subset`, ready to be trained: whole matrices, or with a `rank` the factors of LoRA.

    For `embedding` only the rows of the targets' tokens are in it, of their names as of further prompts and captions:
    of those tokens, where there are any, that no anchor shares ("grumpy" of Grumpy Cat -> cat), because a shared row
    would move the anchor too.

    Raises:
        AblationError: as `select`, or a rank for a subset that has other layers than linear ones.
    """
    layers = select(subset, denoiser)
    if rank:
        return _on_device(low_rank.zeros(layers, rank, seed), denoiser)
    if subset != "embedding":
        return _on_device(zeros(layers), denoiser)
    rows = _rows_of_targets(denoiser, concepts)
    merged = {name: zeros_in_rows(name, module, rows).layers[name] for name, module in layers.items()}
    return _on_device(Delta(merged), denoiser)


def _rows_of_targets(denoiser: Denoiser, concepts: Iterable[Concept]) -> set[int]:
    """Rows of the token embedding such that each text for a target has one that is trained."""
    texts = [wordings(concept) for concept in concepts]
    kept = [{token for text in anchors for token in denoiser.tokenize(text)} for _, anchors in texts]
    targets = [
        (set(denoiser.tokenize(text)), own) for (names, _), own in zip(texts, kept, strict=True) for text in names
    ]
    rows = {token for target, _ in targets for token in target.difference(*kept)}
    return rows.union(*(target - own or target for target, own in targets if not target & rows))


def trainable(delta: Delta, subset: str) -> Delta:
    """The same delta with gradients switched on for what may move: of `embedding` only the rows, not their choice."""
    tensors = [tensor for layer in delta.layers.values() for tensor in layer.tensors()]
    if subset == "embedding":
        tensors = [layer.weight.down for layer in delta.layers.values()]
    for tensor in tensors:
        tensor.requires_grad_(True)
    return delta


def _on_device(delta: Delta, denoiser: Denoiser) -> Delta:
    """The delta where the activations are; the layers' own weights may be offloaded."""
    return delta.map(lambda tensor: tensor.to(denoiser.device))
