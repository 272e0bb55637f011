"""Concept Ablation: make a text-to-image model stop drawing a concept, and save the edit as a small delta."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes import ConceptAblationExtension

__version__ = "0.1.0"
WEB_DIRECTORY = "web/comfyui"


def comfy_entrypoint() -> ConceptAblationExtension:
    """What ComfyUI calls after it has imported this folder. Imported here: nothing else needs ComfyUI."""
    from .nodes import ConceptAblationExtension

    return ConceptAblationExtension()
