"""What one unit of pictures says, before and after an edit: observations.

An observation counts, for each prompt, the pictures that have some property. It is the raw material of every figure, so
that figures of several tasks can be pooled and given intervals later. This is the one place of the benchmark that calls
the metrics of `core`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from ..composition import SHIFT_KEPT, layout, obeys, said_word, shift
from ..concept import Concept, judge_texts
from ..copies import CopyDetector, copies
from ..kid import kid, spherical
from ..metrics import Judge, clip_hits, clip_scores
from .plan import Unit

Measure = Literal["accuracy", "copies", "position"] | str
"""accuracy: nearer to the concept than to what it is told from, by CLIP. copies: of the memorized image, by SSCD.
position: the subject stayed where it was. Any other: a word of that group is obeyed (`composition.obeys`).
"""


@dataclass(frozen=True)
class Observation:
    """How many of each prompt's pictures have a property."""

    measure: Measure
    judge: str | None
    """Which judge said so; None for measures that need none."""
    name: str
    role: str
    prompts: tuple[str, ...]
    images: int
    """Pictures of each prompt."""
    before: tuple[int, ...]
    """By the pretrained model."""
    after: tuple[int, ...]
    score_before: tuple[float, ...] = ()
    """Mean cosine of each prompt's pictures with the concept's text, or with the memorized image."""
    score_after: tuple[float, ...] = ()
    kid: float | None = None
    """Kernel distance between the pictures before and after, over the judge's features."""
    kid_error: float | None = None

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Observation:
        """The inverse of `asdict`, after JSON made lists of tuples."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()})


def observe(
    judge: Judge,
    concept: Concept,
    unit: Unit,
    before: np.ndarray,
    after: np.ndarray,
    words: Mapping[str, Sequence[str]],
) -> list[Observation]:
    """What a judge says of a unit.

    Args:
        judge: the CLIP model.
        concept: the ablation that the unit belongs to.
        unit: what was drawn.
        before: uint8 [prompts, seeds, height, width, 3], sRGB.
        after: the same after the edit.
        words: groups of words, of the target's and the surrounding prompts, that should still be obeyed.
    """
    name = concept.target if unit.role in ("misspelled", "paraphrase") else unit.name
    wanted = judge.embed_concept(judge_texts(name, concept))
    other = judge.embed_concept(judge_texts(concept.target if unit.role == "anchor" else concept.anchor, concept))
    embedded = [judge.embed_images(images.reshape(-1, *images.shape[2:])) for images in (before, after)]
    hits = [clip_hits(pictures, wanted, other).numpy() for pictures in embedded]
    scores = [clip_scores(pictures, wanted).double().numpy() for pictures in embedded]
    distance, error = _kid(embedded[0], embedded[1], unit)
    found = [_observation("accuracy", judge.name, unit, hits, scores, kid=distance, kid_error=error)]
    if unit.role in ("target", "surrounding"):
        found += [
            made
            for group, options in words.items()
            if (made := _obeyed(judge, unit, embedded, group, options)) is not None
        ]
    return found


def observe_copies(
    detector: CopyDetector, original: np.ndarray, unit: Unit, before: np.ndarray, after: np.ndarray
) -> Observation:
    """How many pictures of a unit are copies of a memorized image, uint8 [height, width, 3]; otherwise as `observe`."""
    similar = [
        detector.similarities(images.reshape(-1, *images.shape[2:]), original[None]) for images in (before, after)
    ]
    return _observation(
        "copies", None, unit, [copies(one) for one in similar], [one.amax(dim=1).double().numpy() for one in similar]
    )


def observe_position(unit: Unit, before: np.ndarray, after: np.ndarray) -> Observation:
    """How many subjects stayed where they were (within `composition.SHIFT_KEPT`); arguments as for `observe`."""
    height, width = before.shape[2:4]
    stayed = []
    for one, other in zip(before.reshape(-1, height, width, 3), after.reshape(-1, height, width, 3), strict=True):
        stayed.append(shift(layout(one), layout(other), height, width) < SHIFT_KEPT)
    return _observation("position", None, unit, [np.ones(len(stayed), dtype=bool), np.array(stayed)], None)


def _observation(
    measure: Measure,
    judge: str | None,
    unit: Unit,
    hits: Sequence[np.ndarray],
    scores: Sequence[np.ndarray] | None,
    **more: float | None,
) -> Observation:
    """From bool and float [prompts * seeds], before and after."""
    counts = [one.reshape(len(unit.prompts), -1).sum(axis=1) for one in hits]
    means = [one.reshape(len(unit.prompts), -1).mean(axis=1) for one in scores or ()]
    return Observation(
        measure,
        judge,
        unit.name,
        unit.role,
        unit.prompts,
        len(unit.seeds),
        before=tuple(map(int, counts[0])),
        after=tuple(map(int, counts[1])),
        score_before=tuple(round(float(mean), 5) for mean in means[0]) if means else (),
        score_after=tuple(round(float(mean), 5) for mean in means[1]) if means else (),
        **more,
    )


def _obeyed(
    judge: Judge, unit: Unit, embedded: Sequence[Tensor], group: str, options: Sequence[str]
) -> Observation | None:
    places = [place for place, prompt in enumerate(unit.prompts) if said_word(prompt, options) is not None]
    if not places:
        return None
    seeds = len(unit.seeds)
    hits = [
        np.concatenate(
            [obeys(one[place * seeds : (place + 1) * seeds], unit.prompts[place], judge, options) for place in places]
        )
        for one in embedded
    ]
    said = Unit(unit.name, unit.role, tuple(unit.prompts[place] for place in places), unit.seeds)
    return _observation(group, judge.name, said, hits, None)


def _kid(before: Tensor, after: Tensor, unit: Unit) -> tuple[float | None, float | None]:
    if unit.pictures < 2:
        return None, None
    groups = np.repeat(np.arange(len(unit.prompts)), len(unit.seeds))
    found = kid(spherical(before), spherical(after), groups)
    return _finite(found.value), _finite(found.standard_error)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
