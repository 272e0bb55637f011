"""Write what a run leaves for people to read: report.html, report.json, before_after.png and loss.png.

The wording is in `templates/report.html.j2`; this module chooses the pictures and draws the figures. The page is meant
for the holder of the rights in what was removed, so it states what the figures cannot show as plainly as what they do.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from .details import CopyDetails
from .errors import AblationError
from .evaluation import ConceptResult, Evaluation
from .files import replacing, write_json, write_text
from .fonts import load_font
from .phases import Phase
from .report_words import duration, interval, percent
from .statistics import unseen_share

if TYPE_CHECKING:
    from .concept import Concept

NOTICEABLE_POINTS = 10
"""A kept concept whose CLIP accuracy fell by more percentage points than this is flagged."""
PAGE_PAIRS = {"target": 24, "anchor": 8, "surrounding": 8, "misspelled": 8, "composed": 8}
"""At most so many before/after pairs of a concept are shown on the page."""

_ROLE_WORDS = {
    "target": "removed",
    "anchor": "drawn instead",
    "surrounding": "to be kept",
    "misspelled": "removed, misspelled",
    "composed": "in a composition",
}
_PAGE_PIXELS = 320
_TILE_PIXELS, _GRID_COLUMNS = 160, 6
_MARGIN, _GAP, _BLOCK_GAP, _LABEL_WIDTH, _HEADER = 24, 4, 28, 200, 64
_INK, _MUTED, _RULE = "#1f2328", "#666a70", "#d9d6cf"


@dataclass(frozen=True)
class DeltaInfo:
    """What identifies a delta file."""

    file: str
    """Name without its folder."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ReportInputs:
    """All that a report is made of."""

    evaluation: Evaluation
    concepts: tuple[Concept, ...]
    delta: DeltaInfo | None
    """None for an edit that is in no delta file, such as a checkpoint that was edited by another program."""
    losses: tuple[float, ...]
    """Training loss of every step; empty for an edit that took no training."""
    seconds: dict[str, float]
    """Seconds by phase, without those of the evaluation."""
    settings: dict[str, object]
    model: str
    """Name or path of the edited model, as the reader knows it."""
    phases: tuple[Phase, ...] = ()
    """What making the delta cost, by phase; empty if another run made it."""


@dataclass(frozen=True)
class _Pair:
    """One prompt and seed, drawn by both models; the pictures are data URIs."""

    seed: int
    before: str
    after: str


@dataclass(frozen=True)
class _ConceptView:
    """A `ConceptResult` as the page shows it."""

    result: ConceptResult
    pictures: int
    """Number of measured pictures on either side."""
    shown: int
    rows: list[tuple[str, list[_Pair]]]
    """Pairs by prompt."""
    fell: float
    """Fall of the CLIP accuracy in percentage points; below 0 if it rose."""

    @property
    def changed(self) -> bool:
        """Whether it fell noticeably."""
        return self.fell > NOTICEABLE_POINTS

    @property
    def copies(self) -> CopyDetails | None:
        """None where they were not looked for."""
        return None if self.result.details is None else self.result.details.copies


def delta_info(path: Path) -> DeltaInfo:
    """Size and SHA-256 of the file at `path`.

    Raises:
        AblationError: it cannot be read.
    """
    try:
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                size += len(block)
        return DeltaInfo(path.name, size, digest.hexdigest())
    except OSError as error:
        raise AblationError(f"Cannot read the delta file {path} ({error.strerror}): check the path.") from error


def write_report(directory: Path, inputs: ReportInputs) -> Path:
    """Write report.json, before_after.png, loss.png (if there are losses) and, last, report.html into `directory`.

    Everything is rendered before the first file is written, and each file appears whole or not at all.

    Returns:
        The path of report.html.

    Raises:
        AblationError: `directory` cannot be written, or the disk is full.
        ValueError: a result names an ablation that is not in `inputs.concepts`, or an ablation has no target result.
    """
    _check(inputs)
    grid = _encode(before_after_grid(inputs.evaluation), "PNG")
    loss = loss_plot(inputs.losses) if inputs.losses else None
    page = _page(inputs, loss)
    write_json(directory / "report.json", _summary(inputs))
    _write_bytes(directory / "before_after.png", grid)
    if loss is not None:
        _write_bytes(directory / "loss.png", loss)
    write_text(directory / "report.html", page)
    return directory / "report.html"


