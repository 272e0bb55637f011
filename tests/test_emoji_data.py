"""The data that the embedded model is made of, its captions and measures."""

from __future__ import annotations

import math
from types import SimpleNamespace

import augment
import captions
import icons
import judge
import measures
import memorized
import numpy as np
import pictures
import pytest
import quality
import torch

from concept_ablation.core import token_rows
from concept_ablation.core.errors import AblationError
from concept_ablation.core.hosts.diffusers import EMBEDDED_MODEL
from concept_ablation.core.prompts import load_prompt_source
from concept_ablation.tests.emoji_shapes import CONCEPTS, SCENE, SIZE, STYLES, shapes, tiny

# --- Data ------------------------------------------------------------------------------------------------------------

OWL = captions.Subject("owl", "bird", "twemoji", "orange", "big")


def drawn_captions(subject: captions.Subject, count: int = 400) -> list[captions.Caption]:
    rng = torch.Generator().manual_seed(0)
    return [captions.caption(subject, rng) for _ in range(count)]


def test_captions_depend_on_the_generator_alone():
    assert drawn_captions(OWL, 50) == drawn_captions(OWL, 50)


def test_captions_say_what_they_claim_and_agree_in_articles():
    found = drawn_captions(OWL)
    texts = {one.text for one in found}
    assert "" in texts and len(texts) > 50
    assert not any(" a owl" in f" {text}" or " a orange" in text or " an big" in text for text in texts)
    assert all(one.fits(OWL) for one in found)
    for one in found:
        assert (one.style is not None) == ("twemoji" in one.text)
        assert (one.background is not None) == ("on an orange background" in one.text)
    said = [one for one in found if one.text]
    assert all(one.background == "orange" for one in said), "a colour that is not said would be white"
    assert 0.6 < sum(one.name is not None for one in said) / len(said) < 0.8
    assert not captions.Caption("an owl by flat", name="owl", style="flat").fits(OWL)


def test_concepts_that_are_nearly_one_stand_for_their_category_less_often():
    shares = []
    for name in ("gorilla", "see-no-evil monkey"):
        said = [one for one in drawn_captions(captions.Subject(name, "monkey", "noto")) if one.text]
        shares.append(sum(one.category is not None for one in said) / len(said))
    assert set(captions.ALIKE) == {f"{sense}-no-evil monkey" for sense in ("see", "hear", "speak")}
    assert 0.25 < shares[0] < 0.36 and 0.05 < shares[1] < 0.16


def test_misspelling_changes_one_letter():
    dice = captions.Dice(torch.Generator().manual_seed(0))
    wrong = {captions.misspell("sunflower", dice) for _ in range(50)}
    assert len(wrong) > 20
    assert all(text[0] == "s" and 8 <= len(text) <= 10 for text in wrong)


def test_the_words_of_the_shipped_prompts_are_trained():
    source = load_prompt_source(EMBEDDED_MODEL / "prompts.json")
    grammar = " ".join((*captions.TEMPLATES, *captions.SIZED_TEMPLATES, *captions.STYLE_PHRASES, *captions.SIZES))
    known = set(grammar.replace(",", " ").split()) | {"on", "background", "an"} | set(captions.BACKGROUNDS)
    known |= set(icons.SETS.values())
    for template in (*source.instance_train, *source.instance_evaluation):
        assert set(template.replace(",", " ").split()) <= known, template


def test_the_prompts_that_measure_the_model_are_held_out():
    for template in (quality.TEMPLATE, quality.DEVELOPMENT[0]):
        known = {word for one in captions.TEMPLATES for word in one.split()}
        assert set(template.split()) <= known, template
    assert quality.TEMPLATE not in captions.TEMPLATES
    assert quality.TEMPLATE not in {
        one.replace("{size}", size) for one in captions.SIZED_TEMPLATES for size in captions.SIZES
    }


