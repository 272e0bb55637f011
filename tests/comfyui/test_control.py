"""What a user does to a running graph: queues it again, cancels it, gives it wrong input. The model stays as it was."""

from __future__ import annotations

import json

import pytest

from concept_ablation.tests.comfyui.client import Run
from concept_ablation.tests.comfyui.graph import Graph, ablation, sample

LOADER, DATASET, ABLATE = (f"ConceptAblation{name}" for name in ("LoadEmojiDiffusion", "BuildDataset", "Ablate"))
UNTOUCHED = {"hooks": 0, "gradients": 0, "parametrized": 0, "patches": 0}


def weights(client, loader: str = LOADER, **inputs) -> dict[str, object]:
    """What the server finds on the shared networks of a loader that is still cached."""
    graph = Graph()
    model = graph.add(loader, **inputs)
    probe = graph.add("TestWeights", model=model[0], clip=model[1])
    return json.loads(client.run(graph).text(probe.id))


@pytest.fixture(scope="module")
def pristine(client):
    found = weights(client)
    assert {name: found[name] for name in UNTOUCHED} == UNTOUCHED
    return found


def trained(**inputs):
    """The small ablation with an output: the loss plot."""
    made = ablation(**inputs)
    made.graph.add("PreviewImage", images=made.ablate[3])
    return made


def test_queueing_again_runs_nothing_and_a_new_strength_trains_nothing(client):
    def queue(strength: float) -> tuple[Run, Graph]:
        made = ablation()
        applied = made.graph.add(
            "ConceptAblationApplyDelta", **made.inputs, delta=made.ablate[2], strength_model=strength
        )
        drawn = sample(made.graph, applied[0], applied[1], "a photo of a tropical fish", steps=2)
        made.graph.add("PreviewImage", images=made.graph.add("VAEDecode", samples=drawn, vae=made.loader[2]))
        run = client.run(made.graph)
        assert run.status == "success", run.message
        return run, made.graph

    first, graph = queue(1.0)
    assert {DATASET, ABLATE} <= graph.types(first.executed)
    again, _ = queue(1.0)
    assert again.executed == []
    assert set(again.cached) == set(graph.nodes)
    weaker, _ = queue(0.5)
    assert graph.types(weaker.executed) == {
        "ConceptAblationApplyDelta",
        "CLIPTextEncode",
        "KSampler",
        "VAEDecode",
        "PreviewImage",
    }


@pytest.mark.parametrize("where", [DATASET, ABLATE])
def test_cancel_stops_within_a_step_and_leaves_the_model_clean(client, pristine, where):
    sizes = {"dataset": {"images": 4, "steps": 8, "seed": 5}, "ablate": {"steps": 10, "seed": 5}}
    made = trained(**sizes)
    node = next(name for name, node in made.graph.nodes.items() if node["class_type"] == where)
    pressed: list[float] = []

    def cancel(kind: str, data: dict) -> None:
        if kind == "progress" and data["node"] == node and data["value"] >= 2 and not pressed:
            pressed.append(data["value"])
            client.interrupt()

    run = client.run(made.graph, cancel)
    assert run.status == "interrupted"
    last = max(value for name, value, _ in run.bars if name == node)
    assert pressed[0] <= last <= pressed[0] + 2
    assert weights(client) == pristine
    assert client.run(trained(**sizes).graph).status == "success"
    assert weights(client) == pristine


def test_a_training_that_diverges_says_so_and_leaves_the_model_clean(client, pristine):
    run = client.run(trained(ablate={"learning_rate": 1.0, "steps": 60, "subset": "full"}).graph)
    assert run.status == "error"
    assert run.error["node_type"] == ABLATE
    assert run.error["exception_type"].endswith(".Diverged")
    assert "learning rate" in run.message
    assert weights(client) == pristine


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"concept": {"target": "  "}}, "target"),
        ({"concept": {"target": "fish", "anchor": "fish"}}, "fish"),
        ({"concept": {"anchor": ""}}, "anchor"),
        ({"concept": {"surrounding": "cat, tropical fish"}}, "tropical fish"),
        ({"concept": {"prompts": "a cat in a bowl"}}, "anchor"),
        ({"ablate": {"objective": "reverse-kl"}}, "target"),
    ],
)
def test_wrong_input_is_one_clear_sentence(client, inputs, words):
    run = client.run(trained(**inputs).graph)
    assert run.status == "error"
    assert run.error["exception_type"].endswith("AblationError"), run.error
    assert words in run.message
    assert "\n" not in run.message and run.message.endswith(".")


def test_a_dataset_of_another_model_is_refused(client, sd15):
    made = ablation()
    other = made.graph.add("CheckpointLoaderSimple", ckpt_name=sd15)
    made.graph.nodes[made.ablate.id]["inputs"] |= {"model": other[0], "clip": other[1]}
    made.graph.add("PreviewImage", images=made.ablate[3])
    run = client.run(made.graph)
    assert (run.status, run.error["node_type"]) == ("error", ABLATE)
    assert "drawn by another model" in run.message
