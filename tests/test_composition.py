"""Composition: words are told apart by the judge's own nearest text, place and size by pixels that were painted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from concept_ablation.core.composition import (
    border_colour,
    composition_kept,
    layout,
    obeys,
    said_word,
)
from concept_ablation.core.errors import AblationError

PALETTE = {"red": (220, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 220)}
OPTIONS = tuple(PALETTE)


class BorderJudge:
    """Stands in for CLIP: a picture is its border's colour, a text the colours that it names."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def embed_images(self, images: np.ndarray) -> Tensor:
        return F.normalize(torch.tensor(np.stack([border_colour(image) for image in images])).float(), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        self.texts += texts
        named = [[PALETTE[word] for word in text.split() if word in PALETTE] for text in texts]
        return F.normalize(torch.tensor(np.stack([np.sum(colours, axis=0) for colours in named])).float(), dim=-1)


def picture(ground: str, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """64x64 of one colour, with a white box (top, bottom, left, right)."""
    image = np.tile(np.array(PALETTE[ground], dtype=np.uint8), (64, 64, 1))
    if box is not None:
        image[box[0] : box[1], box[2] : box[3]] = 255
    return image


def test_the_layout_of_a_painted_box_is_where_it_was_painted():
    found = layout(picture("red", (16, 32, 8, 24)))
    assert (found.x, found.y, found.area) == (16 / 64, 24 / 64, 256 / 4096)
    assert layout(picture("red")) == layout(picture("blue"))
    assert layout(picture("red")).area == 0


def test_the_border_colour_ignores_the_subject_and_a_corner_that_it_covers():
    image = picture("green", (0, 20, 0, 20))
    assert border_colour(image).tolist() == list(PALETTE["green"])


def test_a_word_counts_only_whole_and_alone():
    assert said_word("a bird on a Red background", OPTIONS) == "red"
    assert said_word("a bored bird", OPTIONS) is None
    assert said_word("a red bird on a blue background", OPTIONS) is None


def test_pictures_obey_the_word_whose_text_is_nearest_and_articles_agree():
    judge = BorderJudge()
    pictures = judge.embed_images(np.stack([picture("blue"), picture("red")]))
    assert obeys(pictures, "an owl on a blue background", judge, (*OPTIONS,)).tolist() == [True, False]
    assert judge.texts == [f"an owl on a {colour} background" for colour in ("blue", "red", "green")]
    with pytest.raises(ValueError, match="exactly one"):
        obeys(pictures, "an owl", judge, OPTIONS)


def test_shares_before_and_after_are_those_of_the_pictures():
    prompts = ["a cat on a red background", "a cat on a blue background", "a cat"]
    middle, lower, larger = (24, 40, 24, 40), (40, 56, 24, 40), (16, 48, 16, 48)
    before = np.stack([np.stack([picture(ground, middle)] * 2) for ground in ("red", "blue", "green")])
    after = before.copy()
    after[0, 1] = picture("green", middle)
    after[1, 0] = picture("blue", lower)
    after[2, 1] = picture("green", larger)
    found = composition_kept(before, after, prompts, BorderJudge(), {"colour": OPTIONS, "style": ("noto", "blob")})
    assert list(found.words) == ["colour"]
    colour = found.words["colour"]
    assert (colour.before.value, colour.after.value, colour.change.value, colour.prompts) == (1, 0.75, -0.25, 2)
    assert colour.after.low <= 0.5 and colour.after.high == 1
    # the box fell by 16 of 64 pixels, 16 / (64 sqrt 2) of the diagonal; the larger one grew fourfold around its centre
    assert found.layout.position.value == pytest.approx(5 / 6)
    assert found.layout.size.value == pytest.approx(5 / 6)
    assert found.layout.shift.value == pytest.approx(16 / (64 * 2**0.5) / 6)


def test_words_that_no_picture_lost_may_still_be_lost_by_some():
    images = np.stack([np.stack([picture(ground)] * 5) for ground in ("red", "blue")])
    prompts = ["a cat on a red background", "a cat on a blue background"]
    colour = composition_kept(images, images, prompts, BorderJudge(), {"colour": OPTIONS}).words["colour"]
    assert colour.after.low < 1 and colour.change.value == 0
    assert colour.change.low == pytest.approx(colour.after.low - 1)


def test_bad_input_is_named():
    images = np.zeros((1, 1, 8, 8, 3), dtype=np.uint8)
    with pytest.raises(AblationError, match="at least two"):
        composition_kept(images, images, ["a cat"], BorderJudge(), {"colour": ("red",)})
    with pytest.raises(ValueError, match="do not fit 2 prompts"):
        composition_kept(images, images, ["a cat", "a dog"], BorderJudge(), {})
