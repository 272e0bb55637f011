"""The command `concept-ablation compress`: a delta as one of low rank that keeps what it does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import AblationError
from .console import console, progress_bars
from .inputs import load_model, load_with_judge, make_tasks, require_safetensors
from .options import (
    Device,
    EvalPrompts,
    EvalSeeds,
    ImagesAtOnce,
    JudgeOption,
    Measured,
    Model,
    Precision,
    Prediction,
)

if TYPE_CHECKING:
    from ..core.concept import Concept
    from ..core.delta import Delta
    from ..core.effect import Effect


def compress(
    delta: Annotated[Path, typer.Option(help="The delta file.")],
    output: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    rank: Annotated[
        int | None, typer.Option(min=1, help="The rank to write.", show_default="the smallest that keeps enough")
    ] = None,
    keep: Annotated[float, typer.Option(min=0, max=1, help="Share of the measured effect that must be kept.")] = 0.99,
    measure: Annotated[
        str,
        typer.Option(
            help="clip: the targets' fall and the neighbours' CLIP accuracy, in pictures; output: the change of the "
            "network's output at probe rows, which is faster, needs no judge and is stricter."
        ),
    ] = "clip",
    model: Model = None,
    target: Annotated[
        list[str] | None, typer.Option(help="What the delta removes.", show_default="what its file says")
    ] = None,
    anchor: Annotated[
        list[str] | None, typer.Option(help="What is drawn instead.", show_default="what its file says")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="Of --target: instance, style or memorized.", show_default="instance")
    ] = None,
    surrounding: Measured = None,
    eval_prompts: EvalPrompts = 5,
    eval_seeds: EvalSeeds = 4,
    images_at_once: ImagesAtOnce = 16,
    judge: JudgeOption = None,
    device: Device = None,
    precision: Precision = "auto",
    prediction: Prediction = None,
) -> None:
    """Make a delta small: the lowest rank that keeps what it does, measured on development prompts, as a LoRA file."""
    from ..core import delta_file, low_rank
    from ..core.delta import check_fits
    from ..core.effect import FIRST_SEED, ClipEffect, OutputEffect
    from ..core.evaluation import EvaluationSettings
    from ..core.files import require_writable

    require_safetensors(output, delta)
    if measure not in ("clip", "output"):
        raise AblationError(f"There is no measure '{measure}': choose clip or output.")
    whole = delta_file.load(delta)
    concepts = _concepts(whole, target, anchor, kind)
    factors = low_rank.factorized(whole)
    largest = low_rank.largest_rank(factors)
    if not largest:
        raise AblationError(f"{delta.name} changes no matrix, so it has no rank: keep it as it is.")
    require_writable(output.parent)
    if measure == "clip":
        denoiser, referee = load_with_judge(model, judge, device, precision, prediction)
    else:
        denoiser, referee = load_model(model, device, precision, prediction), None
    check_fits(whole, denoiser)
    names = [tuple(surrounding or ())] * len(concepts)
    with progress_bars() as on_progress:
        effect: Effect
        if referee is None:
            effect = OutputEffect(denoiser, whole, concepts, names, on_progress=on_progress)
        else:
            settings = EvaluationSettings(
                prompts=eval_prompts, seeds=eval_seeds, first_seed=FIRST_SEED, batch=images_at_once
            )
            effect = ClipEffect(denoiser, referee, whole, concepts, names, settings, on_progress)
        if rank is None:
            chosen, tried = low_rank.smallest_rank(lambda r: effect.kept(_of_rank(factors, r)), keep, largest)
        else:
            chosen, tried = rank, {rank: effect.kept(_of_rank(factors, rank))}
    found = _of_rank(factors, chosen)
    note = {"concept_ablation.kept_effect": f"{tried[chosen]:.4f}", "concept_ablation.kept_effect_measure": measure}
    delta_file.save(replace(found, metadata={**found.metadata, **note}), output)
    before, after = (path.stat().st_size / 1e6 for path in (delta, output))
    console.print(
        f"{output}: rank {chosen}, {after:.2f} MB instead of {before:.2f} MB, {tried[chosen]:.1%} of the effect kept "
        f"({measure}; tried {', '.join(f'{r}: {kept:.1%}' for r, kept in sorted(tried.items()))})"
    )


def _of_rank(factors: Delta, rank: int) -> Delta:
    """The approximation of that rank as its file will give it back, with its rank in the header."""
    import torch

    from ..core.delta_header import METRICS
    from ..core.low_rank import truncated

    low = truncated(factors, rank).rounded(torch.float16)
    # what was measured of the whole delta was not measured of this one
    header = {name: value for name, value in low.metadata.items() if name != METRICS}
    return replace(low, metadata={**header, "concept_ablation.rank": str(rank)})


def _concepts(
    delta: Delta, targets: list[str] | None, anchors: list[str] | None, kind: str | None
) -> tuple[Concept, ...]:
    """What the delta ablates: what the options say, otherwise what its file says."""
    from ..core.delta_header import named_concepts

    if targets is None and anchors is None:
        if kind is not None:
            raise AblationError("--kind says what --target is: give --target and --anchor, too, or leave it out.")
        return named_concepts(delta.metadata)
    return tuple(
        task.concept for task in make_tasks(targets or [], anchors or [], kind or "instance", None, None, None)
    )
