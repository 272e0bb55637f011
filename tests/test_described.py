"""Settings of a host's user as text: the same for the same settings, another for others, and never an address."""

from __future__ import annotations

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from concept_ablation.core.hosts.described import described


def patch(factor, table=(1, 2)):
    def scaled(out, options):
        return out * factor, table

    return scaled


def network(value):
    layer = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(layer.weight, value)
    torch.nn.init.zeros_(layer.bias)
    return layer


class Scaling:
    def __init__(self, factor):
        self.factor = factor
        self.other = object()

    def __call__(self, out):
        return out * self.factor


@pytest.mark.parametrize(
    "make",
    [
        lambda value: value,
        lambda value: {"patches": {"attn1": [patch(value)]}},
        lambda value: [patch(1.0, (value, 2))],
        lambda value: (torch.full((2, 2), value), "lora"),
        Scaling,
        lambda value: partial(patch, value),
        lambda value: SimpleNamespace(patch=patch(value)),
        lambda value: network(value),
        lambda value: Scaling(value).__call__,
        lambda value: {("input", 1, 0): {value}},
    ],
)
def test_what_differs_is_told_apart(make):
    one, same, other = (described(make(value)) for value in (0.5, 0.5, 0.25))
    assert one == same != other
    assert not re.search("at 0x[0-9a-f]+", one), "an address would differ in the next process"


def test_containers_without_an_order_are_told_in_one():
    assert described({"a": 1, "b": {1, 2}}) == described({"b": {2, 1}, "a": 1})


def test_what_holds_itself_ends():
    loop = {}
    loop["again"] = loop
    assert described(loop) == described(loop)


def test_models_are_named_only():
    manager = SimpleNamespace(load_device="cpu", backup={"weight": torch.ones(1)})
    assert "backup" not in described(manager)


def test_what_a_function_does_later_makes_no_other_one():
    """As the patch of ComfyUI's TomePatchModel, which notes in one call what the next one undoes."""
    noted = None

    def note(value):
        nonlocal noted
        noted = value

    before = described(note)
    note(torch.ones(1))
    assert described(note) == before


def test_how_deep_a_function_was_first_met_makes_no_difference():
    settings = 0.5
    for _ in range(6):
        settings = [settings]
    early, late = patch(settings), patch(settings)
    nested = early
    for _ in range(4):
        nested = [nested]
    described(nested)
    assert described(early) == described(late)


def test_where_a_custom_node_is_installed_makes_no_difference():
    """ComfyUI names the module of a custom node by its whole path."""
    seen = set()
    for folder in ("/home/me/ComfyUI/custom_nodes/", "D:\\ComfyUI_x_v3\\custom_nodes\\"):
        function, scaling = patch(0.5), type("Scaling", (Scaling,), {})
        function.__module__ = scaling.__module__ = f"{folder}freeu.nodes"
        seen.add(described([function, scaling(2.0), scaling]))
    assert len(seen) == 1 and "freeu.nodes" in seen.pop()
