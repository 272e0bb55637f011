"""Automatic preservation: which concepts an ablation is most likely to move along with its target, and so must hold.

An edit of keys and values acts on what the text encoder gives, so what it gives alike for a target and another concept
is what the edit mistakes for one another. The distance is therefore taken in that space: the cosine between embeddings
of the names at their end token, where a causal text encoder has read the whole name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .concept import Concept
from .denoiser import Denoiser
from .errors import AblationError
from .prompts import distinct, fill, normalise, says, varied, word_pattern


@torch.no_grad()
def nearest(
    denoiser: Denoiser, concept: Concept, count: int, *, others: Iterable[Concept] = (), known: Iterable[str] = ()
) -> tuple[str, ...]:
    """The concepts of the model's vocabulary that are nearest to the target, the nearest first.

    None of the names that `holdable` leaves out, for `concept` or for `others`. Deterministic.

    Args:
        denoiser: the model, whose `vocabulary` is chosen from: styles for a style, else instances.
        concept: what is ablated.
        count: how many, or as many as there are.
        others: concepts that are ablated with it.
        known: names that are preserved already.

    Raises:
        AblationError: `count` is below 0.
    """
    if count < 0:
        raise AblationError(f"The number of concepts to preserve automatically must be at least 0, not {count}.")
    taken = {normalise(name) for name in known}
    names = denoiser.vocabulary.styles if concept.kind == "style" else denoiser.vocabulary.instances
    names = [name for name in holdable(names, [concept, *others]) if normalise(name) not in taken]
    if not count or not names:
        return ()
    embedded = _embed(denoiser, [concept.target, *names])
    similarity = (embedded[1:] @ embedded[0]).tolist()
    ranked = sorted(range(len(names)), key=lambda index: -similarity[index])
    return tuple(names[index] for index in ranked[:count])


def holdable(names: Iterable[str], concepts: Sequence[Concept]) -> tuple[str, ...]:
    """Those of `names` that can be held still without working against the ablation of `concepts`, without repeats.

    Left out are the anchor (which is held anyway), the target's name, what contains it as a word ("kitty cat" for
    "cat") and what it contains ("Monet" for "the painter Monet"): those may be the same thing.
    """
    targets = [normalise(concept.target) for concept in concepts]
    anchors = {normalise(concept.anchor) for concept in concepts}
    containing = [re.compile(word_pattern(target) + "|" + word_pattern(f"{target}s")) for target in targets]

    def free(name: str) -> bool:
        own = normalise(name)
        return own not in anchors and not any(
            pattern.search(own) or says(own, target) for pattern, target in zip(containing, targets, strict=True)
        )

    return distinct(filter(free, names))


def generic_prompts(denoiser: Denoiser, concepts: Sequence[Concept], count: int) -> tuple[str, ...]:
    """Up to `count` training prompts of all sorts of concepts that the model knows, none of which names a target: a
    training template may name a style.
    """
    templates = [
        text
        for text in denoiser.prompt_source.instance_train
        if not any(says(concept.target, text) for concept in concepts)
    ]
    if not templates:
        return ()
    names = varied(holdable(denoiser.vocabulary.instances, concepts))[:count]
    return tuple(fill(templates[index % len(templates)], name) for index, name in enumerate(names))


def _embed(denoiser: Denoiser, names: Sequence[str]) -> Tensor:
    """Unit vectors, [names, width], float64 on the CPU."""
    context = denoiser.encode(names).context
    window = denoiser.encode([""]).context.shape[1]
    ends = torch.tensor([min(len(denoiser.tokenize(name)) + 1, window - 1) for name in names])
    rows = context.cpu().double()[torch.arange(len(names)), ends]
    return F.normalize(rows, dim=1)
