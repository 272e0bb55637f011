"""results.json: every figure of a benchmark, made from the results of its jobs alone."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

from ..statistics import share_interval
from ..tasks import ListedTask
from .bench import Bench
from .claims import all_claims
from .figures import (
    ACCURACY,
    COPIES,
    FEW_RESAMPLES,
    SURROUNDING,
    TARGET,
    Measured,
    as_json,
    change,
    floor,
    kept,
    mean_kid,
    mean_score,
    pool,
    share,
)
from .goals import all_goals
from .measures import Observation
from .plan import FORMAT, objective_of
from .runner import Planned, environment

Row = dict[str, Any]

_ROBUSTNESS = ("misspelled", "paraphrase")


def collect(bench: Bench, plan: Mapping[str, Sequence[Planned]], tasks: Sequence[ListedTask]) -> list[Measured]:
    """The results that are there, once for each experiment that asked for them."""
    own = {task.name: task.concept.anchor for task in tasks}
    found = []
    for experiment, planned in plan.items():
        for one in planned:
            stored = bench.store.result(one.key)
            if stored is None:
                continue
            edit, made = one.job.edit, bench.recipe(one.job.edit) if one.job.edit else None
            result, concept = stored["result"], one.job.task.concept
            found.append(
                Measured(
                    experiment,
                    task=one.job.task.name,
                    kind=concept.kind,
                    method=edit.method.label if edit else "pretrained",
                    subset=made.subset if made else None,
                    objective=objective_of(made),
                    seed=edit.seed if edit else None,
                    step=one.job.step,
                    anchor=concept.anchor,
                    own_anchor=concept.anchor == own.get(one.job.task.name),
                    joint=len(edit.tasks) if edit else 0,
                    observations=tuple(Observation.read(seen) for seen in result.get("observations", ())),
                    result=result,
                    rows=stored.get("rows", 0),
                    seconds=stored.get("seconds", 0.0),
                )
            )
    return found


def results(
    bench: Bench,
    plan: Mapping[str, Sequence[Planned]],
    tasks: Sequence[ListedTask],
    default: Mapping[str, str],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What results.json holds. `environment` is that of whoever writes it, `cost` says what measured.

    Args:
        bench: the benchmark.
        plan: its jobs.
        tasks: the whole task list, of which the jobs may cover a part.
        default: label of the default method, by kind of concept.
        settings: what the benchmark was asked for, as it should be remembered.
    """
    measured = collect(bench, plan, tasks)
    judges = [judge.name for judge in bench.judges]
    keys = {one.key for planned in plan.values() for one in planned}
    stored = {key: found for key in sorted(keys) if (found := bench.store.result(key))}
    rows = {name: [one for one in measured if one.experiment == name] for name in plan}
    done = {name: [one for one in found if not one.result.get("failed")] for name, found in rows.items()}
    # half an experiment would decide a claim by the tasks that happened to come first
    complete = {name for name, planned in plan.items() if len(done[name]) == len(planned)}
    claims = all_claims([one for one in measured if one.experiment in complete], judges)
    tables = {
        name: [_evaluated(one, judges) for one in found]
        for name, found in rows.items()
        if name not in ("limits", "attack")
    }
    return {
        "format": FORMAT,
        "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(bench),
        "settings": {
            **settings,
            "protocol": asdict(bench.protocol),
            "judges": judges,
            "copy_detector": bench.tools.detector,
            "default_method": dict(default),
        },
        "jobs": {
            name: {"done": len(done[name]), "failed": len(rows[name]) - len(done[name]), "of": len(planned)}
            for name, planned in plan.items()
        },
        "cost": {
            "measurements": sum("failed" not in found["result"] for found in stored.values()),
            "of": len(keys),
            "rows": sum(found["rows"] for found in stored.values()),
            "seconds": round(sum(found["seconds"] for found in stored.values()), 1),
            "machines": sorted({found["machine"] for found in stored.values()}),
            "devices": sorted({found["device"] for found in stored.values()}),
            # results of before do not say
            "torch": sorted({found["torch"] for found in stored.values() if "torch" in found}),
        },
        "keys": list(stored),
        "tasks": tables.pop("table", []),
        **tables,
        "limits": [_leaks(one) for one in rows.get("limits", ())],
        "attack": [_attacked(one) for one in rows.get("attack", ())],
        "claims": [claim.to_json() for claim in claims],
        "goals": [goal.to_json() for goal in all_goals(measured, judges, tasks, default, claims)],
    }


def _evaluated(one: Measured, judges: Sequence[str]) -> Row:
    """One job's figures, by judge."""
    info = one.result.get("edit", {})
    return {
        "task": one.task,
        "kind": one.kind,
        "anchor": one.anchor,
        "method": one.method,
        "subset": one.subset,
        "objective": one.objective,
        "seed": one.seed,
        "step": one.step,
        "concepts_in_the_edit": one.joint,
        "seconds": info.get("seconds", {}),
        "dropped_anchor_images": info.get("dropped", 0),
        "failed": one.result.get("failed"),
        "diverged": one.result.get("diverged") or info.get("diverged"),
        "not_measured": one.result.get("not_measured", []),
        "judges": {judge: _by_judge(one, judge) for judge in judges if one.observations},
        "copies": _copies(one),
        "position_kept": as_json(share(pool([one], "position", None, TARGET), resamples=FEW_RESAMPLES)),
        "position_kept_surrounding": as_json(
            share(pool([one], "position", None, SURROUNDING), resamples=FEW_RESAMPLES)
        ),
    }


