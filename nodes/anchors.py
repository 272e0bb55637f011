"""The node that finds what is to be drawn instead of a memorized image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from comfy_api.latest import io, ui
from torch import Tensor

from ..core.ablation import Task, check_tasks
from ..core.concept import Concept
from ..core.copies import CopyDetector
from ..core.errors import AblationError
from ..core.hosts.comfyui import opened
from ..core.instruments import INSTALLED
from ..core.memorized import FoundAnchors, SearchSettings, find_anchors, paraphrases_of
from ..core.samplers import SampleSettings
from . import instruments
from .concept import names
from .images import as_picture
from .progress import NodeProgress, memory_advice, show_text
from .types import CATEGORY, Concepts, images_at_once_input, model_inputs, seed_input, size_inputs

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE


class ConceptAblationFindAnchors(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptAblationFindAnchors",
            display_name="Find Anchors of Memorized Image",
            category=CATEGORY,
            description=(
                "For a training image that a caption brings back: draws paraphrases of the caption, removes those that "
                "give copies of the image together with it, and has those that give fewest drawn instead."
            ),
            inputs=[
                *model_inputs("that memorized the image"),
                io.Vae.Input("vae", tooltip="Decodes the images."),
                io.Image.Input("original", tooltip="The memorized image; of a batch, the first."),
                io.String.Input(
                    "caption", default="", multiline=True, tooltip="The caption that reproduces the image."
                ),
                io.String.Input(
                    "paraphrases",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Your own paraphrases, one a line, or a language model's from another node; empty: made by "
                    "rules.",
                ),
                io.String.Input(
                    "surrounding",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Concepts that must stay as they are, separated by commas or lines.",
                ),
                io.Int.Input("count", default=40, min=1, max=200, tooltip="Paraphrases that the rules make."),
                io.Int.Input("images_each", default=8, min=1, max=1000, tooltip="Images of each paraphrase."),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Sampling steps of each image."),
                io.Float.Input(
                    "cfg", default=4.0, min=0.0, max=100.0, step=0.1, tooltip="Classifier-free guidance scale."
                ),
                *size_inputs(),
                images_at_once_input(),
                seed_input(),
                instruments.detector_input(),
                Concepts.Input("concepts", optional=True, tooltip="Concepts from another node; this one is added."),
            ],
            outputs=[
                Concepts.Output(display_name="concepts", tooltip="All concepts so far."),
                io.String.Output(display_name="found", tooltip="How often each paraphrase gives a copy of the image."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: CLIP,
        vae: VAE,
        original: Tensor,
        caption: str,
        count: int,
        images_each: int,
        steps: int,
        cfg: float,
        width: int,
        height: int,
        images_at_once: int,
        seed: int,
        paraphrases: str = "",
        surrounding: str = "",
        copy_detector: str = "",
        concepts: tuple[Task, ...] = (),
    ) -> io.NodeOutput:
        if not caption.strip():
            raise AblationError("The caption is empty: give the words that reproduce the image.")
        sought = Concept(caption, f"not {caption}"[:200], "memorized")
        # what is wrong already should not cost the search; what it finds is checked below
        check_tasks((*concepts, Task(sought, names(surrounding))))
        caption = sought.target
        own = tuple(filter(None, map(str.strip, paraphrases.splitlines())))
        tried = own or paraphrases_of(caption, count, seed=seed)
        settings = SearchSettings(
            images_each=images_each, sample=SampleSettings(steps, cfg), batch=images_at_once, first_seed=seed
        )
        progress = NodeProgress(cls.hidden.unique_id, model)
        advice = "lower images_at_once, or draw smaller images"
        named = copy_detector.strip()
        with memory_advice(advice), opened(model, clip, vae, width=width or None, height=height or None) as denoiser:
            file = None if named == INSTALLED else instruments.models_file(named)
            detector = CopyDetector.load(file, denoiser.device)
            picture = np.array(as_picture(original[0]))
            found = find_anchors(denoiser, caption, picture, detector, tried, settings, progress)
        tasks = (*concepts, Task(found.concept, names(surrounding)))
        check_tasks(tasks)
        text = table(found)
        show_text(cls.hidden.unique_id, text)
        return io.NodeOutput(tasks, text, ui=ui.PreviewText(text).as_dict())


def table(found: FoundAnchors) -> str:
    """Copy rates as lines of text, the caption first."""
    used = {**dict.fromkeys(found.concept.anchor_prompts, "drawn instead"), found.caption.prompt: "removed"}
    used |= dict.fromkeys(found.concept.target_prompts, "removed")
    rows = [found.caption, *reversed(found.ranked)]
    return "\n".join(f"{one.copy_rate:.0%} {used.get(one.prompt, 'left out')}: {one.prompt}" for one in rows)