def before_after_grid(evaluation: Evaluation) -> Image.Image:
    """Draw every concept's pictures before (left) and after (right) the edit, with the same seeds in the same places:
    those of its first prompt with its first seeds, six at most.

    Args:
        evaluation: at least one concept.

    Returns:
        RGB; pictures longer than 160 pixels are scaled down to that.
    """
    results = evaluation.concepts
    columns = min(_GRID_COLUMNS, max(len(result.seeds) for result in results))
    longest = max(max(result.images_before.shape[2:4]) for result in results)
    tile = min(longest, _TILE_PIXELS)
    side = columns * (tile + _GAP) - _GAP
    lefts = (_MARGIN + _LABEL_WIDTH, _MARGIN + _LABEL_WIDTH + side + _BLOCK_GAP)
    row_height = max(tile, 104) + 3 * _GAP
    size = (lefts[1] + side + _MARGIN, _MARGIN + _HEADER + len(results) * row_height + _MARGIN)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    _header(draw, lefts, side)
    for row, result in enumerate(results):
        top = _MARGIN + _HEADER + row * row_height
        draw.line((_MARGIN, top - 2 * _GAP, size[0] - _MARGIN, top - 2 * _GAP), fill=_RULE)
        _label(draw, top, result)
        for left, images in zip(lefts, (result.images_before, result.images_after), strict=True):
            for column, image in enumerate(images[0, :columns]):
                canvas.paste(_shrink(image, tile), (left + column * (tile + _GAP), top))
    return canvas


def loss_plot(losses: Sequence[float]) -> bytes:
    """PNG of the loss [steps >= 1] and of its bias-corrected exponential mean over about a twentieth of the steps."""
    keep = 1 - 1 / max(1, len(losses) / 20)
    smooth, mean = [], 0.0
    for step, loss in enumerate(losses, start=1):
        mean = keep * mean + (1 - keep) * loss
        smooth.append(mean / (1 - keep**step))
    figure = Figure(figsize=(8, 3), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="#b9c4c6", linewidth=1, label="each step", marker="." if len(losses) == 1 else None)
    axes.plot(steps, smooth, color="#2a6467", linewidth=1.8, label="smoothed")
    axes.set_xlabel("training step")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _check(inputs: ReportInputs) -> None:
    targets = {concept.target for concept in inputs.concepts}
    results = inputs.evaluation.concepts
    if unknown := {result.ablation for result in results} - targets:
        raise ValueError(f"results of ablations that were not made: {sorted(unknown)}")
    if missing := targets - {result.ablation for result in results if result.role == "target"}:
        raise ValueError(f"no result for the target of: {sorted(missing)}")


def _summary(inputs: ReportInputs) -> dict[str, object]:
    evaluation = inputs.evaluation
    concepts = [
        {
            "name": result.name,
            "role": result.role,
            "ablation": result.ablation,
            "before": asdict(result.before),
            "after": asdict(result.after),
            "details": None if result.details is None else asdict(result.details),
            **({} if result.composition is None else {"composition": asdict(result.composition)}),
        }
        for result in evaluation.concepts
    ]
    summary = {
        "concepts": concepts,
        "seconds": {**evaluation.seconds, **inputs.seconds},
        "phases": [asdict(phase) for phase in inputs.phases],
        "delta": None if inputs.delta is None else asdict(inputs.delta),
        "settings": {**inputs.settings, "evaluation": evaluation.settings},
        "judge": evaluation.judge,
        "model": inputs.model,
        "ablations": [{"target": item.target, "anchor": item.anchor, "kind": item.kind} for item in inputs.concepts],
    }
    return _plain(summary)


