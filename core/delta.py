"""The edit itself: small additive changes to frozen weights, applied by forward hooks.

Every layer that a delta can edit is linear in its weight and bias, so f(x; W + dW) = f(x; W) + f(x; dW): a hook adds
the second term to the layer's output and the weights are never written. That trains on weights of any precision, costs
nothing when detached, and gives the frozen teacher by leaving the term out (`Attachment.disabled`). How deltas are
stored is `delta_file`'s business; which layers to edit, `subsets`'.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .delta_header import METRICS
from .denoiser import Denoiser
from .errors import AblationError, IncompatibleDelta

TEXT_PREFIXES = ("lora_te", "text_encoders.")
"""How the names of text encoder layers begin in LoRA files; everything else belongs to the denoising network."""

_SPELLINGS = (
    (
        r"lora_unet_(down_blocks|mid_block|up_blocks)_",
        r"lora_unet_(input_blocks|middle_block|output_blocks)_",
        r"diffusion_model\.",
    ),
    (r"lora_te_", r"lora_te[12]_", r"text_encoders\..*\.encoder\.layers\."),
)
"""How files begin the names of the same layers, of the network and of the text encoder: ours and most LoRAs', those of
kohya's LoRAs for SDXL, those of the LoRAs that ComfyUI saves. Which names are one layer's, only a model can tell."""
_OF_THE_MODEL = (
    *(f"concept_ablation.{name}" for name in ("architecture", "base_model", "base_model_sha256")),
    *("modelspec.architecture", "ss_v2", "ss_base_model_version"),
)
"""What a header says of the model that an edit is for."""


@dataclass(frozen=True)
class LowRank:
    """A weight change given as up @ down: up [out, rank], down [rank, …rest of the weight's shape]."""

    up: Tensor
    down: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], *self.down.shape[1:])

    def dense(self) -> Tensor:
        return (self.up @ self.down.flatten(1)).reshape(self.shape)

    def truncated(self, rank: int) -> LowRank:
        """The first `rank` of its terms, or all if there are no more."""
        return LowRank(self.up[:, :rank], self.down[:rank])


@dataclass(frozen=True)
class LayerDelta:
    """The change of one layer: of its weight (same shape, dense or low-rank), of its bias, or of both."""

    weight: Tensor | LowRank | None = None
    bias: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerDelta:
        """The same change with `function` applied to each of its tensors."""
        weight = self.weight
        if isinstance(weight, LowRank):
            weight = LowRank(function(weight.up), function(weight.down))
        elif weight is not None:
            weight = function(weight)
        return LayerDelta(weight, None if self.bias is None else function(self.bias))

    def tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        self.map(lambda tensor: found.append(tensor) or tensor)
        return found

    def scaled(self, factor: float) -> LayerDelta:
        if isinstance(self.weight, LowRank):
            weight: Tensor | LowRank | None = LowRank(self.weight.up * factor, self.weight.down)
        else:
            weight = None if self.weight is None else self.weight * factor
        return LayerDelta(weight, None if self.bias is None else self.bias * factor)

    def squared_norm(self) -> Tensor:
        """Squared Frobenius norm of the change, scalar; of a low-rank weight without making it dense."""
        total = torch.zeros(())
        if isinstance(self.weight, LowRank):
            down = self.weight.down.flatten(1)
            total = ((self.weight.up.T @ self.weight.up) * (down @ down.T)).sum()
        elif self.weight is not None:
            total = self.weight.square().sum()
        return total if self.bias is None else total + self.bias.square().sum()


