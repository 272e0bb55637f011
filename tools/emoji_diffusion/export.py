"""Write the trained model as the assets that ship: a diffusers folder in fp16, with the judges in open_clip's format.

python tools/emoji_diffusion/export.py --run outputs/emoji --out outputs/emoji/model
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from autoencoder import build as build_autoencoder
from denoiser import SCHEDULE, TextToLatent
from denoiser import build as build_denoiser
from denoiser import tokenizer as load_tokenizer
from diffusers import AutoencoderTiny, DDIMScheduler
from judge import build as build_judge
from latents import load_latents
from pictures import OTHERS, Pictures, load_pictures
from safetensors.torch import load_file, save_file
from settings import Settings, Tower
from stage import load_average
from torch import Tensor, nn
from training_log import TRAINING, whole_log

from concept_ablation.core.files import replacing, write_json
from concept_ablation.core.hosts.diffusers import EMBEDDED_MODEL
from concept_ablation.core.token_rows import pack

TEXT_ROWS = "embeddings.token_embedding.weight"
JUDGE_ROWS = "token_embedding.weight"
SEEN_ENOUGH = 16
"""A token that training saw less often is the fragment of a typo, and its row has hardly left its random start."""

_COPIED = ("prompts.json", "model_index.json")
_HINTS = "ablation_hints.json"


def export(run: Path, settings: Settings, out: Path) -> None:
    """Write the assets from the checkpoints in `run` into `out`; the validation judge goes to `run`, not to the assets
    (from there it is copied to benchmarks/validation_judge).

    Of the token embeddings only the rows that training used are stored (core/token_rows.py).
    """
    latents = load_latents(run / "latents")
    denoiser = load_average(build_denoiser(settings, latents), run / "denoiser")
    autoencoder = load_average(build_autoencoder(settings), run / "autoencoder")
    autoencoder.register_to_config(scaling_factor=latents.scale)
    write_model(out, denoiser, autoencoder)
    write_hints(out, load_pictures(run / "pictures"))
    write_json(out / TRAINING, whole_log(run, settings))
    used = used_tokens(denoiser)
    for concept in load_pictures(run / OTHERS).concepts:
        # judges learn these names, too
        used[load_tokenizer()(concept.name, add_special_tokens=False).input_ids] = True
    for name, tower, folder in (
        ("judge", settings.judge, out / "judge"),
        ("validation_judge", settings.validation_judge, run / "validation_judge" / "open_clip"),
    ):
        if (run / name).is_dir():
            write_judge(folder, load_average(build_judge(tower), run / name), tower, used)


def write_model(out: Path, denoiser: TextToLatent, autoencoder: AutoencoderTiny) -> None:
    """The pipeline folder."""
    out.mkdir(parents=True, exist_ok=True)
    text, unet = denoiser.text_encoder.half(), denoiser.unet.half()
    for module, name in ((text, "text_encoder"), (unet, "unet"), (autoencoder.half(), "vae")):
        _contiguous(module).save_pretrained(out / name)
    _forget_block_widths(out / "vae" / "config.json")
    _repack(out / "text_encoder" / "model.safetensors", used_tokens(denoiser))
    schedule = {**SCHEDULE, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    DDIMScheduler(**schedule).save_pretrained(out / "scheduler")
    load_tokenizer().save_pretrained(out / "tokenizer")
    for name in _COPIED:
        shutil.copyfile(EMBEDDED_MODEL / name, out / name)


def write_hints(out: Path, pictures: Pictures) -> None:
    """What the pages and nodes should know of the model: its learning rates, its styles and what its concepts are."""
    known = json.loads((EMBEDDED_MODEL / _HINTS).read_text(encoding="utf-8"))
    categories = {concept.name: concept.category for concept in pictures.concepts}
    write_json(out / _HINTS, {**known, "medium": "emoji", "styles": list(pictures.styles), "categories": categories})


def used_tokens(denoiser: TextToLatent) -> Tensor:
    """The tokens whose embeddings were trained, bool [vocabulary]; 0 is there because open_clip pads with it."""
    used = denoiser.seen >= SEEN_ENOUGH
    used[0] = True
    return used


def write_judge(folder: Path, judge: nn.Module, tower: Tower, used: Tensor) -> None:
    """An open_clip folder with those rows of the token embedding that are `used`, bool [vocabulary]."""
    tensors = pack({name: _half(value) for name, value in judge.state_dict().items()}, JUDGE_ROWS, used)
    with replacing(folder / "open_clip_model.safetensors") as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    preprocess: dict[str, Any] = {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    write_json(folder / "open_clip_config.json", {"model_cfg": tower.config(), "preprocess_cfg": preprocess})


def size_in_mb(folder: Path) -> float:
    """All files below `folder`, in units of a million bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def _repack(path: Path, used: Tensor) -> None:
    tensors = load_file(path)
    (name,) = [key for key in tensors if key.endswith(TEXT_ROWS)]
    with replacing(path) as temporary:
        save_file(pack(tensors, name, used), temporary, {"format": "pt"})


def _forget_block_widths(path: Path) -> None:
    # AutoencoderTiny adds this to its own configuration and then warns of it at every load
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("block_out_channels", None)
    write_json(path, config)


def _contiguous(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()
    return module


def _half(value: Tensor) -> Tensor:
    value = value.detach().contiguous().clone()
    return value.half() if value.is_floating_point() else value


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the trained model as assets.")
    parser.add_argument("--run", type=Path, required=True, help="the folder that train.py was given as --out")
    parser.add_argument("--out", type=Path, required=True, help="folder for the assets")
    options = parser.parse_args()
    export(options.run, Settings(), options.out)
    index = json.loads((options.out / "model_index.json").read_text(encoding="utf-8"))
    print(f"{index['_class_name']} in {options.out}: {size_in_mb(options.out):.1f} MB")


if __name__ == "__main__":
    main()
