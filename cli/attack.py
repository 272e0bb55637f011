"""The command `concept-ablation attack`: how hard it is to bring an ablated concept back by an optimised prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..core.errors import AblationError
from .console import console, progress_bars
from .evidence import concept_of, interval_words, known_words, load_beside, read_originals, recogniser
from .options import (
    DetectorToFind,
    Device,
    JudgeOption,
    Model,
    OneAnchor,
    OneKind,
    OneTarget,
    OriginalToFind,
    Output,
    Precision,
    Prediction,
    SampleSteps,
    Seed,
)

if TYPE_CHECKING:
    from ..core.attack import AttackReport


def attack(
    delta: Annotated[list[Path], typer.Option(help="The delta file; again for several edits of the same concept.")],
    output: Output,
    target: OneTarget = None,
    anchor: OneAnchor = None,
    kind: OneKind = None,
    model: Model = None,
    budget: Annotated[
        str, typer.Option(help="Optimisation steps after which success is measured, rising, by commas.")
    ] = "0,50,100,200,400",
    images: Annotated[int, typer.Option(help="Pictures of the target that the attacker has.")] = 16,
    learning_rate: Annotated[
        float, typer.Option(help="Of Adam, in units of the token embeddings' root mean square.")
    ] = 0.3,
    batch: Annotated[int, typer.Option(help="Pictures in a step.")] = 4,
    eval_prompts: Annotated[int, typer.Option(help="Prompts that the learnt word is drawn in.")] = 4,
    eval_seeds: Annotated[int, typer.Option(help="Pictures of each of these prompts.")] = 4,
    steps: SampleSteps = 25,
    original: OriginalToFind = None,
    copy_detector: DetectorToFind = None,
    judge: JudgeOption = None,
    seed: Seed = 0,
    device: Device = None,
    precision: Precision = "auto",
    prediction: Prediction = None,
) -> None:
    """Attack an edit by textual inversion: success against budget, beside the pretrained model; writes attack.json."""
    from ..core import delta_file
    from ..core.attack import AttackSettings, attack_score
    from ..core.attack_report import write_attack
    from ..core.instruments import load_instruments
    from ..core.leaks import ScanSettings
    from ..core.samplers import SampleSettings

    sample = SampleSettings(steps=steps)
    settings = AttackSettings(
        _checkpoints(budget), learning_rate, batch, images, eval_prompts, eval_seeds, sample, seed=seed
    )
    names = _names(delta)
    edits = {name: delta_file.load(path) for name, path in zip(names, delta, strict=True)}
    first = edits[names[0]]
    concept = concept_of(first, target, anchor, kind)
    originals = read_originals([concept.target], concept.kind, original)
    denoiser, referee = load_beside(first, output, model, judge, device, precision, prediction)
    instruments = load_instruments(copy_detector=copy_detector, originals=originals, device=denoiser.device)
    with progress_bars() as on_progress:
        # the judge's pictures of the target have seeds of their own, far from those of the attack
        looks = ScanSettings(sample=sample, first_seed=seed + 2_000_000)
        words = known_words(model, concept.target)
        recognise = recogniser(denoiser, referee, concept, instruments, words, looks, on_progress)
        report = attack_score(denoiser, edits, concept, recognise, settings, on_progress=on_progress)
    path = write_attack(output, report)
    _show(report)
    console.print(f"Figures and plot: {path.resolve()}")


def _names(paths: Sequence[Path]) -> list[str]:
    """What to call the edits: their files' names, or their folders', for `ablate` calls every file alike."""
    for names in ([path.stem for path in paths], [path.resolve().parent.name for path in paths]):
        if len(set(names)) == len(names):
            return names
    raise AblationError("Two deltas have the same name, as files and as folders: rename one, to tell them apart.")


def _checkpoints(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise AblationError(f"The budget must be whole numbers by commas, such as 0,50,100, not '{text}'.") from None


def _show(report: AttackReport) -> None:
    table = Table(title=f"Pictures of the learnt word that show '{report.concept.target}'")
    table.add_column("steps", justify="right")
    for name in report.curves:
        table.add_column(name, justify="right")
    for points in zip(*(curve.checkpoints for curve in report.curves.values()), strict=True):
        shares = [f"{point.success.value:.2f} ({interval_words(point.success)})" for point in points]
        table.add_row(str(points[0].steps), *shares)
    console.print(table)