@dataclass(frozen=True)
class Delta:
    """An edit of a model: changes by LoRA layer name, fp32, and what is known about them (the file's header)."""

    layers: Mapping[str, LayerDelta]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def map(self, function: Callable[[Tensor], Tensor]) -> Delta:
        """The same delta with `function` applied to each of its tensors."""
        return Delta({name: layer.map(function) for name, layer in self.layers.items()}, self.metadata)

    def scaled(self, factor: float) -> Delta:
        """The delta times `factor`."""
        return Delta({name: layer.scaled(factor) for name, layer in self.layers.items()}, self.metadata)

    def rounded(self, dtype: torch.dtype) -> Delta:
        """What is left of the delta after it was stored in `dtype`, again in fp32."""
        return self.map(lambda tensor: tensor.to(dtype).float())

    def norm(self) -> Tensor:
        """L2 norm of all changes together, scalar: || edited weights - pretrained weights ||_2 of Eq. 7."""
        # the square root has no gradient at 0, where every training begins
        return torch.stack([layer.squared_norm() for layer in self.layers.values()]).sum().clamp(min=1e-20).sqrt()

    def attach(self, denoiser: Denoiser, strength: float = 1.0) -> Attachment:
        """Add the delta to a denoiser's forward pass until the returned attachment is detached.

        Raises:
            IncompatibleDelta: a layer is missing in the model, or has another shape there.
        """
        return Attachment(self, denoiser, strength)


class Attachment:
    """A delta at work on a denoiser. Usable as a context manager, which detaches at the end."""

    def __init__(self, delta: Delta, denoiser: Denoiser, strength: float) -> None:
        check_fits(delta, denoiser)
        self.strength = strength
        self._enabled = True
        self._denoiser = denoiser
        self._edits_text = any(name.startswith(TEXT_PREFIXES) for name in delta.layers)
        self._handles = [
            denoiser.layers[name].register_forward_hook(self._hook(layer)) for name, layer in delta.layers.items()
        ]
        if self._edits_text:
            denoiser.text_edits += 1

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the network is the pretrained one, to the last bit: the frozen teacher."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    def detach(self) -> None:
        """Take the delta off. Harmless if it is off already."""
        if self._handles and self._edits_text:
            self._denoiser.text_edits -= 1
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def _hook(self, layer: LayerDelta) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        tensors = layer.tensors()
        cast: dict[tuple[object, ...], LayerDelta] = {}

        def as_computed(module: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, LayerDelta]:
            """The input and the change in the type that the layer computes in: the latter made once for all calls."""
            if not isinstance(module, (nn.Linear, nn.Conv2d)) or any(tensor.requires_grad for tensor in tensors):
                return x, layer
            # an inference tensor counts no versions, and no gradient could go through what was made of it
            versions = (tensor.is_inference() or tensor._version for tensor in tensors)
            made_for = x.device, dtype, torch.is_inference_mode_enabled(), *versions
            if made_for not in cast:
                cast.clear()
                cast[made_for] = layer.map(lambda tensor: tensor.to(x.device, dtype))
            return x.to(dtype), cast[made_for]

        def add_contribution(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self._enabled or self.strength == 0:
                return None
            change = contribution(module, *as_computed(module, inputs[0], output.dtype)).to(output.dtype)
            # a training is always at 1, and would pay for the product twice
            return output + (change if self.strength == 1 else self.strength * change)

        return add_contribution


def contribution(module: nn.Module, x: Tensor, layer: LayerDelta) -> Tensor:
    """f(x; dW, db) for the layer type of `module`: what the change adds to its output.

    Raises:
        TypeError: the module is of a type that no delta can edit.
    """
    if isinstance(module, nn.GroupNorm) and x.device.type == "cpu":
        # there PyTorch's kernel for half precision is several times slower than the one for fp32
        x = x.float()
    # token ids have no precision to follow
    dtype = x.dtype if x.is_floating_point() else None
    layer = layer.map(lambda tensor: tensor.to(x.device, dtype))
    weight, bias = layer.weight, layer.bias
    if isinstance(module, nn.Linear):
        if isinstance(weight, LowRank):
            return F.linear(F.linear(x, weight.down), weight.up, bias)
        return F.linear(x, weight, bias) if weight is not None else bias.expand(*x.shape[:-1], -1)
    if isinstance(module, nn.Conv2d):
        return _convolve(module, x, weight, bias)
    if isinstance(module, nn.Embedding):
        if isinstance(weight, LowRank):
            return F.embedding(x, weight.up) @ weight.down
        return F.embedding(x, weight)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, _zeros_if_none(weight, bias), bias, module.eps)
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, _zeros_if_none(weight, bias), bias, module.eps)
    raise TypeError(f"no delta can edit a {type(module).__name__}")


