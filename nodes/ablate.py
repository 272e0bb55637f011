"""The node that trains a delta."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from comfy.model_management import InterruptProcessingException
from comfy_api.latest import io

from ..core.ablation import finish
from ..core.dataset import AblationDataset
from ..core.delta import Delta
from ..core.errors import AblationError
from ..core.hosts.comfyui import opened, patched
from ..core.presets import recipe
from ..core.progress import Reporter
from ..core.report import loss_plot
from ..core.samplers import draw_images
from ..core.subsets import SUBSETS
from ..core.trainer import OBJECTIVES, TrainSettings, train
from .dataset import size_of
from .images import png_as_image
from .progress import NodeProgress, memory_advice
from .types import CATEGORY, PRESET, AblationDelta, Dataset, described, model_inputs, preset_input, seed_input

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
                Dataset.Input("dataset", tooltip="The images, from Build Ablation Dataset."),
                io.Combo.Input(
                    "objective",
                    options=[PRESET, *OBJECTIVES],
                    default=PRESET,
                    tooltip=f"{_LEFT} {described(OBJECTIVES)} reverse-kl and loss-max need a dataset whose source is "
                    "the target.",
                ),
                io.Combo.Input(
                    "subset", options=[PRESET, *SUBSETS], default=PRESET, tooltip=f"{_LEFT} {described(SUBSETS)}"
                ),
                preset_input(),
                io.Int.Input("steps", default=0, min=0, max=100000, tooltip="Training steps; 0 is the preset's."),
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
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: CLIP,
        dataset: AblationDataset,
        objective: str,
        subset: str,
        preset: str,
        steps: int,
        learning_rate: float,
        batch: int,
        seed: int,
        gradient_checkpointing: bool,
        vae: VAE | None = None,
    ) -> io.NodeOutput:
        progress = NodeProgress(cls.hidden.unique_id, model)
        width, height = size_of(dataset)
        overrides: dict[str, Any] = {"steps": steps, "learning_rate": learning_rate, "batch": batch}
        advice = "lower the batch, switch gradient_checkpointing on, or choose a smaller subset"
        with memory_advice(advice), opened(model, clip, vae, width=width, height=height) as denoiser:
            check_drawn_by(dataset, denoiser)
            settings = recipe(
                preset,
                denoiser,
                dataset.concepts[0].kind,
                objective=None if objective == PRESET else objective,
                subset=None if subset == PRESET else subset,
                seed=seed,
                training={name: value for name, value in overrides.items() if value}
                | {"checkpointing": gradient_checkpointing},
            ).training
            made = finish(denoiser, dataset, settings, train(denoiser, dataset, settings, progress))
            if vae is not None:
                _send_thumbnails(denoiser, dataset, made.delta, settings, progress)
        # ComfyUI keeps a node's outputs; they should not keep memory of the GPU
        delta = made.delta.map(lambda tensor: tensor.cpu())
        return io.NodeOutput(*patched(model, clip, delta), delta, png_as_image(loss_plot(made.losses)))


def check_drawn_by(dataset: AblationDataset, denoiser: Denoiser) -> None:
    """Raise AblationError unless `denoiser` is the model that drew the dataset."""
    if dataset.latents.shape[1] != denoiser.latent_shape[0] or dataset.model != denoiser.fingerprint():
        raise AblationError(
            "The dataset was drawn by another model: connect the same MODEL and CLIP to Build Ablation Dataset and to "
            "this node."
        )


def thumbnail_prompts(dataset: AblationDataset) -> list[str]:
    """Training prompts of the first target, as many as there are thumbnails; a few repeat if there are too few."""
    ablating = [target for anchor, target in dataset.plan.rows if anchor != target]
    distinct = list(dict.fromkeys(ablating))[:_THUMBNAILS]
    return [dataset.plan.prompts[distinct[index % len(distinct)]] for index in range(_THUMBNAILS)]


def _send_thumbnails(
    denoiser: Denoiser, dataset: AblationDataset, delta: Delta, settings: TrainSettings, progress: NodeProgress
) -> None:
    try:
        before = _draw(denoiser, dataset, settings.seed, "Drawing before", progress)
        with delta.attach(denoiser):
            after = _draw(denoiser, dataset, settings.seed, "Drawing after", progress)
        progress.send_pictures(before, after)
    except InterruptProcessingException:
        raise
    except Exception:
        # the training is worth more than its thumbnails
        logging.warning("Concept Ablation: no thumbnails", exc_info=True)


def _draw(denoiser: Denoiser, dataset: AblationDataset, seed: int, phase: str, progress: NodeProgress) -> np.ndarray:
    prompts = thumbnail_prompts(dataset)
    sample = replace(dataset.settings.sample, steps=min(_THUMBNAIL_STEPS, dataset.settings.sample.steps))
    reporter = Reporter(progress, phase, len(prompts) * sample.steps)
    seeds = [(seed + index) % 2**63 for index in range(len(prompts))]
    return draw_images(denoiser, prompts, seeds, sample, batch=dataset.settings.batch, reporter=reporter)
