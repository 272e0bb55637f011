"""The nodes of a memorized image, collected by `test_nodes.py` only: they need ComfyUI's modules on the path."""

from __future__ import annotations

import pytest
import torch

from concept_ablation.core.ablation import Task
from concept_ablation.core.concept import Concept
from concept_ablation.core.copies import CopyDetector
from concept_ablation.core.errors import AblationError
from concept_ablation.nodes import anchors, instruments
from concept_ablation.nodes.emoji import ConceptAblationLoadEmojiDiffusion
from concept_ablation.tests.nodes_inside_comfyui import FISH, folders, run, sent  # noqa: F401 - two are fixtures


def test_each_memorized_concept_has_its_own_original():
    tasks = (FISH, *(Task(Concept(name, "a caption", "memorized")) for name in ("one", "two")))
    images = torch.stack([torch.zeros(2, 2, 3), torch.ones(2, 2, 3)])
    found = instruments.originals_of(tasks, images)
    assert {name: int(image.max()) for name, image in found.items()} == {"one": 0, "two": 255}
    assert instruments.originals_of(tasks, None) == {}
    with pytest.raises(AblationError, match="one image for each"):
        instruments.originals_of(tasks, images[:1])
    for path in ("../x.pt", "/etc/x.pt", "C:\\x.pt", "~/x.pt"):
        with pytest.raises(AblationError, match="models folder"):
            instruments.load(tasks, None, path)


def test_anchors_are_found_by_the_copies_that_they_give(sent, monkeypatch):  # noqa: F811
    """The detector takes what the caption draws first for the image, and nothing else for a copy."""
    emoji, clip, vae = run(ConceptAblationLoadEmojiDiffusion).args
    monkeypatch.setattr(CopyDetector, "load", lambda *_: CopyDetector("in turn", in_turn()))
    texts = "a parade\na quiet street"
    found, said = run(
        anchors.ConceptAblationFindAnchors,
        model=emoji,
        clip=clip,
        vae=vae,
        original=torch.zeros(1, 64, 64, 3),
        caption="Madame Zephyrine's lost parade",
        paraphrases=texts,
        images_each=1,
        steps=1,
        width=64,
        height=64,
    ).args
    (task,) = found
    assert task.concept.kind == "memorized" and task.concept.target_prompts == ("a parade",)
    assert task.concept.anchor_prompts == ("a quiet street",)
    assert said.splitlines()[0].startswith("100% removed: Madame")


def in_turn():
    """Embeddings of the original, the caption's picture and the first paraphrase's are alike; the next one's is not."""
    calls = iter([1.0, 1.0, 1.0, 0.0])
    return lambda images: torch.tensor([[value := next(calls), 1 - value]]).expand(len(images), 2)
