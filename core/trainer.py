"""The training loop: a dataset and settings in, a delta out.

Each step draws rows, noise levels and noise, asks the teacher (the same network with the delta switched off, or with
its gradient stopped) and the student for d = (x - D) / sigma, and moves the delta by AdamW. The weights of the model
are frozen throughout and are never written.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .batches import sent, shuffled
from .dataset import AblationDataset
from .delta import Attachment, Delta
from .denoiser import Conditioning, Denoiser, true_direction
from .errors import AblationError, Diverged
from .losses import check_guidance, guided_away, loss_maximization, model_based, noise_based
from .low_rank import LEARNING_RATE_FACTOR
from .parallel import Gradients, current
from .progress import ProgressCallback, Reporter
from .subsets import NOT_LINEAR, empty_delta, trainable

OBJECTIVES: dict[str, str] = {
    "model": "match the frozen model's prediction for the anchor prompt (Eq. 4)",
    "model-self": "match the edited model's own prediction for the anchor prompt (Eq. 5)",
    "noise": "anchor images under target prompts (Eq. 6)",
    "reverse-kl": "as model, on images of the target (section 4.3)",
    "loss-max": "the baseline: maximize the target's loss (Eq. 7)",
}
TARGET_IMAGES = ("reverse-kl", "loss-max")
"""Objectives whose images are drawn from the target prompt instead of the anchor prompt."""

FROZEN_TEACHER = ("model", "reverse-kl")
"""Objectives that compare with the pretrained model."""

StepHook = Callable[[int, Delta], None]

PHASE = "Training"
"""What its progress is called."""
_DIVERGED_FACTOR = 50.0


@dataclass(frozen=True)
class TrainSettings:
    """How a delta is trained."""

    objective: str = "model"
    subset: str = "cross-attn"
    steps: int = 100
    learning_rate: float = 2e-3
    """Of whole matrices; for factors it is multiplied by `low_rank.LEARNING_RATE_FACTOR`."""
    rank: int = 0
    """Train factors of this rank (LoRA) in place of whole matrices; 0 trains those. For subsets of linear layers."""
    batch: int = 32
    """Rows that ablate, in each step."""
    preserve_batch: int = 0
    """Rows that preserve, in each step beside the others (if the dataset has any)."""
    preserve_weight: float = 1.0
    """Weight of the preservation loss against the objective."""
    negative_guidance: float = 0.0
    """eta of `losses.guided_away`: how far beyond the anchor the teacher's prediction goes, away from the target.
    For the objectives in `FROZEN_TEACHER`."""
    regularization: float = 0.0
    """lambda of the paper's regularization: the diffusion loss on anchor pairs (x, c)."""
    distance_weight: float = 0.0
    """lambda of Eq. 7, for loss-max. Where it is above the norm of L's gradient, the edit stays at nothing."""
    cosine: bool = True
    """Let the learning rate rise over the first tenth and fall to 0 along a cosine, instead of keeping it."""
    flip: bool = False
    """Flip latents left to right at random."""
    clip_norm: float = 1.0
    """Largest norm of a gradient."""
    checkpointing: bool = False
    """Recompute activations in the backward pass, block by block: less memory, about a third more time."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise AblationError(f"There is no objective '{self.objective}': choose one of {', '.join(OBJECTIVES)}.")
        if self.steps < 1 or self.batch < 1 or self.preserve_batch < 0:
            raise AblationError("Training needs at least one step and a batch of at least one row.")
        if self.rank < 0:
            raise AblationError(f"The rank must be at least 1, or 0 to train whole matrices, not {self.rank}.")
        if self.rank and self.subset in NOT_LINEAR:
            raise AblationError(
                f"The subset '{self.subset}' has other layers than linear ones and cannot be trained with a rank: "
                "choose cross-attn or attn, or train without a rank and compress the delta."
            )
        check_guidance(self.negative_guidance)
        if self.negative_guidance and self.objective not in FROZEN_TEACHER:
            raise AblationError(
                f"The objective '{self.objective}' asks no frozen model, whose prediction negative guidance moves: set "
                f"it to 0, or choose one of {', '.join(FROZEN_TEACHER)}."
            )
        if not 0 <= self.distance_weight < math.inf or (self.distance_weight and self.objective != "loss-max"):
            raise AblationError("The weight of the distance is at least 0, and 0 for other objectives than loss-max.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise AblationError(f"The learning rate must be a positive number, not {self.learning_rate}.")


@dataclass(frozen=True)
class TrainResult:
    """A trained delta and how it got there."""

    delta: Delta
    losses: tuple[float, ...]
    """The objective (without preservation and regularization) at each step."""
    seconds: float


@dataclass(frozen=True)
class _Batch:
    """This process's rows of one step: those that ablate first, then those that preserve."""

    x0: Tensor
    x: Tensor
    sigma: Tensor
    anchor: Tensor
    target: Tensor
    ablating: int
    """How many of these rows ablate."""
    of_all: tuple[int, int]
    """How many rows ablate and preserve, those of other processes among them."""


