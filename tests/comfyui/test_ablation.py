"""The whole way through the server, on the embedded model: the target goes, its neighbours stay, and the saved delta is
one that ComfyUI's own Load LoRA loads and that the diffusers host would have made.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from concept_ablation.core import dataset as datasets
from concept_ablation.core import delta_file
from concept_ablation.core.concept import Concept, evaluation_prompts, judge_texts
from concept_ablation.core.delta import Delta
from concept_ablation.core.metrics import Judge, clip_accuracy
from concept_ablation.core.presets import recipe
from concept_ablation.core.trainer import train
from concept_ablation.tests.comfyui.client import Client, Run
from concept_ablation.tests.comfyui.graph import Ablation, Graph, Link, Node, ablation, sample

CONCEPT = Concept("sunflower", "flower")
NEIGHBOURS = ("shark", "cat")
PROMPTS, IMAGES = 3, 4


@dataclass
class Made:
    """The graph of the module, and what it gave."""

    ablation: Ablation
    run: Run
    evaluate: Node
    save: Node
    plot: Node

    @property
    def saved(self) -> str:
        """The delta's file in the loras folder."""
        return self.run.text(self.save.id).split(",")[0]


def build() -> Made:
    """The same nodes as in `tests/test_behaviour.py`, which has the sizes from the measurements."""
    made = ablation(
        concept={"target": CONCEPT.target, "anchor": CONCEPT.anchor, "surrounding": ", ".join(NEIGHBOURS)},
        dataset={"images": 32, "preserve": 48, "steps": 10},
        ablate={"steps": 50, "batch": 0},
    )
    graph, both = made.graph, made.inputs
    save = graph.add("ConceptAblationSaveDelta", delta=made.ablate[2], name="flower")
    evaluate = graph.add(
        "ConceptAblationEvaluate",
        **both,
        vae=made.loader[2],
        concepts=made.concept,
        delta=made.ablate[2],
        prompts=PROMPTS,
        images_per_prompt=IMAGES,
        steps=12,
    )
    plot = graph.add("PreviewImage", images=made.ablate[3])
    return Made(made, Run(""), evaluate, save, plot)


@pytest.fixture(scope="module")
def made(client):
    found = build()
    found.run = client.run(found.ablation.graph, timeout=1200)
    assert found.run.status == "success", found.run.error
    return found


def test_the_evaluation_finds_the_target_gone_and_the_neighbours_kept(made, server):
    report = next((server.base / "output" / "concept_ablation").glob("evaluation_*/report.json"))
    rows = {row["name"]: row for row in json.loads(report.read_text(encoding="utf-8"))["concepts"]}
    assert rows.keys() == {CONCEPT.target, CONCEPT.anchor, *NEIGHBOURS}
    before, after = rows[CONCEPT.target]["before"], rows[CONCEPT.target]["after"]
    assert before["clip_accuracy"] >= 0.5
    assert after["clip_accuracy"] <= 0.25
    assert after["clip_score"] < before["clip_score"] - 0.03
    for name in (CONCEPT.anchor, *NEIGHBOURS):
        assert rows[name]["before"]["clip_accuracy"] >= 0.75
        assert rows[name]["after"]["clip_accuracy"] >= rows[name]["before"]["clip_accuracy"] - 0.1


def test_progress_moves_and_shows_what_is_drawn(made, client):
    run, ids = made.run, made.ablation
    for node in (ids.dataset.id, ids.ablate.id, made.evaluate.id):
        values = [value / maximum for name, value, maximum in run.bars if name == node]
        assert values == sorted(values)
        assert values[-1] == 1
        # the others have no chart that an event would be for
        steps = [event["step"] for event in run.events if event["node"] == node]
        assert len(steps) > 2 if node == ids.ablate.id else not steps
    losses = run.losses(ids.ablate.id)
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(preview[:3] == b"\xff\xd8\xff" for preview in run.previews)
    assert len(run.previews) > 5
    assert client.pictures(run, made.plot.id).std() > 5


def drawn_by_stock_nodes(client: Client, graph: Graph, model: Link, clip: Link, vae: Link, texts: list[str]):
    """Pictures of prompts by KSampler and VAEDecode, uint8 [N, H, W, 3]."""
    shown = []
    for seed, text in enumerate(texts):
        drawn = sample(graph, model, clip, text, images=IMAGES, seed=seed, steps=12)
        shown.append(graph.add("PreviewImage", images=graph.add("VAEDecode", samples=drawn, vae=vae)))
    return shown


