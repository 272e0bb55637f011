"""Concepts: validation, prompt pairs, held-out prompts, preservation prompts and CLIP texts."""

from __future__ import annotations

import dataclasses
import re

import pytest

from concept_ablation.core.concept import (
    Concept,
    PromptPair,
    evaluation_prompts,
    judge_texts,
    pairs,
    preservation_prompts,
)
from concept_ablation.core.errors import AblationError
from concept_ablation.core.prompts import BUILT_IN, PromptSource

GRUMPY = Concept("Grumpy Cat", "cat")
VAN_GOGH = Concept("Van Gogh", "painting", "style")
CAPTION = Concept("Ann Graham Lotz", "a smiling woman", "memorized", ("a1", "a2", "a3"), ("t1", "t2"))

SMALL = PromptSource(
    instance_train=("a {} in a box", "an {} at sea"),
    instance_evaluation=("a {} on Mars", "a red {}"),
    style_train=("a {} of a cat", "a {} of a dog", "a {} of a pig"),
    style_evaluation=("a {} of a car", "a {} of a bus", "a {} of a van"),
    style_suffixes_train=(" by {}", ", {} style"),
    style_suffixes_evaluation=(", after {}", "like {}"),
)


def normal(text: str) -> str:
    return " ".join(text.casefold().split())


def replaced(prompt: str, anchor: str, target: str) -> str:
    (pair,) = pairs(Concept(target, anchor, anchor_prompts=(prompt,)), BUILT_IN)
    assert pair.anchor == prompt
    return pair.target


def test_texts_are_collapsed_and_blank_or_repeated_prompts_dropped() -> None:
    concept = Concept("  Grumpy \n Cat ", "\tcat", anchor_prompts=(" a   cat", "", "A cat", "two cats"))
    assert (concept.target, concept.anchor) == ("Grumpy Cat", "cat")
    assert concept.anchor_prompts == ("a cat", "two cats")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": "  ", "anchor": "cat"}, "The target is empty"),
        ({"target": "Tom", "anchor": "\n"}, "The anchor is empty"),
        ({"target": "CAT", "anchor": " cat"}, "choose another anchor"),
        ({"target": "Tom", "anchor": "cat", "kind": "object"}, "choose instance, style or memorized"),
        ({"target": "T\x00m", "anchor": "cat"}, "control character"),
        ({"target": "Tom", "anchor": "cat\x7f"}, "control character"),
        ({"target": "Tom", "anchor": "cat", "anchor_prompts": ("a \x1bcat",)}, "control character"),
        ({"target": "\udcff", "anchor": "cat"}, "one that is no text"),
        ({"target": "x" * 301, "anchor": "cat"}, "301 characters; use at most 300"),
        ({"target": "Monet", "anchor": "p" * 301, "kind": "style"}, "301 characters; use at most 300"),
        ({"target": "x" * 1001, "anchor": "cat", "kind": "memorized"}, "1001 characters; use at most 1,000"),
        ({"target": "Tom", "anchor": "cat", "anchor_prompts": ("a cat", "a dog", "a cow")}, "'a dog' lacks the anchor"),
        ({"target": "Tom", "anchor": "cat", "anchor_prompts": ("concatenate",)}, "lacks the anchor"),
        ({"target": "Tom", "anchor": "cat", "target_prompts": ("x => X",)}, "two different ones"),
        ({"target": "Tom", "anchor": "cat", "target_prompts": ("x => a Tom",)}, "names the target"),
        ({"target": "Tom", "anchor": "cat", "anchor_prompts": ("a cat", "tom the cat")}, "names the target 'Tom'"),
        ({"target": "Monet", "anchor": "art", "kind": "style", "anchor_prompts": ("a Monet",)}, "names the target"),
    ],
)
def test_concept_errors(fields: dict[str, object], message: str) -> None:
    with pytest.raises(AblationError, match=re.escape(message)):
        Concept(**fields)


