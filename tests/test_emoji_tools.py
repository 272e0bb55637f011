"""The scripts that train the embedded model: a whole tiny run, and its resumption."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import autoencoder
import card
import convolution
import denoiser
import export
import export_single_file
import latents
import memorized
import numpy as np
import optimizer
import pictures
import pytest
import settings
import stage
import start
import torch
import train
import training_log
from safetensors.torch import load_file

from concept_ablation.core import token_rows
from concept_ablation.core.errors import AblationError
from concept_ablation.core.hosts.diffusers import EMBEDDED_MODEL, load_denoiser
from concept_ablation.core.metrics import Judge
from concept_ablation.core.samplers import SampleSettings, draw_images
from concept_ablation.tests.emoji_shapes import SCENE, SIZE, average_loss, remaining_loss, shapes, strangers, tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> train.Run:
    """The whole chain, from drawn pictures to exported files."""
    out = tmp_path_factory.mktemp("emoji")
    pictures.save_pictures(out / "pictures", shapes())
    pictures.save_pictures(out / train.OTHERS, strangers())
    whole = train.Run(out, tiny(), minutes=0.1, steps=30)
    train.run_stages(whole)
    return whole


# --- The chain -------------------------------------------------------------------------------------------------------


def test_every_stage_lowers_its_loss(run):
    left = remaining_loss(run.out, run.settings, shapes(), strangers())
    assert all(share < 0.97 for share in left.values()), left


def test_the_exported_model_and_judge_load_and_draw(run):
    model = load_denoiser(run.out / "model", device="cpu", precision="fp32")
    images = draw_images(model, ["a box", "an owl by flat"], [1, 2], SampleSettings(steps=3))
    assert images.shape == (2, SIZE, SIZE, 3) and images.std() > 0
    for part in ("text_encoder/model.safetensors", "judge/open_clip_model.safetensors"):
        assert token_rows.read_packed(run.out / "model" / part) is not None
    own = Judge.load(run.out / "model" / "judge")
    assert own.embed_images(images).shape == own.embed_texts(["a box", "a ring"]).shape
    assert own.model.visual.image_size in (32, (32, 32))
    found = latents.load_latents(run.out / "latents")
    first = found.values[: len(shapes())].float()
    assert (first * found.scale).std().item() == pytest.approx(1, abs=1e-3)
    assert json.loads((run.out / "model/vae/config.json").read_text("utf-8"))["scaling_factor"] == found.scale


def test_the_single_file_draws_what_the_folder_draws(run, tmp_path):
    # taesd's names fit the default autoencoder only, so this one is exported with it, untrained
    wide = settings.Settings(**{**vars(run.settings), "autoencoder": {}})
    found = latents.load_latents(run.out / "latents")
    file = tmp_path / "tiny.safetensors"
    model = stage.load_average(denoiser.build(run.settings, found), run.out / "denoiser")
    vae = autoencoder.build(wide)
    vae.register_to_config(scaling_factor=found.scale)
    export.write_model(tmp_path / "folder", model, vae)
    export_single_file.export_single_file(tmp_path / "folder", file)
    prompts, settings_ = ["a box", "a ring, flat style"], SampleSettings(steps=3)
    one, other = (
        draw_images(load_denoiser(path, device="cpu", precision="fp32"), prompts, [1, 2], settings_)
        for path in (tmp_path / "folder", file)
    )
    assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


def test_the_model_that_ships_predicts_the_same_from_a_single_file(tmp_path, monkeypatch):
    file = tmp_path / "emoji.safetensors"
    monkeypatch.setattr(sys, "argv", ["export_single_file.py", "--out", str(file)])
    assert export_single_file.main() == 0
    one, other = (load_denoiser(path, device="cpu", precision="fp32") for path in (None, file))
    noisy = 5 * torch.randn(2, *one.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (
            model.denoise(noisy, torch.full((2,), 5.0), model.encode(["a tropical fish", "an owl by flat"]))
            for model in (one, other)
        )
        images, others = (model.vae.decode(expected) for model in (one, other))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(others, images)


def test_a_single_file_of_no_model_is_refused(tmp_path, monkeypatch, capsys):
    file = tmp_path / "emoji.safetensors"
    monkeypatch.setattr(sys, "argv", ["export_single_file.py", "--model", str(tmp_path), "--out", str(file)])
    assert export_single_file.main() == 1
    assert "model_index.json" in capsys.readouterr().err and not file.exists()


def test_the_memorized_pictures_are_the_scenes_as_the_autoencoder_restores_them(run):
    _, scenes = memorized.drawn((SCENE,), shapes(), SIZE)
    model = stage.load_average(autoencoder.build(run.settings), run.out / "autoencoder")
    with torch.no_grad():
        restored = model.decode(model.encode(scenes * 2 - 1).latents).sample / 2 + 0.5
    found = latents.memorized_pictures(run.out / "latents")
    assert (found / 255 - restored.clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-6
    again = latents.load_latents(run.out / "latents").scenes.float()
    expected = model.encode(found / 255 * 2 - 1).latents
    assert (again - expected).abs().max() < 0.05 * expected.abs().max()


def test_an_exported_model_is_trained_further(run, tmp_path):
    for folder, own in (("pictures", shapes()), (train.OTHERS, strangers())):
        pictures.save_pictures(tmp_path / folder, own)
    start.start_from(run.out / "model", tmp_path, run.out / "validation_judge" / "open_clip")
    assert (tmp_path / "validation_judge" / stage.START).is_file()
    further = replace(run, out=tmp_path, steps=2)
    train.run_stages(further, ("autoencoder", "latents", "denoiser", "judge", "export"))
    before, after = (load_file(out / "model/vae/diffusion_pytorch_model.safetensors") for out in (run.out, tmp_path))
    assert all(torch.equal(before[name], after[name]) for name in before), "the autoencoder is kept"
    found = latents.load_latents(tmp_path / "latents")
    loss = denoiser.noise_loss(shapes(), found, run.settings)
    one, other = (
        stage.load_average(denoiser.build(run.settings, found), out / "denoiser") for out in (run.out, tmp_path)
    )
    assert average_loss(loss, other) == pytest.approx(average_loss(loss, one), rel=0.1)
    assert 0 < (one.unet.conv_in.weight - other.unet.conv_in.weight).abs().max() < 0.02
    assert torch.equal(export.used_tokens(one), export.used_tokens(other))


def test_the_log_says_how_each_stage_was_trained(run):
    log = training_log.training_log(run.out, run.settings)
    assert {name: one["steps"] for name, one in log.items()} == dict.fromkeys(log, 30)
    assert list(log) == ["autoencoder", "denoiser", "judge", "validation_judge"]
    for name, one in log.items():
        losses = training_log.logged(run.out / name / "tensorboard", f"{name}/loss")
        assert len(losses) == 2, "of the first step and of the twentieth"
        assert (one["first_loss"], one["last_loss"]) == pytest.approx(losses, abs=1e-4), name
    assert log["autoencoder"]["last_loss"] < log["autoencoder"]["first_loss"]
    assert json.loads((run.out / "model" / training_log.TRAINING).read_text("utf-8")) == [log]


def test_the_card_has_a_dash_for_what_was_not_measured():
    credit = {"style": "noto", "set": "Noto", "author": "Google", "licence": "Apache-2.0"}
    quality = {
        "sampling": {"steps": 50, "sampler": "ddim", "guidance": 3.0},
        "categories": {"bird": {"different": 5}, "cat": {"different": 4}},
        "concepts": {"top1": 0.75},
    }
    log = [{"denoiser": {"steps": 10, "batch": 4, "minutes": 1.5}}, {"judge": {"steps": 2, "batch": 8, "minutes": 0.1}}]
    text = card.card(quality, None, log, replace(shapes(), credits=(credit,)))
    assert "| 0.75 | – | ≥ 0.7 |" in text and "| – | – | ≥ 0.9 |" in text
    assert "of 2 | 1 | – | all |" in text and "bird 5, cat 4" in text
    assert "| denoiser | 10 × 4 | 1.5 | – → – |" in text and "| noto | Noto | Google | Apache-2.0 |" in text


def test_the_card_that_ships_is_what_the_template_makes_of_its_figures():
    committed = (EMBEDDED_MODEL / "README.md").read_text("utf-8")
    quality, log, hints = (
        json.loads((EMBEDDED_MODEL / f"{name}.json").read_text("utf-8"))
        for name in ("quality", "training", "ablation_hints")
    )
    # how many pictures there were, and whose, the card alone says
    row = r"\| (?P<style>{}) \| (?P<set>.+) \| (?P<author>.+) \| (?P<licence>.+) \|"
    credits = tuple(re.search(row.format(style), committed).groupdict() for style in hints["styles"])
    trained_on = pictures.Pictures(
        torch.empty(1332, 0),
        torch.empty(0),
        torch.empty(0),
        tuple(pictures.Concept(name, category, "") for name, category in hints["categories"].items()),
        tuple(hints["styles"]),
        credits,
    )
    assert card.card(quality["model"], quality["draft"], log, trained_on) == committed


def test_a_folder_that_is_no_model_starts_nothing(tmp_path):
    with pytest.raises(AblationError, match="not an exported"):
        start.start_from(tmp_path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_second_run_of_a_finished_chain_changes_nothing(run):
    path = run.out / "denoiser" / stage.CHECKPOINT
    before = path.read_bytes()
    train.run_stages(run, ("denoiser",))
    assert path.read_bytes() == before


def test_a_stage_without_its_predecessor_says_which_is_missing(tmp_path):
    pictures.save_pictures(tmp_path / "pictures", shapes())
    with pytest.raises(AblationError, match="stage autoencoder first"):
        train.run_stages(train.Run(tmp_path, tiny(), 1.0, 2), ("latents",))


# --- Stages ----------------------------------------------------------------------------------------------------------


def losses(out: Path, steps: int, **options: object) -> list[float]:
    seen = []
    parts = tiny(4)
    loss = autoencoder.reconstruction_loss(shapes(), parts)
    model = autoencoder.build(parts)
    one = stage.Stage("autoencoder", model, loss, parts.autoencoder_optimization, seed=3)
    stage.train(one, out, stage.Budget(steps=steps), on_step=lambda _, value: seen.append(value), **options)
    return seen


def test_a_killed_run_goes_on_as_if_it_had_never_stopped(tmp_path):
    whole = losses(tmp_path / "whole", 8)
    # every step is saved, and the kill comes before the save of the fifth
    first = losses(tmp_path / "killed", 8, save_every=0.0, stop_after=5)
    second = losses(tmp_path / "killed", 8)
    assert first == whole[:5]
    assert second == whole[4:]
    one, other = (load_file(tmp_path / name / stage.CHECKPOINT) for name in ("whole", "killed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_finished_stage_goes_on_with_a_larger_budget_only(tmp_path):
    assert len(losses(tmp_path, 4)) == 4
    assert losses(tmp_path, 4) == losses(tmp_path, 3) == []
    assert len(losses(tmp_path, 6)) == 2
    assert stage.Budget(minutes=2).exceeds(10, 90.0) and not stage.Budget(minutes=2).exceeds(10, 110.0)


def test_a_stage_that_was_faster_than_planned_is_not_trained_again():
    """Its minutes were turned into steps while the machine was busy."""
    point = stage._Run(torch.nn.Identity(), torch.nn.Identity(), None, torch.Generator(), 100, seconds=60.0, pace=0.6)
    stage._plan(point, stage.Budget(minutes=2.0))
    assert point.given == 120
    assert not stage.Budget(minutes=2.0).exceeds(200, max(75.0, point.given))


def test_the_rate_warms_up_stays_and_falls_to_zero(tmp_path):
    parts = settings.Optimization(4, 1.0, warmup=4)
    plan = stage.Budget(steps=20)
    point = stage._Run(torch.nn.Identity(), torch.nn.Identity(), None, torch.Generator())
    stage._plan(point, plan)
    rates = [stage._rate(replace(point, step=step), parts) for step in range(21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:11] == [1.0] * 7
    assert rates[15] == pytest.approx(0.5) and rates[20] == 0


@pytest.mark.parametrize(("minutes", "total"), [(2.0, 200), (1.5, 150), (0.5, 110)])
def test_minutes_become_steps_when_half_of_them_have_passed(minutes, total):
    point = stage._Run(torch.nn.Identity(), torch.nn.Identity(), None, torch.Generator(), 100, seconds=59.0, pace=0.6)
    stage._plan(point, stage.Budget(minutes=2.0))
    assert point.total == 0
    resumed, point.seconds = replace(point, pace=0.0, seconds=60.0), 60.0
    stage._plan(resumed, stage.Budget(minutes=minutes))
    assert resumed.total == 0, "the pace of now is unknown before a step"
    stage._plan(point, stage.Budget(minutes=minutes))
    assert (point.decay_from, point.total) == (100, total)


def test_the_shares_of_the_stages_add_up_and_leave_long_runs_to_the_denoiser():
    assert sum(train.shares(3).values()) == pytest.approx(3)
    assert train.shares(480)["denoiser"] > 300


def test_a_folder_with_a_run_is_not_overwritten_unasked(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--minutes", "1", "--out", str(run.out)])
    assert train.main() == 1
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(("channels", "edge", "stride"), [((16, 24), 4, 1), ((16, 24), 9, 2), ((3, 8), 8, 1)])
def test_the_fast_gradient_of_a_convolution_is_the_gradient(channels, edge, stride):
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(*channels, 3, stride=stride, padding=1)
    fast = convolution.speed_up(torch.nn.Sequential(torch.nn.Conv2d(*channels, 3, stride=stride, padding=1)))
    fast[0].load_state_dict(plain.state_dict())
    x = torch.randn(2, channels[0], edge, edge)
    gradients = []
    for module in (plain, fast):
        point = x.clone().requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16, enabled=module is fast):
            module(point).float().square().sum().backward()
        gradients.append((point.grad, *(one.grad for one in module.parameters())))
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() < 0.02 * one.norm()


# --- The optimizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_orthogonalized_brings_every_singular_value_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = optimizer.orthogonalized(matrix)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.3 and values.max() < 1.25
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    own = left.t() @ found @ right.t()
    assert torch.allclose(own, own.diagonal().diag(), atol=1e-4), "the singular vectors stay"


def test_muon_steps_as_torchs_own_does():
    weights = torch.randn(48, 80, generator=torch.Generator().manual_seed(0))
    mine, theirs = (torch.nn.Parameter(weights.clone()) for _ in range(2))
    own = optimizer.Muon([mine], weight_decay=0.1)
    own.param_groups[0]["lr"] = 0.02
    torchs = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rng = torch.Generator().manual_seed(1)
    for _ in range(3):
        mine.grad = theirs.grad = torch.randn(48, 80, generator=rng)
        own.step()
        torchs.step()
    moved = (theirs - weights).norm()
    # torch iterates in bf16
    assert (mine - theirs).norm() < 0.02 * moved
