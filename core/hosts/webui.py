"""Stable Diffusion WebUI Forge's loaded model as a `Denoiser`, and deltas as Forge's own weight patches.

Loading, offloading, precision and conditioning stay Forge's business: this module asks its memory management for the
weights, its text engine for the conditioning and its model for D(x; sigma, c). Forge is imported inside functions, so
that the package can be imported without it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..delta import Delta
from ..delta_file import to_tensors
from ..denoiser import Conditioning
from ..errors import AblationError
from ..precision import gradient_scale
from ..prompts import BUILT_IN
from .ldm_patcher import (
    BATCH,
    PIXELS_PER_LATENT,
    TRAINING,
    PatcherCodec,
    PatcherDenoiser,
    autocast_dtype,
    check_fits,
    fitted,
    is_editable,
    kept_for_backward,
    make_ordinary,
    native_size,
    short_text_names,
    unet_layers,
)

if TYPE_CHECKING:
    from backend.diffusion_engine.base import ForgeDiffusionEngine, ForgeObjects
    from backend.patcher.clip import CLIP
    from backend.patcher.unet import UnetPatcher

_SAME_WEIGHT = ".token_embedding.wrapped.weight"


class ForgeDenoiser(PatcherDenoiser):
    """A Stable Diffusion U-Net in Forge: 1.x, 2.x or XL, with whatever patches its patchers carry.

    Made by `opened`, and valid within its block only.
    """

    def __init__(
        self,
        engine: ForgeDiffusionEngine,
        objects: ForgeObjects,
        latent_size: tuple[int, int],
        memory: float,
    ) -> None:
        super().__init__()
        unet, encoder = objects.unet, objects.clip.cond_stage_model
        inner = unet.model
        self.architecture = architecture_of(engine)
        self.name = model_name(engine)
        self.network = inner.diffusion_model
        self.text_network = encoder
        self._reload = functools.partial(_load, objects, memory)
        self.vae = PatcherCodec(objects.vae, objects.vae.first_stage_model, self._reload)
        self.layers = {**unet_layers(self.network, _to_ldm(self.network)), **text_layers(encoder)}
        self.sigmas = inner.predictor.sigmas.detach().float().cpu().clone()
        self.latent_shape = (objects.vae.latent_channels, *latent_size)
        self.prompt_source = BUILT_IN
        self.device = unet.load_device
        self.prediction_type = inner.predictor.prediction_type
        self.gradient_scale = gradient_scale(inner.computation_dtype)
        self._engine = engine
        self._objects = objects
        self._inner = inner
        self._options = _transformer_options(unet)
        self._autocast = autocast_dtype(self.device, inner.computation_dtype)

    def denoise(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        rows = list(range(len(sigma)))
        options = {
            **self._options,
            "sigmas": sigma,
            "cond_or_uncond": [0],
            "cond_mark": torch.zeros_like(sigma),
            "cond_indices": rows,
            "uncond_indices": [],
        }
        named = {"y": cond.tensors["y"]} if "y" in cond.tensors else {}
        with self._compute():
            return self._inner.apply_model(x, sigma, c_crossattn=cond.context, transformer_options=options, **named)

    def tokenize(self, text: str) -> list[int]:
        first = next(iter(vars(self._objects.clip.tokenizer).values()))
        return list(first(text, truncation=False, add_special_tokens=False)["input_ids"])

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning.cat(self._encode_one(prompt) for prompt in prompts)

    def _encode_one(self, prompt: str) -> Conditioning:
        """Conditioning of one prompt, with Forge's syntax for weights: what its own sampling would give the model."""
        from modules.prompt_parser import SdConditioning

        _, height, width = self.latent_shape
        lines = SdConditioning([prompt], width=width * PIXELS_PER_LATENT, height=height * PIXELS_PER_LATENT)
        # without Forge's decorator, which switches inference mode on again
        conditioning = inspect.unwrap(type(self._engine).get_learned_conditioning)
        told = conditioning(self._engine, lines)
        self._reload()
        named = {"context": told["crossattn"], "y": told["vector"]} if isinstance(told, dict) else {"context": told}
        return Conditioning({name: tensor.to(self.device).float() for name, tensor in named.items()})

    def _beside(self) -> object:
        """What Forge's settings change beside the weights: noise levels, prediction, Clip skip, emphasis, LoRAs that
        are added on the fly.
        """
        engines = [value for name, value in sorted(vars(self._engine).items()) if name.startswith("text_processing")]
        lines = [(engine.clip_skip, engine.emphasis.name) for engine in engines]
        patches = (*self._objects.unet.lora_patches, *self._objects.clip.patcher.lora_patches)
        online = [key for key in patches if key[3]]
        return self.prediction_type, self.sigmas.tolist(), lines, online

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in super()._weights():
            if not name.endswith(_SAME_WEIGHT):
                # Forge widens the embeddings when it first encodes a prompt, which is no other model
                yield name, tensor.float() if ".embeddings." in name else tensor


