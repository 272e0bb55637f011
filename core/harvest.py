"""Harvested training rows: what the pretrained model predicts anyway while it samples an anchor image.

Eq. 4 of the paper compares teacher and student at points x_t drawn from p(x_t | c), which it approximates by noising
finished images. The path of a sampler from noise to an image passes through such points, and at each of them the
conditional branch of guidance has just computed the teacher. Keeping (x, sigma, d) with d = (x - D(x; sigma, c)) /
sigma gives rows that need no autoencoder, no noise and no teacher pass (`harvest_training`). Prompts that are to stay
are harvested in the same way: their target prompt is the prompt itself.

On disk a harvest is a folder of shards, one for each batch of trajectories, which can be finished after a kill.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import shards
from .concept import Concept
from .dataset import DatasetSettings, Plan, make_plan
from .denoiser import Denoiser
from .errors import AblationError
from .losses import check_guidance, guided_away
from .progress import ProgressCallback, Reporter
from .samplers import SampleSettings, sample_latents

_FORMAT = 1


@dataclass(frozen=True)
class HarvestSettings:
    """How many trajectories are sampled and which of their steps are kept."""

    trajectories: int = 64
    """Trajectories per concept to be ablated."""
    preserve: int = 0
    """Trajectories per concept that preserve its anchor and surrounding concepts."""
    prompts: int = 200
    """Distinct prompt pairs per concept; trajectories go round them."""
    keep: tuple[int, ...] = ()
    """Which sampling steps give rows, the noisiest being 0; () keeps all."""
    sample: SampleSettings = field(default_factory=lambda: SampleSettings(steps=15))
    negative_guidance: float = 0.0
    """eta of `losses.guided_away`, for rows that ablate. Above 0 each takes one more row through the network."""
    batch: int = 16
    """Trajectories sampled at once, which is also the size of a shard."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.trajectories < 1 or self.prompts < 1 or self.batch < 1 or self.preserve < 0:
            raise AblationError("A harvest needs at least one trajectory, one prompt and a batch size of at least 1.")
        check_guidance(self.negative_guidance)
        if list(self.keep) != sorted(set(self.keep) & set(range(self.sample.steps))):
            raise AblationError(
                f"The steps to keep must be different numbers from 0 to {self.sample.steps - 1} in ascending order, "
                f"not {', '.join(map(str, self.keep))}."
            )

    @property
    def kept(self) -> tuple[int, ...]:
        """The steps that give rows."""
        return self.keep or tuple(range(self.sample.steps))

    @property
    def sizes(self) -> DatasetSettings:
        """A dataset of images with the same plan."""
        return DatasetSettings(images=self.trajectories, preserve=self.preserve, prompts=self.prompts)


@dataclass(frozen=True)
class Harvest:
    """A complete harvest in memory, on the CPU. Rows are sorted by trajectory, within one by step.

    Attributes:
        x: where the teacher was asked, [rows, C, h, w], fp32.
        sigma: its noise levels, [rows], fp32.
        prediction: d = (x - D) / sigma of the pretrained model for the anchor prompt, without the sampler's guidance,
            [rows, C, h, w], fp16; with negative guidance guided away from the target prompt.
        plan: the prompts of each trajectory.
        settings: how it was made.
        concepts: what it ablates.
        surrounding: for each concept, the names that it preserves beside the anchor.
        model: fingerprint of the model.
    """

    x: Tensor
    sigma: Tensor
    prediction: Tensor
    plan: Plan
    settings: HarvestSettings
    concepts: tuple[Concept, ...]
    surrounding: tuple[tuple[str, ...], ...]
    model: str

    @property
    def pairs(self) -> Tensor:
        """(anchor prompt, target prompt) of each row, indices into `plan.prompts`, int64 [rows, 2]."""
        return torch.tensor(self.plan.rows).repeat_interleave(len(self.settings.kept), 0)

    @property
    def preserving(self) -> Tensor:
        """Which rows preserve instead of ablate, bool [rows]."""
        anchor, target = self.pairs.unbind(1)
        return anchor == target

    def digest(self) -> str:
        """SHA-256 of the plan and the rows, in hexadecimal."""
        digest = hashlib.sha256(json.dumps(asdict(self.plan)).encode())
        for tensor in (self.x, self.sigma, self.prediction):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def harvest(
    denoiser: Denoiser,
    concepts: Sequence[Concept],
    settings: HarvestSettings,
    *,
    surrounding: Sequence[Sequence[str]] | None = None,
    directory: Path | None = None,
    on_progress: ProgressCallback | None = None,
) -> Harvest:
    """Sample the anchor prompts of `concepts` and keep what the model predicts on the way, or finish `directory`.

    Args:
        denoiser: the pretrained model, with no delta of this ablation attached.
        concepts: what to ablate; several concepts give the union of their rows.
        settings: sizes, sampler and steps.
        surrounding: names to preserve, for each concept.
        directory: where to keep it; None keeps it in memory only.
        on_progress: called after each sampling step of each batch; raises to cancel.

    Raises:
        AblationError: `directory` holds another dataset or cannot be written, or the model gave NaN or infinity.
    """
    held = tuple(map(tuple, surrounding or [()] * len(concepts)))
    plan = make_plan(concepts, held, denoiser.prompt_source, settings.sizes)
    model = denoiser.fingerprint()
    batches = shards.ranges(len(plan.rows), settings.batch)
    shards.claim(directory, _manifest(denoiser, plan, settings, concepts, held, model))
    reporter = Reporter(on_progress, "Harvesting", len(batches) * settings.sample.steps)

    def sampled(number: int) -> dict[str, Tensor]:
        pairs = [
            (plan.prompts[anchor], plan.prompts[target]) for anchor, target in (plan.rows[i] for i in batches[number])
        ]
        seeds = [_trajectory_seed(settings.seed, row) for row in batches[number]]
        return _sample(denoiser, pairs, seeds, settings, reporter)

    counts = [len(rows) * len(settings.kept) for rows in batches]
    shapes = [
        dict.fromkeys(("x", "prediction"), (count, *denoiser.latent_shape)) | {"sigma": (count,)} for count in counts
    ]
    parts = shards.complete(directory, shapes, sampled, lambda: reporter.advance(settings.sample.steps))
    rows_of = {name: torch.cat([part[name] for part in parts]) for name in ("x", "sigma", "prediction")}
    return Harvest(**rows_of, plan=plan, settings=settings, concepts=tuple(concepts), surrounding=held, model=model)


