"""Conclusions of hand-made results whose answers are known: holding, failing, too uncertain, not measured."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from concept_ablation.core.bench.claims import Claim, all_claims
from concept_ablation.core.bench.figures import Measured, difference, kept, mean_kid, pool, share
from concept_ablation.core.bench.goals import all_goals
from concept_ablation.core.bench.measures import Observation
from concept_ablation.core.concept import Concept
from concept_ablation.core.tasks import ListedTask

PROMPTS, IMAGES = tuple(f"prompt {number}" for number in range(10)), 8
AROUND = ("one", "two", "three", "four")
JUDGES = ["judge", "other judge"]
TASKS = [
    *(ListedTask(f"instance-{n}", Concept(f"thing {n}", "stuff"), AROUND) for n in range(2)),
    *(ListedTask(f"style-{n}", Concept(f"style {n}", "art", "style"), AROUND) for n in range(2)),
    *(ListedTask(f"memorized-{n}", Concept(f"caption {n}", "anchor", "memorized"), AROUND, "a.png") for n in range(2)),
]
DEFAULT = dict.fromkeys(("instance", "style", "memorized"), "balanced")
BASE = Measured(
    "table",
    TASKS[0].name,
    "instance",
    method="balanced",
    subset="cross-attn",
    objective="model",
    seed=0,
    step=None,
    anchor="stuff",
    own_anchor=True,
    joint=1,
    observations=(),
    result={},
)


def seen(role: str, after: float, *, before: float = 1.0, measure: str = "accuracy", judge: str | None = None, name=""):
    """An observation with about the same share in every prompt, so that prompts differ where they can."""
    counts = [min(IMAGES, round(after * IMAGES) + (place % 2 if 0 < after < 1 else 0)) for place in range(len(PROMPTS))]
    first = (round(before * IMAGES),) * len(PROMPTS)
    return Observation(measure, judge, name or role, role, PROMPTS, IMAGES, first, tuple(counts))


def measured(experiment: str, shares: dict[str, float], judges=JUDGES, **more: object) -> Measured:
    observations = tuple(seen(role, after, judge=judge) for judge in judges for role, after in shares.items())
    return replace(BASE, experiment=experiment, observations=observations, **more)


def claim(rows: list[Measured], name: str, judges=JUDGES) -> Claim:
    (found,) = [one for one in all_claims(rows, judges) if one.id == name]
    return found


def goal(rows: list[Measured], name: str, judges=JUDGES, tasks=TASKS) -> Claim:
    (found,) = [one for one in all_goals(rows, judges, tasks, DEFAULT) if one.id == name]
    return found


def checkpoints(objective: str, targets: list[float], around: list[float], kind: str = "instance") -> list[Measured]:
    return [
        measured(
            "objectives",
            {"target": target, "surrounding": kept_},
            objective=objective,
            kind=kind,
            task=f"{kind}-0",
            step=25 * (place + 1),
        )
        for place, (target, kept_) in enumerate(zip(targets, around, strict=True))
    ]


def test_nothing_measured_proves_nothing():
    assert {one.verdict for one in all_claims([], JUDGES)} == {"not measured"}
    assert {one.verdict for one in all_goals([], JUDGES, TASKS, DEFAULT)} == {"not measured"}


def test_shares_differences_and_ratios_have_the_values_of_the_counts():
    one = replace(BASE, observations=(seen("target", 0.5, before=1.0, judge="judge"),))
    found = pool([one], "accuracy", "judge", ("target",))
    assert found.images == 80 and found.tasks == 1
    # 4 of 8 in every other prompt, 5 of 8 in the rest
    assert share(found).value == pytest.approx(0.5625) and share(found, "before").value == 1.0
    assert kept(found).value == pytest.approx(0.5625)
    same = replace(BASE, observations=(seen("target", 0.25, judge="judge"),))
    estimate, over = difference(found, pool([same], "accuracy", "judge", ("target",)))
    assert estimate.value == pytest.approx(-0.25) and over.images == 80
    assert difference(found, pool([], "accuracy", "judge", ("target",)))[0] is None


def test_checkpoints_and_seeds_are_pooled_and_not_overwritten():
    rows = [replace(measured("table", {"target": 0.0}), seed=seed) for seed in (0, 1)]
    rows += [replace(measured("table", {"target": 1.0}), seed=2)]
    found = pool(rows, "accuracy", "judge", ("target",))
    assert found.images == 240 and share(found).value == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("model", "noise", "verdict", "why"),
    [
        ([0.5, 0.0], [1.0, 0.5], "holds", "above 0"),
        ([1.0, 0.5], [0.5, 0.0], "does not hold", "other way"),
        ([0.5, 0.0], [0.5, 0.0], "does not hold", "includes 0"),
    ],
)
def test_model_based_is_faster_if_its_curve_lies_lower(model, noise, verdict, why):
    rows = checkpoints("model", model, [1.0, 1.0]) + checkpoints("noise", noise, [1.0, 1.0])
    found = claim(rows, "model-faster-than-noise")
    assert found.verdict == verdict and why in found.reason
    assert found.figure["n"] == 160 and found.tasks == 1
    assert found.numbers["model"]["25"]["value"] == pytest.approx(model[0], abs=0.07)
    assert found.validation == {"judge": "other judge", "verdict": verdict, "figure": found.figure, "agrees": True}


def test_loss_maximization_is_compared_where_both_still_trained():
    rows = checkpoints("model", [0.5, 0.0], [1.0, 0.75])
    diverged = checkpoints("loss-max", [0.0], [0.25])
    diverged.append(replace(diverged[0], step=50, observations=()))
    found = claim(rows + diverged, "loss-max-hurts-neighbours")
    assert found.verdict == "holds" and found.numbers["steps"] == [25]
    assert claim(rows + checkpoints("loss-max", [0.0], [1.0]), found.id).verdict == "does not hold"
    assert claim(rows, found.id).verdict == "not measured"


def test_a_task_on_which_loss_maximization_diverged_early_counts():
    rows = checkpoints("model", [0.5, 0.0], [1.0, 1.0]) + checkpoints("loss-max", [0.0], [0.25])
    for objective in ("model", "loss-max"):
        rows += [replace(one, task="instance-1") for one in checkpoints(objective, [0.5, 0.0], [1.0, 1.0])]
    found = claim(rows, "loss-max-hurts-neighbours")
    assert found.numbers["steps"] == [25, 50] and found.tasks == 2 and found.figure["value"] > 0.3


def test_a_difference_of_none_is_not_certain():
    same = pool([measured("table", {"target": 0.0})], "accuracy", "judge", ("target",))
    estimate, over = difference(same, same)
    # the rule of three
    assert (estimate.value, estimate.high) == (0.0, pytest.approx(3 / over.images, rel=0.02))
    assert estimate.low == -estimate.high


def test_that_everything_was_kept_is_not_certain():
    found = kept(pool([measured("table", {"surrounding": 1.0})], "accuracy", "judge", ("surrounding",)))
    assert found.value == 1 and found.low == pytest.approx(1 - 3 / 80, abs=2e-3) and found.high > 1


def test_the_mean_kernel_distance_has_the_error_of_a_mean():
    one = replace(seen("surrounding", 1.0, judge="judge"), kid=0.2, kid_error=0.03)
    other = replace(one, name="other", kid=0.4, kid_error=0.04)
    found = mean_kid([replace(BASE, observations=(one, other))], "judge", ("surrounding",))
    assert (found.value, found.standard_error) == (pytest.approx(0.3), pytest.approx(0.025))
    unknown = mean_kid([replace(BASE, observations=(one, replace(other, kid_error=None)))], "judge", ("surrounding",))
    assert unknown.value == found.value and math.isnan(unknown.standard_error)
    assert mean_kid([BASE], "judge", ("surrounding",)) is None


def test_typos_are_compared_between_subsets():
    def rows(cross: float, embedding: float) -> list[Measured]:
        return [
            measured("subsets", {"target": 0.0, "misspelled": after}, subset=subset)
            for subset, after in (("cross-attn", cross), ("embedding", embedding))
        ]

    assert claim(rows(0.0, 0.5), "embedding-less-robust-to-typos").verdict == "holds"
    assert claim(rows(0.5, 0.0), "embedding-less-robust-to-typos").verdict == "does not hold"
    assert claim(rows(0.5, 0.0)[:1], "embedding-less-robust-to-typos").verdict == "not measured"


def copied(subset: str, rate: float, method: str = "") -> Measured:
    return replace(
        BASE,
        experiment="memorized",
        subset=subset,
        method=method or f"balanced:{subset}",
        kind="memorized",
        task="memorized-0",
        observations=(seen("target", rate, measure="copies"),),
    )


def test_full_weights_are_best_only_if_every_other_subset_is_worse():
    name = "full-best-for-memorized"
    assert claim([copied("full", 0.0), copied("attn", 0.5), copied("cross-attn", 0.25)], name).verdict == "holds"
    # what only a paraphrase brings back is a copy as well
    hidden = replace(copied("attn", 0.0), observations=(seen("paraphrase", 0.5, measure="copies"),))
    paraphrased = replace(copied("full", 0.0), observations=(seen("paraphrase", 0.0, measure="copies"),))
    assert claim([paraphrased, hidden], name).verdict == "holds"
    tie = claim([copied("full", 0.0), copied("attn", 0.5), copied("cross-attn", 0.0)], name)
    assert tie.verdict == "does not hold" and tie.figure["value"] == 0
    assert tie.judge is None and tie.validation is None
    assert claim([copied("full", 0.0)], name).verdict == "not measured"
    # the pipeline of the paper is another method, and not a better subset
    ranked = copied("full", 1.0, "balanced:full+ranked")
    assert claim([copied("full", 0.0), copied("attn", 0.5), ranked], name).verdict == "holds"


def test_reverse_kl_is_judged_by_kind():
    rows = [
        *checkpoints("model", [0.5, 0.5], [1.0, 1.0], "style"),
        *checkpoints("reverse-kl", [0.25, 0.0], [1.0, 1.0], "style"),
        *checkpoints("model", [0.5, 0.0], [1.0, 1.0], "instance"),
        *checkpoints("reverse-kl", [0.25, 0.0], [1.0, 1.0], "instance"),
    ]
    assert claim(rows, "reverse-kl-better-on-styles").verdict == "holds"
    assert claim(rows, "reverse-kl-worse-on-instances").verdict == "does not hold"


@pytest.mark.parametrize(
    ("target", "around", "verdict"),
    [(0.0, 1.0, "holds"), (0.5, 1.0, "does not hold"), (0.0, 0.5, "does not hold")],
)
def test_several_concepts_cost_little_if_neither_side_loses_the_margin(target, around, verdict):
    rows = [
        measured("several", {"target": 0.0, "surrounding": 1.0}),
        measured("several", {"target": target, "surrounding": around}, joint=4),
    ]
    assert claim(rows, "several-concepts-cost-little").verdict == verdict
    assert claim(rows[:1], "several-concepts-cost-little").verdict == "not measured"


def anchored(after: float, anchor: str = "", *, floor: float = 0.0, task: str = "instance-0") -> Measured:
    """An edit with another anchor or, without one, with the task's own."""
    one = measured("anchors", {"target": after}, task=task, anchor=anchor or "stuff", own_anchor=not anchor)
    drawn = tuple(seen("anchor", 1.0, before=1 - floor, judge=judge) for judge in JUDGES)
    return replace(one, observations=(*one.observations, *drawn))