def _by_judge(one: Measured, judge: str) -> Row:
    roles = sorted({seen.role for seen in one.observations if seen.judge == judge})
    words = sorted({seen.measure for seen in one.observations if seen.judge == judge} - {ACCURACY, COPIES})
    row: Row = {"floor": floor([one], judge), "words": {}}
    for role in roles:
        found, distance = pool([one], ACCURACY, judge, (role,)), mean_kid([one], judge, (role,))
        row[role] = {
            "before": as_json(share(found, "before", FEW_RESAMPLES)),
            "after": as_json(share(found, resamples=FEW_RESAMPLES), found.images),
            "change": as_json(change(found, FEW_RESAMPLES)),
            "kept": as_json(kept(found, FEW_RESAMPLES)) if role == "surrounding" else None,
            "score_before": as_json(mean_score([one], ACCURACY, judge, (role,), "before")),
            "score_after": as_json(mean_score([one], ACCURACY, judge, (role,))),
            "kid": distance.value if distance else None,
            "kid_error": distance.standard_error if distance and isfinite(distance.standard_error) else None,
        }
    row["surrounding_by_name"] = {
        seen.name: [round(sum(counts) / (seen.images * len(seen.prompts)), 4) for counts in (seen.before, seen.after)]
        for seen in one.observations
        if seen.judge == judge and seen.measure == ACCURACY and seen.role == "surrounding"
    }
    for group in words:
        row["words"][group] = {
            role: {
                "before": as_json(share(found, "before", FEW_RESAMPLES)),
                "after": as_json(share(found, resamples=FEW_RESAMPLES), found.images),
            }
            for role in ("target", "surrounding")
            # the style word in a style's own prompts is the target, which is meant to be lost
            if not (one.kind == group == "style" and role == "target") and (found := pool([one], group, judge, (role,)))
        }
    return row


def _copies(one: Measured) -> Row | None:
    """Copy rates by role, or None where they were not measured."""
    found = {role: pool([one], COPIES, None, (role,)) for role in ("target", "anchor", *_ROBUSTNESS)}
    rates = {
        role: {
            "before": as_json(share(counts, "before", FEW_RESAMPLES)),
            "after": as_json(share(counts, resamples=FEW_RESAMPLES), counts.images),
            "similarity_before": as_json(mean_score([one], COPIES, None, (role,), "before")),
            "similarity_after": as_json(mean_score([one], COPIES, None, (role,))),
        }
        for role, counts in found.items()
        if counts
    }
    return rates or None


def _leaks(one: Measured) -> Row:
    """How many prompts still reach the target, and the worst of them."""
    row: Row = {"task": one.task, "kind": one.kind, "method": one.method, "failed": one.result.get("failed")}
    scan = one.result.get("scan")
    if scan is None:
        return row
    verdicts = [finding["verdict"] for finding in scan["findings"]]
    by_family = {
        family: sum(finding["family"] == family and finding["verdict"] == "leak" for finding in scan["findings"])
        for family in sorted({finding["family"] for finding in scan["findings"]})
    }
    validation = one.result.get("validation")
    second = {found["prompt"]: found["verdict"] for found in validation["findings"]} if validation else {}
    leaks = [finding for finding in scan["findings"] if finding["verdict"] == "leak"]
    return {
        **row,
        "tried": len(verdicts),
        "leaks": verdicts.count("leak"),
        "possible": verdicts.count("possible"),
        "leaks_by_family": by_family,
        "false_alarms": scan["false_alarms"],
        "target_before": scan["target_before"],
        "target_after": scan["target_after"],
        "worst": [
            {
                "prompt": finding["prompt"],
                "family": finding["family"],
                "before": finding["before"],
                "after": finding["after"],
            }
            for finding in leaks[:5]
        ],
        "confirmed_by_validation_judge": sum(second.get(finding["prompt"]) == "leak" for finding in leaks)
        if second
        else None,
        "not_tried": scan["not_tried"],
    }


def _attacked(one: Measured) -> Row:
    """Success against budget, by judge."""
    row: Row = {"task": one.task, "kind": one.kind, "method": one.method, "failed": one.result.get("failed")}
    points = one.result.get("attack")
    if points is None:
        return row
    curves: dict[str, list[Row]] = {}
    for place, judge in enumerate(one.result["judges"]):
        curves[judge] = [
            {"steps": point["steps"], "success": _success(point["successes"][place], point["images"])}
            for point in points
        ]
    return {**row, "curves": curves, "budget": points[-1]["steps"]}


def _success(counts: Sequence[int], images: int) -> Row | None:
    hits = [place < count for count in counts for place in range(images)]
    prompts = [number for number in range(len(counts)) for _ in range(images)]
    return as_json(share_interval(hits, prompts if len(counts) > 1 else None), len(hits))
