"""What the benchmark programs measure alike: accuracy as single hits, and where time and network rows go."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import numpy as np

from concept_ablation.core.bench.pace import sampling_rows
from concept_ablation.core.compiling import compiled
from concept_ablation.core.concept import judge_texts
from concept_ablation.core.delta import Delta
from concept_ablation.core.denoiser import Denoiser
from concept_ablation.core.evaluation import EvaluationJob, EvaluationSettings, draw
from concept_ablation.core.merged import merged
from concept_ablation.core.metrics import Judge, clip_hits
from concept_ablation.core.phases import Phase
from concept_ablation.core.statistics import Estimate, share_difference, share_interval

Hits = Mapping[str, Sequence[Sequence[int]]]
"""For each concept [prompts, seeds]: 1 where the judge takes the picture for the concept and not for its anchor."""


def hits(
    denoiser: Denoiser,
    judge: Judge,
    jobs: Sequence[EvaluationJob],
    settings: EvaluationSettings,
    delta: Delta | None = None,
) -> dict[str, list[list[int]]]:
    """Draw `jobs`, with `delta` or without an edit, and judge every picture."""
    rows = sampling_rows(settings.seeds * sum(len(job.prompts) for job in jobs), settings.sample)
    with nullcontext() if delta is None else merged(delta, denoiser), compiled(denoiser, rows):
        drawn = draw(denoiser, jobs, settings, "Drawing")
    found = {}
    for job, images in zip(jobs, drawn.images, strict=True):
        texts = (job.name, job.concept.anchor)
        concept, other = (judge.embed_concept(judge_texts(text, job.concept)) for text in texts)
        embedded = judge.embed_images(images.reshape(-1, *images.shape[2:]))
        found[job.name] = clip_hits(embedded, concept, other).int().reshape(images.shape[:2]).tolist()
    return found


def accuracy(*found: Hits) -> Estimate:
    """CLIP accuracy over all concepts of one or several drawings; what is resampled is prompts."""
    return share_interval(_flat(found), _prompts(found))


def accuracy_change(first: Sequence[Hits], second: Sequence[Hits]) -> Estimate:
    """Accuracy of `second` minus that of `first`: the same concepts, prompts and seeds under another edit."""
    return share_difference(_flat(first), _flat(second), _prompts(first))


def only(found: Hits, names: Sequence[str]) -> Hits:
    """The hits of some of the concepts."""
    return {name: found[name] for name in names}


def plain(estimate: Estimate) -> dict[str, float | None]:
    """An estimate for a JSON file, which has no NaN."""
    values = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def _flat(found: Sequence[Hits]) -> np.ndarray:
    return np.concatenate([np.ravel(rows) for drawing in found for rows in drawing.values()])


def _prompts(found: Sequence[Hits]) -> list[tuple[int, str, int]]:
    """Of each hit, the prompt that it belongs to."""
    return [
        (number, name, prompt)
        for number, drawing in enumerate(found)
        for name, rows in drawing.items()
        for prompt, seeds in enumerate(rows)
        for _ in seeds
    ]


def costs(phases: Sequence[Phase], seconds: float) -> dict[str, dict[str, float]]:
    """The phases of an ablation for a JSON file, and what they leave of its `seconds` as the phase "rest".

    `forward` counts rows that went through the network without gradients: one for each picture and step, two with
    guidance; `trained` those that went forward and backward.
    """
    found = {
        phase.name: {"seconds": phase.seconds, "forward": phase.forward - phase.backward, "trained": phase.backward}
        for phase in phases
    }
    known = sum(phase.seconds for phase in phases)
    return {**found, "rest": {"seconds": seconds - known, "forward": 0, "trained": 0}}
