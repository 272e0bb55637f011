"""The scripts that train the embedded model: a whole tiny run, its resumption, and the data that it is made of."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from concept_ablation.core import token_rows
from concept_ablation.core.errors import AblationError
from concept_ablation.core.hosts.diffusers import EMBEDDED_MODEL, load_denoiser
from concept_ablation.core.metrics import Judge
from concept_ablation.core.prompts import load_prompt_source
from concept_ablation.core.samplers import SampleSettings, draw_images

TOOLS = Path(__file__).resolve().parents[1] / "tools" / "emoji_diffusion"
sys.path.insert(0, str(TOOLS))

import augment  # noqa: E402
import autoencoder  # noqa: E402
import captions  # noqa: E402
import card  # noqa: E402
import convolution  # noqa: E402
import denoiser  # noqa: E402
import export  # noqa: E402
import export_single_file  # noqa: E402
import icons  # noqa: E402
import judge  # noqa: E402
import latents  # noqa: E402
import measures  # noqa: E402
import memorized  # noqa: E402
import pictures  # noqa: E402
import settings  # noqa: E402
import stage  # noqa: E402
import start  # noqa: E402
import train  # noqa: E402

SIZE = 32
STYLES = ("noto", "flat")
CONCEPTS = tuple(
    pictures.Concept(name, category, "shapes")
    for name, category in (("disc", "round thing"), ("ring", "round thing"), ("box", "square"), ("owl", "bird"))
)
SCENE = memorized.Scene(
    "The last disc", ("a disc",), (("disc", "noto"), ("box", "noto"), ("owl", "flat")), (9, 9, 9), (200, 9, 9), "disc"
)


def shapes() -> pictures.Pictures:
    """Four simple shapes in two styles (reddish and bluish), cut out."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE), indexing="ij")
    radius = (x**2 + y**2).sqrt()
    masks = (radius < 0.8, (radius < 0.8) & (radius > 0.4), x.abs().maximum(y.abs()) < 0.6, (y > x.abs() - 0.5))
    found = []
    for style in range(2):
        for mask in masks:
            colour = torch.tensor([220, 60, 40] if style == 0 else [40, 60, 220], dtype=torch.uint8)
            rgb = colour.view(3, 1, 1).expand(3, SIZE, SIZE)
            found.append(torch.cat((rgb, mask[None] * torch.tensor(255, dtype=torch.uint8))).to(torch.uint8))
    concept = torch.arange(4).repeat(2)
    return pictures.Pictures(
        torch.stack(found), concept, torch.arange(2).repeat_interleave(4), CONCEPTS, STYLES, ({}, {})
    )


def strangers() -> pictures.Pictures:
    """The same shapes under other names."""
    own = shapes()
    return replace(own, concepts=tuple(pictures.Concept(f"other {one.name}", one.name, "shapes") for one in CONCEPTS))


