"""Compressing a delta: what counts as its effect, which prompts measure it, and the command."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from concept_ablation import cli
from concept_ablation.core import delta_file
from concept_ablation.core.concept import Concept, evaluation_prompts, pairs
from concept_ablation.core.delta import Delta, LayerDelta, LowRank
from concept_ablation.core.delta_header import delta_header, named_concepts
from concept_ablation.core.effect import FIRST_SEED, ClipEffect, ClipFigures, OutputEffect
from concept_ablation.core.errors import AblationError
from concept_ablation.core.evaluation import EvaluationSettings
from concept_ablation.core.harvest import HarvestSettings
from concept_ablation.core.prompts import BUILT_IN, development
from concept_ablation.core.samplers import SampleSettings, draw_images
from concept_ablation.core.subsets import select

CAT = Concept("grumpy cat", "cat")
SMALL = HarvestSettings(trajectories=2, preserve=2, prompts=2, sample=SampleSettings(steps=3), batch=4)


def random_edit(model, rank: int, size: float = 1.0) -> Delta:
    """A random change of exactly that rank in every cross-attention layer."""
    generator = torch.Generator().manual_seed(1)

    def low(weight):
        up, down = (
            torch.randn(*shape, generator=generator) for shape in ((len(weight), rank), (rank, weight.shape[1]))
        )
        return LayerDelta(size * up @ down)

    made = {"objective": "model"}
    layers = {name: low(layer.weight) for name, layer in select("cross-attn", model).items()}
    return Delta(layers, delta_header(model, [CAT], "0", made))


@dataclass
class ByBrightness:
    """Stands for the judge: pictures that are brighter (or, of the other sign, darker) than a threshold are cats."""

    threshold: float
    sign: float
    name: str = "brightness"

    def embed_images(self, images: np.ndarray) -> torch.Tensor:
        excess = self.sign * (torch.from_numpy(images.astype(np.float32)).mean((1, 2, 3)) - self.threshold)
        return torch.stack((excess, -excess), 1)

    def embed_concept(self, texts) -> torch.Tensor:
        return torch.tensor([0.0, 1.0]) if texts[0] == CAT.anchor else torch.tensor([1.0, 0.0])


@pytest.fixture
def judged(tiny):
    """An edit, and a judge that sees its target in pictures without it and less often in those with it."""
    edit = random_edit(tiny, 2)
    prompts = evaluation_prompts(CAT.target, CAT, development(tiny.prompt_source), 2)
    arguments = (tiny, prompts, [FIRST_SEED] * 2, SampleSettings(steps=2))
    with torch.no_grad():
        before = draw_images(*arguments).astype(float).mean((1, 2, 3))
        with edit.attach(tiny):
            after = draw_images(*arguments).astype(float).mean((1, 2, 3))
    place = int(np.abs(before - after).argmax())
    return edit, ByBrightness((before[place] + after[place]) / 2, np.sign(before[place] - after[place]))


def test_development_prompts_are_training_prompts_out_of_training():
    held = development(BUILT_IN, 7)
    assert held.instance_evaluation == BUILT_IN.instance_train[-7:]
    assert not set(held.instance_evaluation) & {*held.instance_train, *BUILT_IN.instance_evaluation}
    assert not set(held.style_evaluation) & {*held.style_train, *BUILT_IN.style_evaluation}
    assert held.style_suffixes_train + held.style_suffixes_evaluation == BUILT_IN.style_suffixes_train
    with pytest.raises(AblationError, match="too few"):
        development(BUILT_IN, 10_000)


def test_the_share_kept_is_the_worse_one_of_fall_and_surrounding():
    whole = ClipFigures(0.8, 0.9)
    assert whole.share_of(whole) == 1.0
    assert ClipFigures(0.4, 0.9).share_of(whole) == pytest.approx(0.5)
    assert ClipFigures(0.8, 0.45).share_of(whole) == pytest.approx(0.5)
    assert ClipFigures(0.4, None).share_of(ClipFigures(0.8, None)) == pytest.approx(0.5)


def test_the_effect_on_pictures_is_1_for_the_edit_and_0_for_none(tiny, judged, monkeypatch):
    edit, judge = judged
    asked: list[str] = []
    encode = type(tiny)._encode
    monkeypatch.setattr(type(tiny), "_encode", lambda self, texts: asked.extend(texts) or encode(self, texts))
    tiny._prompt_cache.clear()
    settings = EvaluationSettings(2, 1, SampleSettings(steps=2), first_seed=FIRST_SEED)
    source = tiny.prompt_source
    effect = ClipEffect(tiny, judge, edit, [CAT], [["dog"]], settings)
    assert effect.figures.fall > 0
    assert effect.kept(edit) == 1.0
    assert effect.kept(edit.scaled(0.0)) == 0.0
    assert tiny.prompt_source is source
    used = {prompt for prompt in asked if prompt}
    assert used == {
        text.replace("{}", name) for text in source.instance_train[-10:][:2] for name in (CAT.target, "dog")
    }
    final = {prompt for name in (CAT.target, "dog") for prompt in evaluation_prompts(name, CAT, source, 16)}
    assert not used & final


def test_an_edit_without_effect_on_pictures_is_refused(tiny, judged):
    edit, judge = judged
    settings = EvaluationSettings(2, 1, SampleSettings(steps=2), first_seed=FIRST_SEED)
    with pytest.raises(AblationError, match="does not make"):
        ClipEffect(tiny, judge, edit.scaled(0.0), [CAT], [[]], settings)


def test_the_effect_on_the_output_is_a_relative_distance(tiny):
    edit = random_edit(tiny, 2, 1e-3)
    effect = OutputEffect(tiny, edit, [CAT], [["dog"]], SMALL)
    assert effect.kept(edit) == 1.0
    assert effect.kept(edit.scaled(0.0)) == pytest.approx(0.0, abs=1e-3)
    # so small a change acts linearly
    assert effect.kept(edit.scaled(0.9)) == pytest.approx(0.9, abs=0.02)
    with pytest.raises(AblationError, match="does not change"):
        OutputEffect(tiny, edit.scaled(0.0), [CAT], [[]], SMALL)


def test_probe_rows_are_of_development_prompts(tiny, monkeypatch):
    asked: list[str] = []
    encode = type(tiny)._encode
    monkeypatch.setattr(type(tiny), "_encode", lambda self, texts: asked.extend(texts) or encode(self, texts))
    OutputEffect(tiny, random_edit(tiny, 1), [CAT], [["dog"]], SMALL)
    final = {prompt for name in ("cat", "grumpy cat", "dog") for prompt in evaluation_prompts(name, CAT, BUILT_IN, 16)}
    used = {prompt for prompt in asked if prompt}
    assert used and not used & final
    assert {pair.target for pair in pairs(CAT, tiny.prompt_source)[:-10]}.isdisjoint(used)


def test_a_header_names_its_concepts(tiny):
    style = Concept("van gogh", "painting", "style")
    header = delta_header(tiny, [CAT, style], "0", {})
    assert named_concepts(header) == (CAT, style)
    for bad in ({}, {**header, "concept_ablation.anchor": "a; b; c"}):
        with pytest.raises(AblationError, match="does not say"):
            named_concepts(bad)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, tiny):
    """The command on the tiny model: exit code and what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("concept_ablation.cli.compress.load_model", lambda *_: tiny)

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["concept-ablation", "compress", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = capsys.readouterr()
        return stopped.value.code, said.out + said.err

    return call


def test_the_command_finds_the_rank_and_says_what_it_kept(run, tiny, tmp_path):
    edit = random_edit(tiny, 3, 0.1).rounded(torch.float16)
    delta_file.save(edit, tmp_path / "whole.safetensors")
    arguments = ["--delta", "whole.safetensors", "--measure", "output", "--output", "low.safetensors"]
    code, said = run(*arguments, "--keep", "0.95", "--surrounding", "dog")
    low = delta_file.load(tmp_path / "low.safetensors")
    assert code == 0 and "rank 3" in said and "MB instead of" in said and "output" in said, said
    assert {layer.weight.down.shape[0] for layer in low.layers.values()} == {3}
    for name, layer in low.layers.items():
        torch.testing.assert_close(layer.weight.dense(), edit.layers[name].weight, atol=2e-3, rtol=1e-2)
    header = low.metadata
    assert header["concept_ablation.target"] == CAT.target and header["concept_ablation.rank"] == "3"
    assert header["concept_ablation.kept_effect_measure"] == "output"
    assert 0.95 <= float(header["concept_ablation.kept_effect"]) <= 1.0
    code, said = run(*arguments, "--rank", "1")
    low = delta_file.load(tmp_path / "low.safetensors")
    assert code == 0 and isinstance(low.layers[next(iter(low.layers))].weight, LowRank)
    assert float(low.metadata["concept_ablation.kept_effect"]) < 0.95


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output", "low.bin"], "must end in .safetensors"),
        (["--output", "l.safetensors", "--measure", "taste"], "'taste'"),
        (["--output", "l.safetensors", "--target", "cat"], "Targets: 1, anchors: 0"),
        (["--output", "l.safetensors", "--kind", "style"], "give --target and --anchor"),
        (["--output", "l.safetensors", "--delta", "bare.safetensors"], "name its targets and anchors"),
        (["--output", "l.safetensors", "--delta", "flat.safetensors"], "no rank"),
    ],
)
def test_the_command_refuses(run, tiny, tmp_path, arguments, said):
    edit = random_edit(tiny, 1)
    delta_file.save(edit, tmp_path / "whole.safetensors")
    delta_file.save(Delta(edit.layers), tmp_path / "bare.safetensors")
    flat = {"lora_unet_conv_norm_out": LayerDelta(torch.ones(32), torch.ones(32))}
    delta_file.save(Delta(flat, edit.metadata), tmp_path / "flat.safetensors")
    if "--delta" not in arguments:
        arguments = ["--delta", "whole.safetensors", *arguments]
    code, found = run("--measure", "output", *arguments)
    assert code == 2 and re.search(said, found), found
    assert len(list(tmp_path.iterdir())) == 3, "something was left behind"
