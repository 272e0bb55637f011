"""One training step on a model of Stable Diffusion 1.5's size, as the authors' program does it and as this one does.

Run by speed.py, one process for each case, so that peak memory is that of the case alone:

    python benchmarks/speed_reference.py CASE --batch 1 --steps 3

`reference` follows the loop of the authors' `diffusers/train.py` (https://github.com/nupurkmr9/concept-ablation,
parameter group cross-attn, model-based loss): pictures through the autoencoder, both captions through the text encoder,
the network once for the target and once, without gradients, for the anchor, AdamW on the keys and values. Attention is
memory-efficient, as with the xFormers option that its README recommends; `reference-plain-attention` computes whole
score matrices, as without it. `ours` trains the same layers on harvested rows, `ours-checkpointing` saves memory in
addition; `ours-up` and `ours-up-checkpointing` train those of the middle and the way up (subset cross-attn-up).

All have the same modules loaded, in bf16: the U-Net (860 M weights), the autoencoder, CLIP-L's text encoder. Weights
are random, which time and memory do not mind. Prints JSON: seconds of each step after a first one for warming up, and
memory in GB: of the process (on a GPU: allocated there), when the models are loaded and at most.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel
from transformers import CLIPTokenizerFast as CLIPTokenizer

from concept_ablation.core.concept import Concept
from concept_ablation.core.dataset import Plan
from concept_ablation.core.harvest import Harvest, HarvestSettings
from concept_ablation.core.harvest_training import train_harvested
from concept_ablation.core.hosts.diffusers import EMBEDDED_MODEL, SD1_SCHEDULE, DiffusersDenoiser, Parts
from concept_ablation.core.progress import Progress
from concept_ablation.core.samplers import SampleSettings
from concept_ablation.core.trainer import TrainSettings

CASES = ("reference", "reference-plain-attention", "ours", "ours-checkpointing", "ours-up", "ours-up-checkpointing")
RATE = 1e-6


@dataclass(frozen=True)
class Size:
    """Layout of the random model.

    Attributes:
        latent: side of a latent; pictures are 8 times as large.
        unet, vae, text: what their configurations have other than Stable Diffusion 1.5.
    """

    latent: int = 64
    unet: tuple[int, ...] = (320, 640, 1280, 1280)
    vae: tuple[int, ...] = (128, 256, 512, 512)
    text: int = 768


SIZES = {"sd15": Size(), "tiny": Size(8, (64, 64, 64, 64), (32, 32, 32, 32), 64)}


@dataclass(frozen=True)
class Models:
    """The three networks, in bf16."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text: CLIPTextModel