def train(
    denoiser: Denoiser,
    dataset: AblationDataset,
    settings: TrainSettings,
    on_progress: ProgressCallback | None = None,
    on_step: StepHook | None = None,
) -> TrainResult:
    """Train a delta on a dataset. The same seed gives the same delta on the same machine.

    Args:
        denoiser: the pretrained model.
        dataset: what `dataset.build` made for this objective.
        settings: how to train.
        on_progress: called after each step; raises to cancel.
        on_step: told the number of steps done and the delta as it then is.

    Raises:
        AblationError: the subset does not exist, the dataset was drawn for another objective, or the objective has
            nothing to regularize with.
        Diverged: the loss became NaN, infinite or far larger than at the start, or the delta NaN or infinite.
        Exception: whatever `on_progress` raises to cancel.
    """
    wanted = "target" if settings.objective in TARGET_IMAGES else "anchor"
    if dataset.settings.source != wanted:
        raise AblationError(
            f"The objective '{settings.objective}' needs images of the {wanted} and this dataset has images of the "
            f"{dataset.settings.source}: build a dataset for that objective."
        )
    if settings.regularization and settings.objective in TARGET_IMAGES:
        raise AblationError(
            f"The objective '{settings.objective}' has no images of the anchor to regularize with: set regularization "
            "to 0."
        )
    delta = empty_delta(settings.subset, denoiser, dataset.concepts, settings.rank, settings.seed)

    def losses(attachment: Attachment) -> Iterator[tuple[Tensor, Tensor]]:
        prompts = Prompts(denoiser, dataset.plan.prompts, attachment, settings.subset)
        for batch in _batches(denoiser, dataset, settings):
            yield _step_loss(denoiser, batch, delta, attachment, prompts, settings)

    return optimize(denoiser, delta, settings, losses, on_progress, on_step)


def optimize(
    denoiser: Denoiser,
    delta: Delta,
    settings: TrainSettings,
    losses: Callable[[Attachment], Iterator[tuple[Tensor, Tensor]]],
    on_progress: ProgressCallback | None,
    on_step: StepHook | None = None,
) -> TrainResult:
    """The loop that all trainings share: AdamW on `delta`, attached to the frozen model.

    Args:
        denoiser: the model.
        delta: where training starts; its tensors are moved.
        settings: steps, learning rate and what else does not depend on the objective.
        losses: gives (objective, what is added to it) of each step, scalars on the model's device. On several
            processes those of this process's rows, of which the sum over processes is meant (`parallel`).
        on_progress: called after each step with the newest loss that was read; raises to cancel.
        on_step: told the number of steps done and the delta as it then is, which moves on: copy what you keep.

    Raises:
        Diverged: the loss became NaN, infinite or far larger than at the start, or the delta NaN or infinite.
        PeerStopped: another process of the job has stopped.
    """
    start = time.perf_counter()
    processes = current()
    delta = trainable(delta, settings.subset)
    parameters = [tensor for layer in delta.layers.values() for tensor in layer.tensors() if tensor.requires_grad]
    processes.begin_alike(parameters)
    gradients = Gradients(parameters, processes)
    peak = settings.learning_rate * (LEARNING_RATE_FACTOR if settings.rank else 1.0)
    optimizer = _adamw(parameters, peak, denoiser.device)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings))
    reporter = Reporter(on_progress, PHASE, settings.steps)
    read: list[float] = []
    unread: list[Tensor] = []
    checkpointed = denoiser.checkpointed() if settings.checkpointing else contextlib.nullcontext()
    with torch.enable_grad(), _frozen(denoiser), checkpointed, delta.attach(denoiser) as attachment:
        for step, (objective, extra) in enumerate(losses(attachment)):
            unread.append(objective.detach())
            if step % _read_every(denoiser.device) == 0 or step == settings.steps - 1:
                read += processes.sum(torch.stack(unread)).tolist()
                _check(read, len(unread))
                unread.clear()
            optimizer.zero_grad(set_to_none=True)
            gradients.clear()
            ((objective + extra) * denoiser.gradient_scale).backward()
            gradients.reduce()
            if denoiser.gradient_scale != 1:
                for parameter in parameters:
                    if parameter.grad is not None:
                        parameter.grad.div_(denoiser.gradient_scale)
            nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            optimizer.step()
            schedule.step()
            if on_step is not None:
                on_step(step + 1, delta.map(lambda tensor: tensor.detach()))
            reporter.advance(loss=read[-1])
    trained = delta.map(lambda tensor: tensor.detach())
    if not torch.isfinite(trained.norm()):
        raise Diverged("Training ended in NaN or infinity: lower the learning rate and train again.")
    return TrainResult(trained, tuple(read), time.perf_counter() - start)


