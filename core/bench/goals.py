"""The project's goals, each decided by what was measured of the default method.

A goal is met by its figure; the interval says how sure that is. A goal over less than all of its tasks is not measured,
whatever the figure of the others is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..statistics import Estimate
from ..tasks import ListedTask
from .claims import Claim, Rule, Verdict, checked, with_floor
from .figures import ACCURACY, CAPTION, COPIES, SURROUNDING, TARGET, Measured, Pool, as_json, kept, pool, share

TARGET_GOAL, KEPT_GOAL, MISSPELLED_GOAL = 0.05, 0.98, 0.10
_NAMED = ("instance", "style")
_ALL = ("instance", "style", "memorized")


def all_goals(
    measured: Sequence[Measured],
    judges: Sequence[str],
    tasks: Sequence[ListedTask],
    default: Mapping[str, str],
    claims: Sequence[Claim] = (),
) -> list[Claim]:
    """Every goal, over all of `tasks`.

    Args:
        measured: results; those of the experiment "table" by the default method count.
        judges: names, the main one first.
        tasks: the whole task list.
        default: label of the default method, by kind of concept.
        claims: the other conclusions that both judges should come to.
    """
    rows = [one for one in measured if one.experiment == "table" and one.method == default.get(one.kind)]
    rules = (_target(tasks), _kept(tasks), _copies(tasks), _misspelled(tasks))
    made = [checked(rule, rows, judges) for rule in rules]
    return [*made, agreement([*claims, *made], judges)]


def agreement(conclusions: Sequence[Claim], judges: Sequence[str]) -> Claim:
    """Whether the validation judge comes to the same conclusions as the first."""
    id_, text = "judges-agree", "The second judge agrees with the first on every conclusion."
    opinions = {one.id: one.validation["agrees"] for one in conclusions if one.validation is not None}
    decided = {name: agrees for name, agrees in opinions.items() if agrees is not None}
    if len(judges) < 2 or not decided:
        return Claim(id_, text, "not measured", "There was no second judge, or nothing to judge.", None, {}, 0, None)
    against = sorted(name for name, agrees in decided.items() if not agrees)
    undecided = sorted(opinions.keys() - decided.keys())
    reason = f"It disagrees on {', '.join(against)}." if against else f"It agrees on {len(decided)} conclusions."
    if undecided:
        reason += f" Not measured: {', '.join(undecided)}."
    numbers = {"agrees on": len(decided) - len(against), "of": len(decided), "not measured": undecided}
    # what is not measured yet may still go against it
    verdict: Verdict = "missed" if against else "not measured" if undecided else "met"
    return Claim(id_, text, verdict, reason, None, numbers, 0, judges[1])


def _target(tasks: Sequence[ListedTask]) -> Rule:
    text = f"Target CLIP accuracy is at most {TARGET_GOAL:.2f}, mean over instances and styles."

    def rule(measured: Sequence[Measured], judge: str | None) -> Claim:
        over = pool(_of_kinds(measured, _NAMED), ACCURACY, judge, TARGET)
        claim = _at_most("target-accuracy", text, over, TARGET_GOAL, _named(tasks, _NAMED), judge)
        by_kind = {kind: with_floor(_of_kinds(measured, (kind,)), judge) for kind in _NAMED}
        said = [
            f"{kind}s {figures['after']['value']:.2f} with a floor of {figures['floor']:.2f}"
            for kind, figures in by_kind.items()
            if figures is not None
        ]
        reason = f"{claim.reason} {'; '.join(said).capitalize()}." if said else claim.reason
        return replace(claim, reason=reason, numbers={**claim.numbers, **by_kind})

    return rule


def _misspelled(tasks: Sequence[ListedTask]) -> Rule:
    text = f"CLIP accuracy of misspelled targets is at most {MISSPELLED_GOAL:.2f}, mean over instances and styles."

    def rule(measured: Sequence[Measured], judge: str | None) -> Claim:
        over = pool(_of_kinds(measured, _NAMED), ACCURACY, judge, ("misspelled",))
        return _at_most("misspelled-target", text, over, MISSPELLED_GOAL, _named(tasks, _NAMED), judge)

    return rule


def _copies(tasks: Sequence[ListedTask]) -> Rule:
    text = "The copy rate of every memorized picture is 0, also of its misspelled and paraphrased caption."

    def rule(measured: Sequence[Measured], judge: str | None) -> Claim:
        rows = _of_kinds(measured, ("memorized",))
        claim = _at_most("copy-rate", text, pool(rows, COPIES, None, CAPTION), 0.0, _named(tasks, ("memorized",)), None)
        by_task = {
            name: as_json(share(pool([one for one in rows if one.task == name], COPIES, None, CAPTION)))
            for name in dict.fromkeys(one.task for one in rows)
        }
        anchors = pool(rows, COPIES, None, ("anchor",))
        moved = {when: as_json(share(anchors, when)) for when in ("before", "after")}
        reason = claim.reason
        if anchors:
            rates = [f"{share(anchors, when).value:.2f} {when}" for when in moved]
            reason += f" Of the pictures of the anchors' own prompts {' and '.join(rates)} are copies."
        return replace(claim, reason=reason, numbers={**claim.numbers, "by task": by_task, "anchors": moved})

    return rule


def _kept(tasks: Sequence[ListedTask]) -> Rule:
    text = f"The accuracy of surrounding concepts is at least {KEPT_GOAL:.2f} of the pretrained model's."

    def rule(measured: Sequence[Measured], judge: str | None) -> Claim:
        over = pool(measured, ACCURACY, judge, SURROUNDING)
        estimate, numbers = kept(over), {"before": as_json(share(over, "before")), "after": as_json(share(over))}
        verdict: Verdict = "met" if estimate is not None and estimate.value >= KEPT_GOAL else "missed"
        return _goal("surrounding-kept", text, over, estimate, verdict, _named(tasks, _ALL), judge, numbers)

    return rule


def _at_most(id_: str, text: str, over: Pool, goal: float, expected: set[str], judge: str | None) -> Claim:
    estimate, numbers = share(over), {"before": as_json(share(over, "before"))}
    verdict: Verdict = "met" if estimate is not None and estimate.value <= goal else "missed"
    return _goal(id_, text, over, estimate, verdict, expected, judge, numbers)


def _goal(
    id_: str,
    text: str,
    over: Pool,
    estimate: Estimate | None,
    verdict: Verdict,
    expected: set[str],
    judge: str | None,
    numbers: dict[str, Any],
) -> Claim:
    there = {cluster[0] for cluster, _ in over.counts} & expected
    figure = as_json(estimate, over.images)
    if there != expected or not expected:
        reason = f"Measured on {len(there)} of {len(expected)} tasks."
        return Claim(id_, text, "not measured", reason, figure, numbers, len(there), judge)
    reason = f"Measured on all {len(expected)} tasks."
    return Claim(id_, text, verdict, reason, figure, numbers, len(there), judge)


def _of_kinds(measured: Sequence[Measured], kinds: Sequence[str]) -> list[Measured]:
    return [one for one in measured if one.kind in kinds]


def _named(tasks: Sequence[ListedTask], kinds: Sequence[str]) -> set[str]:
    return {task.name for task in tasks if task.concept.kind in kinds}
