"""Keep copies of memorized images out of a dataset: Kumari et al. 2023, section 3.3, drop anchor images that are too
similar to the memorized one, since training on them would teach the model what it is to forget.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .copies import COPY_THRESHOLD, CopyDetector, copies
from .denoiser import Denoiser
from .errors import AblationError

LEAST_KEPT = 0.5
"""Share of the rows that must be no copies; with fewer, the anchor prompts are no good."""


@dataclass(frozen=True)
class Screen:
    """What no image of a dataset may be a copy of."""

    detector: CopyDetector
    originals: tuple[np.ndarray, ...] = field(repr=False)
    """Memorized images, each uint8 [height, width, 3]."""
    threshold: float = COPY_THRESHOLD
    """Similarity from which an image is a copy."""
    redraws: int = 4
    """How often an image that is a copy is drawn again, with another seed, before its row is left out."""

    def __post_init__(self) -> None:
        if not self.originals or not -1 <= self.threshold <= 1 or self.redraws < 0:
            raise AblationError("A screen needs a memorized image, a similarity of -1 to 1, and 0 or more redraws.")

    @property
    def described(self) -> dict[str, object]:
        """What a dataset's manifest says of it."""
        digest = hashlib.sha256()
        for original in self.originals:
            digest.update(f"{original.shape}".encode() + np.ascontiguousarray(original).tobytes())
        return {
            "detector": self.detector.name,
            "originals_sha256": digest.hexdigest(),
            "threshold": self.threshold,
            "redraws": self.redraws,
        }

    @torch.no_grad()
    def passes(self, denoiser: Denoiser, latents: Tensor) -> Tensor:
        """Which of the latents [B, C, h, w] decode to an image that copies no original, bool [B] on the CPU."""
        decoded = denoiser.vae.decode(latents.to(denoiser.device, torch.float32))
        images = (decoded.permute(0, 2, 3, 1) * 255).round().to("cpu", torch.uint8).numpy()
        known = torch.cat([self.detector.embed(original[None]) for original in self.originals])
        return torch.from_numpy(~copies(self.detector.embed(images) @ known.t(), self.threshold))


def require_enough(kept: Sequence[bool], preserving: Sequence[bool], anchor: str) -> None:
    """Raise AblationError if too few of a concept's rows that ablate are left; `anchor` is what it calls its anchor."""
    ablating = [passed for passed, preserved in zip(kept, preserving, strict=True) if not preserved]
    left = sum(ablating)
    if left < max(1, LEAST_KEPT * len(ablating)):
        raise AblationError(
            f"Only {left} of {len(ablating)} images from the anchor prompts of '{anchor}' are no copies of a memorized "
            "image: give other anchor prompts, in words that are farther from its caption."
        )
