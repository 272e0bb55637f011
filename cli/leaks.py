"""The command `concept-ablation leaks`: prompts that still reach a concept after its ablation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .console import console, progress_bars
from .evidence import concept_of, interval_words, known_words, load_beside, read_originals, recogniser
from .options import (
    AnchorPrompts,
    DeltaFile,
    DetectorToFind,
    Device,
    ImagesAtOnce,
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
    TargetPrompts,
)

if TYPE_CHECKING:
    from ..core.leaks import LeakReport

_SHOWN = 20


def leaks(
    delta: DeltaFile,
    output: Output,
    target: OneTarget = None,
    anchor: OneAnchor = None,
    kind: OneKind = None,
    model: Model = None,
    feed_back: Annotated[
        Path | None, typer.Option(help="Write the leaks to this text file, for --target-prompts of another ablation.")
    ] = None,
    synonym: Annotated[list[str] | None, typer.Option(help="Another name of the target; again for several.")] = None,
    category: Annotated[list[str] | None, typer.Option(help="What the target is one of; again for several.")] = None,
    description: Annotated[
        list[str] | None,
        typer.Option(help="A whole prompt that means the target without naming it; again for several."),
    ] = None,
    style: Annotated[
        list[str] | None, typer.Option(help="A style to ask for the target in; again for several.")
    ] = None,
    neighbour: Annotated[
        list[str] | None, typer.Option(help="What the judge must tell the target from; again for several.")
    ] = None,
    prompts: AnchorPrompts = None,
    target_prompts: TargetPrompts = None,
    each: Annotated[int, typer.Option(help="Most prompts of a sort that are tried.")] = 12,
    seeds: Annotated[int, typer.Option(help="Pictures of every prompt, before and after.")] = 3,
    suspects: Annotated[int, typer.Option(help="Suspicious prompts that are drawn again.")] = 16,
    more_seeds: Annotated[int, typer.Option(help="Pictures of each of those, which alone decide.")] = 12,
    steps: SampleSteps = 25,
    images_at_once: ImagesAtOnce = 16,
    original: OriginalToFind = None,
    copy_detector: DetectorToFind = None,
    judge: JudgeOption = None,
    seed: Seed = 0,
    device: Device = None,
    precision: Precision = "auto",
    prediction: Prediction = None,
) -> None:
    """Search prompts that still reach the target in spite of a delta; writes leaks.json and a sheet for each leak."""
    from dataclasses import replace

    from ..core import delta_file
    from ..core.instruments import load_instruments
    from ..core.leak_sheets import check_feed_back, write_feed_back, write_leaks
    from ..core.leaks import ScanSettings, scan
    from ..core.samplers import SampleSettings

    sample = SampleSettings(steps=steps)
    settings = ScanSettings(each, seeds, suspects, more_seeds, sample=sample, batch=images_at_once, first_seed=seed)
    if feed_back is not None:
        check_feed_back(feed_back)
    edit = delta_file.load(delta)
    concept = concept_of(edit, target, anchor, kind, prompts, target_prompts)
    originals = read_originals([concept.target], concept.kind, original)
    denoiser, referee = load_beside(edit, output, model, judge, device, precision, prediction)
    instruments = load_instruments(copy_detector=copy_detector, originals=originals, device=denoiser.device)
    known = known_words(model, concept.target)
    words = replace(
        known,
        categories=(*(category or ()), *known.categories),
        synonyms=tuple(synonym or ()),
        descriptions=tuple(description or ()),
        styles=tuple(style or ()),
        neighbours=(*(neighbour or ()), *known.neighbours),
    )
    with progress_bars() as on_progress:
        recognise = recogniser(denoiser, referee, concept, instruments, words, settings, on_progress)
        report = scan(denoiser, edit, concept, recognise, settings, words, on_progress)
    sheets = write_leaks(output, report)
    _show(report)
    for text in report.not_tried:
        console.print(f"Not tried: {text}")
    console.print(f"{len(report.leaks)} leaks, {len(sheets)} sheets of pictures: {(output / 'leaks.json').resolve()}")
    if feed_back is not None:
        count = write_feed_back(feed_back, report)
        told = f"{count} prompts for --target-prompts in {feed_back}"
        if not count:
            told = f"no leak, so {feed_back} is what it was" if feed_back.is_file() else f"no leak, so no {feed_back}"
        console.print(f"Feed back: {told}")


def _show(report: LeakReport) -> None:
    table = Table(title=f"Prompts that may reach '{report.concept.target}' (the {_SHOWN} worst)")
    for heading in ("verdict", "prompt", "sort"):
        table.add_column(heading)
    for heading in ("before", "after", "95 % interval"):
        table.add_column(heading, justify="right")
    for one in report.findings[:_SHOWN]:
        shares = f"{one.before.value:.2f}", f"{one.after.value:.2f}", interval_words(one.after)
        table.add_row(one.verdict, one.candidate.prompt, one.candidate.family, *shares)
    console.print(table)
    console.print(
        f"The target's own prompt: {report.target_before.value:.2f} before, {report.target_after.value:.2f} after. "
        f"The anchor's pictures that are taken for the target: {report.false_alarms.value:.2f}."
    )
    if report.caveat:
        console.print(report.caveat, style="yellow")
