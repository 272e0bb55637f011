"""What speed.py's results look like: the plot of accuracy against time and the READMEs' tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import marked
from matplotlib.figure import Figure

from concept_ablation.core.bench import tables
from concept_ablation.core.files import replacing

MARKERS = "<!-- speed: made by benchmarks/speed.py -->", "<!-- /speed -->"
COLOURS = ("#2a6467", "#c8553d", "#7a6ba8", "#8a8f3c", "#5b7c99", "#b0813d")


def write_plot(results: Mapping[str, Any], path: Path) -> None:
    """Accuracy against seconds, one colour a preset: the target's should be low, the surrounding concepts' high. Bars
    are 95 % intervals over all tasks; faint dots are single tasks.
    """
    figure = Figure(figsize=(7, 4.2), dpi=160, layout="constrained")
    axes = figure.subplots()
    for (preset, row), colour in zip(results["presets"].items(), COLOURS, strict=False):
        for what, marker, filled in (("target", "o", True), ("surrounding", "s", False)):
            for task in results["tasks"]:
                one = task["presets"][preset]
                accuracy = one[f"{what}_accuracy"]["value"]
                axes.plot(one["median_seconds"], accuracy, marker, color=colour, markersize=3, alpha=0.35)
            found = row[what]
            low, high = found["low"], found["high"]
            bars = None if low is None or high is None else [[found["value"] - low], [high - found["value"]]]
            axes.errorbar(
                row["median_seconds"],
                found["value"],
                yerr=bars,
                fmt=marker,
                color=colour,
                markersize=8,
                markerfacecolor=colour if filled else "white",
                capsize=3,
                label=f"{preset}, {what}",
            )
    before = [task["before"]["target_accuracy"]["value"] for task in results["tasks"]]
    axes.axhline(sum(before) / len(before), color="#999999", linewidth=0.8, linestyle=":", label="target before")
    axes.set_xscale("log")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("seconds from concept to delta (median)")
    axes.set_ylabel("CLIP accuracy")
    figure.legend(fontsize=7, ncols=5, loc="outside lower center")
    with replacing(path) as temporary:
        figure.savefig(temporary)


def table(results: Mapping[str, Any]) -> str:
    """Every preset: cost and accuracies over all tasks. Markdown."""
    before = results["before"]
    rows = [["no edit", "", "", "", _interval(before["target"]), _interval(before["surrounding"])]]
    for preset, row in results["presets"].items():
        cost = [f"{row['median_seconds']:.1f}", f"{row['forward']:,.0f}", f"{row['trained']:,.0f}"]
        rows.append([f"`{preset}`", *cost, _interval(row["target"]), _interval(row["surrounding"])])
    return tables.table(
        ["preset", "seconds", "network rows: forward", "forward and backward", "target", "surrounding"], rows
    )


def tasks(results: Mapping[str, Any]) -> str:
    """Every task: accuracy of its target and, in brackets, of its surrounding concepts."""

    def cell(found: Mapping[str, Any]) -> str:
        target, surrounding = (found[f"{what}_accuracy"]["value"] for what in ("target", "surrounding"))
        return f"{target:.2f} ({surrounding:.2f})"

    rows = [
        [f"{task['target']} → {task['anchor']}", cell(task["before"]), *map(cell, task["presets"].values())]
        for task in results["tasks"]
    ]
    return tables.table(["ablated → drawn instead", "no edit", *(f"`{name}`" for name in results["presets"])], rows)


def phases(results: Mapping[str, Any]) -> str:
    """Seconds of each phase of each preset, medians over tasks."""
    names = list(dict.fromkeys(name for row in results["presets"].values() for name in row["phases"]))
    rows = [
        [f"`{preset}`", *(f"{row['phases'][name]:.1f}" if name in row["phases"] else "" for name in names)]
        for preset, row in results["presets"].items()
    ]
    return tables.table(["seconds of", *(name.lower() for name in names)], rows)


def steps(results: Mapping[str, Any]) -> str:
    """A training step on a model of SD 1.5's size: time and memory of each case."""
    rows = [
        [f"`{name}`", f"{case['seconds']:.1f}", f"{case['peak_gb']:.2f}", f"{case['peak_gb'] - case['loaded_gb']:.2f}"]
        for name, case in results["step"]["cases"].items()
    ]
    return tables.table(["a step", "seconds", "memory in use at most, GB", "beyond the loaded models, GB"], rows)


def note(results: Mapping[str, Any]) -> str:
    """What stands below the tables."""
    return (
        f"*{len(results['tasks'])} tasks of the embedded model, medians; CLIP accuracy with 95 % intervals. `paper` "
        "draws with 25 sampling steps here, the preset with 50, and has a tenth of the preset's learning rate. "
        f"Measured on {_where(results['environment'])}.*"
    )


def summary(results: Mapping[str, Any], picture: str) -> str:
    """The main table and the plot: for README.md."""
    return "\n\n".join([table(results), f"![Accuracy against time of every preset]({picture})", note(results)])


def section(results: Mapping[str, Any]) -> str:
    """All tables: for benchmarks/README.md."""
    parts = [table(results), tasks(results), phases(results)]
    if results["step"]:
        parts += [steps(results), f"*A step: measured on {_where(results['step']['environment'])}.*"]
    measured = {name: f"{value:.3f}" for name, value in results["ratios"].items() if value is not None}
    parts.append(tables.table(list(measured), [list(measured.values())]))
    return "\n\n".join([*parts, note(results)])


def publish(results: Mapping[str, Any], root: Path) -> None:
    """Put the tables into the repository's READMEs."""
    marked.put(root / "README.md", MARKERS, summary(results, "benchmarks/results/speed.png"), "## Speed")
    marked.put(root / "benchmarks" / "README.md", MARKERS, section(results), "## Speed")


def _where(machine: Mapping[str, Any]) -> str:
    """The machine and the code of a part."""
    device = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    return f"{device}, torch {machine['torch']}, commit {machine['commit']}"


def _interval(estimate: Mapping[str, float | None]) -> str:
    if estimate["low"] is None or estimate["high"] is None:
        return f"{estimate['value']:.2f}"
    return f"{estimate['value']:.2f} ({estimate['low']:.2f} to {estimate['high']:.2f})"
