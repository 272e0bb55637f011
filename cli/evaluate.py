"""The command `concept-ablation evaluate`: what a delta does, measured on held-out prompts."""

from __future__ import annotations

from .console import progress_bars
from .evidence import load_beside, read_originals
from .inputs import make_tasks
from .options import (
    AnchorPrompts,
    Anchors,
    Composition,
    DeltaFile,
    Detector,
    Device,
    EvalPrompts,
    EvalSeeds,
    ImagesAtOnce,
    Inception,
    JudgeOption,
    KindOption,
    Measured,
    Misspellings,
    Model,
    Original,
    Output,
    Precision,
    Prediction,
    Seed,
    TargetPrompts,
    Targets,
)
from .output import print_evaluation


def evaluate(
    delta: DeltaFile,
    target: Targets,
    anchor: Anchors,
    output: Output,
    model: Model = None,
    kind: KindOption = "instance",
    surrounding: Measured = None,
    prompts: AnchorPrompts = None,
    target_prompts: TargetPrompts = None,
    eval_prompts: EvalPrompts = 10,
    eval_seeds: EvalSeeds = 8,
    misspellings: Misspellings = 0,
    composition: Composition = False,
    original: Original = None,
    copy_detector: Detector = None,
    inception: Inception = None,
    images_at_once: ImagesAtOnce = 16,
    judge: JudgeOption = None,
    seed: Seed = 0,
    device: Device = None,
    precision: Precision = "auto",
    prediction: Prediction = None,
) -> None:
    """Measure a delta: the same held-out prompts and seeds before and after, judged by CLIP; writes a report."""
    from ..core import delta_file
    from ..core.ablation import report_inputs
    from ..core.evaluation import EvaluationSettings
    from ..core.evaluation import evaluate as measure
    from ..core.instruments import load_instruments
    from ..core.report import write_report

    tasks = make_tasks(target, anchor, kind, surrounding, prompts, target_prompts)
    settings = EvaluationSettings(
        prompts=eval_prompts,
        seeds=eval_seeds,
        first_seed=seed,
        batch=images_at_once,
        misspellings=misspellings,
        composition=composition,
    )
    originals = read_originals(target, kind, original)
    edit = delta_file.load(delta)
    denoiser, referee = load_beside(edit, output, model, judge, device, precision, prediction)
    instruments = load_instruments(
        copy_detector=copy_detector, inception=inception, originals=originals, device=denoiser.device
    )
    with progress_bars() as on_progress:
        concepts, names = [task.concept for task in tasks], [task.surrounding for task in tasks]
        found = measure(denoiser, edit, concepts, names, referee, settings, on_progress, instruments)
    write_report(output, report_inputs(denoiser, tasks, delta, found))
    print_evaluation(found, output)
