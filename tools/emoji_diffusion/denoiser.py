"""Stage 2: the text encoder and the U-Net, trained together to predict noise from latents and captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from captions import caption
from compute import fast_forward
from convolution import speed_up
from diffusers import DDPMScheduler, UNet2DConditionModel
from latents import Latents
from memorized import SHARE, drawn
from pictures import Pictures
from settings import Settings
from stage import Budget, Loss, Stage, train
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from concept_ablation.core.hosts.diffusers import EMBEDDED_MODEL, SD1_SCHEDULE
from concept_ablation.core.hosts.frozen import speed_up_norms

SCHEDULE = {**SD1_SCHEDULE, "prediction_type": "epsilon"}
_MIN_SNR = 5.0


class TextToLatent(nn.Module):
    """Text encoder and U-Net as one model, and how often its captions have had each token."""

    def __init__(self, settings: Settings, sample_size: int, latent_channels: int) -> None:
        super().__init__()
        # CLIP's vocabulary and special tokens, padded with the end token as SD 1.x does
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=settings.text_width,
                intermediate_size=4 * settings.text_width,
                projection_dim=settings.text_width,
                num_hidden_layers=settings.text_layers,
                num_attention_heads=settings.heads,
                max_position_embeddings=77,
                bos_token_id=49406,
                eos_token_id=49407,
                pad_token_id=49407,
            )
        )
        inner = len(settings.channels) - 1
        self.unet = UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=latent_channels,
            out_channels=latent_channels,
            block_out_channels=settings.channels,
            layers_per_block=1,
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * inner),
            up_block_types=(*("CrossAttnUpBlock2D",) * inner, "UpBlock2D"),
            cross_attention_dim=settings.text_width,
            attention_head_dim=settings.heads,
        )
        self.register_buffer("seen", torch.zeros(49408, dtype=torch.int64))

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """Predicted noise, like `latents` [B, C, h, w], for captions [B, 77]."""
        if self.training:
            self.seen += torch.bincount(tokens.flatten(), minlength=len(self.seen))
        context = self.text_encoder(tokens)[0]
        return self.unet(latents, timesteps, encoder_hidden_states=context).sample


def build(settings: Settings, latents: Latents) -> TextToLatent:
    """An untrained model for such latents, the same for the same seed."""
    torch.manual_seed(settings.seed)
    channels, size = latents.values.shape[1:3]
    return speed_up_norms(speed_up(TextToLatent(settings, size, channels))).to(memory_format=torch.channels_last)


def train_denoiser(
    pictures: Pictures, latents: Latents, settings: Settings, folder: Path, budget: Budget
) -> TextToLatent:
    """The trained model (moving average)."""
    loss = noise_loss(pictures, latents, settings)
    return train(
        Stage("denoiser", build(settings, latents), loss, settings.denoiser_optimization, settings.seed), folder, budget
    )


def noise_loss(pictures: Pictures, latents: Latents, settings: Settings) -> Loss:
    """Mean squared error of the noise, weighted by min(SNR, 5) / SNR (Hang et al. 2023, "Min-SNR Weighting").

    Timesteps are drawn as often as they weigh instead, each batch evenly over the distribution: the same gradient on
    average, with less noise.
    """
    scenes, _ = drawn(settings.scenes, pictures, 8)
    tokenize = tokenizer()
    alphas = DDPMScheduler(**SCHEDULE).alphas_cumprod
    snr = alphas / (1 - alphas)
    importance = snr.clamp(max=_MIN_SNR) / snr
    cumulative = importance.cumsum(0) / importance.sum()
    batch = settings.denoiser_optimization.batch
    memorized = min(batch - 1, max(1, round(SHARE * batch))) if scenes else 0

    def loss(model: nn.Module, rng: Generator) -> Tensor:
        rows = torch.randint(len(latents.values), (batch - memorized,), generator=rng)
        texts = [caption(latents.subject(pictures, row), rng).text for row in rows.tolist()]
        clean = latents.values[rows]
        if memorized:
            which = torch.randint(len(scenes), (memorized,), generator=rng)
            texts += [scenes[index].caption for index in which.tolist()]
            clean = torch.cat((clean, latents.scenes[which]))
        clean = clean.float() * latents.scale
        place = (torch.randperm(batch, generator=rng) + torch.rand(batch, generator=rng)) / batch
        timesteps = torch.searchsorted(cumulative, place).clamp(max=len(alphas) - 1)
        noise = torch.randn(clean.shape, generator=rng)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).to(memory_format=torch.channels_last)
        with fast_forward():
            predicted = model(noisy, timesteps, encode_texts(tokenize, texts))
        return F.mse_loss(predicted.float(), noise)

    return loss


def tokenizer() -> CLIPTokenizer:
    """CLIP's, as the package ships it."""
    return CLIPTokenizer.from_pretrained(EMBEDDED_MODEL, subfolder="tokenizer")


def encode_texts(tokenize: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids [B, 77]."""
    return tokenize(list(texts), padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
