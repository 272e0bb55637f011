"""The contract between the method and whatever model it works on.

A `Denoiser` is a text-to-image model seen as D(x; sigma, c) -> x0 in the k-diffusion / EDM convention, together with
its text encoder, its latent codec and the layers that a delta may edit. The modules in `hosts/` implement it;
everything else in `core/` speaks only this and never asks which model or which program is behind it.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .prompts import PromptSource
from .vocabulary import COMMON, Vocabulary


@dataclass(frozen=True)
class Conditioning:
    """What the network is told about a batch of prompts: named tensors, each with the batch first.

    `context` [B, tokens, width] is always there; a model may add others (`pooled` [B, width], …).
    """

    tensors: Mapping[str, Tensor]

    @property
    def context(self) -> Tensor:
        """Token embeddings for cross-attention, [B, tokens, width]."""
        return self.tensors["context"]

    def __len__(self) -> int:
        return self.context.shape[0]

    def __getitem__(self, index: Tensor | slice | list[int]) -> Conditioning:
        return Conditioning({name: tensor[index] for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(parts: Iterable[Conditioning]) -> Conditioning:
        """All rows together. Where numbers of tokens differ, contexts are repeated up to their least common multiple:
        attention over keys that all occur twice is attention over each once.
        """
        parts = list(parts)
        tokens = math.lcm(*{part.context.shape[1] for part in parts})
        joined = {name: [part.tensors[name] for part in parts] for name in parts[0].tensors}
        joined["context"] = [context.repeat(1, tokens // context.shape[1], 1) for context in joined["context"]]
        return Conditioning({name: torch.cat(tensors) for name, tensors in joined.items()})


class LatentCodec(ABC):
    """The autoencoder, in the latent scale that the network works in."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> latents [B, C, h, w]."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> images [B, 3, H, W] in [0, 1]."""


class Denoiser(ABC):
    """A model that removes noise, as the rest of the package sees it.

    Attributes:
        architecture: "sd1", "sd2", … : the family whose layer names `layers` uses.
        name: what to call the model in reports.
        network: the denoising network. Deltas hook its layers; nothing writes its weights.
        text_network: the text encoder, or None where a host does not give it.
        vae: the latent codec.
        layers: every layer that a delta may edit, by the name that LoRA files use for it (`lora_unet_…`,
            `lora_te_…`), so that a delta fits the same model in every host.
        sigmas: the noise levels that the model was trained on, ascending, [T]. "t uniform" means a uniform index.
        latent_shape: (channels, height, width) of the latent of the model's native image size.
        prompt_source: the prompt templates that suit this model.
        vocabulary: concepts that it knows, to choose from what to preserve.
        device: where latents and conditioning belong.
        prediction_type: what the network itself predicts, "epsilon" or "v_prediction".
        learning_rate_scale: what the learning rates of Stable Diffusion 1.x are multiplied by for this model.
        learning_rate_scales: the same for subsets that want another factor, by name.
        gradient_scale: what a loss is multiplied by before the backward pass and gradients are divided by after it.
            Above 1 where the network computes in fp16, whose smallest numbers would swallow a gradient.
    """

    architecture: str
    name: str
    network: nn.Module
    text_network: nn.Module | None
    vae: LatentCodec
    layers: Mapping[str, nn.Module]
    sigmas: Tensor
    latent_shape: tuple[int, int, int]
    prompt_source: PromptSource
    device: torch.device
    vocabulary: Vocabulary = COMMON
    prediction_type: str = "epsilon"
    learning_rate_scale: float = 1.0
    learning_rate_scales: Mapping[str, float] = MappingProxyType({})
    gradient_scale: float = 1.0

    def __init__(self) -> None:
        self._prompt_cache: dict[str, Conditioning] = {}
        self.text_edits = 0
        """How many deltas are attached to layers of the text encoder; prompts are not cached while there are any."""

    @abstractmethod
    def denoise(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The model's estimate of x0.

        Args:
            x: noisy latents [B, C, h, w] as `add_noise` makes them.
            sigma: noise level of each, [B].
            cond: conditioning of batch B.
        """

    @abstractmethod
    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        """Run the text encoder on prompts, with gradients if they are enabled."""

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`, without the start, end and padding tokens."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of `prompts`, one row each. Each distinct prompt is encoded once as long as the text encoder
        is unedited; with gradients enabled or a delta on the text encoder, every call encodes afresh.
        """
        if self.text_edits or torch.is_grad_enabled():
            return self._encode(prompts)
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._prompt_cache]
        for start in range(0, len(missing), 32):
            chunk = missing[start : start + 32]
            encoded = self._encode(chunk)
            for row, prompt in enumerate(chunk):
                self._prompt_cache[prompt] = encoded[row : row + 1]
        return Conditioning.cat(self._prompt_cache[prompt] for prompt in prompts)

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """x_t = x0 + sigma n, the k-diffusion form of x_t = sqrt(alpha) x0 + sqrt(1 - alpha) n.

        Rectified-flow hosts override it with their own interpolation.
        """
        return x0 + sigma.view(-1, 1, 1, 1) * noise

    def direction(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """d = (x - D) / sigma: the predicted noise of an epsilon or v model, the velocity of a rectified flow."""
        return (x - self.denoise(x, sigma, cond)) / sigma.view(-1, 1, 1, 1)

    def checkpointed(self) -> contextlib.AbstractContextManager[None]:
        """Within the block, activations are computed again in the backward pass instead of being kept: less memory,
        about a third more time. Without effect on a model that has no way to do so.
        """
        return contextlib.nullcontext()

    def fingerprint(self) -> str:
        """SHA-256 over the names, shapes and bytes of the network's and the text encoder's weights, in hexadecimal."""
        digest = hashlib.sha256()
        for name, tensor in self._weights():
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            # reshape before view: a 0-d tensor cannot be viewed as bytes
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(raw.numpy().tobytes())
        return digest.hexdigest()

    def setup(self) -> dict[str, Any]:
        """What decides beside the weights what is drawn, as JSON has it: a dataset of one setup is not gone on with in
        another.
        """
        sigmas = hashlib.sha256(self.sigmas.numpy().tobytes()).hexdigest()
        return {"latent_shape": list(self.latent_shape), "sigmas": sigmas}

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """What the fingerprint covers, in an order of its own. Hosts leave out what has no effect."""
        for part, module in (("network", self.network), ("text", self.text_network)):
            if module is not None:
                for name, tensor in sorted(module.state_dict().items()):
                    yield f"{part}.{name}", tensor


def true_direction(x: Tensor, sigma: Tensor, x0: Tensor) -> Tensor:
    """The d that a perfect denoiser would give: the noise for epsilon and v models, noise - x0 for flows."""
    return (x - x0) / sigma.view(-1, 1, 1, 1)