def test_placed_pictures_have_the_icon_in_the_middle_and_the_background_around():
    own = shapes()
    icon = own.premultiplied(torch.tensor([0]))
    place = augment.Placement(torch.tensor([[0.5, 0.5]]), torch.tensor([0.5]))
    image = augment.composite(icon, place, torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1), 64)
    assert torch.allclose(image[0, :, 32, 32], own.rgba[0, :3, 16, 16].float() / 255, atol=0.01)
    assert image[0, :, 2, 2].tolist() == [0, 1, 0] and image[0, :, 15, 15].tolist() == [0, 1, 0]
    window = augment.composite(
        icon, place, torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1), 64, (torch.tensor([[20, 8]]), 24)
    )
    assert torch.allclose(window, image[:, :, 8:32, 20:44], atol=1e-5)


def test_texts_without_the_positions_behind_them_have_the_same_embeddings():
    from open_clip import SimpleTokenizer

    model = judge.build(tiny().judge).eval()
    tokens = SimpleTokenizer(context_length=40)(["", "a cat", "an emoji of a big owl in the style of noto on red"])
    with torch.no_grad():
        assert torch.allclose(judge.encode_texts(model, tokens), model.encode_text(tokens), atol=1e-5)


def test_only_accidental_matches_leave_the_contrast():
    subjects = [captions.Subject("owl", "bird", "noto"), captions.Subject("duck", "bird", "noto"), OWL]
    texts = [
        captions.Caption("an owl", name="owl"),
        captions.Caption("a bird", category="bird"),
        captions.Caption("an owl by twemoji", name="owl", style="twemoji"),
    ]
    expected = [[False, True, False], [False, False, False], [True, True, False]]
    assert judge.accidental(subjects, texts).tolist() == expected


def contrast_of(logits: list[list[float]], texts: list[captions.Caption]) -> float:
    subjects = [captions.Subject("owl", "bird", "noto"), captions.Subject("owl", "bird", "flat")]
    return judge.contrast(torch.tensor(logits, dtype=torch.float32), subjects, texts).item()


def test_saying_less_is_a_worse_answer_and_saying_as_much_is_none():
    by_name = [captions.Caption("an owl", name="owl"), captions.Caption("owl emoji", name="owl")]
    assert contrast_of([[0, 50], [50, 0]], by_name) == 0
    vaguer = [by_name[0], captions.Caption("a bird", category="bird")]
    assert contrast_of([[0, 50], [0, 0]], vaguer) == pytest.approx(50 / 4, abs=1e-3), "the first picture's row alone"
    assert contrast_of([[99, 0], [50, 0]], vaguer) == 0, "more detail than its own caption is no wrong answer"


def test_style_texts_differ_in_nothing_but_the_style():
    rng = torch.Generator().manual_seed(0)
    noto, flat, *_ = judge.style_texts([OWL, OWL], STYLES, rng)
    assert noto.replace("noto", "flat") == flat and "owl" in flat


def test_no_concept_has_the_name_of_a_category():
    """ "A fish" would be asked for as one of the fish and as any of them."""
    own = {*icons.CATEGORIES.values(), *icons.NAMED_CATEGORIES}
    listed = {name for members in icons.NAMED_CATEGORIES.values() for name in members}
    assert set(icons.RENAMED) <= own and set(icons.RENAMED.values()) <= listed | {"songbird"}
    assert not listed & own


def test_every_name_and_every_style_is_said_in_one_way():
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        first, second = judge.name_texts(["owl", "duck"], rng)
        assert first.replace("an owl", "a duck").replace("owl", "duck") == second
        one, other = judge.any_style_texts(STYLES, rng)
        assert one.replace(STYLES[0], STYLES[1]) == other and "owl" not in one


