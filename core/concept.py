"""What to ablate, and the text that follows from it: prompt pairs (c, c*), evaluation prompts, CLIP texts.

`pairs` implements Sec. 3.3 of Kumari et al., "Ablating Concepts in Text-to-Image Diffusion Models" (arXiv 2303.13516).
Where templates come from is left to `prompts.py`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, get_args

from .errors import AblationError
from .prompts import PromptSource, collapse, distinct, fill, normalise, replace_noun, says, word_pattern

Kind = Literal["instance", "style", "memorized"]

MAX_NAME_LENGTH = 300
MAX_CAPTION_LENGTH = 1000
ARROW = " => "
"""Between a further target prompt and what is to be drawn in its place."""


@dataclass(frozen=True)
class PromptPair:
    """An anchor prompt c and the target prompt c* that is to draw what c draws."""

    anchor: str
    target: str


@dataclass(frozen=True)
class Concept:
    """A concept to ablate; all strings are stripped and their inner whitespace collapsed.

    Raises:
        AblationError: an empty, too long or unprintable text, a target that is the anchor, an unknown kind, or user
            prompts that do not fit the kind.
    """

    target: str
    """Name of the instance or style, or the caption that reproduces a memorized image."""
    anchor: str
    """What is drawn instead: a noun ("cat"), a medium ("painting"), or a caption that does not reproduce the image."""
    kind: Kind = "instance"
    anchor_prompts: tuple[str, ...] = ()
    """The user's own anchor prompts, in place of templates."""
    target_prompts: tuple[str, ...] = ()
    """Other captions that reproduce a memorized image. For an instance or a style, other prompts that reach it, such as
    a leak scan finds, each alone or as "prompt => anchor prompt"; alone, it is to draw the anchor."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", collapse(self.target))
        object.__setattr__(self, "anchor", collapse(self.anchor))
        object.__setattr__(self, "anchor_prompts", _clean(self.anchor_prompts))
        object.__setattr__(self, "target_prompts", _clean(self.target_prompts))
        if self.kind not in get_args(Kind):
            raise AblationError(f"The kind {self.kind!r} is unknown; choose instance, style or memorized.")
        _check_texts(self)
        if self.kind != "memorized":
            _check_anchor_prompts(self, self.anchor_prompts)
            _check_anchor_prompts(self, [pair.anchor for pair in _further_pairs(self)], named=False)


def pairs(
    concept: Concept, source: PromptSource, count: int | None = None, others: Sequence[Concept] = ()
) -> tuple[PromptPair, ...]:
    """The pairs (c, c*) to train on: the first `count` of them, or all.

    instance: c is a template with the anchor's name, or a user's prompt; c* has the target's name in its place.
    style: c is a template with the anchor, or a user's prompt as it is; c* appends a style suffix, each in turn.
    Both: further target prompts with their anchor prompts, one after each of the first pairs.
    memorized: every anchor prompt with the caption and every target prompt; each target prompt comes once before any
    comes again.

    No prompt of an instance or style pair is one of `evaluation_prompts` for the target or the anchor. A memorized
    image is evaluated on the captions that reproduce it, which its pairs are made of, so nothing is held out there.

    No anchor prompt names the target of one of `others`, which the same edit removes: as an anchor it would keep that.

    Raises:
        AblationError: `count` is below 1, or no pair is left.
    """
    _check_count(count)
    if concept.kind == "instance":
        made = _instance_pairs(concept, source)
    elif concept.kind == "style":
        made = _style_pairs(concept, source)
    else:
        made = _memorized_pairs(concept)
    if concept.kind != "memorized":
        turns = zip_longest(made, _further_pairs(concept))
        made = [pair for turn in turns for pair in turn if pair is not None]
    held_out, names_another = _held_out((concept.target, concept.anchor), concept, source), _targets_in(others)
    left = {
        (normalise(pair.anchor), normalise(pair.target)): pair
        for pair in made
        if normalise(pair.anchor) != normalise(pair.target)
        and not {normalise(pair.anchor), normalise(pair.target)} & held_out
        and not names_another(pair.anchor)
    }
    if not left:
        raise AblationError(
            f"No training prompt is left for {concept.target!r}, as all are kept for evaluation, do not tell it from "
            "its anchor, or name another target; add other anchor prompts."
        )
    return tuple(left.values())[:count]


def evaluation_prompts(name: str, concept: Concept, source: PromptSource, count: int = 10) -> tuple[str, ...]:
    """Held-out prompts that draw `name` (the target, the anchor or a surrounding concept) in the setting of `concept`.

    The i-th prompts of two names differ in the name (and, for the anchor of a style, in having no suffix) only. For a
    memorized image: its captions, its anchor prompts, or, for another name, instance templates; `count` or as many as
    there are.

    Raises:
        AblationError: `count` is below 1, or above the number of templates of an instance or style.
    """
    _check_count(count)
    prompts = _all_evaluation_prompts(name, concept, source)
    if count > len(prompts) and concept.kind != "memorized":
        raise AblationError(
            f"There are only {len(prompts)} evaluation prompts for this {concept.kind}, not {count}; ask for fewer."
        )
    return prompts[:count]


def preservation_prompts(
    names: Sequence[str], concept: Concept, source: PromptSource, count: int, others: Sequence[Concept] = ()
) -> tuple[str, ...]:
    """Training prompts, never evaluation ones, that draw each of `names`: what the edit must leave as it is.

    The names take turns. None names the target of one of `others`, which the same edit removes. Returns `count`
    prompts, or as many as there are.

    Raises:
        AblationError: `count` is below 1, or one of `names` is the target.
    """
    _check_count(count)
    kept = _clean(names)
    if any(_same(name, concept.target) for name in kept):
        raise AblationError(f"{concept.target!r} is the target and cannot be preserved; remove it from that list.")
    templates = source.style_train if concept.kind == "style" else source.instance_train
    held_out, names_another = _held_out(kept, concept, source), _targets_in(others)
    # Shifting the template by the name keeps a round of names from sharing one scene.
    drawn = (
        _training_prompt(name, turn + place, templates, concept, source)
        for turn in range(len(templates))
        for place, name in enumerate(kept)
    )
    left = (prompt for prompt in drawn if normalise(prompt) not in held_out and not names_another(prompt))
    return distinct(left)[:count]


def wordings(concept: Concept) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The texts that mean the target, and those that mean its anchor: the names and the user's own prompts.

    Raises:
        AblationError: a further target prompt has an empty side.
    """
    if concept.kind == "memorized":
        return _captions(concept), distinct((concept.anchor, *concept.anchor_prompts))
    further = _further_pairs(concept)
    return (
        distinct((concept.target, *(pair.target for pair in further))),
        distinct((concept.anchor, *concept.anchor_prompts, *(pair.anchor for pair in further))),
    )


