"""Which anchor position stands for which target position: hand-made prompts and real templates."""

from __future__ import annotations

from concept_ablation.core.concept import Concept, pairs
from concept_ablation.core.token_alignment import align, is_padding


def test_instances_go_to_the_last_token_of_the_anchor():
    # a photo of [an angry cat] here -> a photo of [a cat] here; window 10
    target, anchor = [1, 2, 3, 5, 8, 9, 7], [1, 2, 3, 4, 9, 7]
    names = [8, 9], [9]
    #                                                   start a  photo of an angry cat here end pad
    assert align(target, anchor, names, window=10) == [0, 1, 2, 3, 4, 5, 5, 6, 7, 9]


def test_an_anchor_of_several_tokens_is_met_at_its_last_and_padding_waits_for_its_own():
    # [cat] here -> [furry house cat] here: the anchor prompt ends two positions later
    assert align([9, 7], [5, 6, 9, 7], ([9], [5, 6, 9]), window=9) == [0, 3, 4, 5, 6, 6, 6, 7, 8]


def test_every_occurrence_of_a_name_is_matched():
    # [grumpy cat] and [grumpy cat] -> [cat] and [cat]
    assert align([8, 9, 3, 8, 9], [9, 3, 9], ([8, 9], [9]), window=8) == [0, 1, 1, 2, 3, 3, 4, 7]


def test_a_style_goes_to_the_end_of_the_anchor_prompt_and_its_preposition_stays():
    # a painting of ships [by] van gogh style -> a painting of ships
    target, anchor = [1, 2, 3, 4, 6, 7, 8, 9], [1, 2, 3, 4]
    #                                             start a  painting   by    van gogh style end pad
    assert align(target, anchor, ([7, 8], [2]), 12) == [0, 1, 2, 3, 4, None, 5, 5, 5, 5, 10, 11]


def test_plurals_and_captions_keep_what_they_share():
    # two [grumpy cats] here -> two [cats] here, where "cats" is another token than "cat"
    assert align([1, 8, 99, 7], [1, 99, 7], ([8, 9], [9]), window=8) == [0, 1, 2, 2, 3, 4, 6, 7]
    # nothing in common: all to the last token
    assert align([1, 2, 3], [4, 5], ([30], [40]), window=7) == [0, 2, 2, 2, 3, 5, 6]


def test_prompts_longer_than_the_window_are_cut():
    places = align(list(range(10, 30)), list(range(10, 20)), ([1], [2]), window=8)
    assert places == [0, 1, 2, 3, 4, 5, 6, 7]
    assert len(align([5], list(range(20)), ([5], [0]), window=8)) == 8
    assert is_padding(2, 6) == [False, False, False, False, True, True]
    assert not any(is_padding(20, 6))


def test_real_prompts_align_word_by_word(tiny):
    for concept in (Concept("grumpy cat", "cat"), Concept("owl", "bird"), Concept("Eiffel Tower", "orange tower")):
        names = tiny.tokenize(concept.target), tiny.tokenize(concept.anchor)
        for pair in pairs(concept, tiny.prompt_source, 20):
            target, anchor = tiny.tokenize(pair.target), tiny.tokenize(pair.anchor)
            places = align(target, anchor, names, 77)
            start = next(i for i in range(len(target)) if target[i : i + len(names[0])] == names[0])
            last = len(tiny.tokenize(pair.anchor[: pair.anchor.index(concept.anchor)])) + len(names[1])
            assert places[1 + start : 1 + start + len(names[0])] == [last] * len(names[0])
            frame = [place for place in places[1 : 1 + len(target)] if place != last]
            assert frame == [i for i in range(1, 1 + len(anchor)) if not last - len(names[1]) < i <= last]
            assert places[1 + len(target)] == 1 + len(anchor)
