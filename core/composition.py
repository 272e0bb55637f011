"""Composition kept: whether colour, style and position words are still obeyed after an ablation, and whether the
subject stays where it was.

Words are checked by a judge: a picture obeys its prompt's word if CLIP finds it nearer to that prompt than to the same
prompt with another word of the group. Place and size are read off the picture itself, as what differs from the colour
of its border; that is rough, and means something only for a subject on a plain ground.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .concept import Concept, pairs
from .errors import AblationError
from .metrics import Judge
from .prompts import PromptSource, distinct, fill, normalise, replace_noun, says, word_pattern
from .statistics import Estimate, mean_interval, share_difference, share_interval

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black")
"""A word group for prompts such as "on a red background"."""
POSITIONS = ("left", "right", "top", "bottom")
SIZES = ("big", "small")
STYLES = ("watercolor", "pencil sketch", "oil painting", "pixel art")
"""Styles for models whose prompt templates name fewer than two of their own."""

FOREGROUND_DISTANCE = 60.0
"""A pixel belongs to the subject if its colour lies farther than this from the border's (Euclidean, of 442)."""
SHIFT_KEPT = 0.1
"""A subject has kept its place if its centroid moved by less than this share of the picture's diagonal."""
AREA_KEPT = 1.5
"""A subject has kept its size if its area changed by less than this factor."""

_FRAMES = {
    "colour": "a picture of a {{}} on a {word} background",
    "position": "a picture of a {{}} on the {word} of the picture",
    "size": "a picture of a {word} {{}}",
    "style": "a picture of a {{}} in the style of {word}",
}
_NAMED_STYLE = re.compile(r"(?:in the style of|\bby) ([\w-]+)$|, ([\w-]+) style\b")
_COMPOSED_EACH = 4
"""Most composed prompts of a group."""
_BORDER_SHARE = 32
"""The border is one such part of the shorter side wide, and at least a pixel."""


@dataclass(frozen=True)
class Layout:
    """Where the subject of a picture is; all in [0, 1]."""

    x: float
    """Centroid from the left edge; 0.5 where there is no subject."""
    y: float
    """Centroid from the top."""
    area: float
    """Share of the picture's pixels."""


@dataclass(frozen=True)
class WordsObeyed:
    """How often the pictures obey a word of one group."""

    before: Estimate
    after: Estimate
    change: Estimate
    """After minus before, pictures paired by prompt and seed."""
    prompts: int
    """How many prompts have a word of the group."""


@dataclass(frozen=True)
class LayoutKept:
    """How far the subjects moved, pictures paired by prompt and seed."""

    position: Estimate
    """Share of pictures whose subject kept its place (`SHIFT_KEPT`)."""
    size: Estimate
    """Share of pictures whose subject kept its size (`AREA_KEPT`)."""
    shift: Estimate
    """Mean distance of the centroids, as a share of the diagonal."""


@dataclass(frozen=True)
class CompositionKept:
    """What an edit left of the composition of one set of prompts; intervals are of 95 % and resample prompts."""

    words: Mapping[str, WordsObeyed]
    """By group; only groups of which some prompt has a word."""
    layout: LayoutKept


def composition_kept(
    before: np.ndarray,
    after: np.ndarray,
    prompts: Sequence[str],
    judge: Judge,
    words: Mapping[str, Sequence[str]],
) -> CompositionKept:
    """Compare pictures of the same prompts and seeds before and after an edit.

    Args:
        before: uint8 [prompts, seeds, height, width, 3], sRGB, as `ConceptResult.images_before`.
        after: the same after the edit.
        prompts: what they were drawn from.
        judge: the CLIP model.
        words: alternatives by group, such as {"background": COLOURS, "style": ("noto", "twemoji")}.

    Raises:
        AblationError: a group with fewer than two words.
        ValueError: the shapes do not fit each other.
    """
    if before.shape != after.shape or before.ndim != 5 or len(before) != len(prompts):
        raise ValueError(f"pictures {before.shape} and {after.shape} do not fit {len(prompts)} prompts")
    for group, options in words.items():
        if len(set(options)) < 2:
            raise AblationError(f"The word group {group!r} needs at least two different words to choose from.")
    seeds = before.shape[1]
    first, second = (
        judge.embed_images(images.reshape(-1, *images.shape[2:])).reshape(len(prompts), seeds, -1)
        for images in (before, after)
    )
    groups = {name: _obeyed(first, second, prompts, judge, options) for name, options in words.items()}
    layout = _layout_kept(before, after)
    return CompositionKept({name: found for name, found in groups.items() if found is not None}, layout)


def word_groups(source: PromptSource, concept: Concept) -> dict[str, tuple[str, ...]]:
    """The words by group that composed prompts of `concept` are made of: colours, positions, sizes and, unless the
    concept is a style itself, the styles that the model's own templates name.

    Words in the names of target and anchor ("red panda") are left out, and with them a group of which one is left.
    """
    groups = {"colour": COLOURS, "position": POSITIONS, "size": SIZES}
    if concept.kind != "style":
        found = (_NAMED_STYLE.search(text) for text in source.instance_train)
        named = distinct(match[1] or match[2] for match in found if match)
        groups["style"] = named if len(named) > 1 else STYLES
    names = f"{concept.target} {concept.anchor}"
    free = {group: tuple(word for word in words if not said_word(names, [word])) for group, words in groups.items()}
    return {group: words for group, words in free.items() if len(words) > 1}


