"""Closed form: keys and values of cross-attention solved by least squares instead of trained.

With e* a token embedding of a target prompt, e the one that takes its place in the anchor prompt (`align`), and p those
of prompts that must stay, each key or value matrix W [out, in] gets the change dW that minimizes

    sum w_e ||(W + dW) e* - W e||^2 + sum w_p ||dW p||^2 + ridge ||dW||^2.

This is the edit of UCE (Gandikota et al., "Unified Concept Editing in Diffusion Models", WACV 2024, arXiv 2308.14761)
and of the first stage of MACE (Lu et al., "MACE: Mass Concept Erasure in Diffusion Models", CVPR 2024, arXiv
2403.06135). Setting its gradient to zero gives dW = W M with M = B G^-1,

    G = sum w_e e* e*^T + sum w_p p p^T + ridge I,      B = sum w_e (e - e*) e*^T,

so M [in, in] does not depend on the layer: one factorization serves all layers and any number of concepts.

Only what reaches the network through cross-attention is edited: SDXL's pooled text vector stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .concept import Concept, pairs, preservation_prompts
from .delta import Delta, LayerDelta
from .denoiser import Denoiser
from .errors import AblationError
from .losses import guided_away
from .progress import ProgressCallback, Reporter
from .prompts import says
from .subsets import select
from .token_alignment import align, is_padding

SUBSETS_SOLVED = ("cross-attn", "cross-attn-up")
"""The subsets that the closed form can edit."""

_ENCODED_AT_ONCE = 16
_SAME = 1e-6


@dataclass(frozen=True)
class ClosedFormSettings:
    """What the solution weighs against what.

    Each weight is that of a group of prompts together: their number makes the system better, not heavier.
    """

    prompts: int = 48
    """Prompt pairs per concept."""
    preserve_prompts: int = 48
    """Prompts per concept that hold its anchor and surrounding concepts; 0 holds none."""
    erase: float = 1.0
    """Weight of each concept's target."""
    preserve: float = 1.0
    """Weight of what is preserved for each concept."""
    generic: float = 1.0
    """Weight of the generic prompts, of which the empty one is always one."""
    padding: float = 1.0
    """Share of those weights that a padding position has; most positions of a prompt are padding."""
    negative_guidance: float = 0.0
    """eta of `losses.guided_away`: how far beyond the anchor's keys and values the target's go. The solution is linear
    in them, so this is what a strength of 1 + eta gives."""
    ridge: float = 1e-3
    """Weight of ||dW||^2, in mean diagonal entries of the Gram matrix."""
    subset: str = "cross-attn"
    """One of `SUBSETS_SOLVED`."""

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.preserve_prompts < 0:
            raise AblationError("The closed form needs at least one prompt pair and no negative number of prompts.")
        weights = (self.erase, self.preserve, self.generic, self.padding, self.negative_guidance, self.ridge)
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise AblationError("The weights of the closed form must be finite numbers of at least 0.")
        if self.erase == 0 or self.ridge == 0:
            raise AblationError("The closed form's erase weight and ridge must be above 0.")
        if self.subset not in SUBSETS_SOLVED:
            raise AblationError(
                f"The closed form edits keys and values of cross-attention, not the subset '{self.subset}': choose one "
                f"of {', '.join(SUBSETS_SOLVED)}, or a preset that trains."
            )


@dataclass(frozen=True)
class Term:
    """Rows of the least-squares problem: the edited matrix is to make of `source` what the old one makes of `goal`.

    Attributes:
        source: embeddings [rows, in].
        goal: embeddings [rows, in]; the same as `source` where nothing is to change.
        weight: [rows].
    """

    source: Tensor
    goal: Tensor
    weight: Tensor


def solve(terms: Iterable[Term], ridge: float) -> Tensor:
    """M [in, in], float64, on the CPU: dW = W M solves the least-squares problem of any W [out, in].

    Args:
        terms: one or more groups of rows of the same width.
        ridge: weight of ||dW||^2, in mean diagonal entries of the Gram matrix.

    Raises:
        AblationError: no row, NaN or infinity in the embeddings, or a ridge too small to make the system regular.
    """
    gram = moment = None
    for term in terms:
        source, goal = term.source.double().cpu(), term.goal.double().cpu()
        if gram is None or moment is None:
            gram = source.new_zeros(source.shape[1], source.shape[1])
            moment = torch.zeros_like(gram)
        weighted = source * term.weight.double().cpu()[:, None]
        gram += source.T @ weighted
        if term.goal is not term.source:
            moment += (goal - source).T @ weighted
    if gram is None or moment is None:
        raise AblationError("The closed form has no embeddings to solve for: give it at least one prompt pair.")
    if not (torch.isfinite(gram).all() and torch.isfinite(moment).all()):
        raise AblationError("The text encoder gave NaN or infinity: load the model in a higher precision (fp32).")
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        raise AblationError(f"The closed form has no solution with a ridge of {ridge:g}: give a larger one.")
    return torch.cholesky_solve(moment.T, factor).T


