"""Low-rank deltas: what is best, where training begins and ends, and how small the files are."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from concept_ablation.core import delta_file, harvest, low_rank, trainer
from concept_ablation.core.closed_form import ClosedFormSettings, solution
from concept_ablation.core.concept import Concept
from concept_ablation.core.dataset import DatasetSettings, build
from concept_ablation.core.delta import Delta, LayerDelta, LowRank, contribution, factorize
from concept_ablation.core.errors import AblationError
from concept_ablation.core.harvest import HarvestSettings
from concept_ablation.core.harvest_training import train_harvested
from concept_ablation.core.samplers import SampleSettings
from concept_ablation.core.subsets import empty_delta, select
from concept_ablation.core.trainer import TrainSettings

CAT = Concept("grumpy cat", "cat")
ROWS = HarvestSettings(trajectories=6, preserve=4, prompts=4, sample=SampleSettings(steps=4), batch=5, seed=7)


@pytest.fixture(scope="module")
def rows(make_model):
    return harvest.harvest(make_model(), [CAT], ROWS, surrounding=[["dog"]])


def singular(weight: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(weight.double())


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_first_terms_are_the_best_approximation_of_their_rank(rank):
    """Eckart and Young: the error is the root of what the other squared singular values add up to, and no other
    factors of that rank come closer."""
    torch.manual_seed(0)
    weight = torch.randn(8, 6)
    best = factorize(weight).truncated(rank)
    error = (best.dense() - weight).norm().item()
    assert error == pytest.approx(singular(weight)[rank:].square().sum().sqrt().item(), abs=1e-5)
    for _ in range(50):
        near = LowRank(best.up + 0.1 * torch.randn_like(best.up), best.down + 0.1 * torch.randn_like(best.down))
        assert (near.dense() - weight).norm().item() >= error


def test_factors_are_factorized_without_their_product():
    torch.manual_seed(0)
    low = LowRank(torch.randn(40, 3), torch.randn(3, 4, 3, 3))
    again = factorize(low)
    assert again.up.shape == (40, 3) and again.down.shape == (3, 4, 3, 3)
    torch.testing.assert_close(again.dense(), low.dense(), atol=1e-4, rtol=1e-4)
    best = factorize(low.dense()).truncated(2).dense()
    torch.testing.assert_close(again.truncated(2).dense(), best, atol=1e-4, rtol=1e-4)


def test_truncation_leaves_what_has_no_rank_and_goes_through_a_file(tmp_path):
    torch.manual_seed(0)
    whole = Delta(
        {
            "lora_unet_a": LayerDelta(torch.randn(6, 5), torch.randn(6)),
            "lora_unet_conv": LayerDelta(torch.randn(4, 3, 3, 3)),
            "lora_unet_norm": LayerDelta(torch.randn(5), torch.randn(5)),
            "lora_unet_bias": LayerDelta(None, torch.randn(5)),
        },
        {"concept_ablation.target": "cat"},
    )
    factors = low_rank.factorized(whole)
    assert low_rank.largest_rank(factors) == 5
    for name, layer in low_rank.truncated(factors, 27).layers.items():
        weight = layer.weight.dense() if isinstance(layer.weight, LowRank) else layer.weight
        torch.testing.assert_close(weight, whole.layers[name].weight, atol=1e-5, rtol=1e-4)
    low = low_rank.truncated(factors, 2).rounded(torch.float16)
    delta_file.save(low, tmp_path / "low.safetensors")
    back = delta_file.load(tmp_path / "low.safetensors")
    assert back.metadata["concept_ablation.target"] == "cat"
    for name, layer in low.layers.items():
        for kept, read in zip(layer.tensors(), back.layers[name].tensors(), strict=True):
            assert torch.equal(kept, read)
    layer, x = nn.Linear(5, 6), torch.randn(3, 5)
    added, expected = (contribution(layer, x, delta.layers["lora_unet_a"]) for delta in (back, low))
    torch.testing.assert_close(added, expected)
    assert back.layers["lora_unet_conv"].weight.down.shape == (2, 3, 3, 3)
    assert torch.equal(back.layers["lora_unet_norm"].weight, low.layers["lora_unet_norm"].weight)
    with pytest.raises(AblationError, match="at least 1"):
        low_rank.truncated(factors, 0)


@pytest.mark.parametrize("needed", [1, 2, 3, 5, 8, 11, 20])
def test_the_smallest_rank_that_keeps_enough_is_found(needed):
    asked: list[int] = []

    def kept(rank: int) -> float:
        asked.append(rank)
        return min(1.0, rank / needed)

    rank, tried = low_rank.smallest_rank(kept, 1.0, 20)
    assert rank == needed and tried[rank] >= 1.0
    assert needed == 1 or tried[needed - 1] < 1.0, "the rank below was tried"
    assert len(asked) == len(set(asked)) <= 2 * math.ceil(math.log2(needed + 1)) + 1


def test_if_nothing_keeps_enough_the_answer_is_everything():
    rank, tried = low_rank.smallest_rank(lambda rank: 0.5, 0.9, 6)
    assert rank == 6 and tried[6] == 0.5


def test_training_starts_as_lora_does(tiny):
    layers = select("cross-attn", tiny)
    delta = empty_delta("cross-attn", tiny, [CAT], rank=4, seed=3)
    assert delta.layers.keys() == layers.keys()
    for name, layer in delta.layers.items():
        out, width = layers[name].weight.shape
        assert layer.weight.up.shape == (out, 4) and layer.weight.down.shape == (4, width) and layer.bias is None
        assert not layer.weight.up.any() and layer.weight.down.abs().max() <= 1 / math.sqrt(width)
        assert layer.weight.down.std().item() == pytest.approx(1 / math.sqrt(3 * width), rel=0.3)
    again, other = (empty_delta("cross-attn", tiny, [CAT], rank=4, seed=seed) for seed in (3, 4))
    name = next(iter(layers))
    assert torch.equal(again.layers[name].weight.down, delta.layers[name].weight.down)
    assert not torch.equal(other.layers[name].weight.down, delta.layers[name].weight.down)
    wide = empty_delta("cross-attn", tiny, [CAT], rank=999)
    assert wide.layers[name].weight.down.shape[0] == min(layers[name].weight.shape)


def test_a_start_is_cut_to_the_rank_and_filled_up_beyond_its_own():
    torch.manual_seed(0)
    empty = low_rank.zeros({"a": nn.Linear(6, 8)}, 4, 0).layers["a"].weight
    dense = torch.randn(8, 6)
    best = factorize(dense).truncated(4)
    torch.testing.assert_close(low_rank.begun(dense, empty).dense(), best.dense(), atol=1e-5, rtol=1e-4)
    for start in (LowRank(torch.randn(8, 2), torch.randn(2, 6)), torch.zeros(8, 6)):
        begun = low_rank.begun(start, empty)
        want = start.dense() if isinstance(start, LowRank) else start
        torch.testing.assert_close(begun.dense(), want, atol=1e-5, rtol=1e-4)
        assert begun.down.shape == (4, 6) and (begun.down.square().sum(1) > 0).all(), "every term can be trained"


class OneLayer(nn.Module):
    """Stands for a denoiser in `trainer.optimize`: one linear layer, fp32, on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(6, 8, bias=False).requires_grad_(False)
        self.text_network = None
        self.layers = {"lora_unet_a": self.network}
        self.device, self.gradient_scale, self.text_edits = torch.device("cpu"), 1.0, 0
        self.name = self.architecture = "one layer"


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_training_of_a_linear_layer_ends_at_the_best_edit_of_its_rank(rank):
    """With white inputs || (W + up down) x - (W + aim) x ||^2 is || up down - aim ||^2: the optimum is the truncated
    SVD of the aim and the loss there what the other singular values leave."""
    torch.manual_seed(0)
    model = OneLayer()
    u, _, vh = torch.linalg.svd(torch.randn(8, 6), full_matrices=False)
    aim = u @ torch.diag(torch.tensor([2.0, 1.5, 1.0, 0.6, 0.3, 0.1])) @ vh
    x = torch.eye(6)
    goal = model.network(x) + x @ aim.T
    settings = TrainSettings(steps=600, learning_rate=3e-3, rank=rank, clip_norm=1e9)
    start = low_rank.zeros(model.layers, rank, 0)

    def losses(attachment):
        for _ in range(settings.steps):
            yield (model.network(x) - goal).square().sum(), torch.zeros(())

    result = trainer.optimize(model, start, settings, losses, None)
    trained = result.delta.layers["lora_unet_a"].weight
    assert isinstance(trained, LowRank) and trained.down.shape == (rank, 6)
    best = factorize(aim).truncated(rank).dense()
    torch.testing.assert_close(trained.dense(), best, atol=0.01, rtol=0)
    assert result.losses[-1] == pytest.approx(singular(aim)[rank:].square().sum().item(), rel=0.01, abs=1e-4)


