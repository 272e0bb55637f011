"""The node that loads the embedded model, so that every example runs with no download."""

from __future__ import annotations

from comfy_api.latest import io

from ..core.hosts.comfy_emoji import load_emoji_diffusion
from .types import CATEGORY


class ConceptAblationLoadEmojiDiffusion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptAblationLoadEmojiDiffusion",
            display_name="Load Emoji Diffusion",
            category=CATEGORY,
            description=(
                "Loads the small text-to-image model that comes with this pack. It draws 128 x 128 emoji, on a CPU "
                "too, and needs no download."
            ),
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The denoising network."),
                io.Clip.Output(display_name="clip", tooltip="The text encoder."),
                io.Vae.Output(display_name="vae", tooltip="The image decoder."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_emoji_diffusion())