EDITABLE: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d, nn.Embedding, nn.GroupNorm, nn.LayerNorm)


def zeros(layers: Mapping[str, nn.Module]) -> Delta:
    """A dense delta of zeros for `layers`, on their devices: weight and, where a layer has one, bias."""

    def empty(parameter: Tensor | None) -> Tensor | None:
        return None if parameter is None else torch.zeros(parameter.shape, device=parameter.device)

    return Delta({name: LayerDelta(empty(m.weight), empty(getattr(m, "bias", None))) for name, m in layers.items()})


def zeros_in_rows(name: str, embedding: nn.Embedding, rows: Iterable[int]) -> Delta:
    """A delta of zeros for some rows of an embedding, [vocabulary, width].

    Stored as low rank, with an `up` that selects the rows, so that a file holds only what moved and every LoRA loader
    reads it; only `down`, one row for each of `rows`, is meant to be trained.
    """
    rows = sorted(set(rows))
    select = torch.zeros(embedding.num_embeddings, len(rows), device=embedding.weight.device)
    select[rows, torch.arange(len(rows))] = 1.0
    down = torch.zeros(len(rows), embedding.embedding_dim, device=embedding.weight.device)
    return Delta({name: LayerDelta(LowRank(select, down))})


def check_fits(delta: Delta, denoiser: Denoiser) -> None:
    """Raise IncompatibleDelta unless each layer of the delta exists in the model with the same shape."""
    missing = [name for name in delta.layers if name not in denoiser.layers]
    made_for = delta.metadata.get("concept_ablation.architecture", "another architecture")
    if missing:
        raise IncompatibleDelta(
            f"The delta edits {len(missing)} layers that {denoiser.name} ({denoiser.architecture}) does not have, "
            f"first {missing[0]}: use it with the model that it was made for ({made_for})."
        )
    for name, layer in delta.layers.items():
        module = denoiser.layers[name]
        for change, parameter in ((layer.weight, module.weight), (layer.bias, getattr(module, "bias", None))):
            have = None if parameter is None else tuple(parameter.shape)
            if change is not None and tuple(change.shape) != have:
                raise IncompatibleDelta(
                    f"The delta's {name} has the shape {tuple(change.shape)} but {denoiser.name} has {have}: "
                    f"use it with the model that it was made for ({made_for})."
                )


def merge(deltas: Iterable[tuple[Delta, float]]) -> Delta:
    """The sum of deltas, each times its strength. Low-rank changes of one layer are joined without loss of rank.

    Raises:
        AblationError: nothing to merge, or two deltas disagree about a layer's shape or about how layers are named.
    """
    total: dict[str, LayerDelta] = {}
    headers: list[Mapping[str, str]] = []
    sources: list[str] = []
    for delta, strength in deltas:
        headers.append(delta.metadata)
        sources.append(f"{_called(delta)} x {strength:g}")
        for name, layer in delta.scaled(strength).layers.items():
            total[name] = add(name, total[name], layer) if name in total else layer
    if not total:
        raise AblationError("There is nothing to merge: give at least one delta.")
    _require_one_spelling(total)
    return Delta(total, {**_agreed(headers), "concept_ablation.merged": "; ".join(sources)})


def add(name: str, first: LayerDelta, second: LayerDelta) -> LayerDelta:
    """Both changes of the layer `name` together; low-rank ones are joined without loss of rank.

    Raises:
        AblationError: the weights' shapes differ.
    """
    a, b = first.weight, second.weight
    if a is not None and b is not None and tuple(a.shape) != tuple(b.shape):
        raise AblationError(
            f"These deltas were made for different models (their {name} differ in shape) and cannot be merged."
        )
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        weight: Tensor | LowRank | None = LowRank(torch.cat((a.up, b.up), 1), torch.cat((a.down, b.down)))
    elif a is None or b is None:
        weight = b if a is None else a
    else:
        weight = (a.dense() if isinstance(a, LowRank) else a) + (b.dense() if isinstance(b, LowRank) else b)
    biases = [layer.bias for layer in (first, second) if layer.bias is not None]
    return LayerDelta(weight, sum(biases[1:], biases[0]) if biases else None)


