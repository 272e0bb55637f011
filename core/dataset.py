"""The training set of an ablation: latents that the pretrained model drew, each with its pair of prompts.

Section 3.2 of the paper: tuples (x, c, c*), x drawn from the anchor prompt c (from the target prompt c* for reverse KL
and loss maximization). Rows that preserve a surrounding concept are ordinary tuples whose two prompts are the same.
Images are kept as latents, so neither building nor training needs the autoencoder.

On disk a dataset is a folder: `manifest.json` holds the whole plan (settings, prompts, which row has which) and is
written first; each shard of latents is renamed into place when it is complete. A build that was killed goes on where
it was, and since every row has its own random seed it ends with the same dataset.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from . import shards
from .concept import Concept, pairs, preservation_prompts
from .denoiser import Denoiser
from .errors import AblationError
from .progress import ProgressCallback, Reporter
from .prompts import PromptSource
from .samplers import SampleSettings, sample_latents
from .screening import Screen, require_enough

_FORMAT = 1


@dataclass(frozen=True)
class DatasetSettings:
    """How large a dataset is and how its images are drawn."""

    images: int = 200
    """Images per concept to be ablated."""
    preserve: int = 0
    """Images per concept that preserve its anchor and surrounding concepts."""
    prompts: int = 200
    """Distinct prompt pairs per concept; images go round them."""
    source: Literal["anchor", "target"] = "anchor"
    """The prompt that the images are drawn from: the target's for reverse KL and loss maximization."""
    sample: SampleSettings = field(default_factory=SampleSettings)
    batch: int = 16
    """Images drawn at once, which is also the size of a shard."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.images < 1 or self.prompts < 1 or self.batch < 1 or self.preserve < 0:
            raise AblationError("A dataset needs at least one image, one prompt and a batch size of at least 1.")


@dataclass(frozen=True)
class Plan:
    """Which image is drawn from which prompt and trained with which pair; indices point into `prompts`."""

    prompts: tuple[str, ...]
    rows: tuple[tuple[int, int], ...]
    """(anchor prompt, target prompt) of each row; equal for rows that preserve."""


@dataclass(frozen=True)
class AblationDataset:
    """A complete dataset in memory.

    Attributes:
        latents: [rows, C, h, w], fp32.
        plan: the prompts of each row.
        settings: how it was made.
        concepts: what it ablates.
        model: fingerprint of the model that drew it.
    """

    latents: Tensor
    plan: Plan
    settings: DatasetSettings
    concepts: tuple[Concept, ...]
    model: str

    @property
    def preserving(self) -> Tensor:
        """Which rows preserve instead of ablate, bool [rows]."""
        return torch.tensor([anchor == target for anchor, target in self.plan.rows])

    def digest(self) -> str:
        """SHA-256 of the plan and the latents, in hexadecimal."""
        digest = hashlib.sha256(json.dumps(asdict(self.plan)).encode())
        digest.update(self.latents.half().contiguous().numpy().tobytes())
        return digest.hexdigest()


def make_plan(
    concepts: Sequence[Concept],
    surrounding: Sequence[Sequence[str]],
    source: PromptSource,
    settings: DatasetSettings,
) -> Plan:
    """Decide every row before anything is drawn.

    Args:
        concepts: what to ablate.
        surrounding: for each concept, the names to preserve beside its anchor.
        source: prompt templates.
        settings: sizes.
    """
    texts: list[tuple[str, str]] = []
    for concept, neighbours in zip(concepts, surrounding, strict=True):
        others = [other for other in concepts if other is not concept]
        prompt_pairs = pairs(concept, source, settings.prompts, others)
        texts += [(p.anchor, p.target) for p in _cycle(prompt_pairs, settings.images)]
        if settings.preserve:
            names = [concept.anchor, *neighbours]
            held = preservation_prompts(names, concept, source, settings.preserve, others)
            texts += [(prompt, prompt) for prompt in _cycle(held, settings.preserve)]
    prompts = tuple(dict.fromkeys(text for row in texts for text in row))
    index = {prompt: i for i, prompt in enumerate(prompts)}
    return Plan(prompts, tuple((index[anchor], index[target]) for anchor, target in texts))


def build(
    denoiser: Denoiser,
    concepts: Sequence[Concept],
    settings: DatasetSettings,
    *,
    surrounding: Sequence[Sequence[str]] | None = None,
    directory: Path | None = None,
    screen: Screen | None = None,
    on_progress: ProgressCallback | None = None,
) -> AblationDataset:
    """Draw the dataset of `concepts` with the pretrained model, or finish the one in `directory`.

    Args:
        denoiser: the pretrained model, with no delta of this ablation attached.
        concepts: what to ablate; several concepts give the union of their tuples.
        settings: sizes and sampler.
        surrounding: names to preserve, for each concept.
        directory: where to keep it; None keeps it in memory only.
        screen: keeps copies of memorized images out: they are drawn again, and left out if they stay copies. It has
            no say over images of the target, which are such copies by design.
        on_progress: called after each sampling step of each batch.

    Raises:
        AblationError: `directory` holds another dataset, or cannot be written, or too few images are no copies.
    """
    if settings.source == "target":
        screen = None
    plan = make_plan(concepts, surrounding or [()] * len(concepts), denoiser.prompt_source, settings)
    model = denoiser.fingerprint()
    batches = shards.ranges(len(plan.rows), settings.batch)
    shards.claim(directory, _manifest(denoiser, plan, settings, concepts, model, screen))
    reporter = Reporter(on_progress, "Drawing the dataset", len(batches) * settings.sample.steps)
    column = 0 if settings.source == "anchor" else 1

    def drawn(number: int) -> dict[str, Tensor]:
        rows = batches[number]
        prompts = [plan.prompts[plan.rows[row][column]] for row in rows]
        found = {"latents": _drawn(denoiser, prompts, rows, settings, reporter)}
        if screen is not None:
            found["kept"] = _screened(denoiser, prompts, rows, settings, screen, found["latents"], reporter)
        return found

    shapes = [
        {"latents": (len(rows), *denoiser.latent_shape)} | ({} if screen is None else {"kept": (len(rows),)})
        for rows in batches
    ]
    parts = shards.complete(directory, shapes, drawn, lambda: reporter.advance(settings.sample.steps))
    latents = torch.cat([part["latents"] for part in parts]).float()
    if screen is not None:
        latents, plan = _kept(latents, plan, torch.cat([part["kept"] for part in parts]), concepts)
    return AblationDataset(latents, plan, settings, tuple(concepts), model)


def load(directory: Path) -> AblationDataset:
    """Read a complete dataset.

    Raises:
        AblationError: it is missing, incomplete or damaged, or the folder holds a harvest.
    """
    manifest = shards.read_manifest(directory)
    if manifest is None or "keep" in manifest.get("settings", {"keep": None}):
        raise AblationError(f"{directory} holds no dataset: build one there first.")
    settings = dict(manifest["settings"])
    settings["sample"] = SampleSettings(**settings["sample"])
    plan = Plan(tuple(manifest["prompts"]), tuple((anchor, target) for anchor, target in manifest["rows"]))
    concepts = shards.read_concepts(manifest["concepts"])
    screened = "screen" in manifest
    parts = shards.read_all(directory, ["latents", "kept"] if screened else ["latents"])
    if sum(len(part[0]) for part in parts) != len(plan.rows):
        raise AblationError(f"The dataset in {directory} is not finished: run the build again to complete it.")
    latents = torch.cat([part[0] for part in parts]).float()
    if screened:
        latents, plan = _kept(latents, plan, torch.cat([part[1] for part in parts]), concepts)
    return AblationDataset(latents, plan, DatasetSettings(**settings), concepts, manifest["model"])


def _drawn(
    denoiser: Denoiser,
    prompts: Sequence[str],
    rows: Sequence[int],
    settings: DatasetSettings,
    reporter: Reporter,
    attempt: int = 0,
) -> Tensor:
    """Latents of some rows, fp16 on the CPU also in memory: a dataset is the same whether or not it went through a
    file. Only the first attempt counts as progress; each reports, so that it can be cancelled.
    """
    seeds = [_row_seed(settings.seed, row, attempt) for row in rows]
    return (
        sample_latents(
            denoiser,
            prompts,
            seeds,
            settings.sample,
            lambda step: reporter.advance(int(attempt == 0), latents=step.denoised),
        )
        .cpu()
        .half()
    )


def _screened(
    denoiser: Denoiser,
    prompts: Sequence[str],
    rows: Sequence[int],
    settings: DatasetSettings,
    screen: Screen,
    latents: Tensor,
    reporter: Reporter,
) -> Tensor:
    """Draw those of `latents` [B, C, h, w] that are copies again, in place; which of them are none in the end, [B]."""
    kept = screen.passes(denoiser, latents)
    for attempt in range(1, screen.redraws + 1):
        again = (~kept).nonzero().flatten().tolist()
        if not again:
            break
        texts = [prompts[place] for place in again]
        latents[again] = _drawn(denoiser, texts, [rows[place] for place in again], settings, reporter, attempt)
        kept[again] = screen.passes(denoiser, latents[again])
    return kept


def _kept(latents: Tensor, plan: Plan, kept: Tensor, concepts: Sequence[Concept]) -> tuple[Tensor, Plan]:
    """Latents and plan without the rows that a screen left out.

    Raises:
        AblationError: too few are left of a concept, each of which has as many rows as another (`make_plan`).
    """
    block = len(plan.rows) // len(concepts)
    for number, concept in enumerate(concepts):
        own = slice(number * block, (number + 1) * block)
        preserving = [anchor == target for anchor, target in plan.rows[own]]
        require_enough(kept[own].tolist(), preserving, concept.anchor)
    rows = tuple(row for row, passed in zip(plan.rows, kept.tolist(), strict=True) if passed)
    return latents[kept.bool()], Plan(plan.prompts, rows)


def _manifest(
    denoiser: Denoiser,
    plan: Plan,
    settings: DatasetSettings,
    concepts: Sequence[Concept],
    model: str,
    screen: Screen | None,
) -> dict[str, Any]:
    return {
        **({} if screen is None else {"screen": screen.described}),
        "format": _FORMAT,
        "model": model,
        "setup": denoiser.setup(),
        "concepts": shards.describe_concepts(concepts),
        "settings": asdict(settings),
        "prompts": plan.prompts,
        "rows": plan.rows,
    }


def _row_seed(seed: int, row: int, attempt: int = 0) -> int:
    """A seed for one row that neighbouring dataset seeds, rows, attempts and evaluation seeds do not share."""
    text = f"dataset row {seed} {row}" + (f" attempt {attempt}" if attempt else "")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _cycle(items: Sequence[Any], count: int) -> list[Any]:
    return [items[i % len(items)] for i in range(count)]
