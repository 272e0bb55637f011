"""The result on the page *Ablate*: a finished job's pictures, measures and files, and what to do with its delta."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from ..core.errors import AblationError
from . import views
from .ablating import AblationResult
from .compat import private
from .host import Host
from .jobs import Job, Runner
from .library import export_lora


class ResultPanel:
    """Components and events of the panel. Made where it is to be; `connect` once the page is there."""

    def __init__(self, host: Host, runner: Runner, session: gr.State) -> None:
        self._host, self._runner, self._session = host, runner, session
        with gr.Column(visible=False, elem_classes="ca-results") as self._column:
            self._chosen = gr.Dropdown(label="Result", visible=False)
            self._metrics = gr.HTML()
            self._pairs = gr.HTML()
            self._files = gr.File(label="Download", file_count="multiple", interactive=False, elem_classes="ca-files")
            with gr.Row(elem_classes="ca-actions"):
                self._rank = gr.Slider(1, 128, value=8, step=1, label="LoRA rank", min_width=180)
                self._export = gr.Button("Make a LoRA of this rank", min_width=180)
            with gr.Row(elem_classes="ca-actions"):
                self._apply = gr.Button("Apply to the model", min_width=150)
                self._remove = gr.Button("Remove", min_width=100)
            self.applied = gr.HTML(views.applied(host.applied()))
            self._report = gr.HTML()

    @property
    def outputs(self) -> list[Any]:
        """What `of` fills."""
        return [self._chosen, *self._shown]

    @property
    def _shown(self) -> list[Any]:
        return [self._column, self._pairs, self._metrics, self._report, self._files, self.applied]

    def of(self, done: Sequence[Job]) -> list[Any]:
        """The result of the last of these jobs, and the choice among all of them."""
        choices = [(f"{job.title} ({job.id})", str(job.id)) for job in reversed(done)]
        chosen = gr.update(choices=choices, value=str(done[-1].id), visible=len(done) > 1)
        return [chosen, *self._show(done[-1])]

    def unchanged(self) -> list[Any]:
        """Values that leave the panel as it is."""
        return [gr.skip()] * len(self.outputs)

    def connect(self) -> None:
        """Attach the events."""
        quiet = {"show_progress": "hidden", **private()}
        result = [self._session, self._chosen]
        self._chosen.input(self._show_chosen, result, self._shown, **quiet)
        self._export.click(self._make_lora, [*result, self._rank], [self._files, self.applied], **quiet)
        self._apply.click(self._apply_result, result, self.applied, **quiet)
        self._remove.click(self._remove_result, result, self.applied, **quiet)

    def _show(self, job: Job) -> list[Any]:
        result: AblationResult = job.result
        report = result.folder / "report.html"
        return [
            gr.update(visible=True),
            views.pairs(result.evaluation),
            views.metrics(result.evaluation),
            views.report(report.read_text(encoding="utf-8")) if report.is_file() else "",
            [str(path) for path in result.files if path.is_file()],
            views.applied(self._host.applied()),
        ]

    def _show_chosen(self, session: str, chosen: str) -> list[Any]:
        job = self._done(session, chosen)
        return self._show(job) if job is not None else [gr.skip()] * len(self._shown)

    def _done(self, session: str, chosen: str | None) -> Job | None:
        """The finished job that is shown: one of the session's own."""
        done = [job for job in self._runner.of(session) if job.state == "done"]
        return next((job for job in done if str(job.id) == str(chosen)), None)

    def _make_lora(self, session: str, chosen: str, rank: float) -> tuple[Any, str]:
        def make(job: Job) -> tuple[Any, str]:
            path, kept = export_lora(self._host.delta_folder, job.result.delta.name, int(rank))
            self._host.files_changed()
            size = path.stat().st_size / 1e6
            listed = [str(item) for item in job.result.files if item.is_file()]
            said = f"{path.name}: rank {int(rank)}, {size:.1f} MB, {kept:.1%} of the energy kept; see the list above."
            return [*listed, str(path)], views.note(said, "good")

        return self._with_result(session, chosen, make, gr.skip())

    def _apply_result(self, session: str, chosen: str) -> str:
        def apply(job: Job) -> tuple[Any, str]:
            self._host.apply(job.result.delta, 1.0)
            return None, views.applied(self._host.applied())

        return self._with_result(session, chosen, apply, None)[1]

    def _remove_result(self, session: str, chosen: str) -> str:
        def remove(job: Job) -> tuple[Any, str]:
            self._host.remove(job.result.delta.name)
            return None, views.applied(self._host.applied())

        return self._with_result(session, chosen, remove, None)[1]

    def _with_result(
        self, session: str, chosen: str, act: Callable[[Job], tuple[Any, str]], otherwise: Any
    ) -> tuple[Any, str]:
        job = self._done(session, chosen)
        if job is None:
            return otherwise, views.note("There is no result yet: press Ablate first.", "bad")
        try:
            return act(job)
        except AblationError as error:
            return otherwise, views.note(str(error), "bad")
