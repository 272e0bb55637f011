"""What ComfyUI and Forge have in common: both keep a model of the LDM layout in a patcher, load it in inference mode,
name its layers by a table from LDM to diffusers, and turn LoRA files into weight patches.

Nothing here imports either program.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..delta import EDITABLE, TEXT_PREFIXES, Delta, LayerDelta, LowRank, add
from ..denoiser import Denoiser, LatentCodec
from ..errors import AblationError, IncompatibleDelta
from ..precision import cpu_has_bf16

BATCH, TRAINING = 16, 3
"""What a host is asked to keep free: its own estimate for images of this batch, times what a backward pass adds."""
PIXELS_PER_LATENT = 8

_CHECKPOINTED = ("ResBlock", "SpatialTransformer")
_UNUSED = (".logit_scale", "clip_l.transformer.text_projection.weight", "clip_h.transformer.text_projection.weight")


class PatcherDenoiser(Denoiser):
    """What denoisers on a patcher share. A subclass sets `_autocast` beside the attributes of every denoiser."""

    _autocast: torch.dtype | None

    def __init__(self) -> None:
        super().__init__()
        self._fingerprint: str | None = None

    @abstractmethod
    def _beside(self) -> object:
        """What the host lets its user change beside the weights, as anything whose `str` tells it."""

    def fingerprint(self) -> str:
        """As for every model, and of what the host's user can change beside the weights."""
        # read from the device, which for gigabytes takes seconds
        if self._fingerprint is None:
            self._fingerprint = hashlib.sha256(f"{super().fingerprint()} {self._beside()}".encode()).hexdigest()
        return self._fingerprint

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        # most checkpoints lack these, the host then leaves chance in them, and no network here is told what they give
        return ((name, tensor) for name, tensor in super()._weights() if not name.endswith(_UNUSED))

    @contextlib.contextmanager
    def checkpointed(self) -> Iterator[None]:
        blocks = [module for module in self.network.modules() if type(module).__name__ in _CHECKPOINTED]
        if not blocks:
            raise AblationError(f"{self.name} has no blocks that can be computed again: switch checkpointing off.")
        for block in blocks:
            block.forward = functools.partial(_checkpoint, block.forward)
        try:
            yield
        finally:
            for block in blocks:
                # the class has the method; only the instance's stand-in goes
                del block.forward

    def _compute(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self._autocast)


class PatcherCodec(LatentCodec):
    """A host's VAE, in the latent scale of the network.

    Args:
        vae: takes and gives images [B, H, W, 3].
        scaling: `process_in` and `process_out` go between the VAE's scale and the network's.
        reload: brings the network back to its device, from which the host may have moved it to make room.
    """

    def __init__(self, vae: Any, scaling: Any, reload: Callable[[], None]) -> None:
        self._vae = vae
        self._scaling = scaling
        self._reload = reload

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        try:
            latents = self._require().encode(images.permute(0, 2, 3, 1))
        finally:
            self._reload()
        return self._scaling.process_in(latents.float())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        try:
            images = self._require().decode(self._scaling.process_out(latents))
        finally:
            self._reload()
        return images.float().permute(0, 3, 1, 2).clamp(0, 1)

    def _require(self) -> Any:
        if self._vae is None:
            raise AblationError("Images need a VAE to be decoded: connect one to this node.")
        return self._vae


# --- Tensors ----------------------------------------------------------------------------------------------------------


def make_ordinary(modules: Iterable[nn.Module]) -> None:
    """Make of every inference tensor among parameters and buffers one that a backward pass can use, in the same memory.

    Called outside of inference mode. Parameters that are one object stay one.
    """
    # the old ones are kept until the end, so that no id is used twice
    done: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in done:
                module._parameters[name] = done[id(parameter)][1]
            elif _is_inference(parameter):
                plain = nn.Parameter(_same_memory(parameter), requires_grad=False)
                done[id(parameter)] = (parameter, plain)
                module._parameters[name] = plain
        for name, buffer in module._buffers.items():
            if _is_inference(buffer):
                module._buffers[name] = _same_memory(buffer)


def _is_inference(tensor: Tensor | None) -> bool:
    # subclasses are packed weights, which layers unpack into tensors of their own
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_inference()


def _same_memory(tensor: Tensor) -> Tensor:
    """The tensor without its inference flag. Not a copy: hosts keep account of memory that they pinned."""
    plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


