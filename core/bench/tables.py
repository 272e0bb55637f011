"""results.json in words: Markdown for people, made from that file alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

Results = Mapping[str, Any]
Row = Mapping[str, Any]

_TITLES = {
    "tasks": "Every task",
    "subsets": "Parameter subsets, instances (Fig. 4 and 6)",
    "styles": "Parameter subsets, styles (Fig. 4 and 8)",
    "memorized": "Memorized pictures (Fig. 9 and Table 1)",
    "several": "Several concepts in one model (Fig. 10)",
    "anchors": "Other anchors (Fig. 11)",
}


def markdown(results: Results, level: int = 2) -> str:
    """All tables, each under a heading of that level; experiments without results are left out."""
    mark, judge = "#" * level, main_judge(results)
    parts = [
        f"{mark} Goals\n\n{conclusions(results['goals'])}",
        f"{mark} The paper's claims\n\n{conclusions(results['claims'])}",
    ]
    for name, title in _TITLES.items():
        rows = results.get(name) or []
        if rows:
            parts.append(f"{mark} {title}\n\n{evaluations(rows, judge, memorized=name == 'memorized')}")
    if results.get("objectives"):
        parts.append(f"{mark} Objectives against steps (Fig. 3 and 12)\n\n{objectives(results['objectives'], judge)}")
    if results.get("tasks"):
        parts.append(f"{mark} Composition kept\n\n{composition(results['tasks'], judge)}")
    if results.get("limits"):
        parts.append(f"{mark} What still leaks (Fig. 14)\n\n{leaks(results['limits'])}")
    if results.get("attack"):
        parts.append(f"{mark} Attack by an optimised prompt\n\n{attacks(results['attack'])}")
    return "\n\n".join([*parts, f"*{provenance(results)}*"]) + "\n"


def provenance(results: Results) -> str:
    """One sentence: on what, how much, with what, how long; of the machines that measured."""
    where, protocol, cost = results["environment"], results["settings"]["protocol"], results["cost"]
    judges = results["settings"]["judges"]
    machines = ", ".join([*cost["devices"], *(f"torch {version}" for version in cost["torch"])])
    return (
        f"{where['model']} ({where['model_sha256'][:12]}), {protocol['prompts']} held-out prompts × "
        f"{protocol['images']} images a concept, {protocol['steps']} steps, judged by {' and '.join(judges)}; "
        f"{cost['measurements']} of {cost['of']} measurements, "
        f"{cost['rows'] / 1e6:.2f} million network rows in {cost['seconds'] / 3600:.1f} hours"
        f"{' on ' + machines if machines else ''}; "
        f"{results['made'][:10]}. Intervals are of 95 %."
    )


def conclusions(claims: Sequence[Row]) -> str:
    """Claims or goals with verdict, figure and the second judge's opinion."""
    lines = []
    for claim in claims:
        second = claim["validation"]
        said = "–" if second is None else f"{second['verdict']} ({figure(second['figure'])})"
        decided = f"{figure(claim['figure'])}{_count(claim['figure'])}"
        lines.append(
            [claim["text"], f"**{claim['verdict']}**", decided, str(claim["tasks"] or "–"), said, claim["reason"]]
        )
    return table(["", "verdict", "figure", "tasks", "second judge", "why"], lines)


def evaluations(rows: Sequence[Row], judge: str, *, memorized: bool = False) -> str:
    """One line for each job: target, floor, misspelled, surrounding; copies for memorized pictures."""
    copied = memorized or any(row["copies"] for row in rows)
    heads = ["ablated → drawn instead", "method", "target", "floor", "misspelled", "surrounding", "kept"]
    heads += ["copies", "copies, paraphrased", "copies, anchor"] if copied else []
    lines = []
    for row in rows:
        names = f"{row['task']} → {row['anchor']}"
        if row["concepts_in_the_edit"] > 1:
            names += f" (one of {row['concepts_in_the_edit']})"
        found = row["judges"].get(judge)
        if found is None:
            reason = row["failed"] or row["diverged"] or "not measured"
            lines.append([names, row["method"], reason, *[""] * (len(heads) - 3)])
            continue
        cells = [
            names,
            row["method"],
            _moved(found, "target"),
            f"{found['floor']:.2f}" if found["floor"] is not None else "–",
        ]
        cells += [_moved(found, "misspelled"), _moved(found, "surrounding")]
        cells.append(figure(found.get("surrounding", {}).get("kept"), percent=True))
        if copied:
            cells += [_moved(row["copies"] or {}, role) for role in ("target", "paraphrase", "anchor")]
        lines.append(cells)
    return table(heads, lines)


def objectives(rows: Sequence[Row], judge: str) -> str:
    """Target and surrounding accuracy by objective and step, mean over the tasks of each kind that all objectives were
    measured on.
    """
    steps = sorted({row["step"] for row in rows})
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        compared = comparable_objectives(rows, judge, kind)
        for name in dict.fromkeys(row["objective"] for row in compared):
            for role in ("target", "surrounding"):
                means = [mean(compared, judge, role, objective=name, step=step) for step in steps]
                cells = ["–" if value is None else f"{value:.2f}" for value in means]
                lines.append([kind, name or "", role, *cells])
    return table(["kind", "objective", "accuracy of", *(f"{step} steps" for step in steps)], lines)


