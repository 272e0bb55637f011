"""The fields of *Ablate* that say what else is measured, and the upload of a memorized picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr


def original() -> Any:
    """The memorized picture, as the path of an uploaded file; shown for that kind only."""
    return gr.Image(
        type="filepath",
        sources=["upload"],
        label="The picture itself: copies of it are counted, and none is trained on",
        height=200,
        visible=False,
    )


def measured(field: Callable[[str, Any], Any], number: Callable[[str, str], None]) -> None:
    """Misspellings and composition; `field` registers a component, `number` makes a field for a number."""
    with gr.Row():
        number("misspellings", "Misspelled prompts")
        with gr.Column(min_width=130):
            field("composition", gr.Checkbox(label="Other words: colour, place, size, style"))
