"""Training on harvested rows: Eq. 4 with a teacher that was asked beforehand.

A step is one forward and one backward pass of the student over rows of mixed noise levels, those that ablate and those
that preserve together. Nothing else runs in the loop: no autoencoder, no teacher and, unless its rows are what is
edited, no text encoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import low_rank
from .batches import sent, shuffled
from .delta import Attachment, Delta, LayerDelta, LowRank, check_fits
from .denoiser import Denoiser
from .errors import AblationError
from .harvest import Harvest
from .losses import model_based
from .parallel import current
from .progress import ProgressCallback
from .subsets import empty_delta
from .trainer import Prompts, TrainResult, TrainSettings, optimize


@dataclass(frozen=True)
class _Batch:
    """This process's rows of one step, on the model's device but for `target`: those that ablate first, then those that
    preserve.
    """

    x: Tensor
    sigma: Tensor
    teacher: Tensor
    target: Tensor
    """Which prompts, on the CPU: the text encoder is asked by name."""
    of_all: tuple[int, int]
    """How many rows ablate and preserve, those of other processes among them."""


def train_harvested(
    denoiser: Denoiser,
    harvest: Harvest,
    settings: TrainSettings,
    *,
    start: Delta | None = None,
    on_progress: ProgressCallback | None = None,
) -> TrainResult:
    """Train a delta on a harvest. The same seed gives the same delta on the same machine.

    Args:
        denoiser: the model that the harvest was made with.
        harvest: rows.
        settings: as for images, with the objective "model" and neither flips nor regularization, which harvested rows
            cannot give: the teacher has not seen the mirrored latent, and there is no image. Nor negative guidance,
            which the rows have from their harvest.
        start: a delta to begin with, for instance a closed form's; it is left as it is. A training of low rank begins
            with its best approximation.
        on_progress: called after each step; raises to cancel.

    Raises:
        AblationError: settings or a start that do not fit.
        Diverged: the loss became NaN, infinite or far larger than at the start, or the delta NaN or infinite.
    """
    if settings.objective != "model" or settings.flip or settings.regularization or settings.negative_guidance:
        raise AblationError(
            "Harvested rows serve the objective 'model' without flips, regularization or negative guidance, which is "
            "the harvest's: change those settings, or train on a dataset of images."
        )
    delta = empty_delta(settings.subset, denoiser, harvest.concepts, settings.rank, settings.seed)
    if start is not None:
        delta = _begun(delta, start, denoiser, settings)

    def losses(attachment: Attachment) -> Iterator[tuple[Tensor, Tensor]]:
        prompts = Prompts(denoiser, harvest.plan.prompts, attachment, settings.subset)
        nothing = torch.zeros((), device=denoiser.device)
        processes = current()
        count = processes.count(settings.batch)
        for batch in _batches(harvest, settings, denoiser.device):
            student = denoiser.direction(batch.x, batch.sigma, prompts.student(batch.target))
            ablating, preserving = batch.of_all
            objective = processes.part(model_based(student[:count], batch.teacher[:count]), count, ablating)
            preserved = nothing
            if len(student) > count:
                held = model_based(student[count:], batch.teacher[count:])
                preserved = processes.part(held, len(student) - count, preserving)
            yield objective, settings.preserve_weight * preserved

    return optimize(denoiser, delta, settings, losses, on_progress)


def _begun(delta: Delta, start: Delta, denoiser: Denoiser, settings: TrainSettings) -> Delta:
    """A copy of `delta` (zeros, dense or of the settings' rank) with the values of `start` in it."""
    check_fits(start, denoiser)
    fits = settings.subset != "embedding" and all(
        name in delta.layers and (layer.bias is None or delta.layers[name].bias is not None)
        for name, layer in start.layers.items()
    )
    if not fits:
        raise AblationError(
            f"The delta to begin with edits other weights than the subset '{settings.subset}' trains: choose the "
            "subset that it was made for."
        )
    return replace(
        delta,
        layers={
            name: _sum(layer, start.layers[name]) if name in start.layers else layer
            for name, layer in delta.layers.items()
        },
    )


def _sum(zeros: LayerDelta, start: LayerDelta) -> LayerDelta:
    if isinstance(zeros.weight, LowRank):
        return LayerDelta(zeros.weight if start.weight is None else low_rank.begun(start.weight, zeros.weight))
    weight = start.weight.dense() if isinstance(start.weight, LowRank) else start.weight
    begun = (
        empty if given is None or empty is None else empty + given.detach().to(empty)
        for empty, given in ((zeros.weight, weight), (zeros.bias, start.bias))
    )
    return LayerDelta(*begun)


def _batches(harvest: Harvest, settings: TrainSettings, device: torch.device) -> Iterator[_Batch]:
    """The rows of each step, from reshuffled passes through the harvest."""
    generator = torch.Generator().manual_seed(settings.seed)
    preserving, targets = harvest.preserving, harvest.pairs[:, 1]
    ablate = shuffled(preserving.logical_not().nonzero().flatten(), settings.batch, generator)
    preserve = shuffled(preserving.nonzero().flatten(), settings.preserve_batch, generator)
    for _ in range(settings.steps):
        rows = torch.cat((next(ablate), next(preserve)))
        of_all = settings.batch, len(rows) - settings.batch
        rows = current().mine(rows)
        chosen = (tensor[rows] for tensor in (harvest.x, harvest.sigma, harvest.prediction))
        x, sigma, teacher = (sent(tensor, device) for tensor in chosen)
        yield _Batch(x, sigma, teacher.float(), targets[rows], of_all)
