"""The tab: pages, and what they share (the host, the queue of jobs, the browser's session). Built for any `Host`."""

from __future__ import annotations

from typing import Any

import gradio as gr

from . import views
from .ablate_page import AblatePage
from .compat import private
from .draw_page import DrawPage
from .host import Host
from .jobs import Runner
from .saved_page import SavedPage

TITLE = "Concept Ablation"
_INTRO = (
    '<div class="ca-title"><h1>Concept Ablation</h1><p>Take a concept out of a text-to-image model. The model keeps '
    "its weights; the edit is a small file that loads like a LoRA.</p></div>"
)


def build_tab(host: Host, *, heading: bool = False, runner: Runner | None = None, **blocks_arguments: Any) -> gr.Blocks:
    """The Blocks of the tab.

    Args:
        host: the program around it.
        heading: whether the page says its name, which a tab of a WebUI need not.
        runner: the queue of jobs, where that outlives the page; None makes one.
        blocks_arguments: further arguments of `gr.Blocks`.
    """
    runner = runner or Runner()
    with gr.Blocks(title=TITLE, analytics_enabled=False, **blocks_arguments) as blocks:
        gr.HTML(views.style(), elem_classes="ca-style")
        if heading:
            gr.HTML(_INTRO, elem_classes="ca-heading")
        session = gr.State("")
        with gr.Tabs(elem_classes="ca-page"):
            with gr.Tab("Ablate") as ablate_tab:
                ablate = AblatePage(host, runner, session)
            with gr.Tab("Saved deltas") as saved_tab:
                saved = SavedPage(host)
            if host.draws:
                with gr.Tab("Try it") as draw_tab:
                    draw = DrawPage(host, runner, session, ablate.model)
                draw_tab.select(draw.refresh, session, draw.shown, show_progress="hidden", **private())
        ablate.connect(blocks)
        saved.connect()
        saved_tab.select(saved.refresh, saved.choice, saved.listing, show_progress="hidden", **private())
        ablate_tab.select(
            lambda: views.applied(host.applied()), None, ablate.applied, show_progress="hidden", **private()
        )
    return blocks
