"""Samplers: diffusers' pipelines as judge, exact solutions of a Gaussian, order of convergence, batches, bad input."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)

from concept_ablation.core.errors import AblationError
from concept_ablation.core.hosts.diffusers import EMBEDDED_MODEL, load_denoiser
from concept_ablation.core.progress import Reporter
from concept_ablation.core.samplers import (
    SAMPLERS,
    SCHEDULES,
    Noise,
    SamplerStep,
    SampleSettings,
    draw_images,
    guided,
    karras_schedule,
    sample_latents,
    timestep_schedule,
)

PROMPTS, SEEDS, STEPS, GUIDANCE = ["a cat", "a red apple, noto style"], [11, 12], 7, 4.0
DPM = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "final_sigmas_type": "zero"}
BETAS = (1000, 0.00085, 0.012, "scaled_linear")
MU, SPREAD = 0.7, 0.5


@pytest.fixture(scope="module")
def pipe(plain):
    # the file has only the token embeddings in use, which diffusers itself cannot read
    parts = {"text_encoder": plain.text_network, "safety_checker": None}
    pipeline = StableDiffusionPipeline.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def plain():
    return load_denoiser(precision="fp32")


@pytest.fixture
def embedded_scheduler(pipe):
    """The pipeline's scheduler is put back after a test that changed it."""
    before = pipe.scheduler
    yield pipe.scheduler
    pipe.scheduler = before


def k_levels(scheduler):
    """A scheduler's own noise levels in the k-diffusion convention, with the one where it stops."""
    if not isinstance(scheduler, DDIMScheduler):
        return scheduler.sigmas.double().tolist()
    alphas = torch.stack([*scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod]).double()
    return ((1 - alphas) / alphas).sqrt().tolist()