def test_what_is_just_allowed() -> None:
    assert len(Concept("x" * 300, "cat").target) == 300
    assert len(Concept("x" * 1000, "cat", "memorized", target_prompts=("y",)).target) == 1000
    assert Concept("Monet", "painting", "style", ("a harbor at dawn",)).anchor_prompts == ("a harbor at dawn",)
    assert Concept("cat", "robot cat", anchor_prompts=("a robot cat",)).anchor_prompts == ("a robot cat",)


@pytest.mark.parametrize(
    ("prompt", "anchor", "target", "expected"),
    [
        ("photo of a cat", "cat", "Grumpy Cat", "photo of a Grumpy Cat"),
        ("A cat and another CAT", "cat", "orange Tom", "An orange Tom and another orange Tom"),
        ("an owl; the owl's nest", "owl", "barn owl", "a barn owl; the barn owl's nest"),
        ("a cat in a catalog of cats", "cat", "Tom", "a Tom in a catalog of cats"),
        ("a cat and a bobcat", "cat", "Tom", "a Tom and a bobcat"),
        ("two Cats, many cats", "cat", "Tom", "two Toms, many Toms"),
        ("a cute cat", "cat", "orange Tom", "a cute orange Tom"),
        ("a robot (toy).", "robot (toy)", r"C-3PO \g<0>", r"a C-3PO \g<0>."),
        ("a C-3PO (robot), waving", "C-3PO (robot)", "R2D2", "a R2D2, waving"),
        ("a c.t and a cat", "c.t", "dog", "a dog and a cat"),
        ("a robot cat", "robot cat", "cat", "a cat"),
    ],
)
def test_the_anchor_word_is_replaced(prompt: str, anchor: str, target: str, expected: str) -> None:
    assert replaced(prompt, anchor, target) == expected


def test_instance_pairs_fill_the_templates() -> None:
    assert pairs(Concept("orange Tom", "cat"), SMALL) == (
        PromptPair("a cat in a box", "an orange Tom in a box"),
        PromptPair("a cat at sea", "an orange Tom at sea"),
    )
    assert pairs(GRUMPY, SMALL, count=1) == (PromptPair("a cat in a box", "a Grumpy Cat in a box"),)


def test_a_template_that_holds_the_anchor_word_keeps_it() -> None:
    assert pairs(Concept("Pandora", "box"), SMALL)[0] == PromptPair("a box in a box", "a Pandora in a box")


def test_style_pairs_cycle_the_suffixes() -> None:
    assert pairs(VAN_GOGH, SMALL) == (
        PromptPair("a painting of a cat", "a painting of a cat by Van Gogh"),
        PromptPair("a painting of a dog", "a painting of a dog, Van Gogh style"),
        PromptPair("a painting of a pig", "a painting of a pig by Van Gogh"),
    )


def test_no_pair_and_no_preserved_prompt_keeps_what_the_same_edit_removes() -> None:
    other = Concept("Box", "bag")
    assert pairs(Concept("orange Tom", "cat"), SMALL, others=[other]) == (
        PromptPair("a cat at sea", "an orange Tom at sea"),
    )
    assert pairs(Concept("orange Tom", "cat"), SMALL, 1, [other])[0].anchor == "a cat at sea"
    kept = preservation_prompts(["cat", "dog"], GRUMPY, SMALL, 9)
    assert any("box" in prompt for prompt in kept)
    beside = preservation_prompts(["cat", "dog"], GRUMPY, SMALL, 9, [other])
    assert set(beside) == {prompt for prompt in kept if "box" not in prompt}
    with pytest.raises(AblationError, match="name another target"):
        pairs(Concept("orange Tom", "cat"), SMALL, others=[Concept("cat", "animal")])


def test_a_users_style_prompts_stay_as_they_are_and_meet_every_suffix() -> None:
    concept = dataclasses.replace(VAN_GOGH, anchor_prompts=("Boats at sea.",))
    assert pairs(concept, SMALL) == (
        PromptPair("Boats at sea.", "Boats at sea by Van Gogh"),
        PromptPair("Boats at sea.", "Boats at sea, Van Gogh style"),
    )


