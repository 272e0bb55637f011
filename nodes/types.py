"""The socket types of the pack, and the inputs that several nodes share."""

from __future__ import annotations

from collections.abc import Mapping

from comfy_api.latest import io

from ..core.presets import PRESETS, TRAINED

CATEGORY = "concept ablation"
PRESET = "preset"
"""What a choice is called that leaves the matter to the preset."""
MAX_SEED = 2**53 - 1
"""The largest whole number that JavaScript, and so the front end, holds exactly."""

Concepts = io.Custom("CONCEPT")
"""tuple[core.ablation.Task, ...]"""
Dataset = io.Custom("ABLATION_DATASET")
"""core.dataset.AblationDataset or core.harvest.Harvest"""
AblationDelta = io.Custom("ABLATION_DELTA")
"""core.delta.Delta"""


def model_inputs(use: str) -> list[io.Input]:
    """MODEL and CLIP; `use` ends the sentence "The model …"."""
    return [
        io.Model.Input("model", tooltip=f"The model {use}. Its weights are never changed."),
        io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
    ]


def preset_input() -> io.Input:
    """The preset that fills in what other inputs leave open; those that need no dataset have a node of their own."""
    return io.Combo.Input(
        "preset",
        options=list(TRAINED),
        default="balanced",
        tooltip="Where every value that is left at 0 comes from: the same for the dataset as for the training. "
        f"{described({name: PRESETS[name] for name in TRAINED})}",
    )


def auto_preserve_input() -> io.Input:
    """How many neighbours are chosen automatically."""
    return io.Int.Input(
        "auto_preserve",
        default=-1,
        min=-1,
        max=1000,
        optional=True,
        tooltip="Preserve this many more concepts for each target: of those that the model knows, the nearest for "
        "the text encoder. 0 is none, -1 is the preset's.",
    )


def negative_guidance_input(note: str = "") -> io.Input:
    """How far the edit goes beyond the anchor; below 0 it is the preset's. `note` is said after the rest."""
    return io.Float.Input(
        "negative_guidance",
        default=-1.0,
        min=-1.0,
        max=100.0,
        step=0.1,
        optional=True,
        tooltip="How far beyond the anchor the edit goes, away from the target: for an anchor that is often its "
        f"target, as a bird is often a rooster. 0 is Eq. 4 of the paper, -1 is the preset's. {note}".rstrip(),
    )


def guidance_of(value: float) -> float | None:
    """What was entered as negative guidance; None is the preset's."""
    return None if value < 0 else value


def size_inputs() -> list[io.Input]:
    """Width and height of the images, in pixels."""
    tooltip = "{} of the images in pixels; 0 is the model's own size (512 for SD 1.x, 1024 for SDXL)."
    return [
        io.Int.Input(name, default=0, min=0, max=4096, step=8, tooltip=tooltip.format(name.capitalize()))
        for name in ("width", "height")
    ]


def images_at_once_input() -> io.Input:
    """How many images a node draws in one batch, where no preset says it."""
    return io.Int.Input(
        "images_at_once",
        default=16,
        min=1,
        max=1024,
        tooltip="Images drawn in one batch: fewer need less memory.",
    )


def seed_input() -> io.Input:
    """A seed that stays as it is: a new one on every run would throw away what ComfyUI has cached."""
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=MAX_SEED,
        control_after_generate=False,
        tooltip="Random seed: the same one gives the same result on the same machine.",
    )


def strength_input(name: str, what: str) -> io.Input:
    """A factor of a delta."""
    return io.Float.Input(
        name,
        default=1.0,
        min=-100.0,
        max=100.0,
        step=0.01,
        tooltip=f"How strongly {what}: 1 is the edit as it was trained, 0 is none, below 0 is its reverse.",
    )


def described(choices: Mapping[str, str]) -> str:
    """What each choice means, for a tooltip."""
    return " ".join(f"{name}: {text}." for name, text in choices.items())
