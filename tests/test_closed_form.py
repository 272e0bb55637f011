"""Closed form: numpy's least squares as judge, the gradient at the solution, limits, a whole model."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel
from transformers import CLIPTokenizerFast as CLIPTokenizer

from concept_ablation.core import closed_form, delta_file
from concept_ablation.core.ablation import Task, ablate
from concept_ablation.core.closed_form import ClosedFormSettings, Term, solution, solve
from concept_ablation.core.concept import Concept, evaluation_prompts, pairs, preservation_prompts
from concept_ablation.core.delta import merge, to_lora
from concept_ablation.core.errors import AblationError, Interrupted
from concept_ablation.core.hosts.diffusers import EMBEDDED_MODEL, DiffusersDenoiser, Parts
from concept_ablation.core.presets import recipe
from concept_ablation.core.subsets import select
from concept_ablation.core.token_alignment import align

CAT = Concept("grumpy cat", "cat")
OWL = Concept("owl", "bird")
GOGH = Concept("van gogh", "painting", "style")
WIDTH, WINDOW = 192, 28
FEW = ClosedFormSettings(prompts=2, preserve_prompts=2, ridge=1e-10)
"""Fewer rows (2 pairs, 2 preserved, the empty prompt: 140 positions) than a context is wide, so all can be met."""


def random_terms(seed=0, width=7, erased=9, held=8, weight=(1.0, 0.5)):
    generator = torch.Generator().manual_seed(seed)

    def draw(rows):
        return torch.randn(rows, width, generator=generator, dtype=torch.float64)

    spread = torch.rand(erased, generator=generator, dtype=torch.float64) + 0.5
    kept, even = draw(held), torch.ones(held, dtype=torch.float64)
    return [Term(draw(erased), draw(erased), weight[0] * spread), Term(kept, kept, weight[1] * even)]


def mean_diagonal(terms):
    return sum((term.source.square().sum(1) * term.weight).sum() for term in terms) / terms[0].source.shape[1]


def objective(change, weight, terms, ridge):
    total = ridge * mean_diagonal(terms) * change.square().sum()
    for term in terms:
        miss = term.source @ (weight + change).T - term.goal @ weight.T
        total = total + (miss.square().sum(1) * term.weight).sum()
    return total


@pytest.mark.parametrize("out", [3, 7, 11])
def test_the_solution_is_that_of_numpys_least_squares(out):
    terms, ridge = random_terms(), 0.03
    weight = torch.randn(out, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    rows, wanted = [], []
    for term in terms:
        root = term.weight.sqrt().numpy()[:, None]
        rows.append(root * term.source.numpy())
        wanted.append(root * ((term.goal - term.source) @ weight.T).numpy())
    rows.append(np.sqrt(ridge * mean_diagonal(terms).item()) * np.eye(7))
    wanted.append(np.zeros((7, out)))
    expected = np.linalg.lstsq(np.concatenate(rows), np.concatenate(wanted), rcond=None)[0].T
    np.testing.assert_allclose((weight @ solve(terms, ridge)).numpy(), expected, rtol=1e-9, atol=1e-12)


def test_the_objective_is_flat_at_the_solution_and_higher_around_it():
    terms, ridge = random_terms(1), 0.02
    weight = torch.randn(4, 7, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    change = weight @ solve(terms, ridge)
    least = objective(change, weight, terms, ridge)
    assert least < 0.9 * objective(torch.zeros_like(change), weight, terms, ridge)
    step = 1e-4
    for place in range(change.numel()):
        move = torch.zeros(change.numel(), dtype=torch.float64)
        move[place] = step
        up, down = (objective(change + s * move.view_as(change), weight, terms, ridge) for s in (1, -1))
        assert abs(up - down) / (2 * step) < 1e-6
        assert min(up, down) > least


def test_an_infinite_ridge_changes_nothing():
    norms = [solve(random_terms(), ridge).norm().item() for ridge in (1e-2, 1e2, 1e6, 1e10)]
    assert norms == sorted(norms, reverse=True)
    assert norms[0] > 0.1 and norms[-1] < 1e-9


def test_more_weight_holds_what_is_preserved():
    weight = torch.randn(4, 12, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

    def drift(preserve):
        terms = random_terms(2, width=12, held=5, weight=(1.0, preserve))
        return (terms[1].source @ (weight @ solve(terms, 1e-6 / max(preserve, 1.0))).T).norm().item()

    drifts = [drift(preserve) for preserve in (0.0, 1.0, 1e2, 1e4, 1e6)]
    assert drifts == sorted(drifts, reverse=True)
    assert drifts[-1] < 1e-3 * drifts[0]


def test_a_ridge_of_nothing_meets_every_row_where_it_can():
    terms = random_terms(3, width=20, erased=6, held=5)
    change = solve(terms, 1e-12)
    torch.testing.assert_close(terms[0].source @ (torch.eye(20) + change).T, terms[0].goal, rtol=0, atol=1e-8)
    torch.testing.assert_close(terms[1].source @ change.T, torch.zeros(5, 20, dtype=torch.float64), rtol=0, atol=1e-8)


def test_the_same_rows_in_other_groups_and_orders_are_the_same_problem():
    first, second = random_terms(4)
    halves = [
        Term(first.source[part], first.goal[part], first.weight[part]) for part in (slice(5, None), slice(None, 5))
    ]
    copied = Term(second.source, second.source.clone(), second.weight)
    torch.testing.assert_close(solve([copied, *halves], 0.1), solve([first, second], 0.1), rtol=1e-12, atol=1e-12)


def test_problems_without_a_solution_are_one_clear_sentence():
    with pytest.raises(AblationError, match="no embeddings"):
        solve([], 0.1)
    held = torch.ones(2, 3)
    with pytest.raises(AblationError, match="larger"):
        solve([Term(held, held, torch.ones(2))], 1e-30)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(AblationError, match="NaN or infinity"):
            solve([Term(torch.full((2, 3), bad), held, torch.ones(2))], 0.1)


# --- A whole model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide():
    """A random Stable Diffusion whose contexts are wider than a few prompts have positions."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    text_config = CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=49408,
        max_position_embeddings=WINDOW,
    )
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED_MODEL, subfolder="tokenizer")
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    parts = Parts(unet, CLIPTextModel(text_config), tokenizer, vae, schedule)
    return DiffusersDenoiser(parts, "wide", torch.device("cpu"), None)


