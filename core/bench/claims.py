"""The paper's qualitative claims, each decided by what was measured.

A claim holds if the 95 % interval of its figure lies wholly on the claimed side of 0 (or, where something is claimed to
cost little, on the near side of a margin that is stated). It does not hold if it lies elsewhere, which includes that
the figure is too uncertain; the reason says which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ..statistics import Estimate
from .figures import (
    ACCURACY,
    CAPTION,
    COPIES,
    SURROUNDING,
    TARGET,
    Measured,
    Pool,
    as_json,
    difference,
    floor,
    pool,
    share,
)

Verdict = Literal["holds", "does not hold", "not measured", "met", "missed"]

MARGIN = 0.10
"""What "little" means: points of CLIP accuracy."""


@dataclass(frozen=True)
class Claim:
    """A statement, and whether the figures bear it out."""

    id: str
    text: str
    verdict: Verdict
    reason: str
    figure: dict[str, Any] | None
    """The figure that decides, with its interval and the number n of pictures."""
    numbers: dict[str, Any]
    """What else was measured."""
    tasks: int
    judge: str | None
    """Who decided; None where no judge is needed."""
    validation: dict[str, Any] | None = None
    """The same by the validation judge: verdict, figure, agrees."""

    def to_json(self) -> dict[str, Any]:
        """The claim as results.json has it."""
        return asdict(self)


Rule = Callable[[Sequence[Measured], str | None], Claim]


def all_claims(measured: Sequence[Measured], judges: Sequence[str]) -> list[Claim]:
    """Every claim by the first judge, with the verdict of the second, if there is one."""
    return [checked(rule, measured, judges) for rule in CLAIMS]


def checked(rule: Rule, measured: Sequence[Measured], judges: Sequence[str]) -> Claim:
    """What a rule says by the first judge, with the verdict of the second, if there is one and it has a say."""
    claim = rule(measured, judges[0])
    if len(judges) < 2 or claim.judge is None:
        return claim
    other = rule(measured, judges[1])
    agrees = None if "not measured" in (claim.verdict, other.verdict) else claim.verdict == other.verdict
    opinion = {"judge": judges[1], "verdict": other.verdict, "figure": other.figure, "agrees": agrees}
    return replace(claim, validation=opinion)


def _of(measured: Sequence[Measured], experiment: str, **wanted: object) -> list[Measured]:
    return [
        one
        for one in measured
        if one.experiment == experiment and all(getattr(one, name) == value for name, value in wanted.items())
    ]


def not_measured(id_: str, text: str, reason: str, judge: str | None, tasks: int = 0) -> Claim:
    """A claim that nothing can be said of."""
    return Claim(id_, text, "not measured", reason, None, {}, tasks, judge)


def _positive(
    id_: str, text: str, estimate: Estimate | None, over: Pool, judge: str | None, numbers: dict[str, Any]
) -> Claim:
    """A claim that a difference is above 0."""
    if estimate is None:
        return not_measured(id_, text, "One of the two was not measured.", judge)
    if math.isnan(estimate.low):
        verdict, reason = "does not hold", "There are too few prompts for an interval."
    elif estimate.low > 0:
        verdict, reason = "holds", "The interval of the difference lies above 0."
    elif estimate.high < 0:
        verdict, reason = "does not hold", "The difference goes the other way, and its interval lies below 0."
    else:
        verdict, reason = "does not hold", "The interval of the difference includes 0: not shown either way."
    return Claim(id_, text, verdict, reason, as_json(estimate, over.images), numbers, over.tasks, judge)


def _faster(measured: Sequence[Measured], judge: str | None) -> Claim:
    text = (
        "Model-based ablation converges faster than noise-based: its target accuracy, over all checkpoints, is lower."
    )
    model, noise = (_curve(measured, name, judge, TARGET) for name in ("model", "noise"))
    numbers = {name: _by_step(measured, name, judge, TARGET) for name in ("model", "noise")}
    return _positive("model-faster-than-noise", text, *difference(model, noise), judge, numbers)


def _hurts(measured: Sequence[Measured], judge: str | None) -> Claim:
    text = (
        "Loss maximization hurts neighbours: the accuracy of surrounding concepts, at the last checkpoint of each task "
        "that both reached, is lower than after model-based ablation."
    )
    rows = {name: _evaluated(measured, name) for name in ("model", "loss-max")}
    # of each task by itself: what diverged early is what was hurt most
    last: dict[tuple[str, int | None], int] = {}
    model, worst = ({(one.task, one.seed, one.step or 0) for one in found} for found in rows.values())
    for task, seed, step in model & worst:
        last[task, seed] = max(step, last.get((task, seed), 0))
    pools = [
        pool(
            [one for one in rows[name] if (one.step or 0) == last.get((one.task, one.seed))],
            ACCURACY,
            judge,
            SURROUNDING,
        )
        for name in ("loss-max", "model")
    ]
    steps = sorted(set(last.values()))
    numbers = {name: _by_step(measured, name, judge, SURROUNDING) for name in ("model", "loss-max")}
    return _positive("loss-max-hurts-neighbours", text, *difference(*pools), judge, {"steps": steps, **numbers})


def _typos(measured: Sequence[Measured], judge: str | None) -> Claim:
    text = "Editing the embedding is less robust to typos than cross-attn: misspelled targets come back more often."
    rows = {name: _of(measured, "subsets", subset=name) for name in ("cross-attn", "embedding")}
    pools = [pool(found, ACCURACY, judge, ("misspelled",)) for found in rows.values()]
    numbers = {
        name: {role: as_json(share(pool(found, ACCURACY, judge, (role,)))) for role in ("target", "misspelled")}
        for name, found in rows.items()
    }
    return _positive("embedding-less-robust-to-typos", text, *difference(*pools), judge, numbers)


def _full_best(measured: Sequence[Measured], judge: str | None) -> Claim:
    """Decided by the copy detector, so the judge has no part in it."""
    id_, text = (
        "full-best-for-memorized",
        "Full weights are best for memorized pictures: every other subset copies more, by the caption as it is, "
        "misspelled and paraphrased.",
    )
    rows = [one for one in _of(measured, "memorized") if not one.method.endswith("+ranked")]
    pools = {
        name: pool([one for one in rows if one.subset == name], COPIES, None, CAPTION)
        for name in dict.fromkeys(one.subset for one in rows if one.subset)
    }
    pools = {name: found for name, found in pools.items() if found}
    full = pools.pop("full", None)
    if full is None or not pools:
        return not_measured(id_, text, "Copies were not measured for full weights and another subset.", None)
    numbers = {name: as_json(share(found), found.images) for name, found in {"full": full, **pools}.items()}
    claims = [_positive(id_, text, *difference(full, found), None, numbers) for found in pools.values()]
    # the subset that comes nearest to full weights decides
    return min(claims, key=lambda claim: (claim.figure or {}).get("low") or 0.0)


def _reverse_styles(measured: Sequence[Measured], judge: str | None) -> Claim:
    text = "Reverse KL is better on styles: target accuracy, over all checkpoints, is lower than with forward KL."
    pools = [_curve(measured, name, judge, TARGET, "style") for name in ("reverse-kl", "model")]
    return _positive("reverse-kl-better-on-styles", text, *difference(*pools), judge, _kinds(measured, judge, "style"))


def _reverse_instances(measured: Sequence[Measured], judge: str | None) -> Claim:
    text = "Reverse KL is worse on instances: target accuracy, over all checkpoints, is higher than with forward KL."
    pools = [_curve(measured, name, judge, TARGET, "instance") for name in ("model", "reverse-kl")]
    numbers = _kinds(measured, judge, "instance")
    return _positive("reverse-kl-worse-on-instances", text, *difference(*pools), judge, numbers)


def _several(measured: Sequence[Measured], judge: str | None) -> Claim:
    text = (
        f"Several concepts in one model cost little: against one model each, neither target accuracy rises nor that of "
        f"surrounding concepts falls by as much as {MARGIN:.2f}."
    )
    rows = _of(measured, "several")
    single, joint = ([one for one in rows if (one.joint > 1) == several] for several in (False, True))
    return _little("several-concepts-cost-little", text, single, joint, judge)


def _anchors(measured: Sequence[Measured], judge: str | None) -> Claim:
    id_ = "other-anchors-work"
    text = (
        "Other anchors of the category work as well: with none of them is target accuracy, where each edit is judged "
        f"against its own anchor, higher by as much as {MARGIN:.2f} than with the task's own anchor."
    )
    compared, numbers = [], {}
    for own, other in _by_other_anchor(_of(measured, "anchors")):
        estimate, over = difference(*(pool(rows, ACCURACY, judge, TARGET) for rows in (own, other)))
        if estimate is None:
            continue
        accuracies = {name: with_floor(rows, judge) for name, rows in (("own anchor", own), ("other anchor", other))}
        numbers[f"{other[0].task} → {other[0].anchor}"] = {"difference": as_json(estimate), **accuracies}
        compared.append((estimate, over, own, other))
    if not compared:
        return not_measured(id_, text, "No task was measured with two anchors.", judge)
    # The claim is of every other anchor, so the worst one decides, by its own interval. That all of them must hold
    # makes a false "holds" no more likely, and a pool would hide a bad anchor among good ones.
    estimate, over, own, other = max(compared, key=lambda one: (math.isnan(one[0].high), one[0].high))
    verdict, reason = _within(estimate.high)
    said = [
        f"{rows[0].anchor} {figures['after']['value']:.2f} with a floor of {figures['floor']:.2f}"
        for rows in (other, own)
        if (figures := with_floor(rows, judge)) is not None
    ]
    reason += f" The worst of {len(compared)}: {other[0].task} → {'; '.join(said) or other[0].anchor}."
    tasks = len({rows[0].task for *_, rows in compared})
    return Claim(id_, text, verdict, reason, as_json(estimate, over.images), numbers, tasks, judge)


def _by_other_anchor(rows: Sequence[Measured]) -> list[tuple[list[Measured], list[Measured]]]:
    """For each other anchor of each task: the rows with the task's own anchor, and those with the other one."""
    own = {one.task: [row for row in rows if row.task == one.task and row.own_anchor] for one in rows}
    other: dict[tuple[str, str], list[Measured]] = {}
    for one in rows:
        if not one.own_anchor:
            other.setdefault((one.task, one.anchor), []).append(one)
    return [(own[task], found) for (task, _), found in other.items()]