def test_pictures_of_stock_nodes_lose_the_target_and_keep_the_neighbour(made, client, emoji):
    graph, loader, ablate = made.ablation.graph, made.ablation.loader, made.ablation.ablate
    judge = Judge.load()
    extended, sheets = Graph(dict(graph.nodes)), {}
    for name in (CONCEPT.target, "cat"):
        texts = list(evaluation_prompts(name, CONCEPT, emoji.prompt_source, PROMPTS))
        for when, (model, clip) in {"before": loader_outputs(loader), "after": loader_outputs(ablate)}.items():
            sheets[name, when] = drawn_by_stock_nodes(client, extended, model, clip, loader[2], texts)
    run = client.run(extended)
    assert run.status == "success", run.message
    assert not {"ConceptAblationBuildDataset", "ConceptAblationAblate"} & extended.types(run.executed)
    anchor = judge.embed_concept(judge_texts(CONCEPT.anchor, CONCEPT))
    accuracy = {}
    for (name, when), nodes in sheets.items():
        pictures = [client.picture(shown) for node in nodes for shown in run.outputs[node.id]["images"]]
        embedded = judge.embed_images(torch.tensor([picture.tolist() for picture in pictures]).byte().numpy())
        accuracy[name, when] = clip_accuracy(embedded, judge.embed_concept(judge_texts(name, CONCEPT)), anchor)
    assert accuracy[CONCEPT.target, "before"] >= 0.5
    assert accuracy[CONCEPT.target, "after"] <= 0.25
    assert accuracy["cat", "after"] >= accuracy["cat", "before"] - 0.1 >= 0.65


def loader_outputs(node: Node) -> tuple[Link, Link]:
    """MODEL and CLIP of a node whose first two outputs they are."""
    return node[0], node[1]


def test_stock_load_lora_gives_the_same_latents_as_the_patched_model(made, client, server):
    graph = Graph(dict(made.ablation.graph.nodes))
    loader, inputs = made.ablation.loader, made.ablation.inputs
    edited = {
        "patched": loader_outputs(made.ablation.ablate),
        "stock": loader_outputs(
            graph.add("LoraLoader", **inputs, lora_name=made.saved, strength_model=1.0, strength_clip=1.0)
        ),
        "ours": loader_outputs(graph.add("ConceptAblationLoadDelta", **inputs, file=made.saved)),
        "before": loader_outputs(loader),
    }
    drawn = {name: sample(graph, *pair, "a photo of a sunflower", seed=3) for name, pair in edited.items()}
    probes = {name: graph.add("TestLatents", a=drawn["patched"], b=drawn[name]) for name in ("stock", "ours", "before")}
    run = client.run(graph)
    assert run.status == "success", run.message
    found = {name: json.loads(run.text(probe.id)) for name, probe in probes.items()}
    # the file has fp16 and so has the delta in the graph: the same numbers go through the same arithmetic
    assert found["stock"]["difference"] <= 1e-3 * found["stock"]["largest"]
    assert found["ours"]["difference"] <= 1e-3 * found["ours"]["largest"]
    assert found["before"]["difference"] > 0.05 * found["before"]["largest"]
    assert "lora key not loaded" not in server.log


def test_the_diffusers_host_makes_the_same_delta_from_the_same_dataset(client, server, emoji):
    made = ablation(dataset={"keep_on_disk": True, "seed": 11}, ablate={"steps": 6, "seed": 11})
    save = made.graph.add("ConceptAblationSaveDelta", delta=made.ablate[2], name="parity")
    folders = server.base / "output" / "concept_ablation" / "datasets"
    others = set(folders.glob("*"))
    run = client.run(made.graph)
    assert run.status == "success", run.message
    found = delta_file.load(server.base / "models" / "loras" / run.text(save.id).split(",")[0])
    (folder,) = set(folders.glob("*")) - others
    settings = recipe("balanced", emoji, seed=11, training={"steps": 6, "batch": 4}).training
    other = train(emoji, datasets.load(folder), settings).delta.rounded(torch.float16)
    assert found.layers.keys() == other.layers.keys()
    ours, theirs = (flat(delta, found.layers) for delta in (found, other))
    # both compute in bf16 where the CPU has it, and Adam's first steps go by the sign of a gradient, however small:
    # tests/host_inside_comfyui.py compares the hosts in fp32, within rounding
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.8


def flat(delta: Delta, names: Iterable[str]) -> Tensor:
    """All numbers of a delta's weights."""
    return torch.cat([delta.layers[name].weight.flatten() for name in names])
