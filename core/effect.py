"""How much of an edit's effect another form of it keeps, such as one of lower rank.

Two measures. `ClipEffect` is the one that matters: how far the CLIP accuracy of the targets falls and how much of the
neighbours' stays, by the drawing and judging of `evaluation`, on development prompts (`prompts.development`) and seeds
of their own, so that a choice made by it says nothing about the evaluation prompts. `OutputEffect` needs no judge and
no pictures: the change of the network's output at harvested probe rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from .concept import Concept
from .delta import Delta
from .denoiser import Denoiser
from .errors import AblationError
from .evaluation import EvaluationSettings, compare, draw, make_jobs
from .harvest import HarvestSettings, harvest
from .metrics import Judge
from .progress import ProgressCallback
from .prompts import development
from .samplers import SampleSettings

FIRST_SEED = 1000
"""Seeds of development pictures start here; evaluations start at 0."""
PROBES = HarvestSettings(trajectories=8, preserve=8, prompts=8, sample=SampleSettings(steps=8), batch=8)
"""Probe rows of each concept: 8 steps of 16 trajectories."""
_ROWS_AT_ONCE = 16


class Effect(Protocol):
    """A measure of what is left of a reference edit."""

    def kept(self, delta: Delta) -> float:
        """The share of the reference's effect that `delta` has: 1 for the reference itself, 0 for no edit."""


@dataclass(frozen=True)
class ClipFigures:
    """What an edit does to the pictures: `fall` of the targets' CLIP accuracy, mean over targets, and accuracy of the
    surrounding concepts after it, mean over them; None if there are none.
    """

    fall: float
    surrounding: float | None

    def share_of(self, reference: ClipFigures) -> float:
        """The smaller one of the shares of the reference's fall and of its surrounding accuracy."""
        shares = [self.fall / reference.fall]
        if self.surrounding is not None and reference.surrounding:
            shares.append(self.surrounding / reference.surrounding)
        return min(shares)


@dataclass
class ClipEffect:
    """The effect on pictures. Those without an edit and with the reference are drawn once.

    Attributes:
        denoiser: the pretrained model.
        judge: the CLIP model.
        reference: the edit whose effect counts as 1.
        concepts: what it ablates.
        surrounding: for each concept, names that should stay.
        settings: how much to draw; the first seed should be `FIRST_SEED`.
        on_progress: called after each sampling step.

    Raises:
        AblationError: too few templates, or an edit that does not make the targets' accuracy fall.
    """

    denoiser: Denoiser
    judge: Judge
    reference: Delta
    concepts: Sequence[Concept]
    surrounding: Sequence[Sequence[str]]
    settings: EvaluationSettings = field(default_factory=lambda: EvaluationSettings(5, 4, first_seed=FIRST_SEED))
    on_progress: ProgressCallback | None = None

    def __post_init__(self) -> None:
        source = self.denoiser.prompt_source
        try:
            self.denoiser.prompt_source = development(source, max(10, self.settings.prompts))
            self._jobs = make_jobs(self.denoiser, self.concepts, self.surrounding, self.settings)
        finally:
            self.denoiser.prompt_source = source
        # nothing is asked of the anchor, so its pictures are not drawn
        self._jobs = [job for job in self._jobs if job.role != "anchor"]
        self._before = draw(self.denoiser, self._jobs, self.settings, "Drawing without the edit", self.on_progress)
        self.figures = self.measure(self.reference, "Drawing with the whole edit")
        if self.figures.fall <= 0:
            raise AblationError(
                "The edit does not make the targets' CLIP accuracy fall on the development prompts, so there is no "
                "such effect to keep: measure the network's output instead, or draw more pictures."
            )

    def measure(self, delta: Delta, phase: str) -> ClipFigures:
        """Draw and judge with `delta`; `phase` is what progress is reported as."""
        with delta.attach(self.denoiser):
            after = draw(self.denoiser, self._jobs, self.settings, phase, self.on_progress)
        found = compare(self._jobs, self._before, after, self.judge, self.settings).concepts
        falls = [row.before.clip_accuracy - row.after.clip_accuracy for row in found if row.role == "target"]
        near = [row.after.clip_accuracy for row in found if row.role == "surrounding"]
        return ClipFigures(sum(falls) / len(falls), sum(near) / len(near) if near else None)

    def kept(self, delta: Delta) -> float:
        """The smaller one of the shares of the reference's fall and surrounding accuracy that `delta` has."""
        return self.measure(delta, f"Drawing with rank {delta.metadata.get('concept_ablation.rank', '?')}").share_of(
            self.figures
        )


@dataclass
class OutputEffect:
    """The effect on the network's output: with d the prediction (x - D) / sigma for the targets' prompts, and those of
    what must stay, at points that sampling the anchors passes through, an edit keeps 1 - |d - d_reference| /
    |d_reference - d_without|, norms over all rows.

    Attributes:
        denoiser: the pretrained model.
        reference: the edit whose effect counts as 1.
        concepts: what it ablates.
        surrounding: for each concept, names that should stay.
        settings: the probe rows; development prompts.
        on_progress: called after each sampling step.

    Raises:
        AblationError: too few templates, or an edit that changes nothing.
    """

    denoiser: Denoiser
    reference: Delta
    concepts: Sequence[Concept]
    surrounding: Sequence[Sequence[str]]
    settings: HarvestSettings = PROBES
    on_progress: ProgressCallback | None = None

    def __post_init__(self) -> None:
        source = self.denoiser.prompt_source
        try:
            held = development(source)
            self.denoiser.prompt_source = replace(
                source, instance_train=held.instance_evaluation, style_train=held.style_evaluation
            )
            rows = harvest(
                self.denoiser,
                self.concepts,
                self.settings,
                surrounding=self.surrounding,
                on_progress=self.on_progress,
            )
        finally:
            self.denoiser.prompt_source = source
        self._x, self._sigma = rows.x, rows.sigma
        self._prompts = [rows.plan.prompts[target] for target in rows.pairs[:, 1].tolist()]
        without = self._outputs(Delta({}))
        self._whole = self._outputs(self.reference)
        self._change = (self._whole - without).norm()
        if self._change == 0:
            raise AblationError("The edit does not change what the network predicts, so there is no effect to keep.")

    def kept(self, delta: Delta) -> float:
        """1 - |d - d_reference| / |d_reference - d_without|, with d of `delta`."""
        return 1 - float((self._outputs(delta) - self._whole).norm() / self._change)

    @torch.no_grad()
    def _outputs(self, delta: Delta) -> Tensor:
        """d of all rows with an edit, [rows, C, h, w], on the CPU."""
        parts, device = [], self.denoiser.device
        with delta.attach(self.denoiser):
            for start in range(0, len(self._x), _ROWS_AT_ONCE):
                rows = slice(start, start + _ROWS_AT_ONCE)
                cond = self.denoiser.encode(self._prompts[rows])
                found = self.denoiser.direction(self._x[rows].to(device), self._sigma[rows].to(device), cond)
                parts.append(found.float().cpu())
        return torch.cat(parts)
