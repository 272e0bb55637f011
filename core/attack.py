"""The attack score: how hard it is to bring an ablated concept back by an optimised prompt.

Textual inversion (Gal et al., "An Image is Worth One Word", ICLR 2023, https://arxiv.org/abs/2208.01618) learns the
token embedding of one pseudo-word from pictures of the target, through the edited model. The share of its own pictures
that show the target, after so many optimisation steps, is measured for the pretrained model and for each edit alike.
The pseudo-word is a delta on one row of the token embedding, so no weight is written and any host works that lets
gradients through its text encoder.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor

from .concept import Concept, evaluation_prompts
from .delta import Delta, check_fits, zeros_in_rows
from .denoiser import Denoiser, true_direction
from .errors import AblationError, Diverged
from .leaks import Recogniser
from .losses import noise_based
from .progress import ProgressCallback, Reporter
from .prompts import fill
from .samplers import SampleSettings, draw_images, sample_latents
from .statistics import Estimate, share_interval
from .subsets import select

PRETRAINED = "pretrained"
"""Name of the reference curve."""

_BROUGHT_BACK = 0.5
"""Share of successful pictures that budgets are compared at."""
_PLACEHOLDERS = ("sks", "olis", "zwx", "qqq")
"""Words that are one token for CLIP and mean next to nothing."""


@dataclass(frozen=True)
class AttackSettings:
    """What an attacker may spend, and how success is measured."""

    checkpoints: tuple[int, ...] = (0, 50, 100, 200, 400)
    """Optimisation steps after which pictures are drawn; the last one is the whole budget."""
    learning_rate: float = 0.3
    """Of Adam, in units of the root mean square of the token embeddings' numbers: 0.3 is about the 0.005 that Gal et
    al. use for models whose embeddings are those of CLIP."""
    batch: int = 4
    """Pictures of the target in a step."""
    images: int = 16
    """Pictures of the target that the pretrained model draws for the attacker."""
    prompts: int = 4
    """Carrier prompts, in which the pseudo-word stands for the target."""
    seeds: int = 4
    """Pictures of each carrier prompt at a checkpoint."""
    sample: SampleSettings = field(default_factory=SampleSettings)
    draw_batch: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.batch, self.images, self.prompts, self.seeds, self.draw_batch) < 1:
            raise AblationError("An attack needs at least one picture, one prompt, one seed and a batch of 1.")
        if not self.checkpoints or self.checkpoints[0] < 0 or sorted(set(self.checkpoints)) != [*self.checkpoints]:
            raise AblationError("The checkpoints of an attack must be rising numbers of steps, such as 0, 50, 100.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise AblationError(f"The learning rate must be a positive number, not {self.learning_rate}.")


@dataclass(frozen=True)
class TargetImages:
    """What the attacker has of the target."""

    latents: Tensor
    """[N, C, h, w]."""
    carriers: tuple[int, ...]
    """Which carrier prompt each was drawn from."""


@dataclass(frozen=True)
class Checkpoint:
    """How far an attack has come after `steps`."""

    steps: int
    success: Estimate
    """Share of the pseudo-word's pictures that show the target."""
    images: np.ndarray = field(repr=False)
    """uint8 [prompts, seeds, height, width, 3], sRGB."""


@dataclass(frozen=True)
class AttackCurve:
    """One attack: success against budget."""

    checkpoints: tuple[Checkpoint, ...]
    losses: tuple[float, ...]
    """Diffusion loss of every step."""
    seconds: float

    def budget(self, share: float) -> int | None:
        """Steps at the first checkpoint whose success is at least `share`, or None if there is none."""
        return next((point.steps for point in self.checkpoints if point.success.value >= share), None)


@dataclass(frozen=True)
class AttackReport:
    """The same attack on the pretrained model and on each edit."""

    concept: Concept
    curves: Mapping[str, AttackCurve]
    """By name; the first is `PRETRAINED`."""
    settings: dict[str, object]

    def resistance(self) -> dict[str, float]:
        """By the name of each edit, how many times the pretrained model's budget it takes until half of the pictures
        show the target.

        As coarse as the checkpoints are. Infinite where the edit withstood the whole budget, 0 where the anchor's word
        alone draws the target; NaN where the attack fails on the pretrained model itself or succeeds there at step 0,
        which makes it no test.
        """
        reference = self.curves[PRETRAINED].budget(_BROUGHT_BACK)
        found = {}
        for name, curve in self.curves.items():
            if name != PRETRAINED:
                steps = curve.budget(_BROUGHT_BACK)
                found[name] = math.nan if not reference else math.inf if steps is None else steps / reference
        return found


