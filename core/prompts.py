"""Where prompts come from: built-in templates, a model folder's `prompts.json`, a user's text file.

A template holds `{}` once, exactly where a name goes. This module knows text only; what a target, an anchor or a prompt
pair is belongs to `concept.py`.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from .errors import AblationError

PromptGrammar = Sequence[Sequence[str]]
"""Slots, each a list of fragments; its language is one fragment per slot, in order (a cartesian product)."""

SLOT = "{}"
MAX_PROMPTS = 100_000
"""Most prompts that one grammar may spell; a few slots too many in a `prompts.json` would otherwise fill the memory."""

_SHUFFLE_SEED = 2303


def collapse(text: str) -> str:
    """`text` stripped, with every run of whitespace made one space."""
    return " ".join(text.split())


def normalise(text: str) -> str:
    """The form in which two prompts are compared: casefolded, whitespace collapsed."""
    return collapse(text).casefold()


def word_pattern(name: str) -> str:
    """Regular expression for `name` as whole words (`\\b` fails on names that end in a bracket or other symbol)."""
    return rf"(?<!\w){re.escape(name)}(?!\w)"


def says(name: str, text: str) -> bool:
    """Whether a text has a name in it, as whole words in upper or lower case."""
    return re.search(word_pattern(name), text, re.IGNORECASE) is not None


def distinct(texts: Iterable[str]) -> tuple[str, ...]:
    """`texts` without those that repeat an earlier one after `normalise`; order kept."""
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(normalise(text), text)
    return tuple(first.values())


def expand(grammar: PromptGrammar) -> list[str]:
    """All that `grammar` spells, in the order of its slots (the last varies fastest), without duplicates.

    Fragments are joined by one space, except before a comma: they need no spaces at their ends and may be empty.

    Raises:
        AblationError: the grammar spells more than `MAX_PROMPTS` prompts.
    """
    if math.prod(len(slot) for slot in grammar) > MAX_PROMPTS:
        raise AblationError(f"This grammar spells more than {MAX_PROMPTS:,} prompts; remove some of its fragments.")
    texts = (collapse(" ".join(fragments)).replace(" ,", ",") for fragments in product(*grammar))
    return list(dict.fromkeys(texts))


def replace_noun(pattern: str, text: str, noun: str) -> str:
    """`text` with every match of the regular expression `pattern` replaced by `noun`.

    An indefinite article right before a match is made to agree with `noun` ("an" before a vowel letter) and keeps its
    capital.
    """

    def replacement(match: re.Match[str]) -> str:
        article, space = match["article"], match["space"]
        if article is None:
            return noun
        agreeing = "an" if noun[:1].casefold() in {"a", "e", "i", "o", "u"} else "a"
        return (agreeing.capitalize() if article[0].isupper() else agreeing) + space + noun

    return re.sub(rf"(?:\b(?P<article>an?)(?P<space>\s+))?{pattern}", replacement, text, flags=re.IGNORECASE)


def fill(template: str, name: str) -> str:
    """`template` with `name` in place of `{}`, an article before it made to agree: "a {}", "owl" → "an owl"."""
    return replace_noun(re.escape(SLOT), template, name)


def varied(texts: Iterable[str]) -> tuple[str, ...]:
    """`texts` in a fixed shuffled order, so that any prefix of them is varied."""
    shuffled = list(texts)
    random.Random(_SHUFFLE_SEED).shuffle(shuffled)
    return tuple(shuffled)


@dataclass(frozen=True)
class PromptSource:
    """Templates for training and, never the same, for evaluation.

    `{}` is the concept's name in an instance template, the anchor ("painting") in a style template, and the style's
    name in a suffix that is appended to a filled style template.

    Raises:
        AblationError: a template does not hold `{}` exactly once, or is used for both training and evaluation.
    """

    instance_train: tuple[str, ...]
    instance_evaluation: tuple[str, ...]
    style_train: tuple[str, ...]
    style_evaluation: tuple[str, ...]
    style_suffixes_train: tuple[str, ...]
    style_suffixes_evaluation: tuple[str, ...]

    def __post_init__(self) -> None:
        for what, train, evaluation in (
            ("instance", self.instance_train, self.instance_evaluation),
            ("style", self.style_train, self.style_evaluation),
            ("style suffix", self.style_suffixes_train, self.style_suffixes_evaluation),
        ):
            for template in (*train, *evaluation):
                if template.count(SLOT) != 1:
                    raise AblationError(f"The {what} template {template!r} must contain {{}} exactly once.")
            trained = {normalise(template) for template in train}
            for template in evaluation:
                if normalise(template) in trained:
                    raise AblationError(
                        f"The {what} template {template!r} is both in training and in evaluation; keep it in only one."
                    )


def development(source: PromptSource, count: int = 10) -> PromptSource:
    """`source` with its last `count` training templates of each sort in the place of its evaluation templates, and out
    of training: what settings are chosen with, so that evaluation prompts stay unseen until the end. Of style suffixes,
    which are few, the last one.

    Raises:
        AblationError: there are not more than `count` templates of a sort, or not more than one suffix.
    """
    if count < 1 or min(len(source.instance_train), len(source.style_train)) <= count:
        raise AblationError(f"These templates are too few to keep {count} of them for development; ask for fewer.")
    if len(source.style_suffixes_train) < 2:
        raise AblationError("There is only one style suffix, which training needs; add others to prompts.json.")
    return PromptSource(
        instance_train=source.instance_train[:-count],
        instance_evaluation=source.instance_train[-count:],
        style_train=source.style_train[:-count],
        style_evaluation=source.style_train[-count:],
        style_suffixes_train=source.style_suffixes_train[:-1],
        style_suffixes_evaluation=source.style_suffixes_train[-1:],
    )


def load_prompt_source(path: Path) -> PromptSource:
    """Read a `prompts.json`, which a model folder ships when its captions follow a grammar of their own.

    Format: `{"instance": {"train": G, "evaluation": G}, "style": {"train": G, "evaluation": G, "suffixes_train": L,
    "suffixes_evaluation": L}}`, where G is a grammar (a list of slots, each a list of strings) and L a list of suffix
    templates. UTF-8. Grammars are expanded and put into a fixed shuffled order.

    Raises:
        AblationError: the file cannot be read, is not JSON, lacks a key or holds something else at it, or its templates
            are not what `PromptSource` accepts.
    """
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise AblationError(f"{path} is not valid JSON (line {error.lineno}: {error.msg}); correct it.") from error
    try:
        return _parse(content)
    except AblationError as error:
        raise AblationError(f"{path}: {error}") from error


def read_prompt_file(path: Path) -> tuple[str, ...]:
    """The prompts of a user's UTF-8 text file: one a line; blank lines, lines beginning with `#` and repeats ignored.

    Raises:
        AblationError: the file is missing, is not UTF-8, or holds no prompt.
    """
    lines = (collapse(line) for line in _read_text(path).split("\n"))
    prompts = distinct(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise AblationError(f"{path} holds no prompt; write one on each line.")
    return prompts


def _read_text(path: Path) -> str:
    try:
        # Windows editors begin a UTF-8 file with a byte order mark; "utf-8-sig" reads files with and without it.
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise AblationError(f"{path} is not UTF-8 text; save it as UTF-8.") from error
    except OSError as error:
        raise AblationError(f"{path} cannot be read ({error.strerror or error}); check the path.") from error


def _parse(content: object) -> PromptSource:
    def at(kind: str, key: str) -> object:
        section = content.get(kind) if isinstance(content, dict) else None
        if not isinstance(section, dict):
            raise AblationError(f"the key {kind} is missing or is not an object; add it.")
        if key not in section:
            raise AblationError(f"the key {kind}.{key} is missing; add it.")
        return section[key]

    def grammar(kind: str, key: str) -> tuple[str, ...]:
        slots = at(kind, key)
        if not (isinstance(slots, list) and slots and all(slot and _is_texts(slot) for slot in slots)):
            raise AblationError(f"{kind}.{key} is not a list of slots; make each slot a list of at least one string.")
        return varied(expand(slots))

    def texts(kind: str, key: str) -> tuple[str, ...]:
        entries = at(kind, key)
        if not _is_texts(entries):
            raise AblationError(f"{kind}.{key} is not a list of strings; make it one.")
        return tuple(entries)

    return PromptSource(
        instance_train=grammar("instance", "train"),
        instance_evaluation=grammar("instance", "evaluation"),
        style_train=grammar("style", "train"),
        style_evaluation=grammar("style", "evaluation"),
        style_suffixes_train=texts("style", "suffixes_train"),
        style_suffixes_evaluation=texts("style", "suffixes_evaluation"),
    )


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


_INSTANCE_TRAIN: tuple[PromptGrammar, ...] = (
    (
        ("a photo of", "a close-up photo of", "a black and white photo of", "a bright photo of", "a studio photo of"),
        ("a {}", "a small {}", "a cute little {}", "a beautiful {}", "a strange {}"),
        ("", "in a garden", "on a wooden table", "at the beach", "in a kitchen", "on a city street"),
    ),
    (
        ("a watercolor of", "a pencil drawing of", "a cartoon of", "an oil painting of", "a digital illustration of"),
        ("a {}", "a happy {}", "a very old {}"),
        ("", "on a white background", "with flowers", "in a forest"),
    ),
    (
        ("a {}", "one {}", "my favorite {}"),
        ("sleeping on a sofa", "in a basket", "on the grass", "next to a cup of coffee", "in front of a mountain"),
        ("", "in soft light", "at night"),
    ),
)
_INSTANCE_EVALUATION = (
    "a picture of a {}",
    "a {} under a tree",
    "a snapshot of a {} in the snow",
    "a {} beside a window",
    "a portrait of a {}",
    "a large {} on a carpet",
    "an embroidered {}",
    "a {} surrounded by books",
    "a mosaic of a {}",
    "a toy {} on a shelf",
    "a {} in the rain",
    "a clay sculpture of a {}",
    "a picture of a lonely {} by a lake",
    "a postage stamp showing a {}",
    "a {} inside a cardboard box",
    "a poster of a funny {}",
)
_STYLE_TRAIN: PromptGrammar = (
    ("a {} of", "a detailed {} of", "a colorful {} of"),
    (
        "a harbor",
        "a village with a church",
        "a wheat field",
        "olive trees",
        "a vase of flowers",
        "a woman in a blue dress",
        "an old man with a beard",
        "a river and a bridge",
        "a castle on a hill",
        "a bowl of fruit",
        "a crowded street",
        "ships on a stormy sea",
        "a horse in a meadow",
        "mountains",
        "a table in a small room",
    ),
    ("", "at dawn", "at night", "in the evening light", "in autumn", "in winter"),
)
_STYLE_EVALUATION = (
    "a {} of a lighthouse",
    "a {} of a garden in spring",
    "a {} of a girl reading a book",
    "a {} of a windmill beside a canal",
    "a {} of two dancers",
    "a {} of a cottage in the snow",
    "a {} of a dog by the fire",
    "a {} of a desert under the moon",
    "a {} of a waterfall in a forest",
    "a {} of a train station",
    "a {} of a market square after rain",
    "a {} of a musician with a guitar",
    "a {} of a lake covered by lilies",
    "a {} of a fisherman asleep",
)
_STYLE_SUFFIXES_TRAIN = (
    " in the style of {}",
    ", {} style",
    " by {}",
    ", style of {}",
    " inspired by {}",
    ", in {} style",
    " as painted by {}",
    ", a famous work of {}",
)
_STYLE_SUFFIXES_EVALUATION = (
    ", in the manner of {}",
    ", artwork by {}",
    ", with the technique of {}",
    ", an imitation of {}",
)

BUILT_IN = PromptSource(
    instance_train=varied(distinct(text for grammar in _INSTANCE_TRAIN for text in expand(grammar))),
    instance_evaluation=_INSTANCE_EVALUATION,
    style_train=varied(expand(_STYLE_TRAIN)),
    style_evaluation=_STYLE_EVALUATION,
    style_suffixes_train=_STYLE_SUFFIXES_TRAIN,
    style_suffixes_evaluation=_STYLE_SUFFIXES_EVALUATION,
)
"""Templates for any noun and for painting styles, for models that were trained on everyday captions.

Evaluation is disjoint from training by construction: no medium, scene, adjective or suffix word of an evaluation
template occurs in a training template of the same sort; they share articles, prepositions and conjunctions only. So an
evaluation prompt asks for a setting that the edit has never met. Training templates are in a fixed shuffled order.
"""
