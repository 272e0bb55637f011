"""Ways to say a caption that reproduces a memorized image, and which of them reproduce it least.

The pipeline of Kumari et al. 2023, section 3.3: paraphrase the caption (`paraphrase` offline, `ask` by a language
model), draw each paraphrase, `rank` them by how often they give the image, `choose` the ones that give it least as
anchors and those that give it most as further targets, and drop anchor images that are copies (screening.py).
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import time
import unicodedata
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from .concept import MAX_CAPTION_LENGTH, Concept
from .copies import CopyDetector, copies
from .errors import AblationError
from .prompts import collapse, distinct, fill, normalise, replace_noun

KEY_VARIABLE = "CONCEPT_ABLATION_API_KEY"
"""Environment variable with the key of the endpoint that `ask` uses."""

Draw = Callable[[Sequence[str], Sequence[int]], np.ndarray]
"""Prompts [N] and seeds [N] -> pictures, uint8 [N, height, width, 3]."""

_MAX_ANSWER = 1_000_000
_MAX_COUNT = 200
_INSTRUCTIONS = (
    "You rewrite captions of pictures. Answer with exactly {count} different captions, one on each line, without "
    "numbers, quotation marks or any other text. Each caption says in other words what a picture with the given "
    "caption could show. Leave out proper names and dates in half of them. No caption is longer than 200 characters."
)
_FRAMES = (
    "{}",
    "a picture of {}",
    "an image showing {}",
    "a drawing of {}",
    "{}, as seen by an artist",
    "a scene with {}",
    "an illustration of {}",
    "a view of {}",
    "{} in a picture",
)
_SYNONYMS = (
    ("picture", "image"),
    ("photo", "snapshot"),
    ("photograph", "snapshot"),
    ("painting", "artwork"),
    ("portrait", "likeness"),
    ("poster", "placard"),
    ("trailer", "preview"),
    ("old", "elderly"),
    ("big", "large"),
    ("small", "little"),
    ("beautiful", "lovely"),
    ("lost", "missing"),
    ("new", "recent"),
    ("black and white", "monochrome"),
    ("night", "evening"),
    ("midnight", "late-night"),
    ("house", "home"),
    ("street", "road"),
    ("square", "plaza"),
    ("city", "town"),
    ("parade", "procession"),
    ("fair", "market"),
    ("regatta", "boat race"),
    ("expedition", "journey"),
    ("breakfast", "morning meal"),
    ("bus", "coach"),
    ("orchard", "fruit garden"),
    ("cafe", "coffee house"),
    ("gardener", "garden worker"),
    ("first", "initial"),
    ("print", "reproduction"),
)
_LINKS = "of|by|in|at|on|to|with|for"
_NO_NAMES = frozenset({"A", "An", "The", "I", "And", "Of", "In", "On", "At", "By", "To", "With"})
_LINE_START = re.compile(r"^(?:[-*•–—]|\(?\d{1,3}[.):]|\(?[a-z][.)])\s+")
_MARKS = "\"'“”‘’«»`*_, "


@dataclass(frozen=True)
class Ranked:
    """How often one prompt reproduces a memorized image."""

    prompt: str
    copy_rate: float
    """Share of its pictures that are copies, in [0, 1]."""
    similarity: float
    """Mean similarity of its pictures to the image, in [-1, 1]."""


def paraphrase(caption: str, count: int, seed: int = 0) -> tuple[str, ...]:
    """Up to `count` other ways to say `caption`, made by rules alone.

    The rules replace words by synonyms, reorder clauses, leave names and years out, and take a clause alone; they take
    turns, and what they make is put into frames such as "a picture of". They know no grammar beyond that, so that some
    results read clumsily.

    Args:
        caption: English text.
        count: how many; fewer come back where the rules find fewer.
        seed: decides the order within each rule, and which frame goes with what.

    Raises:
        AblationError: `count` is below 1 or above 200, or the caption is empty or too long.
    """
    caption = _check(caption, count)
    rng = random.Random(seed)
    frames = rng.sample(_FRAMES, len(_FRAMES))
    ways = []
    for rule in _rules(re.sub(r"<[^<>]*>", "", caption).strip(" .!?")):
        bodies = [body for body in distinct(map(collapse, rule)) if body]
        rng.shuffle(bodies)
        ways.append(
            [
                frames[(place + turn) % len(frames)].format(_uncapitalised(body))
                for turn in range(len(frames))
                for place, body in enumerate(bodies)
            ]
        )
    turns = (way for turn in zip_longest(*ways) for way in turn if way is not None)
    return tuple(_usable(turns, caption))[:count]


def ask(
    endpoint: str, model: str, caption: str, count: int, *, key: str | None = None, timeout: float = 60
) -> tuple[str, ...]:
    """Up to `count` paraphrases of `caption` by a language model.

    Args:
        endpoint: base address of any service with OpenAI's chat completions, such as "http://localhost:11434/v1" of
            Ollama. Only the caption and the instructions are sent.
        model: what the service calls the model.
        caption: the caption.
        count: how many; fewer come back where the model gives fewer that can be used.
        key: the service's key; None for the environment variable CONCEPT_ABLATION_API_KEY, if it is set.
        timeout: seconds until the whole answer must be there.

    Raises:
        AblationError: `count` or the caption as for `paraphrase`, another sort of address, no answer in time, an answer
            of another form, or one without a usable line.
    """
    caption = _check(caption, count)
    body = {
        "model": model,
        "messages": [
            {"role": "system", "content": _INSTRUCTIONS.format(count=count)},
            {"role": "user", "content": caption},
        ],
    }
    answer = _post(_address(endpoint), body, key or os.environ.get(KEY_VARIABLE), timeout)
    found = tuple(_usable(_lines(_content(answer, endpoint)), caption))[:count]
    if not found:
        raise AblationError(f"{model} at {_shown(endpoint)} gave no usable paraphrase: try another model.")
    return found


def rank(
    prompts: Sequence[str],
    draw: Draw,
    detector: CopyDetector,
    original: np.ndarray,
    images_each: int,
    first_seed: int = 0,
) -> tuple[Ranked, ...]:
    """Order `prompts` by copy rate, then by mean similarity, lowest first.

    Args:
        prompts: paraphrases.
        draw: the model that memorized the image; called once for each prompt.
        detector: finds copies.
        original: the memorized image, uint8 [height, width, 3].
        images_each: pictures of each prompt, all prompts with the same seeds.
        first_seed: the first of these.
    """
    seeds = range(first_seed, first_seed + images_each)
    known = detector.embed(original[None])
    found = []
    for prompt in distinct(prompts):
        similarities = detector.embed(draw([prompt] * images_each, seeds)) @ known.t()
        found.append(Ranked(prompt, float(copies(similarities).mean()), similarities.mean().item()))
    return tuple(sorted(found, key=lambda one: (one.copy_rate, one.similarity)))


def choose(caption: str, ranked: Sequence[Ranked], targets: int = 3, anchors: int = 10) -> Concept:
    """The ablation of a memorized image, in the paper's numbers: its caption and the `targets` paraphrases that
    reproduce it most often, if at all, become the `anchors` paraphrases that reproduce it least.

    Args:
        caption: reproduces the image.
        ranked: what `rank` returned for paraphrases, lowest first.

    Raises:
        AblationError: every paraphrase reproduces the image in all of its pictures, or there is none.
    """
    most = [one.prompt for one in reversed(ranked[1:]) if one.copy_rate > 0][:targets]
    kept = [one.prompt for one in ranked if one.copy_rate < 1 and one.prompt not in most][:anchors]
    if not kept:
        raise AblationError("Every paraphrase reproduces the memorized image: write others, with other words.")
    return Concept(caption, kept[0], "memorized", anchor_prompts=tuple(kept), target_prompts=tuple(most))


def keep_unlike(images: np.ndarray, original: np.ndarray, detector: CopyDetector) -> np.ndarray:
    """Which anchor images may be trained on, bool [N]: those that are no copy of the memorized image.

    Args:
        images: uint8 [N, height, width, 3].
        original: uint8 [height, width, 3].
        detector: finds copies.
    """
    return ~copies(detector.similarities(images, original[None]))


def _rules(text: str) -> list[list[str]]:
    """What each rule makes of a caption, synonyms included."""
    clauses = [clause for clause in re.split(r"\s*[,:;]\s+", text) if clause != text and " " in clause]
    nameless = [_without_names(part) for part in (text, *clauses)]
    return [_with_synonyms(ways) for ways in ([text], _reordered(text), nameless, clauses)]


def _reordered(text: str) -> Iterator[str]:
    if match := re.fullmatch(r"(.+?)\s*[,:;]\s+(.+)", text):
        yield f"{match[2]}: {match[1]}"
        yield f"{match[1]} ({match[2]})"
    if match := re.fullmatch(r"(.*?)((?:[Tt]he\s)?(?:[A-Z][\w-]*\s)*[\w-]+)['’]s\s+([^,:;]+)(.*)", text):
        yield f"{match[1]}{match[3]} of {_uncapitalised(match[2])}{match[4]}"
    # The last preposition of the first clause.
    if match := re.fullmatch(rf"([^,:;]+)\s({_LINKS})\s+([^,:;]+)(.*)", text):
        before, link, after, rest = match.groups()
        if link == "by":
            yield f"{after}'s {_uncapitalised(before)}{rest}"
        elif link == "of":
            yield f"{re.sub('^(?i:the|an?) ', '', after)} {re.sub('^(?i:the|an?) ', '', before)}{rest}"
        else:
            yield f"{after} {'and' if link == 'with' else 'with'} {_uncapitalised(before)}{rest}"
    elif match := re.fullmatch(r"([^,:;]+)\s+and\s+([^,:;]+)(.*)", text):
        yield f"{match[2]} and {_uncapitalised(match[1])}{match[3]}"


def _without_names(text: str) -> str:
    """`text` without names and years, and without the little words that then stand alone; "" if it has none of them or
    consists of little else, as a headline does."""
    words = re.sub(r"[()]", "", text).split()
    names = [_is_name(word) for word in words]
    if sum(names) > 0.6 * len(words):
        return ""
    # The first word is capitalised in any case, and a name only with another one behind it or as an owner.
    if len(words) > 1 and not names[1] and not re.search(r"['’]s$", words[0]):
        names[0] = False
    if not any(names):
        return ""
    kept = " ".join(word for word, name in zip(words, names, strict=True) if not name)
    little = rf"(?:the|an?|and|{_LINKS})"
    kept = re.sub(rf"(?i)^(?:{little}\s+)+|(?:\s+{little})+(?=\s*(?:$|[,:;]|\s(?:{_LINKS})\s))", "", kept)
    kept = _uncapitalised(re.sub(r"^[\W_]+|[\s,:;]+$", "", kept))
    return fill("a {}", kept) if kept and not re.search("[^us]s$", kept) else kept


def _is_name(word: str) -> bool:
    bare = word.strip(',.:;()!?"“”')
    return bool(re.fullmatch(r"\d{4}", bare)) or (bare[:1].isupper() and bare not in _NO_NAMES)


def _with_synonyms(texts: Iterable[str]) -> list[str]:
    """`texts`, each followed by itself with one synonym for every word that has one, and with all of them."""
    found = []
    for text in texts:
        everything = text
        found.append(text)
        for word, synonym in _SYNONYMS:
            found.append(replace_noun(rf"\b{word}\b", text, synonym))
            everything = replace_noun(rf"\b{word}\b", everything, synonym)
        found.append(everything)
    return found


def _uncapitalised(text: str) -> str:
    """`text` with a small first letter, unless it may begin with a name."""
    first, _, rest = text.partition(" ")
    if first in _NO_NAMES or not (_is_name(rest[:1]) or re.search(r"['’]s$|^\w*[A-Z]\w*[A-Z]", first)):
        return first[:1].lower() + text[1:]
    return text


def _check(caption: str, count: int) -> str:
    if not 1 <= count <= _MAX_COUNT:
        raise AblationError(f"The number of paraphrases must be 1 to {_MAX_COUNT}, not {count}.")
    caption = collapse(caption)
    if not 1 <= len(caption) <= MAX_CAPTION_LENGTH:
        raise AblationError(f"A caption must have 1 to {MAX_CAPTION_LENGTH:,} characters, not {len(caption)}.")
    return caption


def _usable(texts: Iterable[str], caption: str) -> Iterator[str]:
    """Those of `texts` that `Concept` accepts as captions and a prompt file can hold (a `#` begins a comment there),
    without repeats and without `caption` itself.
    """
    seen = {_bare(caption), ""}
    for text in map(collapse, texts):
        printable = all(unicodedata.category(character) != "Cc" for character in text)
        usable = printable and len(text) <= MAX_CAPTION_LENGTH and not text.startswith("#")
        if usable and _bare(text) not in seen:
            seen.add(_bare(text))
            yield text


def _bare(text: str) -> str:
    return normalise(re.sub(r"[^\w\s]", "", text))


def _lines(content: str) -> Iterator[str]:
    """The captions in an answer, one a line, without numbers, bullets and quotation marks."""
    # Some models print how they reason before they answer.
    content = re.sub(r"(?s)\A.*</think>|<think>.*\Z", "", content)
    for line in content.splitlines():
        if line.lstrip().startswith(("```", "#")):
            continue
        text = _LINE_START.sub("", collapse(line)).strip(_MARKS)
        # An introduction, a tag or a piece of JSON is no caption.
        if text and not text.endswith(":") and not re.search(r"[<>{}\[\]]", text):
            yield text


def _address(endpoint: str) -> str:
    base = endpoint.strip().rstrip("/")
    if not re.match(r"https?://[^/\s]", base):
        raise AblationError(f"The endpoint {_shown(base)!r} is no web address: use one as http://localhost:11434/v1.")
    return base if base.endswith("/chat/completions") else f"{base}/chat/completions"


def _shown(endpoint: str) -> str:
    """`endpoint` without a user name, password or query, any of which may be a secret."""
    return re.sub(r"//[^/@]*@|[?#].*$", lambda match: "//" if match[0].startswith("//") else "", endpoint.strip())


def _post(address: str, body: object, key: str | None, timeout: float) -> bytes:
    shown = _shown(address)
    deadline = time.monotonic() + timeout
    headers = {"Content-Type": "application/json"}
    try:
        request = urllib.request.Request(address, json.dumps(body).encode("utf-8"), headers)
        if key:
            # Unredirected: no other host that this one points to may see the key.
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        with urllib.request.urlopen(request, timeout=timeout) as response:
            parts = bytearray()
            while part := response.read1(65536):
                parts += part
                if len(parts) > _MAX_ANSWER:
                    raise AblationError(f"{shown} sent more than {_MAX_ANSWER:,} bytes: check that address.")
                # The socket's own limit is for each part alone.
                if time.monotonic() > deadline:
                    raise TimeoutError
            return bytes(parts)
    except urllib.error.HTTPError as error:
        error.close()
        advice = {401: "check the key", 403: "check the key", 404: "check the address and the model's name"}
        raise AblationError(
            f"{shown} refused the request (HTTP {error.code}): {advice.get(error.code, 'try again later')}."
        ) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise AblationError(
                f"{shown} did not answer in {timeout:g} s: check that it runs, or wait longer."
            ) from None
        # Not the text of the error, which may quote the key.
        said = reason if isinstance(reason, str) else getattr(reason, "strerror", None) or type(reason).__name__
        raise AblationError(f"{shown} cannot be reached ({said}): check the address and that it runs.") from None


def _content(answer: bytes, endpoint: str) -> str:
    try:
        content = json.loads(answer.decode("utf-8"))["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        content = None
    if not isinstance(content, str):
        raise AblationError(
            f"{_shown(endpoint)} did not answer as OpenAI's chat completions do: check that the address ends in /v1."
        )
    return content
