"""What is drawn for a measurement: units of pictures, each drawn once and kept as long as a job needs them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..concept import evaluation_prompts, pairs
from ..denoiser import Denoiser
from ..errors import AblationError
from ..evaluation import roles
from ..misspellings import misspelled_prompts
from ..paraphrases import paraphrase
from ..progress import ProgressCallback, Reporter
from ..prompts import PromptSource, distinct, normalise
from ..samplers import draw_images
from ..tasks import ListedTask
from .plan import Protocol, Role, Unit, digest
from .store import load_pictures, save_pictures

_PARAPHRASES = 40


def units(task: ListedTask, source: PromptSource, protocol: Protocol, robustness: bool) -> tuple[list[Unit], list[str]]:
    """Everything that an evaluation of a task draws, and one sentence for whatever cannot be drawn.

    A memorized image has few captions: each gets so many seeds that there are as many pictures as of another name.

    Raises:
        AblationError: too few evaluation prompts.
    """
    concept, found, missing = task.concept, [], []
    for name, role in roles(concept, task.surrounding):
        prompts = evaluation_prompts(name, concept, source, protocol.prompts)
        found.append(_unit(name, role, prompts, protocol))
    if robustness:
        try:
            found.append(_unit(concept.target, "misspelled", _misspelled(task, source, protocol), protocol))
        except AblationError as error:
            missing.append(f"misspelled: {error}")
        if concept.kind == "memorized":
            held_out = captions(task)[1][: protocol.prompts]
            if held_out:
                found.append(_unit(concept.target, "paraphrase", held_out, protocol))
            else:
                missing.append("paraphrase: no rule gives another way to say the caption.")
    return found, missing


def captions(task: ListedTask) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paraphrases of a memorized image's caption: those that training may choose from, and those that only measure.

    None of the latter is a prompt of the task or of the former.
    """
    concept = task.concept
    known = {normalise(text) for pair in pairs_of(task) for text in pair}
    made = [text for text in paraphrase(concept.target, _PARAPHRASES) if normalise(text) not in known]
    return distinct((*concept.anchor_prompts, *made[::2])), tuple(made[1::2])


def pairs_of(task: ListedTask) -> list[tuple[str, str]]:
    """The prompt pairs of a memorized image."""
    # these come from the task alone, for which any source will do
    empty = PromptSource((), (), (), (), (), ())
    return [(pair.anchor, pair.target) for pair in pairs(task.concept, empty)]


def unit_key(unit: Unit, model: str, protocol: Protocol) -> str:
    """Key of a unit's pictures by the model as it is; what a unit is called has no part in it."""
    return digest({"model": model, "prompts": unit.prompts, "seeds": unit.seeds, "sample": asdict(protocol.sample)})


def pictures(
    denoiser: Denoiser,
    unit: Unit,
    folder: Path,
    protocol: Protocol,
    batch: int,
    phase: str,
    on_progress: ProgressCallback | None,
) -> np.ndarray:
    """The unit's pictures from `folder`, or drawn with whatever is attached and put there.

    Returns:
        uint8 [prompts, seeds, height, width, 3], sRGB.
    """
    found = load_pictures(folder, len(unit.prompts), len(unit.seeds))
    if found is not None:
        return found
    drawn = draw_images(
        denoiser,
        [prompt for prompt in unit.prompts for _ in unit.seeds],
        [*unit.seeds] * len(unit.prompts),
        protocol.sample,
        batch=batch,
        reporter=Reporter(on_progress, phase, unit.pictures * protocol.steps),
    )
    images = drawn.reshape(len(unit.prompts), len(unit.seeds), *drawn.shape[1:])
    save_pictures(folder, images)
    return images


def _unit(name: str, role: Role, prompts: tuple[str, ...], protocol: Protocol) -> Unit:
    seeds = protocol.images
    if len(prompts) < protocol.prompts:
        seeds = -(-protocol.prompts * protocol.images // len(prompts))
    return Unit(name, role, prompts, tuple(range(protocol.first_seed, protocol.first_seed + seeds)))


def _misspelled(task: ListedTask, source: PromptSource, protocol: Protocol) -> tuple[str, ...]:
    """Misspelled prompts at distance 1 and 2 in turn, each with a typo of its own."""
    one, two = (misspelled_prompts(task.concept, source, protocol.prompts, distance) for distance in (1, 2))
    return tuple((one, two)[place % 2][place] for place in range(min(len(one), len(two))))