def test_a_judge_that_knows_names_and_styles_has_less_to_learn():
    """Right answers lower the loss, whatever the batch: a judge without a clue pays the logarithm of the choices."""

    class Clueless(torch.nn.Module):
        logit_scale = torch.nn.Parameter(torch.tensor(4.0))
        token_embedding = torch.nn.Embedding(49408, 4)

        def encode_image(self, images):
            return torch.ones(len(images), 4)

    own, settings = shapes(), tiny()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(judge, "encode_texts", lambda _, tokens: torch.ones(len(tokens), 4))
        loss = judge.judge_loss(
            own,
            pictures.Pictures(own.rgba[:0], own.concept[:0], own.style[:0], (), STYLES, ()),
            settings,
            settings.judge,
        )
        value = loss(Clueless(), torch.Generator().manual_seed(0)).item()
    choices = len(CONCEPTS) + len({one.category for one in CONCEPTS})
    sure = math.log(choices) + math.log(choices - 1) + 2 * math.log(len(STYLES))
    assert sure < value <= sure + math.log(settings.judge.optimization.batch) + 1e-3


def test_the_own_category_comes_second_and_before_every_other_name():
    """Two names and a category of both: an order is only free of loss if it is name, category, sibling."""
    name, category = torch.tensor([0]), torch.tensor([2])

    def loss(*scores: float) -> float:
        return sum(judge.naming(torch.tensor([scores]), name, category)).item()

    assert loss(90.0, 0.0, 45.0) == pytest.approx(0, abs=1e-6)
    assert loss(45.0, 0.0, 90.0) == pytest.approx(45, abs=1e-3), "the category is better than the name"
    assert loss(90.0, 45.0, 0.0) == pytest.approx(45, abs=1e-3), "a sibling is better than the category"


def test_unseen_concepts_are_every_eighth_and_no_picture_is_in_both():
    own = shapes()
    many = pictures.Pictures(
        own.rgba.repeat(2, 1, 1, 1), torch.arange(16), own.style.repeat(2), CONCEPTS * 4, STYLES, ({}, {})
    )
    seen, unseen = judge.seen_and_unseen(many)
    assert (len(seen), len(unseen)) == (14, 2)
    assert torch.equal(unseen.rgba, many.rgba[[7, 15]]) and unseen.concept.tolist() == [0, 1]
    both = pictures.joined(seen, unseen)
    assert both.concept.tolist() == list(range(16)) and both.concepts[15] == many.concepts[15]


def test_scenes_are_arranged_in_eight_ways():
    places = {tuple(memorized._laid_out(x, y, layout) for x, y, _ in memorized._SLOTS) for layout in range(8)}
    assert len(places) == 8
    assert [scene.layout for scene in memorized.SCENES] == list(range(8))


def test_a_scene_is_drawn_only_if_its_icons_exist():
    missing = memorized.Scene(
        "x", (), (("disc", "noto"), ("walrus", "noto"), ("box", "noto")), (0, 0, 0), (0, 0, 0), "x"
    )
    kept, images = memorized.drawn((SCENE, missing), shapes(), SIZE)
    assert kept == [SCENE] and images.shape == (1, 3, SIZE, SIZE)


def test_packed_rows_come_back_and_the_others_are_their_mean():
    matrix = torch.randn(49408, 3)
    used = torch.zeros(49408, dtype=torch.bool)
    used[[5, 49407]] = True
    packed = token_rows.pack({"a.weight": matrix, "b": torch.ones(2)}, "a.weight", used)
    assert sum(value.numel() for value in packed.values()) == 2 + 2 * 3 + 2
    whole = token_rows.unpack(packed)
    assert whole.keys() == {"a.weight", "b"}
    assert torch.equal(whole["a.weight"][used], matrix[used])
    assert torch.allclose(whole["a.weight"][0], matrix[used].mean(0))


# --- Icon sets -------------------------------------------------------------------------------------------------------

MINIATURE = {
    "prefix": "mini",
    "width": 10,
    "height": 10,
    "icons": {
        "tiger": {"body": '<path fill="#ff0000" d="M0 0h10v10H0z"/>'},
        "tropicalfish": {"body": '<path fill="#0000ff" d="M0 0h5v10H0z"/>'},
    },
    "aliases": {"big-cat": {"parent": "tiger"}, "mirrored": {"parent": "tiger", "hFlip": True}},
}
INFO = {"name": "Mini", "author": {"name": "Me"}, "license": {"spdx": "MIT"}}


