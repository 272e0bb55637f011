"""What the commands that measure share: a delta on its model with a judge, the instruments, what a delta removes, and
the tables of what was found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from ..core.errors import AblationError
from .console import console
from .inputs import load_with_judge

if TYPE_CHECKING:
    import numpy as np

    from ..core.ablation import Task
    from ..core.concept import Concept
    from ..core.delta import Delta
    from ..core.evaluation import ConceptResult, Evaluation
    from ..core.hosts.diffusers import DiffusersDenoiser
    from ..core.instruments import Instruments
    from ..core.leak_candidates import Words
    from ..core.leaks import Recogniser, ScanSettings
    from ..core.metrics import Judge
    from ..core.progress import ProgressCallback
    from ..core.statistics import Estimate


def load_beside(
    edit: Delta,
    output: Path,
    model: str | None,
    judge: str | None,
    device: str | None,
    precision: str,
    prediction: str | None,
) -> tuple[DiffusersDenoiser, Judge]:
    """The model of a delta and the judge, with all that can be refused before any work refused.

    Raises:
        AblationError: the delta is of another model, `output` cannot be written, or as `load_denoiser`.
    """
    from ..core.delta import check_fits
    from ..core.files import require_writable

    require_writable(output)
    denoiser, referee = load_with_judge(model, judge, device, precision, prediction)
    check_fits(edit, denoiser)
    return denoiser, referee


def read_originals(targets: Sequence[str], kind: str, original: Path | None) -> dict[str, np.ndarray]:
    """The memorized image of the only target, if one was given.

    Raises:
        AblationError: the picture cannot be read, or no one target of that kind is there.
    """
    from ..core.instruments import read_picture
    from ..core.prompts import collapse

    if original is None:
        return {}
    if kind != "memorized":
        raise AblationError("--original is a memorized image: use it with --kind memorized, or leave it out.")
    if len(targets) != 1:
        raise AblationError("--original belongs to one target: take memorized images one after another.")
    return {collapse(targets[0]): read_picture(original)}


def concept_of(
    edit: Delta,
    target: str | None,
    anchor: str | None,
    kind: str | None,
    prompts: Path | None = None,
    target_prompts: Path | None = None,
) -> Concept:
    """What a delta removes: what was given, and otherwise what its file says.

    Raises:
        AblationError: the file says nothing or several things, or what `Concept` refuses.
    """
    from ..core.concept import Concept
    from ..core.delta_header import named_rows
    from ..core.prompts import normalise, read_prompt_file

    known = named_rows(edit.metadata)
    if target is None and len(known) != 1:
        said = f" ({', '.join(row[0] for row in known)})" if known else ""
        raise AblationError(f"The delta's file names {len(known)} targets{said}: name one with --target.")
    same = [row for row in known if target is None or normalise(row[0]) == normalise(target)]
    said_target, said_anchor, said_kind = same[0] if same else ("", "", "instance")
    if anchor is None and not said_anchor:
        raise AblationError(
            f"The delta's file does not say what is drawn instead of '{target}': name it with --anchor."
        )
    return Concept(
        said_target if target is None else target,
        said_anchor if anchor is None else anchor,
        said_kind if kind is None else kind,
        anchor_prompts=() if prompts is None else read_prompt_file(prompts),
        target_prompts=() if target_prompts is None else read_prompt_file(target_prompts),
    )


def recogniser(
    denoiser: DiffusersDenoiser,
    judge: Judge,
    concept: Concept,
    instruments: Instruments,
    words: Words,
    settings: ScanSettings,
    on_progress: ProgressCallback,
) -> Recogniser:
    """What says which pictures show the target: the copy detector for a memorized image, otherwise the judge.

    Raises:
        AblationError: the memorized image is missing.
    """
    from ..core.leaks import by_copies, by_judge, typical_pictures

    if concept.kind != "memorized":
        typical = typical_pictures(denoiser, concept, settings, on_progress)
        return by_judge(judge, concept, words.neighbours, typical)
    if instruments.detector is None or not instruments.originals:
        raise AblationError("A memorized image is recognised by the image itself: give it with --original.")
    return by_copies(instruments.detector, next(iter(instruments.originals.values()))[None])


def known_words(model: str | None, target: str) -> Words:
    """What the model's folder knows of a target: its category, and others of that."""
    from ..core.hosts.diffusers import EMBEDDED_MODEL, load_hints
    from ..core.leak_candidates import Words, words_from_categories

    folder = EMBEDDED_MODEL if model is None else Path(model)
    return words_from_categories(target, load_hints(folder).categories) if folder.is_dir() else Words()


