"""A workflow as ComfyUI's front end saves it (version 0.4), built node by node and laid out from left to right.

What a node has (sockets, widgets, their order and defaults) comes from the server's /object_info; only its size on the
canvas is written here. Wrong names, types and values end the program.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

PREFIX = "ConceptAblation"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
CONTROL = "fixed"
"""What a seed does after a run: it stays, so that a graph that was run is not run again."""

# Canvas units. A node's title stands above its position; the rest is space that looks well.
TITLE, GROUP_TITLE, PAD, GAP_X, GAP_Y, GROUP_GAP = 30, 40, 20, 40, 30, 40
SIZES = {
    "ConceptAblationConcept": (340, 290),
    "ConceptAblationBuildDataset": (340, 740),
    "ConceptAblationAblate": (380, 660),
    "ConceptAblationEvaluate": (340, 940),
    "ConceptAblationSaveDelta": (640, 110),
    "ConceptAblationLoadDelta": (340, 146),
    "ConceptAblationToLora": (340, 130),
    "ConceptAblationLoadEmojiDiffusion": (340, 66),
    "CheckpointLoaderSimple": (340, 98),
    "CLIPTextEncode": (340, 100),
    "EmptyLatentImage": (340, 106),
    "KSampler": (300, 262),
    "VAEDecode": (300, 46),
    "SaveImage": (320, 372),
}
"""Width and height of each type of node; a node that shows pictures has room for them."""


@dataclass(frozen=True)
class Node:
    """A node of a workflow; `node["model"]` is its output of that name."""

    id: int
    outputs: dict[str, tuple[int, str]]
    """By name in small letters: place and type."""

    def __getitem__(self, output: str) -> tuple[Node, str]:
        return self, output


@dataclass
class Group:
    """A titled box of nodes, stacked in columns."""

    workflow: Workflow
    title: str
    left: float
    top: float
    columns: list[list[float]] = field(default_factory=list)
    """Left edge, right edge and bottom of each column."""

    @property
    def right(self) -> float:
        """Where the box ends."""
        return self.columns[-1][1] + PAD

    @property
    def bottom(self) -> float:
        """Where the box ends."""
        return max(bottom for _, _, bottom in self.columns) + PAD

    def column(self) -> None:
        """What is added from now on stands in a new column."""
        left = self.columns[-1][1] + GAP_X if self.columns else self.left + PAD
        self.columns.append([left, left, self.top + GROUP_TITLE])

    def add(self, kind: str, title: str | None = None, size: tuple[int, int] | None = None, /, **inputs: Any) -> Node:
        """Add a node below the last one of this column.

        Args:
            kind: its type; a short name is that of a node of this pack.
            title: in place of the node's own.
            size: in place of what `SIZES` says.
            inputs: values of widgets, or outputs of nodes; a widget that is not given has its default.
        """
        if not self.columns:
            self.column()
        column = self.columns[-1]
        kind = kind if kind in self.workflow.info else PREFIX + kind
        width, height = size or SIZES[kind]
        # 10 below the box's title, or the usual gap below a node
        top = column[2] + TITLE + (GAP_Y if column[1] > column[0] else 10)
        node = self.workflow.add(kind, (column[0], top), (width, height), title, inputs)
        column[1], column[2] = max(column[1], column[0] + width), top + height
        return node


@dataclass
class Workflow:
    """A graph that grows."""

    info: dict[str, Any]
    """The server's /object_info."""
    version: str
    """Of this pack."""
    server: str
    """ComfyUI's version."""
    nodes: list[dict[str, Any]] = field(default_factory=list)
    links: list[list[Any]] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    below_note: float = 0

    def note(self, text: str, size: tuple[int, int]) -> None:
        """Text for the reader, in Markdown, at the upper left."""
        self._append("MarkdownNote", (0, TITLE), size, "Read me", [], [], [text])
        self.nodes[-1] |= {"color": "#432", "bgcolor": "#653"}
        self.below_note = TITLE + size[1] + GROUP_GAP

    def group(self, title: str, below: Group | None = None) -> Group:
        """A new box: the first below the note, another one at the right of all that there is, or below `below`."""
        if below:
            left, top = below.left, below.bottom + GROUP_GAP
        elif self.groups:
            left, top = max(group.right for group in self.groups) + GROUP_GAP, 0
        else:
            left, top = 0, self.below_note
        self.groups.append(Group(self, title, left, top))
        return self.groups[-1]

    def add(
        self,
        kind: str,
        position: tuple[float, float],
        size: tuple[int, int],
        title: str | None,
        inputs: dict[str, Any],
    ) -> Node:
        """Add a node at a position; see `Group.add`."""
        told = self.info[kind]
        declared = {
            name: (told["input"][part][name], part)
            for part in ("required", "optional")
            for name in told["input_order"].get(part, [])
        }
        if unknown := set(inputs) - set(declared):
            raise SystemExit(f"{kind} has no input {', '.join(unknown)}: correct this program.")
        sockets, widgets, values = [], [], []
        for name, ((type_, *options), part) in declared.items():
            settings = options[0] if options else {}
            kind_of = "COMBO" if isinstance(type_, list) else type_
            slot = {"name": name, "type": kind_of, **({"shape": 7} if part == "optional" else {})}
            if kind_of not in WIDGETS:
                source = inputs.get(name)
                if source is None and part == "required":
                    raise SystemExit(f"{kind} needs {name}: correct this program.")
                sockets.append({**slot, "link": source and self._link(source, len(sockets), kind_of)})
                continue
            choices = type_ if isinstance(type_, list) else settings.get("options")
            value = inputs.get(name, settings.get("default", choices[0] if choices else ""))
            _check(f"{kind}.{name}", value, settings)
            widgets.append({**slot, "widget": {"name": name}, "link": None})
            values.append(value)
            if settings.get("control_after_generate"):
                values.append(CONTROL)
        outputs = [
            {"name": name, "type": type_, "links": []}
            for name, type_ in zip(told["output_name"], told["output"], strict=True)
        ]
        self._append(kind, position, size, title, [*sockets, *widgets], outputs, values)
        # the front end offers to install a pack that a workflow needs, by the pack's name in the registry
        pack = ("concept-ablation", self.version) if kind.startswith(PREFIX) else ("comfy-core", self.server)
        self.nodes[-1]["properties"] |= dict(zip(("cnr_id", "ver"), pack, strict=True))
        return Node(
            len(self.nodes), {slot["name"].lower(): (place, slot["type"]) for place, slot in enumerate(outputs)}
        )

    def text(self, name: str) -> str:
        """The content of the workflow's file."""
        content = {
            # the same for every version of the file
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"concept-ablation/{name}")),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": [
                {
                    "id": number,
                    "title": group.title,
                    "bounding": [group.left, group.top, group.right - group.left, group.bottom - group.top],
                    "color": "#3f789e",
                    "font_size": 24,
                    "flags": {},
                }
                for number, group in enumerate(self.groups, 1)
            ],
            "config": {},
            "extra": {"ds": {"scale": 0.6, "offset": [60, 120]}},
            "version": 0.4,
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    def _append(
        self,
        kind: str,
        position: tuple[float, float],
        size: tuple[int, int],
        title: str | None,
        inputs: Sequence[dict[str, Any]],
        outputs: Sequence[dict[str, Any]],
        values: Sequence[Any],
    ) -> None:
        node = {
            "id": len(self.nodes) + 1,
            "type": kind,
            "pos": list(position),
            "size": list(size),
            "flags": {},
            "order": len(self.nodes),
            "mode": 0,
            "inputs": list(inputs),
            "outputs": list(outputs),
            **({"title": title} if title else {}),
            "properties": {"Node name for S&R": kind},
            "widgets_values": list(values),
        }
        self.nodes.append(node)

    def _link(self, source: tuple[Node, str], slot: int, type_: str) -> int:
        node, output = source
        place, given = node.outputs[output]
        if given != type_:
            raise SystemExit(f"A link leads from {given} to {type_}: correct this program.")
        number = len(self.links) + 1
        self.links.append([number, node.id, place, len(self.nodes) + 1, slot, type_])
        self.nodes[node.id - 1]["outputs"][place]["links"].append(number)
        return number


def _check(name: str, value: Any, settings: dict[str, Any]) -> None:
    """Choices are left to the server: those of files are of that machine."""
    if isinstance(value, (int, float)) and not settings.get("min", value) <= value <= settings.get("max", value):
        raise SystemExit(f"{name} is out of bounds: correct this program.")