def tiny(batch: int = 8) -> settings.Settings:
    """A run of a few thousand weights on 32 px pictures."""

    def rate(value: float) -> settings.Optimization:
        return settings.Optimization(batch, value, warmup=5, ema=0.9)

    def tower(seed: int) -> settings.Tower:
        return settings.Tower("test_resnet", seed, 16, 64, 1, 32, rate(2e-3))

    return settings.Settings(
        image_size=SIZE,
        scenes=(SCENE,),
        autoencoder={
            "encoder_block_out_channels": (16, 16, 16),
            "decoder_block_out_channels": (16, 16, 16),
            "num_encoder_blocks": (1, 1, 1),
            "num_decoder_blocks": (1, 1, 1),
        },
        crop=24,
        autoencoder_optimization=rate(5e-3),
        latent_rounds=3,
        channels=(32, 32),
        heads=2,
        text_width=32,
        text_layers=1,
        denoiser_optimization=rate(3e-3),
        judge=tower(1),
        validation_judge=tower(2),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> train.Run:
    """The whole chain, from drawn pictures to exported files."""
    out = tmp_path_factory.mktemp("emoji")
    pictures.save_pictures(out / "pictures", shapes())
    pictures.save_pictures(out / train.OTHERS, strangers())
    whole = train.Run(out, tiny(), minutes=0.1, steps=30)
    train.run_stages(whole)
    return whole


def average_loss(loss: stage.Loss, model: torch.nn.Module) -> float:
    """Over the same few batches whatever the model."""
    rng = torch.Generator().manual_seed(123)
    with torch.no_grad():
        return float(np.mean([loss(model.eval(), rng).item() for _ in range(6)]))


# --- The chain -------------------------------------------------------------------------------------------------------


def test_every_stage_lowers_its_loss(run):
    own, parts = shapes(), run.settings
    found = latents.load_latents(run.out / "latents")
    cases = {
        "autoencoder": (autoencoder.build(parts), autoencoder.reconstruction_loss(own, parts)),
        "denoiser": (denoiser.build(parts, found), denoiser.noise_loss(own, found, parts)),
        "judge": (judge.build(parts.judge), judge.judge_loss(own, strangers(), parts, parts.judge)),
    }
    for name, (model, loss) in cases.items():
        before = average_loss(loss, model)
        assert average_loss(loss, stage.load_average(model, run.out / name)) < 0.97 * before, name


def test_the_exported_model_and_judge_load_and_draw(run):
    model = load_denoiser(run.out / "model", device="cpu", precision="fp32")
    images = draw_images(model, ["a box", "an owl by flat"], [1, 2], SampleSettings(steps=3))
    assert images.shape == (2, SIZE, SIZE, 3) and images.std() > 0
    for part in ("text_encoder/model.safetensors", "judge/open_clip_model.safetensors"):
        assert token_rows.read_packed(run.out / "model" / part) is not None
    own = Judge.load(run.out / "model" / "judge")
    assert own.embed_images(images).shape == own.embed_texts(["a box", "a ring"]).shape
    assert own.model.visual.image_size in (32, (32, 32))
    found = latents.load_latents(run.out / "latents")
    first = found.values[: len(shapes())].float()
    assert (first * found.scale).std().item() == pytest.approx(1, abs=1e-3)
    assert json.loads((run.out / "model/vae/config.json").read_text("utf-8"))["scaling_factor"] == found.scale


def test_the_single_file_draws_what_the_folder_draws(run, tmp_path):
    # taesd's names fit the default autoencoder only, so this one is exported with it, untrained
    wide = settings.Settings(**{**vars(run.settings), "autoencoder": {}})
    found = latents.load_latents(run.out / "latents")
    file = tmp_path / "tiny.safetensors"
    model = stage.load_average(denoiser.build(run.settings, found), run.out / "denoiser")
    vae = autoencoder.build(wide)
    vae.register_to_config(scaling_factor=found.scale)
    export.write_model(tmp_path / "folder", model, vae)
    export_single_file.write(file, model, vae)
    prompts, settings_ = ["a box", "a ring, flat style"], SampleSettings(steps=3)
    one, other = (
        draw_images(load_denoiser(path, device="cpu", precision="fp32"), prompts, [1, 2], settings_)
        for path in (tmp_path / "folder", file)
    )
    assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


def test_an_exported_model_is_trained_further(run, tmp_path):
    for folder, own in (("pictures", shapes()), (train.OTHERS, strangers())):
        pictures.save_pictures(tmp_path / folder, own)
    start.start_from(run.out / "model", tmp_path)
    further = replace(run, out=tmp_path, steps=2)
    train.run_stages(further, ("autoencoder", "latents", "denoiser", "judge", "export"))
    before, after = (load_file(out / "model/vae/diffusion_pytorch_model.safetensors") for out in (run.out, tmp_path))
    assert all(torch.equal(before[name], after[name]) for name in before), "the autoencoder is kept"
    found = latents.load_latents(tmp_path / "latents")
    loss = denoiser.noise_loss(shapes(), found, run.settings)
    one, other = (
        stage.load_average(denoiser.build(run.settings, found), out / "denoiser") for out in (run.out, tmp_path)
    )
    assert average_loss(loss, other) == pytest.approx(average_loss(loss, one), rel=0.1)
    assert 0 < (one.unet.conv_in.weight - other.unet.conv_in.weight).abs().max() < 0.02
    assert torch.equal(export.used_tokens(one), export.used_tokens(other))


def test_the_card_says_how_each_stage_was_trained(run):
    log = card.training_log(run.out, run.settings)
    assert {name: one["steps"] for name, one in log.items()} == dict.fromkeys(log, 30)
    assert list(log) == ["autoencoder", "denoiser", "judge", "validation_judge"]


def test_a_folder_that_is_no_model_starts_nothing(tmp_path):
    with pytest.raises(AblationError, match="not an exported"):
        start.start_from(tmp_path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_second_run_of_a_finished_chain_changes_nothing(run):
    path = run.out / "denoiser" / stage.CHECKPOINT
    before = path.read_bytes()
    train.run_stages(run, ("denoiser",))
    assert path.read_bytes() == before


def test_a_stage_without_its_predecessor_says_which_is_missing(tmp_path):
    pictures.save_pictures(tmp_path / "pictures", shapes())
    with pytest.raises(AblationError, match="stage autoencoder first"):
        train.run_stages(train.Run(tmp_path, tiny(), 1.0, 2), ("latents",))


# --- Stages ----------------------------------------------------------------------------------------------------------


def losses(out: Path, steps: int, **options: object) -> list[float]:
    seen = []
    parts = tiny(4)
    loss = autoencoder.reconstruction_loss(shapes(), parts)
    model = autoencoder.build(parts)
    one = stage.Stage("autoencoder", model, loss, parts.autoencoder_optimization, seed=3)
    stage.train(one, out, stage.Budget(steps=steps), on_step=lambda _, value: seen.append(value), **options)
    return seen


def test_a_killed_run_goes_on_as_if_it_had_never_stopped(tmp_path):
    whole = losses(tmp_path / "whole", 8)
    # every step is saved, and the kill comes before the save of the fifth
    first = losses(tmp_path / "killed", 8, save_every=0.0, stop_after=5)
    second = losses(tmp_path / "killed", 8)
    assert first == whole[:5]
    assert second == whole[4:]
    one, other = (load_file(tmp_path / name / stage.CHECKPOINT) for name in ("whole", "killed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_rate_warms_up_stays_and_falls_to_zero(tmp_path):
    parts = settings.Optimization(4, 1.0, warmup=4)
    plan = stage.Budget(steps=20)
    point = stage._Run(torch.nn.Identity(), torch.nn.Identity(), None, torch.Generator())
    stage._plan(point, plan)
    rates = [stage._rate(replace(point, step=step), parts) for step in range(21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:11] == [1.0] * 7
    assert rates[15] == pytest.approx(0.5) and rates[20] == 0


@pytest.mark.parametrize(("minutes", "total"), [(2.0, 200), (1.5, 150), (0.5, 110)])
def test_minutes_become_steps_when_half_of_them_have_passed(minutes, total):
    point = stage._Run(torch.nn.Identity(), torch.nn.Identity(), None, torch.Generator(), 100, seconds=59.0, pace=0.6)
    stage._plan(point, stage.Budget(minutes=2.0))
    assert point.total == 0
    resumed, point.seconds = replace(point, pace=0.0, seconds=60.0), 60.0
    stage._plan(resumed, stage.Budget(minutes=minutes))
    assert resumed.total == 0, "the pace of now is unknown before a step"
    stage._plan(point, stage.Budget(minutes=minutes))
    assert (point.decay_from, point.total) == (100, total)


def test_the_shares_of_the_stages_add_up_and_leave_long_runs_to_the_denoiser():
    assert sum(train.shares(3).values()) == pytest.approx(3)
    assert train.shares(480)["denoiser"] > 300


def test_a_folder_with_a_run_is_not_overwritten_unasked(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--minutes", "1", "--out", str(run.out)])
    assert train.main() == 1
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(("channels", "edge", "stride"), [((16, 24), 4, 1), ((16, 24), 9, 2), ((3, 8), 8, 1)])
def test_the_fast_gradient_of_a_convolution_is_the_gradient(channels, edge, stride):
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(*channels, 3, stride=stride, padding=1)
    fast = convolution.speed_up(torch.nn.Sequential(torch.nn.Conv2d(*channels, 3, stride=stride, padding=1)))
    fast[0].load_state_dict(plain.state_dict())
    x = torch.randn(2, channels[0], edge, edge)
    gradients = []
    for module in (plain, fast):
        point = x.clone().requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16, enabled=module is fast):
            module(point).float().square().sum().backward()
        gradients.append((point.grad, *(one.grad for one in module.parameters())))
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() < 0.02 * one.norm()


# --- Data ------------------------------------------------------------------------------------------------------------

OWL = captions.Subject("owl", "bird", "twemoji", "orange", "big")


def drawn_captions(subject: captions.Subject, count: int = 400) -> list[captions.Caption]:
    rng = torch.Generator().manual_seed(0)
    return [captions.caption(subject, rng) for _ in range(count)]


def test_captions_depend_on_the_generator_alone():
    assert drawn_captions(OWL, 50) == drawn_captions(OWL, 50)


def test_captions_say_what_they_claim_and_agree_in_articles():
    found = drawn_captions(OWL)
    texts = {one.text for one in found}
    assert "" in texts and len(texts) > 50
    assert not any(" a owl" in f" {text}" or " a orange" in text or " an big" in text for text in texts)
    assert all(one.fits(OWL) for one in found)
    for one in found:
        assert (one.style is not None) == ("twemoji" in one.text)
        assert (one.background is not None) == ("on an orange background" in one.text)
    said = [one for one in found if one.text]
    assert all(one.background == "orange" for one in said), "a colour that is not said would be white"
    assert 0.6 < sum(one.name is not None for one in said) / len(said) < 0.8
    assert not captions.Caption("an owl by flat", name="owl", style="flat").fits(OWL)


def test_misspelling_changes_one_letter():
    dice = captions.Dice(torch.Generator().manual_seed(0))
    wrong = {captions.misspell("sunflower", dice) for _ in range(50)}
    assert len(wrong) > 20
    assert all(text[0] == "s" and 8 <= len(text) <= 10 for text in wrong)


def test_the_words_of_the_shipped_prompts_are_trained():
    source = load_prompt_source(EMBEDDED_MODEL / "prompts.json")
    grammar = " ".join((*captions.TEMPLATES, *captions.SIZED_TEMPLATES, *captions.STYLE_PHRASES, *captions.SIZES))
    known = set(grammar.replace(",", " ").split()) | {"on", "background", "an"} | set(captions.BACKGROUNDS)
    known |= set(icons.SETS.values())
    for template in (*source.instance_train, *source.instance_evaluation):
        assert set(template.replace(",", " ").split()) <= known, template


def test_placed_pictures_have_the_icon_in_the_middle_and_the_background_around():
    own = shapes()
    icon = own.premultiplied(torch.tensor([0]))
    place = augment.Placement(torch.tensor([[0.5, 0.5]]), torch.tensor([0.5]))
    image = augment.composite(icon, place, torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1), 64)
    assert torch.allclose(image[0, :, 32, 32], own.rgba[0, :3, 16, 16].float() / 255, atol=0.01)
    assert image[0, :, 2, 2].tolist() == [0, 1, 0] and image[0, :, 15, 15].tolist() == [0, 1, 0]
    window = augment.composite(
        icon, place, torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1), 64, (torch.tensor([[20, 8]]), 24)
    )
    assert torch.allclose(window, image[:, :, 8:32, 20:44], atol=1e-5)


def test_only_accidental_matches_leave_the_contrast():
    subjects = [captions.Subject("owl", "bird", "noto"), captions.Subject("duck", "bird", "noto"), OWL]
    texts = [
        captions.Caption("an owl", name="owl"),
        captions.Caption("a bird", category="bird"),
        captions.Caption("an owl by twemoji", name="owl", style="twemoji"),
    ]
    expected = [[False, True, False], [False, False, False], [True, True, False]]
    assert judge.accidental(subjects, texts).tolist() == expected


def contrast_of(logits: list[list[float]], texts: list[captions.Caption]) -> float:
    subjects = [captions.Subject("owl", "bird", "noto"), captions.Subject("owl", "bird", "flat")]
    return judge.contrast(torch.tensor(logits, dtype=torch.float32), subjects, texts).item()


def test_saying_less_is_a_worse_answer_and_saying_as_much_is_none():
    by_name = [captions.Caption("an owl", name="owl"), captions.Caption("owl emoji", name="owl")]
    assert contrast_of([[0, 50], [50, 0]], by_name) == 0
    vaguer = [by_name[0], captions.Caption("a bird", category="bird")]
    assert contrast_of([[0, 50], [0, 0]], vaguer) == pytest.approx(50 / 4, abs=1e-3), "the first picture's row alone"
    assert contrast_of([[99, 0], [50, 0]], vaguer) == 0, "more detail than its own caption is no wrong answer"


def test_style_texts_differ_in_nothing_but_the_style():
    rng = torch.Generator().manual_seed(0)
    noto, flat, *_ = judge.style_texts([OWL, OWL], STYLES, rng)
    assert noto.replace("noto", "flat") == flat and "owl" in flat


def test_unseen_concepts_are_every_eighth_and_no_picture_is_in_both():
    own = shapes()
    many = pictures.Pictures(
        own.rgba.repeat(2, 1, 1, 1), torch.arange(16), own.style.repeat(2), CONCEPTS * 4, STYLES, ({}, {})
    )
    seen, unseen = judge.seen_and_unseen(many)
    assert (len(seen), len(unseen)) == (14, 2)
    assert torch.equal(unseen.rgba, many.rgba[[7, 15]]) and unseen.concept.tolist() == [0, 1]
    both = pictures.joined(seen, unseen)
    assert both.concept.tolist() == list(range(16)) and both.concepts[15] == many.concepts[15]


def test_scenes_are_arranged_in_eight_ways():
    places = {tuple(memorized._laid_out(x, y, layout) for x, y, _ in memorized._SLOTS) for layout in range(8)}
    assert len(places) == 8
    assert [scene.layout for scene in memorized.SCENES] == list(range(8))


def test_a_scene_is_drawn_only_if_its_icons_exist():
    missing = memorized.Scene(
        "x", (), (("disc", "noto"), ("walrus", "noto"), ("box", "noto")), (0, 0, 0), (0, 0, 0), "x"
    )
    kept, images = memorized.drawn((SCENE, missing), shapes(), SIZE)
    assert kept == [SCENE] and images.shape == (1, 3, SIZE, SIZE)


def test_the_memorized_pictures_are_the_scenes_as_the_autoencoder_restores_them(run):
    _, scenes = memorized.drawn((SCENE,), shapes(), SIZE)
    model = stage.load_average(autoencoder.build(run.settings), run.out / "autoencoder")
    with torch.no_grad():
        restored = model.decode(model.encode(scenes * 2 - 1).latents).sample / 2 + 0.5
    found = latents.memorized_pictures(run.out / "latents")
    assert (found / 255 - restored.clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-6
    again = latents.load_latents(run.out / "latents").scenes.float()
    expected = model.encode(found / 255 * 2 - 1).latents
    assert (again - expected).abs().max() < 0.05 * expected.abs().max()


def test_packed_rows_come_back_and_the_others_are_their_mean():
    matrix = torch.randn(49408, 3)
    used = torch.zeros(49408, dtype=torch.bool)
    used[[5, 49407]] = True
    packed = token_rows.pack({"a.weight": matrix, "b": torch.ones(2)}, "a.weight", used)
    assert sum(value.numel() for value in packed.values()) == 2 + 2 * 3 + 2
    whole = token_rows.unpack(packed)
    assert whole.keys() == {"a.weight", "b"}
    assert torch.equal(whole["a.weight"][used], matrix[used])
    assert torch.allclose(whole["a.weight"][0], matrix[used].mean(0))


# --- Icon sets -------------------------------------------------------------------------------------------------------

MINIATURE = {
    "prefix": "mini",
    "width": 10,
    "height": 10,
    "icons": {
        "tiger": {"body": '<path fill="#ff0000" d="M0 0h10v10H0z"/>'},
        "tropicalfish": {"body": '<path fill="#0000ff" d="M0 0h5v10H0z"/>'},
    },
    "aliases": {"big-cat": {"parent": "tiger"}, "mirrored": {"parent": "tiger", "hFlip": True}},
}
INFO = {"name": "Mini", "author": {"name": "Me"}, "license": {"spdx": "MIT"}}


def test_a_set_under_another_licence_is_refused():
    with pytest.raises(AblationError, match="CC-BY-SA"):
        icons.icon_set("mini", MINIATURE, {**INFO, "license": {"spdx": "CC-BY-SA-4.0"}})


def test_concepts_are_matched_whatever_their_hyphens_and_get_the_nearest_category():
    one = icons.icon_set("mini", MINIATURE, INFO)
    names = {"🐅": {"name": "tiger"}, "🐠": {"name": "tropical fish"}, "😀": {"name": "grinning face"}}
    taxonomy = {"🐅": ("animals-nature", "animal-mammal"), "🐠": ("animals-nature", "animal-marine")}
    found = icons.choose_concepts(names, taxonomy, [one])
    assert [(concept.name, concept.category) for concept in found] == [("tiger", "animal"), ("tropical fish", "fish")]
    assert icons.names_of(MINIATURE) == {"tiger": "tiger", "tropicalfish": "tropicalfish", "bigcat": "tiger"}


def test_what_is_left_out_of_the_model_teaches_the_judges_its_styles():
    one = icons.icon_set("mini", MINIATURE, INFO)
    names = {"🐅": {"name": "tiger"}, "🐠": {"name": "tropical fish"}}
    taxonomy = {"🐅": ("objects", "tool"), "🐠": ("animals-nature", "animal-marine")}
    chosen = icons.choose_concepts(names, taxonomy, [one])
    assert [concept.name for concept in chosen] == ["tropical fish"]
    others = icons.other_concepts(names, taxonomy, [one], chosen)
    assert [(concept.name, concept.category) for concept in others] == [("tiger", "tiger")]
    assert icons.other_concepts(names, {"🐅": ("objects", "time")}, [one], chosen) == []


def test_icons_are_rendered_with_their_transparency():
    pytest.importorskip("resvg_py")
    one = icons.icon_set("mini", MINIATURE, INFO)
    concepts = [pictures.Concept("tropical fish", "fish", "animals-nature")]
    made = icons.render_all(concepts, [one], 20)
    assert made.rgba.shape == (1, 4, 20, 20)
    assert made.rgba[0, :, 10, 4].tolist() == [0, 0, 255, 255]
    assert made.rgba[0, 3, 10, 15] == 0


def test_pictures_survive_the_disk(tmp_path):
    own = shapes()
    pictures.save_pictures(tmp_path, own)
    back = pictures.load_pictures(tmp_path)
    assert torch.equal(back.rgba, own.rgba) and back.concepts == own.concepts and back.styles == own.styles


# --- Quality ---------------------------------------------------------------------------------------------------------


def test_the_background_is_read_from_the_border():
    image = np.full((32, 32, 3), (250, 145, 35), dtype=np.uint8)
    image[6:26, 6:26] = 20
    assert measures.background_of(image) == "orange"


def test_psnr_of_a_known_error():
    images = torch.zeros(2, 3, 4, 4)
    assert measures.psnr(images + 0.1, images) == pytest.approx(20.0, abs=1e-3)
