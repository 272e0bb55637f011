"""ComfyUI's MODEL, CLIP and VAE as a `Denoiser`, and deltas as ComfyUI's own weight patches.

Loading, offloading, precision, model sampling and conditioning stay ComfyUI's business: this module asks its model
management for the weights and its model for D(x; sigma, c). ComfyUI is imported inside functions, so that the package
can be imported without it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..delta import Delta
from ..delta_file import to_tensors
from ..denoiser import Conditioning, Denoiser, LatentCodec
from ..errors import AblationError
from ..prompts import BUILT_IN, PromptSource
from .comfy_names import architecture_of, check_fits, text_layers, unet_layers

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

HINTS = "concept_ablation"
"""Key of `ModelPatcher.set_attachments` under which a loader of ours leaves `Hints`."""

_CONTEXT = "c_crossattn"
_FP16_GRADIENT_SCALE = 1024.0
_PIXELS_PER_LATENT = 8
_CHECKPOINTED = ("ResBlock", "SpatialTransformer")
_UNUSED = (".logit_scale", "clip_l.transformer.text_projection.weight", "clip_h.transformer.text_projection.weight")
# What ComfyUI is asked to keep free: its own estimate for images of this batch, and what a backward pass adds.
_BATCH, _TRAINING = 16, 3


@dataclass(frozen=True)
class Hints:
    """What is known about a model beyond its weights."""

    name: str
    prompt_source: PromptSource
    learning_rate_scale: float
    size: int
    """Native edge of its images, in pixels."""


class ComfyCodec(LatentCodec):
    """ComfyUI's VAE, in the latent scale of the network.

    Args:
        vae: None where the node has no VAE; decoding then says so.
        latent_format: the model's.
        reload: brings the network back to its device, from which ComfyUI may have moved it to make room.
    """

    def __init__(self, vae: VAE | None, latent_format: Any, reload: Callable[[], None]) -> None:
        self._vae = vae
        self._format = latent_format
        self._reload = reload

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        latents = self._require().encode(images.permute(0, 2, 3, 1))
        self._reload()
        return self._format.process_in(latents.float())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        images = self._require().decode(self._format.process_out(latents))
        self._reload()
        return images.float().permute(0, 3, 1, 2).clamp(0, 1)

    def _require(self) -> VAE:
        if self._vae is None:
            raise AblationError("Images need a VAE to be decoded: connect one to this node.")
        return self._vae


class ComfyDenoiser(Denoiser):
    """A Stable Diffusion U-Net in ComfyUI: 1.x, 2.x or XL, with whatever patches its MODEL and CLIP carry.

    Made by `opened`, and valid within its block only.
    """

    def __init__(
        self, model: ModelPatcher, clip: CLIP, vae: VAE | None, latent_size: tuple[int, int], precision: str
    ) -> None:
        super().__init__()
        inner = model.model
        hints: Hints | None = model.get_attachment(HINTS)
        self.architecture = architecture_of(inner)
        self.name = hints.name if hints else type(inner.model_config).__name__
        self.network = inner.diffusion_model
        self.text_network = clip.cond_stage_model
        self.vae = ComfyCodec(vae, inner.latent_format, functools.partial(_load, model, clip))
        self.layers = {**unet_layers(inner), **text_layers(clip.cond_stage_model)}
        self.sigmas = inner.model_sampling.sigmas.detach().float().cpu().clone()
        self.latent_shape = (inner.latent_format.latent_channels, *latent_size)
        self.prompt_source = hints.prompt_source if hints else BUILT_IN
        self.device = model.load_device
        self.learning_rate_scale = hints.learning_rate_scale if hints else 1.0
        compute = inner.manual_cast_dtype or inner.get_dtype()
        self.gradient_scale = _FP16_GRADIENT_SCALE if compute == torch.float16 else 1.0
        self._inner = inner
        self._clip = clip
        self._options = _transformer_options(model)
        self._autocast = _autocast(self.device, compute, precision)
        self._fingerprint: str | None = None

    def denoise(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        named = {_CONTEXT if name == "context" else name: tensor for name, tensor in cond.tensors.items()}
        options = {**self._options, "sigmas": sigma, "cond_or_uncond": [0]}
        with self._compute():
            return self._inner.apply_model(x, sigma, transformer_options=options, **named)

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return self._inner.model_sampling.noise_scaling(sigma.view(-1, 1, 1, 1), noise, x0)

    def tokenize(self, text: str) -> list[int]:
        tokenizer = self._clip.tokenizer
        own = getattr(tokenizer, "clip_l", None) or getattr(tokenizer, tokenizer.clip)
        return list(own.tokenizer(text, add_special_tokens=False)["input_ids"])

    def fingerprint(self) -> str:
        """As for every model, and of what nodes can change beside the weights: noise levels, prediction, Clip Skip."""
        # read from the device, which for gigabytes takes seconds
        if self._fingerprint is None:
            sampling = self._inner.model_sampling
            kinds = [kind.__name__ for kind in type(sampling).__mro__]
            beside = (kinds, self.sigmas.tolist(), self._clip.layer_idx)
            self._fingerprint = hashlib.sha256(f"{super().fingerprint()} {beside}".encode()).hexdigest()
        return self._fingerprint

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        # most checkpoints lack these, ComfyUI then leaves chance in them, and no network here is told what they give
        return ((name, tensor) for name, tensor in super()._weights() if not name.endswith(_UNUSED))

    @contextlib.contextmanager
    def checkpointed(self) -> Iterator[None]:
        blocks = [module for module in self.network.modules() if type(module).__name__ in _CHECKPOINTED]
        for block in blocks:
            block.forward = functools.partial(_checkpoint, block.forward)
        try:
            yield
        finally:
            for block in blocks:
                # the class has the method; only the instance's stand-in goes
                del block.forward

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning.cat(self._encode_one(prompt) for prompt in prompts)

    def _encode_one(self, prompt: str) -> Conditioning:
        """Conditioning of one prompt, with ComfyUI's syntax for weights: what stock sampling would give the model."""
        encoder = self._clip.cond_stage_model
        encoder.reset_clip_options()
        if self._clip.layer_idx is not None:
            encoder.set_clip_options({"layer": self._clip.layer_idx})
        context, pooled, *_ = encoder.encode_token_weights(self._clip.tokenize(prompt))
        channels, height, width = self.latent_shape
        told = self._inner.extra_conds(
            cross_attn=context,
            pooled_output=pooled,
            noise=torch.zeros(1, channels, height, width),
            device=self.device,
            width=width * _PIXELS_PER_LATENT,
            height=height * _PIXELS_PER_LATENT,
        )
        tensors = {"context" if name == _CONTEXT else name: one.cond.to(self.device) for name, one in told.items()}
        return Conditioning({name: tensor.float() for name, tensor in tensors.items()})

    def _compute(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self._autocast)