@torch.no_grad()
def outputs(denoiser, prompts):
    """What every key and value layer makes of prompts, {name: [prompts, tokens, out]}."""
    context = denoiser.encode(prompts).context
    return {name: layer(context) for name, layer in select("cross-attn", denoiser).items()}


def places(denoiser, concept, pair):
    names = denoiser.tokenize(concept.target), denoiser.tokenize(concept.anchor)
    return align(denoiser.tokenize(pair.target), denoiser.tokenize(pair.anchor), names, WINDOW)


def placed(anchor, target, positions):
    """Rows of `anchor` [tokens, …] at `positions`, and of `target` where a token stays."""
    rows = [target[i] if place is None else anchor[place] for i, place in enumerate(positions)]
    return torch.stack(rows)


@pytest.mark.parametrize("concept", [CAT, OWL, GOGH])
def test_target_tokens_give_the_anchors_keys_and_values_in_every_context(wide, concept):
    surrounding = ["claude monet" if concept.kind == "style" else "red fox"]
    chosen = pairs(concept, wide.prompt_source, 2)
    held = [*preservation_prompts([concept.anchor, *surrounding], concept, wide.prompt_source, 2), ""]
    before = wide.fingerprint()
    wanted, kept = outputs(wide, [pair.anchor for pair in chosen]), outputs(wide, held)
    apart = outputs(wide, [pair.target for pair in chosen])
    delta = solution(wide, [concept], FEW, surrounding=[surrounding])
    with delta.attach(wide):
        edited, still = outputs(wide, [pair.target for pair in chosen]), outputs(wide, held)
    assert wide.fingerprint() == before
    assert set(delta.layers) == set(wanted) and len(wanted) == 8
    for name in wanted:
        for row, pair in enumerate(chosen):
            goal = placed(wanted[name][row], apart[name][row], places(wide, concept, pair))
            scale = goal.abs().mean()
            assert (edited[name][row] - goal).abs().max() < 1e-3 * scale
            assert (apart[name][row] - goal).abs().max() > 0.1 * scale, "they were not equal to begin with"
        torch.testing.assert_close(still[name], kept[name], rtol=0, atol=1e-3 * kept[name].abs().mean().item())


def test_one_solution_for_two_concepts_serves_both(wide):
    delta = solution(wide, [CAT, OWL], replace(FEW, prompts=1, preserve_prompts=1))
    with delta.attach(wide):
        for concept in (CAT, OWL):
            (pair,) = pairs(concept, wide.prompt_source, 1)
            edited = outputs(wide, [pair.target])
            with torch.no_grad():
                anchor = wide.encode([pair.anchor]).context
            for name, layer in select("cross-attn", wide).items():
                goal = (anchor @ layer.weight.T)[0, places(wide, concept, pair)]
                assert (edited[name][0] - goal).abs().max() < 1e-3 * goal.abs().mean()


