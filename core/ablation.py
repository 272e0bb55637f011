"""The whole job, as every face runs it: closed form, dataset, training, delta file, evaluation, report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from . import closed_form, dataset, delta_file, harvest, trainer
from .concept import Concept
from .delta import Delta
from .delta_header import delta_header, metrics_header
from .denoiser import Denoiser
from .errors import AblationError
from .evaluation import Evaluation, EvaluationSettings, evaluate, make_jobs, roles
from .files import require_writable
from .harvest_training import train_harvested
from .instruments import Instruments
from .metrics import Judge
from .neighbours import generic_prompts, nearest
from .parallel import current
from .phases import Meter, Phase
from .presets import Recipe, guided
from .progress import ProgressCallback, Reporter
from .report import ReportInputs, delta_info, write_report
from .screening import Screen
from .subsets import select

DELTA_FILE, DATASET_FOLDER = "delta.safetensors", "dataset"
_ENCODED_AT_ONCE = 32

Data = dataset.AblationDataset | harvest.Harvest
"""What a delta is trained on."""


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
    """Of each training step; none without a training."""
    phases: tuple[Phase, ...]
    """What this run did, in order: "encode", "closed form", "draw" or "harvest", "train", as far as there are such."""
    auto_preserved: tuple[tuple[str, ...], ...] = ()
    """For each task, what was preserved beside the names that the user gave."""

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase."""
        return {phase.name: phase.seconds for phase in self.phases}


def ablate(
    denoiser: Denoiser,
    tasks: Sequence[Task],
    recipe: Recipe,
    *,
    directory: Path | None = None,
    screen: Screen | None = None,
    on_progress: ProgressCallback | None = None,
) -> Ablation:
    """Make a delta for the tasks by whatever the recipe asks for: closed form, drawn or harvested rows, training.

    Args:
        denoiser: the pretrained model.
        tasks: one or several concepts for one delta.
        recipe: how it is made.
        directory: where to keep the dataset, so that a run that was killed goes on; None keeps it in memory.
        screen: keeps copies of memorized images out of the dataset.
        on_progress: called after each step; raises to cancel.

    Raises:
        AblationError: bad input, a folder that cannot be written, a diverged training.
    """
    check_tasks(tasks)
    concepts = [task.concept for task in tasks]
    check_screen(recipe, screen)
    select(recipe.subset, denoiser)
    meter = Meter(denoiser)
    with meter.phase("encode"):
        chosen = neighbours_of(denoiser, tasks, recipe)
        surrounding = [(*task.surrounding, *names) for task, names in zip(tasks, chosen, strict=True)]
        _encode(denoiser, concepts, surrounding, recipe, on_progress)
    start = _closed_form(denoiser, concepts, surrounding, recipe, meter, on_progress)
    data = None
    if recipe.harvest is not None:
        with meter.phase("harvest"):
            data = harvest.harvest(
                denoiser,
                concepts,
                recipe.harvest,
                surrounding=surrounding,
                directory=directory,
                on_progress=on_progress,
            )
    elif recipe.dataset is not None:
        with meter.phase("draw"):
            data = dataset.build(
                denoiser,
                concepts,
                recipe.dataset,
                surrounding=surrounding,
                directory=directory,
                screen=screen,
                on_progress=on_progress,
            )
    made = _finish(denoiser, concepts, surrounding, data, recipe, start, meter, on_progress)
    return replace(made, auto_preserved=tuple(chosen))


def check_screen(recipe: Recipe, screen: Screen | None) -> None:
    """Raise AblationError if copies are to be kept out of what a recipe does not draw."""
    if screen is not None and recipe.dataset is None:
        raise AblationError(
            "Copies of the original can be kept out of drawn images only, and this preset draws none to train on: "
            "choose the preset balanced, or leave the original out."
        )


def train_on(denoiser: Denoiser, data: Data, recipe: Recipe, on_progress: ProgressCallback | None = None) -> Ablation:
    """Make the delta of a dataset that is there already: what `ablate` does after it has drawn or harvested.

    Args:
        denoiser: the model that made the dataset.
        data: images or harvested rows, whichever the recipe trains on.
        recipe: its training, and the closed form that it begins with; how the dataset was made is in the dataset,
            which decides on the negative guidance of the closed form, too.
        on_progress: called after each step; raises to cancel.

    Raises:
        AblationError: the recipe trains on data of the other sort or on none, or as `ablate`.
    """
    if recipe.training is None:
        raise AblationError("The closed form trains on no dataset: leave the dataset out, or choose another preset.")
    harvested = isinstance(data, harvest.Harvest)
    if harvested != (recipe.harvest is not None):
        found, wanted = ("harvested rows", "images") if harvested else ("images", "harvested rows")
        raise AblationError(
            f"The dataset holds {found} and the preset trains on {wanted}: choose the same preset here as for the "
            "dataset."
        )
    select(recipe.subset, denoiser)
    meter = Meter(denoiser)
    surrounding: Sequence[Sequence[str]] = [()] * len(data.concepts)
    if isinstance(data, harvest.Harvest):
        surrounding = data.surrounding
        recipe = guided(recipe, data.settings.negative_guidance)
    start = _closed_form(denoiser, data.concepts, surrounding, recipe, meter, on_progress)
    kind = "harvest" if harvested else "dataset"
    recipe = replace(recipe, auto_preserve=None, **{kind: data.settings})
    return _finish(denoiser, data.concepts, surrounding, data, recipe, start, meter, on_progress)


def neighbours_of(denoiser: Denoiser, tasks: Sequence[Task], recipe: Recipe) -> list[tuple[str, ...]]:
    """For each task, the names that the recipe has preserved beside the user's."""
    concepts = [task.concept for task in tasks]
    return [
        nearest(denoiser, task.concept, recipe.auto_preserve or 0, others=concepts, known=task.surrounding)
        for task in tasks
    ]


