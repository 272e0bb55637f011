"""`concept-ablation sweep`: every task of a list, one delta each, on this machine or on a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..core.errors import AblationError
from .console import console
from .inputs import load_judge
from .options import (
    AutoPreserve,
    Batch,
    Checkpointing,
    Device,
    EvalPrompts,
    EvalSeeds,
    Images,
    JudgeOption,
    LearningRate,
    NegativeGuidance,
    Objective,
    Precision,
    Prediction,
    Preset,
    Rank,
    Seed,
    Subset,
    TrainSteps,
)

if TYPE_CHECKING:
    from ..core.concept import Concept, Kind
    from ..core.denoiser import Denoiser
    from ..core.hosts.diffusers import DiffusersDenoiser
    from ..core.metrics import Judge
    from ..core.presets import Recipe
    from ..core.sweep import Outcome
    from ..core.tasks import ListedTask


@dataclass(frozen=True)
class Options:
    """What all tasks of a sweep have in common; plain values, because it travels to the workers."""

    model: str | None
    judge: str | None
    device: str | None
    precision: str
    prediction: str | None
    preset: str
    objective: str | None
    subset: str | None
    training: dict[str, Any]
    dataset: dict[str, Any]
    auto_preserve: int | None
    negative_guidance: float | None
    eval_prompts: int
    eval_seeds: int
    seed: int


def sweep(
    tasks: Annotated[Path, typer.Argument(help="The list, a .toml file such as benchmarks/tasks.toml.")],
    output: Annotated[
        Path, typer.Option(help="Folder for the results, one folder in it a task; all machines must share it.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Diffusers folder, SD 1.x .safetensors file or hub id.", show_default="the list's, else the embedded"
        ),
    ] = None,
    preset: Preset = "balanced",
    objective: Objective = None,
    subset: Subset = None,
    auto_preserve: AutoPreserve = None,
    negative_guidance: NegativeGuidance = None,
    steps: TrainSteps = None,
    learning_rate: LearningRate = None,
    batch: Batch = None,
    images: Images = None,
    rank: Rank = None,
    checkpointing: Checkpointing = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Tasks at the same time, at most.", show_default="what there is room for")
    ] = None,
    cpus_per_task: Annotated[float, typer.Option(min=0, help="Cores that Ray keeps for a task.")] = 1.0,
    gpus_per_task: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs that Ray keeps for a task; 0.5 lets two share one.", show_default="1 if any"),
    ] = None,
    max_retries: Annotated[int, typer.Option(min=0, help="How often a task begins again whose worker was killed.")] = 2,
    address: Annotated[
        str | None,
        typer.Option(help="auto or the address of a running Ray cluster.", show_default="a cluster on this machine"),
    ] = None,
    eval_prompts: EvalPrompts = 5,
    eval_seeds: EvalSeeds = 4,
    judge: JudgeOption = None,
    seed: Seed = 0,
    device: Device = None,
    precision: Precision = "auto",
    prediction: Prediction = None,
) -> None:
    """Ablate every concept of a list, one delta each: in order with --workers 1, at the same time with Ray.

    Tasks that an earlier run has finished with the same options are skipped. Writes what ablate writes to
    OUTPUT/<task>/, and summary.json. Exit code 1 if a task failed.
    """
    from ..core.evaluation import EvaluationSettings
    from ..core.files import require_writable, write_json
    from ..core.hosts.diffusers import require_model
    from ..core.subsets import check_subset
    from ..core.sweep import SUMMARY_FILE, Resources, run_in_order, run_on_ray, summary
    from ..core.tasks import load_tasks

    listed = load_tasks(tasks)
    resources = Resources(cpus_per_task, gpus_per_task, max_retries, workers, address)
    sizes = {"steps": steps, "batch": batch, "rank": rank, "checkpointing": checkpointing or None}
    chosen = {**sizes, "learning_rate": learning_rate}
    options = Options(
        model=_absolute(model or listed.model),
        judge=_absolute(judge),
        device=device or ("cpu" if gpus_per_task == 0 else None),
        precision=precision,
        prediction=prediction,
        preset=preset,
        objective=objective,
        subset=subset,
        training={name: value for name, value in chosen.items() if value is not None},
        dataset={} if images is None else {"images": images},
        auto_preserve=auto_preserve,
        negative_guidance=negative_guidance,
        eval_prompts=eval_prompts,
        eval_seeds=eval_seeds,
        seed=seed,
    )
    for kind in dict.fromkeys(task.concept.kind for task in listed.tasks):
        check_subset(_recipe(options, None, kind).subset)
    EvaluationSettings(prompts=eval_prompts, seeds=eval_seeds)
    require_model(options.model)
    output = output.resolve()
    require_writable(output)
    # the machine may change between two runs of a sweep, what is asked for may not
    asked = {name: value for name, value in asdict(options).items() if name != "device"}
    # what an older version wrote down, which did not know this, is the same request
    asked = {name: value for name, value in asked.items() if name != "negative_guidance" or value is not None}
    requests = {task.name: {"task": asdict(task), "options": asked} for task in listed.tasks}
    run = partial(run_task, options)
    if _has_ray():
        ended = run_on_ray(listed.tasks, output, run, requests, resources)
    elif workers == 1 and address is None:
        console.print("Ray is not installed: the tasks run one after another in this process.")
        ended = run_in_order(listed.tasks, output, run, requests)
    else:
        raise AblationError(
            "Ray is not installed: pip install ray, or give --workers 1 to run the tasks one after another in this "
            "process."
        )
    outcomes: dict[str, Outcome] = {}
    # closed also by Ctrl-C, so that no worker goes on
    with closing(ended):
        for outcome in ended:
            outcomes[outcome.name] = outcome
            done = f"{len(outcomes)} of {len(listed.tasks)}"
            console.print(f"{done}  {outcome.name}: {outcome.state}{outcome.reason and '. '}{outcome.reason}")
    rows = summary(listed.tasks, output, outcomes)
    write_json(output / SUMMARY_FILE, {"options": asked, "tasks": rows})
    console.print(_table(rows))
    console.print(f"Summary: {output / SUMMARY_FILE}", soft_wrap=True)
    if any(outcome.state == "failed" for outcome in outcomes.values()):
        raise typer.Exit(1)


def run_task(options: Options, task: ListedTask, folder: Path) -> None:
    """Do one task: what `concept-ablation ablate` does, with its results in `folder`.

    Raises:
        AblationError: as `ablate_and_report`.
    """
    from ..core.ablation import Task as Ablation
    from ..core.ablation import ablate_and_report
    from ..core.evaluation import EvaluationSettings

    denoiser, judge = _loaded(options.model, options.judge, options.device, options.precision, options.prediction)
    chosen = _recipe(options, denoiser, task.concept.kind, [task.concept])
    evaluation = EvaluationSettings(prompts=options.eval_prompts, seeds=options.eval_seeds)
    ablate_and_report(denoiser, (Ablation(task.concept, task.surrounding),), chosen, judge, evaluation, folder)


def _recipe(options: Options, denoiser: Denoiser | None, kind: Kind, concepts: Sequence[Concept] = ()) -> Recipe:
    from ..core.presets import recipe

    return recipe(
        options.preset,
        denoiser,
        kind,
        concepts=concepts,
        objective=options.objective,
        subset=options.subset,
        seed=options.seed,
        training=options.training,
        dataset=options.dataset,
        auto_preserve=options.auto_preserve,
        negative_guidance=options.negative_guidance,
    )


@lru_cache(maxsize=1)
def _loaded(
    model: str | None, judge: str | None, device: str | None, precision: str, prediction: str | None
) -> tuple[DiffusersDenoiser, Judge]:
    """The model and its judge, which the next task of the same worker finds loaded."""
    from ..core.hosts.diffusers import load_denoiser

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    denoiser = load_denoiser(model, device=device, precision=precision, prediction_type=prediction)
    return denoiser, load_judge(judge, denoiser, embedded=model is None)


def _absolute(location: str | None) -> str | None:
    """A path as every worker can use it; a hub id or a judge's name stays as it is."""
    if location is None or not Path(location).expanduser().exists():
        return location
    return str(Path(location).expanduser().resolve())


def _has_ray() -> bool:
    return find_spec("ray") is not None


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="CLIP accuracy, before → after")
    for heading in ("task", "ablated → drawn instead", "target", "surrounding", "seconds", "state"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    for row in rows:
        figures = [_change(row.get(f"{role}_accuracy")) for role in ("target", "surrounding")]
        seconds = f"{row['seconds']:.0f}" if row["state"] == "done" else "–"
        table.add_row(row["name"], f"{row['target']} → {row['anchor']}", *figures, seconds, row["state"])
    return table


def _change(accuracy: dict[str, float] | None) -> str:
    return "–" if accuracy is None else f"{accuracy['before']:.2f} → {accuracy['after']:.2f}"
