"""Begin a run with the weights of a model that was exported before, so that it is trained further.

Its autoencoder stays as it is, for other latents would mean nothing to its denoiser; so does nothing of the optimizers,
which the export does not hold.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from export import SEEN_ENOUGH, TEXT_ROWS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stage import START
from torch import Tensor
from training_log import HISTORY, TRAINING

from concept_ablation.core.errors import AblationError
from concept_ablation.core.files import replacing, write_json
from concept_ablation.core.token_rows import read_packed

_JUDGE = "open_clip_model.safetensors"


def start_from(model: Path, out: Path, validation_judge: Path | None = None) -> None:
    """Write the first weights of every stage of the run in `out`.

    Args:
        model: a folder that `export.py` made, such as assets/emoji_diffusion.
        out: the folder of the run.
        validation_judge: an open_clip folder such as benchmarks/validation_judge; None trains that judge from nothing.

    Raises:
        AblationError: `model` or `validation_judge` is no such folder.
    """
    try:
        parts = {
            "autoencoder": load_file(model / "vae" / "diffusion_pytorch_model.safetensors"),
            "denoiser": _denoiser(model),
            "judge": _packed(model / "judge" / _JUDGE),
        }
        if validation_judge is not None:
            parts["validation_judge"] = _packed(validation_judge / _JUDGE)
    except OSError as error:
        raise AblationError(f"{model} is not an exported Emoji Diffusion ({error}): check the paths.") from error
    for stage, tensors in parts.items():
        with replacing(out / stage / START) as temporary:
            save_file({name: _single(value) for name, value in tensors.items()}, temporary)
    log = model / TRAINING
    write_json(out / HISTORY, json.loads(log.read_text(encoding="utf-8")) if log.is_file() else [])


def _denoiser(model: Path) -> dict[str, Tensor]:
    text, unet = model / "text_encoder" / "model.safetensors", model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {f"text_encoder.{name}": value for name, value in _packed(text).items()}
    tensors |= {f"unet.{name}": value for name, value in load_file(unet).items()}
    return {**tensors, "seen": _used(text, TEXT_ROWS).long() * SEEN_ENOUGH}


def _packed(path: Path) -> dict[str, Tensor]:
    return read_packed(path) or load_file(path)


def _used(path: Path, rows: str) -> Tensor:
    """Which token embeddings a file holds, bool [vocabulary]."""
    used = torch.zeros(49408, dtype=torch.bool)
    with safe_open(path, framework="pt") as file:
        index = [name for name in file.keys() if name.endswith(f"{rows}.index")]  # noqa: SIM118 (no iterator)
        used[file.get_tensor(index[0]).long() if index else slice(None)] = True
    return used


def _single(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
