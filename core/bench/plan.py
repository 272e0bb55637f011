"""What a benchmark measures, as values: methods, edits, jobs, and the keys that their results are stored under.

A job is a pure function of what its key covers: the model, the tasks, the recipe, the settings of the measurement, the
judges, and the version of this code's formats. A result is therefore never measured twice and never mistaken for that
of other settings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from ..attack import AttackSettings
from ..denoiser import Denoiser
from ..errors import AblationError
from ..leaks import ScanSettings
from ..presets import TRAINED, Recipe, recipe
from ..samplers import SampleSettings
from ..tasks import ListedTask

FORMAT = 1
"""Raised when the code changes what the same settings give, so that stored results of older code are not taken."""

IMAGE_PRESETS = ("balanced", "paper")
"""Presets that train on drawn anchor images, which can be filtered and trained on with checkpoints."""

RANKED_CAPTIONS = 16
"""Captions of a memorized image that a ranked method chooses from, the task's own anchor prompts first."""
RANKED_IMAGES = 4
"""Pictures of each."""

JobKind = Literal["evaluate", "leaks", "attack"]
Role = Literal["target", "anchor", "surrounding", "misspelled", "paraphrase"]

_KEY_LENGTH = 32
_LATER = {"negative_guidance": 0.0, "distance_weight": 0.0}
"""Fields of recipes that older results do not know, with the values that change nothing."""


@dataclass(frozen=True)
class Protocol:
    """How much is drawn for each measurement, and how."""

    prompts: int = 10
    """Held-out prompts for each name."""
    images: int = 8
    """Pictures of each prompt."""
    steps: int = 25
    """Sampling steps of each picture."""
    guidance: float = 4.0
    first_seed: int = 5000
    """Of the pictures of every name. No dataset has these seeds and no setting was chosen by them. The report on the
    embedded model (tools/emoji_diffusion/quality.py) draws captions of memorized images with some of them, too."""
    checkpoints: tuple[int, ...] = (25, 50, 100, 200)
    """Training steps at which the objectives are compared."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `TrainSettings` that replace those of every recipe (small ones for tests)."""
    dataset: Mapping[str, Any] = field(default_factory=dict)
    """The same for `DatasetSettings`."""
    scan: ScanSettings = field(default_factory=ScanSettings)
    attack: AttackSettings = field(default_factory=AttackSettings)

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.images < 1:
            raise AblationError("A benchmark needs at least one prompt and one image of each prompt.")
        if not self.checkpoints or sorted(set(self.checkpoints)) != [*self.checkpoints] or self.checkpoints[0] < 1:
            raise AblationError("The checkpoints must be rising numbers of steps from 1, such as 25, 50, 100.")

    @property
    def sample(self) -> SampleSettings:
        """How pictures are drawn in every measurement."""
        return SampleSettings(steps=self.steps, guidance=self.guidance)

    @property
    def scan_settings(self) -> ScanSettings:
        """The leak scan's settings, drawn as everything else."""
        return replace(self.scan, sample=self.sample, first_seed=self.first_seed)

    @property
    def attack_settings(self) -> AttackSettings:
        """The attack's settings, drawn as everything else."""
        return replace(self.attack, sample=self.sample, seed=self.first_seed)


TINY = Protocol(
    prompts=2,
    images=2,
    steps=2,
    checkpoints=(1, 2),
    training={"steps": 2, "batch": 2},
    dataset={"images": 2, "preserve": 2, "sample": SampleSettings(steps=2)},
    scan=ScanSettings(each=1, seeds=1, suspects=1, more_seeds=2, plain=2, pictures=2),
    attack=AttackSettings(checkpoints=(0, 1), batch=1, images=2, prompts=2, seeds=2),
)
"""Everything as small as it can be: shows that a benchmark runs, measures nothing."""


@dataclass(frozen=True)
class Method:
    """How an edit is made: a preset, and what is changed in it."""

    preset: str = "balanced"
    subset: str | None = None
    objective: str | None = None
    constant_rate: bool = False
    """Keep the learning rate, so that every checkpoint of one training is what a training of that length gives."""
    steps: int | None = None
    """Replaces the preset's number of steps."""
    negative_guidance: float | None = None
    """Replaces the preset's."""
    ranked: bool = False
    """Memorized images: choose captions by how often they reproduce the image, as the paper does."""

    @property
    def label(self) -> str:
        """PRESET[:SUBSET[:OBJECTIVE]], as `parse_method` reads it, and "+ranked"."""
        parts = [self.preset, self.subset or "", self.objective or ""]
        return ":".join(parts).rstrip(":") + ("+ranked" if self.ranked else "")


def parse_method(text: str) -> Method:
    """Read PRESET[:SUBSET[:OBJECTIVE]]; either of the latter may be empty, for the preset's own.

    Raises:
        AblationError: another form. Whether the names exist is found when a recipe is made of them.
    """
    parts = text.split(":")
    if len(parts) > 3 or not parts[0]:
        raise AblationError(f"{text!r} is no method: write PRESET, PRESET:SUBSET or PRESET:SUBSET:OBJECTIVE.")
    preset, subset, objective = [*parts, "", ""][:3]
    return Method(preset, subset or None, objective or None)


@dataclass(frozen=True)
class Edit:
    """One delta: what it ablates, how it is made, and its seed."""

    tasks: tuple[ListedTask, ...]
    method: Method
    seed: int = 0


@dataclass(frozen=True)
class BenchJob:
    """One measurement."""

    kind: JobKind
    task: ListedTask
    """What is measured. Its concept and surrounding concepts are those of the edit's task of that name."""
    edit: Edit | None
    """None for an attack on the pretrained model."""
    step: int | None = None
    """Which checkpoint of the edit's training; None for the finished delta."""
    robustness: bool = True
    """Also measure misspelled prompts and, for memorized images, paraphrases."""


