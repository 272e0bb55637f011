"""From a memorized image and the caption that reproduces it to an ablation (Kumari et al. 2023, section 3.3): which
paraphrases of the caption reproduce the image, too, and which are far enough from it to be drawn instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .concept import ARROW, Concept, PromptPair
from .copies import CopyDetector
from .denoiser import Denoiser
from .errors import AblationError
from .files import write_json, write_text
from .paraphrases import Ranked, ask, choose, paraphrase, rank
from .progress import ProgressCallback, Reporter
from .prompts import distinct, normalise, read_prompt_file
from .samplers import SampleSettings, draw_images

_SEARCH_SEEDS = 100_000
"""How far the seeds of a search lie from those of an evaluation, which else would count the very pictures by which the
captions were chosen."""


@dataclass(frozen=True)
class SearchSettings:
    """How many paraphrases are tried, and how much each is drawn."""

    paraphrases: int = 40
    images_each: int = 8
    """Pictures of every paraphrase and of the caption, all with the same seeds."""
    targets: int = 3
    """Most paraphrases that are ablated beside the caption: those that reproduce the image most often."""
    anchors: int = 10
    """Most paraphrases that are drawn instead: those that reproduce it least often."""
    sample: SampleSettings = field(default_factory=SampleSettings)
    batch: int = 16
    first_seed: int = 0

    def __post_init__(self) -> None:
        if min(self.paraphrases, self.images_each, self.anchors, self.batch) < 1 or self.targets < 0:
            raise AblationError(
                "A search for anchors needs a paraphrase, an image of each, an anchor and a batch of 1."
            )


@dataclass(frozen=True)
class FoundAnchors:
    """What a search found."""

    concept: Concept
    caption: Ranked
    """How often the caption itself reproduces the image."""
    ranked: tuple[Ranked, ...]
    """Every paraphrase that was tried; those that reproduce the image least often first."""


def paraphrases_of(
    caption: str,
    count: int,
    *,
    file: Path | None = None,
    endpoint: str | None = None,
    model: str | None = None,
    seed: int = 0,
) -> tuple[str, ...]:
    """Other ways to say `caption`: a user's own from `file`, a language model's, or else those made by rules.

    Args:
        caption: reproduces the image.
        count: how many at most; a file is taken whole.
        file: one paraphrase a line.
        endpoint: base address of a service with OpenAI's chat completions, for `paraphrases.ask`.
        model: what that service calls its model.
        seed: of the rules.

    Raises:
        AblationError: a file and an endpoint, an endpoint without a model or the reverse, or what the source refuses.
    """
    if (endpoint is None) != (model is None):
        raise AblationError("A language model needs both its endpoint and its name: give both, or neither.")
    if file is not None and endpoint is not None:
        raise AblationError("Paraphrases come from a file or from a language model: give one of the two.")
    if file is not None:
        return read_prompt_file(file)
    if endpoint is not None and model is not None:
        return ask(endpoint, model, caption, count)
    return paraphrase(caption, count, seed)


def find_anchors(
    denoiser: Denoiser,
    caption: str,
    original: np.ndarray,
    detector: CopyDetector,
    paraphrases: Sequence[str],
    settings: SearchSettings | None = None,
    on_progress: ProgressCallback | None = None,
) -> FoundAnchors:
    """Draw the caption and its paraphrases and sort them by how often they give the memorized image.

    Args:
        denoiser: the pretrained model.
        caption: reproduces the image.
        original: the memorized image, uint8 [height, width, 3].
        detector: finds copies.
        paraphrases: what to try (`paraphrases_of`).
        settings: how much is drawn.
        on_progress: called after each sampling step; raises to cancel.

    Raises:
        AblationError: there is no paraphrase, or every one reproduces the image in all of its pictures.
    """
    settings = settings or SearchSettings()
    others = [text for text in distinct(paraphrases) if normalise(text) != normalise(caption)]
    if not others:
        raise AblationError(f"There is no paraphrase of {caption!r} to try: write some.")
    total = (len(others) + 1) * settings.images_each * settings.sample.steps
    reporter = Reporter(on_progress, "Drawing paraphrases", total)

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        return draw_images(denoiser, prompts, seeds, settings.sample, batch=settings.batch, reporter=reporter)

    first = _SEARCH_SEEDS + settings.first_seed
    everything = rank([caption, *others], draw, detector, original, settings.images_each, first)
    own = next(one for one in everything if one.prompt == caption)
    ranked = tuple(one for one in everything if one is not own)
    return FoundAnchors(choose(caption, ranked, settings.targets, settings.anchors), own, ranked)


def write_found(folder: Path, found: FoundAnchors) -> None:
    """Write `paraphrases.json` (every rate), `anchor_prompts.txt` and `target_prompts.txt` (none, if no paraphrase
    reproduces the image) into `folder`: the two text files are what another run is given.

    Raises:
        AblationError: `folder` cannot be written.
    """
    concept = found.concept
    chosen = {**dict.fromkeys(concept.anchor_prompts, "anchor"), **dict.fromkeys(concept.target_prompts, "target")}
    rows = [
        {
            "prompt": one.prompt,
            "copy_rate": one.copy_rate,
            "similarity": one.similarity,
            "used_as": chosen.get(one.prompt),
        }
        for one in found.ranked
    ]
    caption = {"prompt": concept.target, "copy_rate": found.caption.copy_rate, "similarity": found.caption.similarity}
    write_json(folder / "paraphrases.json", {"caption": caption, "paraphrases": rows})
    write_text(folder / "anchor_prompts.txt", as_lines(concept.anchor_prompts))
    if concept.target_prompts:
        write_text(folder / "target_prompts.txt", as_lines(concept.target_prompts))
    else:
        (folder / "target_prompts.txt").unlink(missing_ok=True)


def target_prompt_lines(pairs: Sequence[PromptPair], kind: str) -> tuple[str, ...]:
    """Pairs as `Concept.target_prompts` has them: a memorized image's are captions, others keep their anchor prompt."""
    if kind == "memorized":
        return tuple(pair.target for pair in pairs)
    return tuple(f"{pair.target}{ARROW}{pair.anchor}" for pair in pairs)


def as_lines(prompts: Sequence[str]) -> str:
    """The content of a prompt file."""
    return "".join(f"{prompt}\n" for prompt in prompts)
