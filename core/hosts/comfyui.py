"""ComfyUI's MODEL, CLIP and VAE as a `Denoiser`, and deltas as ComfyUI's own weight patches.

Loading, offloading, precision, model sampling and conditioning stay ComfyUI's business: this module asks its model
management for the weights and its model for D(x; sigma, c). ComfyUI is imported inside functions, so that the package
can be imported without it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..delta import Delta
from ..delta_file import to_tensors
from ..denoiser import Conditioning
from ..errors import AblationError
from ..precision import gradient_scale
from ..prompts import BUILT_IN, PromptSource
from ..vocabulary import COMMON, Vocabulary
from . import ldm_patcher
from .comfy_names import architecture_of, text_layers, unet_layers
from .described import described
from .ldm_patcher import (
    BATCH,
    PIXELS_PER_LATENT,
    TRAINING,
    PatcherCodec,
    PatcherDenoiser,
    autocast_dtype,
    check_fits,
    kept_for_backward,
    latent_edges,
    make_ordinary,
    native_size,
)

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

HINTS = "concept_ablation"
"""Key of `ModelPatcher.set_attachments` under which a loader of ours leaves `Hints`."""

_CONTEXT = "c_crossattn"


@dataclass(frozen=True)
class Hints:
    """What is known about a model beyond its weights."""

    name: str
    prompt_source: PromptSource
    learning_rate_scale: float
    size: int
    """Native edge of its images, in pixels."""
    vocabulary: Vocabulary = COMMON
    learning_rate_scales: Mapping[str, float] = field(default_factory=dict)


class ComfyDenoiser(PatcherDenoiser):
    """A Stable Diffusion U-Net in ComfyUI: 1.x, 2.x or XL, with whatever patches its MODEL and CLIP carry.

    Made by `opened`, and valid within its block only.
    """

    def __init__(
        self,
        model: ModelPatcher,
        clip: CLIP,
        vae: VAE | None,
        latent_size: tuple[int, int],
        memory: float,
    ) -> None:
        super().__init__()
        inner = model.model
        hints: Hints | None = model.get_attachment(HINTS)
        self.architecture = architecture_of(inner)
        self.name = hints.name if hints else type(inner.model_config).__name__
        self.network = inner.diffusion_model
        self.text_network = clip.cond_stage_model
        self.vae = PatcherCodec(vae, inner.latent_format, functools.partial(_load, model, clip, memory))
        self.layers = {**unet_layers(inner), **text_layers(clip.cond_stage_model)}
        self.sigmas = inner.model_sampling.sigmas.detach().float().cpu().clone()
        self.latent_shape = (inner.latent_format.latent_channels, *latent_size)
        self.prompt_source = hints.prompt_source if hints else BUILT_IN
        self.vocabulary = hints.vocabulary if hints else COMMON
        self.device = model.load_device
        self.prediction_type = _prediction_type(inner)
        self.learning_rate_scale = hints.learning_rate_scale if hints else 1.0
        self.learning_rate_scales = hints.learning_rate_scales if hints else {}
        compute = inner.manual_cast_dtype or inner.get_dtype()
        self.gradient_scale = gradient_scale(compute)
        self._inner = inner
        self._patchers = {"network": (model, "diffusion_model."), "text": (clip.patcher, "")}
        self._clip = clip
        self._options = _transformer_options(model)
        self._autocast = autocast_dtype(self.device, compute)

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

    def _beside(self) -> object:
        """What nodes can change beside the weights: LoRAs, patches of attention and blocks (FreeU), noise levels,
        prediction, Clip Skip.
        """
        kinds = [kind.__name__ for kind in type(self._inner.model_sampling).__mro__]
        patches = [patcher.patches for patcher, _ in self._patchers.values()]
        options = self._patchers["network"][0].model_options.get("transformer_options", {})
        return kinds, self.sigmas.tolist(), self._clip.layer_idx, described([*patches, options])

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        # as they were before LoRAs, of which ComfyUI puts some into the weights and keeps others beside them, by memory
        for name, tensor in super()._weights():
            part, _, key = name.partition(".")
            patcher, prefix = self._patchers[part]
            kept = patcher.backup.get(prefix + key)
            yield name, tensor if kept is None else kept.weight

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
            width=width * PIXELS_PER_LATENT,
            height=height * PIXELS_PER_LATENT,
        )
        tensors = {"context" if name == _CONTEXT else name: one.cond.to(self.device) for name, one in told.items()}
        return Conditioning({name: tensor.float() for name, tensor in tensors.items()})


@contextlib.contextmanager
def opened(
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE | None = None,
    *,
    width: int | None = None,
    height: int | None = None,
) -> Iterator[ComfyDenoiser]:
    """A denoiser of ComfyUI's objects, loaded, for the time of the block.

    ComfyUI executes nodes in inference mode, whose tensors no backward pass can use. Within the block that mode is off,
    and inference weights have been replaced by ordinary tensors in the same memory; their values are those of `model`
    and `clip` with all patches (LoRAs) that these carry, and stay so.

    Args:
        width, height: image size in pixels; None is the model's own.

    Raises:
        AblationError: the model is of no supported architecture, or the size is no multiple of 8.
    """
    latent_size = _latent_size(model, width, height)
    architecture_of(model.model)
    memory = model.model.memory_required([BATCH, model.model.latent_format.latent_channels, *latent_size])
    try:
        # leaving inference mode switches gradients on, which only training wants
        with torch.inference_mode(False), torch.no_grad():
            _load(model, clip, memory)
            with kept_for_backward(clip.cond_stage_model):
                yield ComfyDenoiser(model, clip, vae, latent_size, memory)
    finally:
        from comfy import model_management

        gc.collect()
        model_management.soft_empty_cache()


def require_trainable(model: ModelPatcher) -> None:
    """Raise AblationError if the model multiplies in fp8: such products have no gradients, and what trains computes
    something else than what is sampled with.
    """
    from comfy import model_management, ops

    for module in model.model.diffusion_model.modules():
        linear = isinstance(module, ops.CastWeightBiasOp) and type(module).__name__ == "Linear"
        scaled = getattr(module, "scale_input", None) is not None
        fast = isinstance(module, ops.fp8_ops.Linear) or (
            scaled and model_management.supports_fp8_compute(model.load_device)
        )
        if linear and (fast or not isinstance(module, torch.nn.Linear)):
            raise AblationError(
                "The model is loaded with fp8 matrix multiplication, which cannot be trained through: load it with "
                "weight_dtype default or fp8_e4m3fn, and ComfyUI without --fast."
            )


def patched(
    model: ModelPatcher, clip: CLIP, delta: Delta, strength_model: float = 1.0, strength_clip: float = 1.0
) -> tuple[ModelPatcher, CLIP]:
    """Clones of `model` and `clip` with the delta as weight patches, as stock Load LoRA makes them.

    Raises:
        IncompatibleDelta: a layer does not exist in the model, or has another shape there.
    """
    import comfy.sd

    tensors = to_tensors(fitted(model, clip, delta))
    return comfy.sd.load_lora_for_models(model, clip, tensors, strength_model, strength_clip)


def fitted(model: ModelPatcher, clip: CLIP, delta: Delta) -> Delta:
    """The delta under this package's names for the layers, each weight once and in its shape: LoRAs of other programs
    have other names, which merging cannot tell are the same layers.

    Raises:
        IncompatibleDelta: a layer does not exist in the model, or has another shape there.
    """
    import comfy.lora

    keys: dict[str, str] = comfy.lora.model_lora_keys_unet(model.model, {})
    keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
    weights = {**model.model.state_dict(), **clip.cond_stage_model.state_dict()}
    check_fits(delta, keys, weights, "connect the CLIP of its model")
    names = {keys[name]: name for name in (*unet_layers(model.model), *text_layers(clip.cond_stage_model))}
    return ldm_patcher.fitted(delta, keys, weights, names)


def _load(model: ModelPatcher, clip: CLIP, memory: float = 0) -> None:
    """Have ComfyUI bring both to their devices, then make of every inference tensor one that a backward pass can use.

    Called outside of inference mode.
    """
    from comfy import model_management

    model_management.load_models_gpu([model, clip.patcher], memory_required=TRAINING * memory)
    make_ordinary((*model.model.modules(), *clip.cond_stage_model.modules()))


def _latent_size(model: ModelPatcher, width: int | None, height: int | None) -> tuple[int, int]:
    """(height, width) of the latents."""
    hints: Hints | None = model.get_attachment(HINTS)
    inner = model.model
    native = hints.size if hints else native_size(architecture_of(inner), _prediction_type(inner))
    return latent_edges(width or native, height or native)


def _prediction_type(inner: Any) -> str:
    from comfy.model_base import ModelType

    return "v_prediction" if inner.model_type == ModelType.V_PREDICTION else "epsilon"


def _transformer_options(model: ModelPatcher) -> dict[str, Any]:
    """The model's own options, with an attention that has gradients unless the user chose one."""
    from comfy.ldm.modules.attention import attention_pytorch

    def with_gradients(_: Any, *args: Any, **kwargs: Any) -> Tensor:
        return attention_pytorch(*args, **kwargs)

    own = dict(model.model_options.get("transformer_options", {}))
    own.setdefault("optimized_attention_override", with_gradients)
    return own