def test_low_rank_training_on_images_and_on_rows_goes_through_a_file(tiny, rows, tmp_path):
    data = build(tiny, [CAT], DatasetSettings(images=4, sample=SampleSettings(steps=2), batch=4))
    settings = TrainSettings(steps=3, batch=4, learning_rate=1e-3, rank=2)
    for number, result in enumerate((trainer.train(tiny, data, settings), train_harvested(tiny, rows, settings))):
        path = tmp_path / f"{number}.safetensors"
        delta_file.save(result.delta, path)
        back = delta_file.load(path)
        rounded = result.delta.rounded(torch.float16)
        assert back.layers.keys() == select("cross-attn", tiny).keys() and rounded.norm() > 0
        x, sigma = torch.randn(1, *tiny.latent_shape), torch.tensor([2.0])
        with torch.no_grad():
            cond = tiny.encode(["a grumpy cat"])
            with rounded.attach(tiny):
                trained = tiny.direction(x, sigma, cond)
            with back.attach(tiny):
                torch.testing.assert_close(tiny.direction(x, sigma, cond), trained)


def test_low_rank_training_comes_close_to_that_of_whole_matrices(tiny, rows):
    settings = TrainSettings(steps=60, batch=12, learning_rate=1e-2, preserve_batch=4)
    whole, low = (train_harvested(tiny, rows, replace(settings, rank=rank)).losses for rank in (0, 8))
    fall = [sum(losses[:3]) - sum(losses[-3:]) for losses in (whole, low)]
    assert fall[1] > 0.7 * fall[0] > 0


