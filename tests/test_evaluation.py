"""Evaluation: who is drawn, with which prompts and seeds, and that before and after are told apart rightly."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from concept_ablation.core.concept import Concept, evaluation_prompts, pairs
from concept_ablation.core.delta import zeros
from concept_ablation.core.errors import AblationError
from concept_ablation.core.evaluation import (
    Drawn,
    EvaluationJob,
    EvaluationSettings,
    compare,
    evaluate,
    make_jobs,
    roles,
)
from concept_ablation.core.instruments import Instruments, load_instruments, read_picture
from concept_ablation.core.metrics import Judge
from concept_ablation.core.misspellings import edit_distance
from concept_ablation.core.prompts import BUILT_IN
from concept_ablation.core.samplers import SampleSettings, draw_images
from concept_ablation.core.statistics import Estimate
from concept_ablation.core.subsets import select

SETTINGS = EvaluationSettings(prompts=2, seeds=2, sample=SampleSettings(steps=3), batch=5)
ROOSTER = Concept("rooster", "bird")


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


def test_roles_name_the_target_first_and_refuse_it_as_a_neighbour():
    assert roles(ROOSTER, ["owl", "owl"]) == [("rooster", "target"), ("bird", "anchor"), ("owl", "surrounding")]
    for name in ("Rooster", "bird"):
        with pytest.raises(AblationError, match="leave it out"):
            roles(ROOSTER, [name])


def test_a_delta_of_zeros_changes_nothing(emoji, judge):
    delta = zeros(select("cross-attn", emoji))
    found = evaluate(emoji, delta, [ROOSTER], [["owl"]], judge, SETTINGS)
    for row in found.concepts:
        assert row.before == row.after
        assert np.array_equal(row.images_before, row.images_after)
        assert row.images_before.shape == (2, 2, 128, 128, 3)
        details = row.details
        assert details.accuracy_before == details.accuracy_after and details.accuracy_change.value == 0
        assert details.accuracy_after.value == row.after.clip_accuracy
        assert details.score_change == Estimate(0.0, 0.0, 0.0)
        assert details.kid_clip.value == pytest.approx(0, abs=1e-9)


def test_images_come_from_the_stated_prompts_and_seeds_with_the_delta_on_only_after(emoji, judge):
    torch.manual_seed(0)
    delta = zeros(select("cross-attn", emoji)).map(lambda tensor: 0.2 * torch.randn_like(tensor))
    found = evaluate(emoji, delta, [ROOSTER], [["owl"]], judge, SETTINGS)
    owl = found.concepts[2]
    prompts = evaluation_prompts("owl", ROOSTER, emoji.prompt_source, 2)
    assert (owl.name, owl.role, owl.ablation, owl.prompts, owl.seeds) == (
        "owl",
        "surrounding",
        "rooster",
        prompts,
        (0, 1),
    )
    alone = draw_images(emoji, [prompts[1]], [1], SETTINGS.sample)[0]
    # bf16 kernels may round differently in another batch size
    assert np.abs(owl.images_before[1, 1].astype(int) - alone).mean() < 3
    assert np.abs(owl.images_after[1, 1].astype(int) - alone).mean() > 10
    with delta.attach(emoji):
        edited = draw_images(emoji, [prompts[1]], [1], SETTINGS.sample)[0]
    assert np.abs(owl.images_after[1, 1].astype(int) - edited).mean() < 3
    assert not any(module._forward_hooks for module in emoji.network.modules())


def test_settings_are_checked():
    with pytest.raises(AblationError, match="at least one prompt"):
        EvaluationSettings(prompts=0)


MODEL = SimpleNamespace(prompt_source=BUILT_IN)
"""All that a plan of an evaluation asks of a model."""


class TextJudge:
    """Stands in for CLIP: pictures are their mean colour, texts what their length makes of them."""

    name = "length"

    def embed_images(self, images: np.ndarray) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.tensor(images.mean(axis=(1, 2)) + 1).float(), dim=-1)

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.tensor([[len(text), 1.0, 9.0] for text in texts]), dim=-1)

    def embed_concept(self, texts: list[str]) -> torch.Tensor:
        return self.embed_texts(texts)[0]


def test_more_rows_where_they_are_asked_for():
    settings = EvaluationSettings(prompts=1, seeds=1, misspellings=3, composition=True)
    jobs = make_jobs(MODEL, [ROOSTER], [["owl"]], settings)
    roles_of = [(job.name, job.role) for job in jobs]
    assert roles_of[:3] == [("rooster", "target"), ("bird", "anchor"), ("owl", "surrounding")]
    assert roles_of[3:] == [("rooster", "misspelled"), ("rooster", "composed"), ("bird", "composed")]
    typos = jobs[3].prompts
    assert len(typos) == 3 and not any("rooster" in prompt for prompt in typos)
    distances = [min(edit_distance("rooster", word) for word in prompt.split()) for prompt in typos]
    assert distances == [1, 1, 2]
    assert [prompt.replace("rooster", "bird") for prompt in jobs[4].prompts] == list(jobs[5].prompts)
    trained = {text for pair in pairs(ROOSTER, BUILT_IN) for text in (pair.anchor, pair.target)}
    assert jobs[4].prompts and not trained & set(jobs[4].prompts)
    for settings in (EvaluationSettings(prompts=1, seeds=1), EvaluationSettings(1, 1, misspellings=0)):
        assert len(make_jobs(MODEL, [ROOSTER], [["owl"]], settings)) == 3


class Mean:
    """A copy detector, and Inception, whose embedding is the mean colour and its square."""

    name = "mean colour"

    def embed(self, images: np.ndarray) -> torch.Tensor:
        mean = torch.tensor(images.mean(axis=(1, 2)) / 255).float()
        return torch.nn.functional.normalize(torch.cat((mean, mean**2 + 0.01), dim=1), dim=-1)


def test_instruments_measure_what_is_known_of_the_pictures():
    """Before: the memorized image itself, from both prompts. After: half of the pictures are another colour."""
    concept = Concept("the red one", "a picture", "memorized")
    red, blue = (np.full((8, 8, 3), colour, dtype=np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    settings = EvaluationSettings(prompts=1, seeds=4)
    job = EvaluationJob("the red one", "target", concept, ("the red one",))
    first, second = np.stack([[red] * 4]), np.stack([[red, blue, red, blue]])
    mean = Mean()
    instruments = Instruments(mean, mean.embed, {"the red one": red})
    found = compare([job], Drawn((first,), 1.0), Drawn((second,), 1.0), TextJudge(), settings, instruments)
    details = found.concepts[0].details
    assert details.copies.rate_before.value == 1 and details.copies.rate_after.value == 0.5
    assert details.copies.rate_change.value == -0.5
    assert details.copies.similarity_before.value == pytest.approx(1)
    assert details.kid_copy.value > 0.1 and details.kid_inception.value > 0.1
    same = compare([job], Drawn((second,), 1.0), Drawn((second,), 1.0), TextJudge(), settings, instruments).concepts[0]
    assert same.details.kid_copy.value == pytest.approx(0, abs=1e-9) == same.details.kid_inception.value
    assert found.settings["copy_detector"] == "mean colour" and found.settings["inception"] is True
    bare = compare([job], Drawn((first,), 1.0), Drawn((second,), 1.0), TextJudge(), settings)
    assert bare.concepts[0].details.copies is None and "copy_detector" not in bare.settings


def test_a_composition_is_judged_against_its_other_words():
    settings = EvaluationSettings(prompts=1, seeds=2, composition=True)
    jobs = make_jobs(MODEL, [ROOSTER], [()], settings)
    drawn = Drawn(tuple(np.zeros((len(job.prompts), 2, 8, 8, 3), dtype=np.uint8) for job in jobs), 1.0)
    found = compare(jobs, drawn, drawn, TextJudge(), settings).concepts
    assert [row.composition is not None for row in found] == [False, False, True, True]
    kept = found[2].composition
    assert set(kept.words) == {"colour", "position", "size", "style"}
    # the same pictures before and after: nothing changed, and nothing moved
    assert all(group.change.value == 0 for group in kept.words.values())
    assert (kept.layout.position.value, kept.layout.size.value) == (1, 1)


def test_instruments_are_refused_with_a_sentence(tmp_path):
    (tmp_path / "not.pt").write_bytes(b"nothing")
    with pytest.raises(AblationError, match="not a TorchScript file"):
        load_instruments(copy_detector=tmp_path / "not.pt")
    with pytest.raises(AblationError, match="not the Inception network"):
        load_instruments(inception=tmp_path / "not.pt")
    with pytest.raises(AblationError, match="as a picture"):
        read_picture(tmp_path / "not.pt")
    with pytest.raises(AblationError, match="misspelled prompts"):
        EvaluationSettings(misspellings=-1)
    assert load_instruments().detector is None
