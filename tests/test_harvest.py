"""Harvests: whose predictions the rows are, whose path they lie on, resuming, folders that must be refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from concept_ablation.core import dataset, harvest
from concept_ablation.core.concept import Concept, evaluation_prompts
from concept_ablation.core.dataset import DatasetSettings
from concept_ablation.core.errors import AblationError, Interrupted
from concept_ablation.core.harvest import HarvestSettings
from concept_ablation.core.samplers import SAMPLERS, SampleSettings, sample_latents

CAT = Concept("grumpy cat", "cat")
SETTINGS = HarvestSettings(
    trajectories=5, preserve=3, prompts=4, sample=SampleSettings(steps=4, guidance=3.0), batch=3, seed=7
)


@pytest.fixture(scope="module")
def rows(make_model):
    """24 rows that ablate and 16 that preserve."""
    settings = replace(SETTINGS, trajectories=6, preserve=4)
    return harvest.harvest(make_model(), [CAT], settings, surrounding=[["dog"]])


def prompts_of(rows, column):
    return [rows.plan.prompts[pair[column]] for pair in rows.pairs.tolist()]


def state(denoiser):
    """All that harvesting must leave as it was."""
    modules = [*denoiser.network.modules(), *denoiser.text_network.modules()]
    parameters = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    flags = [(parameter.requires_grad, parameter.grad is None) for parameter in parameters]
    hooks = sum(len(module._forward_hooks) for module in modules)
    return denoiser.fingerprint(), flags, hooks, denoiser.text_edits, denoiser.network.training


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_rows_are_the_teachers_unguided_predictions(make_model, prediction_type, guidance):
    model = make_model(prediction_type=prediction_type)
    settings = replace(SETTINGS, sample=SampleSettings(steps=4, guidance=guidance))
    rows = harvest.harvest(model, [CAT], settings, surrounding=[["dog"]])
    teacher, other, nothing = (
        model.direction(rows.x, rows.sigma, model.encode(texts))
        for texts in (prompts_of(rows, 0), prompts_of(rows, 1), [""] * len(rows.x))
    )
    torch.testing.assert_close(rows.prediction.float(), teacher, rtol=1e-3, atol=1e-3)

    def distance(prediction):
        return (rows.prediction.float() - prediction)[~rows.preserving].abs().mean()

    assert distance(teacher) < 0.15 * min(distance(other), distance(nothing)), "closer than rounding can explain"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rows_are_the_samplers_own_path_and_images_do_not_know_of_it(tiny, sampler):
    sample = SampleSettings(steps=5, guidance=3.0, sampler=sampler)
    prompts, seeds, path, told = ["a cat", "a dog"], [1, 2], [], []
    plain = sample_latents(tiny, prompts, seeds, sample, lambda step: path.append((step.x.clone(), step.sigma)))
    watched = sample_latents(
        tiny, prompts, seeds, sample, observe=lambda x, sigma, denoised: told.append((x, sigma, denoised))
    )
    assert torch.equal(plain, watched)
    assert len(told) == len(path) == 5
    for (x, sigma, denoised), (expected, level) in zip(told, path, strict=True):
        assert torch.equal(x, expected) and torch.equal(sigma, torch.full((2,), level))
        with torch.no_grad():
            torch.testing.assert_close(denoised, tiny.denoise(x, sigma, tiny.encode(prompts)), rtol=1e-4, atol=1e-4)


def test_a_harvest_holds_the_path_of_each_trajectorys_own_seed(tiny):
    rows = harvest.harvest(tiny, [CAT], SETTINGS)
    prompt = rows.plan.prompts[rows.plan.rows[4][0]]
    path = []
    seed = harvest._trajectory_seed(7, 4)
    sample_latents(tiny, [prompt], [seed], SETTINGS.sample, lambda step: path.append((step.x, step.sigma)))
    torch.testing.assert_close(rows.x[16:20], torch.cat([x for x, _ in path]), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(rows.sigma[16:20], torch.tensor([sigma for _, sigma in path]))
    assert len(rows.x) == 8 * 4 and rows.x.dtype == torch.float32 and rows.prediction.dtype == torch.float16


def test_chosen_steps_are_those_rows_of_the_whole(tiny):
    whole = harvest.harvest(tiny, [CAT], SETTINGS)
    some = harvest.harvest(tiny, [CAT], replace(SETTINGS, keep=(0, 2)))
    index = torch.arange(8 * 4).view(8, 4)[:, [0, 2]].flatten()
    for name in ("x", "sigma", "prediction", "pairs", "preserving"):
        assert torch.equal(getattr(some, name), getattr(whole, name)[index]), name


def test_prompts_are_paired_and_preserved_ones_are_their_own_target(rows):
    for anchor, target, preserving in zip(prompts_of(rows, 0), prompts_of(rows, 1), rows.preserving, strict=True):
        assert target.replace("grumpy ", "") == anchor
        assert (anchor == target) == bool(preserving)
    assert rows.preserving.tolist() == [False] * 24 + [True] * 16
    assert any("dog" in prompt for prompt in prompts_of(rows, 0))


def test_no_evaluation_prompt_is_harvested(tiny):
    plan = harvest.harvest(tiny, [CAT], replace(SETTINGS, prompts=200), surrounding=[["dog"]]).plan
    for name in ("grumpy cat", "cat", "dog"):
        assert not set(evaluation_prompts(name, CAT, tiny.prompt_source)) & set(plan.prompts)


def test_a_harvest_is_deterministic_and_survives_its_files(tiny, tmp_path):
    before = state(tiny)
    memory = harvest.harvest(tiny, [CAT], SETTINGS, surrounding=[["dog"]])
    stored = harvest.harvest(tiny, [CAT], SETTINGS, surrounding=[["dog"]], directory=tmp_path)
    loaded = harvest.load(tmp_path)
    assert memory.digest() == stored.digest() == loaded.digest()
    assert (loaded.plan, loaded.settings, loaded.concepts) == (memory.plan, memory.settings, memory.concepts)
    assert loaded.model == tiny.fingerprint() and state(tiny) == before
    assert harvest.harvest(tiny, [CAT], replace(SETTINGS, seed=8)).digest() != memory.digest()
    kept = replace(SETTINGS, keep=(1, 3))
    stored = harvest.harvest(tiny, [CAT], kept, directory=tmp_path / "kept")
    assert harvest.load(tmp_path / "kept").digest() == stored.digest()
    assert harvest.load(tmp_path / "kept").settings == kept


def test_a_harvest_killed_in_the_middle_ends_with_the_same_rows(make_model, tmp_path):
    script = textwrap.dedent(
        f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from concept_ablation.core import harvest
        from conftest import make_tiny
        from test_harvest import CAT, SETTINGS
        harvest.harvest(make_tiny(), [CAT], SETTINGS, directory=Path(sys.argv[1]),
                        on_progress=lambda progress: time.sleep(0.2 if progress.step > 4 else 0))
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 90
    while not (tmp_path / "shard-00000.safetensors").exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
    process.wait()
    assert 1 <= len(list(tmp_path.glob("shard-*.safetensors"))) < 3, "it was killed in the middle"
    with pytest.raises(AblationError, match="not finished"):
        harvest.load(tmp_path)
    resumed = harvest.harvest(make_model(), [CAT], SETTINGS, directory=tmp_path)
    assert resumed.digest() == harvest.harvest(make_model(), [CAT], SETTINGS).digest()


def test_cancelling_keeps_whole_shards_and_damaged_ones_are_made_again(tiny, tmp_path):
    def cancel(progress):
        if progress.step == 6:
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        harvest.harvest(tiny, [CAT], SETTINGS, directory=tmp_path, on_progress=cancel)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "shard-00000.safetensors"]
    first = harvest.harvest(tiny, [CAT], SETTINGS, directory=tmp_path)
    whole = load_file(tmp_path / "shard-00001.safetensors")
    for damage in ({"x": whole["x"]}, {**whole, "sigma": whole["sigma"][1:]}):
        stamps = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        save_file(damage, tmp_path / "shard-00001.safetensors")
        second = harvest.harvest(tiny, [CAT], SETTINGS, directory=tmp_path)
        changed = {path.name for path in tmp_path.iterdir() if path.stat().st_mtime_ns != stamps[path.name]}
        assert changed == {"shard-00001.safetensors"} and second.digest() == first.digest()
    (tmp_path / "shard-00001.safetensors").write_bytes(b"half a sha")
    with pytest.raises(AblationError, match="damaged"):
        harvest.load(tmp_path)


def test_folders_of_another_sort_are_refused_and_left_alone(tiny, tmp_path):
    harvest.harvest(tiny, [CAT], SETTINGS, directory=tmp_path / "harvest")
    images = DatasetSettings(images=5, preserve=3, prompts=4, sample=SETTINGS.sample, batch=3, seed=7)
    dataset.build(tiny, [CAT], images, directory=tmp_path / "images")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    with pytest.raises(AblationError, match="another folder"):
        dataset.build(tiny, [CAT], images, directory=tmp_path / "harvest")
    with pytest.raises(AblationError, match="another folder"):
        harvest.harvest(tiny, [CAT], SETTINGS, directory=tmp_path / "images")
    with pytest.raises(AblationError, match="another folder"):
        harvest.harvest(tiny, [CAT], replace(SETTINGS, keep=(0,)), directory=tmp_path / "harvest")
    with pytest.raises(AblationError, match="no dataset"):
        dataset.load(tmp_path / "harvest")
    for folder in ("images", "nowhere"):
        with pytest.raises(AblationError, match="no harvest"):
            harvest.load(tmp_path / folder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_a_model_that_gives_nan_is_one_clear_sentence(make_model):
    model = make_model()
    with torch.no_grad():
        model.network.conv_out.weight.fill_(float("nan"))
    with pytest.raises(AblationError, match="NaN or infinity"):
        harvest.harvest(model, [CAT], SETTINGS)


@pytest.mark.parametrize(
    "change",
    [
        {"trajectories": 0},
        {"preserve": -1},
        {"prompts": 0},
        {"batch": 0},
        {"keep": (4,)},
        {"keep": (-1,)},
        {"keep": (2, 1)},
        {"keep": (1, 1)},
    ],
)
def test_bad_settings_are_refused(change):
    with pytest.raises(AblationError):
        replace(SETTINGS, **change)