def composed_prompts(name: str, concept: Concept, source: PromptSource) -> tuple[str, ...]:
    """Prompts that ask for `name` (the target or the anchor) in a colour, at a place, in a size or in a style: four of
    a group at most, none of them a training prompt. None for a memorized image, whose caption is the whole of it.

    The i-th prompts of two names differ in the name only, but for those that one of them was trained on.
    """
    if concept.kind == "memorized":
        return ()
    trained = {normalise(text) for pair in pairs(concept, source) for text in (pair.anchor, pair.target)}
    styled = concept.kind == "style"
    noun = concept.anchor if styled else name
    tail = f" in the style of {name}" if styled and normalise(name) != normalise(concept.anchor) else ""
    made = []
    for group, words in word_groups(source, concept).items():
        texts = (fill(_FRAMES[group].format(word=word), noun) + tail for word in words)
        made += [text for text in texts if normalise(text) not in trained][:_COMPOSED_EACH]
    return tuple(made)


def said_word(prompt: str, options: Sequence[str]) -> str | None:
    """Which of `options` occurs in `prompt` as a whole word, in any case; None if none or several do."""
    found = [option for option in dict.fromkeys(options) if says(option, prompt)]
    return found[0] if len(found) == 1 else None


def obeys(pictures: Tensor, prompt: str, judge: Judge, options: Sequence[str]) -> np.ndarray:
    """Which pictures are nearer to `prompt` than to the prompt with any other of `options` in the place of its word.

    Args:
        pictures: embeddings by `judge`, [N, D].
        prompt: has one of `options`.
        judge: the CLIP model.
        options: the words of the group.

    Returns:
        bool [N].

    Raises:
        ValueError: the prompt has none of the words, or several.
    """
    said = said_word(prompt, options)
    if said is None:
        raise ValueError(f"{prompt!r} has not exactly one of {list(options)}")
    others = [option for option in dict.fromkeys(options) if option != said]
    texts = [replace_noun(word_pattern(said), prompt, word) for word in (said, *others)]
    similar = pictures @ judge.embed_texts(texts).t()
    return (similar[:, 0] > similar[:, 1:].amax(dim=1)).numpy()


def border_colour(image: np.ndarray) -> np.ndarray:
    """Median colour of the border of a picture, uint8 [height, width, 3]: float [3]."""
    width = max(1, min(image.shape[:2]) // _BORDER_SHARE)
    inside = np.zeros(image.shape[:2], dtype=bool)
    inside[width:-width, width:-width] = True
    return np.median(image[~inside], axis=0)


def layout(image: np.ndarray) -> Layout:
    """Where the subject of a picture, uint8 [height, width, 3], is: the pixels unlike the colour of its border."""
    distance = np.linalg.norm(image.astype(np.float64) - border_colour(image), axis=-1)
    rows, columns = np.nonzero(distance > FOREGROUND_DISTANCE)
    if len(rows) == 0:
        return Layout(0.5, 0.5, 0.0)
    height, width = image.shape[:2]
    return Layout(
        x=float((columns.mean() + 0.5) / width),
        y=float((rows.mean() + 0.5) / height),
        area=len(rows) / (height * width),
    )


def _obeyed(
    before: Tensor, after: Tensor, prompts: Sequence[str], judge: Judge, options: Sequence[str]
) -> WordsObeyed | None:
    """From embeddings [prompts, seeds, D]."""
    rows = [row for row, prompt in enumerate(prompts) if said_word(prompt, options) is not None]
    if not rows:
        return None
    first, second = (
        np.concatenate([obeys(pictures[row], prompts[row], judge, options) for row in rows])
        for pictures in (before, after)
    )
    groups = np.repeat(rows, before.shape[1])
    return WordsObeyed(
        share_interval(first, groups),
        share_interval(second, groups),
        share_difference(first, second, groups),
        len(rows),
    )


def _layout_kept(before: np.ndarray, after: np.ndarray) -> LayoutKept:
    """From pictures [prompts, seeds, height, width, 3]."""
    prompts, seeds, height, width = before.shape[:4]
    groups = np.repeat(np.arange(prompts), seeds)
    pairs = [
        (layout(one), layout(other))
        for one, other in zip(before.reshape(-1, height, width, 3), after.reshape(-1, height, width, 3), strict=True)
    ]
    shifts = np.array([shift(one, other, height, width) for one, other in pairs])
    return LayoutKept(
        position=share_interval(shifts < SHIFT_KEPT, groups),
        size=share_interval([_same_size(one.area, other.area) for one, other in pairs], groups),
        shift=mean_interval(shifts, groups),
    )


def shift(one: Layout, other: Layout, height: int, width: int) -> float:
    """Distance of two centroids in pictures of a size, as a share of their diagonal."""
    across, down = (one.x - other.x) * width, (one.y - other.y) * height
    return float(np.hypot(across, down) / np.hypot(height, width))


def _same_size(one: float, other: float) -> bool:
    small, large = sorted((one, other))
    return large < AREA_KEPT * small or large == small
