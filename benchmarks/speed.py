"""How long an ablation takes and what it is worth: every preset side by side, and a training step against the authors'.

Two parts, both of which can be stopped and started again (finished jobs are kept, see job_store.py):

tasks  Six ablations of the embedded model (speed_tasks.toml) with each preset: wall time from the concept to the delta
       file, by phase, with the rows that went through the network; CLIP accuracy of the target and of what surrounds it
       on held-out prompts, with 95 % intervals; what the training loop costs over the bare network on the same rows.
       Presets take turns within each repeat, so that whatever else the machine does hits all alike. Repeats have seeds
       of their own and are all timed; the first one's delta is evaluated. `paper` draws 1,000 images of 25 steps.
step   One training step on a model of Stable Diffusion 1.5's size (speed_reference.py), each case in its own process.

    python benchmarks/speed.py                  both; writes results/speed.json and .png, tables of the READMEs
    python benchmarks/speed.py --only step      one of them; the other's figures stay, each with its commit
    python benchmarks/speed.py --tasks strawberry --repeats 1   to see how long it takes
    python benchmarks/speed.py --tiny           a minute, to see that it runs

With any other option than --only and --report, results are written below outputs/ and not published.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import speed_reference
import speed_report
from job_store import FOLDER, RESULTS, ROOT, JobStore, environment, results_folder
from measuring import Hits, accuracy, accuracy_change, only, plain
from speed_presets import TINY, Bench, Sizes

from concept_ablation.core.files import write_json
from concept_ablation.core.hosts.diffusers import load_denoiser
from concept_ablation.core.metrics import Judge
from concept_ablation.core.tasks import ListedTask, load_tasks

TASKS = Path(__file__).with_name("speed_tasks.toml")
PRESETS = ("instant", "fast", "balanced", "paper")
SLOW = ("balanced", "paper")
_OF_TASKS = ("environment", "tasks", "before", "presets", "repeats", "floor", "fast_against_paper")


@dataclass(frozen=True)
class Steps:
    """How the training steps of the second part are measured."""

    size: str = "sd15"
    batch: int = 4
    steps: int = 1
    repeats: int = 3


def turns(tasks: Sequence[ListedTask], repeats: Mapping[str, int]) -> Iterator[tuple[ListedTask, str, int]]:
    """(task, preset, repeat) in the order in which they run: in each repeat and task every preset that still has one,
    beginning with another one each time.
    """
    presets = list(repeats)
    for repeat in range(max(repeats.values())):
        for number, task in enumerate(tasks):
            first = (repeat + number) % len(presets)
            for preset in presets[first:] + presets[:first]:
                if repeat < repeats[preset]:
                    yield task, preset, repeat


def measure_tasks(bench: Bench, tasks: Sequence[ListedTask], repeats: Mapping[str, int]) -> dict[str, Any]:
    """The first part: what results/speed.json says of it."""
    for task, preset, repeat in turns(tasks, repeats):
        made = bench.make(task, preset, repeat)
        print(f"{task.name:16s} {preset:9s} repeat {repeat}: {made['seconds']:.1f} s", flush=True)
    # the loop is measured on rows of its own, so it need not be of a preset that was compared
    trained = [name for name in repeats if name != "instant"]
    loop_preset = trained[0] if trained and "fast" not in trained else "fast"
    floors = [bench.overhead(tasks[0], loop_preset, repeat) for repeat in range(bench.sizes.floor_repeats)]
    # all that is timed is done: what else the machine does from here on changes nothing
    rows = [_task_row(bench, task, repeats) for task in tasks]
    drawn = [bench.hits(task, None) for task in tasks]
    part: dict[str, Any] = {
        "repeats": dict(repeats),
        "tasks": rows,
        "before": _pooled(drawn, tasks),
        "presets": {preset: _preset_row(bench, tasks, rows, preset) for preset in repeats},
        "floor": {
            "preset": loop_preset,
            "repeats": floors,
            "overhead": median(found["loop"] / found["floor"] - 1 for found in floors),
        },
    }
    if {"fast", "paper"} <= repeats.keys():
        part["fast_against_paper"] = _compare(bench, tasks, rows, "paper", "fast")
    return part


def measure_steps(store: JobStore, key: Mapping[str, Any], how: Steps) -> dict[str, Any]:
    """The second part: cases take turns, each in a process of its own; memory in use is measured in one more."""
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in speed_reference.CASES}
    for repeat in range(how.repeats):
        for case, results in found.items():
            inputs = {**key, "case": case, "repeat": repeat, "size": how.size, "batch": how.batch, "steps": how.steps}
            results.append(store.run(f"step-{case}-{repeat}", inputs, lambda case=case: _step(case, how)))
            print(f"{case:26s} {results[-1]['median']:.2f} s a step, {results[-1]['peak_gb']:.2f} GB", flush=True)
    cases = {}
    for case, results in found.items():
        inputs = {**key, "case": case, "size": how.size, "batch": how.batch}
        lean = store.run(f"step-{case}-memory", inputs, lambda case=case: _step(case, how, give_back=True))
        print(f"{case:26s} {lean['peak_gb']:.2f} GB in use", flush=True)
        cases[case] = {
            "seconds": median(second for result in results for second in result["seconds"]),
            "process_gb": median(result["peak_gb"] for result in results),
            "peak_gb": lean["peak_gb"],
            "loaded_gb": lean["loaded_gb"],
            "repeats": results,
        }
    return {**vars(how), "cases": cases}


def ratios(part_tasks: Mapping[str, Any] | None, part_steps: Mapping[str, Any] | None) -> dict[str, float | None]:
    """The figures that the project is held to; None for what was not measured."""
    found: dict[str, float | None] = dict.fromkeys(
        (
            "fast_over_paper",
            "step_over_reference",
            "memory_over_reference",
            "memory_beyond_models_over_reference",
            "overhead",
        )
    )
    if part_tasks:
        found["overhead"] = part_tasks["floor"]["overhead"]
        if "fast_against_paper" in part_tasks:
            found["fast_over_paper"] = part_tasks["fast_against_paper"]["seconds_ratio"]
    if part_steps:
        ours, reference = part_steps["cases"]["ours"], part_steps["cases"]["reference"]
        found["step_over_reference"] = ours["seconds"] / reference["seconds"]
        found["memory_over_reference"] = ours["peak_gb"] / reference["peak_gb"]
        beyond = [case["peak_gb"] - case["loaded_gb"] for case in (ours, reference)]
        found["memory_beyond_models_over_reference"] = beyond[0] / beyond[1]
    return found


def assemble(
    machine: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]], previous: Mapping[str, Any]
) -> dict[str, Any]:
    """results/speed.json: the parts that were measured, and those that an earlier run has left in it. What is compared
    is of one part; each has the machine and the code that it was measured on.
    """
    own = {"environment": dict(machine)}
    tasks = {**own, "tasks": [], **{name: previous[name] for name in _OF_TASKS if name in previous}}
    steps = previous.get("step")
    if "tasks" in parts:
        tasks = {**own, **parts["tasks"]}
    if "step" in parts:
        steps = {**own, **parts["step"]}
    return {"ratios": ratios(tasks if tasks["tasks"] else None, steps), **tasks, "step": steps}


def _task_row(bench: Bench, task: ListedTask, repeats: Mapping[str, int]) -> dict[str, Any]:
    before = bench.hits(task, None)
    row: dict[str, Any] = {
        "name": task.name,
        "target": task.concept.target,
        "anchor": task.concept.anchor,
        "surrounding": list(task.surrounding),
        "before": _accuracies(before, task),
        "presets": {},
    }
    for preset, count in repeats.items():
        made = [bench.make(task, preset, repeat) for repeat in range(count)]
        middle = sorted(made, key=lambda one: one["seconds"])[len(made) // 2]
        row["presets"][preset] = {
            "seconds": [one["seconds"] for one in made],
            "median_seconds": median(one["seconds"] for one in made),
            "phases": middle["phases"],
            "bytes": middle["bytes"],
            **_accuracies(bench.hits(task, preset), task),
        }
    return row


def _preset_row(
    bench: Bench, tasks: Sequence[ListedTask], rows: Sequence[Mapping[str, Any]], preset: str
) -> dict[str, Any]:
    """A preset over all tasks."""
    found = [row["presets"][preset] for row in rows]
    drawn = [bench.hits(task, preset) for task in tasks]
    phases = [phase for one in found for phase in one["phases"].values()]
    return {
        "median_seconds": median(one["median_seconds"] for one in found),
        "forward": sum(phase["forward"] for phase in phases) / len(tasks),
        "trained": sum(phase["trained"] for phase in phases) / len(tasks),
        "phases": _median_phases(found),
        **_pooled(drawn, tasks),
    }


def _pooled(drawn: Sequence[Hits], tasks: Sequence[ListedTask]) -> dict[str, Any]:
    """Accuracies over all tasks."""
    return {
        "target": plain(accuracy(*_targets(drawn, tasks))),
        "surrounding": plain(accuracy(*_neighbours(drawn, tasks))),
    }


def _median_phases(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each phase, medians over tasks, in the order in which they ran."""
    names = dict.fromkeys(name for one in found for name in one["phases"])
    return {
        name: median(one["phases"][name]["seconds"] if name in one["phases"] else 0.0 for one in found)
        for name in names
    }


