from __future__ import annotations

import re
from functools import cache

import pytest

from concept_ablation.core.concept import Concept, evaluation_prompts, pairs
from concept_ablation.core.errors import AblationError
from concept_ablation.core.misspellings import NEIGHBOURS, edit_distance, misspelled_prompts, misspellings
from concept_ablation.core.prompts import BUILT_IN, normalise

NAMES = ("tropical fish", "Van Gogh", "R2D2", "owl", "ox", "Élise", "Captain Juniper's midnight regatta, 1931")


def distance(one: str, other: str) -> int:
    """Optimal string alignment distance, straight from its recursive definition."""

    @cache
    def rest(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        found = [rest(i - 1, j) + 1, rest(i, j - 1) + 1, rest(i - 1, j - 1) + (one[i - 1] != other[j - 1])]
        if i > 1 and j > 1 and one[i - 1] == other[j - 2] and one[i - 2] == other[j - 1]:
            found.append(rest(i - 2, j - 2) + 1)
        return min(found)

    return rest(len(one), len(other))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("cat", "cat", 0),
        ("cat", "act", 1),
        ("cat", "cut", 1),
        ("cat", "at", 1),
        ("cat", "cart", 1),
        ("", "cat", 3),
        ("cat", "", 3),
        ("ca", "abc", 3),  # unlike the unrestricted Damerau distance, which is 2
        ("kitten", "sitting", 3),
        ("Cat", "cat", 1),
    ],
)
def test_known_distances(one: str, other: str, expected: int) -> None:
    assert edit_distance(one, other) == expected == distance(one, other)


@pytest.mark.parametrize("wanted", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_typos_are_as_far_as_asked_for(name: str, wanted: int) -> None:
    typos = misspellings(name, 12, wanted)
    assert len(typos) == 12 == len({normalise(typo) for typo in typos})
    assert {distance(name, typo) for typo in typos} == {wanted}
    assert {edit_distance(name, typo) for typo in typos} == {wanted}


@pytest.mark.parametrize("wanted", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_words_keep_their_first_letters(name: str, wanted: int) -> None:
    for typo in misspellings(name, 12, wanted):
        assert [word[0] for word in typo.split()] == [word[0] for word in name.split()]


def test_all_four_errors_are_made() -> None:
    typos = misspellings("rooster", 40)
    lengths = {len(typo) for typo in typos}
    assert lengths == {6, 7, 8}
    same = [typo for typo in typos if len(typo) == 7]
    assert any(sorted(typo) == sorted("rooster") for typo in same)
    assert any(sorted(typo) != sorted("rooster") for typo in same)


def test_wrong_letters_are_mostly_neighbours() -> None:
    wrong = [
        (right, typed)
        for name in ("sunflower", "rutkowski", "monet", "grumpy", "painting")
        for typo in misspellings(name, 30)
        if len(typo) == len(name) and sorted(typo) != sorted(name)
        for right, typed in zip(name, typo, strict=True)
        if right != typed
    ]
    assert len(wrong) > 30
    assert 0.7 < sum(typed in NEIGHBOURS[right] for right, typed in wrong) / len(wrong) < 1
    assert set(NEIGHBOURS["g"]) == set("tyfhvb")
    assert all(one in NEIGHBOURS[other] for one, others in NEIGHBOURS.items() for other in others)


def test_case_follows_the_name() -> None:
    for typo in misspellings("Van Gogh", 60):
        assert typo[0] == "V" and typo.count("G") == 1 and sum(letter.isupper() for letter in typo) == 2
    assert all(typo.isupper() for typo in misspellings("R2D2", 20))


def test_typos_are_always_the_same() -> None:
    # those that measurements were made with
    assert misspellings("rooster", 4) == ("rooser", "rwoster", "rosoter", "roosetr")
    assert misspellings("rooster", 9)[:4] == misspellings("rooster", 4)


def test_given_texts_are_avoided() -> None:
    usual = misspellings("rooster", 8)
    words, prompts = usual[:3], [f"An EMOJI of a {typo.upper()}, in rain" for typo in usual[3:6]]
    left = misspellings("rooster", 60, avoid=[*words, *prompts])
    assert not set(usual[:6]) & set(left)
    assert set(usual[6:]) <= set(left)
    # A typo that is only a part of a word is not that word.
    assert usual[0] in misspellings("rooster", 60, avoid=[usual[0] + "ish"])


def test_the_plural_is_no_typo() -> None:
    assert "birds" not in misspellings("bird", 60)


def test_a_typo_that_only_changes_the_case_or_marks_is_none() -> None:
    assert not {"c3po", "c 3po"} & {typo.casefold() for typo in misspellings("C-3PO", 40)}


def test_too_short_names() -> None:
    with pytest.raises(AblationError, match="only 0 such typos of '!'"):
        misspellings("!", 1)
    with pytest.raises(AblationError, match=r"such typos of 'a', not 90; ask for fewer\.$"):
        misspellings("a", 90)
    with pytest.raises(ValueError, match="1 or 2"):
        misspellings("rooster", 1, 3)


@pytest.mark.parametrize("wanted", [1, 2])
@pytest.mark.parametrize("concept", [Concept("owl", "bird"), Concept("Van Gogh", "painting", "style")])
def test_prompts_are_held_out_ones_with_a_typo_in_place_of_the_name(concept: Concept, wanted: int) -> None:
    right = evaluation_prompts(concept.target, concept, BUILT_IN, 10)
    wrong = misspelled_prompts(concept, BUILT_IN, 10, wanted)
    assert [distance(one, other) for one, other in zip(right, wrong, strict=True)] == [wanted] * 10
    assert len(set(wrong)) == 10
    assert not any(re.search(rf"\b{concept.target}\b", prompt) for prompt in wrong)
    trained = {normalise(text) for pair in pairs(concept, BUILT_IN) for text in (pair.anchor, pair.target)}
    assert not trained & {normalise(prompt) for prompt in wrong}


def test_articles_stay_right() -> None:
    for prompt in misspelled_prompts(Concept("owl", "bird"), BUILT_IN, 10):
        assert " a o" not in f" {prompt}"
    assert any(" an o" in f" {prompt}" for prompt in misspelled_prompts(Concept("owl", "bird"), BUILT_IN, 10))


def test_typos_that_were_trained_are_left_out() -> None:
    first = misspelled_prompts(Concept("rooster", "bird"), BUILT_IN, 1)[0]
    typo = first.split()[-1]
    assert distance("rooster", typo) == 1
    trained = Concept("rooster", "bird", anchor_prompts=("a bird", f"a bird and a {typo}"))
    assert all(typo not in prompt.split() for prompt in misspelled_prompts(trained, BUILT_IN, 10))


def test_captions_of_a_memorized_image_take_turns() -> None:
    captions = ("Night bus to Marzipan Square", "the bus at midnight")
    concept = Concept(captions[0], "a bus", "memorized", target_prompts=captions[1:])
    wrong = misspelled_prompts(concept, BUILT_IN, 5, 2)
    assert [distance(captions[place % 2], prompt) for place, prompt in enumerate(wrong)] == [2] * 5
    assert len(set(wrong)) == 5


def test_more_prompts_than_there_are() -> None:
    with pytest.raises(AblationError, match="evaluation prompts"):
        misspelled_prompts(Concept("rooster", "bird"), BUILT_IN, 17)
