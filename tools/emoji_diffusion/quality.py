"""Measure a trained model and draw contact sheets: the figures that its model card shows.

    python tools/emoji_diffusion/quality.py --run outputs/emoji --out outputs/emoji/quality

The judge here is the validation judge, which the model never saw and the product uses for checks only. `--model`
measures another model, such as an earlier one, with the same prompts, seeds and judge. `--development` has other
prompts and seeds and the judge that ships: for choosing the guidance, say, before anything is measured.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from augment import choose, draw
from captions import BACKGROUNDS, Subject, on_background
from judge import seen_and_unseen
from latents import memorized_pictures
from measures import background_of, concept_texts, psnr, recognised, sscd, sscd_available, styles_seen
from memorized import SCENES
from pictures import OTHERS, Concept, Pictures, load_pictures
from sheets import write_sheet
from torch import Tensor

from concept_ablation.core.copies import COPY_THRESHOLD
from concept_ablation.core.denoiser import Denoiser
from concept_ablation.core.files import write_json
from concept_ablation.core.hosts.diffusers import load_denoiser
from concept_ablation.core.metrics import Judge
from concept_ablation.core.prompts import fill
from concept_ablation.core.samplers import SampleSettings, draw_images

SAMPLING = SampleSettings(steps=50, guidance=3.0)
TEMPLATE = "a picture of a cute {}"
"""Held out: the words are known, but no training caption has put them together like this."""

DEVELOPMENT = ("an emoji of a {}", 10**5)
"""Template and first seed for choosing by."""

_UNSEEN_SEED = 10**6
"""Far from the seeds of the training latents."""

_CATEGORY_SEEDS = 20
_MINIMUM_MEMBERS = 6


@dataclass(frozen=True)
class Bench:
    """The model that is measured and what it is measured with."""

    model: Denoiser
    judge: Judge
    pictures: Pictures
    unseen: Pictures
    """Pictures of concepts that no judge has seen."""
    memorized: np.ndarray
    """The pictures of `SCENES`, uint8 [M, H, W, 3]."""
    out: Path
    sampling: SampleSettings
    template: str = TEMPLATE
    seed: int = 0

    @cached_property
    def texts(self) -> Tensor:
        return concept_texts(self.judge, self.pictures.concepts)

    def names(self, images: np.ndarray, groups: list[set[str]]) -> list[str]:
        return recognised(self.judge, images, self.pictures.concepts, self.texts, groups)

    def images(self, prompts: list[str], first_seed: int) -> np.ndarray:
        first = self.seed + first_seed
        return draw_images(self.model, prompts, range(first, first + len(prompts)), self.sampling, batch=32)


def measure(bench: Bench, per_concept: int, grid: int) -> dict[str, Any]:
    """All figures, as shares unless named otherwise; the sheets are written on the way.

    Args:
        per_concept: pictures of each concept.
        grid: how many concepts the grids of styles and colours have.
    """
    return {
        "concepts": concepts(bench, per_concept),
        "styles": styles(bench, grid),
        "backgrounds": backgrounds(bench, grid),
        "categories": categories(bench),
        "autoencoder": {"psnr_db": round(restoration(bench), 2)},
        "memorized": memorized(bench),
        **judge_itself(bench),
    }


def concepts(bench: Bench, repeats: int) -> dict[str, Any]:
    """Share of pictures that the judge takes for the prompted concept, among all of its group."""
    wanted = [one for _ in range(repeats) for one in bench.pictures.concepts]
    images = bench.images([fill(bench.template, one.name) for one in wanted], 1000)
    names = bench.names(images, [{one.group} for one in wanted])
    right = [name == one.name for name, one in zip(names, wanted, strict=True)]
    shown = np.linspace(0, len(bench.pictures.concepts) - 1, min(64, len(bench.pictures.concepts))).round().astype(int)
    write_sheet(bench.out / "concepts.png", images[shown], [wanted[index].name for index in shown], 8)
    groups = {one.group for one in wanted}
    by_group = {
        group: share([hit for hit, one in zip(right, wanted, strict=True) if one.group == group])
        for group in sorted(groups)
    }
    missed = sorted({one.name for hit, one in zip(right, wanted, strict=True) if not hit})
    return {"images": len(images), "top1": share(right), "by_group": by_group, "missed": missed}


def styles(bench: Bench, count: int) -> dict[str, Any]:
    """Share of pictures in the style that the prompt names."""
    names = bench.pictures.styles
    chosen = widely_drawn(bench.pictures, count)
    wanted = [(style, one.name) for style in names for one in chosen]
    images = bench.images([f"{fill(bench.template, noun)} in the style of {style}" for style, noun in wanted], 2000)
    seen = styles_seen(bench.judge, images, [noun for _, noun in wanted], names)
    right = [style == found for (style, _), found in zip(wanted, seen, strict=True)]
    write_sheet(bench.out / "styles.png", images, [f"{noun}, {style}" for style, noun in wanted], len(chosen))
    by_style = {
        name: share([hit for hit, (style, _) in zip(right, wanted, strict=True) if style == name]) for name in names
    }
    return {"images": len(images), "right": share(right), "by_style": by_style}


def backgrounds(bench: Bench, count: int) -> dict[str, Any]:
    """Share of pictures whose border has the colour that the prompt names."""
    chosen = widely_drawn(bench.pictures, count)
    wanted = [(colour, one.name) for colour in BACKGROUNDS for one in chosen]
    images = bench.images([f"{fill(bench.template, noun)} {on_background(colour)}" for colour, noun in wanted], 3000)
    right = [background_of(image) == colour for image, (colour, _) in zip(images, wanted, strict=True)]
    write_sheet(bench.out / "backgrounds.png", images, [f"{noun}, {colour}" for colour, noun in wanted], len(chosen))
    return {"images": len(images), "right": share(right)}


def categories(bench: Bench) -> dict[str, Any]:
    """For each category with enough members: how many different ones of them 20 seeds of its name draw."""
    found = {}
    for category in sorted({one.category for one in bench.pictures.concepts}):
        members = [one for one in bench.pictures.concepts if one.category == category]
        if len(members) < _MINIMUM_MEMBERS:
            continue
        images = bench.images([fill(bench.template, category)] * _CATEGORY_SEEDS, 4000)
        # a category may be in several groups: Unicode has the wise monkeys among its smileys
        names = bench.names(images, [{one.group for one in members}] * len(images))
        own = [name for name in names if name in {one.name for one in members}]
        found[category] = {"different": len(set(own)), "inside": share([name in own for name in names])}
    return found


def restoration(bench: Bench) -> float:
    """PSNR of the autoencoder, in dB, on every tenth picture in placements that training never had."""
    choice = choose(torch.arange(0, len(bench.pictures), 10), torch.Generator().manual_seed(_UNSEEN_SEED))
    images = draw(bench.pictures, choice, bench.model.latent_shape[1] * 8)
    return psnr(restored(bench, images), images)


def restored(bench: Bench, images: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] in [0, 1] as the autoencoder gives them back."""
    vae = bench.model.vae
    return torch.cat([vae.decode(vae.encode(part)) for part in images.split(16)])


