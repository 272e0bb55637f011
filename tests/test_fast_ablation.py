"""`instant` and `fast` through the whole of `ablate`: what they edit, what they leave, what they say of themselves."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from concept_ablation.core import dataset, delta_file, harvest
from concept_ablation.core.ablation import Task, ablate, ablate_and_report, train_on
from concept_ablation.core.closed_form import ClosedFormSettings
from concept_ablation.core.concept import Concept, pairs
from concept_ablation.core.errors import AblationError, Diverged, Interrupted
from concept_ablation.core.evaluation import EvaluationSettings
from concept_ablation.core.metrics import Judge
from concept_ablation.core.presets import Recipe, recipe
from concept_ablation.core.samplers import SampleSettings
from concept_ablation.core.subsets import select
from concept_ablation.core.token_alignment import align

CAT = Concept("grumpy cat", "cat")
TASK = Task(CAT, ("dog",))
SMALL = {
    "dataset": {"images": 3, "preserve": 3, "prompts": 3, "sample": SampleSettings(steps=2), "batch": 2},
    "training": {"steps": 4, "batch": 2},
}


@pytest.fixture
def fast(tiny):
    return recipe("fast", tiny, auto_preserve=2, **SMALL)


def state(denoiser):
    """All that an ablation must leave as it was."""
    modules = [*denoiser.network.modules(), *denoiser.text_network.modules()]
    flags = [parameter.requires_grad for module in modules for parameter in module.parameters(recurse=False)]
    hooks = sum(len(module._forward_hooks) for module in modules)
    return denoiser.fingerprint(), flags, hooks, denoiser.text_edits, "denoise" in vars(denoiser)


def tensors(delta):
    return {name: layer.weight for name, layer in delta.layers.items()}


@torch.no_grad()
def outputs(denoiser, prompt):
    """What each key and value layer makes of a prompt."""
    context = denoiser.encode([prompt]).context[0]
    return {name: layer(context) for name, layer in select("cross-attn", denoiser).items()}


def test_the_closed_form_alone_sends_the_targets_keys_and_values_to_the_anchors(emoji):
    exact = Recipe(closed_form=ClosedFormSettings(prompts=1, preserve_prompts=1, ridge=1e-9))
    made = ablate(emoji, [Task(CAT)], exact)
    (pair,) = pairs(CAT, emoji.prompt_source, 1)
    before, goal = outputs(emoji, pair.target), outputs(emoji, pair.anchor)
    with made.delta.attach(emoji):
        after = outputs(emoji, pair.target)
    texts = (pair.target, pair.anchor, CAT.target, CAT.anchor)
    target, anchor, *names = map(emoji.tokenize, texts)
    window = next(iter(goal.values())).shape[0]
    places = align(target, anchor, tuple(names), window)
    for name, wanted in goal.items():
        placed = wanted[places]
        apart = (before[name] - placed).norm()
        # in fp16, as the file has it; `test_closed_form` checks the fp32 solution more closely
        assert (after[name] - placed).norm() < 0.1 * apart
    assert made.losses == ()


def test_instant_says_what_it_is(tiny):
    before = state(tiny)
    made = ablate(tiny, [TASK], recipe("instant", tiny))
    assert state(tiny) == before
    header = made.delta.metadata
    assert [header[f"concept_ablation.{name}"] for name in ("objective", "subset", "steps")] == [
        "closed-form",
        "cross-attn",
        "0",
    ]
    settings = json.loads(header["concept_ablation.settings"])
    assert settings["training"] is settings["dataset"] is settings["harvest"] is None
    assert settings["closed_form"]["subset"] == "cross-attn" and settings["auto_preserve"] == 8
    (chosen,) = made.auto_preserved
    assert len(chosen) == 8 and not {"cat", "dog", "grumpy cat"} & set(chosen)
    assert header["concept_ablation.base_model_sha256"] == before[0]
    assert all(torch.equal(weight, weight.half().float()) for weight in tensors(made.delta).values())


def test_what_is_chosen_is_held_still_by_the_closed_form(emoji):
    """The recipe's neighbours move less than they do without preservation."""
    task = Task(Concept("rooster", "bird"))
    held = Recipe(closed_form=ClosedFormSettings(prompts=4, preserve_prompts=16), auto_preserve=4)
    free = Recipe(closed_form=ClosedFormSettings(prompts=4, preserve_prompts=0))
    made = ablate(emoji, [task], held)
    loose = ablate(emoji, [task], free)

    def moved(delta):
        total = 0.0
        for name in made.auto_preserved[0]:
            before = outputs(emoji, f"a {name}")
            with delta.attach(emoji):
                total += sum((after - before[key]).norm() for key, after in outputs(emoji, f"a {name}").items())
        return total

    assert moved(made.delta) < 0.7 * moved(loose.delta)


