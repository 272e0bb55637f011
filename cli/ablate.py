"""`concept-ablation ablate`: train a delta, measure it, write the report."""

from __future__ import annotations

from functools import partial

from ..core.errors import AblationError
from .console import console, progress_bars
from .evidence import AnchorSearch, read_originals
from .inputs import load_with_judge, make_tasks
from .options import (
    AnchorPrompts,
    AutoPreserve,
    Batch,
    Checkpointing,
    Composition,
    Detector,
    Device,
    Endpoint,
    EndpointModel,
    EvalPrompts,
    EvalSeeds,
    Images,
    ImagesAtOnce,
    Inception,
    JudgeOption,
    KindOption,
    LearningRate,
    Misspellings,
    Model,
    NegativeGuidance,
    Objective,
    Original,
    Output,
    ParaphrasesFile,
    Precision,
    Prediction,
    Preset,
    Profile,
    Rank,
    Seed,
    SomeAnchors,
    Subset,
    Surrounding,
    TargetPrompts,
    Targets,
    TrainSteps,
)
from .output import print_evaluation
from .processes import on_processes


@on_processes(console)
def ablate(
    target: Targets,
    output: Output,
    anchor: SomeAnchors = None,
    model: Model = None,
    kind: KindOption = "instance",
    preset: Preset = "balanced",
    objective: Objective = None,
    subset: Subset = None,
    surrounding: Surrounding = None,
    auto_preserve: AutoPreserve = None,
    negative_guidance: NegativeGuidance = None,
    prompts: AnchorPrompts = None,
    target_prompts: TargetPrompts = None,
    steps: TrainSteps = None,
    learning_rate: LearningRate = None,
    batch: Batch = None,
    images: Images = None,
    rank: Rank = None,
    checkpointing: Checkpointing = False,
    images_at_once: ImagesAtOnce = 16,
    profile: Profile = None,
    eval_prompts: EvalPrompts = 5,
    eval_seeds: EvalSeeds = 4,
    misspellings: Misspellings = 0,
    composition: Composition = False,
    original: Original = None,
    copy_detector: Detector = None,
    paraphrases_file: ParaphrasesFile = None,
    llm_endpoint: Endpoint = None,
    llm_model: EndpointModel = None,
    inception: Inception = None,
    judge: JudgeOption = None,
    seed: Seed = 0,
    device: Device = None,
    precision: Precision = "auto",
    prediction: Prediction = None,
) -> None:
    """Remove concepts from a model: writes delta.safetensors, report.html, report.json and pictures to --output."""
    from ..core.ablation import ablate_and_report, check_tasks
    from ..core.evaluation import EvaluationSettings
    from ..core.files import require_writable
    from ..core.instruments import load_instruments
    from ..core.presets import TRAINED, recipe
    from ..core.profiling import profiled
    from ..core.subsets import check_subset

    originals = read_originals(target, kind, original)
    search = AnchorSearch.asked_for(target, anchor, surrounding, originals, paraphrases_file, llm_endpoint, llm_model)
    if search and (prompts or target_prompts):
        raise AblationError(
            "--prompts and --target-prompts stand in the place of the search for captions: name what is drawn instead, "
            "too, with --anchor."
        )
    tasks = () if search else make_tasks(target, anchor or (), kind, surrounding, prompts, target_prompts)
    evaluation = EvaluationSettings(
        prompts=eval_prompts,
        seeds=eval_seeds,
        batch=images_at_once,
        misspellings=misspellings,
        composition=composition,
    )
    sizes = {"steps": steps, "batch": batch, "rank": rank, "checkpointing": checkpointing or None}
    training = {**sizes, "learning_rate": learning_rate}
    drawn = {"images": images, "batch": images_at_once if preset in TRAINED else None}
    asked = partial(
        recipe,
        preset,
        kind=kind,
        concepts=[task.concept for task in tasks],
        objective=objective,
        subset=subset,
        seed=seed,
        training={name: value for name, value in training.items() if value is not None},
        dataset={name: value for name, value in drawn.items() if value is not None},
        auto_preserve=auto_preserve,
        negative_guidance=negative_guidance,
    )
    # what can be refused is refused before a model is loaded, or downloaded
    check_subset(asked(denoiser=None).subset)
    check_tasks(tasks)
    require_writable(output)
    denoiser, referee = load_with_judge(model, judge, device, precision, prediction)
    chosen = asked(denoiser=denoiser)
    measuring = {"copy_detector": copy_detector, "inception": inception, "originals": originals}
    instruments = load_instruments(**measuring, device=denoiser.device)
    with progress_bars() as bars, profiled(profile, bars, chosen.training) as on_progress:
        tasks = search.run(denoiser, instruments, output, on_progress) if search else tasks
        found = ablate_and_report(
            denoiser, tasks, chosen, referee, evaluation, output, on_progress, instruments=instruments
        )
    print_evaluation(found, output)
