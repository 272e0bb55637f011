"""What the commands that measure print at the end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from .core.details import ConceptDetails
    from .core.evaluation import Evaluation


def print_evaluation(found: Evaluation, output: Path, console: Console) -> None:
    """Print the accuracies before and after, and where the report is."""
    table = Table(title=f"CLIP accuracy, {found.judge}")
    for heading in ("ablation", "concept", "role"):
        table.add_column(heading)
    for heading in ("before", "after", "95 % interval"):
        table.add_column(heading, justify="right")
    for row in found.concepts:
        figures = f"{row.before.clip_accuracy:.2f}", f"{row.after.clip_accuracy:.2f}"
        table.add_row(row.ablation, row.name, row.role, *figures, _interval(row.details))
    console.print(table)
    console.print(f"Report: {(output / 'report.html').resolve()}", soft_wrap=True)


def _interval(details: ConceptDetails | None) -> str:
    """Where the accuracy after the edit lies, as far as so few prompts can say."""
    if details is None or math.isnan(details.accuracy_after.low):
        return "–"
    return f"{details.accuracy_after.low:.2f} to {details.accuracy_after.high:.2f}"
