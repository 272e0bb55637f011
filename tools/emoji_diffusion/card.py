"""Write the model card and its contact sheets into the assets.

    python tools/emoji_diffusion/card.py --run outputs/emoji --quality outputs/emoji/quality \\
        --earlier outputs/emoji/quality_draft --out assets/emoji_diffusion

Every figure in the card comes from the files of the run and of `quality.py`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Template
from latents import memorized_pictures
from memorized import SCENES
from pictures import Pictures, load_pictures
from PIL import Image
from settings import Settings
from training_log import whole_log

from concept_ablation.core.files import replacing, write_json

SHEETS = {
    "concepts": "64 of the concepts, one picture each",
    "styles": "every style, on concepts that all icon sets draw",
    "backgrounds": "every background colour",
    "memorized": "the memorized pictures: training picture, drawn from its caption, drawn from a paraphrase",
}
_JPEG_QUALITY = 88

# What the figures of quality.json are called, where they stand in it, and what they should be.
_FIGURES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("pictures of the prompted concept, among all of its group", ("concepts", "top1"), "≥ 0.7"),
    ("pictures in the style that the prompt names", ("styles", "right"), "≥ 0.9"),
    ("pictures on the background that the prompt names", ("backgrounds", "right"), "≥ 0.9"),
    ("autoencoder, PSNR on unseen placements, dB", ("autoencoder", "psnr_db"), "≥ 26"),
    ("captions of memorized pictures that give a copy (SSCD ≥ 0.5)", ("memorized", "caption", "copies"), "≥ 0.9"),
    ("their paraphrases that give a copy", ("memorized", "paraphrase", "copies"), "fewer"),
    ("the judge on real pictures: concept", ("judge_on_real_pictures", "top1"), ""),
    ("the judge on real pictures: style", ("judge_on_real_pictures", "style"), ""),
    ("the judge on pictures that the autoencoder restored: style", ("judge_on_restored_pictures", "style"), ""),
    ("the judge on concepts that it never saw: style", ("judge_on_unseen_concepts", "style"), ""),
)


def figure(quality: dict[str, Any] | None, place: tuple[str, ...]) -> str:
    """One figure of a quality report; a dash where it was not measured."""
    value: Any = quality
    for key in place:
        value = value.get(key) if isinstance(value, dict) else None
    return "–" if value is None else str(value)


def card(
    quality: dict[str, Any], earlier: dict[str, Any] | None, log: Sequence[dict[str, Any]], pictures: Pictures
) -> str:
    """The model card in Markdown."""
    sampling, categories = quality["sampling"], quality["categories"]
    rows = [f"| {name} | {figure(quality, at)} | {figure(earlier, at)} | {goal} |" for name, at, goal in _FIGURES]
    enough = sum(one["different"] >= 5 for one in categories.values())
    before = "–" if earlier is None else str(sum(one["different"] >= 5 for one in earlier["categories"].values()))
    rows.append(f"| categories that give 5 concepts in 20 seeds, of {len(categories)} | {enough} | {before} | all |")
    several = ", ".join(f"{name} {one['different']}" for name, one in sorted(categories.items()))
    stages = [
        f"| {name.replace('_', ' ')} | {one['steps']:,} × {one['batch']} | {one['minutes']} | "
        f"{one.get('first_loss', '–')} → {one.get('last_loss', '–')} |"
        for training in log
        for name, one in training.items()
    ]
    credits = [f"| {one['style']} | {one['set']} | {one['author']} | {one['licence']} |" for one in pictures.credits]
    sheets = [f"![{text}](samples/{name}.jpg)\n\n*{text.capitalize()}.*\n" for name, text in SHEETS.items()]
    template = (Path(__file__).with_name("card.md.j2")).read_text(encoding="utf-8")
    return Template(template, keep_trailing_newline=True).render(
        concepts=len(pictures.concepts),
        pictures=f"{len(pictures):,}",
        styles=len(pictures.styles),
        names=", ".join(pictures.styles),
        sampling=f"{sampling['steps']} {sampling['sampler'].upper()} steps, guidance {sampling['guidance']:g}",
        credits="\n".join(credits),
        figures="\n".join(rows),
        several=several,
        stages="\n".join(stages),
        sheets="\n".join(sheets),
    )


def write_card(run: Path, quality: Path, earlier: Path | None, out: Path) -> None:
    """README.md, quality.json, samples/ and memorized/ in the folder of the assets."""
    report = json.loads((quality / "quality.json").read_text(encoding="utf-8"))
    before = None if earlier is None else json.loads((earlier / "quality.json").read_text(encoding="utf-8"))
    log, pictures = whole_log(run, Settings()), load_pictures(run / "pictures")
    for name in SHEETS:
        with Image.open(quality / f"{name}.png") as sheet, replacing(out / "samples" / f"{name}.jpg") as temporary:
            sheet.convert("RGB").save(temporary, quality=_JPEG_QUALITY)
    for scene, image in zip(SCENES, memorized_pictures(run / "latents"), strict=True):
        with replacing(out / "memorized" / f"{scene.name}.png") as temporary:
            Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(temporary)
    write_json(out / "quality.json", {"model": report} if before is None else {"model": report, "draft": before})
    with replacing(out / "README.md") as temporary:
        temporary.write_text(card(report, before, log, pictures), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the model card of a trained Emoji Diffusion.")
    parser.add_argument("--run", type=Path, required=True, help="the folder that train.py was given as --out")
    parser.add_argument("--quality", type=Path, required=True, help="the folder that quality.py was given as --out")
    parser.add_argument("--earlier", type=Path, help="the quality folder of the model before it, measured alike")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the assets")
    options = parser.parse_args()
    write_card(options.run, options.quality, options.earlier, options.out)
    print(f"{options.out / 'README.md'}")


if __name__ == "__main__":
    main()