@contextlib.contextmanager
def opened(engine: ForgeDiffusionEngine, objects: ForgeObjects | None = None) -> Iterator[ForgeDenoiser]:
    """A denoiser of Forge's loaded model, for the time of the block. Nothing else may use the model meanwhile.

    Forge makes its weights in inference mode, whose tensors no backward pass can use; within the block they are
    ordinary tensors in the same memory. Their values are those of the checkpoint with all patches (LoRAs) that
    `objects` carry, and stay so.

    Args:
        engine: `shared.sd_model`.
        objects: the patchers to use; None is `engine.forge_objects_original`, which no prompt's LoRAs are part of.

    Raises:
        AblationError: the model is of no supported architecture or quantized.
    """
    from backend import memory_management

    objects = objects or engine.forge_objects_original
    architecture = architecture_of(engine)
    inner, encoder = objects.unet.model, objects.clip.cond_stage_model
    require_plain(inner)
    edge = native_size(architecture, inner.predictor.prediction_type) // PIXELS_PER_LATENT
    memory = inner.memory_required([BATCH, objects.vae.latent_channels, edge, edge])
    before = engine.forge_objects
    try:
        with torch.inference_mode(False), torch.no_grad(), contextlib.ExitStack() as stack:
            engine.forge_objects = objects  # the text encoder that `get_learned_conditioning` loads
            _load(objects, memory)
            stack.enter_context(_known_linears((inner.diffusion_model, encoder)))
            stack.enter_context(kept_for_backward(inner.diffusion_model))
            stack.enter_context(_online_patches_kept())
            yield ForgeDenoiser(engine, objects, (edge, edge), memory)
    finally:
        engine.forge_objects = before
        gc.collect()
        memory_management.soft_empty_cache()


def patched(
    unet: UnetPatcher, clip: CLIP, delta: Delta, strength: float = 1.0, name: str = "concept_ablation"
) -> tuple[UnetPatcher, CLIP]:
    """Clones of `unet` and `clip` with the delta as weight patches, as `<lora:…>` makes them.

    Args:
        name: what Forge tells these patches from others by; the same name and strength are taken for the same patches.

    Raises:
        IncompatibleDelta: a layer does not exist in the model, or has another shape there.
        AblationError: the model is quantized.
    """
    from backend.patcher.lora import load_lora, model_lora_keys_clip, model_lora_keys_unet

    require_plain(unet.model)
    # dictionaries of our own: Forge's default one is shared between all calls and models
    unet_keys = model_lora_keys_unet(unet.model, {})
    clip_keys = model_lora_keys_clip(clip.cond_stage_model, {})
    all_keys = {**unet_keys, **clip_keys}
    weights = {**unet.model.state_dict(), **clip.cond_stage_model.state_dict()}
    check_fits(
        delta,
        all_keys,
        weights,
        "Forge's LoRA loader has no place for an edit of the token embedding, so choose another subset",
    )
    tensors = to_tensors(fitted(delta, all_keys, weights))
    edited_unet, edited_clip = unet.clone(), clip.clone()
    for patcher, keys in ((edited_unet, unet_keys), (edited_clip, clip_keys)):
        patches, _ = load_lora(tensors, keys)
        if patches:
            # added to weights of 8 bits, nearly all of so small a change would be rounded away
            online = any(weights[key].element_size() == 1 for key in patches)
            patcher.add_patches(filename=name, patches=patches, strength_patch=strength, online_mode=online)
    return edited_unet, edited_clip


