"""What the benchmark programs measure alike: accuracy as single hits, and where time and network evaluations go."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from concept_ablation.core.bench.pace import sampling_rows
from concept_ablation.core.compiling import compiled
from concept_ablation.core.concept import judge_texts
from concept_ablation.core.delta import Delta
from concept_ablation.core.denoiser import Conditioning, Denoiser
from concept_ablation.core.evaluation import EvaluationSettings, Job, draw
from concept_ablation.core.merged import merged
from concept_ablation.core.metrics import Judge, clip_hits
from concept_ablation.core.progress import Progress
from concept_ablation.core.statistics import Estimate, difference_interval, share_interval

Hits = Mapping[str, Sequence[Sequence[int]]]
"""For each concept [prompts, seeds]: 1 where the judge takes the picture for the concept and not for its anchor."""


def hits(
    denoiser: Denoiser, judge: Judge, jobs: Sequence[Job], settings: EvaluationSettings, delta: Delta | None = None
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
    return difference_interval(_flat(first), _flat(second), _prompts(first))


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


@dataclass
class Phase:
    """What one phase of an ablation cost.

    Attributes:
        seconds: wall time.
        forward: rows that went through the network without gradients: one for each picture and step, two with guidance.
        trained: rows that went through it with gradients, forward and backward.
    """

    seconds: float = 0.0
    forward: int = 0
    trained: int = 0


class PhaseMeter:
    """Counts what `denoiser` does within the block, by the phases that a progress callback is told of.

    The meter is that callback: what happened since the last call belongs to the phase of this one, and what comes after
    the last to the phase "rest".
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self._open = Phase()
        self.phases: dict[str, Phase] = {}
        self.seconds = 0.0

    def __call__(self, progress: Progress) -> None:
        self._close(progress.phase)

    def __enter__(self) -> PhaseMeter:
        denoise = self._denoiser.denoise

        def counted(x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
            if torch.is_grad_enabled():
                self._open.trained += len(x)
            else:
                self._open.forward += len(x)
            return denoise(x, sigma, cond)

        # on the object, where it hides the class's method until the block ends
        self._denoiser.denoise = counted
        self._start = self._last = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._denoiser.denoise
        self._close("rest")
        self.seconds = self._last - self._start

    def _close(self, name: str) -> None:
        now = time.perf_counter()
        phase = self.phases.setdefault(name, Phase())
        phase.seconds += now - self._last
        phase.forward += self._open.forward
        phase.trained += self._open.trained
        self._last, self._open = now, Phase()

    def summary(self) -> dict[str, dict[str, Any]]:
        """The phases for a JSON file."""
        return {name: vars(phase) for name, phase in self.phases.items()}