def test_fast_begins_at_the_closed_form_and_trains_on_its_harvest(tiny, fast, tmp_path):
    before = state(tiny)
    made = ablate(tiny, [TASK], fast, directory=tmp_path)
    assert state(tiny) == before and len(made.losses) == 4
    header = made.delta.metadata
    assert (header["concept_ablation.objective"], header["concept_ablation.start"]) == ("model", "closed-form")
    rows = harvest.load(tmp_path)
    assert header["concept_ablation.dataset_sha256"] == rows.digest()
    assert rows.surrounding == (("dog", *made.auto_preserved[0]),) and len(made.auto_preserved[0]) == 2
    assert any(made.auto_preserved[0][0] in prompt for prompt in rows.plan.prompts)
    still = replace(fast, training=replace(fast.training, learning_rate=1e-9))
    start = ablate(tiny, [TASK], replace(fast, training=None, harvest=None)).delta
    for name, weight in tensors(ablate(tiny, [TASK], still, directory=tmp_path).delta).items():
        torch.testing.assert_close(weight, tensors(start)[name], rtol=1e-3, atol=1e-6)
    assert (made.delta.norm() - start.norm()).abs() > 0
    again = train_on(tiny, rows, fast)
    assert all(torch.equal(weight, tensors(made.delta)[name]) for name, weight in tensors(again.delta).items())
    told = [json.loads(found["concept_ablation.settings"]) for found in (header, again.delta.metadata)]
    assert {name for name in told[0] if told[0][name] != told[1][name]} == {"auto_preserve"}, "the dataset's affair"
    preserved = ", ".join(("dog", *made.auto_preserved[0]))
    assert header["concept_ablation.preserved"] == again.delta.metadata["concept_ablation.preserved"] == preserved


def test_a_stopped_run_goes_on_with_the_rows_that_it_has(tiny, fast, tmp_path):
    whole = ablate(tiny, [TASK], fast)
    before = state(tiny)

    def stop(progress):
        if progress.phase == "Harvesting" and progress.step == 5:
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        ablate(tiny, [TASK], fast, directory=tmp_path, on_progress=stop)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    assert len(kept) == 2 and state(tiny) == before
    made = ablate(tiny, [TASK], fast, directory=tmp_path)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert all(torch.equal(weight, tensors(whole.delta)[name]) for name, weight in tensors(made.delta).items())
    (cost,) = [phase for phase in made.phases if phase.name == "harvest"]
    assert cost.forward == 2 * 2 * 2, "only what was missing"


def test_whatever_goes_wrong_the_model_is_as_it_was(tiny, fast):
    before = state(tiny)
    for phase in ("Encoding prompts", "Solving the closed form", "Training"):

        def stop(progress, phase=phase):
            if progress.phase == phase:
                raise Interrupted(phase)

        with pytest.raises(Interrupted, match=phase):
            ablate(tiny, [TASK], fast, on_progress=stop)
        assert state(tiny) == before
    wild = replace(fast, training=replace(fast.training, learning_rate=1e6, steps=20, cosine=False))
    with pytest.raises(Diverged):
        ablate(tiny, [TASK], wild)
    assert state(tiny) == before


def test_a_dataset_of_the_other_sort_is_refused(tiny, fast):
    balanced = recipe("balanced", tiny, **SMALL)
    images = dataset.build(tiny, [CAT], balanced.dataset)
    rows = harvest.harvest(tiny, [CAT], fast.harvest)
    with pytest.raises(AblationError, match="holds images and the preset trains on harvested rows"):
        train_on(tiny, images, fast)
    with pytest.raises(AblationError, match="holds harvested rows and the preset trains on images"):
        train_on(tiny, rows, balanced)
    with pytest.raises(AblationError, match="trains on no dataset"):
        train_on(tiny, rows, recipe("instant", tiny))


def test_the_backward_pass_of_the_truncated_subset_stops_before_the_way_down(tiny, fast):
    rows = harvest.harvest(tiny, [CAT], fast.harvest)
    kept = set()

    def note(name):
        def hook(module, inputs, output):
            if (output[0] if isinstance(output, tuple) else output).requires_grad:
                kept.add(name)

        return hook

    blocks = {"down": tiny.network.down_blocks[-1], "up": tiny.network.up_blocks[-1]}
    handles = [block.register_forward_hook(note(name)) for name, block in blocks.items()]
    found = {}
    for subset in ("cross-attn", "cross-attn-up"):
        kept.clear()
        made = train_on(tiny, rows, recipe("fast", tiny, subset=subset, **SMALL))
        found[subset] = set(kept)
        assert set(made.delta.layers) == set(select(subset, tiny))
    for handle in handles:
        handle.remove()
    assert found == {"cross-attn": {"down", "up"}, "cross-attn-up": {"up"}}


def test_the_report_says_what_each_phase_cost(emoji, tmp_path):
    task = Task(Concept("rooster", "bird"), ("owl",))
    few = EvaluationSettings(prompts=1, seeds=1, sample=SampleSettings(steps=1))
    small = recipe("fast", emoji, auto_preserve=2, **SMALL)
    ablate_and_report(emoji, [task], small, Judge.load(), few, tmp_path)
    told = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert [phase["name"] for phase in told["phases"]] == ["encode", "closed form", "harvest", "train"]
    assert [(phase["forward"], phase["backward"]) for phase in told["phases"]] == [
        (0, 0),
        (0, 0),
        (24 + 3 * 2, 0),
        (16, 16),
    ]
    assert all(told["seconds"][phase["name"]] == phase["seconds"] for phase in told["phases"])
    assert [row["name"] for row in told["concepts"]] == ["rooster", "bird", "owl"], "chosen names are not measured"
    assert len(told["settings"]["auto_preserved"]["rooster"]) == 2
    assert "Network evaluations" in (tmp_path / "report.html").read_text("utf-8")
    assert delta_file.load(tmp_path / "delta.safetensors").layers.keys() == select("cross-attn", emoji).keys()