def architecture_of(engine: ForgeDiffusionEngine) -> str:
    """The architecture of Forge's model: "sd1", "sd2" or "sdxl".

    Raises:
        AblationError: another one, or a variant with further inputs (inpainting, the XL refiner).
    """
    from backend.diffusion_engine.sd15 import StableDiffusion
    from backend.diffusion_engine.sd20 import StableDiffusion2
    from backend.diffusion_engine.sdxl import StableDiffusionXL

    families = {StableDiffusion: "sd1", StableDiffusion2: "sd2", StableDiffusionXL: "sdxl"}
    found = families.get(type(engine))
    if found is None or engine.forge_objects.unet.model.diffusion_model.config.get("in_channels") != 4:
        raise AblationError(
            f"The loaded model is a {type(engine).__name__} for which this does not work: choose a Stable Diffusion "
            "1.x, 2.x or XL base checkpoint, not an inpainting, refiner or other variant."
        )
    return found


def model_name(engine: ForgeDiffusionEngine) -> str:
    """What to call the loaded model: its file's name."""
    return Path(getattr(engine, "filename", type(engine).__name__)).stem


def text_layers(encoder: nn.Module) -> dict[str, nn.Module]:
    """The text encoder's layers that Forge's LoRA loader has a name for, by that name."""
    from backend.patcher.lora import model_lora_keys_clip

    short = short_text_names(encoder, model_lora_keys_clip(encoder, {}))
    return {short[name]: module for name, module in encoder.named_modules() if name in short and is_editable(module)}


def require_plain(inner: nn.Module) -> None:
    """Raise AblationError if the weights are packed, so that their shape is not their layers'."""
    if not isinstance(inner.storage_dtype, torch.dtype):
        raise AblationError(
            f"The model is loaded in {inner.storage_dtype}: set 'Diffusion in Low Bits' at the top of the page to "
            "Automatic (a GGUF checkpoint cannot be used here)."
        )


def _load(objects: ForgeObjects, memory: float = 0) -> None:
    """Have Forge bring network and text encoder to their devices, then make ordinary tensors of inference tensors.

    Called outside of inference mode.
    """
    from backend import memory_management

    patchers = [objects.unet, objects.clip.patcher]
    memory_management.load_models_gpu(patchers, memory_required=TRAINING * memory)
    make_ordinary(module for patcher in patchers for module in patcher.model.modules())


def _to_ldm(network: nn.Module) -> Mapping[str, str]:
    from packages_3rdparty.comfyui_lora_collection.utils import unet_to_diffusers

    return unet_to_diffusers(network.config)


def _transformer_options(unet: UnetPatcher) -> dict[str, Any]:
    """The model's own options, with an attention that has gradients wherever nobody put another one."""
    from backend.attention import attention_pytorch

    def with_gradients(q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> Tensor:
        return attention_pytorch(q, k, v, options["n_heads"])

    network = unet.model.diffusion_model
    places = [("middle", 0)]
    places += [("input", index) for index in range(len(network.input_blocks))]
    places += [("output", index) for index in range(len(network.output_blocks))]
    own = dict(unet.model_options.get("transformer_options", {}))
    replaced = own.get("patches_replace", {})
    own["patches_replace"] = {
        **replaced,
        **{name: {**dict.fromkeys(places, with_gradients), **replaced.get(name, {})} for name in ("attn1", "attn2")},
    }
    return own


# --- Forge's layers ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _known_linears(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block, Forge's linear layers, which are no `nn.Linear`, also are that, so that deltas know them."""
    linears = [
        module
        for part in parts
        for module in part.modules()
        if type(module).__name__ == "Linear" and not isinstance(module, nn.Linear)
    ]
    classes = [type(module) for module in linears]
    try:
        for module, own in zip(linears, classes, strict=True):
            module.__class__ = _also_linear(own)
        yield
    finally:
        for module, own in zip(linears, classes, strict=True):
            module.__class__ = own


@functools.cache
def _also_linear(own: type[nn.Module]) -> type[nn.Module]:
    return type(own.__name__, (own, nn.Linear), {})


@contextlib.contextmanager
def _online_patches_kept() -> Iterator[None]:
    """Within the block, weights that Forge patches anew in every forward pass can be saved for a backward pass."""
    from backend import operations

    merge = operations.merge_lora_to_weight

    def ordinary(*args: Any, **kwargs: Any) -> Tensor:
        return merge(*args, **kwargs).clone()

    operations.merge_lora_to_weight = ordinary
    try:
        yield
    finally:
        operations.merge_lora_to_weight = merge
