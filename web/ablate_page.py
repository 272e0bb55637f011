"""The page *Ablate*: the form on the left, what happens on the right."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any, get_args

import gradio as gr

from ..core.concept import Kind
from ..core.errors import AblationError
from ..core.presets import PRESETS
from ..core.subsets import SUBSETS
from ..core.trainer import OBJECTIVES, PHASE
from . import evidence_fields, views
from .ablating import AblationResult, ablation
from .compat import in_turn, private
from .form import FIELDS, HINTED, PRESET, Form, check, preset_values, suggest_anchor
from .host import Host
from .jobs import Job, Runner
from .library import export_lora
from .words import ANCHOR_WORDS, KIND_LABELS, TARGET_WORDS

# On a narrow page the right side lies below the form: bring into view what was started, or what is wrong.
_SHOW_JS = """() => {
  const wrong = document.querySelector(".ca-form .ca-error");
  const shown = wrong || document.querySelector(".ca-side");
  if (shown) shown.scrollIntoView({block: innerWidth < 700 ? "start" : "nearest", behavior: "smooth"});
}"""
# In the browser, for only it knows whether something was typed while the server thought of an anchor.
_KEEP_TYPED_JS = "(typed, suggested) => typed || suggested"
_START, _QUEUE = "Ablate", "Add to the queue"
_LATE_FIELDS = ("model", "subset", "eval_prompts", "original")
"""Fields whose errors can be found only when the model is there."""


class AblatePage:
    """Components and events of the page. Made inside a `gr.Tab`; `connect` once all pages are there."""

    def __init__(self, host: Host, runner: Runner, session: gr.State) -> None:
        self._host, self._runner, self._session = host, runner, session
        self.fields: dict[str, Any] = {}
        self._errors: dict[str, gr.HTML] = {}
        self._seen = gr.State((0, 0))
        self._timer = gr.Timer(1.0, active=False)
        # by this one a second window of the same session catches up, whose other timer nothing has started
        self._watch = gr.Timer(5.0)
        with gr.Row(elem_classes="ca-columns"):
            with gr.Column(scale=5, min_width=320, elem_classes="ca-form"):
                self._build_form()
            with gr.Column(scale=8, min_width=320, elem_classes="ca-side"):
                self._build_side()

    @property
    def model(self) -> Any:
        """The model's field, which other pages read."""
        return self.fields["model"]

    @property
    def applied(self) -> Any:
        """Which deltas are applied."""
        return self._applied

    @property
    def poll_inputs(self) -> list[Any]:
        return [self._session, self._seen]

    @property
    def poll_outputs(self) -> list[Any]:
        return [*self._shown, *(self._errors[name] for name in _LATE_FIELDS), self._chosen, *self._result_outputs]

    @property
    def _shown(self) -> list[Any]:
        return [self._status, self._chart, self._queue, self._start, self._cancel, self._timer, self._seen]

    @property
    def _result_outputs(self) -> list[Any]:
        return [self._results, self._pairs, self._metrics, self._report, self._files, self._applied]

    def _field(self, name: str, component: Any) -> Any:
        """Register a field and give it a place for its error, right below."""
        self.fields[name] = component
        self._errors[name] = gr.HTML(visible=False, elem_classes="ca-error-slot")
        return component

    def _build_form(self) -> None:
        self._field("target", gr.Textbox(label=TARGET_WORDS["instance"][0], placeholder="Grumpy Cat", max_lines=2))
        anchor_label, anchor_hint = ANCHOR_WORDS["instance"]
        self._field("anchor", gr.Textbox(label=anchor_label, placeholder=anchor_hint, max_lines=2))
        kinds = [(KIND_LABELS[kind], kind) for kind in get_args(Kind)]
        self._field("kind", gr.Dropdown(kinds, value="instance", label="It is"))
        self._field(
            "surrounding",
            gr.Textbox(label="Keep as they are", placeholder="neighbours, by commas: dog, tiger, lion", max_lines=3),
        )
        self._field(
            "captions",
            gr.Textbox(label="Further captions of the picture, one a line", lines=3, max_lines=8, visible=False),
        )
        self._field("original", evidence_fields.original())
        presets = [(name.capitalize(), name) for name in PRESETS]
        self._field("preset", gr.Dropdown(presets, value="balanced", label="Preset", info=_about("balanced")))
        models = [(choice.label, choice.value) for choice in self._host.models]
        info = "Or type a diffusers folder, a .safetensors file or a hub id." if self._host.free_model else None
        self._field(
            "model",
            gr.Dropdown(
                models,
                value=models[0][1],
                label="Model",
                info=info,
                allow_custom_value=self._host.free_model,
                visible=self._host.free_model or len(models) > 1,
            ),
        )
        self._start = gr.Button(_START, variant="primary")
        self._form_note = gr.HTML(visible=False)
        with gr.Accordion("Advanced", open=False):
            self._build_advanced()

    def _build_advanced(self) -> None:
        hints = preset_values("balanced", "instance")

        def number(name: str, label: str) -> None:
            with gr.Column(min_width=130):
                self._field(name, gr.Textbox(label=label, placeholder=hints.get(name, ""), max_lines=1))

        gr.HTML('<p class="ca-group">Training</p>')
        with gr.Row():
            with gr.Column(min_width=130):
                self._field("objective", gr.Dropdown([PRESET, *OBJECTIVES], value=PRESET, label="Objective"))
            with gr.Column(min_width=130):
                self._field("subset", gr.Dropdown([PRESET, *SUBSETS], value=PRESET, label="Subset of weights"))
        with gr.Row():
            number("steps", "Steps")
            number("rate", "Learning rate")
            number("batch", "Batch")
            number("guidance", "Negative guidance")
        gr.HTML('<p class="ca-group">Pictures to learn from</p>')
        with gr.Row():
            number("images", "Of the anchor")
            number("preserve", "Of the neighbours")
            number("sampling", "Sampling steps")
            number("neighbours", "Neighbours to choose")
        self._field(
            "prompts",
            gr.Textbox(
                label="Your own anchor prompts, one a line",
                placeholder="none: built-in templates",
                lines=2,
                max_lines=8,
            ),
        )
        gr.HTML('<p class="ca-group">Measurement</p>')
        with gr.Row():
            number("eval_prompts", "Prompts a concept")
            number("eval_seeds", "Pictures a prompt")
            number("seed", "Seed")
        evidence_fields.measured(self._field, number)
        self._field("name", gr.Textbox(label="Name of the saved file", placeholder="made of the concept", max_lines=1))
        for name, hint in (
            ("rate", "the preset's"),
            ("eval_prompts", "5"),
            ("eval_seeds", "4"),
            ("seed", "0"),
            ("misspellings", "0"),
        ):
            self.fields[name].placeholder = hint

    def _build_side(self) -> None:
        self._status = gr.HTML(views.idle())
        self._cancel = gr.Button("Cancel", visible=False, elem_classes="ca-narrow")
        self._chart = gr.HTML()
        self._queue = gr.HTML()
        with gr.Column(visible=False, elem_classes="ca-results") as self._results:
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
            self._applied = gr.HTML(views.applied(self._host.applied()))
            self._report = gr.HTML()

    def connect(self) -> None:
        """Attach the events."""
        f, quiet = self.fields, {"show_progress": "hidden", **private()}
        values = [f[name] for name in FIELDS]
        errors = [self._errors[name] for name in FIELDS]
        started = self._start.click(
            self._begin,
            [self._session, self._seen, *values],
            [self._session, self._form_note, *errors, *self._shown, self._chosen, *self._result_outputs],
            show_progress="hidden",
            api_name="ablate",
            **in_turn(),
        )
        started.then(None, None, None, js=_SHOW_JS, **private())
        self._timer.tick(
            self.poll,
            self.poll_inputs,
            self.poll_outputs,
            show_progress="hidden",
            api_name="progress",
            **in_turn(),
        )
        self._watch.tick(self.poll, self.poll_inputs, self.poll_outputs, **quiet, **in_turn())
        told = {"show_progress": "hidden", "api_name": "cancel", **in_turn()}
        self._cancel.click(self._stop, self.poll_inputs, self.poll_outputs, **told)
        suggestion = [f["target"], f["anchor"], f["kind"], f["model"]]
        suggested = gr.Textbox(visible=False)
        filling = [[f["anchor"], suggested], f["anchor"]]
        for said in (f["target"].blur, f["target"].submit):
            thought = said(self._suggest, suggestion, [suggested, self._errors["anchor"]], **quiet)
            thought.then(None, *filling, js=_KEEP_TYPED_JS, **private())
        worded = [f["target"], f["anchor"], f["captions"], f["original"]]
        f["kind"].change(self._words, f["kind"], worded, **quiet)
        f["kind"].input(self._suggest_again, suggestion, f["anchor"], **quiet)
        hinted = [f["preset"], *(f[name] for name in HINTED)]
        for name in ("kind", "preset"):
            f[name].change(self._hints, [f["preset"], f["kind"]], hinted, **quiet)
        self._chosen.input(self._show_chosen, [self._session, self._chosen], self._result_outputs, **quiet)
        result = [self._session, self._chosen]
        self._export.click(self._make_lora, [*result, self._rank], [self._files, self._applied], **quiet)
        self._apply.click(self._apply_result, result, self._applied, **quiet)
        self._remove.click(self._remove_result, result, self._applied, **quiet)

    def _begin(self, session: str, seen: tuple[int, int], *values: Any) -> list[Any]:
        session = session or uuid.uuid4().hex
        form = Form(**{name: "" if value is None else value for name, value in zip(FIELDS, values, strict=True)})
        request, errors = check(form)
        problem = ""
        if request is not None:
            concept = request.task.concept
            title = f"{concept.target[:60]} → {concept.anchor[:60]}"
            try:
                self._runner.submit(Job(session, title, ablation(self._host, request)))
            except AblationError as error:
                problem = str(error)
        elif errors:
            problem = "Nothing was started: see the fields that are marked."
        slots = [_error(errors.get(name, "")) for name in FIELDS]
        told = gr.update(value=views.note(problem, "bad"), visible=bool(problem))
        shown, _, results = self._look(session, seen)
        return [session, told, *slots, *shown, *results]

    def poll(self, session: str, seen: tuple[int, int]) -> list[Any]:
        """Everything on the right, as far as it has changed; `seen` is (the result, the ended job) shown last."""
        shown, late, results = self._look(session, seen)
        return [*shown, *late, *results]

    def _look(self, session: str, seen: tuple[int, int]) -> tuple[list[Any], list[Any], list[Any]]:
        """Values of what is always shown, of the errors that come late, and of the result."""
        jobs = self._runner.of(session)
        current = _current(jobs)
        late: list[Any] = [gr.skip()] * len(_LATE_FIELDS)
        results: list[Any] = [gr.skip()] * (1 + len(self._result_outputs))
        if current is None:
            nothing = [views.idle(), "", "", gr.update(value=_START), _hidden(), gr.update(active=False), (0, 0)]
            return nothing, late, results
        places = {id(job): self._runner.place(job) for job in jobs}
        training = current.stages.get(PHASE)
        done = [job for job in jobs if job.state == "done"]
        result_id = done[-1].id if done else 0
        ended = 0 if current.active else current.id
        if ended and ended != seen[1]:
            late = [_error(current.message if current.failed_field == name else "") for name in _LATE_FIELDS]
        if result_id and result_id != seen[0]:
            choices = [(f"{job.title} ({job.id})", str(job.id)) for job in reversed(done)]
            chosen = gr.update(choices=choices, value=str(result_id), visible=len(done) > 1)
            results = [chosen, *self._show(done[-1])]
        shown = [
            views.status(current, places[id(current)]),
            views.loss_chart(current.losses, training.total) if training else "",
            views.queue(jobs, places),
            gr.update(value=_QUEUE if current.active else _START),
            gr.update(visible=current.active, interactive=not current.cancelling),
            gr.update(active=any(job.active for job in jobs)),
            (result_id, ended),
        ]
        return shown, late, results

    def _stop(self, session: str, seen: tuple[int, int]) -> list[Any]:
        current = _current(self._runner.of(session))
        if current is not None and current.active:
            self._runner.cancel(current)
        return self.poll(session, seen)

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
        return self._show(job) if job is not None else [gr.skip()] * len(self._result_outputs)

    def _done(self, session: str, chosen: str | None) -> Job | None:
        """The finished job that is shown: one of the session's own."""
        done = [job for job in self._runner.of(session) if job.state == "done"]
        return next((job for job in done if str(job.id) == str(chosen)), None)

    def _make_lora(self, session: str, chosen: str, rank: float) -> tuple[Any, str]:
        def make(job: Job) -> tuple[Any, str]:
            path, kept = export_lora(self._host.delta_folder, job.result.delta.name, int(rank))
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

    def _suggest(self, target: str, anchor: str, kind: str, model: str) -> list[Any]:
        """Fill an empty anchor, and take away the error that says it is empty."""
        suggested = "" if anchor else self._suggested(target, kind, model)
        return [suggested, _hidden() if suggested else gr.skip()]

    def _suggest_again(self, target: str, anchor: str, kind: str, model: str) -> Any:
        """Another kind: the anchor that a style was given does not suit a thing."""
        if anchor and not (kind != "style" and anchor == self._host.style_anchor(model or "")):
            return gr.skip()
        return self._suggested(target, kind, model)

    def _suggested(self, target: str, kind: str, model: str) -> str:
        known = self._host.categories(model or "")
        return suggest_anchor(target or "", kind, self._host.style_anchor(model or ""), known)

    @staticmethod
    def _words(kind: str) -> list[Any]:
        target, anchor = TARGET_WORDS[kind], ANCHOR_WORDS[kind]
        return [
            gr.update(label=target[0], placeholder=target[1]),
            gr.update(label=anchor[0], placeholder=anchor[1]),
            *(gr.update(visible=kind == "memorized") for _ in range(2)),
        ]

    @staticmethod
    def _hints(preset: str, kind: str) -> list[Any]:
        values = preset_values(preset, kind)
        return [gr.update(info=_about(preset)), *(gr.update(placeholder=values[name]) for name in HINTED)]


def _hidden() -> Any:
    return gr.update(visible=False)


def _about(preset: str) -> str:
    text = PRESETS[preset]
    return f"{text[0].upper()}{text[1:]}."


def _error(message: str) -> Any:
    return gr.update(value=views.error(message) if message else "", visible=bool(message))


def _current(jobs: Sequence[Job]) -> Job | None:
    """The job to watch: the running one, else the next in the queue, else the one that ended last."""
    for state in ("running", "waiting"):
        found = [job for job in jobs if job.state == state]
        if found:
            return found[0]
    return max(jobs, key=lambda job: job.finished, default=None)
