"""The example workflows, and how the tests make them small enough to run."""

from __future__ import annotations

from typing import Any

from concept_ablation.tests.comfyui.server import ROOT

WORKFLOWS = ROOT / "example_workflows"
# Fewer pictures than the workflow asks for, and enough for the judge to see its targets go.
SMALL = {
    "ConceptAblationBuildDataset": {"images": 32, "preserve": 32, "steps": 10, "keep_on_disk": False},
    "ConceptAblationAblate": {"steps": 60},
    "ConceptAblationEvaluate": {"prompts": 2, "images_per_prompt": 3, "steps": 8},
}
# That of one instance makes what test_ablation.py judges. Those of a style and of a memorized image are only seen to
# run: what sizes would show their effect is not yet known.
JUDGED = "ablate_several_concepts"
TINY = {
    "ConceptAblationBuildDataset": {"images": 8, "preserve": 8, "steps": 4, "keep_on_disk": False},
    "ConceptAblationAblate": {"steps": 4},
    "ConceptAblationEvaluate": {"prompts": 1, "images_per_prompt": 2, "steps": 4},
}
# Random weights can only show that it runs.
_SIZE = {"width": 128, "height": 128}
RANDOM = {
    "ConceptAblationBuildDataset": {"images": 4, "preserve": 2, "steps": 2, "keep_on_disk": False, **_SIZE},
    "ConceptAblationAblate": {"steps": 3, "batch": 2},
    "ConceptAblationEvaluate": {"judge": "embedded", "prompts": 1, "images_per_prompt": 1, "steps": 2, **_SIZE},
    "EmptyLatentImage": {"batch_size": 1, **_SIZE},
    "KSampler": {"steps": 2},
}


def made_small(prompt: dict[str, Any], sizes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A graph in API form with some inputs of some node types replaced; linked inputs stay links."""
    changed = {}
    for name, node in prompt.items():
        inputs = dict(node["inputs"])
        for key, value in sizes.get(node["class_type"], {}).items():
            if not isinstance(inputs.get(key), list):
                inputs[key] = value
        changed[name] = {**node, "inputs": inputs}
    return changed


def of_type(prompt: dict[str, Any], *types: str) -> list[str]:
    """Ids of the nodes of some types."""
    return [name for name, node in prompt.items() if node["class_type"] in types]
