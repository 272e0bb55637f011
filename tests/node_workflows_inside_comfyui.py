"""The example workflows against the nodes that are there now, collected by `test_nodes.py` only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from concept_ablation.nodes import NODES
from nodes import NODE_CLASS_MAPPINGS

FILES = sorted((Path(__file__).resolve().parents[1] / "example_workflows").glob("*.json"))
CLASSES = NODE_CLASS_MAPPINGS | {node.GET_SCHEMA().node_id: node for node in NODES}
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
FILE_LISTS = ("ckpt_name", "file")
"""Choices that are files of the machine."""


def declared(type_: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Each input's type and settings, in the front end's order; a list of choices is a COMBO."""
    inputs = CLASSES[type_].INPUT_TYPES()
    found = {}
    for name, (kind, *settings) in (*inputs.get("required", {}).items(), *inputs.get("optional", {}).items()):
        choices = {"options": kind} if isinstance(kind, list) else {}
        found[name] = ("COMBO" if choices else kind, {**choices, **(settings[0] if settings else {})})
    return found


def nodes_of(file: Path) -> list[dict[str, Any]]:
    return [node for node in json.loads(file.read_text(encoding="utf-8"))["nodes"] if node["type"] != "MarkdownNote"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_slots_are_those_of_the_nodes(file):
    for node in nodes_of(file):
        inputs = declared(node["type"])
        sockets = [name for name, (kind, _) in inputs.items() if kind not in WIDGETS]
        widgets = [name for name, (kind, _) in inputs.items() if kind in WIDGETS]
        assert [slot["name"] for slot in node["inputs"]] == sockets + widgets, node["type"]
        assert [slot["type"] for slot in node["inputs"]] == [inputs[name][0] for name in sockets + widgets]
        assert [slot["type"] for slot in node["outputs"]] == list(CLASSES[node["type"]].RETURN_TYPES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_widget_has_a_value_that_its_node_takes(file):
    for node in nodes_of(file):
        values = iter(node["widgets_values"])
        for name, (kind, settings) in declared(node["type"]).items():
            if kind not in WIDGETS:
                continue
            value = next(values)
            if kind in ("INT", "FLOAT"):
                assert settings.get("min", value) <= value <= settings.get("max", value), (node["type"], name)
            elif kind == "BOOLEAN":
                assert isinstance(value, bool)
            else:
                assert isinstance(value, str)
            if kind == "COMBO" and name not in FILE_LISTS:
                assert value in settings["options"], (node["type"], name)
            if settings.get("control_after_generate"):
                assert next(values) == "fixed"
        assert not list(values), node["type"]
