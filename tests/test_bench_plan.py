"""What a benchmark would do: its jobs, and keys that change with all that a result depends on, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from concept_ablation.core.attack import AttackSettings
from concept_ablation.core.bench import plan
from concept_ablation.core.bench.experiments import EXPERIMENTS, Selection, plan_jobs, sibling_anchors, union
from concept_ablation.core.bench.pace import Pace, attack_rows, sampling_rows, scan_rows
from concept_ablation.core.bench.plan import BenchJob, Edit, Fingerprints, Method, Protocol, digest, parse_method
from concept_ablation.core.bench.units import captions, units
from concept_ablation.core.concept import Concept
from concept_ablation.core.errors import AblationError, Interrupted
from concept_ablation.core.leaks import ScanSettings
from concept_ablation.core.prompts import BUILT_IN, normalise
from concept_ablation.core.samplers import SampleSettings
from concept_ablation.core.tasks import ListedTask

AROUND = ("owl", "duck", "eagle", "dove")
ROOSTER = ListedTask("rooster", Concept("rooster", "bird"), AROUND)
MONET = ListedTask("monet", Concept("Monet", "painting", "style"), ("Manet", "Renoir", "Degas", "Dali"))
DALI = ListedTask("dali", Concept("Dali", "painting", "style"), ("Monet", "Manet", "Renoir", "Degas"))
BUS = ListedTask(
    "bus",
    Concept("Night bus to Marzipan Square, 1931", "a bus", "memorized", anchor_prompts=("a bus", "a bus at night")),
    AROUND,
    "bus.png",
)
TOOLS = Fingerprints("model", ("judge 1",), "sscd", {"bus.png": "sha"}, (("colour", ("red", "blue")),), "categories")
JOB = BenchJob("evaluate", ROOSTER, Edit((ROOSTER,), Method()))


def key(denoiser, job=JOB, tools=TOOLS, protocol=Protocol()) -> str:  # noqa: B008 - frozen
    made = plan.recipe_of(job.edit, denoiser, protocol) if job.edit else None
    return plan.job_key(job, made, tools, protocol)


def varied(task: ListedTask, **method: object) -> BenchJob:
    return BenchJob("evaluate", task, Edit((task,), Method(**method)))


def test_a_digest_depends_on_the_value_alone():
    assert digest({"b": 1, "a": (1, 2)}) == digest({"a": [1, 2], "b": 1})
    assert digest("π") == digest("\u03c0") and digest([1, 2]) != digest([2, 1])
    with pytest.raises(TypeError, match="object cannot be part of a key"):
        digest({"a": object()})


def test_a_key_stays_the_same_for_equal_jobs(tiny, make_model):
    again = BenchJob("evaluate", replace(ROOSTER), Edit((replace(ROOSTER),), Method("balanced")))
    assert key(tiny) == key(make_model(seed=0), again, replace(TOOLS), Protocol())
    # what only names something has no part in it
    assert key(tiny) == key(tiny, varied(replace(ROOSTER, name="cock"), subset="cross-attn"))
    # a detector and pictures play no part where nothing was memorized, nor the settings of other measurements
    assert key(tiny) == key(tiny, tools=replace(TOOLS, detector=None, pictures={}))
    assert key(tiny) == key(tiny, protocol=Protocol(scan=ScanSettings(each=3), attack=AttackSettings(batch=2)))


@pytest.mark.parametrize(
    "change",
    [
        {"job": varied(replace(ROOSTER, concept=Concept("rooster", "fowl")))},
        {"job": varied(replace(ROOSTER, surrounding=AROUND[:3]))},
        {"job": varied(ROOSTER, subset="full")},
        {"job": varied(ROOSTER, objective="noise")},
        {"job": varied(ROOSTER, preset="paper")},
        {"job": varied(ROOSTER, steps=7)},
        {"job": varied(ROOSTER, constant_rate=True)},
        {"job": replace(JOB, edit=Edit((ROOSTER,), Method(), seed=1))},
        {"job": replace(JOB, edit=Edit((ROOSTER, MONET), Method()))},
        {"job": replace(JOB, step=25)},
        {"job": replace(JOB, robustness=False)},
        {"job": replace(JOB, kind="leaks")},
        {"tools": replace(TOOLS, model="other")},
        {"tools": replace(TOOLS, judges=("judge 1", "judge 2"))},
        {"tools": replace(TOOLS, words=())},
        {"protocol": Protocol(prompts=9)},
        {"protocol": Protocol(images=9)},
        {"protocol": Protocol(steps=9)},
        {"protocol": Protocol(guidance=2.0)},
        {"protocol": Protocol(first_seed=1)},
        {"protocol": Protocol(training={"batch": 3})},
        {"protocol": Protocol(dataset={"images": 3})},
    ],
    ids=str,
)
def test_a_key_changes_with_everything_that_a_result_depends_on(tiny, change):
    assert key(tiny, **change) != key(tiny)


def test_a_key_changes_with_the_code_format(tiny, monkeypatch):
    before = key(tiny)
    monkeypatch.setattr(plan, "FORMAT", plan.FORMAT + 1)
    assert key(tiny) != before


def test_keys_of_memorized_images_change_with_their_instruments(tiny):
    job = varied(BUS)
    keys = {
        key(tiny, job),
        key(tiny, job, replace(TOOLS, detector=None)),
        key(tiny, job, replace(TOOLS, pictures={})),
        key(tiny, varied(BUS, ranked=True)),
    }
    assert len(keys) == 4


def test_keys_of_scans_and_attacks_change_with_their_settings(tiny):
    scan, attack = replace(JOB, kind="leaks"), BenchJob("attack", ROOSTER, None)
    assert key(tiny, scan) != key(tiny, scan, protocol=Protocol(scan=ScanSettings(each=3)))
    assert key(tiny, scan) != key(tiny, scan, replace(TOOLS, categories=""))
    assert key(tiny, attack) != key(tiny, attack, protocol=Protocol(attack=AttackSettings(batch=2)))
    assert key(tiny, attack) != key(tiny, replace(attack, edit=JOB.edit))
    # a scan tries the style words of the whole list
    assert key(tiny, scan) != key(tiny, scan, replace(TOOLS, words=(*TOOLS.words, ("style", ("noto", "blob")))))


def test_keys_change_with_the_prompts_and_with_the_checkpoints_that_are_kept(tiny):
    assert key(tiny, JOB) != key(tiny, JOB, replace(TOOLS, prompts="other templates"))
    watched, denser = varied(ROOSTER, constant_rate=True, steps=200), Protocol(checkpoints=(10, 200))
    assert key(tiny, watched) != key(tiny, watched, protocol=denser)
    assert key(tiny, JOB) == key(tiny, JOB, protocol=denser), "which keeps none"


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("paper", Method("paper")),
        ("fast:full", Method("fast", "full")),
        ("balanced::noise", Method("balanced", None, "noise")),
    ],
)
def test_methods_are_read_and_written_alike(text, method):
    assert parse_method(text) == method and method.label == text


@pytest.mark.parametrize("text", ["", ":full", "a:b:c:d"])
def test_what_is_no_method_is_refused(text):
    with pytest.raises(AblationError, match="is no method"):
        parse_method(text)


def test_experiments_share_jobs_and_cover_the_tasks(tiny):
    selection = Selection((ROOSTER, MONET, DALI, BUS), (Method(), Method("paper")), checkpoints=(1, 2))
    jobs = plan_jobs(list(EXPERIMENTS), selection)
    assert list(jobs) == list(EXPERIMENTS)
    # a memorized image has one method
    assert len(jobs["table"]) == 3 * 2 + 1
    # 3 tasks, of which instances make up for a lack of styles or the other way round; 5 objectives, 2 checkpoints
    assert len(jobs["objectives"]) == 3 * 5 * 2 and not any(job.robustness for job in jobs["objectives"])
    assert {job.edit.method.steps for job in jobs["objectives"]} == {2}
    keys = {name: {key(tiny, job) for job in found} for name, found in jobs.items()}
    assert len(keys["table"] & keys["subsets"]) == 1 and len(keys["table"] & keys["styles"]) == 2
    assert keys["table"] & keys["memorized"] and keys["table"] & keys["anchors"]
    assert {job.edit is None for job in jobs["attack"]} == {True, False}
    with pytest.raises(AblationError, match="no experiment 'tables'"):
        plan_jobs(["tables"], selection)


def test_comparisons_take_as_many_of_each_kind_as_there_are():
    assert Selection((ROOSTER, MONET, DALI), (Method(),), compare=2).compared() == [ROOSTER, MONET]
    assert Selection((MONET, DALI), (Method(),), compare=2).compared() == [MONET, DALI]
    assert Selection((ROOSTER, replace(ROOSTER, name="b")), (Method(),), compare=2).compared()[1].name == "b"


def test_one_edit_of_several_keeps_no_target():
    joint = union((MONET, DALI))
    assert joint[0].surrounding == ("Manet", "Renoir", "Degas") and joint[1].surrounding == ("Manet", "Renoir", "Degas")
    with pytest.raises(AblationError, match="anchor of rooster is ablated"):
        union((ROOSTER, ListedTask("bird", Concept("bird", "animal"), AROUND)))


def test_other_anchors_are_surrounding_concepts_no_more():
    first, second = sibling_anchors(ROOSTER)
    assert (first.concept.anchor, second.concept.anchor) == ("owl", "duck")
    assert first.surrounding == ("duck", "eagle", "dove")


def test_units_draw_as_many_pictures_of_few_captions():
    protocol = Protocol(prompts=4, images=2)
    found = {(unit.role, unit.name): unit for unit in units(BUS, BUILT_IN, protocol, robustness=True)[0]}
    assert {unit.pictures for unit in found.values()} == {8}
    assert found["target", BUS.concept.target].prompts == (BUS.concept.target,)
    assert len(set(found["misspelled", BUS.concept.target].prompts)) == 4
    seeds = {seed for unit in found.values() for seed in unit.seeds}
    assert min(seeds) == protocol.first_seed
    plain = units(ROOSTER, BUILT_IN, protocol, robustness=False)[0]
    assert [unit.role for unit in plain] == ["target", "anchor", *["surrounding"] * 4]


def test_paraphrases_that_measure_are_never_trained_on():
    trained, held_out = captions(BUS)
    known = {normalise(text) for text in (*trained, BUS.concept.target, *BUS.concept.anchor_prompts)}
    assert held_out and not known & {normalise(text) for text in held_out}


def test_rows_are_pictures_times_steps_times_branches():
    assert sampling_rows(80, SampleSettings(steps=25)) == 4000
    assert sampling_rows(80, SampleSettings(steps=25, guidance=1)) == 2000
    scan = ScanSettings(each=2, seeds=1, suspects=3, more_seeds=4, sample=SampleSettings(steps=1))
    assert scan_rows(scan) == 2 * (2 * (6 * 2 * 1 + (3 + 2) * 4) + 8 + 4)
    attack = AttackSettings((0, 10), batch=2, images=3, prompts=2, seeds=2, sample=SampleSettings(steps=1))
    assert attack_rows(attack) == 2 * (3 + 2 * 4) + 10 * 2 * 3


def test_time_that_is_up_ends_work_and_work_that_is_too_long_does_not_begin():
    with pytest.raises(Interrupted, match="time is up"):
        Pace(0.0).check()
    pace = Pace(10.0, rate=100.0)
    pace.require(100 * 60)
    with pytest.raises(Interrupted, match="in one piece"):
        pace.require(100 * 60 * 11)
    Pace(None, rate=1.0).require(1e12)
    pace.learn(400, 2.0)
    assert pace.rate == 150.0
