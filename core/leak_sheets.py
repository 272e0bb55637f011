"""What a leak scan leaves on the disk, and what it feeds back into another ablation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .errors import AblationError
from .files import replacing, require_writable, write_text
from .leaks import LeakReport, contact_sheet, further_target_prompts, write_leak_report
from .memorized import as_lines, target_prompt_lines


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