def load(directory: Path) -> Harvest:
    """Read a complete harvest.

    Raises:
        AblationError: it is missing, incomplete or damaged, or the folder holds a dataset of images.
    """
    manifest = shards.read_manifest(directory)
    if manifest is None or "keep" not in manifest.get("settings", {}):
        raise AblationError(f"{directory} holds no harvest: make one there first.")
    told = manifest["settings"]
    settings = HarvestSettings(**{**told, "keep": tuple(told["keep"]), "sample": SampleSettings(**told["sample"])})
    plan = Plan(tuple(manifest["prompts"]), tuple((anchor, target) for anchor, target in manifest["rows"]))
    names = ("x", "sigma", "prediction")
    parts = shards.read_all(directory, names)
    if sum(len(x) for x, *_ in parts) != len(plan.rows) * len(settings.kept):
        raise AblationError(f"The harvest in {directory} is not finished: run it again to complete it.")
    rows_of = {name: torch.cat(tensors) for name, tensors in zip(names, zip(*parts, strict=True), strict=True)}
    return Harvest(
        **rows_of,
        plan=plan,
        settings=settings,
        concepts=shards.read_concepts(manifest["concepts"]),
        surrounding=tuple(map(tuple, manifest["surrounding"])),
        model=manifest["model"],
    )


@torch.no_grad()
def _sample(
    denoiser: Denoiser,
    pairs: Sequence[tuple[str, str]],
    seeds: Sequence[int],
    settings: HarvestSettings,
    reporter: Reporter,
) -> dict[str, Tensor]:
    """The rows of one batch of trajectories, sorted by trajectory. `pairs` has the anchor and target prompt of each."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    step = 0
    ablating = [place for place, (anchor, target) in enumerate(pairs) if anchor != target]
    targets = None
    if settings.negative_guidance and ablating:
        targets = denoiser.encode([pairs[place][1] for place in ablating])

    def keep(x: Tensor, sigma: Tensor, denoised: Tensor) -> None:
        nonlocal step
        if step in settings.kept:
            direction = (x - denoised) / sigma.view(-1, 1, 1, 1)
            if targets is not None:
                target = denoiser.direction(x[ablating], sigma[ablating], targets)
                direction[ablating] = guided_away(direction[ablating], target, settings.negative_guidance)
            seen.append((x.float(), sigma.float(), direction.half()))
        step += 1

    anchors = [anchor for anchor, _ in pairs]
    sample_latents(
        denoiser, anchors, seeds, settings.sample, lambda done: reporter.advance(latents=done.denoised), keep
    )
    x, sigma, prediction = (torch.stack(kind, 1).flatten(0, 1).cpu() for kind in zip(*seen, strict=True))
    if not torch.isfinite(prediction).all():
        raise AblationError("The model gave NaN or infinity while sampling: load it in a higher precision (fp32).")
    return {"x": x, "sigma": sigma, "prediction": prediction}


def _manifest(
    denoiser: Denoiser,
    plan: Plan,
    settings: HarvestSettings,
    concepts: Sequence[Concept],
    surrounding: Sequence[Sequence[str]],
    model: str,
) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "model": model,
        "setup": denoiser.setup(),
        "concepts": shards.describe_concepts(concepts),
        "surrounding": surrounding,
        "settings": asdict(settings),
        "prompts": plan.prompts,
        "rows": plan.rows,
    }


def _trajectory_seed(seed: int, trajectory: int) -> int:
    """A seed that the images of a dataset and of an evaluation do not share."""
    return int.from_bytes(hashlib.sha256(f"harvest trajectory {seed} {trajectory}".encode()).digest()[:7], "big")