def test_the_worst_of_the_other_anchors_decides():
    own, good, bad = anchored(0.0), anchored(0.0, "good"), anchored(0.5, "bad")
    assert claim([own, good], "other-anchors-work").verdict == "holds"
    found = claim([own, good, bad], "other-anchors-work")
    assert found.verdict == "does not hold" and set(found.numbers) == {"instance-0 → good", "instance-0 → bad"}
    assert found.figure["value"] == found.numbers["instance-0 → bad"]["difference"]["value"] == 0.5625
    assert claim([own, bad], "other-anchors-work").verdict == "does not hold"
    assert claim([own], "other-anchors-work").verdict == "not measured"


def test_a_bad_anchor_of_one_task_is_not_hidden_by_good_ones_of_others():
    names = [f"instance-{number}" for number in range(8)]
    rows = [anchored(0.0, anchor, task=task) for task in names for anchor in ("", "first", "second")]
    assert claim(rows, "other-anchors-work").verdict == "holds"
    # an eighth of the pictures of all first anchors is less than the margin
    rows[1] = anchored(0.5, "first", task=names[0])
    found = claim(rows, "other-anchors-work")
    assert found.verdict == "does not hold" and found.tasks == 8 and found.figure["n"] == 80
    assert "The worst of 16: instance-0 → first 0.56" in found.reason


