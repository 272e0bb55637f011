"""Models of the diffusers library: pipeline folders, hub ids and single files of the Stable Diffusion family.

Only the parts that the method needs are loaded (U-Net, text encoder, tokenizer, autoencoder, schedule); weights come
from safetensors only.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from diffusers.utils import is_accelerate_available
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel
from transformers import CLIPTokenizerFast as CLIPTokenizer  # transformers 4 has a slow one, which wants other files

from ..delta import EDITABLE
from ..denoiser import Conditioning, Denoiser, LatentCodec
from ..errors import AblationError
from ..precision import cpu_has_bf16, gradient_scale
from ..prompts import BUILT_IN, PromptSource, distinct, load_prompt_source
from ..token_rows import read_packed
from ..vocabulary import COMMON, Vocabulary
from .frozen import keep_little, speed_up_norms
from .single_file import fit_text_names, read_single_file

EMBEDDED_MODEL = Path(__file__).resolve().parents[2] / "assets" / "emoji_diffusion"
PRECISIONS = ("auto", "fp32", "bf16", "fp16")

_TOKEN_EMBEDDING = "text_encoders.{}.transformer.text_model.embeddings.token_embedding"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PROMPTS_FILE = "prompts.json"
_HINTS_FILE = "ablation_hints.json"
SD1_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


@dataclass(frozen=True)
class Parts:
    """The pieces of a Stable Diffusion model, however they were stored."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    vae: AutoencoderKL | AutoencoderTiny
    schedule: Mapping[str, Any]
    """Configuration of any diffusers scheduler: betas and prediction type are read from it."""


class DiffusersCodec(LatentCodec):
    """`AutoencoderKL` or `AutoencoderTiny`, with the scale that the U-Net was trained at.

    Args:
        vae: the autoencoder.
        autocast: compute type of the decoder, or None to compute in the type of its weights. On a processor that has
            bf16 it decodes four times as fast, and a picture differs by a third of a grey level on average.
    """

    def __init__(self, vae: AutoencoderKL | AutoencoderTiny, autocast: torch.dtype | None = None) -> None:
        self._vae = vae
        self._autocast = autocast
        if autocast is not None:
            speed_up_norms(vae.to(memory_format=torch.channels_last))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        encoded = self._vae.encode((images * 2 - 1).to(self._vae.dtype))
        latents = encoded.latent_dist.mode() if isinstance(self._vae, AutoencoderKL) else encoded.latents
        return latents.float() * self._vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = (latents / self._vae.config.scaling_factor).to(self._vae.dtype)
        with _computing(latents.device, self._autocast):
            images = self._vae.decode(latents.to(memory_format=torch.channels_last)).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)