def attack_score(
    denoiser: Denoiser,
    deltas: Mapping[str, Delta],
    concept: Concept,
    recognise: Recogniser,
    settings: AttackSettings | None = None,
    *,
    on_progress: ProgressCallback | None = None,
) -> AttackReport:
    """Attack the pretrained model and each edit with the same pictures, random numbers and budget.

    Args:
        denoiser: the pretrained model, with nothing attached that belongs to these edits.
        deltas: edits that ablate `concept`, by name.
        concept: what the attacker wants back.
        recognise: says which pictures show it (`leaks.by_judge`, `leaks.by_copies`).
        settings: the budget.
        on_progress: called after each step; raises to cancel.

    Raises:
        AblationError: a delta named like the reference, IncompatibleDelta, or as `attack`.
    """
    if PRETRAINED in deltas:
        raise AblationError(f"An edit cannot be called '{PRETRAINED}': give it another name.")
    settings = settings or AttackSettings()
    _token_layer(denoiser)
    for delta in deltas.values():
        check_fits(delta, denoiser)
    images = draw_target(denoiser, concept, settings, on_progress)
    curves = {
        name: attack(denoiser, delta, concept, recognise, settings, images, on_progress, name=name)
        for name, delta in {PRETRAINED: None, **deltas}.items()
    }
    return AttackReport(concept, curves, asdict(settings))


def draw_target(
    denoiser: Denoiser, concept: Concept, settings: AttackSettings, on_progress: ProgressCallback | None = None
) -> TargetImages:
    """Pictures of the target by the pretrained model, from the prompts that the carriers are made of."""
    prompts = _carriers(concept.target, concept, denoiser, settings)
    turns = [turn % len(prompts) for turn in range(settings.images)]
    reporter = Reporter(on_progress, "Drawing the target", settings.images * settings.sample.steps)
    latents = []
    for start in range(0, settings.images, settings.draw_batch):
        chunk = turns[start : start + settings.draw_batch]
        # far from the seeds of the checkpoints: drawing the same noise again would be no success
        seeds = [settings.seed + 1_000_000 + start + place for place in range(len(chunk))]
        latents.append(
            sample_latents(
                denoiser,
                [prompts[turn] for turn in chunk],
                seeds,
                settings.sample,
                lambda step: reporter.advance(len(step.x), latents=step.denoised),
            )
        )
    return TargetImages(torch.cat(latents), tuple(turns))


def attack(
    denoiser: Denoiser,
    delta: Delta | None,
    concept: Concept,
    recognise: Recogniser,
    settings: AttackSettings,
    images: TargetImages,
    on_progress: ProgressCallback | None = None,
    *,
    name: str = "",
) -> AttackCurve:
    """Learn a pseudo-word for `images` through the model with `delta` (None: as it is), and draw it on the way.

    It begins as the anchor's word, the coarse description that Gal et al. start from (section 4), so the first
    checkpoint at 0 steps shows what the anchor alone draws. The same seed gives the same curve on the same machine.

    Raises:
        AblationError: the host does not give the text encoder's token embedding or no gradient passes through it, or
            IncompatibleDelta.
        Diverged: the loss became NaN or infinite.
    """
    start = time.perf_counter()
    what = f"Attacking {name or denoiser.name}"
    placeholder = _placeholder(denoiser)
    token, vector = _pseudo_word(denoiser, placeholder, concept.anchor)
    prompts = _carriers(placeholder, concept, denoiser, settings)
    rate = settings.learning_rate * float(_token_layer(denoiser)[1].weight.detach().float().square().mean().sqrt())
    optimizer = torch.optim.Adam([vector], lr=rate)
    reporter = Reporter(on_progress, what, settings.checkpoints[-1])
    steps = _gradients(denoiser, vector, prompts, images, settings)
    losses: list[float] = []
    reached: list[Checkpoint] = []
    with contextlib.nullcontext() if delta is None else delta.attach(denoiser), token.attach(denoiser):
        for budget in settings.checkpoints:
            while len(losses) < budget:
                loss, vector.grad = next(steps)
                if not math.isfinite(loss):
                    raise Diverged("The attack ended in NaN or infinity: lower its learning rate.")
                optimizer.step()
                losses.append(loss)
                reporter.advance(loss=loss)
            drawing = Reporter(
                on_progress, f"{what}, {budget} steps", len(prompts) * settings.seeds * settings.sample.steps
            )
            reached.append(_measure(denoiser, prompts, budget, recognise, settings, drawing))
    return AttackCurve(tuple(reached), tuple(losses), time.perf_counter() - start)


