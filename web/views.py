"""The page's own HTML: progress, loss chart, pictures before and after, tables, messages.

All text that comes from outside goes through `html.escape`. The figures are plain HTML and SVG, because they then look
the same in every version of gradio and follow the page's colours.
"""

from __future__ import annotations

import base64
import io
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from ..core.evaluation import ConceptResult, Evaluation
from ..core.progress import Progress
from .ablating import SEARCH, SHOWN, STAGES, Pictures
from .host import Applied
from .jobs import Job
from .library import Saved

STYLE = Path(__file__).with_name("style.css")
MAX_PAIRS = {"target": 6, "anchor": 3, "surrounding": 3, "misspelled": 3, "composed": 3}
"""At most so many pairs of a concept are on the page; the report has more."""
CHART_POINTS = 240
_ROLES = {
    "target": "removed",
    "anchor": "drawn instead",
    "surrounding": "to be kept",
    "misspelled": "removed, misspelled",
    "composed": "in a composition",
}
_STAGE_WORDS = dict(
    zip(
        STAGES,
        (
            "Read the prompts",
            "Solve the closed form",
            "Sample and keep predictions",
            "Draw the training pictures",
            "Train the delta",
            "Draw before",
            "Draw after",
        ),
        strict=True,
    )
)
_STAGE_WORDS[SEARCH] = "Try the paraphrases"


def style() -> str:
    """The style sheet as an element, which works in a tab of a foreign page too."""
    return f"<style>{STYLE.read_text(encoding='utf-8')}</style>"


def error(message: str) -> str:
    """An error below the field that it belongs to."""
    return f'<div class="ca-error" role="alert">{escape(message)}</div>'


def note(message: str, kind: str = "plain") -> str:
    """One sentence; `kind` is plain, good or bad."""
    role = "alert" if kind == "bad" else "status"
    return f'<div class="ca-note ca-{kind}" role="{role}">{escape(message)}</div>' if message else ""


def idle() -> str:
    """What the right side says before anything was started."""
    steps = (
        ("Draw", "The model draws what you want instead. Those pictures are the training set."),
        (
            "Train",
            "A small delta learns to answer the unwanted name with them. The model's weights stay untouched.",
        ),
        ("Compare", "The same prompts and seeds before and after, judged by a second program."),
    )
    items = "".join(f"<li><strong>{title}</strong><span>{text}</span></li>" for title, text in steps)
    return f'<div class="ca-idle"><p>What happens when you press Ablate</p><ol>{items}</ol></div>'


def status(job: Job, place: int) -> str:
    """The state of a job with its stages."""
    if job.state == "waiting":
        ahead = "1 job is" if place == 1 else f"{place} jobs are"
        return _card(job, "waiting", f"Waiting: {ahead} before this one.")
    if job.state == "running":
        return _card(job, "running", _headline(job), _stages(job) + _preview(job))
    if job.state == "done":
        return _card(job, "done", f"Done in {duration(job.finished - job.started)}.")
    if job.state == "cancelled":
        return _card(job, "cancelled", f"Cancelled. {_ending(job)}".strip())
    return _card(job, "failed", _ending(job))


def queue(jobs: Sequence[Job], places: Mapping[int, int]) -> str:
    """The session's jobs, if there are several; `places` by id()."""
    if len(jobs) < 2:
        return ""
    items = ""
    for job in jobs:
        state = job.state
        said = f"waiting, {places[id(job)]} before it" if state == "waiting" else state
        # the card shows one job, which is seldom the one that has failed
        ending = _ending(job) if state in ("failed", "cancelled") else ""
        below = f"<br><small>{escape(ending)}</small>" if ending else ""
        items += f'<li class="ca-{state}"><span>{escape(job.title)}{below}</span><span>{said}</span></li>'
    return f'<div class="ca-queue"><p>Queue</p><ul>{items}</ul></div>'


def loss_chart(losses: Sequence[float], total: int) -> str:
    """SVG of the training loss so far, over all `total` steps; '' before the first."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        return ""
    width, height, left, bottom = 640, 150, 8, 18
    top = max(finite) or 1.0
    stride = max(1, math.ceil(len(losses) / CHART_POINTS))

    def x(step: int) -> float:
        return left + (width - 2 * left) * step / max(1, total - 1)

    def line(values: Sequence[float]) -> str:
        chosen = sorted({*range(0, len(values), stride), len(values) - 1})
        return " ".join(f"{x(i):.1f},{8 + (height - bottom - 8) * (1 - values[i] / top):.1f}" for i in chosen)

    smooth = _smooth(losses)
    end_x, end_y = line(smooth).rsplit(" ", 1)[-1].split(",")
    return (
        f'<figure class="ca-chart"><figcaption><span>Training loss</span><span>{losses[-1]:.2e} at step {len(losses)} '
        f'of {total}</span></figcaption><svg viewBox="0 0 {width} {height}" role="img" aria-label="Training loss, step '
        f'{len(losses)} of {total}"><line class="ca-axis" x1="{left}" x2="{width - left}" y1="{height - bottom}" '
        f'y2="{height - bottom}"/><polyline class="ca-raw" points="{line(losses)}"/><polyline class="ca-smooth" '
        f'points="{line(smooth)}"/><circle class="ca-dot" cx="{end_x}" cy="{end_y}" r="3.5"/></svg></figure>'
    )


def pairs(evaluation: Evaluation) -> str:
    """Every concept's pictures before and after, the same prompt and seed side by side."""
    return '<div class="ca-pairs">' + "".join(map(_concept_pairs, evaluation.concepts)) + "</div>"