class Prompts:
    """Conditioning of the dataset's prompts: encoded once, except where the delta edits the text encoder."""

    def __init__(self, denoiser: Denoiser, prompts: tuple[str, ...], attachment: Attachment, subset: str) -> None:
        self._denoiser = denoiser
        self._prompts = prompts
        self._edited = subset == "embedding"
        with torch.no_grad(), attachment.disabled():
            self.pretrained = denoiser.encode(prompts)

    def student(self, index: Tensor) -> Conditioning:
        """As the edited model sees the prompts, with gradients where the text encoder is edited.

        Args:
            index: which prompts, [B]. Given on the CPU, no device has to be waited for.
        """
        if not self._edited:
            return self.pretrained[sent(index, self._denoiser.device)]
        distinct, inverse = torch.unique(index, return_inverse=True)
        encoded = self._denoiser.encode([self._prompts[i] for i in distinct.tolist()])
        return encoded[sent(inverse, self._denoiser.device)]


def _step_loss(
    denoiser: Denoiser,
    batch: _Batch,
    delta: Delta,
    attachment: Attachment,
    prompts: Prompts,
    settings: TrainSettings,
) -> tuple[Tensor, Tensor]:
    """(the objective, preservation and regularization with their weights), scalars: this process's part of each."""
    processes, count = current(), batch.ablating
    ablating, preserving = batch.of_all
    student = denoiser.direction(batch.x, batch.sigma, prompts.student(batch.target))
    teacher = _teacher(denoiser, batch, attachment, prompts, settings)
    ablated = student[:count]
    truth = true_direction(batch.x, batch.sigma, batch.x0)
    if settings.objective == "noise":
        objective = processes.part(noise_based(ablated, truth[:count]), count, ablating)
    elif settings.objective == "loss-max":
        # not linear in the mean over rows: every process has the whole of it
        loss = processes.total(processes.part(noise_based(ablated, truth[:count]), count, ablating))
        objective = loss_maximization(loss, delta.norm(), settings.distance_weight) / processes.size
    else:
        objective = processes.part(model_based(ablated, teacher[:count]), count, ablating)
    extra = torch.zeros((), device=student.device)
    if count < len(batch.x):
        preserved = processes.part(model_based(student[count:], teacher[count:]), len(batch.x) - count, preserving)
        extra = extra + settings.preserve_weight * preserved
    if settings.regularization and count:
        anchor = denoiser.direction(batch.x[:count], batch.sigma[:count], prompts.student(batch.anchor[:count]))
        extra = extra + settings.regularization * processes.part(noise_based(anchor, truth[:count]), count, ablating)
    return objective, extra


