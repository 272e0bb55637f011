"""The node that draws the training set of an ablation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths
import numpy as np
import torch
from comfy_api.latest import io
from torch import Tensor

from ..core.ablation import Data, Task, check_screen, check_tasks, neighbours_of, screen_of
from ..core.dataset import DatasetSettings, build, make_plan
from ..core.errors import AblationError
from ..core.harvest import Harvest, HarvestSettings, harvest
from ..core.hosts.comfyui import opened
from ..core.hosts.ldm_patcher import PIXELS_PER_LATENT
from ..core.presets import kind_of, recipe
from ..core.samplers import SAMPLERS
from ..core.screening import Screen
from . import instruments
from .images import as_image, as_picture, grid
from .progress import NodeProgress, latent_pictures, make_previewer, memory_advice
from .types import (
    CATEGORY,
    PRESET,
    Concepts,
    Dataset,
    auto_preserve_input,
    guidance_of,
    model_inputs,
    negative_guidance_input,
    preset_input,
    seed_input,
    size_inputs,
)

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

    from ..core.denoiser import Denoiser
    from ..core.progress import ProgressCallback

_PREVIEWED = 16


class ConceptAblationBuildDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptAblationBuildDataset",
            display_name="Build Ablation Dataset",
            category=CATEGORY,
            description=(
                "Draws the images to train on with the model itself, or with the preset fast keeps what the model "
                "predicts while it samples a few. A run that was interrupted goes on where it was."
            ),
            inputs=[
                *model_inputs("that draws the images, and that the concepts will be removed from"),
                Concepts.Input("concepts", tooltip="What to remove, from Concept to Ablate."),
                preset_input(),
                io.Combo.Input(
                    "source",
                    options=["anchor", "target"],
                    default="anchor",
                    tooltip="Which prompts the images are drawn from: anchor for the objectives model, model-self and "
                    "noise; target for reverse-kl and loss-max, which the preset fast does not have.",
                ),
                io.Int.Input(
                    "images",
                    default=0,
                    min=0,
                    max=100000,
                    tooltip="Images for each concept (with the preset fast: samplings); 0 is the preset's.",
                ),
                io.Int.Input(
                    "preserve",
                    default=-1,
                    min=-1,
                    max=100000,
                    tooltip="Images for each concept that keep its anchor and its surrounding concepts as they are; "
                    "0 is none, -1 is the preset's.",
                ),
                *size_inputs(),
                io.Int.Input(
                    "steps", default=0, min=0, max=1000, tooltip="Sampling steps of each image; 0 is the preset's."
                ),
                io.Float.Input(
                    "cfg",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Classifier-free guidance scale; 0 is the preset's, 1 is no guidance and twice as fast.",
                ),
                io.Combo.Input(
                    "sampler",
                    options=[PRESET, *SAMPLERS],
                    default=PRESET,
                    tooltip="How the images are sampled; preset leaves it to the preset.",
                ),
                io.Int.Input(
                    "images_at_once",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="Images drawn in one batch: fewer need less memory. 0 is the preset's.",
                ),
                seed_input(),
                io.Boolean.Input(
                    "keep_on_disk",
                    default=True,
                    tooltip="Keep the dataset in output/concept_ablation/datasets, so that an interrupted build goes "
                    "on and a finished one is not drawn again. Delete the folder to free the space.",
                ),
                auto_preserve_input(),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Decodes the preview, which is small and rough without it. An original needs it.",
                ),
                instruments.original_input("no copy of which is to be trained on"),
                instruments.detector_input(),
                negative_guidance_input(
                    "With the preset fast only, whose dataset has it: with the others set it in Ablate Concept."
                ),
            ],
            outputs=[
                Dataset.Output(display_name="dataset", tooltip="What Ablate Concept trains on."),
                io.Image.Output(display_name="preview", tooltip=f"Up to {_PREVIEWED} of the images."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: CLIP,
        concepts: tuple[Task, ...],
        preset: str,
        source: str,
        images: int,
        preserve: int,
        width: int,
        height: int,
        steps: int,
        cfg: float,
        sampler: str,
        images_at_once: int,
        seed: int,
        keep_on_disk: bool,
        auto_preserve: int = -1,
        vae: VAE | None = None,
        original: Tensor | None = None,
        copy_detector: str = "",
        negative_guidance: float = -1.0,
    ) -> io.NodeOutput:
        check_tasks(concepts)
        if original is not None and vae is None:
            raise AblationError("Copies of the original are looked for in decoded images: connect the vae, too.")
        progress = NodeProgress(cls.hidden.unique_id, model)
        advice = "lower images_at_once, or draw smaller images"
        with memory_advice(advice), opened(model, clip, vae, width=width or None, height=height or None) as denoiser:
            kind = kind_of(preset, [task.concept for task in concepts])
            base = recipe(preset, denoiser, kind)
            if base.harvest is None and negative_guidance >= 0:
                raise AblationError(
                    f"Images are drawn without negative guidance, and {preset} trains on images: leave it at -1 here, "
                    "and set it in Ablate Concept."
                )
            sizes = {"images": images or None, "preserve": None if preserve < 0 else preserve}
            sample = replace(
                base.sample,
                steps=steps or base.sample.steps,
                guidance=cfg or base.sample.guidance,
                sampler=base.sample.sampler if sampler == PRESET else sampler,
            )
            made = recipe(
                preset,
                denoiser,
                kind,
                seed=seed,
                dataset={name: value for name, value in sizes.items() if value is not None}
                | {"sample": sample, **({"batch": images_at_once} if images_at_once else {})},
                auto_preserve=None if auto_preserve < 0 else auto_preserve,
                negative_guidance=guidance_of(negative_guidance),
            )
            screen = screen_of(instruments.load(concepts, original, copy_detector, device=denoiser.device))
            check_screen(made, screen)
            settings = _of_source(made.dataset or made.harvest, source)
            chosen = neighbours_of(denoiser, concepts, made)
            tasks = [
                replace(task, surrounding=(*task.surrounding, *names))
                for task, names in zip(concepts, chosen, strict=True)
            ]
            directory = _directory(denoiser, tasks, settings, screen) if keep_on_disk else None
            data = _data(denoiser, tasks, settings, directory, screen, progress)
            latents = previewed(data)
            preview = _rough(model, latents) if vae is None else _decoded(denoiser, latents)
            progress.show(grid([as_picture(image) for image in preview]))
        return io.NodeOutput(data, preview)


def evenly(rows: Sequence[int], count: int) -> list[int]:
    """At most `count` of the rows, evenly spread, the first among them."""
    if len(rows) <= count:
        return list(rows)
    return [rows[index * len(rows) // count] for index in range(count)]


def previewed(data: Data) -> Tensor:
    """Latents of a few images of the anchors [N, C, h, w]; of harvested rows, what the model made of the last ones."""
    if isinstance(data, Harvest):
        last = torch.arange(len(data.settings.kept) - 1, len(data.x), len(data.settings.kept))
        rows = last[evenly(data.preserving[last].logical_not().nonzero().flatten().tolist(), _PREVIEWED)]
        return data.x[rows] - data.sigma[rows].view(-1, 1, 1, 1) * data.prediction[rows].float()
    return data.latents[evenly(data.preserving.logical_not().nonzero().flatten().tolist(), _PREVIEWED)]


def _of_source(settings: DatasetSettings | HarvestSettings, source: str) -> DatasetSettings | HarvestSettings:
    if isinstance(settings, DatasetSettings):
        return replace(settings, source=source)
    if source != "anchor":
        raise AblationError("The preset fast keeps predictions for anchor prompts: set source to anchor.")
    return settings


def identity(
    denoiser: Denoiser,
    tasks: Sequence[Task],
    settings: DatasetSettings | HarvestSettings,
    screen: Screen | None = None,
) -> str:
    """A name for a dataset that any change of the model, the concepts, the image size, the settings or the memorized
    images changes.
    """
    concepts, surrounding = [task.concept for task in tasks], [task.surrounding for task in tasks]
    sizes = settings.sizes if isinstance(settings, HarvestSettings) else settings
    plan = make_plan(concepts, surrounding, denoiser.prompt_source, sizes)
    described = {
        "model": denoiser.fingerprint(),
        "latent_shape": denoiser.latent_shape,
        "concepts": [asdict(concept) for concept in concepts],
        "plan": asdict(plan),
        "settings": asdict(settings),
        **({} if screen is None else {"screen": screen.described}),
        **({"surrounding": surrounding} if isinstance(settings, HarvestSettings) else {}),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def size_of(data: Data) -> tuple[int, int]:
    """Width and height of a dataset's images, in pixels."""
    height, width = (data.x if isinstance(data, Harvest) else data.latents).shape[2:]
    return width * PIXELS_PER_LATENT, height * PIXELS_PER_LATENT


