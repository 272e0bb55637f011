"""Named settings: the paper's own, and trade-offs between time and effect on Stable Diffusion and the embedded model.

`fast` and `balanced` were chosen from measurements on the embedded model (benchmarks/choose_presets.py). `instant` is
what `fast` begins with.

Learning rates are those of Stable Diffusion 1.x; a model of another size states its factor
(`Denoiser.learning_rate_scale`, and `learning_rate_scales` for some subsets).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .closed_form import ClosedFormSettings
from .concept import Concept, Kind
from .dataset import DatasetSettings
from .denoiser import Denoiser
from .errors import AblationError
from .harvest import HarvestSettings
from .prompts import says
from .samplers import SampleSettings
from .subsets import SUBSETS
from .trainer import FROZEN_TEACHER, TARGET_IMAGES, TrainSettings

_HELD_IN = {
    "cross-attn": ("cross-attn", "attn", "full"),
    "cross-attn-up": ("cross-attn-up", "cross-attn", "attn", "full"),
}
"""By subset of the closed form: the subsets that train all of its layers."""


@dataclass(frozen=True)
class Recipe:
    """All that an ablation is made with: a closed form, a training on images or on harvested rows, or both.

    Raises:
        AblationError: parts that do not go together.
    """

    dataset: DatasetSettings | None = None
    """Images to train on."""
    training: TrainSettings | None = None
    harvest: HarvestSettings | None = None
    """Rows to train on, in place of images."""
    closed_form: ClosedFormSettings | None = None
    """The whole edit or, with a training, where that begins."""
    auto_preserve: int | None = 0
    """Concepts to preserve for each target beside those that the user names: the nearest that the model knows. None
    where that was decided when the dataset was built."""
    generic: int = 0
    """Prompts of other concepts that the closed form holds still."""

    def __post_init__(self) -> None:
        if (self.auto_preserve or 0) < 0 or self.generic < 0:
            raise AblationError("The number of concepts to preserve automatically must be at least 0.")
        if (self.dataset is None and self.harvest is None) != (self.training is None):
            raise AblationError("A training needs a dataset or a harvest, and these need a training.")
        if self.training is None and self.closed_form is None:
            raise AblationError("A recipe needs a training or a closed form.")
        if self.dataset is not None and self.harvest is not None:
            raise AblationError("A training is on a dataset or on a harvest, not on both.")
        if self.dataset is not None and self.closed_form is not None:
            raise AblationError("A training on images does not begin with the closed form: leave one of the two out.")
        if self.training is not None and self.closed_form is not None:
            self._check_start(self.training, self.closed_form)

    @staticmethod
    def _check_start(training: TrainSettings, closed_form: ClosedFormSettings) -> None:
        if training.subset in SUBSETS and training.subset not in _HELD_IN[closed_form.subset]:
            raise AblationError(
                f"This training begins with the closed form, whose layers the subset '{training.subset}' does not "
                f"train: choose one of {', '.join(_HELD_IN[closed_form.subset])}, or the preset balanced."
            )

    @property
    def subset(self) -> str:
        """The weights that may move."""
        if self.training is not None:
            return self.training.subset
        assert self.closed_form is not None
        return self.closed_form.subset

    @property
    def sample(self) -> SampleSettings | None:
        """How images or rows are sampled; None if none are."""
        drawn = self.dataset or self.harvest
        return None if drawn is None else drawn.sample


PRESETS: dict[str, str] = {
    "instant": "the closed form alone: nothing is drawn and nothing is trained",
    "fast": "the closed form, then a few training steps on what the model predicts while it samples a few images",
    "balanced": "few images, neighbours preserved, frozen teacher: minutes on a CPU for the embedded model",
    "paper": "the published settings: 1,000 images, 100 to 800 steps",
}
TRAINED = tuple(name for name in PRESETS if name != "instant")
"""The presets that train."""


def check_serves(preset: str, kind: Kind) -> None:
    """Raise AblationError if there is no such preset, or it cannot ablate that kind of concept."""
    if preset not in PRESETS:
        raise AblationError(f"There is no preset '{preset}': choose one of {', '.join(PRESETS)}.")
    if kind == "memorized" and preset not in ("balanced", "paper"):
        # the closed form moves keys and values only; harvested rows are no pictures in which copies could be found
        raise AblationError(
            f"The preset '{preset}' does not serve memorized images, whose removal trains all weights on pictures that "
            "are no copies of them: choose the preset balanced."
        )


def kind_of(preset: str, concepts: Sequence[Concept]) -> Kind:
    """The kind by which a recipe is made for concepts that go into one delta.

    Raises:
        AblationError: as `check_serves`, or memorized images beside other concepts, which train other weights.
    """
    for concept in concepts:
        check_serves(preset, concept.kind)
    if len({concept.kind == "memorized" for concept in concepts}) > 1:
        raise AblationError(
            "A memorized image and a concept of another kind are trained with different settings: ablate them one by "
            "one, and merge the two deltas."
        )
    return concepts[0].kind


def recipe(
    preset: str,
    denoiser: Denoiser | None,
    kind: Kind = "instance",
    *,
    concepts: Sequence[Concept] = (),
    objective: str | None = None,
    subset: str | None = None,
    seed: int = 0,
    training: dict[str, Any] | None = None,
    dataset: dict[str, Any] | None = None,
    auto_preserve: int | None = None,
    negative_guidance: float | None = None,
) -> Recipe:
    """The recipe of a preset for a kind of concept and a model.

    Args:
        preset: a name in `PRESETS`.
        denoiser: the model, for its learning rate scales; None only to see whether the settings are in order.
        kind: what is ablated.
        concepts: what goes into the delta, where that is known. The preset's number of steps is for each of them
            (section 4.3 of the paper), and `paper` regularizes where a target's name has its anchor's in it, as the
            authors do for Grumpy Cat.
        objective: replaces the preset's.
        subset: replaces the preset's; the learning rate follows it.
        seed: of the dataset and the training.
        training: fields of `TrainSettings` to replace.
        dataset: fields of `DatasetSettings` to replace; where rows are harvested, images are trajectories.
        auto_preserve: replaces the preset's.
        negative_guidance: replaces the preset's, which objectives without a frozen teacher leave out.

    Raises:
        AblationError: no such preset, a kind that it does not serve, a value that its settings refuse, or one of
            something that it does not do.
    """
    check_serves(preset, kind)
    made = {"instant": _instant, "fast": _fast, "balanced": _balanced, "paper": _paper}[preset](kind, subset)
    if auto_preserve is not None:
        made = replace(made, auto_preserve=auto_preserve)
    if objective is not None and made.training is not None:
        made = replace(made, training=replace(made.training, objective=objective))
    if negative_guidance is not None:
        made = guided(made, negative_guidance)
    elif kind != "memorized" and (made.training is None or made.training.objective in FROZEN_TEACHER):
        made = guided(made, _NEGATIVE_GUIDANCE.get(preset, 0.0))
    if made.training is None:
        _refuse_training(preset, objective, {**(training or {}), **(dataset or {})})
        return _checked(preset, made)
    if made.harvest is not None and objective not in (None, "model"):
        raise AblationError(
            f"The preset '{preset}' trains on harvested rows, which serve the objective 'model' only: leave the "
            "objective out, or choose the preset balanced."
        )
    rate = made.training.learning_rate
    if denoiser is not None:
        rate *= denoiser.learning_rate_scales.get(made.training.subset, denoiser.learning_rate_scale)
    distance = _DISTANCE_WEIGHT if made.training.objective == "loss-max" else 0.0
    steps = made.training.steps * max(1, len(concepts))
    train = replace(made.training, seed=seed, learning_rate=rate, distance_weight=distance, steps=steps)
    if preset == "paper" and any(one.kind == "instance" and says(one.anchor, one.target) for one in concepts):
        train = replace(train, regularization=1.0)
    if train.objective in TARGET_IMAGES:
        # images of the target make no anchor pairs (x, c), which the regularization is on
        train = replace(train, regularization=0.0)
    train = replace(train, **_with_fewer_preserved(made.training, training or {}))
    if made.harvest is not None:
        named = {"trajectories" if name == "images" else name: value for name, value in (dataset or {}).items()}
        return _checked(preset, replace(made, training=train, harvest=replace(made.harvest, **{"seed": seed, **named})))
    source = "target" if train.objective in TARGET_IMAGES else "anchor"
    drawn = replace(made.dataset, **{"seed": seed, "source": source, **(dataset or {})})
    return _checked(preset, replace(made, training=train, dataset=drawn))


def guided(made: Recipe, eta: float) -> Recipe:
    """A recipe with another negative guidance (`losses.guided_away`), in each part that asks the pretrained model."""
    closed = made.closed_form and replace(made.closed_form, negative_guidance=eta)
    if made.harvest is not None:
        return replace(made, closed_form=closed, harvest=replace(made.harvest, negative_guidance=eta))
    if made.training is None:
        return replace(made, closed_form=closed)
    return replace(made, training=replace(made.training, negative_guidance=eta))


def _checked(preset: str, made: Recipe) -> Recipe:
    drawn = made.dataset or made.harvest
    rows = drawn is not None and made.training is not None and drawn.preserve and made.training.preserve_batch
    if made.auto_preserve and not (rows or (made.closed_form and made.closed_form.preserve_prompts)):
        raise AblationError(
            f"The preset '{preset}' preserves nothing, so there is nothing to choose neighbours for: leave automatic "
            "preservation at 0, or choose another preset."
        )
    return made


def _refuse_training(preset: str, objective: str | None, given: Mapping[str, Any]) -> None:
    named = ["objective"] if objective is not None else []
    named += [name.replace("_", " ") for name in given]
    if named:
        raise AblationError(
            f"The preset '{preset}' draws and trains nothing, so it has no {' and no '.join(named)}: leave that out, "
            "or choose another preset."
        )


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
            flip=True,
        )
        return Recipe(images, train)
    subset = subset or "cross-attn"
    rate = 1e-5 if subset == "embedding" else 2e-6
    train = TrainSettings(
        objective="model-self", subset=subset, steps=100, learning_rate=rate * 8, batch=8, cosine=False, flip=True
    )
    return Recipe(images, train)


_DISTANCE_WEIGHT = 3e-3
"""Of loss-max, a baseline. Against a mean over elements, as L is here, 0.03 keeps the edit at nothing and 0.01 does not
(on tulip, a development task); this leaves a margin for smaller gradients."""

_NEGATIVE_GUIDANCE = {"instant": 0.5, "fast": 0.5, "balanced": 0.5}
"""For instances and styles, by benchmarks/choose_presets.py. The paper has none, and a memorized image's anchors are
chosen not to be copies of it."""

_BALANCED_RATES = {"cross-attn": 2e-5, "attn": 1e-5, "full": 5e-6, "embedding": 1e-4, "cross-attn-up": 2e-5}


def _balanced(kind: Kind, subset: str | None) -> Recipe:
    subset = subset or ("full" if kind == "memorized" else "cross-attn")
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
        regularization=1.0 if kind == "memorized" else 0.0,
    )
    return Recipe(images, train)


_CLOSED_FORM = ClosedFormSettings(prompts=48, preserve_prompts=48)
_NEIGHBOURS, _GENERIC = 8, 48
_FAST_HARVEST = HarvestSettings(
    trajectories=12, preserve=12, prompts=48, sample=SampleSettings(steps=10, guidance=4.0, eta=1.0)
)
_FAST_TRAINING = TrainSettings(
    objective="model", subset="cross-attn", steps=10, batch=8, preserve_batch=8, preserve_weight=4.0
)
_FAST_RATES = _BALANCED_RATES


def _instant(kind: Kind, subset: str | None) -> Recipe:
    settings = _CLOSED_FORM if subset is None else replace(_CLOSED_FORM, subset=subset)
    return Recipe(closed_form=settings, auto_preserve=_NEIGHBOURS, generic=_GENERIC)


def _fast(kind: Kind, subset: str | None) -> Recipe:
    subset = subset or _FAST_TRAINING.subset
    start = replace(_CLOSED_FORM, subset="cross-attn-up") if subset == "cross-attn-up" else _CLOSED_FORM
    return Recipe(
        training=replace(_FAST_TRAINING, subset=subset, learning_rate=_FAST_RATES.get(subset, 2e-5)),
        harvest=_FAST_HARVEST,
        closed_form=start,
        auto_preserve=_NEIGHBOURS,
        generic=_GENERIC,
    )
