"""Plots like the paper's, made from results.json alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..files import replacing
from .tables import comparable, comparable_objectives, is_default, main_judge, mean

Results = Mapping[str, Any]
Row = Mapping[str, Any]

_COLOURS = ("#4063d8", "#cb3c33", "#389826", "#9558b2", "#e08e0b", "#5b6068")
_BEFORE = "#c9c6bf"
_WIDTH, _HEIGHT, _DPI = 4.2, 3.0, 130


def write_plots(results: Results, folder: Path) -> list[Path]:
    """Draw whatever there are results for, one PNG for each experiment; those of earlier results go.

    Raises:
        AblationError: `folder` cannot be written.
    """
    written = []
    for name, draw in PLOTS.items():
        figure, path = draw(results), folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        figure.set_layout_engine("constrained")
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=_DPI)
        written.append(path)
    return written


def _tasks(results: Results) -> Figure | None:
    """Target and surrounding accuracy of every task, before and after the default method; and how many of the
    pretrained model's pictures of the anchor count as the target, which is what drawing those in its place comes to.
    """
    rows = [row for row in _judged(results, "tasks") if is_default(results, row)]
    if not rows:
        return None
    figure = Figure(figsize=(max(_WIDTH, 0.6 * len(rows) + 2), 2 * _HEIGHT))
    for axes, role in zip(figure.subplots(2, 1), ("target", "surrounding"), strict=True):
        found = [(row["task"], row["judges"][main_judge(results)].get(role)) for row in rows]
        floors = [row["judges"][main_judge(results)]["floor"] for row in rows] if role == "target" else []
        _before_after(axes, [(name, values) for name, values in found if values], floors)
        axes.set_ylabel(f"CLIP accuracy, {role}")
    return figure


def _objectives(results: Results) -> Figure | None:
    """Fig. 3 and 12: accuracy against training steps, by objective."""
    rows, judge = _judged(results, "objectives"), main_judge(results)
    by_kind = {
        kind: compared
        for kind in dict.fromkeys(row["kind"] for row in rows)
        if (compared := comparable_objectives(rows, judge, kind))
    }
    if not by_kind:
        return None
    steps = sorted({row["step"] for row in rows})
    figure = Figure(figsize=(2 * _WIDTH, _HEIGHT * len(by_kind)))
    grid = figure.subplots(len(by_kind), 2, squeeze=False)
    for line, (kind, compared) in zip(grid, by_kind.items(), strict=True):
        for axes, role in zip(line, ("target", "surrounding"), strict=True):
            for place, name in enumerate(dict.fromkeys(row["objective"] for row in compared)):
                start = _mean_before(compared, judge, role)
                values = [mean(compared, judge, role, objective=name, step=step) for step in steps]
                points = [(0, start), *zip(steps, values, strict=True)]
                known = [(step, value) for step, value in points if value is not None]
                axes.plot(*zip(*known, strict=True), marker="o", markersize=3, color=_colour(place), label=name)
            _style(axes, f"{kind}: {role}", "training steps")
    grid[0][0].legend(fontsize=7)
    return figure


def _subsets(results: Results) -> Figure | None:
    """Fig. 4 and 6: target, misspelled target and surrounding accuracy, by parameter subset."""
    rows = {
        kind: comparable(_judged(results, name), lambda row: row["subset"])
        for kind, name in (("instances", "subsets"), ("styles", "styles"))
    }
    rows = {kind: found for kind, found in rows.items() if found}
    if not rows:
        return None
    figure = Figure(figsize=(_WIDTH * len(rows), _HEIGHT))
    for axes, (kind, found) in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows.items(), strict=True):
        groups = list(dict.fromkeys(row["subset"] for row in found))
        roles = ("target", "misspelled", "surrounding")
        series = {name: [mean(found, main_judge(results), role, subset=name) for role in roles] for name in groups}
        _bars(axes, roles, series)
        _style(axes, kind, None)
    return figure


def _memorized(results: Results) -> Figure | None:
    """Table 1: share of copies of each memorized picture, by method. A picture that some method was not measured on is
    left out: a bar that is not there looks like one of no copies.
    """
    rows = [row for row in results.get("memorized") or () if row["copies"]]
    rows = comparable(rows, lambda row: row["method"])
    if not rows:
        return None
    names = list(dict.fromkeys(row["task"] for row in rows))
    series: dict[str, list[float | None]] = {"pretrained": [_copy_rate(rows, "before", task=name) for name in names]}
    for method in dict.fromkeys(row["method"] for row in rows):
        series[method] = [_copy_rate(rows, "after", task=name, method=method) for name in names]
    figure = Figure(figsize=(max(_WIDTH, 1.1 * len(names) + 1), _HEIGHT))
    axes = figure.subplots()
    _bars(axes, names, series, first=_BEFORE)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))  # every corner of the axes may hold a bar
    _style(axes, "Copies of memorized pictures (SSCD ≥ 0.5)", None, "share of copies")
    axes.tick_params(axis="x", labelrotation=20)
    return figure


def _several(results: Results) -> Figure | None:
    """Fig. 10: one model for each concept against one model for all, by the tasks and surrounding concepts of both: a
    target of the latter surrounds nothing there.
    """
    rows, judge = _judged(results, "several"), main_judge(results)
    by_kind = {
        kind: pairs
        for kind in dict.fromkeys(row["kind"] for row in rows)
        if (pairs := _single_and_joint([row for row in rows if row["kind"] == kind], judge))
    }
    if not by_kind:
        return None
    figure = Figure(figsize=(_WIDTH * len(by_kind), _HEIGHT))
    for axes, (kind, pairs) in zip(figure.subplots(1, len(by_kind), squeeze=False)[0], by_kind.items(), strict=True):
        series = {
            label: [
                _average(pair[place]["target"]["after"]["value"] for pair in pairs),
                _average(shares[place] for pair in pairs if (shares := _surrounding_of_both(pair))),
            ]
            for place, label in enumerate(("one model each", "one model"))
        }
        _bars(axes, ("target", "surrounding"), series)
        _style(axes, f"{kind}s", None)
    return figure


def _anchors(results: Results) -> Figure | None:
    """Fig. 11: the same target with several anchors."""
    rows = _judged(results, "anchors")
    if not rows:
        return None
    figure = Figure(figsize=(max(_WIDTH, 0.8 * len(rows) + 2), _HEIGHT))
    axes = figure.subplots()
    _before_after(
        axes, [(f"{row['task']}\n→ {row['anchor']}", row["judges"][main_judge(results)]["target"]) for row in rows]
    )
    axes.set_ylabel("CLIP accuracy, target")
    return figure


def _limits(results: Results) -> Figure | None:
    """Fig. 14: how many of the tried prompts still reach the target."""
    rows = [row for row in results.get("limits") or () if not row["failed"]]
    if not rows:
        return None
    figure = Figure(figsize=(max(_WIDTH, 0.8 * len(rows) + 1), _HEIGHT))
    axes = figure.subplots()
    names = [row["task"] for row in rows]
    leaks, possible = ([row[kind] / row["tried"] for row in rows] for kind in ("leaks", "possible"))
    axes.bar(names, leaks, color=_COLOURS[1], label="leaks")
    axes.bar(names, possible, bottom=leaks, color=_BEFORE, label="possible")
    axes.legend(fontsize=7)
    _style(axes, "Prompts that still reach the target", None, "share of prompts tried")
    axes.tick_params(axis="x", labelrotation=20)
    return figure


def _attack(results: Results) -> Figure | None:
    """Success of an optimised prompt against its budget, mean over tasks."""
    judge = main_judge(results)
    rows = [row for row in results.get("attack") or () if not row["failed"] and judge in row["curves"]]
    rows = comparable(rows, lambda row: row["method"])
    if not rows:
        return None
    figure = Figure(figsize=(_WIDTH * 1.3, _HEIGHT))
    axes = figure.subplots()
    for place, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        curves = [row["curves"][judge] for row in rows if row["method"] == method]
        steps = [point["steps"] for point in curves[0]]
        means = [sum(curve[index]["success"]["value"] for curve in curves) / len(curves) for index in range(len(steps))]
        # an edit that the attack goes around has the curve of the pretrained model, which must show behind it
        behind = {"linewidth": 6, "alpha": 0.4} if method == "pretrained" else {}
        axes.plot(steps, means, marker="o", markersize=3, color=_colour(place), label=method, **behind)
    axes.legend(fontsize=7)
    _style(axes, "Textual inversion of the target", "optimisation steps", "share that shows the target")
    return figure


PLOTS: dict[str, Callable[[Results], Figure | None]] = {
    "tasks": _tasks,
    "objectives": _objectives,
    "subsets": _subsets,
    "memorized": _memorized,
    "several": _several,
    "anchors": _anchors,
    "limits": _limits,
    "attack": _attack,
}


def _judged(results: Results, name: str) -> list[Row]:
    """The rows of an experiment that the main judge has seen."""
    return [row for row in results.get(name) or () if main_judge(results) in row["judges"]]


def _single_and_joint(rows: Sequence[Row], judge: str) -> list[tuple[Row, Row]]:
    """What a judge says of an edit of one concept and of one of several, for each task and seed that has both."""
    single, joint = (
        {
            (row["task"], row["seed"]): row["judges"][judge]
            for row in rows
            if (row["concepts_in_the_edit"] > 1) == several
        }
        for several in (False, True)
    )
    return [(found, joint[run]) for run, found in single.items() if run in joint]


def _surrounding_of_both(pair: tuple[Row, Row]) -> list[float]:
    """Accuracy of the surrounding concepts that two edits have in common, after each; empty if they have none."""
    names = pair[0]["surrounding_by_name"].keys() & pair[1]["surrounding_by_name"].keys()
    return [sum(one["surrounding_by_name"][name][1] for name in names) / len(names) for one in pair if names]


def _average(values: Iterable[float]) -> float | None:
    known = list(values)
    return sum(known) / len(known) if known else None


def _mean_before(rows: Sequence[Row], judge: str, role: str) -> float | None:
    """Over tasks, each of which has the same pictures before all edits."""
    found = {row["task"]: row["judges"][judge][role] for row in rows if role in row["judges"][judge]}
    return _average(one["before"]["value"] for one in found.values())


def _copy_rate(rows: Sequence[Row], when: str, **wanted: object) -> float | None:
    return _average(
        row["copies"]["target"][when]["value"]
        for row in rows
        if all(row[name] == value for name, value in wanted.items())
    )


def _bars(
    axes: Axes, names: Sequence[str], series: Mapping[str, Sequence[float | None]], first: str | None = None
) -> None:
    """Grouped bars; a value that is not there is left out."""
    width = 0.8 / max(1, len(series))
    for place, (label, values) in enumerate(series.items()):
        known = [(index, value) for index, value in enumerate(values) if value is not None]
        lefts = [index + (place - (len(series) - 1) / 2) * width for index, _ in known]
        colour = first if first and place == 0 else _colour(place - bool(first))
        axes.bar(lefts, [value for _, value in known], width, color=colour, label=label)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.legend(fontsize=7)


def _before_after(axes: Axes, rows: Sequence[tuple[str, Row]], floors: Sequence[float | None] = ()) -> None:
    """Two bars for each row, with the interval of the second, and a line where its floor is."""
    for place, (_, found) in enumerate(rows):
        after = found["after"]
        axes.bar(place - 0.2, found["before"]["value"], 0.4, color=_BEFORE, label="before" if place == 0 else None)
        axes.bar(place + 0.2, after["value"], 0.4, color=_COLOURS[0], label="after" if place == 0 else None)
        if after["low"] is not None and after["high"] is not None:
            ends = [[max(0.0, after["value"] - after["low"])], [max(0.0, after["high"] - after["value"])]]
            axes.errorbar(place + 0.2, after["value"], yerr=ends, color="#1f2328", capsize=2, linewidth=1)
    known = [(place, floor) for place, floor in enumerate(floors) if floor is not None]
    for number, (place, floor) in enumerate(known):
        label = "the anchor's pictures" if number == 0 else None
        axes.plot([place, place + 0.4], [floor, floor], color="#d1242f", linewidth=1.5, label=label)
    axes.set_xticks(range(len(rows)), [name for name, _ in rows], rotation=30, ha="right", fontsize=8)
    axes.set_ylim(0, 1.05)
    axes.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)


def _style(axes: Axes, title: str, across: str | None, up: str = "CLIP accuracy") -> None:
    axes.set_title(title, fontsize=9)
    axes.set_ylim(0, 1.05)
    axes.set_ylabel(up, fontsize=8)
    if across:
        axes.set_xlabel(across, fontsize=8)
    axes.tick_params(labelsize=8)


def _colour(place: int) -> str:
    return _COLOURS[place % len(_COLOURS)]
