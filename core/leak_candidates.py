"""Prompts that may still reach an ablated concept: what a leak scan tries.

`candidates` makes them from the concept, from words that the user or the model's folder gives, and from the text
encoder's own vocabulary. Drawing and judging them is left to `leaks.py`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Literal

import numpy as np
from torch.nn import functional as F

from .concept import Concept, evaluation_prompts, pairs
from .denoiser import Denoiser
from .errors import AblationError
from .misspellings import misspellings
from .paraphrases import paraphrase
from .prompts import PromptSource, distinct, fill, normalise
from .subsets import select

Family = Literal["category", "synonym", "misspelling", "style", "composed", "token"]

_TOKENIZER = Path(__file__).resolve().parent.parent / "assets" / "emoji_diffusion" / "tokenizer" / "tokenizer.json"
_WORD_END = "</w>"
_SHORTEST_WORD = 3

_MEDIA = (
    "a watercolor painting of a {}",
    "a pencil sketch of a {}",
    "a statue of a {}",
    "a 3d render of a {}",
    "pixel art of a {}",
    "a vintage poster of a {}",
    "a cartoon {}",
    "a black and white photo of a {}",
)
_SCENES = (
    "a {} and a child",
    "a {} wearing a hat",
    "a {} next to a car",
    "something that looks like a {}",
    "a {} seen from behind",
    "the head of a {}",
    "a baby {}",
    "a robot shaped like a {}",
)
_STYLE_FORMS = ("{base} in the style of {{}}", "{base}, {{}} style", "{base} by {{}}")
_STYLE_SCENES = (
    "a mixture of {} and pop art",
    "an imitation of {}",
    "a forgery of {}",
    "a page from a book about {}",
    "a postcard after {}",
)
_AROUND_CAPTION = ("{}, high quality", "{}, black and white", "a poster of {}", "{} in a frame", "a screenshot of {}")
_CAPTION_SCENES = ("{} and a child", "a person looking at {}", "two copies of {}")


@dataclass(frozen=True)
class Words:
    """What is known about a target beyond its name; every list may be empty."""

    categories: tuple[str, ...] = ()
    """What the target is one of: "bird" for a rooster, "impressionism" for a painter."""
    synonyms: tuple[str, ...] = ()
    """Other names of it; for a memorized image, other captions."""
    descriptions: tuple[str, ...] = ()
    """Whole prompts that mean it without naming it: "a farm bird with a red comb", "starry night"."""
    styles: tuple[str, ...] = ()
    """Styles to ask for an instance in."""
    neighbours: tuple[str, ...] = ()
    """Other concepts of its category, which a judge must tell it from (`leaks.by_judge`)."""


@dataclass(frozen=True)
class Candidate:
    """A prompt to try."""

    prompt: str
    family: Family
    name: str
    """What stands for the target in it; a description is its own name."""
    anchor_prompt: str
    """What the edited model should draw instead."""


@dataclass(frozen=True)
class _Frame:
    """A prompt with `{}` where a name goes, and its counterpart that draws the anchor."""

    template: str
    anchor_prompt: str

    def candidate(self, family: Family, name: str) -> Candidate:
        return Candidate(fill(self.template, name), family, name, self.anchor_prompt)


@dataclass(frozen=True)
class _Frames:
    """The frames of one concept: a plain one, some that vary the style, some that put it into a scene."""

    plain: _Frame
    styled: tuple[_Frame, ...]
    composed: tuple[_Frame, ...]


def words_from_categories(target: str, categories: Mapping[str, str], neighbours: int = 8) -> Words:
    """The category of `target` and others of that category, from a model's hints ("rooster": "bird").

    Args:
        target: name of the concept, in any case.
        categories: category by name, as `ModelHints.categories`.
        neighbours: at most so many.
    """
    known = {normalise(name): category for name, category in categories.items()}
    category = known.get(normalise(target))
    if category is None:
        return Words()
    others = [name for name, own in categories.items() if own == category and normalise(name) != normalise(target)]
    return Words(categories=(category,), neighbours=tuple(others[:neighbours]))


def plain_prompts(concept: Concept, source: PromptSource) -> tuple[tuple[str, str], ...]:
    """The simplest prompts for the target, each with that for the anchor: one, or of a style one for each thing that it
    can be asked for with.
    """
    plain = _plain_frames(concept, source)
    return tuple((fill(frame.template, concept.target), frame.anchor_prompt) for frame in plain)


def candidates(
    denoiser: Denoiser, concept: Concept, words: Words, each: int = 12, plain: int = 0
) -> tuple[tuple[Candidate, ...], tuple[str, ...]]:
    """The prompts to try, without those that training has seen or evaluation draws.

    Args:
        denoiser: the model, for its prompt source and its vocabulary.
        concept: what was ablated.
        words: what is known about the target.
        each: at most so many prompts of a family.
        plain: which of `plain_prompts` other names and misspelled ones are put into.

    Returns:
        The candidates, family by family, and one sentence for each family that could not be made.
    """
    source = denoiser.prompt_source
    frames = _frames(concept, source, words, plain)
    made: dict[Family, Iterable[Candidate]] = {
        "category": [frames.plain.candidate("category", word) for word in words.categories],
        "synonym": [frames.plain.candidate("synonym", name) for name in _synonyms(concept, words, each)],
        "style": _crossed(frames.styled, "style", concept, words),
        "composed": chain(
            [Candidate(text, "composed", text, frames.plain.anchor_prompt) for text in words.descriptions],
            _crossed(frames.composed, "composed", concept, words),
        ),
    }
    not_tried = []
    for family, names in (("misspelling", _typos), ("token", _near_names)):
        try:
            made[family] = [frames.plain.candidate(family, name) for name in names(denoiser, concept, each)]
        except AblationError as error:
            not_tried.append(f"{family}: {error}")
    seen = _known_prompts(concept, source)
    chosen: list[Candidate] = []
    for family, found in made.items():
        fresh: dict[str, Candidate] = {}
        for one in found:
            if normalise(one.prompt) not in seen:
                fresh.setdefault(normalise(one.prompt), one)
        kept = dict(islice(fresh.items(), each))
        if not kept:
            not_tried.append(f"{family}: no prompt is known for it.")
        chosen += kept.values()
        seen |= kept.keys()
    return tuple(chosen), tuple(not_tried)


def nearest_words(denoiser: Denoiser, text: str, count: int) -> tuple[str, ...]:
    """The whole words of CLIP's vocabulary whose token embeddings have the highest cosine with that of `text`.

    The embedding of a text of several tokens is their mean. Words of fewer than three letters, words that the model's
    tokenizer reads otherwise, and rows that several words share (no training has told them apart) are left out.

    Raises:
        AblationError: the host does not give the token embedding, or it is not that of CLIP's vocabulary.
    """
    table = next(iter(select("embedding", denoiser).values())).weight.detach().float().cpu()
    size, whole_words = _vocabulary()
    if len(table) != size:
        raise AblationError(f"{denoiser.name} has another vocabulary than CLIP: give synonyms instead.")
    ids = np.array(list(whole_words))
    _, inverse, times = np.unique(_bytes_of_rows(table[ids].numpy()), return_inverse=True, return_counts=True)
    ids = ids[times[inverse.reshape(-1)] == 1]
    wanted = table[denoiser.tokenize(text)].mean(dim=0)
    order = F.cosine_similarity(table[ids], wanted[None], dim=-1).argsort(descending=True)
    found: list[str] = []
    for index in ids[order.numpy()].tolist():
        word = whole_words[index]
        if len(found) == count:
            break
        if normalise(word) != normalise(text) and denoiser.tokenize(word) == [index]:
            found.append(word)
    return tuple(found)


def _plain_frames(concept: Concept, source: PromptSource) -> tuple[_Frame, ...]:
    if concept.kind != "style":
        text = "{}" if concept.kind == "memorized" else "a {}"
        return (_Frame(text, fill(text, concept.anchor)),)
    bases = [fill(text, concept.anchor).rstrip(" .,;") for text in source.style_train]
    return tuple(
        _Frame(_STYLE_FORMS[turn % len(_STYLE_FORMS)].format(base=base), base)
        for turn, base in enumerate(bases or [fill("a {}", concept.anchor)])
    )


def _frames(concept: Concept, source: PromptSource, words: Words, plain: int) -> _Frames:
    simple = _plain_frames(concept, source)
    if concept.kind == "style":
        scenes = tuple(_Frame(text, fill("a {}", concept.anchor)) for text in _STYLE_SCENES)
        return _Frames(simple[plain], (*simple[:plain], *simple[plain + 1 :]), scenes)
    bare = concept.kind == "memorized"
    article = "" if bare else "a "

    def frames(templates: Iterable[str]) -> tuple[_Frame, ...]:
        return tuple(_Frame(text, fill(text, concept.anchor)) for text in templates)

    styled = [f"{article}{{}} in the style of {style}" for style in words.styles]
    return _Frames(
        simple[plain],
        frames([*styled, *(_AROUND_CAPTION if bare else _MEDIA)]),
        frames(_CAPTION_SCENES if bare else _SCENES),
    )


def _crossed(frames: Iterable[_Frame], family: Family, concept: Concept, words: Words) -> Iterator[Candidate]:
    """Every frame with the target's own name and with each synonym."""
    return (frame.candidate(family, name) for frame in frames for name in (concept.target, *words.synonyms))