def _encode(
    denoiser: Denoiser,
    concepts: Sequence[Concept],
    surrounding: Sequence[Sequence[str]],
    recipe: Recipe,
    on_progress: ProgressCallback | None,
) -> None:
    """Encode every prompt of the run, which the denoiser keeps, so that no later phase waits for the text encoder."""
    prompts = [""]
    if recipe.closed_form is not None:
        generic = generic_prompts(denoiser, concepts, recipe.generic)
        prompts += closed_form.prompts(denoiser, concepts, recipe.closed_form, surrounding, generic)
    sizes = recipe.dataset if recipe.harvest is None else recipe.harvest.sizes
    if sizes is not None:
        prompts += dataset.make_plan(concepts, surrounding, denoiser.prompt_source, sizes).prompts
    if recipe.sample is not None:
        prompts.append(recipe.sample.negative_prompt)
    distinct = list(dict.fromkeys(prompts))
    reporter = Reporter(on_progress, "Encoding prompts", len(distinct))
    with torch.no_grad():
        # alone: beside a longer prompt its context would be kept repeated, and its length is the closed form's window
        denoiser.encode([""])
        for start in range(0, len(distinct), _ENCODED_AT_ONCE):
            chunk = distinct[start : start + _ENCODED_AT_ONCE]
            denoiser.encode(chunk)
            reporter.advance(len(chunk))


def _closed_form(
    denoiser: Denoiser,
    concepts: Sequence[Concept],
    surrounding: Sequence[Sequence[str]],
    recipe: Recipe,
    meter: Meter,
    on_progress: ProgressCallback | None,
) -> Delta | None:
    if recipe.closed_form is None:
        return None
    reporter = Reporter(on_progress, "Solving the closed form", 1)
    with meter.phase("closed form"):
        solved = closed_form.solution(
            denoiser,
            concepts,
            recipe.closed_form,
            surrounding=surrounding,
            generic=generic_prompts(denoiser, concepts, recipe.generic),
        )
        reporter.advance()
    return solved


def _finish(
    denoiser: Denoiser,
    concepts: Sequence[Concept],
    surrounding: Sequence[Sequence[str]],
    data: Data | None,
    recipe: Recipe,
    start: Delta | None,
    meter: Meter,
    on_progress: ProgressCallback | None,
) -> Ablation:
    """The training, if there is one, and what came of it all as a file will give it back: rounded, with its header."""
    losses: tuple[float, ...] = ()
    delta = start
    if recipe.training is not None and data is not None:
        with meter.phase("train"):
            if isinstance(data, harvest.Harvest):
                result = train_harvested(denoiser, data, recipe.training, start=start, on_progress=on_progress)
            else:
                result = trainer.train(denoiser, data, recipe.training, on_progress)
        delta, losses = result.delta, result.losses
    assert delta is not None
    delta = replace(delta.rounded(torch.float16), metadata=header(denoiser, concepts, surrounding, data, recipe))
    return Ablation(delta, losses, tuple(meter.phases))


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
    """Ablate, save `delta.safetensors` in `output`, evaluate it and write the report beside it. Of several processes
    (`parallel.joined`) the first writes the files.

    Where `instruments` have memorized images, no copy of these is trained on.

    Raises:
        AblationError: as `ablate`, and an output folder that cannot be written (found before any work is done).
    """
    concepts, surrounding = [task.concept for task in tasks], [task.surrounding for task in tasks]
    make_jobs(denoiser, concepts, surrounding, evaluation)
    writes = current().first
    if writes:
        require_writable(output)
    instruments = instruments or Instruments()
    screen = screen_of(instruments)
    made = ablate(denoiser, tasks, recipe, directory=output / DATASET_FOLDER, screen=screen, on_progress=on_progress)
    if writes:
        delta_file.save(made.delta, output / DELTA_FILE)
    found = evaluate(denoiser, made.delta, concepts, surrounding, judge, evaluation, on_progress, instruments)
    if writes:
        measured = replace(made.delta, metadata={**made.delta.metadata, **metrics_header(found)})
        delta_file.save(measured, output / DELTA_FILE)
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
        phases=made.phases if made else (),
        settings=_settings(tasks, recipe, made),
        model=denoiser.name,
    )


def header(
    denoiser: Denoiser,
    concepts: Sequence[Concept],
    surrounding: Sequence[Sequence[str]],
    data: Data | None,
    recipe: Recipe,
) -> dict[str, str]:
    """The header of a delta file: ModelSpec 1.0.1 fields and our own, all strings."""
    made: dict[str, object] = {"objective": "closed-form", "subset": recipe.subset, "steps": 0}
    if recipe.training is not None:
        made |= {"objective": recipe.training.objective, "steps": recipe.training.steps, "seed": recipe.training.seed}
        if recipe.closed_form is not None:
            made["start"] = "closed-form"
    if data is not None:
        made["dataset_sha256"] = data.digest()
    if any(surrounding):
        made["preserved"] = "; ".join(", ".join(names) for names in surrounding)
    made["settings"] = json.dumps(asdict(recipe))
    return delta_header(denoiser, concepts, denoiser.fingerprint() if data is None else data.model, made)


def _settings(tasks: Sequence[Task], recipe: Recipe | None, made: Ablation | None) -> dict[str, object]:
    settings: dict[str, object] = asdict(recipe) if recipe else {}
    if made is not None and made.auto_preserved:
        named = zip(tasks, made.auto_preserved, strict=True)
        settings["auto_preserved"] = {task.concept.target: list(names) for task, names in named if names}
    return settings