def test_memorized_pairs_are_the_cross_product_with_each_caption_early() -> None:
    made = pairs(CAPTION, BUILT_IN)
    captions = ("Ann Graham Lotz", "t1", "t2")
    assert len(made) == 9
    assert set(made) == {PromptPair(anchor, target) for anchor in ("a1", "a2", "a3") for target in captions}
    assert {pair.target for pair in made[:3]} == set(captions)
    assert {pair.anchor for pair in made[:3]} == {"a1", "a2", "a3"}
    assert pairs(Concept("cap", "other", "memorized"), BUILT_IN) == (PromptPair("other", "cap"),)


def test_memorized_pair_of_one_text_is_dropped() -> None:
    assert pairs(Concept("cap", "x", "memorized", ("CAP", "b")), BUILT_IN) == (PromptPair("b", "cap"),)
    with pytest.raises(AblationError, match="No training prompt is left"):
        pairs(Concept("cap", "x", "memorized", ("cap",)), BUILT_IN)


@pytest.mark.parametrize(
    "concept", [GRUMPY, VAN_GOGH, Concept("Owl", "bird"), Concept("Dali", "oil painting", "style")]
)
def test_built_in_pairs_are_many_and_disjoint_from_evaluation(concept: Concept) -> None:
    made = pairs(concept, BUILT_IN)
    assert len({pair.anchor for pair in made}) >= 200
    assert len({pair.target for pair in made}) >= 200
    trained = {normal(text) for pair in made for text in (pair.anchor, pair.target)}
    for name in (concept.target, concept.anchor, "Snoopy"):
        everything = evaluation_prompts(name, concept, BUILT_IN, 14)
        assert len(set(everything)) == 14
        assert not trained & {normal(text) for text in everything}
    kept = preservation_prompts(("Snoopy", concept.anchor), concept, BUILT_IN, 10_000)
    for name in ("Snoopy", concept.anchor):
        assert not {normal(text) for text in kept} & set(map(normal, evaluation_prompts(name, concept, BUILT_IN, 14)))


def test_a_users_evaluation_prompt_is_not_trained_on() -> None:
    instance = dataclasses.replace(GRUMPY, anchor_prompts=("A Cat  on MARS", "a cat on Venus"))
    assert pairs(instance, SMALL) == (PromptPair("a cat on Venus", "a Grumpy Cat on Venus"),)
    style = dataclasses.replace(VAN_GOGH, anchor_prompts=("a painting of a BUS", "a boat"))
    assert {pair.anchor for pair in pairs(style, SMALL)} == {"a boat"}
    with pytest.raises(AblationError, match="No training prompt is left for 'Grumpy Cat'"):
        pairs(dataclasses.replace(GRUMPY, anchor_prompts=("a cat on Mars",)), SMALL)


def test_a_target_prompt_in_evaluation_is_not_trained_on() -> None:
    clash = dataclasses.replace(
        SMALL, style_train=("a {} of a car, after", "a {} of a cat"), style_suffixes_train=("{}",)
    )
    clash = dataclasses.replace(clash, style_suffixes_evaluation=(", after {}",))
    assert [pair.target for pair in pairs(VAN_GOGH, clash)] == ["a painting of a cat Van Gogh"]


def test_evaluation_prompts_of_an_instance() -> None:
    assert evaluation_prompts("Grumpy Cat", GRUMPY, SMALL, 2) == ("a Grumpy Cat on Mars", "a red Grumpy Cat")
    assert evaluation_prompts(" owl ", GRUMPY, SMALL, 1) == ("an owl on Mars",)


def test_evaluation_prompts_of_a_style() -> None:
    assert evaluation_prompts("Monet", VAN_GOGH, SMALL, 3) == (
        "a painting of a car, after Monet",
        "a painting of a bus like Monet",
        "a painting of a van, after Monet",
    )
    assert evaluation_prompts("Painting", VAN_GOGH, SMALL, 2) == ("a painting of a car", "a painting of a bus")


