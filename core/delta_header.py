"""The header of a delta file: ModelSpec 1.0.1 fields (Stability AI) and `concept_ablation.*`, all strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone

from .concept import Concept
from .denoiser import Denoiser
from .errors import AblationError

_MODELSPEC = {
    "sd1": "stable-diffusion-v1/lora",
    "sd2": "stable-diffusion-v2/lora",
    "sdxl": "stable-diffusion-xl-v1-base/lora",
}


def delta_header(
    denoiser: Denoiser, concepts: Sequence[Concept], model: str, made: Mapping[str, object]
) -> dict[str, str]:
    """What a delta's file says of it.

    Args:
        denoiser: the model that the delta edits.
        concepts: what it ablates.
        model: the model's fingerprint.
        made: how it was made (objective, subset, steps, …); each entry becomes a `concept_ablation.` field.
    """
    named = "; ".join(f"{concept.target} -> {concept.anchor}" for concept in concepts)
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": _MODELSPEC.get(denoiser.architecture, f"{denoiser.architecture}/lora"),
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"Concept Ablation: {named}",
        "modelspec.description": f"Makes {denoiser.name} draw the anchor instead of the target ({named}).",
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "concept_ablation.target": "; ".join(concept.target for concept in concepts),
        "concept_ablation.anchor": "; ".join(concept.anchor for concept in concepts),
        "concept_ablation.kind": "; ".join(concept.kind for concept in concepts),
        "concept_ablation.architecture": denoiser.architecture,
        "concept_ablation.base_model": denoiser.name,
        "concept_ablation.base_model_sha256": model,
        **{f"concept_ablation.{name}": str(value) for name, value in made.items()},
    }


def named_concepts(header: Mapping[str, str]) -> tuple[Concept, ...]:
    """The concepts that a delta's file says it ablates, without the prompts of memorized images.

    Raises:
        AblationError: it names none, or captions that hold a semicolon keep them from being told apart.
    """
    parts = [header.get(f"concept_ablation.{field}", "").split("; ") for field in ("target", "anchor", "kind")]
    if not parts[0][0] or len({len(part) for part in parts}) > 1:
        raise AblationError("The delta's file does not say what it ablates: name its targets and anchors.")
    return tuple(Concept(target, anchor, kind) for target, anchor, kind in zip(*parts, strict=True))