@pytest.mark.parametrize(
    ("sampler", "scheduler_class", "config", "eta"),
    [
        ("euler", EulerDiscreteScheduler, {}, None),
        ("euler", EulerDiscreteScheduler, {"use_karras_sigmas": True}, None),
        ("ddim", DDIMScheduler, {}, 0.0),
        ("ddim", DDIMScheduler, {}, 0.5),
        ("ddim", DDIMScheduler, {"set_alpha_to_one": True}, 1.0),
        ("ddim", DDIMScheduler, {}, 1.0),
        ("euler_ancestral", EulerAncestralDiscreteScheduler, {}, None),
        ("dpmpp_2m", DPMSolverMultistepScheduler, DPM, None),
    ],
)
@torch.no_grad()
def test_equals_the_diffusers_pipeline(sampler, scheduler_class, config, eta, pipe, plain, embedded_scheduler):
    scheduler = scheduler_class.from_config(embedded_scheduler.config, **config)
    pipe.scheduler = scheduler
    start = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    expected = pipe(
        PROMPTS,
        latents=start.clone(),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        eta=eta or 0.0,
        # the pipeline and `Noise` draw the same numbers from generators with the same seeds
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
    ).images
    levels = k_levels(scheduler)
    assert len(levels) == STEPS + 1
    variance_preserving = sampler in ("ddim", "dpmpp_2m")
    x = start * ((1 + levels[0] ** 2) ** 0.5 if variance_preserving else float(scheduler.init_noise_sigma))
    model = guided(plain, plain.encode(PROMPTS), plain.encode([""] * 2), GUIDANCE)
    options = {} if eta is None else {"eta": eta}
    ours = SAMPLERS[sampler](model, x, levels, Noise(SEEDS), **options)
    if variance_preserving:
        ours = ours / (1 + levels[-1] ** 2) ** 0.5
    assert expected.std() > 0.3
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_denoise_equals_diffusers_formula(prediction_type, make_model):
    model = make_model(prediction_type=prediction_type)
    scheduler = DDIMScheduler(*BETAS, prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(1000)
    timesteps = torch.tensor([0, 3, 421, 999])
    noisy = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    cond = model.encode(["a cat", "", "a dog", "a hat"])
    output = model.network(noisy, timesteps, encoder_hidden_states=cond.context).sample
    expected = [
        scheduler.step(output[i : i + 1], int(t), noisy[i : i + 1]).pred_original_sample
        for i, t in enumerate(timesteps)
    ]
    sigma = model.sigmas[timesteps]
    found = model.denoise(noisy * (1 + sigma**2).sqrt().view(-1, 1, 1, 1), sigma, cond)
    for one, other in zip(found, torch.cat(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


class VelocityOf(torch.nn.Module):
    """The v model that is algebraically equal to an epsilon model: v = sqrt(a) eps - sqrt(1 - a) x0."""

    dtype = torch.float32

    def __init__(self, network, alphas):
        super().__init__()
        self.network, self.alphas = network, alphas

    def forward(self, x, timestep, encoder_hidden_states):
        noise = self.network(x, timestep, encoder_hidden_states=encoder_hidden_states).sample
        alpha = self.alphas[timestep.long()].view(-1, 1, 1, 1)
        x0 = (x - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        return SimpleNamespace(sample=alpha.sqrt() * noise - (1 - alpha).sqrt() * x0)


@torch.no_grad()
def test_a_v_model_is_the_epsilon_model_that_it_is_equal_to(make_model):
    epsilon, velocity = make_model(), make_model(prediction_type="v_prediction")
    velocity.network = VelocityOf(velocity.network, DDIMScheduler(*BETAS).alphas_cumprod)
    sigma = epsilon.sigmas[[2, 300, 700, 999]]
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(2)) * (1 + sigma.view(-1, 1, 1, 1))
    cond = epsilon.encode(["a cat"] * 4)
    one, other = epsilon.denoise(x, sigma, cond), velocity.denoise(x, sigma, cond)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    ours = [sample_latents(m, ["a dog"], [3], SampleSettings(4)) for m in (epsilon, velocity)]
    torch.testing.assert_close(*ours, rtol=1e-3, atol=1e-3)


def ideal(x, sigma):
    """The perfect denoiser of data ~ N(MU, SPREAD^2): its posterior mean."""
    sigma = sigma.view(-1, 1, 1, 1).to(x.dtype)
    return (SPREAD**2 * x + sigma**2 * MU) / (SPREAD**2 + sigma**2)


def flow(x, sigma, end):
    """Exact solution of dx/dsigma = (x - D) / sigma for that denoiser, from `sigma` to `end`."""
    return MU + (x - MU) * ((SPREAD**2 + end**2) / (SPREAD**2 + sigma**2)) ** 0.5


def geometric(first, last, steps):
    return [first * (last / first) ** (i / steps) for i in range(steps + 1)]


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("dpmpp_2m", 2)])
def test_order_of_convergence(sampler, order):
    x = torch.tensor([3.0, -9.0, 14.0], dtype=torch.float64).view(1, 1, 1, 3)
    errors = [
        (SAMPLERS[sampler](ideal, x, geometric(10, 0.4, steps), Noise([0])) - flow(x, 10, 0.4)).abs().max().item()
        for steps in (20, 40, 80)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)
    assert errors[-1] < {1: 0.03, 2: 0.002}[order]


@pytest.mark.parametrize(
    ("sampler", "options"),
    [("euler", {}), ("ddim", {"eta": 0.0}), ("ddim", {"eta": 0.5}), ("euler_ancestral", {}), ("dpmpp_2m", {})],
)
def test_samples_have_the_datas_mean_and_spread(sampler, options):
    first = 20.0
    start = MU + (SPREAD**2 + first**2) ** 0.5 * Noise(range(100, 104))((1, 80, 80)).double()

    def errors(steps):
        levels = [*geometric(first, 0.02, steps), 0.0]
        x = SAMPLERS[sampler](ideal, start, levels, Noise(range(4)), **options)
        return abs(x.mean().item() - MU), abs(x.std().item() - SPREAD)

    coarse, fine = errors(6), errors(150)
    assert coarse[1] > 2 * fine[1], "more steps must help"
    # four standard errors of 25,600 samples, and what 150 steps leave
    assert fine[0] < 0.013 and fine[1] < 0.012


def test_a_perfect_model_of_one_image_gives_it_at_once():
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * 5
    for name, sampler in SAMPLERS.items():
        found = sampler(lambda x, sigma: torch.full_like(x, 0.25), x, [5.0, 1.0, 0.0], Noise([0, 1]))
        assert torch.equal(found, torch.full_like(x, 0.25)), name


def test_an_ancestral_step_by_hand():
    # sigma 2 to 1: up^2 = 1 (4 - 1) / 4, down = sqrt(1 - 3/4) = 1/2; x = 1 + (3 - 1) / 4 + sqrt(3/4) n
    x, noise = torch.full((1, 1, 1, 2), 3.0), Noise([8])((1, 1, 2))
    found = SAMPLERS["euler_ancestral"](lambda x, sigma: torch.ones_like(x), x, [2.0, 1.0], Noise([8]))
    torch.testing.assert_close(found, 1.5 + 0.75**0.5 * noise)


def test_noise_depends_on_the_seed_only():
    alone, together = Noise([5]), Noise([4, 5])
    for _ in range(2):
        one, both = alone((4, 3, 3)), together((4, 3, 3))
        assert both.shape == (2, 4, 3, 3) and torch.equal(one[0], both[1]) and not torch.equal(both[0], both[1])
    first, second = (Noise([5])((4, 3, 3)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(sampler, tiny):
    settings = SampleSettings(4, sampler=sampler)
    together = sample_latents(tiny, ["a cat", "a dog", "a hat"], [1, 2, 3], settings)
    alone = sample_latents(tiny, ["a dog"], [2], settings)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-3, atol=1e-3)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_draw_images_in_any_batch_size(tiny):
    prompts, seeds, seen = ["a cat", "a dog", "a hat"], [1, 2, 3], []
    reporter = Reporter(seen.append, "Drawing", 3 * 4)
    one = draw_images(tiny, prompts, seeds, SampleSettings(4), batch=2, reporter=reporter)
    other = draw_images(tiny, prompts, seeds, SampleSettings(4), batch=3)
    assert one.dtype == np.uint8 and one.shape == (3, 16, 16, 3)
    assert np.abs(one.astype(int) - other).max() <= 1
    assert [p.step for p in seen] == [2, 4, 6, 8, 9, 10, 11, 12] and {p.total for p in seen} == {12}


@torch.no_grad()
def test_guidance(tiny, monkeypatch):
    cond, uncond = tiny.encode(["a cat"]), tiny.encode([""])
    x, sigma = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 3, torch.tensor([3.0])
    with_prompt, without = tiny.denoise(x, sigma, cond), tiny.denoise(x, sigma, uncond)
    assert not torch.equal(with_prompt, without)
    batches, denoise = [], tiny.denoise
    monkeypatch.setattr(tiny, "denoise", lambda x, *rest: batches.append(len(x)) or denoise(x, *rest))
    assert torch.equal(guided(tiny, cond, uncond, 1.0)(x, sigma), with_prompt)
    # a batch of two rows and one of one are summed in another order on some processors
    near = {"rtol": 1e-4, "atol": 1e-4}
    expected = without + 4 * (with_prompt - without)
    torch.testing.assert_close(guided(tiny, cond, uncond, 4.0)(x, sigma), expected, **near)
    torch.testing.assert_close(guided(tiny, cond, uncond, 0.0)(x, sigma), without, **near)
    assert not torch.allclose(expected, with_prompt, atol=1e-2) and not torch.allclose(without, with_prompt, atol=1e-2)
    assert batches == [1, 2, 2], "no guidance needs no second row"


def test_guidance_1_is_the_conditional_model_and_the_negative_prompt_counts(tiny):
    conditional = sample_latents(tiny, ["a cat"], [1], SampleSettings(4, guidance=1.0))
    against_itself = sample_latents(tiny, ["a cat"], [1], SampleSettings(4, negative_prompt="a cat"))
    torch.testing.assert_close(against_itself, conditional, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(sample_latents(tiny, ["a cat"], [1], SampleSettings(4)), conditional, atol=1e-2)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_callback_sees_every_step(sampler, tiny):
    steps: list[SamplerStep] = []
    found = sample_latents(tiny, ["a cat"], [1], SampleSettings(5, sampler=sampler), steps.append)
    assert [(step.index, step.total) for step in steps] == [(i, 5) for i in range(5)]
    assert [step.sigma for step in steps] == timestep_schedule(tiny.sigmas, 5)[:-1]
    assert torch.equal(steps[0].x, tiny.sigmas[-1] * Noise([1])((4, 8, 8)))
    torch.testing.assert_close(found, steps[-1].denoised)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 25, 999, 1000])
def test_schedules_descend_from_the_noisiest_level_to_0(name, steps, tiny):
    levels = SCHEDULES[name](tiny.sigmas, steps)
    assert len(levels) == steps + 1 and levels[-1] == 0.0
    assert levels[0] == pytest.approx(tiny.sigmas[-1].item(), rel=1e-6)
    assert all(first > second for first, second in itertools.pairwise(levels))


def test_timestep_schedule_is_on_the_table_and_even(tiny):
    levels = timestep_schedule(tiny.sigmas, 10)[:-1]
    index = [tiny.sigmas.tolist().index(level) for level in levels]
    gaps = [a - b for a, b in itertools.pairwise(index)]
    assert index[0] == 999 and max(gaps) - min(gaps) <= 1 and abs(index[-1] - gaps[-1]) <= 1


def test_karras_schedule_is_diffusers_own(tiny):
    scheduler = EulerDiscreteScheduler(*BETAS, use_karras_sigmas=True, timestep_spacing="linspace")
    scheduler.set_timesteps(12)
    assert karras_schedule(tiny.sigmas, 12) == pytest.approx(scheduler.sigmas.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sampler": "magic"}, "magic.*euler, euler_ancestral, ddim, dpmpp_2m"),
        ({"schedule": "cosine"}, "cosine.*timestep, karras"),
        ({"steps": 0}, "at least 1, not 0"),
        ({"steps": -3}, "at least 1, not -3"),
        ({"eta": -0.1}, "eta"),
        ({"eta": 1.1}, "eta"),
        ({"eta": math.nan}, "eta"),
        ({"guidance": math.nan}, "guidance"),
        ({"guidance": math.inf}, "guidance"),
    ],
)
def test_bad_settings_are_refused(settings, said):
    with pytest.raises(AblationError, match=said):
        SampleSettings(**settings)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [0, -1])
def test_no_schedule_has_no_step(name, steps, tiny):
    with pytest.raises(AblationError, match=f"1.*steps?.*not {steps}"):
        SCHEDULES[name](tiny.sigmas, steps)


def test_more_steps_than_the_model_has_are_refused(tiny):
    with pytest.raises(AblationError, match="1 to 1000 steps with this model, not 1001"):
        sample_latents(tiny, ["a cat"], [1], SampleSettings(1001))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_breaks_down_is_reported(value, tiny):
    tiny.network.conv_out.bias.fill_(value)
    with pytest.raises(AblationError, match="NaN or infinity"):
        sample_latents(tiny, ["a cat"], [1], SampleSettings(2))
