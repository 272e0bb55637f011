"""The method on a model that really learned its concepts: the target goes, its neighbours stay.

Smaller than the `balanced` preset, so that it fits a test run; `benchmarks/speed.py` measures the preset itself.
"""

from __future__ import annotations

import pytest
import torch

from concept_ablation.core import delta_file
from concept_ablation.core.ablation import Task, ablate
from concept_ablation.core.concept import Concept
from concept_ablation.core.evaluation import EvaluationSettings, evaluate
from concept_ablation.core.metrics import Judge
from concept_ablation.core.presets import recipe
from concept_ablation.core.samplers import SampleSettings

TASK = Task(Concept("sunflower", "flower"), ("shark", "cat"))
EVALUATION = EvaluationSettings(prompts=3, seeds=4, sample=SampleSettings(steps=12), batch=24)


@pytest.fixture(scope="module")
def made(emoji):
    small = recipe(
        "balanced",
        emoji,
        training={"steps": 50},
        dataset={"images": 32, "preserve": 48, "sample": SampleSettings(steps=10)},
    )
    before = emoji.fingerprint()
    result = ablate(emoji, [TASK], small)
    assert emoji.fingerprint() == before
    return result


def test_the_target_is_gone_and_its_neighbours_stay(emoji, made):
    found = evaluate(emoji, made.delta, [TASK.concept], [TASK.surrounding], Judge.load(), EVALUATION)
    rows = {row.name: row for row in found.concepts}
    target = rows["sunflower"]
    assert target.before.clip_accuracy >= 0.5
    assert target.after.clip_accuracy <= 0.25
    assert target.after.clip_score < target.before.clip_score - 0.03
    for name in ("flower", "shark", "cat"):
        assert rows[name].before.clip_accuracy >= 0.75
        assert rows[name].after.clip_accuracy >= rows[name].before.clip_accuracy - 0.1


def test_the_header_says_where_the_delta_comes_from(emoji, made, tmp_path):
    delta_file.save(made.delta, tmp_path / "delta.safetensors")
    delta = delta_file.load(tmp_path / "delta.safetensors")
    header = delta.metadata
    assert header["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert (header["concept_ablation.target"], header["concept_ablation.anchor"]) == ("sunflower", "flower")
    assert header["concept_ablation.base_model_sha256"] == emoji.fingerprint()
    assert (header["concept_ablation.subset"], header["concept_ablation.steps"]) == ("cross-attn", "50")
    for name, layer in made.delta.layers.items():
        assert torch.equal(delta.layers[name].weight, layer.weight)