@contextlib.contextmanager
def kept_for_backward(network: nn.Module) -> Iterator[None]:
    """Within the block, layer norms of the network work on a copy: hosts add to their input in place afterwards, which
    a backward pass through them does not survive.
    """

    def copy(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (inputs[0].clone(), *inputs[1:]) if torch.is_grad_enabled() else None

    norms = [module for module in network.modules() if isinstance(module, nn.LayerNorm)]
    handles = [module.register_forward_pre_hook(copy) for module in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _checkpoint(forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
    # hosts note in transformer_options where they are, which must read the same when the block runs again
    kept = [dict(value) if isinstance(value, dict) else value for value in inputs]
    return checkpoint(forward, *kept, use_reentrant=False)


# --- Choices ----------------------------------------------------------------------------------------------------------


def autocast_dtype(device: torch.device, compute: torch.dtype) -> torch.dtype | None:
    """What to compute in instead of the host's own choice: bf16 where that is fp32 and the hardware is fast at it."""
    if compute != torch.float32:
        return None
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_bf16() else None
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None


def native_size(architecture: str, prediction_type: str) -> int:
    """Edge of the images that a model of Stability's was trained on, in pixels."""
    if architecture == "sdxl":
        return 1024
    return 768 if architecture == "sd2" and prediction_type == "v_prediction" else 512


def latent_edges(width: int, height: int) -> tuple[int, int]:
    """(height, width) of the latents of images of that many pixels.

    Raises:
        AblationError: no latent has that size.
    """
    if width % PIXELS_PER_LATENT or height % PIXELS_PER_LATENT:
        raise AblationError(f"Images of {width} x {height} cannot be drawn: choose multiples of 8.")
    return height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT


# --- Names ------------------------------------------------------------------------------------------------------------


def unet_layers(network: nn.Module, to_ldm: Mapping[str, str]) -> dict[str, nn.Module]:
    """The network's editable layers by LoRA name: diffusers' names where they exist, else the LDM layout's.

    Args:
        to_ldm: the LDM name of each diffusers name, of weights and biases.
    """
    # SDXL's size embedding has two names, which hosts have in an order of chance
    known = {
        ldm.removesuffix(".weight"): diffusers.removesuffix(".weight")
        for diffusers, ldm in sorted(to_ldm.items(), reverse=True)
    }
    return {
        "lora_unet_" + known.get(name, name).replace(".", "_"): module
        for name, module in network.named_modules()
        if is_editable(module)
    }


def short_text_names(encoder: nn.Module, keys: Mapping[str, str]) -> dict[str, str]:
    """The LoRA name of each text encoder layer that has a short one: `lora_te_…`, for two encoders `lora_te1_…`, …2.

    Args:
        keys: the weight that each LoRA name stands for.
    """
    two = hasattr(encoder, "clip_l") and hasattr(encoder, "clip_g")
    prefixes = ("lora_te1_", "lora_te2_") if two else "lora_te_"
    return {weight.removesuffix(".weight"): name for name, weight in keys.items() if name.startswith(prefixes)}


def is_editable(module: nn.Module) -> bool:
    """Whether a delta can edit the layer."""
    return isinstance(module, EDITABLE) and getattr(module, "weight", None) is not None


def check_fits(delta: Delta, keys: Mapping[str, str], weights: Mapping[str, Tensor], text_advice: str) -> None:
    """Raise IncompatibleDelta unless the host would apply every part of the delta.

    Args:
        keys: the weight that each LoRA name stands for.
        weights: all weights of the network and, where there is one, of the text encoder.
        text_advice: what to do if nothing but layers of the text encoder is missing.
    """
    made_for = delta.metadata.get("concept_ablation.base_model", "another model")
    missing = [name for name in delta.layers if name not in keys]
    if missing:
        text_only = all(name.startswith(TEXT_PREFIXES) for name in missing)
        advice = text_advice if text_only else f"use it with the model it was made for ({made_for})"
        raise IncompatibleDelta(
            f"The delta edits {len(missing)} layers that this model does not have, first {missing[0]}: {advice}."
        )
    for name, layer in delta.layers.items():
        weight = weights.get(keys[name])
        bias = weights.get(keys[name].removesuffix(".weight") + ".bias")
        for change, parameter in ((layer.weight, weight), (layer.bias, bias)):
            have = None if parameter is None else tuple(parameter.shape)
            if change is not None and (have is None or not same_matrix(tuple(change.shape), have)):
                raise IncompatibleDelta(
                    f"The delta's {name} has the shape {tuple(change.shape)} but the model has {have}: "
                    f"use it with the model it was made for ({made_for})."
                )


def same_matrix(change: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether the shapes agree; a 1x1 convolution and the linear layer that does the same count as equal."""

    def trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[:2] if shape[2:] == (1, 1) else shape

    return trimmed(change) == trimmed(weight)


def fitted(
    delta: Delta, keys: Mapping[str, str], weights: Mapping[str, Tensor], names: Mapping[str, str] | None = None
) -> Delta:
    """A delta that `check_fits`, such that a host applies all of it: each weight once, because of two names for one
    weight hosts take the last, and in the weight's shape, because ComfyUI adds no 1x1 convolution to a linear layer.

    Args:
        keys, weights: as for `check_fits`.
        names: what to call the change of a weight; without one it is called as the delta first calls it.
    """
    called = dict(names or {})
    layers: dict[str, LayerDelta] = {}
    for name, layer in delta.layers.items():
        own = called.setdefault(keys[name], name)
        shaped = _shaped(layer, weights[keys[name]].shape)
        layers[own] = add(own, layers[own], shaped) if own in layers else shaped
    return Delta(layers, delta.metadata)


def _shaped(layer: LayerDelta, shape: torch.Size) -> LayerDelta:
    weight = layer.weight
    if isinstance(weight, LowRank):
        weight = LowRank(weight.up, weight.down.reshape(-1, *shape[1:]))
    elif weight is not None:
        weight = weight.reshape(shape)
    return LayerDelta(weight, layer.bias)