def _plain(value: object) -> object:
    """`value` as JSON knows it: numbers that JSON lacks become null, and anything else that it lacks becomes text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _page(inputs: ReportInputs, loss: bytes | None) -> str:
    # No undefined name may turn into an empty gap in a statement that people rely on.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates", encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "duration": duration, "unseen": unseen_share, "range": interval}
    views = [_view(result) for result in inputs.evaluation.concepts]
    sections = [(concept, _members(views, concept.target)) for concept in inputs.concepts]
    return environment.get_template("report.html.j2").render(
        sections=sections,
        inputs=inputs,
        seconds={**inputs.evaluation.seconds, **inputs.seconds},
        settings=_plain(inputs.settings),
        evaluation_settings=_plain(inputs.evaluation.settings),
        noticeable=NOTICEABLE_POINTS,
        loss=None if loss is None else _data_uri(loss, "png"),
    )


def _members(views: Sequence[_ConceptView], ablation: str) -> dict[str, object]:
    members = [view for view in views if view.result.ablation == ablation]
    return {
        "target": next(view for view in members if view.result.role == "target"),
        "kept": [view for view in members if view.result.role == "anchor"]
        + [view for view in members if view.result.role == "surrounding"],
        "misspelled": [view for view in members if view.result.role == "misspelled"],
        "composed": [view for view in members if view.result.role == "composed"],
    }


def _view(result: ConceptResult) -> _ConceptView:
    prompts, seeds = result.images_before.shape[:2]
    # The first seeds of the first prompts: no picture is chosen for what it shows.
    limit = PAGE_PAIRS[result.role]
    rows = [
        (result.prompts[prompt], [_pair(result, prompt, seed) for seed in range(min(seeds, max(1, limit // prompts)))])
        for prompt in range(min(prompts, limit))
    ]
    return _ConceptView(
        result,
        pictures=prompts * seeds,
        shown=sum(len(pairs) for _, pairs in rows),
        rows=rows,
        # Rounded, because 0.8 - 0.7 is a little more than 10 points in binary.
        fell=round(100 * (result.before.clip_accuracy - result.after.clip_accuracy), 6),
    )


def _pair(result: ConceptResult, prompt: int, seed: int) -> _Pair:
    before, after = (_picture(images[prompt, seed]) for images in (result.images_before, result.images_after))
    return _Pair(result.seeds[seed], before, after)


def _picture(image: np.ndarray) -> str:
    return _data_uri(_encode(_shrink(image, _PAGE_PIXELS), "WEBP"), "webp")


def _shrink(image: np.ndarray, longest: int) -> Image.Image:
    picture = Image.fromarray(image)
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return picture


def _encode(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **({"quality": 88} if form == "WEBP" else {}))
    return buffer.getvalue()


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _write_bytes(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def _header(draw: ImageDraw.ImageDraw, lefts: tuple[int, int], side: int) -> None:
    draw.text((_MARGIN, _MARGIN - 4), "Same prompts, same random seeds", _MUTED, load_font(13))
    for left, title in zip(lefts, ("Before", "After"), strict=True):
        draw.text((left + side / 2, _MARGIN + _HEADER - 2 * _GAP - 8), title, _INK, load_font(17, "-Bold"), anchor="ms")


def _label(draw: ImageDraw.ImageDraw, top: int, result: ConceptResult) -> None:
    parts = (
        (result.name, load_font(15, "-Bold"), _INK, 2, 20),
        (_ROLE_WORDS[result.role], load_font(12), _INK, 1, 20),
        (f"“{result.prompts[0]}”", load_font(11, "-Oblique"), _MUTED, 2, 15),
    )
    for text, font, colour, lines, height in parts:
        for line in _wrap(text, font, _LABEL_WIDTH - 16, lines):
            draw.text((_MARGIN, top), line, colour, font)
            top += height


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """`text` in at most `lines` lines of `width` pixels; what does not fit ends in an ellipsis."""
    wrapped = [""]
    for word in text.split():
        longer = f"{wrapped[-1]} {word}".strip()
        if font.getlength(longer) <= width or not wrapped[-1]:
            wrapped[-1] = longer
        else:
            wrapped.append(word)
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], " ".join(wrapped[lines - 1 :])]
    return [_cut(line, font, width) for line in wrapped]


def _cut(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line.rstrip() + "…"
