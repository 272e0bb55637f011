"""What to generate and measure for a concept, before against after.

The protocol of the paper's section 4.1: held-out prompts and fixed seeds for the target, the anchor and each
surrounding concept, drawn by the model without and with the delta, judged by CLIP.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .composition import CompositionKept, composed_prompts, composition_kept, word_groups
from .concept import Concept, evaluation_prompts, judge_texts
from .delta import Delta
from .denoiser import Denoiser
from .details import ConceptDetails, measure, with_instruments
from .errors import AblationError
from .instruments import Instruments
from .metrics import Judge, clip_accuracy, clip_score
from .misspellings import misspelled_prompts
from .parallel import current
from .progress import ProgressCallback, Reporter
from .samplers import SampleSettings, draw_images

Role = Literal["target", "anchor", "surrounding", "misspelled", "composed"]
"""misspelled: the target, asked for with typing errors. composed: the target or the anchor, asked for in a colour, at a
place, in a size or in a style."""

_NO_INSTRUMENTS = Instruments()


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
    composition: CompositionKept | None = field(default=None, repr=False)
    """Of a composed row: whether the words of its prompts are still obeyed."""


@dataclass(frozen=True)
class Evaluation:
    """All that an evaluation found."""

    concepts: tuple[ConceptResult, ...]
    judge: str
    seconds: dict[str, float]
    settings: dict[str, object]


MOST_MISSPELLED = 200


@dataclass(frozen=True)
class EvaluationSettings:
    """How much is drawn for each concept, and how."""

    prompts: int = 10
    seeds: int = 8
    sample: SampleSettings = field(default_factory=SampleSettings)
    batch: int = 16
    first_seed: int = 0
    misspellings: int = 0
    """Prompts with a misspelled target, half of them at edit distance 1 and half at 2; 0 is none."""
    composition: bool = False
    """Whether target and anchor are also asked for with words of colour, place, size and style."""

    def __post_init__(self) -> None:
        if not 0 <= self.misspellings <= MOST_MISSPELLED:
            raise AblationError(
                f"The number of misspelled prompts must be 0 to {MOST_MISSPELLED}, not {self.misspellings}."
            )
        if self.prompts < 1 or self.seeds < 1 or self.batch < 1:
            raise AblationError("An evaluation needs at least one prompt, one seed and a batch size of at least 1.")

    @property
    def seed_range(self) -> tuple[int, ...]:
        """The seeds that every prompt is drawn with."""
        return tuple(range(self.first_seed, self.first_seed + self.seeds))


@dataclass(frozen=True)
class EvaluationJob:
    """What an evaluation draws for one name."""

    name: str
    role: Role
    concept: Concept
    prompts: tuple[str, ...]
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Of a composed job: the alternatives by group (`composition.word_groups`)."""


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
    instruments: Instruments = _NO_INSTRUMENTS,
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
        instruments: what else to measure with.

    Raises:
        AblationError: too few held-out prompts or typos, a surrounding name that is the target or the anchor, or
            IncompatibleDelta.
    """
    jobs = make_jobs(denoiser, concepts, surrounding, settings)
    before = draw(denoiser, jobs, settings, "Drawing before", on_progress)
    with delta.attach(denoiser):
        after = draw(denoiser, jobs, settings, "Drawing after", on_progress)
    return compare(jobs, before, after, judge, settings, instruments)


def compare(
    jobs: Sequence[EvaluationJob],
    before: Drawn,
    after: Drawn,
    judge: Judge,
    settings: EvaluationSettings,
    instruments: Instruments = _NO_INSTRUMENTS,
) -> Evaluation:
    """Judge what `draw` drew of `jobs` with the model before and after an edit."""
    start = time.perf_counter()
    results = tuple(
        _judged(judge, job, first, second, settings, instruments)
        for job, first, second in zip(jobs, before.images, after.images, strict=True)
    )
    seconds = {
        "draw before": before.seconds,
        "draw after": after.seconds,
        "judge": time.perf_counter() - start,
    }
    return Evaluation(results, judge.name, seconds, {**asdict(settings), **instruments.described})


def make_jobs(
    denoiser: Denoiser,
    concepts: Sequence[Concept],
    surrounding: Sequence[Sequence[str]],
    settings: EvaluationSettings,
) -> list[EvaluationJob]:
    """Everything that `evaluate` will draw. Costs nothing, so that a long run can find bad input before it begins.

    Raises:
        AblationError: too few held-out prompts or typos, or a surrounding name that is the target or the anchor.
    """
    source = denoiser.prompt_source
    jobs = []
    for concept, names in zip(concepts, surrounding, strict=True):
        jobs += [
            EvaluationJob(name, role, concept, evaluation_prompts(name, concept, source, settings.prompts))
            for name, role in roles(concept, names)
        ]
        if settings.misspellings:
            halves = ((settings.misspellings + 1) // 2, 1), (settings.misspellings // 2, 2)
            typos = [misspelled_prompts(concept, source, count, distance) for count, distance in halves if count]
            jobs.append(
                EvaluationJob(concept.target, "misspelled", concept, tuple(text for half in typos for text in half))
            )
        if settings.composition and concept.kind != "memorized":
            words = word_groups(source, concept)
            jobs += [
                EvaluationJob(name, "composed", concept, composed_prompts(name, concept, source), words)
                for name in (concept.target, concept.anchor)
            ]
    return jobs


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
    jobs: Sequence[EvaluationJob],
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
    judge: Judge,
    job: EvaluationJob,
    before: np.ndarray,
    after: np.ndarray,
    settings: EvaluationSettings,
    instruments: Instruments,
) -> ConceptResult:
    concept = _embed(judge, job.name, job.concept)
    other = _embed(judge, job.concept.target if job.name == job.concept.anchor else job.concept.anchor, job.concept)
    flat = [images.reshape(-1, *images.shape[2:]) for images in (before, after)]
    first, second = (judge.embed_images(images) for images in flat)
    count = len(job.prompts)
    details = measure(first, second, concept, other, count)
    composition = None
    if job.role == "composed":
        composition = composition_kept(before, after, job.prompts, judge, job.words)
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
        details=with_instruments(details, *flat, count, instruments, instruments.originals.get(job.concept.target)),
        composition=composition,
    )


def _embed(judge: Judge, name: str, concept: Concept) -> Tensor:
    return judge.embed_concept(judge_texts(name, concept))
