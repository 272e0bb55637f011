"""The deltas of a benchmark: each is made once and kept, with the checkpoints of its training."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import dataset, delta_file, trainer
from ..ablation import Task as Ablated
from ..ablation import ablate, check_tasks, header, neighbours_of
from ..concept import Concept
from ..dataset import AblationDataset
from ..delta import Delta
from ..errors import AblationError, Diverged
from ..files import write_json
from ..paraphrases import choose, keep_unlike, rank
from ..presets import Recipe
from ..samplers import draw_images
from ..tasks import ListedTask
from .bench import Bench
from .pace import sampling_rows, training_rows
from .plan import IMAGE_PRESETS, RANKED_CAPTIONS, RANKED_IMAGES, Edit, digest, edit_key
from .units import captions

_INFO = "edit.json"
_RANKING_SEEDS = 100_000
"""How far the seeds of the ranking lie from those of the evaluation."""


@dataclass(frozen=True)
class Made:
    """An edit as it is stored."""

    folder: Path
    info: dict[str, Any]
    """seconds by phase; losses; dropped (anchor images that were copies); captions; diverged (why, or None)."""

    def delta(self, step: int | None = None) -> Delta | None:
        """The finished delta, or that after so many steps; None if training diverged before."""
        path = self.folder / _file(step)
        return delta_file.load(path) if path.is_file() else None


def edit_folder(bench: Bench, edit: Edit) -> Path:
    """Where an edit is kept."""
    return bench.store.cache("deltas", edit_key(edit, bench.recipe(edit), bench.tools, bench.protocol))


def is_made(bench: Bench, edit: Edit) -> bool:
    """Whether `make` has nothing to do."""
    return (edit_folder(bench, edit) / _INFO).is_file()


@contextlib.contextmanager
def reserved(bench: Bench, edit: Edit | None) -> Iterator[bool]:
    """Whether an edit is made or may be made here; if so, nobody else makes it until the block ends."""
    if edit is None or is_made(bench, edit):
        yield True
        return
    with bench.store.claimed(edit_folder(bench, edit).name) as ours:
        yield ours


def make(bench: Bench, edit: Edit) -> Made:
    """Make an edit, or take it from the folder.

    Raises:
        AblationError: as `ablation.ablate`, but no `Diverged`: what was trained until then is kept.
        Interrupted: the time is up, or would not be enough.
    """
    folder = edit_folder(bench, edit)
    try:
        return Made(folder, json.loads((folder / _INFO).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        info = _make(bench, edit, folder)
        write_json(folder / _INFO, info)
        return Made(folder, info)


def dataset_folder(bench: Bench, made: Recipe, tasks: Sequence[ListedTask]) -> Path:
    """Where what an edit is trained on is kept: one folder for all methods that train on the same images or rows.

    `tasks` are those of the edit, with the captions that were chosen for them.
    """
    settings = made.dataset or made.harvest
    drawn = {
        "model": bench.tools.model,
        "setup": bench.denoiser.setup(),
        "prompts": bench.tools.prompts,
        "concepts": [(asdict(task.concept), task.surrounding) for task in tasks],
        "settings": asdict(settings) if settings else None,
        "harvested": made.harvest is not None,
        "auto_preserve": made.auto_preserve,
    }
    return bench.store.cache("datasets", digest(drawn))


def _make(bench: Bench, edit: Edit, folder: Path) -> dict[str, Any]:
    made, start = bench.recipe(edit), time.perf_counter()
    chosen = [replace(task, concept=_ranked(bench, task)) if edit.method.ranked else task for task in edit.tasks]
    info: dict[str, Any] = {"diverged": None, "seconds": {"ranking": time.perf_counter() - start}, "losses": []}
    info["captions"] = [asdict(task.concept) for task in chosen] if edit.method.ranked else None
    try:
        if edit.method.preset in IMAGE_PRESETS:
            delta, found = _trained(bench, edit, made, chosen, folder)
        else:
            delta, found = _ablated(bench, made, chosen)
        _require_finite(delta)
    except Diverged as error:
        return {**info, "diverged": str(error)}
    delta_file.save(delta, folder / _file(None))
    return {**info, **found, "seconds": {**info["seconds"], **found["seconds"]}}


def _ablated(bench: Bench, made: Recipe, tasks: Sequence[ListedTask]) -> tuple[Delta, dict[str, Any]]:
    """An edit by a preset that harvests rows or trains nothing, and what is to be known of it."""
    bench.pace.require(training_rows(made))
    ablation = ablate(
        bench.denoiser,
        [Ablated(task.concept, task.surrounding) for task in tasks],
        made,
        directory=dataset_folder(bench, made, tasks),
        on_progress=bench.progress,
    )
    return ablation.delta, {"seconds": ablation.seconds, "losses": _rounded(ablation.losses)}


def _trained(
    bench: Bench, edit: Edit, made: Recipe, tasks: Sequence[ListedTask], folder: Path
) -> tuple[Delta, dict[str, Any]]:
    """The same by a preset that trains on images: without those that are copies, and with checkpoints."""
    if made.dataset is None or made.training is None:
        raise ValueError(f"the preset {edit.method.preset} does not train on images")
    ablated, concepts = [Ablated(task.concept, task.surrounding) for task in tasks], [task.concept for task in tasks]
    check_tasks(ablated)
    start = time.perf_counter()
    found = neighbours_of(bench.denoiser, ablated, made)
    surrounding = [(*task.surrounding, *names) for task, names in zip(ablated, found, strict=True)]
    data = dataset.build(
        bench.denoiser,
        concepts,
        made.dataset,
        surrounding=surrounding,
        directory=dataset_folder(bench, made, tasks),
        on_progress=bench.progress,
    )
    data, dropped = without_copies(bench, tasks, data)
    seconds = {"draw": time.perf_counter() - start}
    bench.pace.require(training_rows(made))
    wanted = set(bench.protocol.checkpoints) if edit.method.constant_rate else set()

    def keep(step: int, delta: Delta) -> None:
        if step in wanted:
            _require_finite(delta)
            delta_file.save(delta, folder / _file(step))

    result = trainer.train(bench.denoiser, data, made.training, bench.progress, keep)
    delta = replace(result.delta, metadata=header(bench.denoiser, concepts, surrounding, data, made))
    seconds["train"] = result.seconds
    return delta, {"seconds": seconds, "losses": _rounded(result.losses), "dropped": dropped}


def without_copies(bench: Bench, tasks: Sequence[ListedTask], data: AblationDataset) -> tuple[AblationDataset, int]:
    """The dataset without anchor images that are copies of a memorized image of `tasks` (section 3.3), and how many
    they were. Rows that preserve stay.

    Raises:
        AblationError: all of them are copies.
    """
    originals = [image for task in tasks if (image := bench.original(task)) is not None]
    if not originals or bench.detector is None or data.settings.source != "anchor":
        return data, 0
    images = np.concatenate(
        [
            (bench.denoiser.vae.decode(part.to(bench.denoiser.device)).permute(0, 2, 3, 1) * 255)
            .round()
            .to("cpu", torch.uint8)
            .numpy()
            for part in data.latents.split(bench.batch)
        ]
    )
    kept = np.logical_and.reduce([keep_unlike(images, original, bench.detector) for original in originals])
    kept |= data.preserving.numpy()
    if not (kept & ~data.preserving.numpy()).any():
        raise AblationError("Every anchor image reproduces the memorized image: choose other anchor prompts.")
    rows = tuple(row for row, keep in zip(data.plan.rows, kept, strict=True) if keep)
    latents = data.latents[torch.from_numpy(kept)]
    return replace(data, latents=latents, plan=replace(data.plan, rows=rows)), int((~kept).sum())


def ranking_rows(bench: Bench, task: ListedTask) -> int:
    """Rows of choosing the captions of a memorized image."""
    return sampling_rows(len(_rankable(task)) * RANKED_IMAGES, bench.protocol.sample)


def _ranked(bench: Bench, task: ListedTask) -> Concept:
    """The concept with the captions that the paper's pipeline chooses; kept in the folder."""
    original = bench.original(task)
    if original is None or bench.detector is None:
        raise AblationError(f"Captions of {task.name} cannot be ranked without its picture and a copy detector.")
    key = {"model": bench.tools.model, "detector": bench.detector.name, "prompts": _rankable(task)}
    picture, sample = bench.tools.pictures.get(task.picture or ""), asdict(bench.protocol.sample)
    path = bench.store.cache("captions", digest([key, picture, sample])) / "concept.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        return Concept(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        bench.pace.check()
        return draw_images(bench.denoiser, prompts, seeds, bench.protocol.sample, batch=bench.batch)

    first = bench.protocol.first_seed + _RANKING_SEEDS
    ranked = rank(_rankable(task), draw, bench.detector, original, RANKED_IMAGES, first)
    concept = choose(task.concept.target, ranked)
    write_json(path, asdict(concept))
    return concept


def _rankable(task: ListedTask) -> tuple[str, ...]:
    return captions(task)[0][:RANKED_CAPTIONS]


def _require_finite(delta: Delta) -> None:
    if not torch.isfinite(delta.rounded(torch.float16).norm()):
        raise Diverged("The delta grew beyond what its file can hold.")


def _rounded(losses: Sequence[float]) -> list[float]:
    return [round(loss, 6) for loss in losses]


def _file(step: int | None) -> str:
    return "delta.safetensors" if step is None else f"step-{step:05d}.safetensors"
