"""Measure whether pictures show a concept, by a CLIP model that takes no part in the edit: the judge.

`Judge` turns pictures and texts into embeddings; the metrics are pure functions of those embeddings. What to draw and
what to compare it with is decided in `evaluation.py`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from . import old_open_clip
from .errors import AblationError
from .judges import EMBEDDED_JUDGE
from .token_rows import read_packed

if TYPE_CHECKING:
    from open_clip import CLIP

_CONFIG = "open_clip_config.json"
_WEIGHTS = "open_clip_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# What open_clip, timm and transformers raise for weights or settings that do not fit, or that cannot be fetched.
_LOADING_ERRORS = (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, AssertionError)


@dataclass(frozen=True)
class Judge:
    """A CLIP model and the way it wants its pictures and texts prepared."""

    name: str
    device: torch.device
    model: CLIP = field(repr=False)
    preprocess: Callable[[Image.Image], Tensor] = field(repr=False)
    """open_clip's evaluation transform: an RGB picture of any size -> fp32 [3, height, width]."""
    tokenize: Callable[[list[str]], Tensor] = field(repr=False)
    """Texts -> token ids, int64 [N, context length]."""

    @classmethod
    def load(cls, judge: str | Path | None = None, device: str | torch.device = "cpu") -> Judge:
        """Load a judge in fp32.

        Args:
            judge: None for the small one embedded in this package; a folder in open_clip's format (with
                `open_clip_config.json` and `open_clip_model.safetensors`); or `model[/pretrained]` by open_clip's
                names, such as "ViT-L-14/openai", which open_clip downloads once. A model without `pretrained` gets
                the first weights that open_clip lists for it.
            device: where it runs.

        Raises:
            AblationError: no such folder or name, no weights that can be read safely, weights that do not fit the
                configuration, or a download that failed.
        """
        device = torch.device(device)
        if judge is None:
            return _load_folder("embedded emoji judge", EMBEDDED_JUDGE, device)
        path = Path(judge).expanduser()
        if path.is_dir():
            return _load_folder(path.resolve().name, path, device)
        if path.is_file():
            raise AblationError(
                f"The judge {path} is a single file: pass the folder that holds it together with {_CONFIG}."
            )
        if isinstance(judge, Path) or path.is_absolute() or judge.startswith((".", "~")):
            raise AblationError(f"The judge folder {path} does not exist: check the path.")
        return _load_named(judge, device)

    def embed_images(self, images: np.ndarray, batch: int = 64) -> Tensor:
        """Embed pictures.

        Args:
            images: uint8 [N, height, width, 3], sRGB, N >= 1.
            batch: pictures per forward pass.

        Returns:
            L2-normalised fp32 [N, D] on the CPU.

        Raises:
            ValueError: another type or shape.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) == 0:
            raise ValueError(f"images must be uint8 [N >= 1, height, width, 3], not {images.dtype} {images.shape}")
        return torch.cat([self._embed_batch(images[start : start + batch]) for start in range(0, len(images), batch)])

    @torch.no_grad()
    def _embed_batch(self, images: np.ndarray) -> Tensor:
        pixels = torch.stack([self.preprocess(Image.fromarray(image)) for image in images])
        return F.normalize(self.model.encode_image(pixels.to(self.device)).float(), dim=-1).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed N >= 1 texts, each by itself: L2-normalised fp32 [N, D] on the CPU."""
        tokens = self.tokenize(list(texts)).to(self.device)
        return F.normalize(self.model.encode_text(tokens).float(), dim=-1).cpu()

    def embed_concept(self, texts: Sequence[str]) -> Tensor:
        """Embed one concept that is said in N >= 1 ways: the normalised mean of their embeddings, fp32 [D].

        Prompt ensembling of Radford et al., "Learning Transferable Visual Models From Natural Language Supervision"
        (2021), section 3.1.4.
        """
        return F.normalize(self.embed_texts(texts).mean(dim=0), dim=0)


def clip_scores(images: Tensor, text: Tensor) -> Tensor:
    """Cosine between each picture [N, D] and a text [D], [N] in [-1, 1]."""
    return F.cosine_similarity(images, text[None], dim=-1)


def clip_hits(images: Tensor, concept: Tensor, other: Tensor) -> Tensor:
    """Which pictures [N, D] are strictly nearer to `concept` [D] than to `other` [D], bool [N]."""
    return clip_scores(images, concept) > clip_scores(images, other)


def clip_score(images: Tensor, text: Tensor) -> float:
    """Mean cosine between pictures [N, D] and a text [D], in [-1, 1] (Kumari et al. 2023, section 4.1)."""
    return clip_scores(images, text).mean().item()


def clip_accuracy(images: Tensor, concept: Tensor, other: Tensor) -> float:
    """Share of pictures [N, D] that are strictly nearer to `concept` [D] than to `other` [D], in [0, 1].

    The two-way CLIP accuracy of Kumari et al. 2023, section 4.1, where `other` is the anchor of the ablated concept.
    """
    return clip_hits(images, concept, other).float().mean().item()


