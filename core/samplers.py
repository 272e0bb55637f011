"""Samplers over the `Denoiser` contract, and the noise schedules and random numbers that they use.

Each sampler is a plain function of a model `(x, sigma) -> x0`, a start latent and a descending list of noise levels
that ends at the level where sampling stops (usually 0). Equations: Karras et al. 2022 (Euler), Song et al. 2021
(DDIM), Lu et al. 2022 (DPM-Solver++).

What they have in common: x is the start latent [B, C, h, w] at the first level, `noise` is drawn from where a sampler
adds some, `callback` is told of each step, and the result is the latent at the last level, [B, C, h, w].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .denoiser import Conditioning, Denoiser
from .errors import AblationError
from .progress import Reporter

Model = Callable[[Tensor, Tensor], Tensor]
"""x [B, C, h, w] and sigma [B] -> x0 [B, C, h, w]."""


@dataclass(frozen=True)
class SamplerStep:
    """What a sampler knows after it has called the model: step `index` of `total`, at x and sigma, found `denoised`."""

    index: int
    total: int
    sigma: float
    x: Tensor
    denoised: Tensor


StepCallback = Callable[[SamplerStep], None]
Observer = Callable[[Tensor, Tensor, Tensor], None]
"""Told x, sigma and D(x; sigma, c) of the conditional branch, before guidance, at each call of the model."""


class Noise:
    """Standard normal noise that depends only on each image's own seed, not on how images are batched.

    Drawn on the CPU, so that a seed gives the same image on every device.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._device = device

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """One more draw, [len(seeds), *shape]."""
        return torch.stack([torch.randn(*shape, generator=generator) for generator in self._generators]).to(
            self._device
        )


def timestep_schedule(sigmas: Tensor, steps: int) -> list[float]:
    """`steps` noise levels at evenly spaced training timesteps, from the noisiest down, then 0 ("trailing" spacing).

    Args:
        sigmas: the model's own levels, ascending, [T].

    Raises:
        AblationError: steps < 1 or more than the model has.
    """
    if not 1 <= steps <= len(sigmas):
        raise AblationError(f"A sampler takes 1 to {len(sigmas)} steps with this model, not {steps}.")
    index = (torch.arange(steps, 0, -1, dtype=torch.float64) * (len(sigmas) / steps)).round().long() - 1
    return [*sigmas[index].tolist(), 0.0]


def karras_schedule(sigmas: Tensor, steps: int, rho: float = 7.0) -> list[float]:
    """Karras et al. 2022, Eq. 5: `steps` levels whose rho-th roots are evenly spaced, from the noisiest down, then 0.

    Args:
        sigmas: the model's own levels, ascending, [T].

    Raises:
        AblationError: steps < 1.
    """
    if steps < 1:
        raise AblationError(f"A sampler takes at least 1 step, not {steps}.")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = float(sigmas[0]) ** (1 / rho), float(sigmas[-1]) ** (1 / rho)
    return [*((high + ramp * (low - high)) ** rho).tolist(), 0.0]


def guided(
    denoiser: Denoiser, cond: Conditioning, uncond: Conditioning, scale: float, observe: Observer | None = None
) -> Model:
    """Classifier-free guidance: D(c) pushed away from D(empty) by `scale`, in one network call; 1 is no guidance."""
    both = Conditioning.cat((uncond, cond)) if scale != 1.0 else None

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        if both is None:
            result = with_prompt = denoiser.denoise(x, sigma, cond)
        else:
            without, with_prompt = denoiser.denoise(torch.cat((x, x)), torch.cat((sigma, sigma)), both).chunk(2)
            result = without + scale * (with_prompt - without)
        if observe is not None:
            observe(x, sigma, with_prompt)
        return result

    return model


def sample_euler(
    model: Model, x: Tensor, levels: Sequence[float], noise: Noise, callback: StepCallback | None = None
) -> Tensor:
    """Euler's method on the probability flow: the first-order step of Karras et al. 2022, Algorithm 1, without the
    correction that makes it Heun's. Equal to DDIM with eta = 0, so `noise` is not drawn from.
    """
    return sample_ancestral(model, x, levels, noise, callback, eta=0.0)


