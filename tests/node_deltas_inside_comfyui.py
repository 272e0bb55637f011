"""The nodes that keep, combine and measure edits, collected by `test_nodes.py` only: they need ComfyUI's modules."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy.cli_args import args
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from concept_ablation.core import delta_file
from concept_ablation.core.delta import Delta, LayerDelta
from concept_ablation.core.errors import AblationError, Interrupted
from concept_ablation.core.hosts.comfyui import HINTS
from concept_ablation.nodes import deltas, evaluate
from concept_ablation.nodes.emoji import ConceptAblationLoadEmojiDiffusion
from concept_ablation.tests.nodes_inside_comfyui import FISH, folders, run, sent, small_delta  # noqa: F401


def test_save_never_overwrites_and_keeps_the_workflow(folders):  # noqa: F811
    delta = small_delta()
    saved = [Path(run(deltas.ConceptAblationSaveDelta, delta=delta, name="../a b")[0]) for _ in range(2)]
    assert [path.name for path in saved] == ["a_b_00001.safetensors", "a_b_00002.safetensors"]
    assert {path.parent for path in saved} == {folders.loras}
    with safe_open(saved[0], framework="pt") as file:
        header = file.metadata()
    assert header["concept_ablation.target"] == "fish"
    assert json.loads(header["workflow"]) == {"id": "w"}
    assert json.loads(header["prompt"]) == {"7": {}}
    assert torch.equal(load_file(saved[1])["lora_unet_a.diff"].float(), delta.layers["lora_unet_a"].weight)


def test_save_leaves_the_workflow_out_where_the_user_wants_that(monkeypatch):
    monkeypatch.setattr(args, "disable_metadata", True)
    path = run(deltas.ConceptAblationSaveDelta, delta=small_delta())[0]
    assert not {"workflow", "prompt"} & delta_file.load(Path(path)).metadata.keys()


def test_a_loaded_lora_gets_our_names_and_leaves_the_graph_of_its_file_behind(folders, monkeypatch):  # noqa: F811
    emoji, clip, _ = run(ConceptAblationLoadEmojiDiffusion).args
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k"
    change = LayerDelta(torch.ones(emoji.model.state_dict()[f"{key}.weight"].shape))
    header = {"workflow": "{}", "prompt": "{}", "concept_ablation.target": "fish"}
    delta_file.save(Delta({key: change}, header), folders.loras / "a.safetensors")
    delta = run(deltas.ConceptAblationLoadDelta, model=emoji, clip=clip, file="a.safetensors")[2]
    assert delta.layers.keys() == {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"}
    monkeypatch.setattr(args, "disable_metadata", True)
    saved = run(deltas.ConceptAblationSaveDelta, delta=delta)[0]
    assert delta_file.load(Path(saved)).metadata == {"concept_ablation.target": "fish"}


def test_a_changed_file_is_loaded_again(folders):  # noqa: F811
    path = folders.loras / "a.safetensors"
    delta_file.save(small_delta(), path)
    fingerprint = deltas.ConceptAblationLoadDelta.fingerprint_inputs
    before = fingerprint("a.safetensors", strength_model=1.0)
    assert fingerprint("a.safetensors", strength_model=0.5) == before
    delta_file.save(replace(small_delta(), metadata={}), path)
    assert fingerprint("a.safetensors") != before
    # a name that another node will give is not there yet
    assert fingerprint(None) == [] and deltas.ConceptAblationLoadDelta.validate_inputs(None) is True


def test_load_refuses_what_is_no_delta(folders):  # noqa: F811
    (folders.loras / "bad.safetensors").write_bytes(b"nonsense")
    save_file({"model.weight": torch.zeros(2)}, folders.loras / "checkpoint.safetensors")
    (folders.loras / "old.pt").write_bytes(b"")
    inputs = {"model": None, "clip": None}
    for name, words in (("bad.safetensors", "damaged"), ("checkpoint.safetensors", "kind of edit"), ("old.pt", "only")):
        with pytest.raises(AblationError, match=words):
            run(deltas.ConceptAblationLoadDelta, file=name, **inputs)
    with pytest.raises(FileNotFoundError):
        run(deltas.ConceptAblationLoadDelta, file="../../secret.safetensors", **inputs)
    combo = next(item for item in deltas.ConceptAblationLoadDelta.GET_SCHEMA().inputs if item.id == "file")
    assert combo.options == ["bad.safetensors", "checkpoint.safetensors"]


def test_merge_and_lora(sent):  # noqa: F811
    delta = small_delta()
    weight = delta.layers["lora_unet_a"].weight
    merged = run(deltas.ConceptAblationMergeDeltas, delta_a=delta, delta_b=delta, strength_a=2.0, strength_b=-0.5)[0]
    assert torch.allclose(merged.layers["lora_unet_a"].weight, 1.5 * weight)
    lora, text = run(deltas.ConceptAblationToLora, delta=delta, rank=2).args
    values = np.linalg.svd(weight.numpy(), compute_uv=False) ** 2
    # rank 2 of an 8 x 6 weight and its alpha are 29 numbers
    assert sent[-1][1:] == ("7", "me")
    assert text == f"rank 2 keeps {values[:2].sum() / values.sum():.1%} of the change's energy, 0.0 MB"
    assert deltas.file_megabytes(lora) == pytest.approx(2 * 29 / 1e6)


def test_both_models_draw_in_the_size_of_the_one_before_the_edit(folders, monkeypatch):  # noqa: F811
    emoji, clip, vae = run(ConceptAblationLoadEmojiDiffusion).args
    before = emoji.clone()
    before.set_attachments(HINTS, replace(emoji.get_attachment(HINTS), size=64))
    sizes = []

    def enough(*_):
        raise Interrupted("stop")

    monkeypatch.setattr(evaluate, "draw", lambda denoiser, *_: sizes.append(denoiser.latent_shape))
    monkeypatch.setattr(evaluate, "compare", enough)
    inputs = {"model": before, "model_after": emoji, "clip": clip, "vae": vae, "concepts": (FISH,)}
    with pytest.raises(Interrupted):
        run(evaluate.ConceptAblationEvaluate, **inputs)
    assert sizes == [(4, 8, 8), (4, 8, 8)]