def memorized(bench: Bench, repeats: int = 4) -> dict[str, Any] | None:
    """How often captions and paraphrases reproduce the memorized pictures; None without a copy detector."""
    scenes, stored = SCENES, bench.memorized
    captions = [scene.caption for scene in scenes for _ in range(repeats)]
    paraphrases = [scene.paraphrases[index % len(scene.paraphrases)] for scene in scenes for index in range(repeats)]
    said, rephrased = bench.images(captions, 5000), bench.images(paraphrases, 6000)
    pairs = np.stack([stored, *(part[::repeats] for part in (said, rephrased))], axis=1).reshape(-1, *stored.shape[1:])
    labels = [label for scene in scenes for label in ("training picture", scene.caption, scene.paraphrases[0])]
    write_sheet(bench.out / "memorized.png", pairs, labels, 6)
    if not sscd_available():
        return None
    own = sscd(stored).repeat_interleave(repeats, 0)
    result = {}
    for name, images in (("caption", said), ("paraphrase", rephrased)):
        similarity = (sscd(images) * own).sum(1)
        result[name] = {
            "copies": share((similarity >= COPY_THRESHOLD).tolist()),
            "similarity": round(similarity.mean().item(), 3),
        }
    return result


def judge_itself(bench: Bench) -> dict[str, dict[str, float]]:
    """The judge on the training pictures in new placements, as they are and as the autoencoder restores them, and on
    concepts that it has never seen, where only the style can be asked for: what bounds the other figures.
    """
    every_third = torch.arange(0, len(bench.pictures), 3)
    real, subjects = placed(bench, bench.pictures, every_third)
    strange, strangers = placed(bench, bench.unseen, torch.arange(len(bench.unseen)))
    return {
        "judge_on_real_pictures": judged(bench, real, subjects),
        "judge_on_restored_pictures": judged(bench, restored(bench, real), subjects),
        "judge_on_unseen_concepts": {"style": style_share(bench, as_bytes(strange), strangers)},
    }


