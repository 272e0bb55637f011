"""Delta files: key names, round trips, the header, and files that must be refused."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from concept_ablation.core import delta_file
from concept_ablation.core.concept import Concept
from concept_ablation.core.delta import Delta, LayerDelta, LowRank, zeros
from concept_ablation.core.delta_header import delta_header
from concept_ablation.core.errors import AblationError
from concept_ablation.core.subsets import empty_delta, select

ENCODERS = ("clip_l", "clip_h")


@pytest.fixture
def mixed() -> Delta:
    """Every form of change there is, with values that fp16 holds exactly."""
    torch.manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return torch.randint(-8, 8, shape) / 16

    return Delta(
        {
            "lora_unet_dense": LayerDelta(values(4, 3), values(4)),
            "lora_unet_bias": LayerDelta(None, values(4)),
            "lora_unet_low": LayerDelta(LowRank(values(4, 2), values(2, 3))),
            "lora_unet_conv": LayerDelta(LowRank(values(4, 2), values(2, 3, 3, 3)), values(4)),
        },
        {"concept_ablation.target": "Grumpy Cat", "modelspec.title": "日本"},
    )


def test_round_trip_is_exact(mixed, tmp_path):
    delta_file.save(mixed, tmp_path / "d.safetensors")
    back = delta_file.load(tmp_path / "d.safetensors")
    assert back.metadata == mixed.metadata
    assert back.layers.keys() == mixed.layers.keys()
    for name, layer in mixed.layers.items():
        for sent, received in zip(layer.tensors(), back.layers[name].tensors(), strict=True):
            assert received.dtype == torch.float32 and torch.equal(sent, received)
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]


def test_rounded_is_what_a_file_gives_back(tmp_path, tiny):
    torch.manual_seed(0)
    delta = zeros(select("cross-attn", tiny)).map(torch.randn_like)
    delta_file.save(delta, tmp_path / "d.safetensors")
    back = delta_file.load(tmp_path / "d.safetensors")
    for name, layer in delta.rounded(torch.float16).layers.items():
        assert torch.equal(layer.weight, back.layers[name].weight)


def test_keys_are_those_of_lora_loaders(mixed, tmp_path, tiny):
    delta_file.save(mixed, tmp_path / "d.safetensors")
    with safe_open(tmp_path / "d.safetensors", framework="pt") as file:
        assert set(file.keys()) == {
            "lora_unet_dense.diff",
            "lora_unet_dense.diff_b",
            "lora_unet_bias.diff_b",
            "lora_unet_low.lora_up.weight",
            "lora_unet_low.lora_down.weight",
            "lora_unet_low.alpha",
            "lora_unet_conv.lora_up.weight",
            "lora_unet_conv.lora_down.weight",
            "lora_unet_conv.alpha",
            "lora_unet_conv.diff_b",
        }
        assert file.get_tensor("lora_unet_conv.lora_up.weight").shape == (4, 2, 1, 1)
    keys = delta_file.to_tensors(zeros(select("cross-attn", tiny)))
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.diff" in keys


def test_alpha_scales_a_foreign_lora(tmp_path):
    up, down = torch.ones(3, 2), torch.ones(2, 5)
    tensors = {"a.lora_up.weight": up, "a.lora_down.weight": down, "a.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "lora.safetensors")
    assert torch.equal(delta_file.load(tmp_path / "lora.safetensors").layers["a"].weight.dense(), torch.ones(3, 5))


def test_embedding_file_holds_rows_not_the_vocabulary(tiny, tmp_path):
    delta = empty_delta("embedding", tiny, [Concept("grumpy cat", "cat")])
    delta_file.save(delta, tmp_path / "d.safetensors")
    dense = 2 * 49408 * 16
    assert (tmp_path / "d.safetensors").stat().st_size < dense / 4


def test_older_files_of_sd2_name_its_text_encoder_as_its_own_is_named(tmp_path):
    old, new = (f"text_encoders.{name}.transformer.text_model.embeddings.token_embedding" for name in ENCODERS)
    for family, name in (("sd2", new), ("sd1", old)):
        saved = Delta({old: LayerDelta(torch.ones(3, 2))}, {"concept_ablation.architecture": family})
        delta_file.save(saved, tmp_path / "d.safetensors")
        assert delta_file.load(tmp_path / "d.safetensors").layers.keys() == {name}


@pytest.mark.parametrize(
    ("family", "prediction", "architecture", "kohya"),
    [
        ("sd1", "epsilon", "stable-diffusion-v1/lora", {}),
        ("sd1", "v_prediction", "stable-diffusion-v1/lora", {}),
        ("sd2", "epsilon", "stable-diffusion-v2-512/lora", {"ss_v2": "True"}),
        ("sd2", "v_prediction", "stable-diffusion-v2-768-v/lora", {"ss_v2": "True"}),
        ("sdxl", "epsilon", "stable-diffusion-xl-v1-base/lora", {"ss_base_model_version": "sdxl_base_v1-0"}),
    ],
)
def test_the_header_names_the_family_as_modelspec_and_webuis_know_it(
    make_model, family, prediction, architecture, kohya
):
    model = make_model(prediction_type=prediction)
    model.architecture = family
    header = delta_header(model, [Concept("grumpy cat", "cat")], "0", {})
    assert header["modelspec.architecture"] == architecture
    assert {key: value for key, value in header.items() if key.startswith("ss_")} == kohya


def refused(path, match):
    with pytest.raises(AblationError, match=match) as error:
        delta_file.load(path)
    assert "\n" not in str(error.value)


def test_files_that_are_refused(tmp_path):
    refused(tmp_path / "absent.safetensors", "no delta file")
    (tmp_path / "garbage.safetensors").write_bytes(b"\x99" * 100)
    refused(tmp_path / "garbage.safetensors", "damaged")
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps({"a": 1}))
    refused(tmp_path / "pickle.safetensors", "damaged")
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"a": 1}))
    refused(tmp_path / "model.pt", r"\.safetensors")
    save_file({"a.diff": torch.ones(9, 9)}, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-40])
    refused(tmp_path / "cut.safetensors", "damaged")
    factors = {"a.lora_up.weight": torch.ones(4, 2), "a.lora_down.weight": torch.ones(2, 5)}
    for name, tensors, message in (
        ("loha", {"a.hada_w1_a": torch.ones(1)}, "hada_w1_a"),
        ("half", {"a.lora_up.weight": torch.ones(2, 2)}, "incomplete"),
        ("alpha", {"a.alpha": torch.ones(())}, "incomplete"),
        ("alphas", {**factors, "a.alpha": torch.ones(2)}, "incomplete"),
        ("nan", {"a.diff": torch.full((2, 2), float("nan"))}, "NaN"),
        ("rank", {"a.lora_up.weight": torch.ones(4, 2), "a.lora_down.weight": torch.ones(3, 5)}, "incomplete"),
        ("none", {"a.lora_up.weight": torch.ones(4, 0), "a.lora_down.weight": torch.ones(0, 5)}, "incomplete"),
        ("checkpoint", {"model.diffusion_model.out.2.weight": torch.ones(1)}, "does not read"),
    ):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        refused(tmp_path / f"{name}.safetensors", message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_a_delta_that_fp16_cannot_hold_is_not_saved(tmp_path, value):
    with pytest.raises(AblationError, match="not saved"):
        delta_file.save(Delta({"a": LayerDelta(torch.full((2, 2), value))}), tmp_path / "d.safetensors")
    assert not list(tmp_path.iterdir())