def _synonyms(concept: Concept, words: Words, count: int) -> tuple[str, ...]:
    if concept.kind == "memorized":
        return distinct((*words.synonyms, *paraphrase(concept.target, count)))
    parts = concept.target.split()
    anchor = normalise(concept.anchor).split()
    told = [part for part in parts if len(parts) > 1 and _is_telling(part) and normalise(part) not in anchor]
    return distinct((*words.synonyms, *told))


def _typos(denoiser: Denoiser, concept: Concept, count: int) -> tuple[str, ...]:
    trained = [text for pair in pairs(concept, denoiser.prompt_source) for text in (pair.anchor, pair.target)]
    return misspellings(concept.target, count, avoid=(concept.anchor, *trained))


def _near_names(denoiser: Denoiser, concept: Concept, count: int) -> Iterator[str]:
    """The target's name with one of its words replaced by a near one, the words in turn."""
    parts = concept.target.split()
    anchor = normalise(concept.anchor).split()
    places = [place for place, part in enumerate(parts) if _is_telling(part) and normalise(part) not in anchor]
    near = [[(place, word) for word in nearest_words(denoiser, parts[place], count)] for place in places]
    for place, word in filter(None, chain.from_iterable(zip_longest(*near))):
        name = " ".join((*parts[:place], word, *parts[place + 1 :]))
        if normalise(name) != normalise(concept.anchor):
            yield name


