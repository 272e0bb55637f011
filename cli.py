"""The command line: `concept-ablation ablate | evaluate | leaks | attack | sample | merge | export | compress | ...`.

Arguments in, one call of `core` out, a table at the end. Exit codes: 0 done, 1 a task of a sweep failed,
2 bad input, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from .attack_cli import attack
from .bench_cli import bench
from .cli_console import console, progress_bars
from .cli_inputs import load_model, load_with_judge, make_tasks, require_safetensors, with_strength
from .cli_options import (
    AnchorPrompts,
    AutoPreserve,
    Composition,
    Detector,
    Device,
    Endpoint,
    EndpointModel,
    EvalPrompts,
    EvalSeeds,
    ImagesAtOnce,
    Inception,
    JudgeOption,
    KindOption,
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
    Seed,
    SomeAnchors,
    Subset,
    Surrounding,
    TargetPrompts,
    Targets,
)
from .cli_output import print_evaluation
from .cli_processes import on_processes
from .compress_cli import compress
from .core.errors import AblationError, is_out_of_memory
from .evaluate_cli import evaluate
from .evidence_cli import AnchorSearch, read_originals
from .leaks_cli import leaks
from .sweep_cli import sweep
from .web.app import ui

OUT_OF_MEMORY = (
    "Out of memory: lower --images-at-once (in sample and attack --batch); in training lower --batch, add "
    "--checkpointing, or choose a smaller subset."
)

_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
"""Of a path that cannot even be looked at."""

app = typer.Typer(
    help="Make a text-to-image model stop drawing a concept, and save the edit as a delta that loads like a LoRA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command(epilog="On several GPUs or machines: accelerate launch -m concept_ablation.cli ablate ..., or torchrun.")
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
    steps: Annotated[int | None, typer.Option(help="Training steps.", show_default="the preset's")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate.", show_default="the preset's")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows a training step.", show_default="the preset's")] = None,
    images: Annotated[
        int | None, typer.Option(help="Images (of fast: samplings) to train on.", show_default="the preset's")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Train a LoRA of this rank, not whole matrices.")] = None,
    checkpointing: Annotated[bool, typer.Option(help="Less memory, about a third more time.")] = False,
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
    from .core.ablation import ablate_and_report, check_tasks
    from .core.evaluation import EvaluationSettings
    from .core.files import require_writable
    from .core.instruments import load_instruments
    from .core.presets import TRAINED, recipe
    from .core.profiling import profiled
    from .core.subsets import check_subset

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


@app.command()
def sample(
    prompt: Annotated[list[str], typer.Option(help="What to draw; give it again for several.")],
    output: Output,
    model: Model = None,
    delta: Annotated[
        list[str] | None, typer.Option(help="Delta file to apply, with :STRENGTH if not 1; give it again for several.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images for each prompt, with consecutive seeds.")] = 1,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 25,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 is none.")] = 4.0,
    sampler: Annotated[str, typer.Option(help="ddim, euler, euler_ancestral or dpmpp_2m.")] = "ddim",
    eta: Annotated[float, typer.Option(help="Fresh noise in ddim and euler_ancestral: 0 none, 1 DDPM.")] = 1.0,
    schedule: Annotated[str, typer.Option(help="Noise levels: timestep or karras.")] = "timestep",
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    batch: Annotated[int, typer.Option(min=1, help="Images drawn at once.")] = 16,
    seed: Seed = 0,
    device: Device = None,
    precision: Precision = "auto",
    prediction: Prediction = None,
) -> None:
    """Draw pictures with a model and any number of deltas; writes <prompt index>_<seed>.png files to --output."""
    from contextlib import ExitStack

    from PIL import Image

    from .core import delta_file
    from .core.files import replacing, require_writable
    from .core.progress import Reporter
    from .core.samplers import SampleSettings, draw_images

    settings = SampleSettings(steps, guidance, sampler, eta, schedule, negative)
    edits = [(delta_file.load(path), strength) for path, strength in map(with_strength, delta or [])]
    require_writable(output)
    denoiser = load_model(model, device, precision, prediction)
    requests = [(index, text, seed + i) for index, text in enumerate(prompt) for i in range(count)]
    with ExitStack() as stack:
        on_progress = stack.enter_context(progress_bars())
        for edit, strength in edits:
            stack.enter_context(edit.attach(denoiser, strength))
        reporter = Reporter(on_progress, "Drawing", len(requests) * steps)
        texts, seeds = [text for _, text, _ in requests], [number for _, _, number in requests]
        images = draw_images(denoiser, texts, seeds, settings, batch=batch, reporter=reporter)
    for (index, _, number), image in zip(requests, images, strict=True):
        with replacing(output / f"{index}_{number}.png") as temporary:
            Image.fromarray(image).save(temporary)
    console.print(f"{len(images)} images in {output}")


@app.command()
def merge(
    delta: Annotated[list[str], typer.Option(help="Delta file, with :STRENGTH if not 1; give it again for several.")],
    output: Annotated[Path, typer.Option(help="The merged .safetensors file.")],
) -> None:
    """Add deltas of the same model up into one file."""
    from .core import delta_file
    from .core.delta import merge as add

    parts = [with_strength(text) for text in delta]
    require_safetensors(output, *(path for path, _ in parts))
    total = add((delta_file.load(path), strength) for path, strength in parts)
    delta_file.save(total, output)
    console.print(f"{output}: {len(total.layers)} layers, {output.stat().st_size / 1e6:.1f} MB")


@app.command()
def export(
    delta: Annotated[Path, typer.Option(help="The delta file.")],
    rank: Annotated[int, typer.Option(help="Rank of the LoRA.")],
    output: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
) -> None:
    """Compress a delta to a LoRA of a chosen rank and say how much of it is kept."""
    from .core import delta_file
    from .core.delta import to_lora

    require_safetensors(output, delta)
    lora, kept = to_lora(delta_file.load(delta), rank)
    delta_file.save(lora, output)
    console.print(f"{output}: rank {rank}, {output.stat().st_size / 1e6:.1f} MB, {kept:.1%} of the energy kept")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("outputs/demo"),
) -> None:
    """Remove 'tropical fish' and the style 'twemoji' from the embedded model, on a CPU, in minutes."""
    from .core.ablation import Task, ablate_and_report
    from .core.concept import Concept
    from .core.evaluation import EvaluationSettings
    from .core.presets import recipe
    from .core.samplers import SampleSettings

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


for command in (evaluate, leaks, attack, compress, bench, sweep, ui):
    app.command()(command)


def main() -> None:
    """Entry point: run a command and turn what goes wrong into one line and an exit code."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # redirected in Windows it has a code page, which has no arrow and not every name of a file
            stream.reconfigure(errors="replace")
    try:
        code = app(standalone_mode=False)
    except AblationError as error:
        _fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            # a usage error of typer, which knows how to print itself
            error.show()
            sys.exit(error.exit_code)
        if is_out_of_memory(error):
            _fail(OUT_OF_MEMORY, 2)
        if isinstance(error, OSError) and error.errno in _NO_ACCESS and error.filename is not None:
            _fail(f"{error.filename} cannot be used ({error.strerror}): check the path and what you may read.", 2)
        raise
    if code == 130:
        # newer typer returns this code for Ctrl-C, older raises Abort
        _fail("Interrupted: nothing that was half done was kept as finished; run the command again to go on.", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    Console(stderr=True).print(Text.assemble(("error:", "bold red"), " ", message), soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
