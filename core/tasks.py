"""Lists of ablations to be measured, such as `benchmarks/tasks.toml`.

A list is a TOML file: `model` (left out for the embedded one; otherwise a folder, a file or a name of Hugging Face) and
a `[[task]]` for each ablation:

    name         what its results are called; small letters, digits and hyphens
    kind         "instance", "style" or "memorized"
    target       a name, or the caption that reproduces a memorized image
    anchor       what is drawn instead
    surrounding  4 or 5 names of what must stay as it is

and for a memorized image also

    anchor_prompts  captions to anchor on, or to choose from (`paraphrases.rank`)
    target_prompts  other captions that reproduce it; may be left out
    picture         file name of the image itself, in a folder that whoever runs the list gives
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .concept import Concept
from .errors import AblationError
from .evaluation import roles

SURROUNDING = (4, 5)
"""How many surrounding concepts a task may have."""

_TEXTS = {"name", "kind", "target", "anchor"}
_LISTS = {"surrounding"}
_OF_MEMORIZED = {"anchor_prompts", "target_prompts", "picture"}


@dataclass(frozen=True)
class ListedTask:
    """One ablation, and what shows whether it went well."""

    name: str
    concept: Concept
    surrounding: tuple[str, ...]
    picture: str | None = None
    """File name of a memorized image."""


@dataclass(frozen=True)
class TaskList:
    """Ablations of one model, each to be made by itself."""

    tasks: tuple[ListedTask, ...]
    model: str | None = None
    """None for the embedded model."""


def load_tasks(path: Path) -> TaskList:
    """Read a list of tasks.

    Raises:
        AblationError: Python is older than 3.11, or the file cannot be read, is not TOML or is not such a list.
    """
    content = _read(path)
    try:
        return _parse(content)
    except AblationError as error:
        raise AblationError(f"{path}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError as error:
        raise AblationError(f"Reading {path.name} needs Python 3.11 or newer: use such a Python.") from error
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise AblationError(f"{path} cannot be read ({error.strerror or error}): check the path.") from error
    except ValueError as error:
        raise AblationError(f"{path} is not TOML in UTF-8 ({error}): correct it.") from error


def _parse(content: Mapping[str, Any]) -> TaskList:
    _check_keys(content, {"model", "task"}, "the list")
    model, entries = content.get("model"), content.get("task")
    if model is not None and not (isinstance(model, str) and model):
        raise AblationError("model is not a text: write the model's folder, file or name.")
    if not (isinstance(entries, list) and entries and all(isinstance(entry, dict) for entry in entries)):
        raise AblationError("there is no task: add at least one [[task]].")
    tasks = tuple(_task(entry, f"task {number}") for number, entry in enumerate(entries, start=1))
    names = [task.name for task in tasks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise AblationError(f"several tasks are called {min(twice)!r}: rename all but one.")
    return TaskList(tasks, model)


def _task(entry: Mapping[str, Any], place: str) -> ListedTask:
    where = f"{place} ({entry['name']})" if isinstance(entry.get("name"), str) else place
    memorized = entry.get("kind") == "memorized"
    _check_keys(entry, _TEXTS | _LISTS | (_OF_MEMORIZED if memorized else set()), where)
    needed = _TEXTS | _LISTS | ({"anchor_prompts", "picture"} if memorized else set())
    for key in sorted(needed - entry.keys()):
        raise AblationError(f"{where} has no {key}: add it.")
    for key, value in entry.items():
        if key in _TEXTS | {"picture"} and not isinstance(value, str):
            raise AblationError(f"{key} of {where} is not a text: put it into quotation marks.")
        if key not in _TEXTS | {"picture"} and not _is_texts(value):
            raise AblationError(f"{key} of {where} is not a list of texts: make it one.")
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", entry["name"]):
        raise AblationError(f"the name of {where} may only have small letters, digits and hyphens: change it.")
    # The picture is looked for in a folder that the list does not know and must not leave.
    if memorized and not re.fullmatch(r"\w[\w .-]*\.(png|jpg|jpeg|webp)", entry["picture"], re.ASCII):
        raise AblationError(f"picture of {where} is not the plain name of a png, jpg or webp file: change it.")
    try:
        return _checked(entry)
    except AblationError as error:
        raise AblationError(f"{where}: {error}") from error


def _checked(entry: Mapping[str, Any]) -> ListedTask:
    concept = Concept(
        entry["target"],
        entry["anchor"],
        entry["kind"],
        anchor_prompts=tuple(entry.get("anchor_prompts", ())),
        target_prompts=tuple(entry.get("target_prompts", ())),
    )
    surrounding = tuple(name for name, role in roles(concept, entry["surrounding"]) if role == "surrounding")
    least, most = SURROUNDING
    if not least <= len(surrounding) <= most:
        raise AblationError(f"There are {len(surrounding)} surrounding concepts: name {least} or {most}.")
    return ListedTask(entry["name"], concept, surrounding, entry.get("picture"))


def _check_keys(entry: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in entry:
        if key not in known:
            raise AblationError(
                f"{where} has an unknown key {key}: remove it or use one of {', '.join(sorted(known))}."
            )


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text.strip() for text in value)
