"""The whole job, as every face runs it: dataset, training, delta file, evaluation, report."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from . import dataset, delta_file, trainer
from .concept import Concept
from .delta import Delta
from .delta_header import delta_header
from .denoiser import Denoiser
from .errors import AblationError
from .evaluation import Evaluation, EvaluationSettings, evaluate, make_jobs, roles
from .files import require_writable
from .instruments import Instruments
from .metrics import Judge
from .presets import Recipe
from .progress import ProgressCallback
from .report import ReportInputs, delta_info, write_report
from .screening import Screen
from .subsets import select

DELTA_FILE = "delta.safetensors"


@dataclass(frozen=True)
class Task:
    """A concept to ablate and the neighbours that must stay."""

    concept: Concept
    surrounding: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ablation:
    """A delta and how it came about."""

    delta: Delta
    """As its file gives it back: rounded to fp16."""
    losses: tuple[float, ...]
    seconds: dict[str, float]


def ablate(
    denoiser: Denoiser,
    tasks: Sequence[Task],
    recipe: Recipe,
    *,
    directory: Path | None = None,
    screen: Screen | None = None,
    on_progress: ProgressCallback | None = None,
) -> Ablation:
    """Build the dataset of the tasks and train a delta on it.

    Args:
        denoiser: the pretrained model.
        tasks: one or several concepts for one delta.
        recipe: settings of the dataset and the training.
        directory: where to keep the dataset, so that a run that was killed goes on; None keeps it in memory.
        screen: keeps copies of memorized images out of the dataset.
        on_progress: called after each step; raises to cancel.

    Raises:
        AblationError: bad input, a folder that cannot be written, a diverged training.
    """
    check_tasks(tasks)
    concepts = [task.concept for task in tasks]
    select(recipe.training.subset, denoiser)
    start = time.perf_counter()
    data = dataset.build(
        denoiser,
        concepts,
        recipe.dataset,
        surrounding=[task.surrounding for task in tasks],
        directory=directory,
        screen=screen,
        on_progress=on_progress,
    )
    built = time.perf_counter()
    made = finish(denoiser, data, recipe.training, trainer.train(denoiser, data, recipe.training, on_progress))
    return replace(made, seconds={"dataset": built - start, **made.seconds})


def finish(
    denoiser: Denoiser, data: dataset.AblationDataset, settings: trainer.TrainSettings, result: trainer.TrainResult
) -> Ablation:
    """What a training made, as its file will give it back: rounded, with the header that says where it comes from."""
    recipe = Recipe(data.settings, settings)
    delta = replace(result.delta.rounded(torch.float16), metadata=header(denoiser, data, recipe))
    return Ablation(delta, result.losses, {"training": result.seconds})


def check_tasks(tasks: Sequence[Task]) -> None:
    """Raise AblationError if one task would keep, or draw instead, what it or another one removes."""
    targets = {task.concept.target.casefold() for task in tasks}
    if len(targets) < len(tasks):
        raise AblationError("A target is named twice: give each target once.")
    for task in tasks:
        for name, role in roles(task.concept, task.surrounding)[1:]:
            if name.casefold() in targets:
                wanted = "the anchor of" if role == "anchor" else "to be preserved beside"
                raise AblationError(
                    f"'{name}' is {wanted} '{task.concept.target}' and a target itself: take it out of one of the two."
                )


def ablate_and_report(
    denoiser: Denoiser,
    tasks: Sequence[Task],
    recipe: Recipe,
    judge: Judge,
    evaluation: EvaluationSettings,
    output: Path,
    on_progress: ProgressCallback | None = None,
    *,
    instruments: Instruments | None = None,
) -> Evaluation:
    """Ablate, save `delta.safetensors` in `output`, evaluate it and write the report beside it.

    Where `instruments` have memorized images, no copy of these is trained on.

    Raises:
        AblationError: as `ablate`, and an output folder that cannot be written (found before any work is done).
    """
    concepts, surrounding = [task.concept for task in tasks], [task.surrounding for task in tasks]
    make_jobs(denoiser, concepts, surrounding, evaluation)
    require_writable(output)
    instruments = instruments or Instruments()
    screen = screen_of(instruments)
    made = ablate(denoiser, tasks, recipe, directory=output / "dataset", screen=screen, on_progress=on_progress)
    delta_file.save(made.delta, output / DELTA_FILE)
    found = evaluate(denoiser, made.delta, concepts, surrounding, judge, evaluation, on_progress, instruments)
    write_report(output, report_inputs(denoiser, tasks, output / DELTA_FILE, found, recipe=recipe, made=made))
    return found


def screen_of(instruments: Instruments) -> Screen | None:
    """What keeps copies of the memorized images of `instruments` out of a dataset; None if there are none."""
    if instruments.detector is None or not instruments.originals:
        return None
    return Screen(instruments.detector, tuple(instruments.originals.values()))


def report_inputs(
    denoiser: Denoiser,
    tasks: Sequence[Task],
    delta_path: Path | None,
    evaluation: Evaluation,
    *,
    recipe: Recipe | None = None,
    made: Ablation | None = None,
) -> ReportInputs:
    """What a report is made of; without `recipe` and `made` for a delta that was trained in another run, without
    `delta_path` for an edit that is in no delta file.
    """
    return ReportInputs(
        evaluation=evaluation,
        concepts=tuple(task.concept for task in tasks),
        delta=None if delta_path is None else delta_info(delta_path),
        losses=made.losses if made else (),
        seconds=made.seconds if made else {},
        settings=asdict(recipe) if recipe else {},
        model=denoiser.name,
    )


def header(denoiser: Denoiser, data: dataset.AblationDataset, recipe: Recipe) -> dict[str, str]:
    """The header of a delta file: ModelSpec 1.0.1 fields and our own, all strings."""
    training = recipe.training
    made = {
        "objective": training.objective,
        "subset": training.subset,
        "steps": training.steps,
        "seed": training.seed,
        "dataset_sha256": data.digest(),
        "settings": json.dumps(asdict(recipe)),
    }
    return delta_header(denoiser, data.concepts, data.model, made)