def test_a_concept_named_twice_with_half_the_weight_is_one(wide):
    settings = ClosedFormSettings(prompts=3, preserve_prompts=3)
    one = solution(wide, [CAT], settings, surrounding=[["dog"]])
    twice = solution(wide, [CAT, CAT], replace(settings, erase=0.5, preserve=0.5), surrounding=[["dog"]] * 2)
    for name, layer in one.layers.items():
        torch.testing.assert_close(twice.layers[name].weight, layer.weight, rtol=1e-4, atol=1e-6)


def test_more_prompts_do_not_weigh_more(wide):
    """The norm of a solution under a strong ridge is about proportional to the weight of the erased rows."""
    few, many = (solution(wide, [CAT], ClosedFormSettings(prompts=n, preserve_prompts=0, ridge=10.0)) for n in (4, 16))
    assert many.norm().item() == pytest.approx(few.norm().item(), rel=0.3)


def test_no_layer_is_solved_apart_and_each_is_right(wide):
    """One map serves all layers: each equals numpy's solution of its own stacked system."""
    settings = replace(FEW, erase=2.0, preserve=3.0, generic=0.7, padding=0.25, ridge=0.05)
    delta = solution(wide, [CAT], settings, surrounding=[["dog"]], generic=["a house by the sea"])
    chosen, held = pairs(CAT, wide.prompt_source, 2), preservation_prompts(["cat", "dog"], CAT, wide.prompt_source, 2)
    rows, goals, weights = [], [], []

    def add(prompt, other, place, weight):
        with torch.no_grad():
            rows.append(wide.encode([prompt]).context[0].double())
            goals.append(wide.encode([other]).context[0].double()[place])
        padding = torch.arange(WINDOW) >= len(wide.tokenize(prompt)) + 2
        weights.append(torch.where(padding, 0.25 * weight, weight))

    for pair in chosen:
        add(pair.target, pair.anchor, places(wide, CAT, pair), 2.0 / 2)
    for prompt in held:
        add(prompt, prompt, range(WINDOW), 3.0 / 2)
    for prompt in ("", "a house by the sea"):
        add(prompt, prompt, range(WINDOW), 0.7 / 2)
    source, goal, weight = torch.cat(rows), torch.cat(goals), torch.cat(weights).double()
    ridge = 0.05 * (weight[:, None] * source.square()).sum() / WIDTH
    left = torch.cat((weight.sqrt()[:, None] * source, ridge.sqrt() * torch.eye(WIDTH))).numpy()
    for name, layer in select("cross-attn", wide).items():
        moved = weight.sqrt()[:, None] * ((goal - source) @ layer.weight.double().T)
        right = torch.cat((moved, torch.zeros(WIDTH, layer.weight.shape[0]))).numpy()
        expected = np.linalg.lstsq(left, right, rcond=None)[0].T
        np.testing.assert_allclose(delta.layers[name].weight.numpy(), expected, rtol=0, atol=1e-5 * abs(expected).max())


def test_no_evaluation_prompt_is_encoded(tiny, monkeypatch):
    seen = []
    encode = type(tiny)._encode
    monkeypatch.setattr(type(tiny), "_encode", lambda self, prompts: seen.extend(prompts) or encode(self, prompts))
    for concept, neighbour in ((CAT, "dog"), (GOGH, "claude monet")):
        seen.clear()
        solution(tiny, [concept], surrounding=[[neighbour]])
        assert any(concept.target in prompt for prompt in seen) and any(neighbour in prompt for prompt in seen)
        for name in (concept.target, concept.anchor, neighbour):
            assert not set(evaluation_prompts(name, concept, tiny.prompt_source)) & set(seen)


def test_a_memorized_caption_goes_to_its_replacement(wide):
    concept = Concept("the mona lisa in a golden frame", "a woman with a smile", "memorized")
    delta = solution(wide, [concept], replace(FEW, preserve_prompts=1))
    with delta.attach(wide):
        edited = outputs(wide, [concept.target])
    wanted = outputs(wide, [concept.anchor])
    last = len(wide.tokenize(concept.anchor))
    for name, goal in wanted.items():
        assert (edited[name][0, 3] - goal[0, last]).abs().max() < 1e-3 * goal.abs().mean()


