"""The example workflows as files: whole, tidy, and of nodes that exist. `tests/comfyui` runs them."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "example_workflows"
NAMES = {
    "ablate_instance",
    "ablate_style",
    "ablate_memorized_image",
    "ablate_several_concepts",
    "ablate_in_sd15_checkpoint",
    "apply_saved_delta",
}
# Every node of this pack has a help page of its name, which is what can be known without ComfyUI.
OURS = {path.stem for path in (ROOT / "web" / "comfyui" / "docs").glob("*.md")}
STOCK = {
    "CheckpointLoaderSimple",
    "CLIPTextEncode",
    "EmptyLatentImage",
    "KSampler",
    "MarkdownNote",
    "PreviewImage",
    "SaveImage",
    "VAEDecode",
}
TITLE = 30
"""Height of a node's title, which stands above its position."""

Box = tuple[float, float, float, float]


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def box(node: dict[str, Any]) -> Box:
    """Left, top, right and bottom, with the title."""
    (left, top), (width, height) = node["pos"], node["size"]
    return left, top - TITLE, left + width, top + height


@pytest.fixture(params=sorted(NAMES))
def name(request) -> str:
    return request.param


@pytest.fixture
def workflow(name) -> dict[str, Any]:
    return read(name)


def test_every_file_is_tested_and_has_a_picture():
    assert {path.stem for path in FOLDER.glob("*.json")} == {path.stem for path in FOLDER.glob("*.jpg")} == NAMES


def test_the_nodes_of_the_pack_are_shown_but_for_some():
    used = {node["type"] for name in NAMES for node in read(name)["nodes"]}
    left_out = ("MergeDeltas", "ApplyDelta", "Instant", "ScanForLeaks", "FindAnchors")
    assert used & OURS == OURS - {f"ConceptAblation{name}" for name in left_out}


def test_the_nodes_exist_and_have_ids_of_their_own(workflow):
    nodes = workflow["nodes"]
    assert {node["type"] for node in nodes} <= OURS | STOCK
    ids = [node["id"] for node in nodes]
    assert len(set(ids)) == len(ids) and max(ids) == workflow["last_node_id"]
    assert workflow["version"] == 0.4
    # nothing is muted or bypassed
    assert {node["mode"] for node in nodes} == {0}


def test_links_are_known_at_both_ends_and_of_one_type(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    incoming = {(node["id"], slot): at["link"] for node in nodes.values() for slot, at in enumerate(node["inputs"])}
    outgoing = {
        (node["id"], slot): at["links"] or [] for node in nodes.values() for slot, at in enumerate(node["outputs"])
    }
    links = workflow["links"]
    for number, origin, output, target, slot, type_ in links:
        assert number in outgoing[origin, output] and incoming[target, slot] == number
        assert nodes[origin]["outputs"][output]["type"] == nodes[target]["inputs"][slot]["type"] == type_
        # so there is no circle either
        assert nodes[origin]["order"] < nodes[target]["order"]
    numbers = sorted(number for number, *_ in links)
    assert numbers == sorted(number for each in outgoing.values() for number in each)
    assert numbers == sorted(number for number in incoming.values() if number is not None)
    assert max(numbers) == workflow["last_link_id"]


def test_what_a_node_needs_is_connected(workflow):
    for node in workflow["nodes"]:
        for slot in node["inputs"]:
            needed = "widget" not in slot and slot.get("shape") != 7
            assert slot["link"] is not None or not needed, (node["type"], slot["name"])


def test_seeds_stay_so_that_nothing_is_drawn_twice(workflow):
    for node in workflow["nodes"]:
        if node["type"] == "KSampler":
            assert node["widgets_values"][1] == "fixed"


def test_nothing_is_of_the_machine_that_made_it(name):
    text = (FOLDER / f"{name}.json").read_text(encoding="utf-8")
    values = [value for node in json.loads(text)["nodes"] for value in node["widgets_values"]]
    assert not [value for value in values if isinstance(value, str) and re.match(r"[/\\~]|[A-Za-z]:[/\\]", value)]
    assert not re.search(r"127\.0\.0\.1|localhost|\b(home|Users|tmp|root|work)[/\\]", text)


def test_nodes_lie_apart_in_titled_groups_from_left_to_right(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for one, other in combinations(map(box, nodes.values()), 2):
        assert one[0] >= other[2] or other[0] >= one[2] or one[1] >= other[3] or other[1] >= one[3]
    groups = []
    for group in workflow["groups"]:
        left, top, width, height = group["bounding"]
        groups.append((left, top, left + width, top + height))
        assert group["title"]
    for node in nodes.values():
        left, top, right, bottom = box(node)
        around = [g for g in groups if g[0] <= left and g[1] < top and right <= g[2] and bottom <= g[3]]
        assert len(around) == (0 if node["type"] == "MarkdownNote" else 1), node["type"]
    for _, origin, _, target, _, _ in workflow["links"]:
        assert nodes[origin]["pos"][0] <= nodes[target]["pos"][0]


def test_a_note_says_what_to_press_and_what_to_change(workflow):
    (note,) = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    (text,) = note["widgets_values"]
    assert re.match("## .+\n", text)
    assert "press run" in text.casefold() and "**Your own " in text
    assert len(text.split()) < 190


def test_the_picture_is_small(name):
    path = FOLDER / f"{name}.jpg"
    with Image.open(path) as picture:
        assert picture.format == "JPEG" and picture.size == (400, 300)
    assert path.stat().st_size < 60_000