def build(size: Size, device: torch.device) -> Models:
    """Random models; no copy in a higher precision is made on the way, which would be the peak of memory."""
    heads = size.text // 64 or 1
    text = CLIPTextConfig(
        hidden_size=size.text,
        intermediate_size=4 * size.text,
        num_hidden_layers=12,
        num_attention_heads=heads,
        projection_dim=size.text,
    )
    with default_dtype(torch.bfloat16):
        models = Models(
            UNet2DConditionModel(
                sample_size=size.latent,
                block_out_channels=size.unet,
                cross_attention_dim=size.text,
                attention_head_dim=8,
            ),
            AutoencoderKL(
                sample_size=8 * size.latent,
                block_out_channels=size.vae,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=4,
            ),
            CLIPTextModel(text),
        )
    for module in vars(models).values():
        nn.Module.to(module, device, torch.bfloat16).eval().requires_grad_(False)
    return models


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within the block new weights are of `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def reference(models: Models, size: Size, batch: int, steps: int, plain_attention: bool) -> list[float]:
    """Seconds of each step of the authors' loop."""
    unet, vae, text = models.unet, models.vae, models.text
    device = unet.device
    if plain_attention:
        unet.set_attn_processor(AttnProcessor())
    trained = [p for name, p in unet.named_parameters() if "attn2.to_k" in name or "attn2.to_v" in name]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    scheduler = DDPMScheduler(**SD1_SCHEDULE)
    words = text.config.max_position_embeddings
    pictures = torch.rand(batch, 3, 8 * size.latent, 8 * size.latent, device=device) * 2 - 1
    target, anchor = torch.randint(text.config.vocab_size, (2, batch, words), device=device)

    def step() -> None:
        latents = vae.encode(pictures.to(vae.dtype)).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch,), device=device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        captions = text(target)[0], text(anchor)[0]
        student = unet(noisy, timesteps, captions[0]).sample
        with torch.no_grad():
            teacher = unet(noisy, timesteps, captions[1]).sample
        F.mse_loss(student.float(), teacher.float()).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    marks = [_now(device)]
    for _ in range(steps):
        step()
        marks.append(_now(device))
    return _gaps(marks)


def ours(models: Models, size: Size, batch: int, steps: int, subset: str, checkpointing: bool) -> list[float]:
    """Seconds of each step of training on harvested rows, the first with what comes before it."""
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED_MODEL, subfolder="tokenizer")
    parts = Parts(models.unet, models.text, tokenizer, models.vae, SD1_SCHEDULE)
    denoiser = DiffusersDenoiser(parts, "random", models.unet.device, None)
    shape = (batch, *denoiser.latent_shape)
    rows = Harvest(
        x=torch.randn(shape),
        sigma=torch.ones(batch),
        prediction=torch.randn(shape).half(),
        plan=Plan(("a photo of a cat", "a photo of a grumpy cat"), ((0, 1),) * batch),
        settings=HarvestSettings(trajectories=batch, sample=SampleSettings(steps=1), batch=batch),
        concepts=(Concept("grumpy cat", "cat"),),
        model="",
        surrounding=((),),
    )
    marks = [_now(denoiser.device)]

    def mark(progress: Progress) -> None:
        marks.append(_now(denoiser.device))

    settings = TrainSettings(
        subset=subset, steps=steps, batch=batch, learning_rate=RATE, checkpointing=checkpointing, cosine=False
    )
    train_harvested(denoiser, rows, settings, on_progress=mark)
    return _gaps(marks)


def measure(case: str, size: Size, batch: int, steps: int, device: torch.device) -> dict[str, Any]:
    """One case in this process: see the head of the file."""
    torch.manual_seed(0)
    models = build(size, device)
    weights = sum(parameter.numel() for parameter in models.unet.parameters())
    run: Callable[[], list[float]]
    if case.startswith("reference"):

        def run() -> list[float]:
            return reference(models, size, batch, 1 + steps, case == "reference-plain-attention")
    else:

        def run() -> list[float]:
            subset = "cross-attn-up" if "-up" in case else "cross-attn"
            return ours(models, size, batch, 1 + steps, subset, case.endswith("checkpointing"))

    loaded = memory(device)[0]
    seconds = run()[1:]
    peak = memory(device)[1]
    return {"seconds": seconds, "median": median(seconds), "loaded_gb": loaded, "peak_gb": peak, "weights": weights}


def memory(device: torch.device) -> tuple[float, float]:
    """Memory in GB now and at most so far: of this process, or what PyTorch has allocated on a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e9, torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.is_file():
        # not getrusage: on Linux a child begins with its parent's maximum
        fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
        now, most = (int(fields[name].split()[0]) * 1024 / 1e9 for name in ("VmRSS", "VmHWM"))
        return now, most
    if sys.platform == "darwin":
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
        return most, most
    raise SystemExit("Peak memory of a process is measured on Linux and macOS only: run this there, or on a GPU.")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _gaps(marks: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(marks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--size", choices=SIZES, default="sd15")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    print(
        json.dumps(
            measure(options.case, SIZES[options.size], options.batch, options.steps, torch.device(options.device))
        )
    )


if __name__ == "__main__":
    main()