def test_the_claim_of_other_anchors_says_against_what_each_edit_was_judged():
    found = claim([anchored(0.0, floor=0.25), anchored(0.0, "owl", floor=0.125)], "other-anchors-work")
    assert "judged against its own anchor" in found.text
    assert found.reason.endswith("owl 0.00 with a floor of 0.12; stuff 0.00 with a floor of 0.25.")
    (numbers,) = found.numbers.values()
    assert (numbers["own anchor"]["floor"], numbers["other anchor"]["floor"]) == (0.25, 0.125)


def table(target: float, around: float = 1.0, misspelled: float = 0.0, copies: float = 0.0) -> list[Measured]:
    rows = []
    for task in TASKS:
        shares = {"target": target, "surrounding": around, "misspelled": misspelled}
        one = measured("table", shares, task=task.name, kind=task.concept.kind)
        if task.picture:
            one = replace(one, observations=(*one.observations, seen("target", copies, measure="copies")))
        rows.append(one)
    return rows


def test_goals_are_met_or_missed_over_all_tasks():
    rows = table(0.0)
    assert {one.verdict for one in all_goals(rows, JUDGES, TASKS, DEFAULT)} == {"met"}
    assert goal(rows, "target-accuracy").tasks == 4 and goal(rows, "surrounding-kept").tasks == 6
    assert goal(table(0.5), "target-accuracy").verdict == "missed"
    assert goal(table(0.0, around=0.75), "surrounding-kept").verdict == "missed"
    assert goal(table(0.0, misspelled=0.5), "misspelled-target").verdict == "missed"
    leaky = [
        replace(one, observations=(*one.observations, seen("paraphrase", 0.25, measure="copies")))
        if one.kind == "memorized"
        else one
        for one in table(0.0)
    ]
    assert goal(leaky, "copy-rate").verdict == "missed", "a paraphrase that copies is a copy"
    anchors = seen("anchor", 0.5, measure="copies")
    anchored = [replace(one, observations=(*one.observations, anchors)) for one in table(0.0)]
    assert goal(anchored, "copy-rate").verdict == "met" and "anchors' own prompts" in goal(anchored, "copy-rate").reason
    found = goal(table(0.0, copies=0.25), "copy-rate")
    assert found.verdict == "missed" and set(found.numbers["by task"]) == {"memorized-0", "memorized-1"}