def judge_texts(name: str, concept: Concept) -> tuple[str, ...]:
    """Texts by which CLIP recognises `name` itself, to be averaged as an ensemble."""
    name = collapse(name)
    if concept.kind == "memorized":
        return (name,)
    if concept.kind == "style" and not _same(name, concept.anchor):
        return (f"{concept.anchor} in the style of {name}", f"{name} style {concept.anchor}")
    return (name, fill("a {}", name))


def _instance_pairs(concept: Concept, source: PromptSource) -> list[PromptPair]:
    if concept.anchor_prompts:
        return [
            PromptPair(prompt, _replace_name(prompt, concept.anchor, concept.target))
            for prompt in concept.anchor_prompts
        ]
    return [PromptPair(fill(text, concept.anchor), fill(text, concept.target)) for text in source.instance_train]


def _style_pairs(concept: Concept, source: PromptSource) -> list[PromptPair]:
    prompts = concept.anchor_prompts or tuple(fill(text, concept.anchor) for text in source.style_train)
    suffixes = source.style_suffixes_train
    if not prompts or not suffixes:
        return []
    # A user's few prompts are repeated until every suffix has been seen.
    chosen = [(prompts[i % len(prompts)], suffixes[i % len(suffixes)]) for i in range(max(len(prompts), len(suffixes)))]
    return [PromptPair(prompt, _append(prompt, suffix, concept.target)) for prompt, suffix in chosen]


def _further_pairs(concept: Concept) -> list[PromptPair]:
    """The pairs of the target prompts of an instance or a style.

    Raises:
        AblationError: one side of an arrow is empty, or both are the same.
    """
    found = []
    for text in concept.target_prompts:
        prompt, arrow, anchor = (collapse(part) for part in text.partition(ARROW))
        anchor = anchor if arrow else fill("a {}", concept.anchor)
        if not prompt or not anchor or _same(prompt, anchor):
            raise AblationError(
                f"The target prompt {text!r} must be a prompt, or two different ones: prompt => anchor."
            )
        found.append(PromptPair(anchor, prompt))
    return found


def _memorized_pairs(concept: Concept) -> list[PromptPair]:
    anchors = concept.anchor_prompts or (concept.anchor,)
    targets = _captions(concept)
    return [
        PromptPair(anchors[(place + turn) % len(anchors)], target)
        for turn in range(len(anchors))
        for place, target in enumerate(targets)
    ]