@torch.no_grad()
def solution(
    denoiser: Denoiser,
    concepts: Sequence[Concept],
    settings: ClosedFormSettings | None = None,
    *,
    surrounding: Sequence[Sequence[str]] | None = None,
    generic: Sequence[str] = (),
    on_progress: ProgressCallback | None = None,
) -> Delta:
    """The closed-form edit of every key and value matrix that reads the text: dense, fp32, without a file header.

    Prompt pairs and preserved prompts come from training templates, never from those for evaluation.

    Args:
        denoiser: the model; nothing writes its weights. Deltas attached to it count as part of it.
        concepts: what to ablate, all in one solution.
        settings: weights.
        surrounding: for each concept, names to preserve beside its anchor.
        generic: prompts that have nothing to do with any target.
        on_progress: called while prompts are encoded; raises to cancel.

    Raises:
        AblationError: no layer reads the text, a generic prompt names a target, the text encoder does not tell a
            target from its anchor, or a number is not finite.
    """
    settings = settings or ClosedFormSettings()
    layers = select(settings.subset, denoiser)
    groups = _groups(denoiser, concepts, settings, surrounding, generic)
    contexts = _Contexts(denoiser, groups.prompts(), on_progress)
    readers = {name: layer for name, layer in layers.items() if layer.weight.shape[1] == contexts.width}
    if not readers:
        raise AblationError(
            f"No cross-attention layer of {denoiser.name} reads its text encoder directly: train the edit instead."
        )
    change = solve(_terms(contexts, concepts, groups, settings), settings.ridge).float().to(denoiser.device)
    changes = {name: LayerDelta(_weight(layer, denoiser.device) @ change) for name, layer in readers.items()}
    delta = Delta(changes)
    if not torch.isfinite(delta.norm()):
        raise AblationError("The closed form gave NaN or infinity: load the model in a higher precision (fp32).")
    return delta


def prompts(
    denoiser: Denoiser,
    concepts: Sequence[Concept],
    settings: ClosedFormSettings,
    surrounding: Sequence[Sequence[str]],
    generic: Sequence[str],
) -> list[str]:
    """The distinct prompts that `solution` encodes, given the same arguments."""
    return _groups(denoiser, concepts, settings, surrounding, generic).prompts()


@dataclass(frozen=True)
class _Groups:
    """The prompts of a problem: pairs (target, anchor) of each concept, what each preserves, what all leave alone."""

    erased: list[list[tuple[str, str]]]
    preserved: list[list[str]]
    generic: list[str]

    def prompts(self) -> list[str]:
        erased = [prompt for group in self.erased for pair in group for prompt in pair]
        return list(dict.fromkeys([*erased, *(p for group in self.preserved for p in group), *self.generic]))


def _groups(
    denoiser: Denoiser,
    concepts: Sequence[Concept],
    settings: ClosedFormSettings,
    surrounding: Sequence[Sequence[str]] | None,
    generic: Sequence[str],
) -> _Groups:
    source = denoiser.prompt_source
    erased, preserved = [], []
    for concept, names in zip(concepts, surrounding or [()] * len(concepts), strict=True):
        others = [other for other in concepts if other is not concept]
        prompt_pairs = pairs(concept, source, settings.prompts, others)
        erased.append([(pair.target, pair.anchor) for pair in prompt_pairs])
        if settings.preserve_prompts:
            held = preservation_prompts([concept.anchor, *names], concept, source, settings.preserve_prompts, others)
            preserved.append(list(held))
    return _Groups(
        erased=erased,
        preserved=preserved,
        generic=list(dict.fromkeys(["", *_without_targets(generic, concepts)])),
    )


