"""The header of a delta file: ModelSpec 1.0.1 fields (Stability AI) and `concept_ablation.*`, all strings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from .concept import Concept
from .denoiser import Denoiser
from .errors import AblationError

if TYPE_CHECKING:
    from .evaluation import Evaluation

METRICS = "concept_ablation.metrics"
"""What was measured of exactly this delta, as JSON; whoever changes a delta takes it out."""

_MODELSPEC = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}
_KOHYA = {"sd2": {"ss_v2": "True"}, "sdxl": {"ss_base_model_version": "sdxl_base_v1-0"}}
"""Fields of kohya's trainer by which WebUIs tell for which models a LoRA is; without them A1111 lists it for SD 1.x."""


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
    family = denoiser.architecture
    base = _MODELSPEC.get(family, family)
    if family == "sd2" and denoiser.prediction_type == "v_prediction":
        base = "stable-diffusion-v2-768-v"
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{base}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"Concept Ablation: {named}",
        "modelspec.description": f"Makes {denoiser.name} draw the anchor instead of the target ({named}).",
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "concept_ablation.target": "; ".join(concept.target for concept in concepts),
        "concept_ablation.anchor": "; ".join(concept.anchor for concept in concepts),
        "concept_ablation.kind": "; ".join(concept.kind for concept in concepts),
        "concept_ablation.architecture": family,
        "concept_ablation.base_model": denoiser.name,
        "concept_ablation.base_model_sha256": model,
        **{f"concept_ablation.{name}": str(value) for name, value in made.items()},
        **_KOHYA.get(family, {}),
    }


def metrics_header(found: Evaluation) -> dict[str, str]:
    """What a delta's file says of its evaluation: the judge, and of each concept the CLIP accuracy and, of a memorized
    image, the share of copies, [before, after].
    """
    rows = []
    for one in found.concepts:
        row: dict[str, object] = {"ablation": one.ablation, "concept": one.name, "role": one.role}
        row["pictures"] = len(one.prompts) * len(one.seeds)
        row["clip_accuracy"] = [round(figures.clip_accuracy, 4) for figures in (one.before, one.after)]
        if one.details is not None and one.details.copies is not None:
            rates = one.details.copies.rate_before, one.details.copies.rate_after
            row["copy_rate"] = [round(rate.value, 4) for rate in rates]
        rows.append(row)
    return {METRICS: json.dumps({"judge": found.judge, "concepts": rows}, ensure_ascii=False)}


def named_rows(header: Mapping[str, str]) -> tuple[tuple[str, str, str], ...]:
    """Target, anchor and kind of each concept that a delta's file names; none where captions that hold a semicolon keep
    them from being told apart.
    """
    parts = [header.get(f"concept_ablation.{field}", "").split("; ") for field in ("target", "anchor", "kind")]
    rows = tuple(zip(*parts, strict=False))
    return rows if len({len(part) for part in parts}) == 1 and all(map(all, rows)) else ()


def named_concepts(header: Mapping[str, str]) -> tuple[Concept, ...]:
    """The concepts that a delta's file says it ablates, without the prompts of memorized images.

    Raises:
        AblationError: it names none, or captions that hold a semicolon keep them from being told apart.
    """
    if not (rows := named_rows(header)):
        raise AblationError("The delta's file does not say what it ablates: name its targets and anchors.")
    return tuple(Concept(*row) for row in rows)