def test_low_rank_training_begins_with_the_best_approximation_of_a_start(tiny, rows):
    start = solution(tiny, [CAT], ClosedFormSettings(prompts=4, preserve_prompts=4), surrounding=[["dog"]])
    still = TrainSettings(steps=1, batch=4, learning_rate=1e-9, rank=2)
    begun = train_harvested(tiny, rows, still, start=start).delta
    best = low_rank.truncated(low_rank.factorized(start), 2)
    for name, layer in begun.layers.items():
        torch.testing.assert_close(layer.weight.dense(), best.layers[name].weight.dense(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("subset", ["embedding", "full"])
def test_subsets_with_other_layers_are_refused(tiny, subset):
    with pytest.raises(AblationError, match="cross-attn or attn"):
        empty_delta(subset, tiny, [CAT], rank=2)
    with pytest.raises(AblationError, match=f"'{subset}' has other layers"):
        TrainSettings(subset=subset, rank=2)
    with pytest.raises(AblationError, match="at least 1"):
        TrainSettings(rank=-1)


@pytest.fixture(scope="module")
def sd15():
    """Stable Diffusion 1.5's cross-attention, as shapes."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
    return {
        "lora_unet_" + name.replace(".", "_"): module
        for name, module in unet.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v"))
    }


@pytest.mark.parametrize(("rank", "size"), [(8, 0.82), (20, 2.0)])
def test_a_delta_of_rank_20_for_sd15_takes_at_most_two_megabytes(sd15, rank, size, tmp_path):
    layers = {
        name: LayerDelta(LowRank(torch.zeros(layer.weight.shape[0], rank), torch.zeros(rank, layer.weight.shape[1])))
        for name, layer in sd15.items()
    }
    path = tmp_path / "delta.safetensors"
    delta_file.save(Delta(layers, {"concept_ablation.settings": "x" * 1500}), path)
    assert len(layers) == 32
    assert path.stat().st_size <= size * 1e6