def _gradients(
    denoiser: Denoiser, vector: Tensor, prompts: Sequence[str], images: TargetImages, settings: AttackSettings
) -> Iterator[tuple[float, Tensor]]:
    """Loss and gradient of every step: Gal et al. Eq. 2, min_v || eps - Phi(x_t, c(v), t) ||^2."""
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        chosen = torch.randint(len(images.latents), (settings.batch,), generator=generator)
        # serves nothing any more; without it, the noise would be another one than that of stored results
        torch.randint(len(prompts), (settings.batch,), generator=generator)
        x0 = images.latents[chosen].to(denoiser.device)
        noise = torch.randn(x0.shape, generator=generator).to(denoiser.device)
        sigma = denoiser.sigmas[torch.randint(len(denoiser.sigmas), (len(x0),), generator=generator)]
        sigma = sigma.to(denoiser.device)
        x = denoiser.add_noise(x0, noise, sigma)
        with torch.enable_grad():
            cond = denoiser.encode([prompts[images.carriers[index]] for index in chosen.tolist()])
            if not cond.context.requires_grad:
                raise AblationError(
                    f"No gradient passes through the text encoder of {denoiser.name}: attack the model as a diffusers "
                    "folder or a single file."
                )
            loss = noise_based(denoiser.direction(x, sigma, cond), true_direction(x, sigma, x0))
            # unlike backward(), this leaves no gradient at any weight, frozen or not
            (gradient,) = torch.autograd.grad(loss * denoiser.gradient_scale, [vector])
        yield loss.item(), gradient / denoiser.gradient_scale


def _measure(
    denoiser: Denoiser,
    prompts: Sequence[str],
    steps: int,
    recognise: Recogniser,
    settings: AttackSettings,
    reporter: Reporter,
) -> Checkpoint:
    seeds = range(settings.seed, settings.seed + settings.seeds)
    every = [prompt for prompt in prompts for _ in seeds]
    with torch.no_grad():
        drawn = draw_images(
            denoiser,
            every,
            [*seeds] * len(prompts),
            settings.sample,
            batch=settings.draw_batch,
            reporter=reporter,
        )
    success = share_interval(recognise(drawn) > 0, every if len(prompts) > 1 else None)
    return Checkpoint(steps, success, drawn.reshape(len(prompts), len(seeds), *drawn.shape[1:]))


def _token_layer(denoiser: Denoiser) -> tuple[str, torch.nn.Embedding]:
    try:
        layers = select("embedding", denoiser)
    except AblationError as error:
        raise AblationError(
            f"This host does not give the token embedding of {denoiser.name}: attack the model as a diffusers folder "
            "or a single file."
        ) from error
    return next(iter(layers.items()))


def _placeholder(denoiser: Denoiser) -> str:
    for word in _PLACEHOLDERS:
        if len(denoiser.tokenize(word)) == 1:
            return word
    raise AblationError(f"The tokenizer of {denoiser.name} has no rare word to put a pseudo-word in the place of.")


def _pseudo_word(denoiser: Denoiser, placeholder: str, anchor: str) -> tuple[Delta, Tensor]:
    """A delta that gives `placeholder` the mean embedding of the anchor's tokens, and its part to be optimised, [1, D].

    It counts from the pretrained row, so a delta that edits token embeddings does not move it.
    """
    name, layer = _token_layer(denoiser)
    row = denoiser.tokenize(placeholder)[0]
    table = layer.weight.detach()
    wanted = table[denoiser.tokenize(anchor)].float().mean(dim=0)
    token = zeros_in_rows(name, layer, [row]).map(lambda tensor: tensor.to(denoiser.device))
    vector = token.layers[name].weight.down
    vector.copy_((wanted - table[row].float()).to(vector.device)[None])
    return token, vector.requires_grad_(True)


def _carriers(name: str, concept: Concept, denoiser: Denoiser, settings: AttackSettings) -> tuple[str, ...]:
    """Prompts that draw `name`; the i-th ones of two names differ in the name only."""
    source = denoiser.prompt_source
    if concept.kind == "memorized":
        return (fill("{}", name),)
    templates = source.style_evaluation if concept.kind == "style" else source.instance_evaluation
    return evaluation_prompts(name, concept, source, min(settings.prompts, len(templates)))