def with_floor(rows: Sequence[Measured], judge: str | None) -> dict[str, Any] | None:
    """Target accuracy and its floor (`figures.floor`); None unless both were measured."""
    after, least = share(pool(rows, ACCURACY, judge, TARGET)), floor(rows, judge)
    return None if after is None or least is None else {"after": as_json(after), "floor": least}


def _little(id_: str, text: str, first: Sequence[Measured], second: Sequence[Measured], judge: str | None) -> Claim:
    """A claim that `second` does nearly as well as `first` on the target and on surrounding concepts."""
    target, over = difference(*(pool(found, ACCURACY, judge, TARGET) for found in (first, second)))
    around, _ = difference(*(pool(found, ACCURACY, judge, SURROUNDING) for found in (first, second)))
    if target is None or around is None:
        return not_measured(id_, text, "One of the two was not measured.", judge)
    verdict, reason = _within(target.high, -around.low)
    numbers = {"target": as_json(target), "surrounding": as_json(around)}
    return Claim(id_, text, verdict, reason, as_json(target, over.images), numbers, over.tasks, judge)


def _within(*ends: float) -> tuple[Verdict, str]:
    """Whether the bad ends of some intervals are all less than the margin."""
    if any(map(math.isnan, ends)):
        return "does not hold", "There are too few prompts for an interval."
    worst = max(ends)
    if worst < MARGIN:
        return "holds", f"The bad end of the interval is {worst:.3f}, less than the margin of {MARGIN:.2f}."
    return "does not hold", f"The bad end of the interval is {worst:.3f}, not less than the margin of {MARGIN:.2f}."