def test_the_delta_is_a_delta_like_any_other(tiny, tmp_path):
    before = tiny.fingerprint()
    delta = ablate(tiny, [Task(CAT, ("dog",)), Task(GOGH)], recipe("instant", tiny)).delta
    assert tiny.fingerprint() == before and tiny.text_edits == 0
    assert all(layer.weight.dtype == torch.float32 and layer.bias is None for layer in delta.layers.values())
    delta_file.save(delta, tmp_path / "edit.safetensors")
    loaded = delta_file.load(tmp_path / "edit.safetensors")
    assert loaded.metadata == dict(delta.metadata)
    assert delta.metadata["concept_ablation.target"] == "grumpy cat; van gogh"
    assert delta.metadata["concept_ablation.objective"] == "closed-form"
    assert delta.metadata["concept_ablation.base_model_sha256"] == before
    assert delta.metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert json.loads(delta.metadata["concept_ablation.settings"])["closed_form"]["prompts"] == 48
    for name, layer in loaded.layers.items():
        assert torch.equal(layer.weight, delta.layers[name].weight.half().float())
    lora, kept = to_lora(delta, 4)
    assert 0 < kept <= 1
    for made in (loaded, lora, merge([(delta, 0.5), (delta, 0.5)])):
        with made.attach(tiny):
            changed = outputs(tiny, ["a photo of a grumpy cat"])
        assert not all(
            torch.equal(changed[name], out) for name, out in outputs(tiny, ["a photo of a grumpy cat"]).items()
        )


def test_an_attached_delta_counts_as_part_of_the_model(wide):
    """What the layer gives is edited, not what its stored weight would give: offloaded, quantized, patched alike."""
    first = solution(wide, [CAT], FEW)
    (pair,) = pairs(OWL, wide.prompt_source, 1)
    with first.attach(wide):
        wanted = outputs(wide, [pair.anchor])
        second = solution(wide, [OWL], replace(FEW, prompts=1, preserve_prompts=1))
        with second.attach(wide):
            edited = outputs(wide, [pair.target])
    for name, goal in wanted.items():
        placed = goal[0, places(wide, OWL, pair)]
        assert (edited[name][0] - placed).abs().max() < 1e-3 * placed.abs().mean()


def test_cancel_and_errors_leave_the_model_as_it_was(tiny, make_model, monkeypatch):
    before = tiny.fingerprint()

    def cancel(progress):
        if progress.step >= progress.total // 2:
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        solution(tiny, [CAT], on_progress=cancel)
    with pytest.raises(AblationError, match="names the target"):
        solution(tiny, [CAT], generic=["a house", "A Grumpy Cat, again"])
    assert tiny.fingerprint() == before
    poisoned = make_model()
    with torch.no_grad():
        poisoned.text_network.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(AblationError, match="NaN or infinity"):
        solution(poisoned, [CAT])
    broken = make_model()
    with torch.no_grad():
        next(iter(select("cross-attn", broken).values())).weight.fill_(float("nan"))
    with pytest.raises(AblationError, match="NaN or infinity"):
        solution(broken, [CAT])
    monkeypatch.setattr(tiny, "layers", {n: m for n, m in tiny.layers.items() if "attn2" not in n})
    with pytest.raises(AblationError, match="no layers"):
        solution(tiny, [CAT])


def test_a_model_whose_layers_read_something_else_is_refused(tiny, monkeypatch):
    name = next(iter(select("cross-attn", tiny)))
    monkeypatch.setattr(tiny, "layers", {name: torch.nn.Linear(24, 8)})
    with pytest.raises(AblationError, match="reads its text encoder"):
        solution(tiny, [CAT])


def test_a_target_that_the_text_encoder_cannot_tell_is_refused(tiny, monkeypatch):
    """Also when there is another concept that it can."""
    encode = type(tiny)._encode

    def without_felines(self, prompts):
        return encode(self, [prompt.replace("feline", "cat") for prompt in prompts])

    monkeypatch.setattr(type(tiny), "_encode", without_felines)
    with pytest.raises(AblationError, match="does not tell 'cat' from 'feline'") as error:
        solution(tiny, [OWL, Concept("cat", "feline")])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": 0},
        {"preserve_prompts": -1},
        {"erase": 0.0},
        {"erase": float("inf")},
        {"preserve": -1.0},
        {"generic": float("nan")},
        {"padding": -0.1},
        {"ridge": 0.0},
        {"ridge": float("inf")},
    ],
)
def test_bad_settings_are_refused(change):
    with pytest.raises(AblationError):
        ClosedFormSettings(**change)


def test_the_cost_is_one_factorization(wide, monkeypatch):
    calls = []
    factor = torch.linalg.cholesky_ex
    monkeypatch.setattr(closed_form.torch.linalg, "cholesky_ex", lambda *a, **k: calls.append(1) or factor(*a, **k))
    solution(wide, [CAT, OWL, GOGH], replace(FEW, ridge=1e-3))
    assert len(calls) == 1
