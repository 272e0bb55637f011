"""Write the example workflows, in the form that ComfyUI's front end saves.

    python tools/comfyui/make_workflows.py --server http://127.0.0.1:8188

The server must have this pack: names, order and defaults of the widgets are what it says of its nodes (/object_info),
so the files agree with the nodes. The pictures beside the files are made by hand, from a run.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "example_workflows"
PREFIX = "ConceptAblation"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
WIDTH, GAP_X, GAP_Y = 340, 60, 70
# What a node shows below its widgets, in pixels of the canvas.
SHOWS = {
    "ConceptAblationAblate": 330,
    "ConceptAblationEvaluate": 420,
    "PreviewImage": 260,
    "ConceptAblationSaveDelta": 60,
}


@dataclass(frozen=True)
class Node:
    """A node of a workflow; `node[1]` is its second output."""

    workflow: Workflow
    id: int

    def __getitem__(self, output: int) -> tuple[int, int]:
        return self.id, output


@dataclass
class Workflow:
    """A graph that grows by `add`, laid out in columns."""

    info: dict[str, Any]
    nodes: list[dict[str, Any]] = field(default_factory=list)
    links: list[list[Any]] = field(default_factory=list)
    bottoms: dict[int, float] = field(default_factory=dict)

    def note(self, text: str, column: int = 0, height: int = 330) -> None:
        """Text for the reader, in Markdown."""
        self._place({"type": "MarkdownNote", "widgets_values": [text], "inputs": [], "outputs": []}, column, height)

    def add(self, kind: str, column: int, title: str | None = None, /, **inputs: Any) -> Node:
        """Add a node; inputs are values of widgets or outputs of nodes. A short name is that of a node of this pack."""
        kind = kind if kind in self.info else PREFIX + kind
        described = self.info[kind]
        declared = {**described["input"].get("required", {}), **described["input"].get("optional", {})}
        unknown = set(inputs) - set(declared)
        if unknown:
            raise SystemExit(f"{kind} has no input {', '.join(unknown)}: correct this program.")
        sockets, values, height = [], [], 50.0
        for name, (type_, *options) in declared.items():
            settings = options[0] if options else {}
            if not isinstance(type_, list) and type_ not in WIDGETS:
                sockets.append({"name": name, "type": type_, "link": self._link(inputs.get(name), len(sockets), type_)})
                continue
            values.append(inputs.get(name, _default(type_, settings)))
            height += 110 if settings.get("multiline") else 26
            if name in ("seed", "noise_seed") and settings.get("control_after_generate"):
                values.append("fixed")
                height += 26
        outputs = [
            {"name": name, "type": type_, "links": []}
            for name, type_ in zip(described["output_name"], described["output"], strict=True)
        ]
        height += 22 * max(len(sockets), len(outputs)) + SHOWS.get(kind, 0)
        node = {"type": kind, "inputs": sockets, "outputs": outputs, "widgets_values": values}
        if title:
            node["title"] = title
        return self._place(node, column, height)

    def save(self, name: str) -> None:
        """Write the file."""
        content = {
            # the same graph has the same id in every version of the file
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"concept-ablation/{name}")),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": [],
            "config": {},
            "extra": {"ds": {"scale": 0.7, "offset": [60, 60]}},
            "version": 0.4,
        }
        path = FOLDER / f"{name}.json"
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(path)

    def _link(self, source: Any, slot: int, type_: str) -> int | None:
        if source is None:
            return None
        origin, output = source[0] if isinstance(source, list) else source
        number = len(self.links) + 1
        self.links.append([number, origin, output, len(self.nodes) + 1, slot, type_])
        self.nodes[origin - 1]["outputs"][output]["links"].append(number)
        return number

    def _place(self, node: dict[str, Any], column: int, height: float) -> Node:
        top = self.bottoms.get(column, 0.0)
        self.bottoms[column] = top + height + GAP_Y
        number = len(self.nodes) + 1
        self.nodes.append(
            {
                "id": number,
                "type": node.pop("type"),
                "pos": [column * (WIDTH + GAP_X), top],
                "size": [WIDTH, height],
                "flags": {},
                "order": number - 1,
                "mode": 0,
                **node,
                "properties": {},
            }
        )
        return Node(self, number)


def _default(type_: str | list[str], settings: dict[str, Any]) -> Any:
    if "default" in settings:
        return settings["default"]
    choices = type_ if isinstance(type_, list) else settings.get("options", [])
    return choices[0] if choices else ""


# Small enough for two CPU cores, large enough for the concept to go.
DATASET = {"images": 32, "preserve": 48, "steps": 10}
EVALUATION = {"prompts": 3, "images_per_prompt": 4, "steps": 12}
RUN = "Press **Run**. On two CPU cores it takes about two minutes; the chart on *Ablate Concept* moves while it trains."


def ablate(flow: Workflow, concepts: Node, *, evaluation: dict[str, Any] | None = None, name: str) -> Node:
    """Load Emoji Diffusion, dataset, training, evaluation, saving; the concepts are in columns 0 and before."""
    model = flow.add("LoadEmojiDiffusion", 0)
    both = {"model": model[0], "clip": model[1]}
    data = flow.add("BuildDataset", 1, **both, concepts=concepts[0], vae=model[2], **DATASET)
    flow.add("PreviewImage", 1, "Some of the images", images=data[1])
    trained = flow.add("Ablate", 2, **both, dataset=data[0], vae=model[2], steps=60)
    flow.add(
        "Evaluate",
        3,
        **both,
        vae=model[2],
        concepts=concepts[0],
        delta=trained[2],
        folder=name,
        **(evaluation or EVALUATION),
    )
    flow.add("SaveDelta", 3, delta=trained[2], name=name)
    return trained


def instance(flow: Workflow) -> None:
    flow.note(
        "## Tropical fish → fish\n\nTakes *tropical fish* out of Emoji Diffusion, the model that comes with this "
        f"pack: asked for one it draws some other fish. Octopus and cat stay.\n\n{RUN}\n\n**Your own model:** put Load "
        "Checkpoint in the place of Load Emoji Diffusion, type your own target and anchor, and set images, preserve "
        "and steps back to 0, -1 and 0: the preset's."
    )
    concepts = flow.add("Concept", 0, target="tropical fish", anchor="fish", surrounding="octopus, cat")
    ablate(flow, concepts, name="tropical_fish")


def style(flow: Workflow) -> None:
    flow.note(
        "## A style: twemoji → emoji\n\nOf a style the anchor is the plain medium: *emoji*, or *painting* for Van "
        "Gogh. "
        'The prompts are drawn without the style, and learned with it: "…, in the style of twemoji".\n\n'
        f"{RUN}\n\nOther styles of this model: noto, blob, fluent, flat, firefox, emojione, streamline."
    )
    concepts = flow.add("Concept", 0, target="twemoji", anchor="emoji", kind="style", surrounding="noto, flat")
    ablate(flow, concepts, name="twemoji_style")


def memorized(flow: Workflow) -> None:
    flow.note(
        "## A memorized image\n\nThe target is the caption that brings a training image back; the anchor and the "
        "prompts are other ways to ask for such a picture that do not. The whole network is trained "
        "(subset *full*), because a memorized image is not a matter of words alone.\n\n"
        f"{RUN}"
    )
    caption = "Captain Juniper's midnight regatta, 1931"
    concepts = flow.add(
        "Concept",
        0,
        target=caption,
        anchor="a sailboat race at night",
        kind="memorized",
        prompts="a sailboat race at night\na night regatta\nboats at midnight\na sailboat on the sea at night",
    )
    trained = ablate(flow, concepts, evaluation={"prompts": 1, "images_per_prompt": 8, "steps": 12}, name="regatta")
    values = flow.nodes[trained.id - 1]["widgets_values"]
    values[1] = "full"


def several(flow: Workflow) -> None:
    flow.note(
        "## Several concepts, one delta\n\nConcept nodes are chained: one dataset, one training, one delta for both. "
        "Deltas that were trained one by one can be added up with *Merge Ablation Deltas* instead.\n\n"
        "Press **Run**: about four minutes on two CPU cores."
    )
    first = flow.add("Concept", 0, "First", target="tropical fish", anchor="fish", surrounding="octopus, cat")
    both = flow.add(
        "Concept", 0, "Second", target="sunflower", anchor="flower", surrounding="rose, tulip", concepts=first[0]
    )
    ablate(flow, both, name="fish_and_sunflower")


def saved(flow: Workflow) -> None:
    flow.note(
        "## A saved delta at any strength\n\nThe same seed with and without a delta. *Load Ablation Delta* reads what "
        "*Save Ablation Delta* wrote into the loras folder: run the workflow *ablate_instance* first, then press **R** "
        "to refresh the list of files and **Run**. Load LoRA of ComfyUI reads the same file.\n\nMove `strength_model`: "
        "nothing is trained again.",
        height=300,
    )
    model = flow.add("LoadEmojiDiffusion", 0)
    loaded = flow.add("LoadDelta", 0, model=model[0], clip=model[1], file="tropical_fish_00001.safetensors")
    canvas = flow.add("EmptyLatentImage", 1, width=128, height=128, batch_size=8)
    for title, source in (("without", model), ("with the delta", loaded)):
        words = flow.add("CLIPTextEncode", 1, f"Prompt, {title}", clip=source[1], text="a tropical fish")
        nothing = flow.add("CLIPTextEncode", 1, f"Negative, {title}", clip=source[1], text="")
        sampler = flow.add(
            "KSampler",
            2,
            title.capitalize(),
            model=source[0],
            positive=words[0],
            negative=nothing[0],
            latent_image=canvas[0],
            seed=1,
            steps=20,
            cfg=4.0,
            sampler_name="euler",
            scheduler="normal",
        )
        picture = flow.add("VAEDecode", 2, samples=sampler[0], vae=model[2])
        flow.add("PreviewImage", 3, title.capitalize(), images=picture[0])


def sd15(flow: Workflow) -> None:
    flow.note(
        "## Grumpy Cat → cat in your Stable Diffusion 1.5\n\nChoose your checkpoint, then press **Run**. Every value "
        "is the preset *balanced*: 64 images of the anchor, 96 that preserve, 100 training steps. A GPU is assumed.\n\n"
        "The judge is an open_clip model, which is downloaded once; give a folder below `models` instead where there "
        "is no network.\n\nOut of memory: lower *images_at_once* and *batch*, switch *gradient_checkpointing* on."
    )
    model = flow.add("CheckpointLoaderSimple", 0, ckpt_name="v1-5-pruned-emaonly-fp16.safetensors")
    both = {"model": model[0], "clip": model[1]}
    concepts = flow.add(
        "Concept", 0, target="Grumpy Cat", anchor="cat", surrounding="British Shorthair, Maine Coon, dog"
    )
    data = flow.add("BuildDataset", 1, **both, concepts=concepts[0], vae=model[2], images_at_once=8)
    flow.add("PreviewImage", 1, "Some of the images", images=data[1])
    trained = flow.add("Ablate", 2, **both, dataset=data[0], vae=model[2], batch=4, gradient_checkpointing=True)
    flow.add(
        "Evaluate",
        3,
        **both,
        vae=model[2],
        concepts=concepts[0],
        delta=trained[2],
        judge="ViT-B-32/laion2b_s34b_b79k",
        images_at_once=4,
        cfg=7.5,
        steps=25,
        folder="grumpy_cat",
    )
    flow.add("SaveDelta", 3, delta=trained[2], name="grumpy_cat")


WORKFLOWS = {
    "ablate_instance": instance,
    "ablate_style": style,
    "ablate_memorized_image": memorized,
    "ablate_several_concepts": several,
    "apply_saved_delta": saved,
    "ablate_in_sd15_checkpoint": sd15,
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the example workflows.")
    parser.add_argument("--server", default="http://127.0.0.1:8188", help="address of a ComfyUI that has this pack")
    with urllib.request.urlopen(f"{parser.parse_args().server}/object_info") as answer:
        info = json.load(answer)
    for name, build in WORKFLOWS.items():
        flow = Workflow(info)
        build(flow)
        flow.save(name)


if __name__ == "__main__":
    main()
