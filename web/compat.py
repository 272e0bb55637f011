"""The few places where gradio 4.40 (which Forge pins) and gradio 6 differ."""

from __future__ import annotations

import inspect
from typing import Any

import gradio as gr

SIX = int(gr.__version__.split(".")[0]) >= 6


def private() -> dict[str, Any]:
    """Arguments of an event that is no part of the HTTP API."""
    parameters = inspect.signature(gr.Button.click).parameters
    return {"api_visibility": "private"} if "api_visibility" in parameters else {"api_name": False}


def in_turn() -> dict[str, Any]:
    """Arguments of events that write the same part of the page: one after another, so that none is overtaken by an
    older answer.
    """
    return {"concurrency_id": "concept-ablation-page", "concurrency_limit": 1}


def launch_arguments(theme: Any) -> dict[str, Any]:
    """Arguments of `launch` for a plain page: gradio 6 takes the theme there and names the footer's links."""
    return {"theme": theme, "footer_links": []} if SIX else {"show_api": False}


def blocks_arguments(theme: Any) -> dict[str, Any]:
    """Arguments of `Blocks` for the theme, which gradio 4 takes there."""
    return {} if SIX else {"theme": theme}
