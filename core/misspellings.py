"""Misspell a concept: whether an edit also holds for prompts with typing errors (Kumari et al. 2023, section 4.1).

A typo changes, leaves out, adds or swaps letters, never the first one of a word: people misspell that one seldom
(1.4 % of errors in Yannakoudakis and Fawthrop, "The rules of spelling errors", 1983), and a text without it is less
often read as the name. Keys beside the right one are preferred, as are doubled letters.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Iterable

from .concept import Concept, evaluation_prompts, pairs
from .errors import AblationError
from .prompts import PromptSource, collapse, normalise

_ROWS = (("qwertyuiop", 0.0), ("asdfghjkl", 0.25), ("zxcvbnm", 0.75))
"""Rows of letters of a QWERTY keyboard and how far each is shifted to the right, in keys."""
_KEYS = {key: (row, shift + column) for row, (keys, shift) in enumerate(_ROWS) for column, key in enumerate(keys)}
NEIGHBOURS = {
    key: "".join(
        other
        for other, (beside, across) in _KEYS.items()
        if other != key and abs(row - beside) <= 1 and abs(column - across) <= 1
    )
    for key, (row, column) in _KEYS.items()
}
"""The letters that touch each letter."""

_LIKELY, _UNLIKELY = 1.0, 0.02
"""Weight of a letter that a finger may slip to, and of any other: about one wrong letter in ten is of the latter."""
_TRIES_EACH = 400


def misspellings(name: str, count: int, distance: int = 1, avoid: Iterable[str] = ()) -> tuple[str, ...]:
    """`count` distinct typos of `name`, the same ones in each call.

    Args:
        name: a concept, or a caption.
        count: how many.
        distance: of each typo from `name`, 1 or 2, as `edit_distance` counts.
        avoid: names and prompts. No typo is one of them or stands in one of them, in any case.

    Raises:
        AblationError: `name` has too few letters for so many.
        ValueError: another distance.
    """
    if distance not in (1, 2):
        raise ValueError(f"the distance must be 1 or 2, not {distance}")
    name = collapse(name)
    # The plural is no error.
    taken = [f" {_words(text)} " for text in (name, name + "s", *avoid)]
    # any other seed would give other typos than those that were measured
    rng = random.Random(f"0 {distance} {name}")
    found: dict[str, str] = {}
    for _ in range(_TRIES_EACH * count):
        if len(found) == count:
            break
        typo = name
        for _ in range(distance):
            typo = _slip(typo, rng)
        if edit_distance(name, typo) == distance and not any(f" {_words(typo)} " in text for text in taken):
            found.setdefault(normalise(typo), typo)
    if len(found) < count:
        raise AblationError(f"There are only {len(found)} such typos of {name!r}, not {count}; ask for fewer.")
    return tuple(found.values())


def misspelled_prompts(concept: Concept, source: PromptSource, count: int = 10, distance: int = 1) -> tuple[str, ...]:
    """`count` evaluation prompts of the target, each with a typo of its own that no training prompt has.

    For a memorized image they are typos of its captions, each in turn.

    Raises:
        AblationError: too few evaluation prompts, or too few typos.
    """
    trained = {text for pair in pairs(concept, source) for text in (pair.anchor, pair.target)}
    avoid = (concept.anchor, *trained)
    if concept.kind == "memorized":
        captions = evaluation_prompts(concept.target, concept, source)
        each = -(-count // len(captions))
        typos = [misspellings(caption, each, distance, avoid) for caption in captions]
        return tuple(one for turn in zip(*typos, strict=True) for one in turn)[:count]
    typos = misspellings(concept.target, count, distance, avoid)
    # The i-th prompt of every name has the same setting, so the i-th prompts of the typos are those of the target.
    return tuple(evaluation_prompts(typo, concept, source, count)[place] for place, typo in enumerate(typos))


def edit_distance(one: str, other: str) -> int:
    """Fewest insertions, deletions, substitutions and swaps of neighbours that turn `one` into `other`.

    No part is edited twice (the optimal string alignment distance); case counts.
    """
    before: list[int] = []
    last = list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        row = [i]
        for j, wanted in enumerate(other, start=1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, last = last, row
    return last[-1]


def _slip(text: str, rng: random.Random) -> str:
    """`text` with one error at a letter or digit, none of which takes the first one of a word away."""
    places = [place for place, letter in enumerate(text) if letter.isalnum()]
    return rng.choice(_ERRORS)(text, rng.choice(places), rng) if places else text


def _insert(text: str, place: int, rng: random.Random) -> str:
    """Another letter behind `place`, which a finger may have hit together with the one there."""
    behind = place + 1
    letter = _letter(text[place], rng, doubled=True)
    return text[:behind] + (letter if _word_at(text, place).isupper() else letter.lower()) + text[behind:]


def _delete(text: str, place: int, rng: random.Random) -> str:
    return text if _begins(text, place) else text[:place] + text[place + 1 :]


def _substitute(text: str, place: int, rng: random.Random) -> str:
    return text if _begins(text, place) else text[:place] + _letter(text[place], rng, doubled=False) + text[place + 1 :]


def _swap(text: str, place: int, rng: random.Random) -> str:
    if _begins(text, place) or not text[place + 1 : place + 2].isalnum():
        return text
    return text[:place] + text[place + 1] + text[place] + text[place + 2 :]


_ERRORS: tuple[Callable[[str, int, random.Random], str], ...] = (_insert, _delete, _substitute, _swap)
"""Each gives back `text` as it is where that error cannot be made."""


def _begins(text: str, place: int) -> bool:
    return place == 0 or not text[place - 1].isalnum()


def _word_at(text: str, place: int) -> str:
    return next(match.group() for match in re.finditer(r"[^\W_]+", text) if match.start() <= place < match.end())


def _letter(key: str, rng: random.Random, *, doubled: bool) -> str:
    """What is typed in place of `key` or together with it, in the same case."""
    lower = key.lower()
    alphabet = string.digits if lower.isdigit() else string.ascii_lowercase
    likely = NEIGHBOURS.get(lower, "") + (lower if doubled else "")
    options = sorted({*alphabet, *likely} - (set() if doubled else {lower}))
    chosen = rng.choices(options, [_LIKELY if option in likely else _UNLIKELY for option in options])[0]
    return chosen.upper() if key.isupper() else chosen


def _words(text: str) -> str:
    """`text` as words with one space between them, so that whole words can be found in it."""
    return collapse("".join(letter if letter.isalnum() else " " for letter in normalise(text)))
