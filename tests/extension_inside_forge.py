"""Tests of the WebUI host on Forge's real `modules`, collected by `test_webui.py` only.

Forge has imported the extension itself, from a folder of another name; nothing of Forge is stood in for. Pictures are
drawn by Forge's own processing.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from modules import call_queue, extra_networks, processing, script_callbacks, scripts, sd_models, shared
from modules_forge import main_entry

from concept_ablation.core import dataset, delta_file
from concept_ablation.core.concept import Concept
from concept_ablation.core.dataset import DatasetSettings
from concept_ablation.core.delta import Delta, LayerDelta
from concept_ablation.core.errors import AblationError
from concept_ablation.core.progress import Progress
from concept_ablation.core.samplers import SampleSettings
from concept_ablation.core.trainer import TrainSettings, train
from concept_ablation.web import extension, library
from concept_ablation.web.host import Applied

SMALL = DatasetSettings(images=2, preserve=0, prompts=2, sample=SampleSettings(steps=2), batch=2)
TRAIN = TrainSettings(steps=2, batch=2, preserve_batch=0, learning_rate=1e-5)


@pytest.fixture(scope="module", autouse=True)
def forge():
    """What the page does before its first generation: choose a checkpoint, register the LoRA extension."""
    main_entry.refresh_model_loading_parameters()
    extra_networks.initialize()
    script_callbacks.before_ui_callback()


@pytest.fixture
def host(monkeypatch):
    # 64 instead of 512 pixels, for the time
    monkeypatch.setattr("concept_ablation.core.hosts.webui.native_size", lambda *_: 64)
    host = extension.WebUIHost()
    yield host
    host.remove()


@pytest.fixture(scope="module")
def saved():
    """A delta that changes pictures visibly, in the LoRA folder."""
    host = extension.WebUIHost()
    with host.denoiser("loaded") as denoiser:
        rng = torch.Generator().manual_seed(0)
        shapes = {name: module.weight.shape for name, module in denoiser.layers.items() if "attn2_to_v" in name}
        layers = {name: LayerDelta(0.3 * torch.randn(shape, generator=rng)) for name, shape in shapes.items()}
    return library.save_new(Delta(layers, {"concept_ablation.target": "fish"}), host.delta_folder, "no-fish")


def drawn(prompt: str = "a fish") -> np.ndarray:
    """A picture of 64 x 64 by Forge's own processing, with its LoRA syntax."""
    job = processing.StableDiffusionProcessingTxt2Img(
        sd_model=shared.sd_model,
        prompt=prompt,
        seed=1,
        steps=3,
        width=64,
        height=64,
        sampler_name="Euler",
        scheduler="Automatic",
        cfg_scale=3.0,
        do_not_save_samples=True,
        do_not_save_grid=True,
    )
    job.scripts, job.script_args = scripts.ScriptRunner(), []
    with call_queue.queue_lock:
        shared.state.begin(job="test")
        image = processing.process_images(job).images[0]
        shared.state.end()
    return np.asarray(image).astype(int)


def test_forge_shows_the_tab_and_the_settings():
    tabs = {element: (title, blocks) for blocks, title, element in script_callbacks.ui_tabs_callback()}
    title, blocks = tabs["concept_ablation"]
    assert title == "Concept Ablation"
    labels = {getattr(block, "label", None) for block in blocks.blocks.values()}
    assert "Draw instead" in labels and "Model" in labels
    script_callbacks.ui_settings_callback()
    assert shared.opts.data_labels["concept_ablation_judge"].section[0] == "concept_ablation"
    assert shared.opts.concept_ablation_subfolder == ""


def test_folders_are_forges(host, monkeypatch):
    assert host.delta_folder == Path(shared.cmd_opts.lora_dir)
    assert host.output_folder.parent.name == "outputs"
    monkeypatch.setitem(shared.opts.data, "concept_ablation_subfolder", "../my edits")
    assert extension.WebUIHost().delta_folder == Path(shared.cmd_opts.lora_dir) / "my-edits"


def test_the_judge_is_the_settings(host, monkeypatch):
    from concept_ablation.core.metrics import EMBEDDED_JUDGE

    monkeypatch.setitem(shared.opts.data, "concept_ablation_judge", str(EMBEDDED_JUDGE))
    with host.denoiser("loaded") as denoiser:
        judge = host.judge("loaded", denoiser)
    assert judge.name == "judge"


