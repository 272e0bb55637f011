"""The form of an ablation: what was typed, checked field by field before any work, with core's own sentences.

Every value is text as the page gives it; an empty one leaves the preset's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import numpy as np

from ..core.ablation import Task, check_tasks
from ..core.concept import MAX_CAPTION_LENGTH, Concept, Kind
from ..core.dataset import DatasetSettings
from ..core.errors import AblationError
from ..core.evaluation import EvaluationSettings
from ..core.instruments import read_picture
from ..core.presets import PRESETS, Recipe, check_serves, recipe
from ..core.prompts import collapse
from ..core.samplers import SampleSettings
from ..core.subsets import SUBSETS
from ..core.trainer import TrainSettings

PRESET = "the preset's"
"""The choice of objective and subset that leaves them to the preset."""
MAX_SEED = 2**63 - 1
MAX_LINES = 1000
TO_BE_FOUND = "paraphrases of it"
"""What the anchor of a memorized picture is called until it is found."""
_TRAINING = {"steps": "steps", "rate": "learning_rate", "batch": "batch"}
"""Fields of the form by those of `TrainSettings`."""
HINTED = ("steps", "batch", "guidance", "images", "preserve", "sampling", "neighbours")
"""Fields that show the preset's value while they are empty."""
_NOTHING_KNOWN: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Form:
    """What the page holds; the names are those of the page's fields."""

    model: str
    target: str
    anchor: str
    kind: str = "instance"
    preset: str = "balanced"
    surrounding: str = ""
    """Names, by commas or lines."""
    neighbours: str = ""
    """How many more to preserve, chosen automatically."""
    name: str = ""
    objective: str = PRESET
    subset: str = PRESET
    steps: str = ""
    rate: str = ""
    batch: str = ""
    guidance: str = ""
    """Negative guidance, away from the target."""
    images: str = ""
    preserve: str = ""
    sampling: str = ""
    eval_prompts: str = ""
    eval_seeds: str = ""
    seed: str = ""
    prompts: str = ""
    """Anchor prompts, one a line."""
    captions: str = ""
    """Further captions of a memorized image, one a line."""
    original: str | None = None
    """Path of the memorized picture."""
    misspellings: str = ""
    composition: bool | str = False


FIELDS = tuple(item.name for item in fields(Form))


@dataclass(frozen=True)
class Request:
    """A form that was found to be good."""

    model: str
    task: Task
    preset: str
    evaluation: EvaluationSettings
    name: str = ""
    """What to call the saved file; empty for a name made of the concept."""
    seed: int = 0
    objective: str | None = None
    subset: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `TrainSettings` that replace the preset's."""
    dataset: Mapping[str, Any] = field(default_factory=dict)
    sampling: int | None = None
    """Sampling steps of the dataset's and the evaluation's images."""
    original: np.ndarray | None = field(default=None, repr=False, compare=False)
    """The memorized picture, uint8 [height, width, 3]."""
    find_anchors: bool = False
    """Whether what is drawn instead is still to be found among paraphrases; the task's anchor only says so."""
    auto_preserve: int | None = None
    negative_guidance: float | None = None


