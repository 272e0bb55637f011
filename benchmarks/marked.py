"""Text that a program keeps up to date in a file that people write."""

from __future__ import annotations

from pathlib import Path

from concept_ablation.core.files import write_text


def put(path: Path, markers: tuple[str, str], content: str, heading: str) -> None:
    """Replace what stands between the two markers in a file; one without them gets a section at its end.

    Args:
        heading: of that section.

    Raises:
        ValueError: only one of the markers is there, or one of them twice.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    begin, end = markers
    block = f"{begin}\n{content}\n{end}"
    if begin not in text and end not in text:
        write_text(path, f"{text.rstrip()}\n\n{heading}\n\n{block}\n".lstrip())
        return
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"expected {begin} and {end} once each in {path.name}")
    head, rest = text.split(begin)
    write_text(path, f"{head}{block}{rest.split(end)[1]}")
