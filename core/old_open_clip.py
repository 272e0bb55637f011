"""Judges on open_clip 2.x, which WebUIs pin: what `metrics.py` otherwise has open_clip 3 do.

Before 3.0 open_clip opens no local folder, squashes no picture, and loads pickles only. So the pieces are put together
here, with weights read by safetensors.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import AblationError
from .token_rows import read_packed

WEIGHTS = "open_clip_model.safetensors"
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Pieces:
    """What makes a judge, as `metrics.Judge` holds it."""

    model: nn.Module
    preprocess: Callable[[Image.Image], Tensor]
    tokenize: Callable[[list[str]], Tensor]


def is_old() -> bool:
    """Whether the installed open_clip is one for which this module is needed."""
    return int(metadata.version("open_clip_torch").split(".")[0]) < 3


def from_folder(config: Path, weights: Path) -> Pieces:
    """The judge of an open_clip folder.

    Args:
        config: its open_clip_config.json.
        weights: its safetensors file.

    Raises:
        AblationError: it is of a kind that needs open_clip 3.
    """
    import open_clip

    told = json.loads(config.read_text(encoding="utf-8"))
    settings = told["model_cfg"]
    if settings.get("custom_text") or "multimodal_cfg" in settings or "hf_model_name" in settings["text_cfg"]:
        raise AblationError(
            f"{config.parent} needs open_clip 3: pip install -U open_clip_torch, or pass another folder."
        )
    model = open_clip.CLIP(**settings)
    model.load_state_dict(_read(weights))
    tokenize = functools.partial(open_clip.tokenize, context_length=settings["text_cfg"].get("context_length", 77))
    return Pieces(model, preparation(settings["vision_cfg"]["image_size"], told.get("preprocess_cfg", {})), tokenize)


def from_hub(model: str, pretrained: str) -> Pieces:
    """A judge by open_clip's names, with weights that are downloaded once.

    Raises:
        AblationError: the weights are not on the hub, so there is no safe file of them.
    """
    import open_clip
    from huggingface_hub import hf_hub_download

    source = open_clip.get_pretrained_cfg(model, pretrained)
    repository = source.get("hf_hub", "").rstrip("/")
    if source.get("url") or repository.count("/") != 1:
        raise AblationError(
            f"open_clip has only pickled weights for the judge {model}/{pretrained}, which can run code when they are "
            "opened: choose another one."
        )
    weights = _read(Path(hf_hub_download(repository, WEIGHTS)))
    made = open_clip.create_model(model)
    made.load_state_dict(weights)
    size = made.visual.image_size
    return Pieces(made, preparation(size[0] if isinstance(size, tuple) else size, source), open_clip.tokenize)


def preparation(size: int, said: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    """open_clip 3's evaluation transform.

    Args:
        size: edge of the model's pictures.
        said: a folder's preprocess_cfg, or what open_clip says of the weights.

    Raises:
        AblationError: a way to resize that only open_clip 3 knows.
    """
    from torchvision import transforms

    mode = said.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise AblationError(f"The judge resizes pictures by '{mode}': pip install -U open_clip_torch, which can.")
    interpolation = transforms.InterpolationMode(said.get("interpolation", "bicubic"))
    resize = transforms.Resize((size, size) if mode == "squash" else size, interpolation)
    normalize = transforms.Normalize(said.get("mean") or _CLIP_MEAN, said.get("std") or _CLIP_STD)
    return transforms.Compose([resize, transforms.CenterCrop(size), _as_rgb, transforms.ToTensor(), normalize])


def _read(path: Path) -> dict[str, Tensor]:
    return read_packed(path) or load_file(path)


def _as_rgb(picture: Image.Image) -> Image.Image:
    return picture.convert("RGB")