def _directory(
    denoiser: Denoiser, tasks: Sequence[Task], settings: DatasetSettings | HarvestSettings, screen: Screen | None
) -> Path:
    root = Path(folder_paths.get_output_directory()) / "concept_ablation" / "datasets"
    return root / identity(denoiser, tasks, settings, screen)


def _data(
    denoiser: Denoiser,
    tasks: Sequence[Task],
    settings: DatasetSettings | HarvestSettings,
    directory: Path | None,
    screen: Screen | None,
    on_progress: ProgressCallback,
) -> Data:
    concepts, surrounding = [task.concept for task in tasks], [task.surrounding for task in tasks]
    kept: dict[str, Any] = {"surrounding": surrounding, "directory": directory, "on_progress": on_progress}
    if isinstance(settings, HarvestSettings):
        return harvest(denoiser, concepts, settings, **kept)
    return build(denoiser, concepts, settings, screen=screen, **kept)


@torch.no_grad()
def _decoded(denoiser: Denoiser, latents: Tensor) -> Tensor:
    return denoiser.vae.decode(latents.to(denoiser.device)).permute(0, 2, 3, 1).float().cpu()


def _rough(model: ModelPatcher, latents: Tensor) -> Tensor:
    pictures = latent_pictures(make_previewer(model), latents.to(model.load_device))
    image = as_image(np.stack([np.array(picture) for picture in pictures]))
    # a previewer that decodes gives the full size already
    factor = max(1, latents.shape[2] * PIXELS_PER_LATENT // image.shape[1])
    return image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