def sample_ancestral(
    model: Model,
    x: Tensor,
    levels: Sequence[float],
    noise: Noise,
    callback: StepCallback | None = None,
    *,
    eta: float = 1.0,
) -> Tensor:
    """Euler ancestral sampling, which *is* DDIM with that eta, in [0, 1].

    With x = x_vp / sqrt(alpha), DDIM's noise (Song et al. 2021, Eq. 16) becomes
    up^2 = eta^2 next^2 (sigma^2 - next^2) / sigma^2, the ancestral step of k-diffusion; eta = 1 is DDPM.
    """
    for index, (sigma, following) in enumerate(itertools.pairwise(levels)):
        denoised = _call(model, x, sigma, index, len(levels) - 1, callback)
        up = eta * (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5
        down = (following**2 - up**2) ** 0.5
        x = denoised + (x - denoised) * (down / sigma)
        if up > 0:
            x = x + up * noise(x.shape[1:])
    return x


def sample_dpmpp_2m(
    model: Model, x: Tensor, levels: Sequence[float], noise: Noise, callback: StepCallback | None = None
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2), in lambda = -log(sigma); `noise` is not drawn from."""
    previous: Tensor | None = None
    last_step = 0.0
    for index, (sigma, following) in enumerate(itertools.pairwise(levels)):
        denoised = _call(model, x, sigma, index, len(levels) - 1, callback)
        if following == 0:
            return denoised
        step = torch.log(torch.tensor(sigma / following)).item()
        estimate = denoised
        if previous is not None:
            ratio = last_step / step
            estimate = denoised + (denoised - previous) / (2 * ratio)
        x = (following / sigma) * x + (1 - following / sigma) * estimate
        previous, last_step = denoised, step
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler": sample_euler,
    "euler_ancestral": sample_ancestral,
    "ddim": sample_ancestral,
    "dpmpp_2m": sample_dpmpp_2m,
}
SCHEDULES: dict[str, Callable[[Tensor, int], list[float]]] = {"timestep": timestep_schedule, "karras": karras_schedule}


@dataclass(frozen=True)
class SampleSettings:
    """How images are drawn."""

    steps: int = 25
    guidance: float = 4.0
    sampler: str = "ddim"
    eta: float = 1.0
    """Share of fresh noise in `ddim` and `euler_ancestral`: 0 is deterministic, 1 is DDPM."""
    schedule: str = "timestep"
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise AblationError(f"There is no sampler '{self.sampler}': choose one of {', '.join(SAMPLERS)}.")
        if self.schedule not in SCHEDULES:
            raise AblationError(f"There is no schedule '{self.schedule}': choose one of {', '.join(SCHEDULES)}.")
        if self.steps < 1:
            raise AblationError(f"The number of sampling steps must be at least 1, not {self.steps}.")
        if not 0.0 <= self.eta <= 1.0:
            raise AblationError(f"eta must lie between 0 and 1, not {self.eta}.")
        if not math.isfinite(self.guidance):
            raise AblationError(f"The guidance scale must be a finite number, not {self.guidance}.")


@torch.no_grad()
def sample_latents(
    denoiser: Denoiser,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SampleSettings,
    callback: StepCallback | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """Latents [B, C, h, w] of one batch of prompts, one seed each.

    Raises:
        AblationError: the network gave NaN or infinity.
    """
    noise = Noise(seeds, denoiser.device)
    levels = SCHEDULES[settings.schedule](denoiser.sigmas, settings.steps)
    start = noise(denoiser.latent_shape)
    sigma = torch.full((len(prompts),), levels[0], device=denoiser.device)
    x = denoiser.add_noise(torch.zeros_like(start), start, sigma)
    # equal prompts give one row of uncond, so the cache is asked once
    uncond = denoiser.encode([settings.negative_prompt] * len(prompts))
    model = guided(denoiser, denoiser.encode(prompts), uncond, settings.guidance, observe)
    options = {"eta": settings.eta} if SAMPLERS[settings.sampler] is sample_ancestral else {}
    x = SAMPLERS[settings.sampler](model, x, levels, noise, callback, **options)
    if not torch.isfinite(x).all():
        raise AblationError("The model gave NaN or infinity while sampling: load it in a higher precision (fp32).")
    return x


def draw_images(
    denoiser: Denoiser,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SampleSettings,
    *,
    batch: int = 16,
    reporter: Reporter | None = None,
) -> np.ndarray:
    """Images of prompts, one seed each, uint8 [N, H, W, 3]; an image does not depend on what else is in its batch.

    Args:
        batch: images sampled at once.
        reporter: advanced by the number of images after each sampling step, that is len(prompts) * steps in all.
    """
    images = []
    for start in range(0, len(prompts), batch):
        chunk = slice(start, start + batch)
        count = len(prompts[chunk])
        callback = None
        if reporter is not None:

            def callback(step: SamplerStep, count: int = count) -> None:
                reporter.advance(count, latents=step.denoised)

        latents = sample_latents(denoiser, prompts[chunk], seeds[chunk], settings, callback)
        decoded = denoiser.vae.decode(latents)
        images.append((decoded.permute(0, 2, 3, 1) * 255).round().to("cpu", torch.uint8).numpy())
    return np.concatenate(images)


def _call(model: Model, x: Tensor, sigma: float, index: int, total: int, callback: StepCallback | None) -> Tensor:
    denoised = model(x, torch.full((x.shape[0],), sigma, device=x.device))
    if callback is not None:
        callback(SamplerStep(index, total, sigma, x, denoised))
    return denoised
