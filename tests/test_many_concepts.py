"""Many concepts in one delta, and the choice of settings: who is ablated, how deltas add up, which candidate wins."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from concept_ablation.core import closed_form, delta_file
from concept_ablation.core.concept import Concept, evaluation_prompts
from concept_ablation.core.errors import AblationError
from concept_ablation.core.files import write_json
from concept_ablation.core.presets import guided, recipe
from concept_ablation.core.prompts import BUILT_IN
from concept_ablation.core.samplers import SampleSettings
from concept_ablation.core.tasks import ListedTask

ROOT = Path(__file__).resolve().parents[1]
HINTS = json.loads((ROOT / "assets" / "emoji_diffusion" / "ablation_hints.json").read_text("utf-8"))
CATEGORIES = {
    "cat": "cat",
    **{f"{kind} cat": "cat" for kind in ("grumpy", "weary", "happy", "old", "wild")},
    **dict.fromkeys(("owl", "duck", "rooster", "penguin", "dove"), "bird"),
}
CAT = ListedTask("cat", Concept("grumpy cat", "cat"), ("dog",))


class CoinJudge:
    """Stands for the judge: a picture shows what it is asked for if its brightness is even."""

    name = "coin"

    def embed_images(self, images: np.ndarray) -> torch.Tensor:
        even = torch.from_numpy(images.reshape(len(images), -1).sum(1).astype(np.int64)) % 2 == 0
        return torch.stack((even.float(), 1 - even.float()), 1)

    def embed_concept(self, texts) -> torch.Tensor:
        return torch.tensor([0.0, 1.0]) if texts[0] in CATEGORIES.values() else torch.tensor([1.0, 0.0])


@pytest.fixture
def modules(monkeypatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = ("job_store", "measuring", "many_concepts", "choose_presets", "speed_presets")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return SimpleNamespace(**{name: __import__(name) for name in names})


@pytest.fixture
def bench(modules, make_model, tmp_path):
    sizes = replace(
        modules.many_concepts.TINY,
        preset="balanced",  # which begins with no closed form
        training={"steps": 1, "batch": 2},
        dataset={"images": 1, "preserve": 1, "sample": SampleSettings(steps=1)},
        most=4,
        neighbours=1,
        others=3,
    )
    store = modules.job_store.JobStore(tmp_path)
    return modules.many_concepts.Bench(make_model, CoinJudge(), sizes, store, {"machine": "m"})


def test_a_hundred_concepts_are_chosen_so_that_more_include_fewer(modules):
    sizes = modules.many_concepts.Sizes()
    ten, hundred = (modules.many_concepts.choose(HINTS["categories"], count, sizes) for count in (10, 100))
    assert len(hundred.tasks) == 100 and hundred.tasks[:10] == ten.tasks and hundred.others == ten.others
    targets = {task.concept.target for task in hundred.tasks}
    assert targets.isdisjoint(HINTS["categories"].values())
    told = {name for task in hundred.tasks for name in task.surrounding}
    others = {concept.target for concept in hundred.others}
    assert len(others) == 30 and not targets & told and not targets & others and not told & others
    for task in hundred.tasks:
        assert all(HINTS["categories"][name] == task.concept.anchor for name in task.surrounding)
    for count in (0, 101):
        with pytest.raises(AblationError, match="choose 1 to 100"):
            modules.many_concepts.choose(HINTS["categories"], count, sizes)


def test_all_methods_make_one_delta_and_merging_adds_up(modules, bench, monkeypatch):
    factor, calls = torch.linalg.cholesky_ex, []
    monkeypatch.setattr(closed_form.torch.linalg, "cholesky_ex", lambda *a, **k: calls.append(1) or factor(*a, **k))
    rows = list(modules.many_concepts.measure(bench, CATEGORIES, [2], modules.many_concepts.METHODS))
    # one for both concepts together, and one for each of those that are merged
    assert len(calls) == 1 + 2
    assert [row["method"] for row in rows] == list(modules.many_concepts.METHODS)
    choice = modules.many_concepts.choose(CATEGORIES, 2, bench.sizes)
    for row in rows:
        assert row["concepts"] == 2 and row["seconds_per_concept"] == pytest.approx(row["seconds"] / 2)
        assert len(row["accuracies"]) == 2 + 3
        first, second = zip(*(row["accuracies"][concept.target] for concept in choice.others), strict=True)
        change = row["others"]["change"]["value"]
        assert change == pytest.approx(sum(second) / 3 - sum(first) / 3)
    merged = delta_file.load(bench.make("merged closed forms", choice.tasks)[1])
    parts = [delta_file.load(bench.make("closed form", [task])[1]) for task in choice.tasks]
    for name, layer in merged.layers.items():
        total = sum(part.layers[name].weight for part in parts)
        torch.testing.assert_close(layer.weight, total, atol=1e-3, rtol=2e-3)
    spent = sum(bench.make("union", [task])[0]["seconds"] for task in choice.tasks)
    assert bench.make("merged", choice.tasks)[0]["seconds"] >= spent
    monkeypatch.setattr(modules.many_concepts, "ablate", lambda *a, **k: pytest.fail("a finished job is done again"))
    assert list(modules.many_concepts.measure(bench, CATEGORIES, [2], ["closed form"])) == rows[:1]


def test_the_closed_form_is_the_preset_instant(modules, bench, make_model):
    choice = modules.many_concepts.choose(CATEGORIES, 2, bench.sizes)
    header = delta_file.load(bench.make("closed form", choice.tasks)[1]).metadata
    made = recipe("instant", make_model())
    used = json.loads(header["concept_ablation.settings"])
    assert (used["auto_preserve"], used["generic"]) == (made.auto_preserve, made.generic) != (0, 0)
    assert used["closed_form"] == {**asdict(made.closed_form), **bench.sizes.closed_form}
    full = modules.many_concepts.Sizes()
    assert replace(made.closed_form, **full.closed_form) == made.closed_form


@pytest.mark.parametrize(
    ("given", "where"),
    [([], "published"), (["--concepts", "2"], "outputs"), (["--methods", "union"], "outputs"), (["--tiny"], "tiny")],
)
def test_only_a_whole_run_is_published(modules, tmp_path, monkeypatch, given, where):
    program, store = modules.many_concepts, modules.job_store
    folders = {"published": tmp_path / "published", "outputs": tmp_path / "outputs", "tiny": tmp_path / "outputs/tiny"}
    monkeypatch.setattr(store, "RESULTS", folders["published"])
    monkeypatch.setattr(store, "FOLDER", folders["outputs"])
    monkeypatch.setattr(program, "FOLDER", folders["outputs"])
    monkeypatch.setattr(sys, "argv", ["many_concepts.py", *given])
    monkeypatch.setattr(program, "load_denoiser", lambda: SimpleNamespace(fingerprint=lambda: ""))
    monkeypatch.setattr(program, "load_hints", lambda _: SimpleNamespace(categories={}))
    monkeypatch.setattr(program.Judge, "load", lambda: None)
    monkeypatch.setattr(program, "measure", lambda *_: iter([{"row": 1}]))
    monkeypatch.setattr(program, "_line", str)
    program.main()
    (written,) = tmp_path.rglob("many_concepts.json")
    assert written.parent == folders[where] and json.loads(written.read_text("utf-8"))["tasks"] == [{"row": 1}]


def found(candidate: str, score: float, rows: float) -> dict:
    return {"candidate": candidate, "score": score, "rows": rows}


def test_the_cheapest_candidate_within_the_margin_is_chosen(modules):
    rows = [found("best", 0.60, 900), found("near", 0.56, 300), found("cheap", 0.40, 10), found("nearer", 0.58, 400)]
    assert modules.choose_presets.chosen(rows, 0.05) == "near"
    assert modules.choose_presets.chosen(rows, 0.0) == "best"
    assert modules.choose_presets.chosen(rows, 0.5) == "cheap"
    # the closed form alone, which has no network rows, is another preset
    assert modules.choose_presets.chosen([*rows, found("closed form only", 0.60, 0)], 0.05) == "near"


def test_rates_are_chosen_for_each_subset_by_itself(modules, make_model):
    choose, model = modules.choose_presets, make_model()
    scores = {"full, rate x 0.1": 0.2, "full, rate x 0.03": 0.6, "attn, rate x 1": 0.5, "embedding, rate x 0.3": 0.4}
    rows = [found(name, scores.get(name, 0.1), 900) for name in choose.CANDIDATES["subsets"]]
    assert choose.choice("subsets", rows, 0.0) == {
        "full": "full, rate x 0.03",
        "attn": "attn, rate x 1",
        "embedding": "embedding, rate x 0.3",
    }
    made = choose.CANDIDATES["subsets"]["full, rate x 0.03"].recipe("subsets", model, "instance")
    plain = recipe("balanced", model, subset="full")
    rate = pytest.approx(0.03 * plain.training.learning_rate)
    assert made == replace(plain, training=made.training) and made.training.learning_rate == rate


def test_a_choice_is_made_again_among_what_was_measured(modules, tmp_path, monkeypatch, capsys):
    rows = [found("best", 0.60, 900), found("near", 0.56, 300)]
    write_json(tmp_path / "preset_fast.json", {"rows": rows, "chosen": "best", "margin": 0.05})
    monkeypatch.setattr(modules.choose_presets, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["choose_presets.py", "fast", "--again"])
    modules.choose_presets.main()
    written = json.loads((tmp_path / "preset_fast.json").read_text("utf-8"))
    assert written == {"rows": rows, "chosen": "near", "margin": 0.05} and "near" in capsys.readouterr().out


def test_the_score_is_the_targets_fall_minus_the_neighbours(modules):
    before = {"grumpy cat": [[1, 1], [1, 1]], "dog": [[1, 1], [1, 0]]}
    after = {"grumpy cat": [[0, 0], [0, 1]], "dog": [[1, 0], [1, 0]]}
    assert modules.choose_presets.score(before, after, CAT) == pytest.approx(0.75 - 0.25)


@pytest.mark.parametrize(
    ("steps", "kept", "keep"),
    [(8, (0.0, 1.0), range(8)), (8, (0.0, 0.5), range(4)), (8, (0.25, 1.0), range(2, 8)), (2, (0.5, 0.5), [1])],
)
def test_the_range_of_noise_levels_is_a_range_of_sampling_steps(modules, steps, kept, keep):
    assert modules.choose_presets.kept_steps(kept, steps) == tuple(keep)


def test_a_candidate_changes_what_it_says_and_nothing_else(modules, make_model):
    choose, model = modules.choose_presets, make_model()
    for preset, candidates in choose.CANDIDATES.items():
        if preset in choose.GROUPED:
            continue
        plain = recipe(preset, model)
        assert candidates["as it is"].recipe(preset, model, "instance").training == plain.training
        if preset == "paper":
            continue
        halved = candidates["steps / 2"].recipe(preset, model, "instance")
        assert halved == replace(plain, training=halved.training, harvest=halved.harvest)
        assert halved.training == replace(plain.training, steps=plain.training.steps // 2)
    fast = choose.CANDIDATES["fast"]
    harvest = fast["noisy half"].recipe("fast", model, "instance").harvest
    assert harvest.keep == tuple(range(harvest.sample.steps // 2))
    assert fast["no closed form"].recipe("fast", model, "instance").closed_form is None
    closed = fast["closed form only"].recipe("fast", model, "instance")
    assert closed.training is None and closed.closed_form == recipe("fast", model).closed_form


def test_values_of_negative_guidance_are_tried_on_what_the_preset_is(modules, make_model):
    choose, model = modules.choose_presets, make_model()
    tried = [candidate.recipe("guidance", model, "style") for candidate in choose.CANDIDATES["guidance"].values()]
    assert [made.training.negative_guidance for made in tried] == list(choose.GUIDANCE)
    assert all(guided(made, 0.0) == guided(recipe("balanced", model, "style"), 0.0) for made in tried)
    for name, candidate in choose.CANDIDATES["quick_guidance"].items():
        preset, _, eta = name.partition(", ")
        made = candidate.recipe("quick_guidance", model, "style")
        assert guided(made, 0.0).closed_form == guided(recipe(preset, model), 0.0).closed_form
        assert made.closed_form.negative_guidance == float(eta)
        assert (made.harvest or made.closed_form).negative_guidance == float(eta)


def test_the_rates_of_paper_are_tried_with_the_images_that_its_time_is_measured_with(modules, make_model):
    choose, model = modules.choose_presets, make_model()
    plain = recipe("paper", model, dataset={"sample": modules.speed_presets.PAPER_SAMPLE})
    made = [candidate.recipe("paper", model, "instance") for candidate in choose.CANDIDATES["paper"].values()]
    rates = [one.training.learning_rate / plain.training.learning_rate for one in made]
    assert rates == pytest.approx([1, 1 / 3, 1 / 10, 1 / 30])
    assert all(
        replace(one, training=replace(one.training, learning_rate=plain.training.learning_rate)) == plain
        for one in made
    )


def test_candidates_are_measured_on_development_prompts_and_seeds(modules, make_model, tmp_path, monkeypatch):
    choose = modules.choose_presets
    store = modules.job_store.JobStore(tmp_path)
    asked, model = [], make_model()
    encode = type(model)._encode
    monkeypatch.setattr(type(model), "_encode", lambda self, texts: asked.extend(texts) or encode(self, texts))
    for preset in ("fast", "balanced", "paper"):
        bench = choose.Bench(preset, make_model, CoinJudge(), choose.TINY, store, {})
        made = choose.row(bench, [CAT], "as it is", choose.Candidate())
        # target and preserved, 2 trajectories or images each, of 2 guided steps; 2 training steps
        teacher, sorts = 0 if preset == "fast" else 1, 1 if preset == "paper" else 2
        away = {"fast": 2 * 2, "balanced": 2 * 4, "paper": 0}[preset]
        assert made["rows"] == sorts * (2 * 2 * 2 + (3 + teacher) * (2 * 4)) + away and json.dumps(made)
        counted = sum(phase["forward"] + 3 * phase["trained"] for phase in made["tasks"][CAT.name]["phases"].values())
        assert counted == made["rows"]
        before = len(asked)
        assert choose.row(bench, [CAT], "as it is", choose.Candidate()) == made and len(asked) == before
    final = {
        prompt
        for name in ("grumpy cat", "cat", "dog")
        for prompt in evaluation_prompts(name, CAT.concept, BUILT_IN, 16)
    }
    assert asked and not final & set(asked)
    bench = replace(bench, preset="fast")
    closed = choose.row(bench, [CAT], "closed form only", choose.Candidate(trained=False))
    assert closed["rows"] == 0 and json.dumps(closed)