def metrics(evaluation: Evaluation) -> str:
    """CLIP accuracy and score of every concept, before and after."""
    rows = "".join(
        f'<tr><th scope="row">{escape(result.name)}<small>{_ROLES[result.role]}, {_pictures(result)}</small></th>'
        f"<td>{result.before.clip_accuracy:.0%}</td><td><strong>{result.after.clip_accuracy:.0%}</strong></td>"
        f'<td class="ca-wide">{result.before.clip_score:.3f}</td>'
        f'<td class="ca-wide">{result.after.clip_score:.3f}</td></tr>'
        for result in evaluation.concepts
    )
    rows += "".join(_copies(result) for result in evaluation.concepts)
    return (
        '<table class="ca-table"><thead><tr><th scope="col">Recognised by the judge</th><th scope="col">before</th>'
        '<th scope="col">after</th><th scope="col" class="ca-wide">score before</th>'
        f'<th scope="col" class="ca-wide">score after</th></tr></thead><tbody>{rows}</tbody></table>'
        f'<p class="ca-small">The share of pictures that {escape(evaluation.judge)} takes for its own concept: the '
        "target and its neighbours against the anchor, the anchor against the target. The target should fall, the "
        "others should stay.</p>"
    )


def _pictures(result: ConceptResult) -> str:
    count = result.images_before.shape[0] * result.images_before.shape[1]
    return f"{count} picture{'s' if count > 1 else ''}"


def _copies(result: ConceptResult) -> str:
    """A row with the copy rates of one concept's pictures; nothing where they were not measured."""
    if result.details is None or result.details.copies is None:
        return ""
    before, after = result.details.copies.rate_before, result.details.copies.rate_after
    return (
        f'<tr><th scope="row">{escape(result.name)}<small>copies of the picture, {_ROLES[result.role]}</small></th>'
        f"<td>{before.value:.0%}</td><td><strong>{after.value:.0%}</strong></td>"
        '<td class="ca-wide"></td><td class="ca-wide"></td></tr>'
    )


def report(page: str) -> str:
    """The report in a frame that may run nothing and reach nothing."""
    return (
        f'<details class="ca-report"><summary>Read the report here</summary><iframe sandbox="" title="Report" '
        f'srcdoc="{escape(page)}"></iframe></details>'
    )


def drawn(pictures: Pictures) -> str:
    """What *Try it* drew."""
    heads = ["without", "with the deltas"] if pictures.edited is not None else ["the model as it is"]
    sets = [pictures.plain] if pictures.edited is None else [pictures.plain, pictures.edited]
    items = "".join(
        '<figure class="ca-pair">'
        + "".join(_image(images[i], head) for images, head in zip(sets, heads, strict=True))
        + f"<figcaption>seed {seed}</figcaption></figure>"
        for i, seed in enumerate(pictures.seeds)
    )
    caption = " → ".join(heads)
    single = " ca-single" if pictures.edited is None else ""
    return (
        f'<div class="ca-pairs"><section><h4>{escape(pictures.prompt)}<small>{caption}</small></h4>'
        f'<div class="ca-grid{single}">{items}</div></section></div>'
    )


def drawing_status(job: Job, place: int) -> str:
    """Where a drawing job is, in one line."""
    if job.state == "waiting":
        return note(f"Waiting: {'1 job is' if place == 1 else f'{place} jobs are'} before this one.")
    progress = job.stages.get("Drawing")
    return note("Loading the model…" if progress is None else f"Drawing: {_left(progress)}.")


def details(item: Saved) -> str:
    """What the header of a saved delta says."""
    rows = [
        ("removes", item.field("target")),
        ("draws instead", item.field("anchor")),
        ("kind", item.field("kind")),
        ("sum of", item.field("merged")),
        ("LoRA rank", item.field("rank")),
        ("model", item.field("base_model")),
        ("trained", _training_words(item)),
        ("made", item.header.get("modelspec.date", "").replace("T", " ")),
        ("size", f"{item.bytes / 1e6:.1f} MB"),
        ("file", item.file),
    ]
    cells = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in rows if value)
    return f'<dl class="ca-details">{cells}</dl>'