def factorize(weight: Tensor | LowRank) -> LowRank:
    """A weight change [out, …] as its singular value decomposition: the terms sorted from the largest down, the
    singular values shared equally by both factors. Its first r terms are the best approximation of rank r (Eckart and
    Young, 1936).
    """
    if isinstance(weight, LowRank):
        # by way of the factors' triangles, which are small: those of an embedding are as long as the vocabulary
        left, up = torch.linalg.qr(weight.up)
        right, down = torch.linalg.qr(weight.down.flatten(1).T)
        inner = factorize(up @ down.T)
        return LowRank(left @ inner.up, (inner.down @ right.T).reshape(-1, *weight.down.shape[1:]))
    u, s, vh = torch.linalg.svd(weight.float().flatten(1), full_matrices=False)
    root = s.sqrt()
    return LowRank(u * root, (root[:, None] * vh).reshape(-1, *weight.shape[1:]))


def to_lora(delta: Delta, rank: int) -> tuple[Delta, float]:
    """The best approximation of each weight change by one of `rank`, from its singular value decomposition.

    Changes that have no rank to reduce (biases, normalization) stay as they are, and so do low-rank ones within `rank`.

    Returns:
        The delta, and the share of the energy (sum of squared singular values) of all weight changes that it keeps.

    Raises:
        AblationError: rank < 1.
    """
    if rank < 1:
        raise AblationError(f"The rank of a LoRA must be at least 1, not {rank}.")
    layers: dict[str, LayerDelta] = {}
    kept = energy = 0.0
    for name, layer in delta.layers.items():
        weight = layer.weight
        fits = isinstance(weight, LowRank) and weight.up.shape[1] <= rank
        if weight is None or fits or len(weight.shape) < 2:
            layers[name] = layer
            share = float(LayerDelta(layer.weight).squared_norm())
            kept, energy = kept + share, energy + share
            continue
        low = factorize(weight).truncated(rank)
        layers[name] = LayerDelta(low, layer.bias)
        kept += float(LayerDelta(low).squared_norm())
        energy += float(LayerDelta(weight).squared_norm())
    metadata = {**delta.metadata, "concept_ablation.rank": str(rank)}
    metadata.pop(METRICS, None)
    return Delta(layers, metadata), kept / energy if energy else 1.0


def _convolve(module: nn.Conv2d, x: Tensor, weight: Tensor | LowRank | None, bias: Tensor | None) -> Tensor:
    if weight is None:
        weight = torch.zeros_like(module.weight, device=x.device, dtype=x.dtype)
    if not isinstance(weight, LowRank):
        # the layer's own method, because it knows the padding mode
        return module._conv_forward(x, weight, bias)
    if module.groups != 1:
        return module._conv_forward(x, weight.dense(), bias)
    return F.conv2d(module._conv_forward(x, weight.down, None), weight.up[:, :, None, None], bias)


def _zeros_if_none(weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return torch.zeros_like(bias) if weight is None else weight


def _called(delta: Delta) -> str:
    """What the header of a sum calls one of its parts; of a part that is a sum itself, all of that."""
    merged = delta.metadata.get("concept_ablation.merged")
    return f"({merged})" if merged else delta.metadata.get("concept_ablation.target", "unnamed")


def _agreed(headers: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """What all headers say alike of the model."""
    alike = set.intersection(*(set(header.items()) for header in headers))
    return {key: value for key, value in sorted(alike) if key in _OF_THE_MODEL}


def _require_one_spelling(names: Iterable[str]) -> None:
    for spellings in _SPELLINGS:
        found = [next(filter(re.compile(spelling).match, names), None) for spelling in spellings]
        mixed = [name for name in found if name is not None]
        if len(mixed) > 1:
            raise AblationError(
                f"These deltas name layers in two ways ({mixed[0]}, {mixed[1]}), and of two names for a layer programs "
                "apply only one: merge what ComfyUI's Load Ablation Delta makes of them, or apply them unmerged."
            )