@contextlib.contextmanager
def opened(
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE | None = None,
    *,
    width: int | None = None,
    height: int | None = None,
    precision: str = "auto",
) -> Iterator[ComfyDenoiser]:
    """A denoiser of ComfyUI's objects, loaded, for the time of the block.

    ComfyUI executes nodes in inference mode, whose tensors no backward pass can use. Within the block that mode is off,
    and inference weights have been replaced by ordinary tensors in the same memory; their values are those of `model`
    and `clip` with all patches (LoRAs) that these carry, and stay so.

    Args:
        width, height: image size in pixels; None is the model's own.
        precision: "auto" computes in bf16 where weights are fp32 and the hardware is fast at it; "fp32" does not.

    Raises:
        AblationError: the model is of no supported architecture, or the size is no multiple of 8.
    """
    latent_size = _latent_size(model, width, height)
    architecture_of(model.model)
    memory = model.model.memory_required([_BATCH, model.model.latent_format.latent_channels, *latent_size])
    try:
        # leaving inference mode switches gradients on, which only training wants
        with torch.inference_mode(False), torch.no_grad():
            _load(model, clip, memory)
            with _kept_for_backward(clip.cond_stage_model):
                yield ComfyDenoiser(model, clip, vae, latent_size, precision)
    finally:
        from comfy import model_management

        gc.collect()
        model_management.soft_empty_cache()


