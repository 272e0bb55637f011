"""Where the commands print: one console, and its progress bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from ..core.progress import Progress, ProgressCallback

console = Console(markup=False, emoji=False, soft_wrap=True)


@contextmanager
def progress_bars() -> Iterator[ProgressCallback]:
    """A progress bar for each phase of a run."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, TextColumn("{task.fields[loss]}"), console=console) as bar:
        bars: dict[str, Any] = {}

        def show(progress: Progress) -> None:
            if progress.phase not in bars:
                bars[progress.phase] = bar.add_task(progress.phase, total=progress.total, loss="")
            loss = "" if progress.loss is None else f"loss {progress.loss:.2e}"
            bar.update(bars[progress.phase], completed=progress.step, loss=loss)

        yield show