def test_evaluation_prompts_of_a_memorized_image() -> None:
    assert evaluation_prompts("ann graham lotz", CAPTION, SMALL) == ("Ann Graham Lotz", "t1", "t2")
    assert evaluation_prompts("A smiling woman", CAPTION, SMALL, 2) == ("a1", "a2")
    assert evaluation_prompts("y", Concept("x", "y", "memorized"), SMALL) == ("y",)
    assert evaluation_prompts("dog", CAPTION, SMALL) == ("a dog on Mars", "a red dog")


def test_evaluation_count_is_checked() -> None:
    with pytest.raises(AblationError, match="at least 1, not 0"):
        evaluation_prompts("cat", GRUMPY, SMALL, 0)
    with pytest.raises(AblationError, match="only 2 evaluation prompts for this instance, not 3"):
        evaluation_prompts("cat", GRUMPY, SMALL, 3)
    with pytest.raises(AblationError, match="at least 1"):
        pairs(GRUMPY, SMALL, 0)


def test_preservation_prompts_take_turns() -> None:
    assert preservation_prompts(("dog", "owl"), GRUMPY, SMALL, 10) == (
        "a dog in a box",
        "an owl at sea",
        "a dog at sea",
        "an owl in a box",
    )
    assert preservation_prompts(("dog", "owl", "emu"), CAPTION, SMALL, 3) == (
        "a dog in a box",
        "an owl at sea",
        "an emu in a box",
    )
    assert preservation_prompts(("painting", "Monet"), VAN_GOGH, SMALL, 3) == (
        "a painting of a cat",
        "a painting of a dog, Monet style",
        "a painting of a dog",
    )
    assert preservation_prompts((), GRUMPY, SMALL, 3) == ()


def test_captions_are_preserved_as_they_are() -> None:
    assert preservation_prompts((CAPTION.anchor, "dog"), CAPTION, SMALL, 4) == (
        "a1",
        "a dog at sea",
        "a2",
        "a dog in a box",
    )


def test_preservation_leaves_out_evaluation_prompts_and_refuses_the_target() -> None:
    clash = dataclasses.replace(SMALL, instance_train=("an {} on Mars", "a {} in a box"))
    assert preservation_prompts(("dog",), GRUMPY, clash, 5) == ("a dog in a box",)
    with pytest.raises(AblationError, match="'Grumpy Cat' is the target"):
        preservation_prompts(("dog", "grumpy  cat"), GRUMPY, SMALL, 5)


def test_judge_texts() -> None:
    assert judge_texts("owl", GRUMPY) == ("owl", "an owl")
    assert judge_texts("Grumpy Cat", GRUMPY) == ("Grumpy Cat", "a Grumpy Cat")
    assert judge_texts("Monet", VAN_GOGH) == ("painting in the style of Monet", "Monet style painting")
    assert judge_texts("oil painting", dataclasses.replace(VAN_GOGH, anchor="oil painting")) == (
        "oil painting",
        "an oil painting",
    )
    assert judge_texts("Ann Graham Lotz", CAPTION) == ("Ann Graham Lotz",)


def test_further_target_prompts_join_the_first_pairs_with_their_anchors():
    further = ("a cockerel and a child => a bird and a child", "chanticleer")
    concept = Concept("rooster", "bird", target_prompts=further)
    plain = pairs(Concept("rooster", "bird"), BUILT_IN)
    made = pairs(concept, BUILT_IN)
    assert made[:4] == (
        plain[0],
        PromptPair("a bird and a child", "a cockerel and a child"),
        plain[1],
        PromptPair("a bird", "chanticleer"),
    )
    assert made[4:] == plain[2:]
    styled = Concept("Monet", "painting", "style", target_prompts=("water lilies => a painting of a pond",))
    assert pairs(styled, BUILT_IN)[1] == PromptPair("a painting of a pond", "water lilies")