def test_a_job_has_the_model_to_itself_and_shows_where_it_is(host, saved):
    with host.denoiser("loaded"):
        assert not call_queue.queue_lock.acquire(blocking=False)
        host.show(Progress("Training", 3, 10, 1.0))
        assert (shared.state.sampling_step, shared.state.sampling_steps) == (3, 10)
        assert shared.state.job == "Concept Ablation" and shared.state.textinfo == "Training: 3 of 10"
        assert not host.interrupted()
        with pytest.raises(AblationError, match="busy"):
            host.apply(saved, 1.0)
        waiting = threading.Thread(target=drawn)
        waiting.start()
        waiting.join(1.0)
        assert waiting.is_alive()
        host.show(None)
    waiting.join(120)
    assert not waiting.is_alive() and shared.state.job == "" and shared.state.textinfo is None
    assert "no-fish" in networks.available_networks


def test_forges_interrupt_button_ends_the_job_and_not_the_next_one(host):
    with host.denoiser("loaded"):
        shared.state.interrupt()
        assert host.interrupted()
    assert not host.interrupted()
    with host.denoiser("loaded"):
        assert not host.interrupted()


def test_an_ablation_ends_in_a_file_that_the_prompt_can_name(host):
    before = drawn()
    with host.denoiser("loaded") as denoiser:
        data = dataset.build(denoiser, [Concept("tropical fish", "fish")], SMALL)
        delta = train(denoiser, data, TRAIN).delta
    path = library.save_new(delta.scaled(2000.0), host.delta_folder, "just made")
    assert np.array_equal(drawn(), before)
    # Forge looks for it without being told
    assert np.abs(drawn(f"a fish <lora:{path.stem}:1>") - before).max() > 20


def test_apply_does_what_the_prompts_lora_does_until_it_is_removed(host, saved):
    plain, in_prompt = drawn(), drawn("a fish <lora:no-fish:1>")
    assert np.abs(in_prompt - plain).max() > 20
    host.apply(saved, 1.0)
    assert host.applied() == (Applied("no-fish.safetensors", 1.0),)
    assert np.abs(drawn() - in_prompt).max() <= 2
    # Forge's own LoRAs come and go beside it
    assert np.abs(drawn("a fish <lora:no-fish:0.5>") - in_prompt).max() > 5
    assert np.abs(drawn() - in_prompt).max() <= 2
    host.apply(saved, 0.25)
    assert host.applied() == (Applied("no-fish.safetensors", 0.25),)
    assert np.abs(drawn() - in_prompt).max() > 5
    host.remove("no-fish.safetensors")
    assert host.applied() == () and np.array_equal(drawn(), plain)


def test_a_model_that_forge_loads_again_has_the_deltas_again(host, saved):
    plain = drawn()
    host.apply(saved, 1.0)
    edited, engine = drawn(), shared.sd_model
    sd_models.model_data.forge_hash = ""  # as after another VAE or another precision was chosen
    again = drawn()
    assert shared.sd_model is not engine and np.abs(again - edited).max() <= 2
    assert host.applied() == (Applied("no-fish.safetensors", 1.0),)
    host.remove()
    sd_models.model_data.forge_hash = ""
    assert np.array_equal(drawn(), plain) and host.applied() == ()


def test_the_teacher_is_the_checkpoint_whatever_is_applied_or_was_in_the_last_prompt(host, saved):
    with host.denoiser("loaded") as denoiser:
        plain = denoiser.fingerprint()
    host.apply(saved, 1.0)
    drawn("a fish <lora:no-fish:0.5>")
    with host.denoiser("loaded") as denoiser:
        assert denoiser.fingerprint() == plain
    assert host.applied() and shared.sd_model.forge_objects_original.unet.lora_patches


def test_a_file_that_was_written_again_is_loaded_again(host, saved):
    host.apply(saved, 1.0)
    first = drawn()
    delta = delta_file.load(saved)
    delta_file.save(delta.scaled(0.1), saved)
    os.utime(saved, ns=(1, 1))
    try:
        host.apply(saved, 1.0)
        assert np.abs(drawn() - first).max() > 5
    finally:
        delta_file.save(delta, saved)


def test_without_a_checkpoint_there_is_a_sentence(host, monkeypatch):
    monkeypatch.setattr(sd_models.model_data, "forge_loading_parameters", {"checkpoint_info": None})
    with pytest.raises(AblationError, match="choose one at the top"), host.denoiser("loaded"):
        pass
    assert call_queue.queue_lock.acquire(blocking=False)
    call_queue.queue_lock.release()
    assert shared.state.job == ""
