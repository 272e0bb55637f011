"""Named settings: the paper's own, and the trade-offs chosen from measurements on the embedded model.

Learning rates are those of Stable Diffusion 1.x; a model of another size states its factor
(`Denoiser.learning_rate_scale`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .concept import Kind
from .dataset import DatasetSettings
from .denoiser import Denoiser
from .errors import AblationError
from .samplers import SampleSettings
from .trainer import TARGET_IMAGES, TrainSettings


@dataclass(frozen=True)
class Recipe:
    """All that an ablation is made with."""

    dataset: DatasetSettings
    training: TrainSettings


PRESETS: dict[str, str] = {
    "balanced": "few images, neighbours preserved, frozen teacher: minutes on a CPU for the embedded model",
    "paper": "the published settings: 1,000 images, 100 to 800 steps",
}


def recipe(
    preset: str,
    denoiser: Denoiser,
    kind: Kind = "instance",
    *,
    objective: str | None = None,
    subset: str | None = None,
    seed: int = 0,
    training: dict[str, Any] | None = None,
    dataset: dict[str, Any] | None = None,
) -> Recipe:
    """The recipe of a preset for a kind of concept and a model.

    Args:
        preset: a name in `PRESETS`.
        denoiser: the model, for its learning rate scale.
        kind: what is ablated.
        objective: replaces the preset's.
        subset: replaces the preset's; the learning rate follows it.
        seed: of the dataset and the training.
        training: fields of `TrainSettings` to replace.
        dataset: fields of `DatasetSettings` to replace.

    Raises:
        AblationError: no such preset, or a value that its settings refuse.
    """
    if preset not in PRESETS:
        raise AblationError(f"There is no preset '{preset}': choose one of {', '.join(PRESETS)}.")
    made = _paper(kind, subset) if preset == "paper" else _balanced(kind, subset)
    train = replace(made.training, seed=seed, learning_rate=made.training.learning_rate * denoiser.learning_rate_scale)
    if objective is not None:
        train = replace(train, objective=objective)
    train = replace(train, **_with_fewer_preserved(made.training, training or {}))
    source = "target" if train.objective in TARGET_IMAGES else "anchor"
    return Recipe(replace(made.dataset, seed=seed, source=source, **(dataset or {})), train)


def _with_fewer_preserved(made: TrainSettings, training: dict[str, Any]) -> dict[str, Any]:
    """A smaller batch is asked for to save memory, so the rows that preserve, in the same step, shrink with it."""
    if "batch" not in training or "preserve_batch" in training:
        return training
    return {**training, "preserve_batch": min(made.preserve_batch, training["batch"])}


def _paper(kind: Kind, subset: str | None) -> Recipe:
    """Section 3.3 of the paper and the authors' published settings: rates are per image and multiplied by the batch."""
    images = DatasetSettings(images=1000, prompts=200, sample=SampleSettings(steps=50, guidance=6.0, eta=1.0))
    if kind == "memorized":
        train = TrainSettings(
            objective="model-self",
            subset=subset or "full",
            steps=800,
            learning_rate=5e-7 * 4,
            batch=4,
            regularization=1.0,
            cosine=False,
        )
        return Recipe(images, train)
    subset = subset or "cross-attn"
    rate = 1e-5 if subset == "embedding" else 2e-6
    train = TrainSettings(
        objective="model-self", subset=subset, steps=100, learning_rate=rate * 8, batch=8, cosine=False, flip=True
    )
    return Recipe(images, train)


_BALANCED_RATES = {"cross-attn": 2e-5, "attn": 1e-5, "full": 5e-6, "embedding": 1e-4}


def _balanced(kind: Kind, subset: str | None) -> Recipe:
    memorized = kind == "memorized"
    subset = subset or ("full" if memorized else "cross-attn")
    images = DatasetSettings(images=64, preserve=96, sample=SampleSettings(steps=15, guidance=4.0, eta=1.0))
    train = TrainSettings(
        objective="model",
        subset=subset,
        steps=100,
        # an unknown subset is refused by the trainer, which knows them all
        learning_rate=_BALANCED_RATES.get(subset, 2e-5),
        batch=16,
        preserve_batch=16,
        preserve_weight=4.0,
        # the paper's choice for memorized images: their captions share words with the anchors
        regularization=1.0 if memorized else 0.0,
    )
    return Recipe(images, train)
