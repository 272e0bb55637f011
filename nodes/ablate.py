"""The node that trains a delta."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from comfy.model_management import InterruptProcessingException
from comfy_api.latest import io

from ..core.ablation import Ablation, Data, train_on
from ..core.errors import AblationError
from ..core.harvest import Harvest
from ..core.hosts.comfyui import opened, patched, require_trainable
from ..core.presets import kind_of, recipe
from ..core.progress import Reporter
from ..core.report import loss_plot
from ..core.samplers import SampleSettings, draw_images
from ..core.subsets import SUBSETS
from ..core.trainer import OBJECTIVES
from .dataset import size_of
from .images import png_as_image
from .progress import NodeProgress, memory_advice
from .types import (
    CATEGORY,
    PRESET,
    AblationDelta,
    Dataset,
    described,
    guidance_of,
    model_inputs,
    negative_guidance_input,
    preset_input,
    seed_input,
)

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

    from ..core.denoiser import Denoiser

_LEFT = "preset leaves it to the preset."
_THUMBNAILS, _THUMBNAIL_STEPS = 4, 12


class ConceptAblationAblate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptAblationAblate",
            display_name="Ablate Concept",
            category=CATEGORY,
            description=(
                "Trains the edit that makes the model draw the anchor where the target is asked for, and applies it. "
                "Changing a strength later trains nothing again: see Apply Ablation Delta."
            ),
            inputs=[
                *model_inputs("to remove the concepts from: the one that drew the dataset"),
                Dataset.Input("dataset", tooltip="What to train on, from Build Ablation Dataset with the same preset."),
                io.Combo.Input(
                    "objective",
                    options=[PRESET, *OBJECTIVES],
                    default=PRESET,
                    tooltip=f"{_LEFT} {described(OBJECTIVES)} reverse-kl and loss-max need a dataset whose source is "
                    "the target. The preset fast has model only.",
                ),
                io.Combo.Input(
                    "subset", options=[PRESET, *SUBSETS], default=PRESET, tooltip=f"{_LEFT} {described(SUBSETS)}"
                ),
                preset_input(),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=100000,
                    tooltip="Training steps; 0 is the preset's, for each concept.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.0000001,
                    tooltip="Peak learning rate; 0 is the preset's for the subset and the model. Raise it if the "
                    "target stays, lower it if other things change.",
                ),
                io.Int.Input(
                    "batch",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="Images in each training step, and at most as many more that preserve: fewer need less "
                    "memory. 0 is the preset's.",
                ),
                seed_input(),
                io.Boolean.Input(
                    "gradient_checkpointing",
                    default=False,
                    tooltip="Compute activations again instead of keeping them: much less memory, about a third more "
                    "time.",
                ),
                negative_guidance_input("With the preset fast the dataset has it: leave it at -1 here."),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Draws a few images before and after the edit as thumbnails on this node.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the edit applied, at strength 1."),
                io.Clip.Output(display_name="clip", tooltip="The text encoder with the edit applied."),
                AblationDelta.Output(display_name="delta", tooltip="The edit itself: save, merge or apply it."),
                io.Image.Output(display_name="loss plot", tooltip="The training loss of every step."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: CLIP,
        dataset: Data,
        objective: str,
        subset: str,
        preset: str,
        steps: int,
        learning_rate: float,
        batch: int,
        seed: int,
        gradient_checkpointing: bool,
        negative_guidance: float = -1.0,
        vae: VAE | None = None,
    ) -> io.NodeOutput:
        workflow = ((cls.hidden.extra_pnginfo or {}).get("workflow") or {}).get("id")
        progress = NodeProgress(cls.hidden.unique_id, model, chart=True, workflow=workflow)
        width, height = size_of(dataset)
        overrides: dict[str, Any] = {"steps": steps, "learning_rate": learning_rate, "batch": batch}
        advice = "lower the batch, switch gradient_checkpointing on, or choose a smaller subset"
        require_trainable(model)
        with memory_advice(advice), opened(model, clip, vae, width=width, height=height) as denoiser:
            check_drawn_by(dataset, denoiser)
            chosen = recipe(
                preset,
                denoiser,
                kind_of(preset, dataset.concepts),
                concepts=dataset.concepts,
                objective=None if objective == PRESET else objective,
                subset=None if subset == PRESET else subset,
                seed=seed,
                training={name: value for name, value in overrides.items() if value}
                | {"checkpointing": gradient_checkpointing},
                negative_guidance=_guidance_beside(dataset, negative_guidance),
            )
            made = train_on(denoiser, dataset, chosen, progress)
            if vae is not None:
                told = dataset.settings
                send_thumbnails(
                    denoiser, thumbnail_prompts(dataset), made, told.sample, progress, seed=seed, batch=told.batch
                )
        # ComfyUI keeps a node's outputs; they should not keep memory of the GPU
        delta = made.delta.map(lambda tensor: tensor.cpu())
        return io.NodeOutput(*patched(model, clip, delta), delta, png_as_image(loss_plot(made.losses)))


def _guidance_beside(dataset: Data, entered: float) -> float | None:
    """Negative guidance of a training on this dataset; None is the preset's or, of harvested rows, their own."""
    asked = guidance_of(entered)
    if asked is not None and isinstance(dataset, Harvest) and asked != dataset.settings.negative_guidance:
        raise AblationError(
            f"This dataset was built with a negative guidance of {dataset.settings.negative_guidance:g}, and the "
            "training follows it: set negative_guidance in Build Ablation Dataset, and leave it at -1 here."
        )
    return asked


def check_drawn_by(dataset: Data, denoiser: Denoiser) -> None:
    """Raise AblationError unless `denoiser` is the model that drew the dataset."""
    latents = dataset.x if isinstance(dataset, Harvest) else dataset.latents
    if latents.shape[1] != denoiser.latent_shape[0] or dataset.model != denoiser.fingerprint():
        raise AblationError(
            "The dataset was drawn by another model: connect the same MODEL and CLIP to Build Ablation Dataset and to "
            "this node."
        )


def thumbnail_prompts(dataset: Data) -> list[str]:
    """Training prompts of the first target, as many as there are thumbnails; a few repeat if there are too few."""
    return as_many([dataset.plan.prompts[target] for anchor, target in dataset.plan.rows if anchor != target])


def as_many(prompts: Sequence[str]) -> list[str]:
    """The first of the prompts, as many as there are thumbnails; a few repeat if there are too few."""
    distinct = list(dict.fromkeys(prompts))[:_THUMBNAILS]
    return [distinct[index % len(distinct)] for index in range(_THUMBNAILS)]


def send_thumbnails(
    denoiser: Denoiser,
    prompts: Sequence[str],
    made: Ablation,
    sample: SampleSettings,
    progress: NodeProgress,
    *,
    seed: int = 0,
    batch: int = _THUMBNAILS,
) -> None:
    """Draw the prompts before and after the edit and show them on the node; a failure is only logged."""
    sample = replace(sample, steps=min(_THUMBNAIL_STEPS, sample.steps))
    seeds = [(seed + index) % 2**63 for index in range(len(prompts))]

    def draw(phase: str) -> np.ndarray:
        reporter = Reporter(progress, phase, len(prompts) * sample.steps)
        return draw_images(denoiser, prompts, seeds, sample, batch=batch, reporter=reporter)

    try:
        before = draw("Drawing before")
        with made.delta.attach(denoiser):
            after = draw("Drawing after")
        progress.send_pictures(before, after)
    except InterruptProcessingException:
        raise
    except Exception:
        # the edit is worth more than its thumbnails
        logging.warning("Concept Ablation: no thumbnails", exc_info=True)
