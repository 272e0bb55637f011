"""Automatic preservation: the nearest of what the model knows, and never what is to go."""

from __future__ import annotations

import pytest
import torch

from concept_ablation.core.closed_form import ClosedFormSettings, prompts
from concept_ablation.core.concept import Concept, evaluation_prompts
from concept_ablation.core.denoiser import Conditioning
from concept_ablation.core.errors import AblationError
from concept_ablation.core.hosts.diffusers import ModelHints
from concept_ablation.core.neighbours import generic_prompts, holdable, nearest
from concept_ablation.core.vocabulary import COMMON, Vocabulary

CAT = Concept("grumpy cat", "cat")
ANGLES = {"grumpy cat": 0.0, "lion": 0.3, "tiger": -0.2, "car": 1.5, "house": 3.0, "dog": 0.5}


@pytest.fixture
def placed(tiny, monkeypatch):
    """A model whose text encoder puts each name at an angle of our choice, at the end token and nowhere else."""

    def encode(self, prompts):
        context = torch.randn(len(prompts), 77, 2, generator=torch.Generator().manual_seed(0))
        for row, prompt in enumerate(prompts):
            angle = torch.tensor(ANGLES.get(prompt, 2.0))
            context[row, len(tiny.tokenize(prompt)) + 1] = 7 * torch.stack((angle.cos(), angle.sin()))
        return Conditioning({"context": context})

    monkeypatch.setattr(type(tiny), "_encode", encode)
    tiny.vocabulary = Vocabulary(("house", "lion", "cat", "car", "Grumpy Cat", "tiger", "dog"), ("cubism",))
    return tiny


def test_the_nearest_come_first_and_the_users_own_not_again(placed):
    assert nearest(placed, CAT, 3) == ("tiger", "lion", "dog")
    assert nearest(placed, CAT, 2, known=("Tiger",)) == ("lion", "dog")
    assert nearest(placed, CAT, 99) == ("tiger", "lion", "dog", "car", "house"), "neither target nor anchor"
    assert nearest(placed, CAT, 2, others=[Concept("lion", "animal")]) == ("tiger", "dog")
    assert nearest(placed, CAT, 0) == ()
    with pytest.raises(AblationError, match="at least 0"):
        nearest(placed, CAT, -1)


def test_a_style_has_styles_as_neighbours(placed):
    assert nearest(placed, Concept("van gogh", "painting", "style"), 5) == ("cubism",)


@pytest.mark.parametrize("name", ["grumpy cat", "Grumpy  Cat", "a grumpy cat toy", "grumpy cats", "cat", "grumpy"])
def test_what_may_be_the_target_or_is_the_anchor_is_not_held(name):
    assert holdable([name, "lion", "Lion"], [CAT]) == ("lion",)


def test_part_of_a_word_is_no_part_of_the_name():
    assert holdable(["fin", "at"], [Concept("finch", "bird")]) == ("fin", "at")
    names = ["woman", "snowman", "old man", "mans"]
    assert holdable(names, [Concept("man", "person")]) == ("woman", "snowman")


def test_the_common_vocabulary_gives_the_same_names_each_time(tiny, make_model):
    first = nearest(tiny, CAT, 6)
    assert len(first) == 6 and set(first) < set(COMMON.instances)
    assert nearest(make_model(), CAT, 6) == first


def test_generic_prompts_are_training_prompts_without_the_targets(tiny):
    made = generic_prompts(tiny, [CAT, Concept("dog", "animal")], 40)
    assert len(set(made)) == 40 and generic_prompts(tiny, [CAT], 0) == ()
    assert not [prompt for prompt in made if "cat" in prompt.split() or "dog" in prompt]
    for name in COMMON.instances:
        assert not set(evaluation_prompts(name, CAT, tiny.prompt_source)) & set(made)


def test_generic_prompts_name_no_target_that_a_training_template_names(emoji):
    style = Concept("twemoji", "emoji", "style")
    assert any("twemoji" in template for template in emoji.prompt_source.instance_train)
    made = generic_prompts(emoji, [style], 40)
    assert len(set(made)) == 40 and not [prompt for prompt in made if "twemoji" in prompt]
    # what an ablation of the style by the closed form asks for
    prompts(emoji, [style], ClosedFormSettings(), [("noto",)], made)


def test_the_embedded_models_hints_say_what_it_knows(emoji):
    assert {"rooster", "bird"} <= set(emoji.vocabulary.instances)
    assert ModelHints().vocabulary is COMMON
    found = nearest(emoji, Concept("rooster", "bird"), 4)
    assert len(found) == 4 and set(found) <= set(emoji.vocabulary.instances) - {"rooster", "bird"}
