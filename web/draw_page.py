"""The page *Try it*: draw a prompt with the model as it is and, beside it, with the applied deltas."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import gradio as gr

from ..core.concept import MAX_CAPTION_LENGTH
from ..core.errors import AblationError
from ..core.samplers import SampleSettings
from . import views
from .ablating import drawing
from .compat import private
from .form import MAX_SEED
from .host import Host
from .jobs import Job, Runner

_SUFFIX = "-draw"
"""Keeps a session's drawing jobs apart from its ablations."""


class DrawPage:
    """Components and events of the page. Made inside a `gr.Tab`."""

    def __init__(self, host: Host, runner: Runner, session: gr.State, model: Any) -> None:
        self._host, self._runner = host, runner
        with gr.Row(elem_classes="ca-columns"):
            with gr.Column(scale=5, min_width=320, elem_classes="ca-form"):
                self._prompt = gr.Textbox(
                    label="Prompt", placeholder="a picture of a tropical fish", lines=2, max_lines=5
                )
                with gr.Row():
                    self._seed = gr.Number(label="Seed", value=0, precision=0, min_width=200)
                    self._count = gr.Slider(1, 8, value=4, step=1, label="Pictures", min_width=200)
                with gr.Row():
                    self._steps = gr.Slider(1, 100, value=25, step=1, label="Steps", min_width=200)
                    self._guidance = gr.Slider(1, 15, value=4, step=0.5, label="Guidance", min_width=200)
                with gr.Row(elem_classes="ca-actions"):
                    self._draw = gr.Button("Draw", variant="primary", elem_classes="ca-go")
                    self._cancel = gr.Button("Cancel", visible=False)
            with gr.Column(scale=8, min_width=320, elem_classes="ca-side"):
                self._applied = gr.HTML()
                self._status = gr.HTML()
                self._pictures = gr.HTML()
        # for a page that was loaded while a picture was drawn: the answer to Draw goes to the page that asked
        self._timer = gr.Timer(1.0, active=False)
        values = [self._prompt, self._seed, self._count, self._steps, self._guidance]
        self._draw.click(
            self._run,
            [session, model, *values],
            [session, self._status, self._pictures, self._cancel],
            show_progress="hidden",
            api_name="draw",
            concurrency_limit=None,
        )
        quiet = {"show_progress": "hidden", **private()}
        self._timer.tick(self._poll, session, self.shown, **quiet)
        self._cancel.click(self._stop, session, self._cancel, **quiet)

    @property
    def shown(self) -> list[Any]:
        """What `refresh` fills."""
        return [self._applied, self._status, self._cancel, self._timer, self._pictures]

    def refresh(self, session: str) -> list[Any]:
        """The deltas that are applied now, and what the session draws or drew last, which a reloaded page lacks."""
        return self._look(session, again=True)

    def _poll(self, session: str) -> list[Any]:
        """As `refresh`; the pictures, which are large, only when there may be new ones."""
        return self._look(session, again=False)

    def _look(self, session: str, *, again: bool) -> list[Any]:
        jobs = self._runner.of(session + _SUFFIX)
        # asked once and first: a job that ends meanwhile is looked at again
        active = [job for job in jobs if job.active]
        drawn = [job.result for job in jobs if job.state == "done"]
        pictures = (views.drawn(drawn[-1]) if drawn else "") if again or not active else gr.skip()
        return [
            views.applied(self._host.applied()),
            self._told((active or jobs)[-1]) if jobs else "",
            gr.update(visible=any(not job.cancelling for job in active)),
            gr.update(active=bool(active)),
            pictures,
        ]

    def _told(self, job: Job) -> str:
        if job.active:
            return views.drawing_status(job, self._runner.place(job))
        return "" if job.state == "done" else views.note(job.message or "Cancelled.", "bad" if job.message else "plain")

    def _run(
        self, session: str, model: str, prompt: str, seed: float, count: float, steps: float, guidance: float
    ) -> Iterator[tuple[Any, ...]]:
        session = session or uuid.uuid4().hex
        try:
            work = self._work(model, prompt, seed, count, steps, guidance)
            job = self._runner.submit(Job(session + _SUFFIX, prompt.strip()[:80], work))
        except AblationError as error:
            yield session, views.note(str(error), "bad"), gr.skip(), gr.update(visible=False)
            return
        while not job.wait(0.5):
            yield session, self._told(job), gr.skip(), gr.update(visible=not job.cancelling)
        pictures = views.drawn(job.result) if job.state == "done" else gr.skip()
        yield session, self._told(job), pictures, gr.update(visible=False)

    def _work(self, model: str, prompt: str, seed: float, count: float, steps: float, guidance: float) -> Any:
        prompt, model = (prompt or "").strip(), (model or "").strip()
        if not prompt:
            raise AblationError("The prompt is empty: say what to draw.")
        if not model:
            raise AblationError("No model is chosen: choose one on the page Ablate.")
        if len(prompt) > MAX_CAPTION_LENGTH:
            raise AblationError(f"The prompt has {len(prompt):,} characters: use at most {MAX_CAPTION_LENGTH:,}.")
        if seed is None or not 0 <= seed <= MAX_SEED - 8:
            raise AblationError("The seed must be a whole number, 0 or above.")
        return drawing(self._host, model, prompt, int(seed), int(count), SampleSettings(int(steps), float(guidance)))

    def _stop(self, session: str) -> Any:
        for job in self._runner.of(session + _SUFFIX):
            if job.active:
                self._runner.cancel(job)
        return gr.update(visible=False)