@dataclass(frozen=True)
class Unit:
    """Pictures of one name: every prompt with every seed."""

    name: str
    role: Role
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def pictures(self) -> int:
        """How many."""
        return len(self.prompts) * len(self.seeds)


@dataclass(frozen=True)
class Fingerprints:
    """What identifies the tools of a measurement, for keys."""

    model: str
    """Fingerprint."""
    judges: tuple[str, ...]
    """Name and digest of each, the main one first."""
    detector: str | None = None
    """Name of the copy detector."""
    pictures: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the memorized images that are there, by file name."""
    words: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Word groups whose obedience is measured (`composition.composition_kept`)."""
    categories: str = ""
    """Digest of the model's categories, from which the leak scan takes words."""
    prompts: str = ""
    """Digest of the model's prompt templates and vocabulary, which its fingerprint does not cover."""


def recipe_of(edit: Edit, denoiser: Denoiser, protocol: Protocol) -> Recipe:
    """The recipe of an edit.

    Raises:
        AblationError: no such preset, objective or subset.
    """
    method, kind = edit.method, edit.tasks[0].concept.kind
    if method.preset not in TRAINED:
        # which also refuses names of presets that do not exist
        named = {"objective": method.objective, "subset": method.subset, "negative_guidance": method.negative_guidance}
        return recipe(method.preset, denoiser, kind, **named)
    training: dict[str, Any] = dict(protocol.training)
    if method.constant_rate:
        training["cosine"] = False
    if method.steps is not None:
        training["steps"] = method.steps
    return recipe(
        method.preset,
        denoiser,
        kind,
        concepts=[task.concept for task in edit.tasks],
        objective=method.objective,
        subset=method.subset,
        seed=edit.seed,
        training=training,
        dataset=dict(protocol.dataset),
        negative_guidance=method.negative_guidance,
    )


def objective_of(made: Recipe | None) -> str | None:
    """What a recipe trains for; None if it trains nothing."""
    return made.training.objective if made is not None and made.training is not None else None


def digest(value: object) -> str:
    """A short SHA-256 of anything that JSON can write, in hexadecimal; independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=_plain)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:_KEY_LENGTH]


def edit_key(edit: Edit, made: Recipe, tools: Fingerprints, protocol: Protocol) -> str:
    """Key of an edit's delta: of everything that its making depends on. How a method was named is not part of it:
    `balanced` and `balanced:cross-attn` are the same edit where that is the preset's subset.
    """
    memorized = any(task.picture for task in edit.tasks)
    return digest(
        {
            "format": FORMAT,
            "model": tools.model,
            "prompts": tools.prompts,
            "tasks": [_task(task, tools) for task in edit.tasks],
            "preset": edit.method.preset,
            "recipe": _without_neutral(asdict(made)),
            "detector": tools.detector if memorized else None,
            "ranking": [asdict(protocol.sample), RANKED_CAPTIONS, RANKED_IMAGES] if edit.method.ranked else None,
            # a training that kept other checkpoints, or none, is no substitute
            "checkpoints": protocol.checkpoints if edit.method.constant_rate else None,
        }
    )


def job_key(job: BenchJob, made: Recipe | None, tools: Fingerprints, protocol: Protocol) -> str:
    """Key of a job's result."""
    drawn = [protocol.prompts, protocol.images, asdict(protocol.sample), protocol.first_seed]
    styles = dict(tools.words).get("style") if job.task.concept.kind == "instance" else None
    scanned = {"scan": asdict(protocol.scan_settings), "categories": tools.categories, "styles": styles}
    measured: dict[str, object] = {
        "evaluate": {"drawn": drawn, "robustness": job.robustness, "words": tools.words},
        # the recognisers of both are calibrated on what an evaluation draws
        "leaks": {"drawn": drawn, **scanned},
        "attack": {"drawn": drawn, "attack": asdict(protocol.attack_settings)},
    }
    return digest(
        {
            "format": FORMAT,
            "kind": job.kind,
            "model": tools.model,
            "prompts": tools.prompts,
            "edit": edit_key(job.edit, made, tools, protocol) if job.edit and made else None,
            "step": job.step,
            "task": _task(job.task, tools),
            "settings": measured[job.kind],
            "judges": tools.judges,
            "detector": tools.detector if job.task.picture else None,
        }
    )


def describe(job: BenchJob, made: Recipe | None) -> dict[str, Any]:
    """What a result says about its job."""
    method = job.edit.method if job.edit else None
    return {
        "kind": job.kind,
        "task": job.task.name,
        "concept": asdict(job.task.concept),
        "surrounding": list(job.task.surrounding),
        "edited": [task.name for task in job.edit.tasks] if job.edit else [],
        "method": method.label if method else "pretrained",
        "preset": method.preset if method else None,
        "subset": made.subset if made else None,
        "objective": objective_of(made),
        "seed": job.edit.seed if job.edit else None,
        "step": job.step,
        "recipe": asdict(made) if made else None,
    }


def _without_neutral(made: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the fields that came later, where they change nothing: results of before are results still."""
    return {
        name: _without_neutral(value) if isinstance(value, dict) else value
        for name, value in made.items()
        if not (name in _LATER and value == _LATER[name])
    }


def _task(task: ListedTask, tools: Fingerprints) -> dict[str, object]:
    """A task as far as it matters: not what it is called, but which picture it means."""
    return {
        "concept": asdict(task.concept),
        "surrounding": task.surrounding,
        "picture": tools.pictures.get(task.picture) if task.picture else None,
    }


def _plain(value: object) -> object:
    raise TypeError(f"{type(value).__name__} cannot be part of a key")