class _Contexts:
    """Embeddings and tokens of prompts.

    Attributes:
        window: positions that are read, the length of the shortest context. A host that puts a long prompt in several
            windows breaks it where it likes, so what follows the first one is left out.
        width: of an embedding.
    """

    def __init__(self, denoiser: Denoiser, prompts: Sequence[str], on_progress: ProgressCallback | None) -> None:
        self._denoiser = denoiser
        _, self.window, self.width = denoiser.encode([""]).context.shape
        reporter = Reporter(on_progress, "Encoding prompts", len(prompts))
        self._rows: dict[str, Tensor] = {}
        for start in range(0, len(prompts), _ENCODED_AT_ONCE):
            chunk = prompts[start : start + _ENCODED_AT_ONCE]
            encoded = denoiser.encode(chunk).context[:, : self.window].float().cpu()
            self._rows.update(zip(chunk, encoded, strict=True))
            reporter.advance(len(chunk))

    def __getitem__(self, prompt: str) -> Tensor:
        """[window, width]."""
        return self._rows[prompt]

    def tokens(self, text: str) -> list[int]:
        return self._denoiser.tokenize(text)

    def weights(self, prompt: str, weight: float, padding: float) -> Tensor:
        """`weight` at each position of a prompt, times `padding` at those of padding, [window]."""
        padded = is_padding(len(self.tokens(prompt)), self.window)
        return torch.tensor([weight * padding if is_pad else weight for is_pad in padded])


def _terms(
    contexts: _Contexts, concepts: Sequence[Concept], groups: _Groups, settings: ClosedFormSettings
) -> Iterator[Term]:
    for concept, prompt_pairs in zip(concepts, groups.erased, strict=True):
        yield _erasing(contexts, concept, prompt_pairs, settings)
    for prompts in filter(None, groups.preserved):
        yield _holding(contexts, prompts, settings.preserve, settings.padding)
    yield _holding(contexts, groups.generic, settings.generic, settings.padding)


def _erasing(
    contexts: _Contexts, concept: Concept, prompt_pairs: Sequence[tuple[str, str]], settings: ClosedFormSettings
) -> Term:
    """Rows that send a concept's target prompts to their anchor prompts."""
    names = contexts.tokens(concept.target), contexts.tokens(concept.anchor)
    sources, goals, weights = [], [], []
    for target, anchor in prompt_pairs:
        matched = align(contexts.tokens(target), contexts.tokens(anchor), names, contexts.window)
        stays = torch.tensor([place is None for place in matched])
        moved = contexts[anchor][[place or 0 for place in matched]]
        sources.append(contexts[target])
        # keys and values are linear in the embeddings, so these can be guided in their place
        moved = guided_away(moved, contexts[target], settings.negative_guidance)
        goals.append(torch.where(stays[:, None], contexts[target], moved))
        weights.append(contexts.weights(target, settings.erase / len(prompt_pairs), settings.padding))
    source, goal = torch.cat(sources), torch.cat(goals)
    if (goal - source).abs().max() <= _SAME * source.abs().max():
        raise AblationError(
            f"The text encoder does not tell '{concept.target}' from '{concept.anchor}': choose another anchor."
        )
    return Term(source, goal, torch.cat(weights))


def _holding(contexts: _Contexts, prompts: Sequence[str], weight: float, padding: float) -> Term:
    """Rows that keep prompts as they are."""
    held = torch.cat([contexts[prompt] for prompt in prompts])
    return Term(held, held, torch.cat([contexts.weights(prompt, weight / len(prompts), padding) for prompt in prompts]))


def _without_targets(generic: Sequence[str], concepts: Sequence[Concept]) -> Sequence[str]:
    """The generic prompts, none of which may name what is to go."""
    for concept in concepts:
        for prompt in generic:
            if says(concept.target, prompt):
                raise AblationError(f"The generic prompt '{prompt}' names the target '{concept.target}': take it out.")
    return generic


def _weight(layer: nn.Module, device: torch.device) -> Tensor:
    """The matrix that a linear layer multiplies by, [out, in], fp32.

    Found by giving it unit vectors: hosts keep weights quantized, offloaded or with patches still to be added, and
    only their own forward pass knows what comes of that.
    """
    stored = layer.weight.dtype
    dtype = stored if stored in (torch.float32, torch.float16, torch.bfloat16) else torch.float32
    units = torch.eye(layer.weight.shape[1], device=device, dtype=dtype)
    return (layer(units).float() - layer(torch.zeros_like(units[:1])).float()).T