def placed(bench: Bench, pictures: Pictures, index: Tensor) -> tuple[Tensor, list[Subject]]:
    """Pictures on backgrounds and in places of their own, [N, 3, H, W] in [0, 1], and what they show."""
    choice = choose(index, torch.Generator().manual_seed(_UNSEEN_SEED + 1))
    return draw(pictures, choice, bench.model.latent_shape[1] * 8), choice.subjects(pictures)


def judged(bench: Bench, images: Tensor, subjects: list[Subject]) -> dict[str, float]:
    """Shares of pictures whose concept, style and background are recognised."""
    array = as_bytes(images)
    group = {one.name: one.group for one in bench.pictures.concepts}
    names = bench.names(array, [{group[one.name]} for one in subjects])
    return {
        "top1": share([name == one.name for name, one in zip(names, subjects, strict=True)]),
        "style": style_share(bench, array, subjects),
        "background": share(
            [background_of(image) == one.background for image, one in zip(array, subjects, strict=True)]
        ),
    }


def style_share(bench: Bench, images: np.ndarray, subjects: list[Subject]) -> float:
    """Share of pictures whose style is recognised."""
    seen = styles_seen(bench.judge, images, [one.name for one in subjects], bench.pictures.styles)
    return share([found == one.style for found, one in zip(seen, subjects, strict=True)])


def as_bytes(images: Tensor) -> np.ndarray:
    """[N, 3, H, W] in [0, 1] -> uint8 [N, H, W, 3]."""
    return (images.clamp(0, 1).permute(0, 2, 3, 1) * 255).round().byte().numpy()


def widely_drawn(pictures: Pictures, count: int) -> list[Concept]:
    """`count` concepts that every style draws, spread over the list."""
    numbers = pictures.concept.bincount(minlength=len(pictures.concepts))
    everywhere = [one for one, number in zip(pictures.concepts, numbers, strict=True) if number == len(pictures.styles)]
    chosen = np.linspace(0, len(everywhere) - 1, min(count, len(everywhere))).round().astype(int)
    return [everywhere[index] for index in chosen]


def share(hits: list[bool]) -> float:
    """Mean of some truths, to three places."""
    return round(sum(hits) / len(hits), 3)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure a trained Emoji Diffusion.")
    parser.add_argument("--run", type=Path, required=True, help="the folder that train.py was given as --out")
    parser.add_argument("--out", type=Path, required=True, help="folder for quality.json and the contact sheets")
    parser.add_argument("--model", type=Path, help="the model to measure (default: model/ of the run)")
    parser.add_argument("--judge", type=Path, help="open_clip folder (default: the run's validation judge)")
    parser.add_argument("--per-concept", type=int, default=1, help="pictures of each concept")
    parser.add_argument("--grid", type=int, default=8, help="concepts in the grids of styles and backgrounds")
    parser.add_argument("--steps", type=int, default=SAMPLING.steps, help="DDIM steps")
    parser.add_argument("--guidance", type=float, default=SAMPLING.guidance, help="classifier-free guidance scale")
    parser.add_argument("--development", action="store_true", help="other prompts and seeds, and the judge that ships")
    options = parser.parse_args()
    began = time.monotonic()
    model = options.model or options.run / "model"
    own = options.run / ("model/judge" if options.development else "validation_judge/open_clip")
    judge = Judge.load(options.judge or own)
    template, seed = DEVELOPMENT if options.development else (TEMPLATE, 0)
    sampling = replace(SAMPLING, steps=options.steps, guidance=options.guidance)
    pictures, (_, unseen) = (
        load_pictures(options.run / "pictures"),
        seen_and_unseen(load_pictures(options.run / OTHERS)),
    )
    originals = memorized_pictures(options.run / "latents").permute(0, 2, 3, 1).numpy()
    bench = Bench(load_denoiser(model), judge, pictures, unseen, originals, options.out, sampling, template, seed)
    figures = measure(bench, options.per_concept, options.grid)
    drawn_with = {"sampler": sampling.sampler, "steps": sampling.steps, "guidance": sampling.guidance}
    minutes = round((time.monotonic() - began) / 60, 1)
    write_json(
        options.out / "quality.json", {"model": str(model), "sampling": drawn_with, **figures, "minutes": minutes}
    )
    print(f"{options.out / 'quality.json'} after {minutes} minutes")


if __name__ == "__main__":
    main()
