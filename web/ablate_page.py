"""The page *Ablate*: the form on the left, what happens on the right."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, get_args

import gradio as gr

from ..core.concept import Kind
from ..core.errors import AblationError
from ..core.presets import PRESETS
from ..core.subsets import SUBSETS
from ..core.trainer import OBJECTIVES, PHASE
from . import evidence_fields, views
from .ablating import ablation
from .compat import in_turn, private
from .form import FIELDS, HINTED, PRESET, Form, check, preset_values, suggest_anchor
from .host import Host
from .jobs import Job, Runner
from .result_panel import ResultPanel
from .session import KEY_JS, session_of
from .words import ANCHOR_WORDS, KIND_LABELS, TARGET_WORDS

# On a narrow page the right side lies below the form: bring into view what was started, or what is wrong.
_SHOW_JS = """() => {
  const wrong = document.querySelector(".ca-form .ca-error");
  const shown = wrong || document.querySelector(".ca-side");
  if (shown) shown.scrollIntoView({block: innerWidth < 700 ? "start" : "nearest", behavior: "smooth"});
}"""
# In the browser, for only it knows whether something was typed while the server thought of an anchor.
_KEEP_TYPED_JS = '(typed, suggested, replaced) => (typed || "") === (replaced || "") ? suggested : typed'
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
        # the browser's key, and the job that it shows: both come back from it, for only it knows them
        self._key, self._watched = (gr.Textbox("", visible=False) for _ in range(2))
        self._timer = gr.Timer(1.0, active=False)
        # by this one a page catches up whose other timer nothing has started: a second window of the same session, and
        # one that gradio took the session from, which it does an hour after a connection has dropped
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
        return self._result.applied

    @property
    def _poll_inputs(self) -> list[Any]:
        return [self._session, self._seen]

    @property
    def _poll_outputs(self) -> list[Any]:
        return [*self._shown, *(self._errors[name] for name in _LATE_FIELDS), *self._result.outputs]

    @property
    def _shown(self) -> list[Any]:
        shown = [self._status, self._chart, self._queue, self._start, self._cancel, self._timer]
        return [*shown, self._watched, self._seen]

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
        self._result = ResultPanel(self._host, self._runner, self._session)

    def connect(self, blocks: gr.Blocks) -> None:
        """Attach the events; `blocks` is the page around it."""
        f, quiet = self.fields, {"show_progress": "hidden", **private()}
        values = [f[name] for name in FIELDS]
        errors = [self._errors[name] for name in FIELDS]
        started = self._start.click(
            self._begin,
            [self._session, self._seen, *values],
            [self._session, self._form_note, *errors, *self._shown, *self._result.outputs],
            show_progress="hidden",
            api_name="ablate",
            **in_turn(),
        )
        started.then(None, None, None, js=_SHOW_JS, **private())
        polled = [self._poll_inputs, self._poll_outputs]
        self._timer.tick(self._poll, *polled, show_progress="hidden", api_name="progress", **in_turn())
        found_again = [[self._key, *self._poll_inputs], [self._session, *self._poll_outputs]]
        for when in (blocks.load, self._watch.tick):
            when(self._catch_up, *found_again, js=KEY_JS, **quiet, **in_turn())
        told = {"show_progress": "hidden", "api_name": "cancel", **in_turn()}
        self._cancel.click(self._stop, [*self._poll_inputs, self._watched], self._poll_outputs, **told)
        suggestion = [f["target"], f["anchor"], f["kind"], f["model"]]
        suggested, replaced = gr.Textbox(visible=False), gr.Textbox(visible=False)
        for said, think in (
            (f["target"].blur, self._suggest),
            (f["target"].submit, self._suggest),
            (f["kind"].input, self._suggest_again),
        ):
            thought = said(think, suggestion, [suggested, replaced, self._errors["anchor"]], **quiet)
            thought.then(None, [f["anchor"], suggested, replaced], f["anchor"], js=_KEEP_TYPED_JS, **private())
        worded = [f["target"], f["anchor"], f["captions"], f["original"]]
        f["kind"].change(self._words, f["kind"], worded, **quiet)
        hinted = [f["preset"], *(f[name] for name in HINTED)]
        for name in ("kind", "preset"):
            f[name].change(self._hints, [f["preset"], f["kind"]], hinted, **quiet)
        self._result.connect()

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

    def _poll(self, session: str, seen: tuple[int, int]) -> list[Any]:
        """Everything on the right, as far as it has changed; `seen` is (the result, the ended job) shown last."""
        shown, late, results = self._look(session, seen)
        return [*shown, *late, *results]

    def _catch_up(self, key: str | None, session: str, seen: tuple[int, int]) -> list[Any]:
        """The session of the browser with that key, which keeps gradio from letting it go, and what it shows."""
        session = session_of(key, session)
        return [session, *self._poll(session, seen)]

    def _look(self, session: str, seen: tuple[int, int]) -> tuple[list[Any], list[Any], list[Any]]:
        """Values of what is always shown, of the errors that come late, and of the result."""
        jobs = self._runner.of(session)
        current = _current(jobs)
        late: list[Any] = [gr.skip()] * len(_LATE_FIELDS)
        results = self._result.unchanged()
        if current is None:
            nothing = [views.idle(), "", "", gr.update(value=_START), _hidden(), gr.update(active=False), "", (0, 0)]
            return nothing, late, results
        places = {id(job): self._runner.place(job) for job in jobs}
        training = current.stages.get(PHASE)
        done = [job for job in jobs if job.state == "done"]
        result_id = done[-1].id if done else 0
        ended = 0 if current.active else current.id
        if ended and ended != seen[1]:
            late = [_error(current.message if current.failed_field == name else "") for name in _LATE_FIELDS]
        if result_id and result_id != seen[0]:
            results = self._result.of(done)
        shown = [
            views.status(current, places[id(current)]),
            views.loss_chart(current.losses, training.total) if training else "",
            views.queue(jobs, places),
            gr.update(value=_QUEUE if current.active else _START),
            gr.update(visible=current.active, interactive=not current.cancelling),
            gr.update(active=any(job.active for job in jobs)),
            str(current.id),
            (result_id, ended),
        ]
        return shown, late, results

    def _stop(self, session: str, seen: tuple[int, int], watched: str) -> list[Any]:
        """Cancel the job that the page shows: it may have ended since, and the next one is not what was meant."""
        jobs = self._runner.of(session)
        meant = next((job for job in jobs if str(job.id) == watched), None) if watched else _current(jobs)
        if meant is not None and meant.active:
            self._runner.cancel(meant)
        return self._poll(session, seen)

    def _suggest(self, target: str, anchor: str, kind: str, model: str) -> list[Any]:
        """Fill an empty anchor: with what, in place of what, and no error any more that says it is empty."""
        suggested = "" if anchor else self._suggested(target, kind, model)
        return [anchor or suggested, anchor, _hidden() if suggested else gr.skip()]

    def _suggest_again(self, target: str, anchor: str, kind: str, model: str) -> list[Any]:
        """Another kind: the anchor that a style was given does not suit a thing."""
        if anchor and kind != "style" and anchor == self._host.style_anchor(model or ""):
            return [self._suggested(target, kind, model), anchor, gr.skip()]
        return self._suggest(target, anchor, kind, model)

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
