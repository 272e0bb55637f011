"""Quick presets and negative guidance in nodes, collected by `test_nodes.py` only: they need ComfyUI's modules."""

from __future__ import annotations

import json

import pytest

from concept_ablation.core.errors import AblationError
from concept_ablation.nodes import ablate, dataset
from concept_ablation.nodes.concept import ConceptAblationConcept
from concept_ablation.nodes.emoji import ConceptAblationLoadEmojiDiffusion
from concept_ablation.nodes.instant import ConceptAblationInstant
from concept_ablation.tests.nodes_inside_comfyui import folders, run, sent  # noqa: F401 - two are fixtures


def test_the_quick_presets(sent):  # noqa: F811
    emoji, clip, vae = run(ConceptAblationLoadEmojiDiffusion).args
    concepts = run(ConceptAblationConcept, surrounding="shark")[0]
    shared = {"model": emoji, "clip": clip}
    edited, _, delta = run(ConceptAblationInstant, concepts=concepts, auto_preserve=2, vae=vae, **shared).args
    assert edited is not emoji and delta.metadata["concept_ablation.objective"] == "closed-form"
    assert not any(tensor.is_inference() for layer in delta.layers.values() for tensor in layer.tensors())
    assert not sent, "it has no chart that an event would be for"

    small = {"preset": "fast", "concepts": concepts, "images": 2, "preserve": 2, "steps": 2, "width": 64, "height": 64}
    build = dataset.ConceptAblationBuildDataset
    rows, preview = run(build, auto_preserve=1, images_at_once=2, **small, **shared).args
    assert rows.x.shape == (8, 4, 8, 8) and preview.shape == (2, 64, 64, 3)
    assert rows.surrounding[0][0] == "shark" and len(rows.surrounding[0]) == 2
    train = {"dataset": rows, "steps": 2, "batch": 2, **shared}
    delta = run(ablate.ConceptAblationAblate, preset="fast", **train)[2]
    assert delta.metadata["concept_ablation.start"] == "closed-form"
    with pytest.raises(AblationError, match=r"built with a negative guidance of 0\.5"):
        run(ablate.ConceptAblationAblate, preset="fast", negative_guidance=0.0, **train)
    with pytest.raises(AblationError, match="choose the same preset"):
        run(ablate.ConceptAblationAblate, preset="balanced", **train)
    with pytest.raises(AblationError, match="set source to anchor"):
        run(build, source="target", **small, **shared)


def test_negative_guidance():
    """The closed form's is its strength, a harvest's is its training's, and images leave it to the training."""
    emoji, clip, _ = run(ConceptAblationLoadEmojiDiffusion).args
    concepts = run(ConceptAblationConcept, surrounding="shark")[0]
    shared = {"model": emoji, "clip": clip}
    small = {"concepts": concepts, "images": 2, "preserve": 2, "steps": 2, "width": 64, "height": 64, **shared}
    build, train = dataset.ConceptAblationBuildDataset, ablate.ConceptAblationAblate

    plain, away = (
        float(run(ConceptAblationInstant, concepts=concepts, negative_guidance=eta, **shared)[2].norm())
        for eta in (0.0, 0.5)
    )
    assert plain > 0 and away == pytest.approx(1.5 * plain, rel=0.01)

    with pytest.raises(AblationError, match="set it in Ablate Concept"):
        run(build, preset="balanced", negative_guidance=0.5, **small)
    drawn = run(build, preset="balanced", **small)[0]
    rows = run(build, preset="fast", negative_guidance=0.6, auto_preserve=1, **small)[0]
    assert rows.settings.negative_guidance == 0.6
    for data, preset, entered, part in (
        (drawn, "balanced", 0.7, "training"),
        (rows, "fast", -1.0, "harvest"),
        (rows, "fast", 0.6, "closed_form"),
    ):
        trained = {"dataset": data, "steps": 2, "batch": 2, **shared}
        delta = run(train, preset=preset, negative_guidance=entered, **trained)[2]
        settings = json.loads(delta.metadata["concept_ablation.settings"])
        assert settings[part]["negative_guidance"] == (0.7 if data is drawn else 0.6)
