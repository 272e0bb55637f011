"""Textual inversion against an edit: on a painter where each answer is known, and on a random Stable Diffusion."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from concept_ablation.core import attack as attack_module
from concept_ablation.core.attack import (
    PRETRAINED,
    AttackCurve,
    AttackReport,
    AttackSettings,
    Checkpoint,
    TargetImages,
    attack,
    attack_score,
    draw_target,
)
from concept_ablation.core.concept import Concept
from concept_ablation.core.delta import Delta, LayerDelta, LowRank
from concept_ablation.core.denoiser import Conditioning, Denoiser, LatentCodec
from concept_ablation.core.errors import AblationError, IncompatibleDelta, Interrupted
from concept_ablation.core.prompts import BUILT_IN
from concept_ablation.core.samplers import SampleSettings
from concept_ablation.core.statistics import share_interval
from concept_ablation.core.subsets import select

ROOSTER = Concept("rooster", "bird")
SETTINGS = AttackSettings(
    checkpoints=(0, 2, 90), learning_rate=0.2, images=5, prompts=2, seeds=3, sample=SampleSettings(steps=2, guidance=1)
)
TABLE = {"rooster": (1.0, 0.0, 0.0), "bird": (0.0, 0.0, 1.0), "sks": (0.1, 0.1, 0.1)}
TOKENS = "text_encoders.toy.token_embedding"


class Plain(LatentCodec):
    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents.clamp(0, 1)


class Painter(Denoiser):
    """Paints what its network makes of the sum of the embeddings of the words that it knows."""

    def __init__(self) -> None:
        super().__init__()
        self.architecture, self.name, self.device = "sd1", "painter", torch.device("cpu")
        self.words = ["", *TABLE]
        embedding = nn.Embedding(len(self.words), 3)
        self.network = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            embedding.weight.copy_(torch.tensor([(0.0, 0.0, 0.0), *TABLE.values()]))
            self.network.weight.copy_(torch.eye(3))
        self.text_network, self.vae = embedding, Plain()
        self.layers: dict[str, nn.Module] = {"lora_unet_colours": self.network, TOKENS: embedding}
        self.sigmas = torch.linspace(0.5, 5, 20)
        self.latent_shape = (3, 4, 4)
        self.prompt_source = BUILT_IN

    def denoise(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return self.network(cond.context.sum(dim=1))[:, :, None, None].expand_as(x)

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        ids = [[self.words.index(word) if word in self.words else 0 for word in text.split()] for text in prompts]
        padded = torch.tensor([row + [0] * (20 - len(row)) for row in ids])
        return Conditioning({"context": self.text_network(padded)})

    def tokenize(self, text: str) -> list[int]:
        return [self.words.index(word) for word in text.split()]


def red(images: np.ndarray) -> np.ndarray:
    """A recogniser for clearly red pictures."""
    mean = images.mean(axis=(1, 2)) / 255
    return mean[:, 0] - mean[:, 2] - 0.5


def nothing(images: np.ndarray) -> np.ndarray:
    return -np.ones(len(images))


def renamed() -> Delta:
    """An edit that moves only the name: rooster's row becomes bird's."""
    up = torch.zeros(4, 1)
    up[1] = 1
    return Delta({TOKENS: LayerDelta(LowRank(up, torch.tensor([[-1.0, 0.0, 1.0]])))})


def colour_blind() -> Delta:
    """An edit of the network that cannot paint red any more."""
    return Delta({"lora_unet_colours": LayerDelta(torch.diag(torch.tensor([-1.0, 0.0, 0.0])))})


@pytest.fixture
def learnt(monkeypatch) -> list[Delta]:
    """The pseudo-words of the attacks of a test, one after the other, as deltas."""
    made: list[Delta] = []
    begin = attack_module._pseudo_word

    def remembered(*arguments: object) -> tuple[Delta, Tensor]:
        token, vector = begin(*arguments)
        made.append(token)
        return token, vector

    monkeypatch.setattr(attack_module, "_pseudo_word", remembered)
    return made


def test_an_edit_of_the_name_falls_at_the_pretrained_budget_and_one_of_the_network_withstands(learnt):
    painter = Painter()
    report = attack_score(painter, {"renamed": renamed(), "blind": colour_blind()}, ROOSTER, red, SETTINGS)
    assert list(report.curves) == [PRETRAINED, "renamed", "blind"]
    shares = {
        name: [(point.steps, point.success.value) for point in curve.checkpoints]
        for name, curve in report.curves.items()
    }
    assert shares[PRETRAINED] == shares["renamed"] == [(0, 0), (2, 0), (90, 1)]
    assert shares["blind"] == [(0, 0), (2, 0), (90, 0)]
    assert report.resistance() == {"renamed": 1, "blind": math.inf}
    pretrained = report.curves[PRETRAINED]
    assert len(pretrained.losses) == 90 and pretrained.checkpoints[2].images.shape == (2, 3, 4, 4, 3)
    # attached, the pseudo-word has the embedding that was learnt: that of red
    with learnt[0].attach(painter), torch.no_grad():
        vector = painter.encode(["sks"]).context[0, 0]
    torch.testing.assert_close(vector, torch.tensor(TABLE["rooster"]), atol=0.1, rtol=0)


def test_an_attack_leaves_the_model_as_it_was(tiny):
    before = tiny.fingerprint()
    settings = AttackSettings(checkpoints=(1, 3), images=2, prompts=1, seeds=1, sample=SampleSettings(steps=2))
    for module in (tiny.network, tiny.text_network):
        module.requires_grad_(True)
    attack(tiny, None, ROOSTER, nothing, settings, draw_target(tiny, ROOSTER, settings))
    assert tiny.fingerprint() == before and tiny.text_edits == 0
    for module in (*tiny.network.modules(), *tiny.text_network.modules()):
        assert not module._forward_hooks
        assert all(parameter.grad is None for parameter in module.parameters())


def test_the_pseudo_word_reaches_the_text_encoder_as_if_its_row_were_the_anchors(tiny, learnt):
    settings = AttackSettings(checkpoints=(0,), images=1, prompts=1, seeds=1, sample=SampleSettings(steps=1))
    images = TargetImages(torch.zeros(1, *tiny.latent_shape), (0,))
    attack(tiny, None, Concept("rooster", "brown bird"), nothing, settings, images)
    with learnt[0].attach(tiny), torch.no_grad():
        found = tiny.encode(["a photo of a sks"]).context
    other = copy.deepcopy(tiny)
    other._prompt_cache.clear()
    table = other.text_network.get_input_embeddings().weight
    with torch.no_grad():
        table[other.tokenize("sks")[0]] = table[other.tokenize("brown bird")].mean(dim=0)
        wanted = other.encode(["a photo of a sks"]).context
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_the_loss_falls_and_the_seed_decides_everything(tiny):
    settings = AttackSettings(
        checkpoints=(0, 25), learning_rate=1.0, batch=8, images=3, prompts=2, seeds=1, sample=SampleSettings(steps=2)
    )
    images = draw_target(tiny, ROOSTER, settings)
    assert images.latents.shape == (3, 4, 8, 8) and images.carriers == (0, 1, 0)
    first, again = (attack(tiny, None, ROOSTER, nothing, settings, images) for _ in range(2))
    assert first.losses == again.losses and len(first.losses) == 25
    assert np.array_equal(first.checkpoints[1].images, again.checkpoints[1].images)
    assert not np.array_equal(first.checkpoints[0].images, first.checkpoints[1].images)
    other = attack(tiny, None, ROOSTER, nothing, AttackSettings(**{**vars(settings), "seed": 7}), images)
    assert other.losses != first.losses


def test_a_model_that_does_not_listen_to_its_prompt_gives_an_attack_nothing_to_learn(tiny, learnt):
    deaf = Delta({name: LayerDelta(-layer.weight) for name, layer in select("cross-attn", tiny).items()})
    settings = AttackSettings(checkpoints=(0, 4), images=2, prompts=1, seeds=1, sample=SampleSettings(steps=2))
    images = draw_target(tiny, ROOSTER, settings)
    unlearnt = AttackSettings(**{**vars(settings), "checkpoints": (0,)})
    for delta, budget in ((None, unlearnt), (None, settings), (deaf, settings)):
        attack(tiny, delta, ROOSTER, nothing, budget, images)
    (name,) = learnt[0].layers
    rows = [token.layers[name].weight.down for token in learnt]
    assert not torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])


def test_hosts_that_cannot_be_attacked_say_so():
    closed, frozen = Painter(), Painter()
    del closed.layers[TOKENS]
    with pytest.raises(AblationError, match="token embedding"):
        attack_score(closed, {}, ROOSTER, red, SETTINGS)
    encode = frozen._encode

    def without_gradients(prompts: Sequence[str]) -> Conditioning:
        with torch.no_grad():
            return encode(prompts)

    frozen._encode = without_gradients
    with pytest.raises(AblationError, match="No gradient"):
        attack_score(frozen, {}, ROOSTER, red, SETTINGS)
    assert frozen.text_edits == 0 and not frozen.text_network._forward_hooks


def test_an_edit_of_another_model_or_by_the_name_of_the_reference_is_refused_before_anything_is_drawn():
    drawn = []
    other = Delta({"lora_unet_other": LayerDelta(torch.zeros(3, 3))})
    with pytest.raises(IncompatibleDelta):
        attack_score(Painter(), {"other": other}, ROOSTER, red, SETTINGS, on_progress=drawn.append)
    with pytest.raises(AblationError, match="another name"):
        attack_score(Painter(), {PRETRAINED: renamed()}, ROOSTER, red, SETTINGS, on_progress=drawn.append)
    assert drawn == []


def test_cancelling_detaches_the_edit_and_the_pseudo_word():
    painter = Painter()

    def cancel(progress: object) -> None:
        if progress.phase == "Attacking renamed" and progress.step == 3:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        attack_score(painter, {"renamed": renamed()}, ROOSTER, red, SETTINGS, on_progress=cancel)
    assert painter.text_edits == 0 and not painter.text_network._forward_hooks


def curve(*hits: int) -> AttackCurve:
    """Checkpoints at 0, 100 and 200 steps, of ten pictures each."""
    points = [
        Checkpoint(100 * turn, share_interval([place < number for place in range(10)]), np.zeros(1))
        for turn, number in enumerate(hits)
    ]
    return AttackCurve(tuple(points), (), 0.0)


def test_resistance_is_the_ratio_of_budgets():
    curves = {PRETRAINED: curve(0, 8, 10), "late": curve(0, 2, 5), "open": curve(9, 9, 9), "never": curve(0, 0, 4)}
    assert AttackReport(ROOSTER, curves, {}).resistance() == {"late": 2, "open": 0, "never": math.inf}
    assert curves["late"].budget(0.2) == 100 and curves["never"].budget(0.5) is None
    for reference in (curve(0, 0, 0), curve(10, 10, 10)):
        found = AttackReport(ROOSTER, {PRETRAINED: reference, "late": curve(0, 2, 5)}, {}).resistance()
        assert math.isnan(found["late"])


@pytest.mark.parametrize("checkpoints", [(), (5, 5), (10, 0), (-1, 4)])
def test_settings_are_checked(checkpoints):
    with pytest.raises(AblationError, match="rising"):
        AttackSettings(checkpoints=checkpoints)
