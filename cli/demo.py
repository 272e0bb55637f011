"""`concept-ablation demo`: what the README shows, on the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import progress_bars
from .inputs import load_with_judge
from .output import print_evaluation


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("outputs/demo"),
) -> None:
    """Remove 'tropical fish' and the style 'twemoji' from the embedded model, on a CPU, in minutes."""
    from ..core.ablation import Task, ablate_and_report
    from ..core.concept import Concept
    from ..core.evaluation import EvaluationSettings
    from ..core.presets import recipe
    from ..core.samplers import SampleSettings

    tasks = (
        Task(Concept("tropical fish", "fish"), ("blowfish", "shark", "octopus", "cat")),
        Task(Concept("twemoji", "emoji", "style"), ("noto", "fluent", "flat", "blob")),
    )
    evaluation = EvaluationSettings(prompts=4, seeds=4, sample=SampleSettings(steps=15))
    denoiser, referee = load_with_judge(None, None, None, "auto", None)
    with progress_bars() as on_progress:
        chosen = recipe("balanced", denoiser, concepts=[task.concept for task in tasks])
        found = ablate_and_report(denoiser, tasks, chosen, referee, evaluation, output, on_progress)
    print_evaluation(found, output)