def patched(
    model: ModelPatcher, clip: CLIP | None, delta: Delta, strength_model: float = 1.0, strength_clip: float = 1.0
) -> tuple[ModelPatcher, CLIP | None]:
    """Clones of `model` and `clip` with the delta as weight patches, as stock Load LoRA makes them.

    Raises:
        IncompatibleDelta: a layer does not exist in the model, or has another shape there.
    """
    import comfy.lora
    import comfy.sd

    keys: dict[str, str] = comfy.lora.model_lora_keys_unet(model.model, {})
    weights = dict(model.model.state_dict())
    if clip is not None:
        keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
        weights |= clip.cond_stage_model.state_dict()
    check_fits(delta, keys, weights)
    return comfy.sd.load_lora_for_models(model, clip, to_tensors(delta), strength_model, strength_clip)


def _load(model: ModelPatcher, clip: CLIP, memory: float = 0) -> None:
    """Have ComfyUI bring both to their devices, then make of every inference tensor one that a backward pass can use.

    Called outside of inference mode.
    """
    from comfy import model_management

    model_management.load_models_gpu([model, clip.patcher], memory_required=_TRAINING * memory)
    for module in (*model.model.modules(), *clip.cond_stage_model.modules()):
        for name, parameter in module._parameters.items():
            if _is_inference(parameter):
                module._parameters[name] = nn.Parameter(_same_memory(parameter), requires_grad=False)
        for name, buffer in module._buffers.items():
            if _is_inference(buffer):
                module._buffers[name] = _same_memory(buffer)


def _is_inference(tensor: Tensor | None) -> bool:
    # subclasses are packed weights, which layers unpack into tensors of their own
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_inference()


def _same_memory(tensor: Tensor) -> Tensor:
    """The tensor without its inference flag. Not a copy: ComfyUI keeps account of memory that it pinned."""
    plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


@contextlib.contextmanager
def _kept_for_backward(encoder: nn.Module) -> Iterator[None]:
    """Within the block, norms of the text encoder work on a copy: ComfyUI adds to their input in place afterwards,
    which a backward pass through them does not survive.
    """

    def copy(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (inputs[0].clone(), *inputs[1:]) if torch.is_grad_enabled() else None

    norms = [module for module in encoder.modules() if isinstance(module, nn.LayerNorm)]
    handles = [module.register_forward_pre_hook(copy) for module in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _checkpoint(forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
    # ComfyUI notes in transformer_options where it is, which must read the same when the block runs again
    kept = [dict(value) if isinstance(value, dict) else value for value in inputs]
    return checkpoint(forward, *kept, use_reentrant=False)


def _latent_size(model: ModelPatcher, width: int | None, height: int | None) -> tuple[int, int]:
    """(height, width) of the latents."""
    hints: Hints | None = model.get_attachment(HINTS)
    native = hints.size if hints else _native_size(model.model)
    size = (height or native, width or native)
    if any(edge % _PIXELS_PER_LATENT for edge in size):
        raise AblationError(f"Images of {size[1]} x {size[0]} cannot be drawn: choose multiples of 8.")
    return size[0] // _PIXELS_PER_LATENT, size[1] // _PIXELS_PER_LATENT


def _native_size(inner: Any) -> int:
    from comfy.model_base import ModelType

    architecture = architecture_of(inner)
    if architecture == "sdxl":
        return 1024
    return 768 if architecture == "sd2" and inner.model_type == ModelType.V_PREDICTION else 512


def _transformer_options(model: ModelPatcher) -> dict[str, Any]:
    """The model's own options, with an attention that has gradients unless the user chose one."""
    from comfy.ldm.modules.attention import attention_pytorch

    def with_gradients(_: Any, *args: Any, **kwargs: Any) -> Tensor:
        return attention_pytorch(*args, **kwargs)

    own = dict(model.model_options.get("transformer_options", {}))
    own.setdefault("optimized_attention_override", with_gradients)
    return own


def _autocast(device: torch.device, compute: torch.dtype, precision: str) -> torch.dtype | None:
    if precision not in ("auto", "fp32"):
        raise AblationError(f"There is no precision '{precision}': choose auto or fp32.")
    if precision == "fp32" or compute != torch.float32:
        return None
    if device.type == "cpu":
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else None
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
