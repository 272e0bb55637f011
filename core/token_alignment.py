"""Which position of an anchor prompt stands for which position of its target prompt.

Positions are those of a CLIP context: a start token, the prompt's tokens, an end token, padding up to the window.
"""

from __future__ import annotations

from collections.abc import Sequence

_SPECIAL = 2


def align(
    target: Sequence[int], anchor: Sequence[int], names: tuple[Sequence[int], Sequence[int]], window: int
) -> list[int | None]:
    """For each position of the target prompt's context, the position of the anchor prompt's that takes its place.

    None is a token that has no counterpart and stays.

    Start goes to start and end to end. Padding stays where it is, so that embeddings differ by meaning and not by
    position, except where the anchor prompt is the longer one and has no padding yet. Tokens go by `_match`. What does
    not fit the window is cut off, as text encoders do.

    Args:
        target: tokens of the target prompt, without start, end and padding.
        anchor: those of the anchor prompt.
        names: tokens of the target's and of the anchor's name.
        window: length of the contexts, at least 3.

    Returns:
        `window` positions.
    """
    target, anchor = target[: window - _SPECIAL], anchor[: window - _SPECIAL]
    tokens = [None if position is None else 1 + position for position in _match(target, anchor, *names)]
    padding = range(len(target) + _SPECIAL, window)
    first_padding = min(len(anchor) + _SPECIAL, window - 1)
    return [0, *tokens, 1 + len(anchor), *(max(position, first_padding) for position in padding)]


def is_padding(tokens: int, window: int) -> list[bool]:
    """Which of the `window` positions of a prompt of that many tokens are padding."""
    return [position >= tokens + _SPECIAL for position in range(window)]


def _match(
    target: Sequence[int], anchor: Sequence[int], target_name: Sequence[int], anchor_name: Sequence[int]
) -> Sequence[int | None]:
    """For each token of the target prompt its counterpart in the anchor prompt; `len(anchor)` is the end token.

    Where both prompts hold their names in the same frame (instances), all tokens of the target's name go to the last
    of the anchor's: in a causal text encoder the first that knows the whole noun. The frame goes to itself, "an" to
    "a". Otherwise (styles, captions, plurals) what the prompts have in common at either end goes to itself; the rest
    of the target goes to the last token of the anchor's rest or, if it has none (a style suffix), to what follows,
    as though the prompt went on without it. Of that rest, words before the target's name stay: a causal text encoder
    gives "in the style of" the same embeddings before every style, so moving them would move them all.
    """
    framed = _match_names(target, anchor, target_name, anchor_name)
    return _match_ends(target, anchor, target_name) if framed is None else framed


def _match_names(
    target: Sequence[int], anchor: Sequence[int], target_name: Sequence[int], anchor_name: Sequence[int]
) -> list[int] | None:
    here, there = _find(target, target_name), _find(anchor, anchor_name)
    if not here or len(here) != len(there):
        return None
    matched: list[int] = []
    done = 0
    for place, counterpart in zip((*here, len(target)), (*there, len(anchor)), strict=True):
        if place - len(matched) != counterpart - done:
            return None
        matched += range(done, counterpart)
        if place < len(target):
            done = counterpart + len(anchor_name)
            matched += [done - 1] * len(target_name)
    return matched


def _match_ends(target: Sequence[int], anchor: Sequence[int], name: Sequence[int]) -> list[int | None]:
    shorter = min(len(target), len(anchor))
    before = next((i for i in range(shorter) if target[i] != anchor[i]), shorter)
    after = next((i for i in range(shorter - before) if target[-1 - i] != anchor[-1 - i]), shorter - before)
    rest_ends = len(anchor) - after
    counterpart = rest_ends - 1 if rest_ends > before else rest_ends
    rest = target[before : len(target) - after]
    unnamed = next(iter(_find(rest, name)), 0)
    moved = [counterpart] * (len(rest) - unnamed)
    return [*range(before), *[None] * unnamed, *moved, *range(rest_ends, len(anchor))]


def _find(tokens: Sequence[int], name: Sequence[int]) -> list[int]:
    """Where `name` occurs in `tokens`, without overlaps."""
    places: list[int] = []
    position = 0
    while name and position + len(name) <= len(tokens):
        found = list(tokens[position : position + len(name)]) == list(name)
        if found:
            places.append(position)
        position += len(name) if found else 1
    return places
