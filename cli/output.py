"""What the commands that measure print at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from .console import console
from .evidence import interval_words, show_evidence

if TYPE_CHECKING:
    from ..core.details import ConceptDetails
    from ..core.evaluation import Evaluation


def print_evaluation(found: Evaluation, output: Path) -> None:
    """Print the accuracies before and after, what else was measured, and where the report is."""
    table = Table(title=f"CLIP accuracy, {found.judge}")
    for heading in ("ablation", "concept", "role"):
        table.add_column(heading)
    for heading in ("before", "after", "95 % interval"):
        table.add_column(heading, justify="right")
    for row in found.concepts:
        figures = f"{row.before.clip_accuracy:.2f}", f"{row.after.clip_accuracy:.2f}"
        table.add_row(row.ablation, row.name, row.role, *figures, _interval(row.details))
    console.print(table)
    show_evidence(found)
    console.print(f"Report: {(output / 'report.html').resolve()}", soft_wrap=True)


def _interval(details: ConceptDetails | None) -> str:
    """Where the accuracy after the edit lies, as far as so few prompts can say."""
    return "–" if details is None else interval_words(details.accuracy_after)