class DiffusersDenoiser(Denoiser):
    """A Stable Diffusion U-Net of diffusers, epsilon or v prediction.

    Args:
        parts: the loaded modules.
        name: what to call the model.
        device: where it runs.
        autocast: compute type of the U-Net, or None to compute in the type of its weights.
    """

    def __init__(
        self,
        parts: Parts,
        name: str,
        device: torch.device,
        autocast: torch.dtype | None,
    ) -> None:
        super().__init__()
        taken, given = parts.unet.config.in_channels, parts.unet.config.out_channels
        if taken != given:
            raise AblationError(
                f"{name} takes {taken} channels and gives {given}: choose a Stable Diffusion base model, not an "
                "inpainting or other variant."
            )
        self.name = name
        self.device = device
        self.prompt_source = BUILT_IN
        self.network = parts.unet.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        compute = autocast or self.network.dtype
        keep_little(self.network, compute)
        if device.type == "cpu" and compute != torch.float32:
            speed_up_norms(self.network)
        self.text_network = parts.text_encoder.to(device).eval().requires_grad_(False)
        # a GPU decodes in fp32 fast enough, which every autoencoder bears
        decoding = autocast if device.type == "cpu" else None
        self.vae = DiffusersCodec(parts.vae.to(device).eval().requires_grad_(False), decoding)
        self.architecture = "sd2" if self.network.config.cross_attention_dim == 1024 else "sd1"
        size = self.network.config.sample_size
        self.latent_shape = (self.network.config.in_channels, size, size)
        self.layers = _editable_layers(self.network, self.text_network, self.architecture)
        self._tokenizer = parts.tokenizer
        self._autocast = autocast
        self.gradient_scale = gradient_scale(compute)
        self.prediction_type = predicts = parts.schedule.get("prediction_type", "epsilon")
        if predicts not in ("epsilon", "v_prediction"):
            raise AblationError(f"{name} predicts '{predicts}': only epsilon and v_prediction are supported.")
        alphas = DDPMScheduler.from_config(dict(parts.schedule)).alphas_cumprod.double()
        # zero terminal SNR would make the last sigma infinite; the clamp is a sigma of about 4,500
        alphas = alphas.clamp(min=5e-8)
        self.sigmas = ((1 - alphas) / alphas).sqrt().float()
        self._log_sigmas = self.sigmas.log().to(device)

    def denoise(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        scale = sigma.view(-1, 1, 1, 1)
        timestep = self._timestep(sigma)
        model_input = (x / (scale**2 + 1).sqrt()).to(memory_format=torch.channels_last)
        # under autocast each layer casts for itself; with fp16 weights a cast here would be on the gradients' way
        dtype = self.network.dtype if self._autocast is None else torch.float32
        with _computing(self.device, self._autocast):
            output = self.network(
                model_input.to(dtype), timestep, encoder_hidden_states=cond.context.to(dtype)
            ).sample.float()
        if self.prediction_type == "epsilon":
            return x - scale * output
        return x / (scale**2 + 1) - output * scale / (scale**2 + 1).sqrt()

    def setup(self) -> dict[str, Any]:
        compute = str(self._autocast or self.network.dtype).removeprefix("torch.")
        return {**super().setup(), "prediction": self.prediction_type, "compute": compute}

    @contextlib.contextmanager
    def checkpointed(self) -> Iterator[None]:
        self.network.enable_gradient_checkpointing()
        try:
            yield
        finally:
            self.network.disable_gradient_checkpointing()

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, truncation=True).input_ids

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        tokens = self._tokenizer(
            list(prompts),
            padding="max_length",
            max_length=min(self._tokenizer.model_max_length, self.text_network.config.max_position_embeddings),
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return Conditioning({"context": self.text_network(tokens.to(self.device))[0].float()})

    def _timestep(self, sigma: Tensor) -> Tensor:
        """The (fractional) timestep of each sigma: linear between the table's log sigmas, exact on the table."""
        log_sigma = sigma.log()
        high = torch.searchsorted(self._log_sigmas, log_sigma).clamp(1, len(self._log_sigmas) - 1)
        low_value, high_value = self._log_sigmas[high - 1], self._log_sigmas[high]
        timestep = high - 1 + ((log_sigma - low_value) / (high_value - low_value)).clamp(0, 1)
        nearest = timestep.round()
        # sigma passes through fp32, so a level of the table comes back a hair off its own index
        return torch.where((timestep - nearest).abs() < 1e-3, nearest, timestep).float()


def load_denoiser(
    model: str | Path | None = None,
    *,
    device: str | None = None,
    precision: str = "auto",
    prediction_type: str | None = None,
) -> DiffusersDenoiser:
    """Load a Stable Diffusion model (1.x or 2.x).

    Args:
        model: a diffusers pipeline folder, a single-file SD 1.x checkpoint (`.safetensors`), a hub id such as
            "stable-diffusion-v1-5/stable-diffusion-v1-5", or None for the embedded Emoji Diffusion.
        device: "cpu", "cuda", "cuda:1", "mps"; None takes a GPU if there is one.
        precision: "auto" computes in bf16 where the hardware has it, otherwise in fp32; "fp16" scales its gradients.
        prediction_type: "epsilon" or "v_prediction"; None takes what the model says.

    Raises:
        AblationError: the model is missing, damaged, of another architecture, or its folder lacks a part.
    """
    chosen = _device(device)
    weights, autocast = _precision(precision, chosen)
    path = EMBEDDED_MODEL if model is None else Path(model)
    parts = load_parts(path if model is None else model)
    if prediction_type is not None:
        parts = Parts(**{**vars(parts), "schedule": {**parts.schedule, "prediction_type": prediction_type}})
    # the plain method: diffusers own only adds a warning about modules that this U-Net does not have
    nn.Module.to(parts.unet, weights)
    name = path.stem if path.is_file() else path.name if path.is_dir() else str(model)
    denoiser = DiffusersDenoiser(parts, name, chosen, autocast)
    hints = load_hints(path)
    denoiser.prompt_source, denoiser.vocabulary = hints.prompt_source, hints.vocabulary
    denoiser.learning_rate_scale, denoiser.learning_rate_scales = hints.learning_rate_scale, hints.learning_rate_scales
    return denoiser


def load_parts(model: str | Path) -> Parts:
    """The modules of a model on the CPU, in the precision of its files or in fp32; see `load_denoiser`."""
    require_model(model)
    path = Path(model)
    return _from_single_file(path) if path.is_file() else _from_folder(str(model), path if path.is_dir() else None)


def require_model(model: str | Path | None) -> None:
    """Raise AblationError unless a model can be there: a file, a folder, or what may be a hub id; None is embedded."""
    if model is not None and not Path(model).exists() and not _HUB_ID.fullmatch(str(model)):
        raise AblationError(f"There is no model at {model}: give a diffusers folder, a .safetensors file or a hub id.")


@dataclass(frozen=True)
class ModelHints:
    """What a model's folder may say of it beside its weights."""

    prompt_source: PromptSource = BUILT_IN
    learning_rate_scale: float = 1.0
    learning_rate_scales: Mapping[str, float] = field(default_factory=dict)
    """Of subsets that want another one."""
    medium: str = "painting"
    """What its pictures mostly are: the natural anchor of a style."""
    categories: Mapping[str, str] = field(default_factory=dict)
    """What a concept is one of ("rooster": "bird"): the natural anchor of an instance."""
    styles: tuple[str, ...] = ()
    """Styles that it knows."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The concepts that the model knows; where its folder names none, those that most models know."""
        if not (self.categories or self.styles):
            return COMMON
        return Vocabulary(distinct((*self.categories, *self.categories.values())), self.styles)


def load_hints(path: Path) -> ModelHints:
    """What the folder `path` says of its model; what it does not say stays general.

    Raises:
        AblationError: one of the files is damaged.
    """
    prompts, hints = path / _PROMPTS_FILE, path / _HINTS_FILE
    source = load_prompt_source(prompts) if prompts.is_file() else BUILT_IN
    return _read_hints(hints, source) if hints.is_file() else ModelHints(source)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise AblationError(f"There is no device '{name}' here: choose cpu, or a GPU that PyTorch can use.") from error
    return device


def _read_hints(path: Path, source: PromptSource) -> ModelHints:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        categories = {str(name): str(category) for name, category in said.get("categories", {}).items()}
        medium, styles = str(said.get("medium", "painting")), tuple(map(str, said.get("styles", ())))
        scales = {str(name): float(scale) for name, scale in said.get("learning_rate_scales", {}).items()}
        return ModelHints(source, float(said["learning_rate_scale"]), scales, medium, categories, styles)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AblationError(f"{path} is damaged: get the model again, or delete that file.") from error


def _from_folder(location: str, folder: Path | None) -> Parts:
    try:
        index = _pipeline_class(location, folder)
        if index != "StableDiffusionPipeline":
            raise AblationError(f"{location} holds a {index}: only StableDiffusionPipeline (SD 1.x, 2.x) is supported.")
        options = {"use_safetensors": True, "local_files_only": folder is not None}
        # said here, or diffusers warns where it cannot have it
        light = {**options, "low_cpu_mem_usage": is_accelerate_available()}
        vae_class = AutoencoderTiny if _class_name(location, "vae") == "AutoencoderTiny" else AutoencoderKL
        parts = Parts(
            unet=UNet2DConditionModel.from_pretrained(location, subfolder="unet", **light),
            text_encoder=_text_encoder(location, folder, options).float(),
            tokenizer=CLIPTokenizer.from_pretrained(location, subfolder="tokenizer"),
            vae=vae_class.from_pretrained(location, subfolder="vae", **light).float(),
            schedule=DDPMScheduler.load_config(location, subfolder="scheduler"),
        )
        DDPMScheduler.from_config(dict(parts.schedule))
        # transformers makes an empty tokenizer of a folder without its files
        if len(parts.tokenizer) < parts.text_encoder.config.vocab_size:
            raise OSError("the tokenizer has fewer words than the text encoder")
        return parts
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        where = "check the folder" if folder is not None else "check the name and the network, or give a local folder"
        raise AblationError(f"Cannot load the model {location} ({reason}): {where}.") from error


def _text_encoder(location: str, folder: Path | None, options: Mapping[str, Any]) -> CLIPTextModel:
    """The text encoder of a local folder by our own reading: its tensors may be packed, and transformers 4 would leave
    those that transformers 5 named at random values, with no more than a warning.
    """
    weights = None if folder is None else folder / "text_encoder" / "model.safetensors"
    if weights is None or not weights.is_file():
        return CLIPTextModel.from_pretrained(location, subfolder="text_encoder", **options)
    model = CLIPTextModel(CLIPTextConfig.from_pretrained(location, subfolder="text_encoder"))
    tensors = read_packed(weights) or load_file(weights)
    names = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    missing, _ = model.load_state_dict(fit_text_names(names, model), strict=False)
    # transformers before 4.31 keeps these numbers, which follow from the configuration, among the weights
    missing = [name for name in missing if not name.endswith("position_ids")]
    if missing:
        raise KeyError(f"{missing[0]} is missing")
    return model


def _pipeline_class(location: str, folder: Path | None) -> str:
    from diffusers import DiffusionPipeline

    if folder is not None and not (folder / "model_index.json").is_file():
        raise AblationError(f"{folder} has no model_index.json: give the top folder of a diffusers pipeline.")
    return str(DiffusionPipeline.load_config(location)["_class_name"])


def _class_name(location: str, subfolder: str) -> str:
    return str(AutoencoderKL.load_config(location, subfolder=subfolder)["_class_name"])


def _from_single_file(path: Path) -> Parts:
    file = read_single_file(path)
    unet = UNet2DConditionModel(**file.unet_config)
    text_encoder = CLIPTextModel(CLIPTextConfig(**file.text_config))
    vae = (AutoencoderTiny if file.vae_class == "AutoencoderTiny" else AutoencoderKL)(**file.vae_config)
    for module, state in ((unet, file.unet), (text_encoder, fit_text_names(file.text, text_encoder)), (vae, file.vae)):
        module.load_state_dict(state)
    # the BPE vocabulary of CLIP-L, which every SD 1.x model uses, is in the embedded model
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED_MODEL, subfolder="tokenizer")
    return Parts(unet, text_encoder, tokenizer, vae, {**SD1_SCHEDULE, "prediction_type": file.prediction_type})