def _compare(
    bench: Bench, tasks: Sequence[ListedTask], rows: Sequence[Mapping[str, Any]], first: str, second: str
) -> dict[str, Any]:
    """`second` against `first`: time as the median over tasks, accuracy over the same prompts and seeds."""
    drawn = [[bench.hits(task, preset) for task in tasks] for preset in (first, second)]
    target = accuracy_change(*(_targets(one, tasks) for one in drawn))
    near = accuracy_change(*(_neighbours(one, tasks) for one in drawn))
    seconds = [[row["presets"][preset]["median_seconds"] for row in rows] for preset in (first, second)]
    return {
        "seconds_ratio": median(after / before for before, after in zip(*seconds, strict=True)),
        "target_change": plain(target),
        "surrounding_change": plain(near),
        "target_no_higher": not target.low > 0,
        "surrounding_no_lower": not near.high < 0,
    }


def _accuracies(found: Hits, task: ListedTask) -> dict[str, Any]:
    return {
        "target_accuracy": plain(accuracy(only(found, [task.concept.target]))),
        "surrounding_accuracy": plain(accuracy(only(found, task.surrounding))),
    }


def _targets(drawn: Sequence[Hits], tasks: Sequence[ListedTask]) -> list[Hits]:
    return [only(found, [task.concept.target]) for found, task in zip(drawn, tasks, strict=True)]