def _evaluated(measured: Sequence[Measured], objective: str, kind: str | None = None) -> list[Measured]:
    """Checkpoints of an objective that were measured: none after a training diverged."""
    rows = _of(measured, "objectives", objective=objective)
    return [one for one in rows if one.observations and kind in (None, one.kind)]


def _curve(
    measured: Sequence[Measured], objective: str, judge: str | None, roles: tuple[str, ...], kind: str | None = None
) -> Pool:
    return pool(_evaluated(measured, objective, kind), ACCURACY, judge, roles)


def _by_step(
    measured: Sequence[Measured], objective: str, judge: str | None, roles: tuple[str, ...], kind: str | None = None
) -> dict[str, Any]:
    """The accuracy of an objective at each checkpoint."""
    rows = _evaluated(measured, objective, kind)
    return {
        str(step): as_json(share(pool([one for one in rows if one.step == step], ACCURACY, judge, roles)))
        for step in sorted({one.step or 0 for one in rows})
    }


def _kinds(measured: Sequence[Measured], judge: str | None, kind: str) -> dict[str, Any]:
    """Target and surrounding accuracy by objective and step, for the comparison of forward and reverse KL."""
    return {
        f"{name}, {role[0]}": _by_step(measured, name, judge, role, kind)
        for name in ("model", "reverse-kl")
        for role in (TARGET, SURROUNDING)
    }


CLAIMS: tuple[Rule, ...] = (
    _faster,
    _hurts,
    _typos,
    _full_best,
    _reverse_styles,
    _reverse_instances,
    _several,
    _anchors,
)