def _computing(device: torch.device, autocast: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if autocast is None else torch.autocast(device.type, autocast)


def _precision(precision: str, device: torch.device) -> tuple[torch.dtype, torch.dtype | None]:
    """(type of the U-Net's weights, autocast type) for a device."""
    if precision not in PRECISIONS:
        raise AblationError(f"There is no precision '{precision}': choose one of {', '.join(PRECISIONS)}.")
    if device.type == "cpu":
        fast = precision == "bf16" or (precision == "auto" and cpu_has_bf16())
        return torch.float32, torch.bfloat16 if fast else None
    if precision == "auto":
        # not fp16, whose range a large loss could leave
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp32":
        return torch.float32, None
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    # fp16 holds SD's weights exactly, and autocast brings them to the compute type
    return torch.float16, dtype


def _editable_layers(unet: nn.Module, text_encoder: nn.Module, architecture: str) -> dict[str, nn.Module]:
    layers = {
        "lora_unet_" + name.replace(".", "_"): module
        for name, module in unet.named_modules()
        if isinstance(module, EDITABLE) and getattr(module, "weight", None) is not None
    }
    for full_name, module in text_encoder.named_modules():
        # transformers 5 dropped the `text_model.` that LoRA names still carry
        name = full_name.removeprefix("text_model.")
        if name == "embeddings.token_embedding":
            layers[_TOKEN_EMBEDDING.format("clip_h" if architecture == "sd2" else "clip_l")] = module
        elif isinstance(module, EDITABLE) and not isinstance(module, nn.Embedding):
            layers["lora_te_text_model_" + name.replace(".", "_")] = module
    return layers