class _Checker:
    """Collects the first error of every field."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.errors: dict[str, str] = {}

    def run(self, name: str, check: Callable[[], Any]) -> Any:
        """What `check` returns, or None if it fails, which becomes the error of the field `name`."""
        try:
            return check()
        except AblationError as error:
            self.errors.setdefault(name, str(error))
            return None

    def number(self, name: str, parse: Callable[[str], float], what: str, accept: Callable[[Any], Any]) -> Any:
        """The number in a field, or None if it is empty or refused; `accept` raises for what core refuses."""
        text = str(getattr(self.form, name)).strip()
        if not text:
            return None
        try:
            value = parse(text)
        except ValueError:
            kind = "whole number" if parse is int else "number"
            self.errors.setdefault(name, f"{what} must be a {kind}, not '{text[:40]}'.")
            return None
        self.run(name, lambda: accept(value))
        return value


def check(form: Form) -> tuple[Request | None, dict[str, str]]:
    """The request that a form makes, or None and one sentence for each field that is wrong."""
    checker = _Checker(form)
    original = (
        checker.run("original", lambda: read_picture(Path(str(form.original)))) if _shows_original(form) else None
    )
    searched = original is not None and not collapse(form.anchor)
    if searched:
        for name in ("prompts", "captions"):
            if str(getattr(form, name)).strip():
                checker.errors[name] = "Without an anchor these are searched for: leave them out, or name the anchor."
        form = checker.form = replace(form, anchor=TO_BE_FOUND)
    task = _task(checker)
    training = {
        "steps": checker.number("steps", int, "The number of steps", lambda value: TrainSettings(steps=value)),
        "learning_rate": checker.number(
            "rate", float, "The learning rate", lambda value: TrainSettings(learning_rate=value)
        ),
        "batch": checker.number("batch", int, "The batch", lambda value: TrainSettings(batch=value)),
    }
    guidance = checker.number(
        "guidance", float, "Negative guidance", lambda value: TrainSettings(negative_guidance=value)
    )
    dataset = {
        "images": checker.number("images", int, "The number of images", lambda value: DatasetSettings(images=value)),
        "preserve": checker.number(
            "preserve", int, "The number of images", lambda value: DatasetSettings(preserve=value)
        ),
    }
    sampling = checker.number(
        "sampling", int, "The number of sampling steps", lambda value: SampleSettings(steps=value)
    )
    shown = {
        "prompts": checker.number(
            "eval_prompts", int, "The number of prompts", lambda value: EvaluationSettings(prompts=value)
        ),
        "seeds": checker.number(
            "eval_seeds", int, "The number of pictures", lambda value: EvaluationSettings(seeds=value)
        ),
        "misspellings": checker.number(
            "misspellings", int, "The number of prompts", lambda value: EvaluationSettings(misspellings=value)
        ),
    }
    neighbours = checker.number("neighbours", int, "The number of neighbours", _check_neighbours)
    seed = checker.number("seed", int, "The seed", _check_seed)
    _choices(checker)
    _combinations(checker, training, dataset, neighbours, guidance)
    if not str(form.model).strip():
        checker.errors["model"] = "No model is chosen: choose one, or type a folder, a file or a hub id."
    if task is None or checker.errors:
        return None, checker.errors
    sample = SampleSettings() if sampling is None else SampleSettings(steps=sampling)
    request = Request(
        model=str(form.model).strip(),
        task=task,
        preset=form.preset,
        evaluation=EvaluationSettings(
            **{"prompts": 5, "seeds": 4, **_given(shown)}, sample=sample, composition=bool(form.composition)
        ),
        name=form.name,
        seed=seed or 0,
        objective=None if form.objective == PRESET else form.objective,
        subset=None if form.subset == PRESET else form.subset,
        training=_given(training),
        dataset=_given(dataset),
        sampling=sampling,
        original=original,
        find_anchors=searched,
        auto_preserve=neighbours,
        negative_guidance=guidance,
    )
    return request, {}


def _shows_original(form: Form) -> bool:
    """Whether there is a picture; one that was uploaded for another kind is hidden, and has no say."""
    return bool(form.original) and form.kind == "memorized"


def suggest_anchor(target: str, kind: str, style_anchor: str, categories: Mapping[str, str] = _NOTHING_KNOWN) -> str:
    """What might be drawn instead: the category of a concept that the model knows ("rooster" -> "bird"), else the last
    word of a name ("Grumpy Cat" -> "cat"); what the model's styles are styles of; nothing for other single words and
    for memorized images.
    """
    words = collapse(target).split()
    if kind == "style":
        return style_anchor if words else ""
    if kind != "instance":
        return ""
    name = " ".join(words).casefold()
    if categories.get(name, name) != name:
        return categories[name]
    if len(words) < 2:
        return ""
    return re.sub(r"^\W+|\W+$", "", words[-1]).casefold()


def preset_values(preset: str, kind: str) -> dict[str, str]:
    """What a preset sets, by field, as hints for the empty ones; those of a preset that does not serve the kind are
    empty, and `check` says why.
    """
    try:
        made = _recipe(preset, kind)
    except AblationError:
        return dict.fromkeys(HINTED, "")
    asked = made.training if made.dataset is not None else made.harvest or made.closed_form
    assert asked is not None
    hints = {
        "neighbours": str(made.auto_preserve),
        "guidance": f"{asked.negative_guidance:g}",
        "sampling": f"{SampleSettings().steps} to measure",
    }
    if made.training is None:
        return {**hints, **dict.fromkeys(("steps", "batch", "images", "preserve"), "none")}
    count = made.dataset.images if made.harvest is None else made.harvest.trajectories
    drawn = made.dataset or made.harvest
    return {
        **hints,
        "steps": str(made.training.steps),
        "batch": str(made.training.batch),
        "images": str(count),
        "preserve": str(drawn.preserve),
        "sampling": f"{drawn.sample.steps}, and {hints['sampling']}",
    }


def _task(checker: _Checker) -> Task | None:
    form = checker.form
    kind: Any = form.kind
    if kind not in get_args(Kind):
        checker.errors["kind"] = f"The kind '{str(kind)[:40]}' is unknown: choose {', '.join(get_args(Kind))}."
        return None
    # each text is tried beside one that it cannot equal, so that an error belongs to the text alone
    checker.run("target", lambda: Concept(form.target, f"not {form.target}"[:200], kind))
    checker.run("anchor", lambda: Concept(f"not {form.anchor}"[:200], form.anchor, kind))
    prompts, captions = _lines(checker, "prompts"), _lines(checker, "captions") if kind == "memorized" else ()
    surrounding = tuple(filter(None, map(collapse, re.split(r"[,\n]", form.surrounding))))
    if checker.errors:
        return None
    if checker.run("anchor", lambda: Concept(form.target, form.anchor, kind)) is None:
        return None
    concept = checker.run("prompts", lambda: Concept(form.target, form.anchor, kind, prompts))
    if concept is not None and captions:
        concept = checker.run("captions", lambda: Concept(form.target, form.anchor, kind, prompts, captions))
    for name in surrounding:
        checker.run("surrounding", lambda name=name: Concept(name, f"not {name}"[:200], kind))
    if concept is None or checker.errors:
        return None
    task = Task(concept, surrounding)
    checker.run("surrounding", lambda: check_tasks([task]))
    return task


def _lines(checker: _Checker, name: str) -> tuple[str, ...]:
    lines = tuple(filter(None, map(collapse, str(getattr(checker.form, name)).split("\n"))))
    longest = max(map(len, lines), default=0)
    if longest > MAX_CAPTION_LENGTH:
        checker.errors[name] = f"A prompt has {longest:,} characters: use at most {MAX_CAPTION_LENGTH:,}."
    elif len(lines) > MAX_LINES:
        checker.errors[name] = f"There are {len(lines):,} prompts: use at most {MAX_LINES:,}."
    return lines


def _choices(checker: _Checker) -> None:
    form = checker.form
    if form.preset not in PRESETS:
        checker.errors["preset"] = f"There is no preset '{str(form.preset)[:40]}': choose {', '.join(PRESETS)}."
    if form.objective != PRESET:
        checker.run("objective", lambda: TrainSettings(objective=form.objective))
    if form.subset not in (PRESET, *SUBSETS):
        checker.errors["subset"] = f"There is no subset '{str(form.subset)[:40]}': choose {', '.join(SUBSETS)}."


def _combinations(
    checker: _Checker,
    training: Mapping[str, Any],
    dataset: Mapping[str, Any],
    neighbours: int | None,
    guidance: float | None,
) -> None:
    """Say at its field what the preset has no use for."""
    form = checker.form
    if "preset" in checker.errors:
        return
    checker.run("preset", lambda: check_serves(form.preset, form.kind))
    if "preset" in checker.errors:
        return
    objective = {} if form.objective == PRESET or "objective" in checker.errors else {"objective": form.objective}
    changes: dict[str, dict[str, Any]] = {
        **{name: {"training": {key: training[key]}} for name, key in _TRAINING.items() if training[key] is not None},
        **{name: {"dataset": {name: value}} for name, value in dataset.items() if value is not None},
        "objective": objective,
        "subset": {} if form.subset == PRESET else {"subset": form.subset},
        "neighbours": {} if neighbours is None else {"auto_preserve": neighbours},
        # which not every objective can have
        "guidance": {} if guidance is None else {"negative_guidance": guidance, **objective},
    }
    for name, change in changes.items():
        if change and name not in checker.errors:
            checker.run(name, lambda change=change: _recipe(form.preset, form.kind, **change))


def _recipe(preset: str, kind: str, **changes: Any) -> Recipe:
    # a learning rate is the model's own affair, everything else is the same for all models
    return recipe(preset, None, kind, **changes)


def _check_neighbours(value: int) -> None:
    if value < 0:
        raise AblationError("The number of neighbours must be at least 0.")


def _check_seed(value: int) -> None:
    if not 0 <= value <= MAX_SEED:
        raise AblationError("The seed must be a whole number from 0 to 9,223,372,036,854,775,807.")


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