@torch.no_grad()
def _teacher(
    denoiser: Denoiser, batch: _Batch, attachment: Attachment, prompts: Prompts, settings: TrainSettings
) -> Tensor:
    """d for the anchor prompts, [B, C, h, w]; rows that the objective does not compare with a teacher are 0."""
    count = batch.ablating
    needed = slice(count if settings.objective in ("noise", "loss-max") else 0, None)
    teacher = torch.zeros_like(batch.x)
    if settings.objective == "model-self" and count:
        own = prompts.student(batch.anchor[:count])
        teacher[:count] = denoiser.direction(batch.x[:count], batch.sigma[:count], own)
        needed = slice(count, None)
    if len(batch.x[needed]):
        with attachment.disabled():
            cond = prompts.pretrained[batch.anchor[needed]]
            teacher[needed] = denoiser.direction(batch.x[needed], batch.sigma[needed], cond)
            if settings.negative_guidance and count:
                asked = prompts.pretrained[batch.target[:count]]
                target = denoiser.direction(batch.x[:count], batch.sigma[:count], asked)
                teacher[:count] = guided_away(teacher[:count], target, settings.negative_guidance)
    return teacher


def _batches(denoiser: Denoiser, dataset: AblationDataset, settings: TrainSettings) -> Iterator[_Batch]:
    """The rows of each step: reshuffled passes through the dataset, t uniform, fresh noise."""
    processes = current()
    generator = torch.Generator().manual_seed(settings.seed)
    preserving = dataset.preserving
    ablate = shuffled(preserving.logical_not().nonzero().flatten(), settings.batch, generator)
    preserve = shuffled(preserving.nonzero().flatten(), settings.preserve_batch, generator)
    rows = torch.tensor(dataset.plan.rows)
    device = denoiser.device
    for _ in range(settings.steps):
        chosen = torch.cat((next(ablate), next(preserve)))
        x0 = dataset.latents[chosen]
        if settings.flip:
            mirrored = torch.rand(len(x0), generator=generator) < 0.5
            x0 = torch.where(mirrored.view(-1, 1, 1, 1), x0.flip(-1), x0)
        level = torch.randint(len(denoiser.sigmas), (len(x0),), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        of_all = settings.batch, len(chosen) - settings.batch
        # drawn for all rows, so that they do not depend on who has which
        chosen, x0, level, noise = (processes.mine(tensor) for tensor in (chosen, x0, level, noise))
        x0, noise, sigma = x0.to(device), noise.to(device), denoiser.sigmas[level].to(device)
        anchor, target = rows[chosen].to(device).unbind(1)
        x = denoiser.add_noise(x0, noise, sigma)
        yield _Batch(x0, x, sigma, anchor, target, processes.count(settings.batch), of_all)


def _adamw(parameters: list[Tensor], rate: float, device: torch.device) -> torch.optim.AdamW:
    """AdamW, as one kernel where PyTorch has one for the device."""
    # That kernel takes a gradient to lie in memory as its parameter does, and on a CPU it does not check. Autograd
    # makes it so; a gradient that is a view of a buffer is contiguous.
    fused = device.type in ("cuda", "cpu") and all(parameter.is_contiguous() for parameter in parameters)
    try:
        # None lets PyTorch choose between its other implementations
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=fused or None)
    except RuntimeError:
        # before PyTorch 2.4 there was none for the CPU
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)


@contextlib.contextmanager
def _frozen(denoiser: Denoiser) -> Iterator[None]:
    """Keep gradients out of the model's own weights, and put its flags back however the block ends."""
    modules = [module for module in (denoiser.network, denoiser.text_network) if module is not None]
    flags = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _rate(step: int, settings: TrainSettings) -> float:
    """Share of the learning rate at a step."""
    if not settings.cosine:
        return 1.0
    warm_up = max(1, settings.steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, settings.steps - warm_up)))


def _read_every(device: torch.device) -> int:
    """Steps between readings of the loss: each one makes the host wait for a GPU."""
    return 1 if device.type == "cpu" else 10


def _check(losses: list[float], new: int) -> None:
    """Stop as soon as training has gone wrong: nothing that it made would be worth keeping. The last `new` losses have
    not been checked yet.
    """
    # a loss that begins near 0 may grow a lot and mean nothing
    limit = _DIVERGED_FACTOR * max(losses[0], 1e-3)
    for step in range(len(losses) - new, len(losses)):
        if not math.isfinite(losses[step]) or losses[step] > limit:
            raise Diverged(
                f"Training diverged at step {step + 1} (loss {losses[step]:.3g}): lower the learning rate and train "
                "again."
            )
