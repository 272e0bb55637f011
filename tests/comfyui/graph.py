"""Graphs in ComfyUI's API form, written as calls, and the ones that several tests queue."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Link = list[Any]


@dataclass(frozen=True)
class Node:
    """A node of a graph; `node[1]` is its second output, and the node itself stands for its first."""

    id: str

    def __getitem__(self, output: int) -> Link:
        return [self.id, output]


@dataclass
class Graph:
    """A graph that grows by `add`. The same calls in the same order make the same graph, ids included."""

    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, class_type: str, **inputs: Any) -> Node:
        """Add a node; inputs are values, nodes or outputs of nodes."""
        node = Node(str(len(self.nodes) + 1))
        linked = {name: value[0] if isinstance(value, Node) else value for name, value in inputs.items()}
        self.nodes[node.id] = {"class_type": class_type, "inputs": linked}
        return node

    def types(self, ids: list[str]) -> set[str]:
        """The types of some nodes."""
        return {self.nodes[node]["class_type"] for node in ids}


@dataclass
class Ablation:
    """A graph from a loader to a trained delta; `loader` has the outputs MODEL, CLIP, VAE."""

    graph: Graph
    loader: Node
    concept: Node
    dataset: Node
    ablate: Node

    @property
    def inputs(self) -> dict[str, Link]:
        """MODEL and CLIP before the edit, as inputs of a node."""
        return {"model": self.loader[0], "clip": self.loader[1]}


def ablation(
    loader: str = "ConceptAblationLoadEmojiDiffusion",
    loader_inputs: dict[str, Any] | None = None,
    concept: dict[str, Any] | None = None,
    dataset: dict[str, Any] | None = None,
    ablate: dict[str, Any] | None = None,
) -> Ablation:
    """Loader, Concept, Build Dataset, Ablate, small and in memory; the arguments are inputs of each."""
    graph = Graph()
    model = graph.add(loader, **(loader_inputs or {}))
    both = {"model": model[0], "clip": model[1]}
    what = graph.add("ConceptAblationConcept", **{"target": "tropical fish", "anchor": "fish", **(concept or {})})
    small = {"images": 8, "preserve": 0, "steps": 4, "keep_on_disk": False}
    data = graph.add("ConceptAblationBuildDataset", **both, concepts=what, **{**small, **(dataset or {})})
    trained = graph.add("ConceptAblationAblate", **both, dataset=data, **{"steps": 4, "batch": 4, **(ablate or {})})
    return Ablation(graph, model, what, data, trained)


def sample(graph: Graph, model: Link, clip: Link, prompt: str, **settings: Any) -> Node:
    """Stock nodes that draw latents of a prompt. `settings`: size, images and inputs of KSampler."""
    size, images = settings.pop("size", 128), settings.pop("images", 1)
    return graph.add(
        "KSampler",
        model=model,
        positive=graph.add("CLIPTextEncode", clip=clip, text=prompt),
        negative=graph.add("CLIPTextEncode", clip=clip, text=""),
        latent_image=graph.add("EmptyLatentImage", width=size, height=size, batch_size=images),
        **{"steps": 4, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", **settings},
    )