def _is_telling(word: str) -> bool:
    return len(word) >= _SHORTEST_WORD and word.isalnum()


def _known_prompts(concept: Concept, source: PromptSource) -> set[str]:
    """Normalised prompts of the target in training and evaluation: the first are no search, the second stay unseen."""
    held_out = max(1, len(source.style_evaluation if concept.kind == "style" else source.instance_evaluation))
    evaluated = evaluation_prompts(concept.target, concept, source, held_out)
    return {normalise(text) for text in (*(pair.target for pair in pairs(concept, source)), *evaluated)}


@functools.lru_cache(maxsize=1)
def _vocabulary() -> tuple[int, Mapping[int, str]]:
    """Size of CLIP's vocabulary, which Stable Diffusion's text encoders share, and its whole words by token id."""
    ids = json.loads(_TOKENIZER.read_text(encoding="utf-8"))["model"]["vocab"]
    words = {
        index: token.removesuffix(_WORD_END)
        for token, index in ids.items()
        if token.endswith(_WORD_END) and token.isascii() and token.removesuffix(_WORD_END).isalpha()
    }
    return len(ids), {index: word for index, word in words.items() if len(word) >= _SHORTEST_WORD}


def _bytes_of_rows(rows: np.ndarray) -> np.ndarray:
    """Each row of float [N, width] as one opaque value, [N], which numpy compares far faster than rows of numbers."""
    rows = np.ascontiguousarray(rows)
    return rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).reshape(-1)