def _all_evaluation_prompts(name: str, concept: Concept, source: PromptSource) -> tuple[str, ...]:
    name = collapse(name)
    if concept.kind == "style":
        return tuple(
            _style_prompt(name, index, source.style_evaluation, source.style_suffixes_evaluation, concept)
            for index in range(len(source.style_evaluation))
        )
    if concept.kind == "memorized" and _same(name, concept.target):
        return _captions(concept)
    if concept.kind == "memorized" and _same(name, concept.anchor):
        return concept.anchor_prompts or (concept.anchor,)
    return tuple(fill(text, name) for text in source.instance_evaluation)


def _held_out(names: Iterable[str], concept: Concept, source: PromptSource) -> set[str]:
    if concept.kind == "memorized":
        names = [name for name in names if not _same(name, concept.target) and not _same(name, concept.anchor)]
    return {normalise(prompt) for name in names for prompt in _all_evaluation_prompts(name, concept, source)}


def _training_prompt(name: str, index: int, templates: Sequence[str], concept: Concept, source: PromptSource) -> str:
    if concept.kind == "style":
        return _style_prompt(name, index, templates, source.style_suffixes_train, concept)
    if concept.kind == "memorized" and _same(name, concept.anchor):
        # captions already, which no template takes
        captions = concept.anchor_prompts or (concept.anchor,)
        return captions[index % len(captions)]
    return fill(templates[index % len(templates)], name)


def _style_prompt(name: str, index: int, templates: Sequence[str], suffixes: Sequence[str], concept: Concept) -> str:
    prompt = fill(templates[index % len(templates)], concept.anchor)
    if _same(name, concept.anchor):
        return prompt
    if not suffixes:
        raise AblationError("The prompt source has no style suffix; add some to its prompts.json.")
    return _append(prompt, suffixes[index % len(suffixes)], name)


def _append(prompt: str, suffix: str, name: str) -> str:
    """`prompt` and the filled style suffix; a full stop at the prompt's end would cut the suffix off from it."""
    tail = fill(suffix.strip(), name)
    return prompt.rstrip(" .,;") + ("" if tail.startswith(",") else " ") + tail


def _replace_name(prompt: str, name: str, other: str) -> str:
    """`prompt` with `other` for every `name`, or for every plural where the prompt has no singular."""
    if says(name, prompt):
        return replace_noun(word_pattern(name), prompt, other)
    return replace_noun(word_pattern(name + "s"), prompt, other + "s")


def _names(text: str, name: str) -> bool:
    return any(says(form, text) for form in (name, name + "s"))


def _targets_in(concepts: Sequence[Concept]) -> Callable[[str], bool]:
    """Says whether a text names the target of one of the concepts."""
    if not concepts:
        return lambda _: False
    forms = (form for concept in concepts for form in (concept.target, concept.target + "s"))
    pattern = re.compile("|".join(map(word_pattern, forms)), re.IGNORECASE)
    return lambda text: pattern.search(text) is not None


def _captions(concept: Concept) -> tuple[str, ...]:
    return distinct((concept.target, *concept.target_prompts))


def _same(one: str, other: str) -> bool:
    return normalise(one) == normalise(other)


def _clean(texts: Iterable[str]) -> tuple[str, ...]:
    return distinct(filter(None, map(collapse, texts)))


def _check_count(count: int | None) -> None:
    if count is not None and count < 1:
        raise AblationError(f"The number of prompts must be at least 1, not {count}.")


def _check_texts(concept: Concept) -> None:
    limit = MAX_CAPTION_LENGTH if concept.kind == "memorized" else MAX_NAME_LENGTH
    for what, text in (("target", concept.target), ("anchor", concept.anchor)):
        if not text:
            raise AblationError(f"The {what} is empty; name a concept.")
        if len(text) > limit:
            raise AblationError(f"The {what} has {len(text)} characters; use at most {limit:,}.")
    for text in (concept.target, concept.anchor, *concept.anchor_prompts, *concept.target_prompts):
        # lone surrogates are what Python makes of bytes that are no UTF-8
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
            raise AblationError(f"The text {text!r} contains a control character or one that is no text; remove it.")
    if _same(concept.target, concept.anchor):
        raise AblationError(f"The target and the anchor are both {concept.target!r}; choose another anchor.")


def _check_anchor_prompts(concept: Concept, prompts: Iterable[str], *, named: bool = True) -> None:
    """`named`: whether a prompt of an instance must have the anchor's name, which the target's takes the place of."""
    for prompt in prompts:
        if named and concept.kind == "instance" and not _names(prompt, concept.anchor):
            raise AblationError(f"The anchor prompt {prompt!r} lacks the anchor {concept.anchor!r}; add it.")
        # An anchor such as "orange cat" may contain the target "cat"; only then is the target's name welcome.
        if _names(prompt, concept.target) and not _names(concept.anchor, concept.target):
            raise AblationError(
                f"The anchor prompt {prompt!r} names the target {concept.target!r}, which it must not draw; reword it."
            )
