"""What to generate and measure for a concept, before against after.

The protocol of the paper's section 4.1: held-out prompts and fixed seeds for the target, the anchor and each
surrounding concept, drawn by the model without and with the delta, judged by CLIP.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .concept import Concept, evaluation_prompts, judge_texts
from .delta import Delta
from .denoiser import Denoiser
from .details import ConceptDetails, measure
from .errors import AblationError
from .metrics import Judge, clip_accuracy, clip_score
from .parallel import current
from .progress import ProgressCallback, Reporter
from .samplers import SampleSettings, draw_images

Role = Literal["target", "anchor", "surrounding"]


@dataclass(frozen=True)
class ClipMetrics:
    """CLIP figures of one set of images; both are means over its images, in [0, 1] and [-1, 1]."""

    clip_accuracy: float
    clip_score: float


@dataclass(frozen=True)
class ConceptResult:
    """One concept, drawn from the same prompts and seeds by the model before and after the edit."""

    name: str
    role: Role
    ablation: str
    """Target of the ablation that this concept belongs to (a run may ablate several)."""
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    before: ClipMetrics
    after: ClipMetrics
    images_before: np.ndarray = field(repr=False)
    """uint8 [prompts, seeds, height, width, 3], sRGB."""
    images_after: np.ndarray = field(repr=False)
    details: ConceptDetails | None = field(default=None, repr=False)
    """The same figures and more, with intervals."""


@dataclass(frozen=True)
class Evaluation:
    """All that an evaluation found."""

    concepts: tuple[ConceptResult, ...]
    judge: str
    seconds: dict[str, float]
    settings: dict[str, object]


@dataclass(frozen=True)
class EvaluationSettings:
    """How much is drawn for each concept, and how."""

    prompts: int = 10
    seeds: int = 8
    sample: SampleSettings = field(default_factory=SampleSettings)
    batch: int = 16
    first_seed: int = 0

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.seeds < 1 or self.batch < 1:
            raise AblationError("An evaluation needs at least one prompt, one seed and a batch size of at least 1.")

    @property
    def seed_range(self) -> tuple[int, ...]:
        """The seeds that every prompt is drawn with."""
        return tuple(range(self.first_seed, self.first_seed + self.seeds))


@dataclass(frozen=True)
class Job:
    """What an evaluation draws for one name."""

    name: str
    role: Role
    concept: Concept
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Drawn:
    """What `draw` drew: for each job uint8 [prompts, seeds, height, width, 3], and the time that it took."""

    images: tuple[np.ndarray, ...] = field(repr=False)
    seconds: float


def evaluate(
    denoiser: Denoiser,
    delta: Delta,
    concepts: Sequence[Concept],
    surrounding: Sequence[Sequence[str]],
    judge: Judge,
    settings: EvaluationSettings,
    on_progress: ProgressCallback | None = None,
) -> Evaluation:
    """Draw and judge the target, the anchor and the surrounding concepts of each ablation, before and after.

    The CLIP accuracy of the target and of surrounding concepts is against the anchor, that of the anchor against the
    target: the share of a concept's images that the judge takes for it.

    Args:
        denoiser: the pretrained model, with nothing attached that belongs to this ablation.
        delta: the edit.
        concepts: what it ablates.
        surrounding: for each concept, the names that should have stayed as they were.
        judge: the CLIP model.
        settings: how much to draw.
        on_progress: called after each sampling step.

    Raises:
        AblationError: too few held-out prompts, a surrounding name that is the target or the anchor, or
            IncompatibleDelta.
    """
    jobs = make_jobs(denoiser, concepts, surrounding, settings)
    before = draw(denoiser, jobs, settings, "Drawing before", on_progress)
    with delta.attach(denoiser):
        after = draw(denoiser, jobs, settings, "Drawing after", on_progress)
    return compare(jobs, before, after, judge, settings)


def compare(jobs: Sequence[Job], before: Drawn, after: Drawn, judge: Judge, settings: EvaluationSettings) -> Evaluation:
    """Judge what `draw` drew of `jobs` with the model before and after an edit."""
    start = time.perf_counter()
    results = tuple(
        _judged(judge, job, first, second, settings)
        for job, first, second in zip(jobs, before.images, after.images, strict=True)
    )
    seconds = {
        "draw before": before.seconds,
        "draw after": after.seconds,
        "judge": time.perf_counter() - start,
    }
    return Evaluation(results, judge.name, seconds, asdict(settings))


def make_jobs(
    denoiser: Denoiser,
    concepts: Sequence[Concept],
    surrounding: Sequence[Sequence[str]],
    settings: EvaluationSettings,
) -> list[Job]:
    """Everything that `evaluate` will draw. Costs nothing, so that a long run can find bad input before it begins.

    Raises:
        AblationError: too few held-out prompts, or a surrounding name that is the target or the anchor.
    """
    return [
        Job(name, role, concept, evaluation_prompts(name, concept, denoiser.prompt_source, settings.prompts))
        for concept, names in zip(concepts, surrounding, strict=True)
        for name, role in roles(concept, names)
    ]


def roles(concept: Concept, surrounding: Sequence[str]) -> list[tuple[str, Role]]:
    """The names that an evaluation of `concept` draws, each with its part in it.

    Raises:
        AblationError: a surrounding concept is the target or the anchor itself.
    """
    names = list(dict.fromkeys(surrounding))
    for name in names:
        if name.casefold() in (concept.target.casefold(), concept.anchor.casefold()):
            raise AblationError(
                f"'{name}' is the target or the anchor itself: leave it out of the surrounding concepts."
            )
    return [(concept.target, "target"), (concept.anchor, "anchor"), *((name, "surrounding") for name in names)]


def draw(
    denoiser: Denoiser,
    jobs: Sequence[Job],
    settings: EvaluationSettings,
    phase: str,
    on_progress: ProgressCallback | None = None,
) -> Drawn:
    """Draw all jobs with whatever the denoiser is now; `phase` is what progress is reported as."""
    start = time.perf_counter()
    seeds = settings.seed_range
    requests = [(prompt, seed) for job in jobs for prompt in job.prompts for seed in seeds]
    reporter = Reporter(on_progress, phase, len(requests) * settings.sample.steps)

    def drawn(start: int) -> dict[str, Tensor]:
        prompts, numbers = zip(*requests[start : start + settings.batch], strict=True)
        made = draw_images(denoiser, prompts, numbers, settings.sample, batch=settings.batch, reporter=reporter)
        return {"images": torch.from_numpy(made)}

    parts = []
    for _, part, own in current().spread(range(0, len(requests), settings.batch), drawn):
        parts.append(part["images"].numpy())
        if not own:
            reporter.advance(len(parts[-1]) * settings.sample.steps)
    images = np.concatenate(parts)
    divided = np.split(images, np.cumsum([len(job.prompts) * len(seeds) for job in jobs])[:-1])
    sets = [
        part.reshape(len(job.prompts), len(seeds), *part.shape[1:]) for job, part in zip(jobs, divided, strict=True)
    ]
    return Drawn(tuple(sets), time.perf_counter() - start)


def _judged(
    judge: Judge, job: Job, before: np.ndarray, after: np.ndarray, settings: EvaluationSettings
) -> ConceptResult:
    concept = _embed(judge, job.name, job.concept)
    other = _embed(judge, job.concept.target if job.role == "anchor" else job.concept.anchor, job.concept)
    first, second = (judge.embed_images(images.reshape(-1, *images.shape[2:])) for images in (before, after))
    return ConceptResult(
        name=job.name,
        role=job.role,
        ablation=job.concept.target,
        prompts=job.prompts,
        seeds=settings.seed_range,
        before=ClipMetrics(clip_accuracy(first, concept, other), clip_score(first, concept)),
        after=ClipMetrics(clip_accuracy(second, concept, other), clip_score(second, concept)),
        images_before=before,
        images_after=after,
        details=measure(first, second, concept, other, len(job.prompts)),
    )


def _embed(judge: Judge, name: str, concept: Concept) -> Tensor:
    return judge.embed_concept(judge_texts(name, concept))
