"""The node that makes a delta by the closed form alone, with no dataset and no training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..core.ablation import Task, ablate
from ..core.closed_form import SUBSETS_SOLVED
from ..core.concept import pairs
from ..core.hosts.comfyui import opened, patched
from ..core.presets import kind_of, recipe
from ..core.samplers import SampleSettings
from ..core.subsets import SUBSETS
from .ablate import as_many, send_thumbnails
from .progress import NodeProgress, memory_advice
from .types import (
    CATEGORY,
    AblationDelta,
    Concepts,
    auto_preserve_input,
    described,
    guidance_of,
    model_inputs,
    negative_guidance_input,
)

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE


class ConceptAblationInstant(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptAblationInstant",
            display_name="Ablate Concept (instant)",
            category=CATEGORY,
            description=(
                "Computes the edit that makes the model draw the anchor where the target is asked for, and applies it. "
                "Nothing is drawn and nothing is trained: keys and values of cross-attention are solved for."
            ),
            inputs=[
                *model_inputs("to remove the concepts from"),
                Concepts.Input("concepts", tooltip="What to remove, from Concept to Ablate."),
                io.Combo.Input(
                    "subset",
                    options=list(SUBSETS_SOLVED),
                    default=SUBSETS_SOLVED[0],
                    tooltip=described({name: SUBSETS[name] for name in SUBSETS_SOLVED}),
                ),
                auto_preserve_input(),
                negative_guidance_input(),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Draws a few images before and after the edit as thumbnails on this node, longer work "
                    "than the edit itself.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the edit applied, at strength 1."),
                io.Clip.Output(display_name="clip", tooltip="The text encoder, which this edit leaves as it is."),
                AblationDelta.Output(display_name="delta", tooltip="The edit itself: save, merge or apply it."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: CLIP,
        concepts: tuple[Task, ...],
        subset: str,
        auto_preserve: int = -1,
        negative_guidance: float = -1.0,
        vae: VAE | None = None,
    ) -> io.NodeOutput:
        progress = NodeProgress(cls.hidden.unique_id, model)
        with memory_advice("close other programs that use the GPU"), opened(model, clip, vae) as denoiser:
            chosen = recipe(
                "instant",
                denoiser,
                kind_of("instant", [task.concept for task in concepts]),
                subset=subset,
                auto_preserve=None if auto_preserve < 0 else auto_preserve,
                negative_guidance=guidance_of(negative_guidance),
            )
            made = ablate(denoiser, concepts, chosen, on_progress=progress)
            if vae is not None:
                shown = [pair.target for pair in pairs(concepts[0].concept, denoiser.prompt_source)]
                send_thumbnails(denoiser, as_many(shown), made, SampleSettings(), progress)
        # ComfyUI keeps a node's outputs; they should not keep memory of the GPU
        delta = made.delta.map(lambda tensor: tensor.cpu())
        return io.NodeOutput(*patched(model, clip, delta), delta)
