"""What a leak scan leaves on the disk, and what it feeds back into another ablation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw

from .errors import AblationError
from .files import replacing, require_writable, write_json, write_text
from .fonts import load_font
from .leaks import LeakReport, further_target_prompts, summary
from .memorized import as_lines, target_prompt_lines

_TILE, _GAP, _MARGIN, _LINE = 128, 4, 16, 22


def write_leaks(folder: Path, report: LeakReport) -> list[Path]:
    """Write leaks.json, leaks.png (the worst findings) and a contact sheet `leak_NN.png` for each leak whose pictures
    were kept, the worst first.

    Returns:
        The sheets of the leaks.

    Raises:
        AblationError: `folder` cannot be written, or the disk is full.
    """
    sheets = []
    # an earlier scan may have found more
    for old in (folder / "leaks.png", *folder.glob("leak_[0-9]*.png")):
        old.unlink(missing_ok=True)
    for number, finding in enumerate(report.leaks, start=1):
        if finding.images_after is None:
            continue
        path = folder / f"leak_{number:02d}.png"
        with replacing(path) as temporary:
            contact_sheet(replace(report, findings=(finding,)), columns=len(finding.images_after)).save(temporary)
        sheets.append(path)
    write_leak_report(folder, report)
    return sheets


def write_leak_report(folder: Path, report: LeakReport) -> Path:
    """Write leaks.png, if any finding has pictures, and leaks.json into `folder`.

    Returns:
        The path of leaks.json.

    Raises:
        AblationError: `folder` cannot be written, or the disk is full.
    """
    if any(finding.images_after is not None for finding in report.findings):
        with replacing(folder / "leaks.png") as temporary:
            contact_sheet(report).save(temporary)
    write_json(folder / "leaks.json", summary(report))
    return folder / "leaks.json"


def contact_sheet(report: LeakReport, columns: int = 5) -> Image.Image:
    """The first pictures of every finding that has some: before (left) and after (right), with the same seeds."""
    rows = [one for one in report.findings if one.images_before is not None and one.images_after is not None]
    columns = min(columns, max((len(one.images_after) for one in rows), default=0))
    side = columns * (_TILE + _GAP)
    height = _TILE + _LINE + 2 * _GAP
    canvas = Image.new("RGB", (max(2 * side + 3 * _MARGIN, 480), len(rows) * height + 2 * _MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    font = load_font(12)
    for row, one in enumerate(rows):
        top = _MARGIN + row * height
        shares = f"before {one.before.value:.0%}, after {one.after.value:.0%}"
        text = f"{one.verdict}: {shares} ({one.candidate.family}) {one.candidate.prompt}"
        draw.text((_MARGIN, top), text, "black", font)
        for left, images in ((_MARGIN, one.images_before), (2 * _MARGIN + side, one.images_after)):
            for column, image in enumerate(images[:columns]):
                picture = Image.fromarray(image)
                picture.thumbnail((_TILE, _TILE), Image.Resampling.LANCZOS)
                canvas.paste(picture, (left + column * (_TILE + _GAP), top + _LINE))
    return canvas


def write_feed_back(path: Path, report: LeakReport) -> int:
    """Write the leaks as a file of further target prompts, which another ablation takes; without a leak, nothing.

    Returns:
        How many there are.

    Raises:
        AblationError: the file cannot be written.
    """
    lines = feed_back_lines(report)
    if lines:
        write_text(path, as_lines(lines))
    return len(lines)


def feed_back_lines(report: LeakReport) -> tuple[str, ...]:
    """The leaks as `Concept.target_prompts` has them."""
    return target_prompt_lines(further_target_prompts(report), report.concept.kind)


def check_feed_back(path: Path) -> None:
    """Raise AblationError unless `path` can be written as a text file."""
    if path.is_dir():
        raise AblationError(f"{path} is a folder: give the name of a text file for the prompts that were found.")
    require_writable(path.parent)