def comparable_objectives(rows: Sequence[Row], judge: str, kind: str) -> list[Row]:
    """The rows by which objectives can be compared on a kind of concept."""
    return comparable(
        [row for row in rows if row["kind"] == kind and judge in row["judges"]], lambda row: row["objective"]
    )


def composition(rows: Sequence[Row], judge: str) -> str:
    """Colour and style words obeyed and subjects in place, before and after."""
    lines = []
    for row in rows:
        words = row["judges"].get(judge, {}).get("words", {})
        cells = [
            _moved(words.get(group, {}), role) for group in ("colour", "style") for role in ("target", "surrounding")
        ]
        places = [figure(row[name]) for name in ("position_kept", "position_kept_surrounding")]
        lines.append([row["task"], row["method"], *cells, *places])
    heads = ["colour, target", "colour, surrounding", "style, target", "style, surrounding"]
    return table(["task", "method", *heads, "in place, target", "in place, surrounding"], lines)


def leaks(rows: Sequence[Row]) -> str:
    """How many prompts were tried and how many still reach the target."""
    lines = []
    for row in rows:
        if row["failed"]:
            lines.append([row["task"], row["method"], row["failed"], "", "", "", "", ""])
            continue
        confirmed = row["confirmed_by_validation_judge"]
        worst = "; ".join(f"“{one['prompt']}” ({one['after']['value']:.0%})" for one in row["worst"][:3])
        counts = [str(row["tried"]), str(row["leaks"]), "–" if confirmed is None else str(confirmed)]
        seen = figure(row["target_before"]), figure(row["false_alarms"])
        lines.append([row["task"], row["method"], *counts, *seen, worst or "–"])
    heads = "seen before the edit", "false alarms"
    return table(["task", "method", "tried", "leaks", "second judge", *heads, "worst"], lines)


def attacks(rows: Sequence[Row]) -> str:
    """Success by optimisation steps."""
    measured = [row for row in rows if not row["failed"]]
    steps = sorted({point["steps"] for row in measured for curve in row["curves"].values() for point in curve})
    lines = []
    for row in rows:
        if row["failed"]:
            lines.append([row["task"], row["method"], "", row["failed"], *[""] * (len(steps) - 1)])
            continue
        for judge, curve in row["curves"].items():
            found = {point["steps"]: point["success"] for point in curve}
            lines.append([row["task"], row["method"], judge, *(figure(found.get(step)) for step in steps)])
    return table(["task", "method", "judge", *(f"{step} steps" for step in steps)], lines)


def main_judge(results: Results) -> str:
    """The judge whose figures are shown."""
    return results["settings"]["judges"][0]


def is_default(results: Results, row: Row) -> bool:
    """Whether a row is by the default method of its kind of concept."""
    return row["method"] == results["settings"]["default_method"].get(row["kind"])


def comparable(rows: Sequence[Row], series: Callable[[Row], Hashable]) -> list[Row]:
    """The rows of those tasks, and seeds, that every series has some row of: means over different tasks cannot be
    compared.

    Args:
        rows: of one comparison.
        series: what is compared, such as a row's subset.
    """
    runs: dict[Hashable, set[Hashable]] = {}
    for row in rows:
        runs.setdefault(series(row), set()).add(_run(row))
    common = set.intersection(*runs.values()) if runs else set()
    return [row for row in rows if _run(row) in common]


def mean(rows: Sequence[Row], judge: str, role: str, **wanted: object) -> float | None:
    """Mean accuracy after the edit over the rows with the `wanted` values; None where one of the tasks in `rows` has no
    such row, as after a training that diverged.
    """
    having = [row for row in rows if role in row["judges"].get(judge, {})]
    found = [row for row in having if all(row[name] == value for name, value in wanted.items())]
    if not found or {_run(row) for row in found} != {_run(row) for row in having}:
        return None
    return sum(row["judges"][judge][role]["after"]["value"] for row in found) / len(found)


def _run(row: Row) -> Hashable:
    return row["task"], row.get("seed")


def figure(estimate: Row | None, *, percent: bool = False) -> str:
    """0.12 [0.08, 0.17], or a dash."""
    if estimate is None or estimate["value"] is None:
        return "–"
    form: Callable[[float], str] = (lambda value: f"{value:.0%}") if percent else _decimals
    if estimate["low"] is None or estimate["high"] is None:
        return form(estimate["value"])
    return f"{form(estimate['value'])} [{form(estimate['low'])}, {form(estimate['high'])}]"


def _decimals(value: float) -> str:
    """Two decimals, three where two would claim a 0 or a 1 that it is not."""
    return f"{value:.3f}" if 0 < abs(value) < 0.005 or 0.995 <= value < 1 else f"{value:.2f}"


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


def _moved(found: Row, role: str) -> str:
    """Before → after."""
    if role not in found:
        return "–"
    return f"{found[role]['before']['value']:.2f} → {figure(found[role]['after'])}"


def _count(estimate: Row | None) -> str:
    return f", n = {estimate['n']:,}" if estimate and "n" in estimate else ""
