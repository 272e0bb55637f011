"""The README's first table: four instances ablated from Emoji Diffusion with the `balanced` preset.

For each task: ten held-out prompts, eight seeds each, before and after; CLIP accuracy by the embedded judge. The
surrounding concepts are preserved in training; the `unlisted` one is not known to it and shows what happens to a
neighbour that nobody named. The floor is the share of the pretrained model's own anchor pictures that the judge takes
for the target: an edit that turns the target into the anchor exactly would be given that figure.

Every task runs on one CPU core, as many at once as there are cores.

    python benchmarks/first_table.py            writes results/first_table.json and the table in README.md
    python benchmarks/first_table.py --table    only writes the table again from that file
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from concept_ablation.core.ablation import Task, ablate
from concept_ablation.core.concept import Concept
from concept_ablation.core.evaluation import EvaluationSettings, evaluate
from concept_ablation.core.files import write_json, write_text
from concept_ablation.core.hosts.diffusers import load_denoiser
from concept_ablation.core.metrics import Judge
from concept_ablation.core.presets import recipe
from concept_ablation.core.samplers import SampleSettings

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "first_table.json"
BEGIN, END = "<!-- first_table: made by benchmarks/first_table.py -->", "<!-- /first_table -->"
EVALUATION = EvaluationSettings(prompts=10, seeds=8, sample=SampleSettings(steps=12))


@dataclass(frozen=True)
class Row:
    """One task: what is ablated, what is preserved, and neighbours that the training does not know of."""

    concept: Concept
    surrounding: tuple[str, ...]
    unlisted: tuple[str, ...]


ROWS = (
    Row(Concept("tropical fish", "fish"), ("blowfish", "shark", "octopus", "cat"), ("dolphin",)),
    Row(
        Concept("pouting cat", "cat"),
        ("crying cat", "weary cat", "grinning cat", "cat with tears of joy"),
        ("tiger",),
    ),
    Row(Concept("sunflower", "flower"), ("rose", "tulip", "hibiscus", "cherry blossom"), ("bouquet",)),
    Row(Concept("rooster", "bird"), ("penguin", "eagle", "duck", "owl"), ("dove",)),
)


def measure(row: Row) -> dict[str, Any]:
    """Ablate one concept and measure all its neighbours, on one CPU core."""
    torch.set_num_threads(1)
    denoiser, judge = load_denoiser(), Judge.load()
    made = ablate(denoiser, [Task(row.concept, row.surrounding)], recipe("balanced", denoiser))
    names = (*row.surrounding, *row.unlisted)
    found = evaluate(denoiser, made.delta, [row.concept], [names], judge, EVALUATION)
    return {
        "target": row.concept.target,
        "anchor": row.concept.anchor,
        "surrounding": list(row.surrounding),
        "unlisted": list(row.unlisted),
        "seconds": made.seconds | found.seconds,
        "concepts": {
            result.name: {"role": result.role, "before": asdict(result.before), "after": asdict(result.after)}
            for result in found.concepts
        },
    }


def table(tasks: list[dict[str, Any]]) -> str:
    """The README's table, Markdown."""
    lines = [
        "| ablated → drawn instead | target | floor | surrounding, mean of 4 | kept | unlisted | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task in tasks:
        (target, edited), (anchor, _) = mean_accuracy(task, [task["target"]]), mean_accuracy(task, [task["anchor"]])
        before, after = mean_accuracy(task, task["surrounding"])
        cells = [
            f"{task['target']} → {task['anchor']}",
            f"{target:.2f} → {edited:.2f}",
            f"{1 - anchor:.2f}",
            f"{before:.2f} → {after:.2f}",
            f"{after / before:.0%}",
            "{:.2f} → {:.2f}".format(*mean_accuracy(task, task["unlisted"])),
            f"{making_seconds(task):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def making_seconds(task: dict[str, Any]) -> float:
    """What making the delta took, without measuring it."""
    measuring = {"draw before", "draw after", "judge"}
    return sum(seconds for phase, seconds in task["seconds"].items() if phase not in measuring)


def mean_accuracy(task: dict[str, Any], names: list[str]) -> tuple[float, float]:
    """Mean CLIP accuracy of some concepts of a task, before and after."""
    rows = [task["concepts"][name] for name in names]
    before, after = (sum(row[when]["clip_accuracy"] for row in rows) / len(rows) for when in ("before", "after"))
    return before, after


def write_table(results: dict[str, Any]) -> None:
    """Put the table between the markers in README.md."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    note = f"Measured on {results['machine']}, {results['images']} images a concept."
    write_text(readme, f"{head}{BEGIN}\n{table(results['tasks'])}\n\n{note}\n{END}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only write the table again")
    if not parser.parse_args().table:
        # not fork: the children must not inherit the thread pool of a parent that has used torch
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            tasks = []
            for task in pool.map(measure, ROWS):
                tasks.append(task)
                print(table([task]).split("\n")[-1], flush=True)
        machine = f"one CPU core a task ({platform.machine()}), torch {torch.__version__}"
        images = EVALUATION.prompts * EVALUATION.seeds
        results = {"machine": machine, "images": images, "evaluation": asdict(EVALUATION), "tasks": tasks}
        write_json(RESULTS, results)
    write_table(json.loads(RESULTS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