def _load_folder(name: str, folder: Path, device: torch.device) -> Judge:
    config = folder / _CONFIG
    if not config.is_file():
        raise AblationError(f"{folder} is not an open_clip folder, because it has no {_CONFIG}: pass another folder.")
    _require_safe_weights(folder)
    try:
        if "trust_remote_code" in config.read_text(encoding="utf-8"):
            raise AblationError(f"{config} asks to run code that comes with the weights: pass another folder.")
        weights = folder / _WEIGHTS
        if old_open_clip.is_old():
            return _from_pieces(name, old_open_clip.from_folder(config, weights), device)
        packed = read_packed(weights) if weights.is_file() else None
        return _assemble(name, f"local-dir:{folder}", device, packed)
    except (*_LOADING_ERRORS, SafetensorError) as error:
        raise AblationError(f"Cannot load the judge in {folder} ({_reason(error)}): pass another folder.") from error


def _require_safe_weights(folder: Path) -> None:
    """Refuse a folder in which open_clip could open a pickle.

    It takes `open_clip_model.safetensors` first, but prefers some pickled names over other `.safetensors` files.
    """
    if (folder / _WEIGHTS).is_file():
        return
    if any(file.suffix in _PICKLES for file in folder.iterdir()):
        raise AblationError(
            f"{folder} has pickled weights, which can run code when they are opened, and no {_WEIGHTS}: convert them."
        )
    if not any(folder.glob("*.safetensors")):
        raise AblationError(f"{folder} has no weights: put {_WEIGHTS} beside {_CONFIG}.")


def _load_named(name: str, device: torch.device) -> Judge:
    import open_clip

    model, pretrained = _split_name(name)
    if old_open_clip.is_old():
        try:
            return _from_pieces(name, old_open_clip.from_hub(model, pretrained), device)
        except (*_LOADING_ERRORS, SafetensorError) as error:
            raise _unreachable(name, error) from error
    source = open_clip.get_pretrained_cfg(model, pretrained)
    try:
        if Path(open_clip.download_pretrained(source)).suffix != ".safetensors":
            raise AblationError(
                f"open_clip has only pickled weights for the judge {name}, which can run code when they are opened: "
                "choose another one."
            )
        # Only a warning stands between these weights and the wrong activation function.
        quick_gelu = bool(source.get("quick_gelu", False))
        return _assemble(name, model, device, pretrained=pretrained, force_quick_gelu=quick_gelu)
    except _LOADING_ERRORS as error:
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> AblationError:
    return AblationError(
        f"Cannot load the judge {name} ({_reason(error)}): connect to the internet or pass a local folder in open_clip "
        "format."
    )


def _from_pieces(name: str, pieces: old_open_clip.Pieces, device: torch.device) -> Judge:
    model = pieces.model.to(device).eval().requires_grad_(False)
    return Judge(name, device, model, pieces.preprocess, pieces.tokenize)


def _split_name(name: str) -> tuple[str, str]:
    """Split "ViT-L-14/openai" into open_clip's model and weights; "ViT-L/14" is a model as well."""
    import open_clip

    known = set(open_clip.list_models())
    for model, pretrained in ((name, ""), tuple(name.rpartition("/")[::2])):
        model = model.replace("/", "-")
        if model not in known:
            continue
        tags = open_clip.list_pretrained_tags_by_model(model)
        if not pretrained and tags:
            return model, tags[0]
        if open_clip.is_pretrained_cfg(model, pretrained):
            return model, pretrained
        raise AblationError(
            f"open_clip has no weights {pretrained!r} for the judge {model}: choose one of {', '.join(tags) or 'none'}."
        )
    raise AblationError(
        f"The judge {name!r} is neither a folder nor a model that open_clip knows: pass a folder in open_clip format "
        "or a name such as ViT-L-14/openai."
    )


def _assemble(
    name: str, source: str, device: torch.device, weights: dict[str, Tensor] | None = None, **options: object
) -> Judge:
    """The judge that open_clip calls `source`, with `weights` or, without them, those that open_clip finds."""
    # open_clip and timm take seconds to import, which no one who measures nothing should wait for.
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    loads = weights is None
    with _unlogged("No pretrained weights loaded"):
        model = open_clip.create_model(source, load_weights=loads, require_pretrained=loads, **options)
    if weights is not None:
        model.load_state_dict(weights)
    preprocess = image_transform_v2(PreprocessCfg(**open_clip.get_model_preprocess_cfg(model)), is_train=False)
    model = model.to(device).eval().requires_grad_(False)
    return Judge(name, device, model, preprocess, open_clip.get_tokenizer(source))


@contextlib.contextmanager
def _unlogged(words: str) -> Iterator[None]:
    """Keep open_clip from warning of what was asked for, through the logger that belongs to the host program."""

    def other(record: logging.LogRecord) -> bool:
        return words not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(other)
    try:
        yield
    finally:
        root.removeFilter(other)


def _reason(error: Exception) -> str:
    """The first line of `error`, without the full stop that would end our sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".: ") if lines else type(error).__name__
