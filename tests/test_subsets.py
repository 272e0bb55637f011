"""Which layers each subset takes."""

from __future__ import annotations

import pytest
import torch

from concept_ablation.core.concept import Concept
from concept_ablation.core.errors import AblationError
from concept_ablation.core.subsets import SUBSETS, empty_delta, select, trainable


def test_cross_attention_takes_keys_and_values_of_every_block(emoji):
    names = set(select("cross-attn", emoji))
    blocks = [name for name, _ in emoji.network.named_modules() if name.endswith("attn2")]
    expected = {f"lora_unet_{block.replace('.', '_')}_to_{part}" for block in blocks for part in "kv"}
    assert names == expected and len(names) == 14


def test_the_truncated_subset_is_cross_attention_without_the_way_down(emoji):
    names, up = set(select("cross-attn", emoji)), set(select("cross-attn-up", emoji))
    assert names - up == {name for name in names if name.startswith("lora_unet_down_blocks_")} != set()
    assert {name.split("_")[2] for name in up} == {"mid", "up"}


def test_attn_takes_all_projections_of_all_attention_layers(emoji):
    names = set(select("attn", emoji))
    assert names > set(select("cross-attn", emoji))
    assert len(names) == 7 * 2 * 4
    assert all(name.split("_to_")[1] in ("q", "k", "v", "out_0") for name in names)


def test_full_takes_every_weight_of_the_network_and_no_other(emoji):
    layers = select("full", emoji)
    count = sum(parameter.numel() for module in layers.values() for parameter in module.parameters(recurse=False))
    assert count == sum(parameter.numel() for parameter in emoji.network.parameters())


def test_embedding_takes_the_rows_that_the_anchor_does_not_share(emoji):
    def rows(target: str, anchor: str) -> list[int]:
        delta = empty_delta("embedding", emoji, [Concept(target, anchor)])
        (layer,) = delta.layers.values()
        return layer.weight.up.argmax(0).tolist()

    assert rows("tropical fish", "fish") == emoji.tokenize("tropical")
    assert rows("rooster", "bird") == emoji.tokenize("rooster")
    # nothing is left to tell them apart: all of the target's rows
    assert rows("fish fish", "fish") == emoji.tokenize("fish")


def test_embedding_has_a_row_for_each_wording_of_a_target_and_none_of_an_anchor(emoji):
    def rows(*concepts: Concept) -> set[int]:
        (layer,) = empty_delta("embedding", emoji, concepts).layers.values()
        return set(layer.weight.up.argmax(0).tolist())

    def tokens(text: str) -> set[int]:
        return set(emoji.tokenize(text))

    further = Concept("tropical fish", "fish", target_prompts=("a blowfish => a fish",))
    assert rows(further) == tokens("tropical") | tokens("blowfish") - tokens("a fish")
    caption = Concept("The rooster, at dawn", "a bird", "memorized", anchor_prompts=("the bird, at noon",))
    assert rows(caption) == tokens("rooster dawn")
    # "fish" is the first one's anchor, so the second one cannot have it
    assert rows(Concept("tropical fish", "fish"), Concept("fish cake", "cake")) == tokens("tropical") | tokens("fish")
    assert rows(Concept("tropical fish", "fish"), Concept("fish cake swirl", "cake")) == tokens("tropical swirl")


def test_only_the_rows_of_an_embedding_are_trained(emoji):
    delta = trainable(empty_delta("embedding", emoji, [Concept("rooster", "bird")]), "embedding")
    (layer,) = delta.layers.values()
    assert layer.weight.down.requires_grad and not layer.weight.up.requires_grad


def test_every_subset_starts_at_zero(emoji):
    for subset in SUBSETS:
        delta = empty_delta(subset, emoji, [Concept("rooster", "bird")])
        for layer in delta.layers.values():
            assert torch.count_nonzero(layer.squared_norm()) == 0


def test_unknown_subset_is_refused(tiny):
    with pytest.raises(AblationError, match="cross-attn, attn, embedding, full"):
        select("everything", tiny)
