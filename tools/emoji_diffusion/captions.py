"""The grammar of training captions: a subject is said in a random one of many ways.

The words agree with the prompt templates that ship with the model (assets/emoji_diffusion/prompts.json): whatever
those say, training has said as well.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator

from concept_ablation.core.prompts import fill

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "red": (220, 40, 40),
    "blue": (50, 90, 220),
    "yellow": (250, 220, 60),
    "green": (50, 160, 70),
    "black": (20, 20, 20),
    "pink": (250, 150, 190),
    "orange": (245, 140, 30),
    "purple": (130, 60, 170),
}
PLAIN = "white"
"""The background that captions need not name: no colour in a prompt means this one."""

SIZES = ("", "big", "small")
"""How large a picture is drawn: the ordinary size has no word."""

TEMPLATES = ("a {}", "{} emoji", "an emoji of a {}", "a picture of a {}", "a cute {}", "{}")
SIZED_TEMPLATES = ("a {size} {}", "an emoji of a {size} {}", "a picture of a {size} {}")
STYLE_PHRASES = ("in the style of {}", ", {} style", "by {}")

CATEGORY_SHARE = 0.3
ALIKE = {f"{sense}-no-evil monkey": 1 / 3 for sense in ("see", "hear", "speak")}
"""Concepts that are nearly one picture, and how much less often their category stands for each: together they would be
what "a monkey" means.
"""

STYLE_SHARE = 0.75
"""Of the captions with a name: a picture is learnt best from a caption that leaves nothing open."""

CATEGORY_STYLE_SHARE = 0.3
EMPTY_SHARE = 0.1
TYPO_SHARE = 0.03
PLAIN_NAMED_SHARE = 0.1
SIZE_NAMED_SHARE = 0.8


@dataclass(frozen=True)
class Subject:
    """What one training picture shows."""

    name: str
    category: str
    style: str
    background: str = PLAIN
    size: str = ""


@dataclass(frozen=True)
class Caption:
    """A text, and what it claims: None where it says nothing."""

    text: str
    name: str | None = None
    category: str | None = None
    style: str | None = None
    background: str | None = None

    def fits(self, subject: Subject) -> bool:
        """Whether every claim is true of `subject`."""
        return (
            self.name in (None, subject.name)
            and self.category in (None, subject.category)
            and self.style in (None, subject.style)
            and self.background in (None, subject.background)
        )

    @property
    def detail(self) -> int:
        """How much it says: a name is more than a category."""
        noun = 2 if self.name else 1 if self.category else 0
        return noun + (self.style is not None) + (self.background is not None)


class Dice:
    """Decisions from a torch generator, whose state a checkpoint can hold."""

    def __init__(self, rng: Generator) -> None:
        self._rng = rng

    def chance(self, share: float) -> bool:
        return torch.rand((), generator=self._rng).item() < share

    def below(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self._rng))

    def choose(self, options: Sequence[str]) -> str:
        return options[self.below(len(options))]


def caption(subject: Subject, rng: Generator, *, empty_share: float = EMPTY_SHARE) -> Caption:
    """One random caption of `subject`; a coloured background is always named, so that no colour means white."""
    dice = Dice(rng)
    if dice.chance(empty_share):
        return Caption("")
    by_category = dice.chance(CATEGORY_SHARE * ALIKE.get(subject.name, 1.0))
    noun = subject.category if by_category else subject.name
    if dice.chance(TYPO_SHARE):
        noun = misspell(noun, dice)
    sized = subject.size and dice.chance(SIZE_NAMED_SHARE)
    template = dice.choose(SIZED_TEMPLATES if sized else TEMPLATES).replace("{size}", subject.size)
    text = fill(template, noun)
    style = subject.style if dice.chance(CATEGORY_STYLE_SHARE if by_category else STYLE_SHARE) else None
    if style:
        text = join(text, dice.choose(STYLE_PHRASES).format(style))
    background = subject.background if subject.background != PLAIN or dice.chance(PLAIN_NAMED_SHARE) else None
    if background:
        text = join(text, on_background(background))
    return Caption(
        text, None if by_category else subject.name, subject.category if by_category else None, style, background
    )


def on_background(colour: str) -> str:
    """ "on a red background"."""
    return fill("on a {} background", colour)


def join(text: str, phrase: str) -> str:
    """`phrase` after `text`; one that begins with a comma brings its own separation."""
    return text + phrase if phrase.startswith(",") else f"{text} {phrase}"


def misspell(noun: str, dice: Dice) -> str:
    """`noun` with one letter dropped, changed, added or swapped with the next, never its first."""
    if len(noun) < 3:
        return noun
    place = 1 + dice.below(len(noun) - 1)
    letter = dice.choose(string.ascii_lowercase)
    before, after = noun[:place], noun[place:]
    swapped = after[1::-1] + after[2:] if len(after) > 1 else after
    return dice.choose((before + after[1:], before + letter + after[1:], before + letter + after, before + swapped))
