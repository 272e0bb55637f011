"""What speed.py's results look like: the plot of accuracy against time and the README's table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from concept_ablation.core.files import replacing, write_text

BEGIN, END = "<!-- speed: made by benchmarks/speed.py -->", "<!-- /speed -->"
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
    axes.legend(fontsize=7, ncols=2)
    with replacing(path) as temporary:
        figure.savefig(temporary)


def table(results: Mapping[str, Any]) -> str:
    """The README's table, Markdown."""
    lines = [
        "| preset | seconds | network rows: forward | forward and backward | target after | surrounding after |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for preset, row in results["presets"].items():
        cells = [
            f"`{preset}`",
            f"{row['median_seconds']:.1f}",
            f"{row['forward']:,.0f}",
            f"{row['trained']:,.0f}",
            _interval(row["target"]),
            _interval(row["surrounding"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def note(results: Mapping[str, Any]) -> str:
    """What stands below the table."""
    machine, step = results["environment"], results["step"]
    text = (
        f"{len(results['tasks'])} tasks of the embedded model, medians; CLIP accuracy with 95 % intervals. "
        f"The training loop costs {results['ratios']['overhead']:.1%} over the bare network. "
    )
    if step:
        text += (
            f"A step on a model of Stable Diffusion 1.5's size takes {results['ratios']['step_over_reference']:.2f} of "
            f"the time and {results['ratios']['memory_over_reference']:.2f} of the peak memory of the authors' step. "
        )
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    return f"{text}Measured on {where}, torch {machine['torch']}, commit {machine['commit']}."


def write_table(results: Mapping[str, Any], readme: Path) -> None:
    """Put the table between its markers in the README; without markers it is printed."""
    text = readme.read_text(encoding="utf-8")
    made = f"{table(results)}\n\n{note(results)}"
    if BEGIN not in text or END not in text:
        print(f"{readme.name} has no {BEGIN} … {END}; the table:\n{made}")
        return
    head, rest = text.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    write_text(readme, f"{head}{BEGIN}\n{made}\n{END}{tail}")


def _interval(estimate: Mapping[str, float | None]) -> str:
    if estimate["low"] is None or estimate["high"] is None:
        return f"{estimate['value']:.2f}"
    return f"{estimate['value']:.2f} ({estimate['low']:.2f} to {estimate['high']:.2f})"
