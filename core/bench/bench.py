"""What the jobs of one benchmark share: the model, the instruments, the folder and the clock."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..composition import COLOURS
from ..copies import CopyDetector
from ..denoiser import Denoiser
from ..errors import AblationError
from ..instruments import read_picture
from ..metrics import Judge
from ..presets import Recipe
from ..progress import Progress, ProgressCallback
from ..tasks import ListedTask
from .pace import Pace
from .plan import BenchJob, Edit, Fingerprints, Protocol, digest, job_key, recipe_of
from .store import Store


@dataclass
class Bench:
    """Everything that a job needs beside its own description."""

    denoiser: Denoiser
    judges: tuple[Judge, ...]
    """The main one, and perhaps one that takes part in nothing else (the validation judge)."""
    detector: CopyDetector | None
    originals: Mapping[str, np.ndarray] = field(repr=False)
    """Memorized images, uint8 [height, width, 3], by file name."""
    words: Mapping[str, tuple[str, ...]]
    """Groups of words whose obedience is measured."""
    categories: Mapping[str, str] = field(repr=False)
    """Category by concept, as the model's hints have it."""
    store: Store
    protocol: Protocol
    tools: Fingerprints
    pace: Pace = field(default_factory=Pace)
    batch: int = 16
    """Pictures drawn at once."""
    keep_pictures: bool = False
    on_progress: ProgressCallback | None = None

    def progress(self, progress: Progress) -> None:
        """What every operation of a job calls: ends it when the time is up, and passes its progress on.

        Raises:
            Interrupted: the time is up.
        """
        self.pace.check()
        if self.on_progress is not None:
            self.on_progress(progress)

    def recipe(self, edit: Edit) -> Recipe:
        """The recipe of an edit of this benchmark."""
        return recipe_of(edit, self.denoiser, self.protocol)

    def key(self, job: BenchJob) -> str:
        """The key of a job's result."""
        return job_key(job, self.recipe(job.edit) if job.edit else None, self.tools, self.protocol)

    def original(self, task: ListedTask) -> np.ndarray | None:
        """The memorized image of a task, if its copies can be found."""
        return self.originals.get(task.picture) if task.picture and self.detector else None


def open_bench(
    denoiser: Denoiser,
    judges: Sequence[Judge],
    tasks: Sequence[ListedTask],
    folder: Path,
    protocol: Protocol,
    *,
    pictures: Path | None = None,
    detector: CopyDetector | None = None,
    categories: Mapping[str, str] | None = None,
) -> Bench:
    """A benchmark of `tasks`, all of one task list, in `folder`.

    Raises:
        AblationError: two judges have the same name, a memorized image cannot be read, or `folder` has results of the
            same model in another setup, which its keys do not tell apart.
    """
    if len({judge.name for judge in judges}) < len(judges):
        raise AblationError("Both judges have the same name: give the validation judge's folder another name.")
    originals, digests = read_pictures(tasks, pictures)
    words = word_groups(tasks)
    tools = Fingerprints(
        model=denoiser.fingerprint(),
        judges=tuple(f"{judge.name} {_fingerprint(judge)}" for judge in judges),
        detector=detector.name if detector else None,
        pictures=digests,
        words=tuple(words.items()),
        categories=digest(dict(categories or {})),
        prompts=digest([asdict(denoiser.prompt_source), asdict(denoiser.vocabulary)]),
    )
    store = Store(folder)
    _check_setup(store, tools.model, denoiser.setup())
    return Bench(denoiser, tuple(judges), detector, originals, words, dict(categories or {}), store, protocol, tools)


def _check_setup(store: Store, model: str, setup: Mapping[str, Any]) -> None:
    """Raise AblationError if the folder has results of the model in another setup. Older ones do not say theirs."""
    for found in store.results():
        other = found.get("setup", setup)
        if found.get("model") == model and other != setup:
            differing = ", ".join(sorted(name for name in {*other, *setup} if other.get(name) != setup.get(name)))
            raise AblationError(
                f"The results in {store.root} were measured with another setup of the model ({differing}): give the "
                "same options as then, such as --precision and --prediction, or another output folder."
            )


def read_pictures(tasks: Sequence[ListedTask], folder: Path | None) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The memorized images of tasks that are in `folder`, uint8 [height, width, 3], and their SHA-256; by file name.

    Raises:
        AblationError: a file is no picture.
    """
    images, digests = {}, {}
    for name in dict.fromkeys(task.picture for task in tasks if task.picture):
        path = folder / name if folder else None
        if path is None or not path.is_file():
            continue
        images[name] = read_picture(path)
        digests[name] = hashlib.sha256(images[name].tobytes()).hexdigest()
    return images, digests


def word_groups(tasks: Sequence[ListedTask]) -> dict[str, tuple[str, ...]]:
    """Words that prompts may have and pictures should obey: colours, and all styles that the tasks name."""
    styles = [task for task in tasks if task.concept.kind == "style"]
    names = sorted({name for task in styles for name in (task.concept.target, *task.surrounding)})
    return {"colour": COLOURS, **({"style": tuple(names)} if len(names) > 1 else {})}


def _fingerprint(judge: Judge) -> str:
    made = hashlib.sha256()
    for name, tensor in sorted(judge.model.state_dict().items()):
        made.update(name.encode())
        made.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return made.hexdigest()[:16]