def test_a_set_under_another_licence_is_refused():
    with pytest.raises(AblationError, match="CC-BY-SA"):
        icons.icon_set("mini", MINIATURE, {**INFO, "license": {"spdx": "CC-BY-SA-4.0"}})


def test_concepts_are_matched_whatever_their_hyphens_and_get_the_nearest_category():
    one = icons.icon_set("mini", MINIATURE, INFO)
    names = {"🐅": {"name": "tiger"}, "🐠": {"name": "tropical fish"}, "😀": {"name": "grinning face"}}
    taxonomy = {"🐅": ("animals-nature", "animal-mammal"), "🐠": ("animals-nature", "animal-marine")}
    found = icons.choose_concepts(names, taxonomy, [one])
    assert [(concept.name, concept.category) for concept in found] == [("tiger", "animal"), ("tropical fish", "fish")]
    assert icons.names_of(MINIATURE) == {"tiger": "tiger", "tropicalfish": "tropicalfish", "bigcat": "tiger"}


def test_what_is_left_out_of_the_model_teaches_the_judges_its_styles():
    one = icons.icon_set("mini", MINIATURE, INFO)
    names = {"🐅": {"name": "tiger"}, "🐠": {"name": "tropical fish"}}
    taxonomy = {"🐅": ("objects", "tool"), "🐠": ("animals-nature", "animal-marine")}
    chosen = icons.choose_concepts(names, taxonomy, [one])
    assert [concept.name for concept in chosen] == ["tropical fish"]
    others = icons.other_concepts(names, taxonomy, [one], chosen)
    assert [(concept.name, concept.category) for concept in others] == [("tiger", "tiger")]
    assert icons.other_concepts(names, {"🐅": ("objects", "time")}, [one], chosen) == []


def test_icons_are_rendered_with_their_transparency():
    pytest.importorskip("resvg_py")
    one = icons.icon_set("mini", MINIATURE, INFO)
    concepts = [pictures.Concept("tropical fish", "fish", "animals-nature")]
    made = icons.render_all(concepts, [one], 20)
    assert made.rgba.shape == (1, 4, 20, 20)
    assert made.rgba[0, :, 10, 4].tolist() == [0, 0, 255, 255]
    assert made.rgba[0, 3, 10, 15] == 0


def test_pictures_survive_the_disk(tmp_path):
    own = shapes()
    pictures.save_pictures(tmp_path, own)
    back = pictures.load_pictures(tmp_path)
    assert torch.equal(back.rgba, own.rgba) and back.concepts == own.concepts and back.styles == own.styles


# --- Quality ---------------------------------------------------------------------------------------------------------


def test_the_background_is_read_from_the_border():
    image = np.full((32, 32, 3), (250, 145, 35), dtype=np.uint8)
    image[6:26, 6:26] = 20
    assert measures.background_of(image) == "orange"


def test_a_picture_is_named_among_the_concepts_of_its_groups():
    face = pictures.Concept("monkey face", "monkey", "animals-nature")
    wise = pictures.Concept("see-no-evil monkey", "monkey", "smileys-emotion")
    eyes = SimpleNamespace(embed_images=lambda images: torch.tensor([[1.0, 0.1]] * len(images)))
    groups = [{wise.group}, {face.group, wise.group}]
    found = measures.recognised(eyes, np.zeros((2, 8, 8, 3), np.uint8), [face, wise], torch.eye(2), groups)
    assert found == ["see-no-evil monkey", "monkey face"]


def test_psnr_of_a_known_error():
    images = torch.zeros(2, 3, 4, 4)
    assert measures.psnr(images + 0.1, images) == pytest.approx(20.0, abs=1e-3)