def _neighbours(drawn: Sequence[Hits], tasks: Sequence[ListedTask]) -> list[Hits]:
    return [only(found, task.surrounding) for found, task in zip(drawn, tasks, strict=True)]


def _step(case: str, how: Steps, give_back: bool = False) -> dict[str, Any]:
    """One case.

    Args:
        give_back: take one step, with a process that gives freed memory back at once (on Linux with glibc; slower). By
            itself glibc keeps it, in pieces that the next tensor may not fit in: a process then has up to twice as much
            as is in use, by chance. PyTorch counts what is in use on a GPU.
    """
    command = [sys.executable, speed_reference.__file__, case]
    command += ["--batch", str(how.batch), "--steps", str(1 if give_back else how.steps), "--size", how.size]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)} if give_back else None
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["tasks", "step"], help="one of the two parts")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), help="presets to compare, to try something")
    parser.add_argument("--tasks", nargs="+", help="names of tasks, likewise, without the second part")
    parser.add_argument("--repeats", type=int, default=3, help="of each preset and of each step; medians are reported")
    parser.add_argument(
        "--slow-repeats", type=int, default=1, help="of the presets balanced and paper, which take long"
    )
    parser.add_argument("--batch", type=int, default=4, help="rows of a step of the second part")
    parser.add_argument("--steps", type=int, default=1, help="steps in each process of the second part")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes and one task; results below outputs/")
    parser.add_argument("--report", action="store_true", help="only make the plot and the table from the results")
    options = parser.parse_args()
    folder = FOLDER / "tiny" if options.tiny else FOLDER
    results = results_folder(parser, options, free=("only", "report")) / "speed.json"
    if not options.report:
        store, machine = JobStore(folder / "speed"), environment()
        parts: dict[str, dict[str, Any]] = {}
        if options.only != "step":
            tasks = load_tasks(TASKS).tasks
            wanted = options.tasks or [task.name for task in tasks[: 1 if options.tiny else None]]
            model = load_denoiser().fingerprint()
            sizes = TINY if options.tiny else Sizes()
            bench = Bench(load_denoiser, Judge.load(), sizes, store, {"environment": machine, "model": model})
            repeats = {name: options.slow_repeats if name in SLOW else options.repeats for name in options.presets}
            parts["tasks"] = measure_tasks(bench, [task for task in tasks if task.name in wanted], repeats)
        if options.only != "tasks" and not options.tasks:
            how = Steps("tiny" if options.tiny else "sd15", options.batch, options.steps, options.repeats)
            parts["step"] = measure_steps(store, {"environment": machine}, how)
        previous = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
        write_json(results, assemble(machine, parts, previous))
    found = json.loads(results.read_text(encoding="utf-8"))
    print(json.dumps(found["ratios"], indent=2))
    if found["tasks"]:
        speed_report.write_plot(found, results.with_suffix(".png"))
        if results.parent == RESULTS:
            speed_report.publish(found, ROOT)
        else:
            print(speed_report.section(found))


if __name__ == "__main__":
    main()
