"""What the commands make of their options: tasks, a model and its judge, names of files."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import AblationError
from ..core.judges import NETWORK_JUDGE
from .console import console

if TYPE_CHECKING:
    from ..core.ablation import Task
    from ..core.hosts.diffusers import DiffusersDenoiser
    from ..core.metrics import Judge


def make_tasks(
    targets: Sequence[str],
    anchors: Sequence[str],
    kind: str,
    surrounding: Sequence[str] | None,
    prompts: Path | None,
    target_prompts: Path | None,
) -> tuple[Task, ...]:
    from ..core.ablation import Task
    from ..core.concept import Concept
    from ..core.prompts import read_prompt_file

    if len(targets) != len(anchors):
        raise AblationError(f"Targets: {len(targets)}, anchors: {len(anchors)}. Give one anchor for each target.")
    extra: dict[str, Any] = {}
    if prompts is not None:
        extra["anchor_prompts"] = read_prompt_file(prompts)
    if target_prompts is not None:
        extra["target_prompts"] = read_prompt_file(target_prompts)
    return tuple(
        Task(Concept(target, anchor, kind, **extra), tuple(surrounding or ()))
        for target, anchor in zip(targets, anchors, strict=True)
    )


def load_with_judge(
    model: str | None, judge: str | None, device: str | None, precision: str, prediction: str | None
) -> tuple[DiffusersDenoiser, Judge]:
    """The model and its judge, before any work is done."""
    denoiser = load_model(model, device, precision, prediction)
    return denoiser, load_judge(judge, denoiser, embedded=model is None)


def load_judge(judge: str | None, denoiser: DiffusersDenoiser, *, embedded: bool) -> Judge:
    """The judge that was named, else the embedded one for the embedded model and a public one for any other."""
    from ..core.metrics import Judge

    return Judge.load(judge or (None if embedded else NETWORK_JUDGE), denoiser.device)


def load_model(model: str | None, device: str | None, precision: str, prediction: str | None) -> DiffusersDenoiser:
    if model is None:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # nothing is downloaded, and they flash by
    with console.status("Loading the model"):
        from ..core.hosts.diffusers import load_denoiser

        return load_denoiser(model, device=device, precision=precision, prediction_type=prediction)


def with_strength(text: str) -> tuple[Path, float]:
    """FILE[:STRENGTH]: what follows the last colon is a strength only if it is a number (C:\\x.safetensors:0.5)."""
    path, colon, number = text.rpartition(":")
    if not colon:
        return Path(text), 1.0
    try:
        strength = float(number)
    except ValueError:
        return Path(text), 1.0
    if not math.isfinite(strength):
        raise AblationError(f"The strength of {path} must be a finite number, not {number}.")
    return Path(path), strength


def require_safetensors(path: Path, *inputs: Path) -> None:
    """Raise AblationError unless `path` can be a delta file, and another one than those that it is made of."""
    if path.suffix != ".safetensors":
        raise AblationError(f"{path.name} must end in .safetensors, or no LoRA loader will find it.")
    if path.is_dir():
        raise AblationError(f"{path} is a folder: give --output the name of a file.")
    if path.resolve() in [one.resolve() for one in inputs]:
        raise AblationError(f"{path.name} is the delta itself: give --output another name.")