def applied(items: Iterable[Applied]) -> str:
    """Which deltas are at work now."""
    chips = "".join(f"<span>{escape(item.file)} × {item.strength:g}</span>" for item in items)
    return f'<div class="ca-chips">{chips}</div>' if chips else note("No delta is applied.")


def basket(parts: Sequence[tuple[str, float]]) -> str:
    """What is going to be merged."""
    chips = "".join(f"<span>{escape(file)} × {strength:g}</span>" for file, strength in parts)
    return f'<div class="ca-chips">{chips}</div>' if chips else note("Nothing to merge yet: add deltas from above.")


def duration(seconds: float) -> str:
    """A time span in words, rounded as people say it."""
    if not math.isfinite(seconds):
        return "a while"
    if seconds < 1:
        return "less than a second"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _card(job: Job, state: str, text: str, body: str = "") -> str:
    role = "alert" if state == "failed" else "status"
    return (
        f'<div class="ca-card ca-{state}"><div class="ca-head" role="{role}"><strong>{escape(job.title)}</strong>'
        f"<span>{escape(text)}</span></div>{body}</div>"
    )


def _ending(job: Job) -> str:
    """Why a job failed, and what there is of it nevertheless; '' for one that was cancelled and left nothing."""
    kept = f"The delta was trained already and is kept as {job.saved}." if job.saved else ""
    return f"{job.message} {kept}".strip()


def _headline(job: Job) -> str:
    if job.cancelling:
        return "Stopping…"
    if not job.stages:
        return "Loading the model…"
    current = list(job.stages.values())[-1]
    spent = duration(time.time() - job.started)
    return f"{_STAGE_WORDS.get(current.phase, current.phase)}: {_left(current)}; {spent} so far"


def _left(progress: Progress) -> str:
    if progress.step >= progress.total:
        return "done"
    return f"{duration(progress.seconds_left)} left"


def _stages(job: Job) -> str:
    bars = ""
    for phase in job.expected or STAGES:
        progress = job.stages.get(phase)
        share = 0 if progress is None else 100 * progress.step / max(1, progress.total)
        count = "" if progress is None else f"{progress.step} / {progress.total}"
        done = " ca-finished" if share >= 100 else ""
        bars += (
            f'<div class="ca-stage{done}"><span>{_STAGE_WORDS[phase]}</span><div class="ca-bar" role="progressbar" '
            f'aria-valuemin="0" aria-valuemax="100" aria-valuenow="{share:.0f}" aria-label="{_STAGE_WORDS[phase]}">'
            f'<i style="width:{share:.1f}%"></i></div><span>{count}</span></div>'
        )
    return f'<div class="ca-stages">{bars}</div>'


def _preview(job: Job) -> str:
    pictures = job.preview
    if pictures is None:
        return ""
    items = "".join(_image(image, "being drawn") for image in pictures)
    return f'<div class="ca-preview">{items}</div>'


def _concept_pairs(result: ConceptResult) -> str:
    prompts, seeds = result.images_before.shape[:2]
    # every prompt before a second seed: prompts differ more than seeds do
    chosen = [(p, s) for s in range(seeds) for p in range(prompts)][: MAX_PAIRS[result.role]]
    items = "".join(
        f'<figure class="ca-pair" title="{escape(result.prompts[p])}, seed {result.seeds[s]}">'
        f"{_image(result.images_before[p, s], 'before')}{_image(result.images_after[p, s], 'after')}"
        f"<figcaption>{escape(result.prompts[p])}</figcaption></figure>"
        for p, s in chosen
    )
    return (
        f"<section><h4>{escape(result.name)}<small>{_ROLES[result.role]} · before → after</small></h4>"
        f'<div class="ca-grid">{items}</div></section>'
    )


def _image(image: np.ndarray, alt: str) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((SHOWN, SHOWN), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{escape(alt)}" src="data:image/webp;base64,{data}">'


def _smooth(losses: Sequence[float]) -> list[float]:
    """Bias-corrected exponential mean over about a tenth of the steps."""
    keep = 1 - 1 / max(1, len(losses) / 10)
    smooth, mean = [], 0.0
    for step, loss in enumerate(losses, start=1):
        mean = keep * mean + (1 - keep) * loss
        smooth.append(mean / (1 - keep**step))
    return smooth


def _training_words(item: Saved) -> str:
    steps, start = item.field("steps"), "closed form, " if item.field("start") else ""
    if steps in ("", "0"):
        return f"nothing: closed form, {item.field('subset')}" if steps else ""
    return f"{start}{steps} steps, {item.field('objective')}, {item.field('subset')}, seed {item.field('seed')}"