def test_the_target_goal_says_what_pictures_of_the_anchor_would_get():
    rows = [
        replace(
            one,
            observations=(
                *one.observations,
                *(seen("anchor", 1.0, before=0.75 if one.kind == "style" else 1.0, judge=judge) for judge in JUDGES),
            ),
        )
        for one in table(0.5)
    ]
    found = goal(rows, "target-accuracy")
    assert found.reason == (
        "Measured on all 4 tasks. Instances 0.56 with a floor of 0.00; styles 0.56 with a floor of 0.25."
    )
    assert found.numbers["style"]["floor"] == 0.25 and found.numbers["style"]["after"]["value"] == 0.5625


def test_a_goal_over_part_of_the_tasks_is_not_measured():
    rows = [one for one in table(0.0) if one.task != "style-1"]
    found = goal(rows, "target-accuracy")
    assert (
        found.verdict == "not measured" and found.reason == "Measured on 3 of 4 tasks." and found.figure["value"] == 0
    )
    assert goal(rows, "copy-rate").verdict == "met"
    # another method's results are no substitute
    assert goal([replace(one, method="paper") for one in table(0.0)], "target-accuracy").tasks == 0
    assert goal(table(0.0), "copy-rate", tasks=TASKS[:2]).verdict == "not measured"


def test_the_second_judge_is_asked_about_everything():
    rows = table(0.0)
    assert goal(rows, "judges-agree").verdict == "met" and goal(rows, "judges-agree").numbers["of"] == 3
    assert goal(rows, "judges-agree", JUDGES[:1]).verdict == "not measured"
    contrary = tuple(seen("target", 1.0, judge="other judge") for _ in range(1))
    rows = [replace(one, observations=(*contrary, *one.observations[:3], *one.observations[4:])) for one in rows]
    found = goal(rows, "judges-agree")
    assert found.verdict == "missed" and "target-accuracy" in found.reason
    assert goal(rows, "target-accuracy").validation["agrees"] is False


def test_judges_who_agree_so_far_may_still_disagree():
    found = goal([one for one in table(0.0) if one.task != "style-1"], "judges-agree")
    assert found.verdict == "not measured"
    everything = all_claims(checkpoints("model", [0.5], [1.0]) + checkpoints("noise", [1.0], [1.0]), JUDGES)
    (found,) = [one for one in all_goals(table(0.0), JUDGES, TASKS, DEFAULT, everything) if one.id == "judges-agree"]
    assert found.verdict == "not measured" and found.numbers["agrees on"] == found.numbers["of"] == 4
    assert "Not measured: " in found.reason and "other-anchors-work" in found.reason
