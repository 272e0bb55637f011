"""The ComfyUI nodes: widgets in, one call of `core`, outputs. No algorithm lives here."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .ablate import ConceptAblationAblate
from .anchors import ConceptAblationFindAnchors
from .concept import ConceptAblationConcept
from .dataset import ConceptAblationBuildDataset
from .deltas import (
    ConceptAblationApplyDelta,
    ConceptAblationLoadDelta,
    ConceptAblationMergeDeltas,
    ConceptAblationSaveDelta,
    ConceptAblationToLora,
)
from .emoji import ConceptAblationLoadEmojiDiffusion
from .evaluate import ConceptAblationEvaluate
from .instant import ConceptAblationInstant
from .leaks import ConceptAblationScanForLeaks

NODES: tuple[type[io.ComfyNode], ...] = (
    ConceptAblationConcept,
    ConceptAblationBuildDataset,
    ConceptAblationAblate,
    ConceptAblationInstant,
    ConceptAblationEvaluate,
    ConceptAblationScanForLeaks,
    ConceptAblationFindAnchors,
    ConceptAblationSaveDelta,
    ConceptAblationLoadDelta,
    ConceptAblationApplyDelta,
    ConceptAblationMergeDeltas,
    ConceptAblationToLora,
    ConceptAblationLoadEmojiDiffusion,
)


class ConceptAblationExtension(ComfyExtension):
    """What ComfyUI asks for the nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return list(NODES)