@dataclass(frozen=True)
class AnchorSearch:
    """The search for what is drawn instead of a memorized image, where no anchor was named."""

    caption: str
    surrounding: tuple[str, ...]
    paraphrases: tuple[str, ...]

    @classmethod
    def asked_for(
        cls,
        targets: Sequence[str],
        anchors: Sequence[str] | None,
        surrounding: Sequence[str] | None,
        originals: Mapping[str, np.ndarray],
        file: Path | None,
        endpoint: str | None,
        model: str | None,
    ) -> AnchorSearch | None:
        """The search that the options ask for; None if the anchor is named or nothing is there to search with.

        Raises:
            AblationError: options of the search without one, or as `paraphrases_of`.
        """
        from ..core.concept import Concept
        from ..core.memorized import SearchSettings, paraphrases_of

        if anchors or not originals:
            if file is not None or endpoint is not None or model is not None:
                raise AblationError(
                    "Paraphrases are for the search of anchors: give --kind memorized with --original, and no --anchor."
                )
            return None
        caption = Concept(targets[0], f"not {targets[0]}"[:200], "memorized").target
        count = SearchSettings().paraphrases
        found = paraphrases_of(caption, count, file=file, endpoint=endpoint, model=model)
        return cls(caption, tuple(surrounding or ()), found)

    def run(
        self, denoiser: DiffusersDenoiser, instruments: Instruments, output: Path, on_progress: ProgressCallback
    ) -> tuple[Task, ...]:
        """Find the anchors, write what was found to `output`, and say it in a table."""
        from ..core.ablation import Task
        from ..core.files import require_writable
        from ..core.memorized import find_anchors, write_found

        require_writable(output)
        original = instruments.originals[self.caption]
        assert instruments.detector is not None
        found = find_anchors(
            denoiser, self.caption, original, instruments.detector, self.paraphrases, on_progress=on_progress
        )
        write_found(output, found)
        concept = found.concept
        console.print(
            f"The caption gives copies of the picture in {found.caption.copy_rate:.0%} of its pictures. "
            f"{len(concept.target_prompts)} paraphrases are removed with it, {len(concept.anchor_prompts)} are drawn "
            f"instead: see {output / 'paraphrases.json'}."
        )
        return (Task(concept, self.surrounding),)


def show_evidence(found: Evaluation) -> None:
    """Tables of what was measured beside CLIP accuracy, as far as it was."""
    distances = Table(title="Kernel distance before to after, ± standard error")
    for heading in ("ablation", "concept", "role"):
        distances.add_column(heading)
    for heading in ("CLIP", "SSCD", "Inception"):
        distances.add_column(heading, justify="right")
    copied = _table("Copies of the memorized image", "concept", "role")
    obeyed = _table("Words of the prompt that are obeyed", "concept", "words")
    for row in found.concepts:
        if row.details is not None and (row.details.kid_copy or row.details.kid_inception):
            each = (row.details.kid_clip, row.details.kid_copy, row.details.kid_inception)
            shown = ["–" if kid is None else f"{kid.value:.4f} ± {kid.standard_error:.4f}" for kid in each]
            distances.add_row(row.ablation, row.name, row.role, *shown)
        if row.details is not None and row.details.copies is not None:
            copies = row.details.copies
            copied.add_row(row.ablation, row.name, row.role, *_change(copies.rate_before, copies.rate_after))
        _add_composition(obeyed, row)
    for table in (copied, obeyed, distances):
        if table.row_count:
            console.print(table)


def _table(title: str, *names: str) -> Table:
    table = Table(title=title)
    for heading in ("ablation", *names):
        table.add_column(heading)
    for heading in ("before", "after", "95 % interval"):
        table.add_column(heading, justify="right")
    return table


def _add_composition(table: Table, row: ConceptResult) -> None:
    if row.composition is None:
        return
    for group, words in row.composition.words.items():
        table.add_row(row.ablation, row.name, group, *_change(words.before, words.after))
    for what, kept in (("place kept", row.composition.layout.position), ("size kept", row.composition.layout.size)):
        table.add_row(row.ablation, row.name, what, "–", f"{kept.value:.2f}", interval_words(kept))


def _change(before: Estimate, after: Estimate) -> tuple[str, str, str]:
    return f"{before.value:.2f}", f"{after.value:.2f}", interval_words(after)


def interval_words(estimate: Estimate) -> str:
    """Where a share lies, as far as so few prompts can say."""
    return "–" if math.isnan(estimate.low) else f"{estimate.low:.2f} to {estimate.high:.2f}"
