"""The way from a memorized image to its ablation: anchors are found by what they draw, and no copy is trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from concept_ablation.core import dataset, memorized
from concept_ablation.core.ablation import Task, ablate
from concept_ablation.core.concept import Concept
from concept_ablation.core.copies import CopyDetector
from concept_ablation.core.dataset import DatasetSettings
from concept_ablation.core.errors import AblationError
from concept_ablation.core.evaluation import EvaluationSettings
from concept_ablation.core.memorized import SearchSettings, find_anchors, paraphrases_of, write_found
from concept_ablation.core.presets import recipe
from concept_ablation.core.prompts import read_prompt_file
from concept_ablation.core.samplers import SampleSettings, draw_images, sample_latents
from concept_ablation.core.screening import Screen
from concept_ablation.tests.test_copies import needs_weights, scene
from concept_ablation.tests.test_leaks import Painter, Plain

CAPTION = "rooster parade"
RED = np.full((4, 4, 3), (230, 0, 0), dtype=np.uint8)
SEARCH = SearchSettings(images_each=3, sample=SampleSettings(steps=2), batch=8)
COLOURS = CopyDetector("mean colour", lambda images: torch.tensor(images.mean(axis=(1, 2))).float())
"""Red and blue have a similarity of about 0."""
SETTINGS = DatasetSettings(images=6, preserve=2, sample=SampleSettings(steps=2), batch=3, seed=1)
CONCEPT = Concept(CAPTION, "bird parade", "memorized", anchor_prompts=("bird parade", "owl parade"))


def test_paraphrases_that_draw_the_image_are_removed_and_the_others_drawn_instead(tmp_path):
    texts = ("a rooster and people", "bird parade", "owl parade", "cockerel parade", "Rooster  parade")
    found = find_anchors(Painter(), CAPTION, RED, COLOURS, texts, SEARCH)
    assert found.caption.copy_rate == 1 and len(found.ranked) == 4
    assert set(found.concept.anchor_prompts) == {"bird parade", "owl parade"}
    assert set(found.concept.target_prompts) == {"a rooster and people", "cockerel parade"}
    assert (found.concept.target, found.concept.kind) == (CAPTION, "memorized")
    write_found(tmp_path, found)
    told = json.loads((tmp_path / "paraphrases.json").read_text("utf-8"))
    assert told["caption"]["copy_rate"] == 1
    assert {row["prompt"]: (row["copy_rate"], row["used_as"]) for row in told["paraphrases"]} == {
        "bird parade": (0, "anchor"),
        "owl parade": (0, "anchor"),
        "a rooster and people": (1, "target"),
        "cockerel parade": (1, "target"),
    }
    assert read_prompt_file(tmp_path / "anchor_prompts.txt") == found.concept.anchor_prompts
    assert read_prompt_file(tmp_path / "target_prompts.txt") == found.concept.target_prompts
    write_found(tmp_path, replace(found, concept=replace(found.concept, target_prompts=())))
    assert not (tmp_path / "target_prompts.txt").exists(), "of an earlier search"


def test_captions_are_not_chosen_by_pictures_that_an_evaluation_draws(monkeypatch):
    drawn: set[int] = set()

    def noted(denoiser, prompts, seeds, *rest, **named):
        drawn.update(seeds)
        return draw_images(denoiser, prompts, seeds, *rest, **named)

    monkeypatch.setattr(memorized, "draw_images", noted)
    find_anchors(Painter(), CAPTION, RED, COLOURS, ["owl parade"], SEARCH)
    assert len(drawn) == SEARCH.images_each
    assert not drawn & set(EvaluationSettings(seeds=1000).seed_range)


def test_a_search_without_anchors_says_so():
    with pytest.raises(AblationError, match="Every paraphrase reproduces"):
        find_anchors(Painter(), CAPTION, RED, COLOURS, ["a cockerel"], SEARCH)
    with pytest.raises(AblationError, match="no paraphrase"):
        find_anchors(Painter(), CAPTION, RED, COLOURS, [CAPTION.upper()], SEARCH)


def test_where_paraphrases_come_from(tmp_path):
    (tmp_path / "own.txt").write_text("bird parade\n\nowl parade\n", "utf-8")
    assert paraphrases_of(CAPTION, 1, file=tmp_path / "own.txt") == ("bird parade", "owl parade")
    assert len(paraphrases_of("Captain Juniper's midnight regatta, 1931", 5)) == 5
    with pytest.raises(AblationError, match="both its endpoint and its name"):
        paraphrases_of(CAPTION, 5, endpoint="http://localhost:1/v1")
    with pytest.raises(AblationError, match="one of the two"):
        paraphrases_of(CAPTION, 5, file=tmp_path / "own.txt", endpoint="http://localhost:1/v1", model="m")


@needs_weights
def test_sscd_keeps_the_image_itself_out():
    pictures = np.stack([scene(0), scene(1)])
    screen = Screen(CopyDetector.load(), (pictures[0],))
    latents = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    decoder = SimpleNamespace(vae=Plain(), device=torch.device("cpu"))
    assert screen.passes(decoder, latents).tolist() == [False, True]


@dataclass(frozen=True)
class Listed(Screen):
    """Takes exactly the listed latents for copies."""

    listed: tuple[Tensor, ...] = ()

    def passes(self, denoiser: object, latents: Tensor) -> Tensor:
        return torch.tensor([not any(torch.equal(one, other) for other in self.listed) for one in latents])


def listed(*latents: Tensor) -> Listed:
    return Listed(COLOURS, (RED,), listed=latents)


def test_copies_are_drawn_again_and_the_rest_stays_as_it_was(tmp_path):
    plain = dataset.build(Painter(), [CONCEPT], SETTINGS)
    screen = listed(plain.latents[1].half(), plain.latents[4].half())
    data = dataset.build(Painter(), [CONCEPT], SETTINGS, screen=screen, directory=tmp_path / "d")
    same = [torch.equal(one, other) for one, other in zip(data.latents, plain.latents, strict=True)]
    assert same == [row not in (1, 4) for row in range(8)]
    for row in (1, 4):
        prompt, seed = data.plan.prompts[data.plan.rows[row][0]], dataset._row_seed(SETTINGS.seed, row, 1)
        again = sample_latents(Painter(), [prompt], [seed], SETTINGS.sample)
        assert torch.equal(data.latents[row : row + 1], again.half().float()), "each with a seed of its own"
    assert data.plan == plain.plan
    again = dataset.load(tmp_path / "d")
    assert torch.equal(again.latents, data.latents) and again.plan == data.plan
    other = replace(screen, threshold=0.9)
    with pytest.raises(AblationError, match="another"):
        dataset.build(Painter(), [CONCEPT], SETTINGS, screen=other, directory=tmp_path / "d")


def test_rows_that_stay_copies_are_left_out_and_too_few_are_refused(tmp_path):
    """The detector is the real thing here: bird is blue and no copy of red, and cockerel is red however often drawn."""
    mixed = replace(CONCEPT, anchor_prompts=("bird parade", "owl parade", "cockerel parade"))
    screen = Screen(COLOURS, (RED,), redraws=1)
    data = dataset.build(Painter(), [mixed], SETTINGS, screen=screen, directory=tmp_path / "d")
    rows = [(data.plan.prompts[anchor], anchor != target) for anchor, target in data.plan.rows]
    assert rows.count(("bird parade", True)) == 2 and len(data.latents) == len(rows)
    assert "cockerel parade" not in dict(rows)
    assert dataset.load(tmp_path / "d").plan == data.plan
    red = replace(CONCEPT, anchor_prompts=("cockerel parade",))
    with pytest.raises(AblationError, match="Only 0 of 6 images"):
        dataset.build(Painter(), [red], SETTINGS, screen=screen)
    # nor does a concept of which nothing is copied make up for one of which everything is
    with pytest.raises(AblationError, match="'a red one' are no copies"):
        dataset.build(Painter(), [CONCEPT, replace(red, target="rooster", anchor="a red one")], SETTINGS, screen=screen)
    # images of the target are copies by design
    assert len(dataset.build(Painter(), [red], replace(SETTINGS, source="target"), screen=screen).latents) == 8


@pytest.mark.parametrize("preset", ["instant", "fast"])
def test_copies_are_not_overlooked_where_nothing_is_drawn_to_train_on(tiny, preset):
    """The recipe is that of another kind, as where a memorized image is the second of several concepts."""
    with pytest.raises(AblationError, match=r"drawn images only.*balanced"):
        ablate(tiny, [Task(CONCEPT)], recipe(preset, tiny), screen=Screen(COLOURS, (RED,)))


@pytest.mark.parametrize("preset", ["balanced", "paper"])
def test_every_preset_trains_all_weights_on_a_memorized_image(preset):
    model = SimpleNamespace(learning_rate_scale=1.0, learning_rate_scales={})
    made = recipe(preset, model, "memorized").training
    assert made.subset == "full" and made.regularization == 1.0
    assert recipe(preset, model, "memorized", subset="embedding").training.subset == "embedding"
    assert recipe(preset, model).training.subset == "cross-attn"
