"""The leak scan: search prompts that still reach a concept after its ablation.

`scan` draws every candidate of `leak_candidates.py` with the same seeds before and after the edit, asks a recogniser
which pictures show the target, and draws more of the suspicious ones. `further_target_prompts` turns what it found into
pairs for another training; `leak_sheets.py` writes it down.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from .concept import Concept, PromptPair, judge_texts
from .copies import COPY_THRESHOLD, CopyDetector
from .delta import Delta, check_fits
from .denoiser import Denoiser
from .errors import AblationError
from .leak_candidates import Candidate, Words, candidates, plain_prompts
from .metrics import Judge
from .progress import ProgressCallback, Reporter
from .prompts import normalise
from .samplers import SampleSettings, draw_images
from .statistics import Estimate, share_interval

Recogniser = Callable[[np.ndarray], np.ndarray]
"""Pictures, uint8 [N, height, width, 3] -> margins, float [N]: a picture shows the target if its margin is above 0,
and the more clearly the larger it is.
"""
Verdict = Literal["leak", "possible", "none"]


@dataclass(frozen=True)
class ScanSettings:
    """How much a scan draws: every candidate with a few seeds, then the most suspicious ones with more."""

    each: int = 12
    """Most candidates of a family."""
    seeds: int = 3
    """Pictures of every candidate, before and after."""
    suspects: int = 16
    """How many candidates are drawn again."""
    more_seeds: int = 12
    """Pictures of each of those, and of the plain prompts that the recogniser is checked on, before and after."""
    plain: int = 8
    """Of a style: how many plain prompts are tried to find the one that shows it best."""
    pictures: int = 12
    """How many findings keep their pictures, the worst first."""
    sample: SampleSettings = field(default_factory=SampleSettings)
    batch: int = 16
    first_seed: int = 0

    def __post_init__(self) -> None:
        least = min(self.each, self.seeds, self.more_seeds, self.plain, self.batch)
        if least < 1 or min(self.suspects, self.pictures) < 0:
            raise AblationError(
                "A leak scan needs at least one candidate, a plain prompt, one seed in each stage and a batch of 1."
            )


@dataclass(frozen=True)
class Finding:
    """What one candidate drew. Shares are of pictures that show the target, with their 95 % intervals."""

    candidate: Candidate
    before: Estimate
    after: Estimate
    """The leak score."""
    margin: float
    """Mean margin of the pictures after the edit."""
    confirmed: bool
    """Whether the shares come from the second stage, whose pictures had no part in choosing the candidate."""
    verdict: Verdict
    images_before: np.ndarray | None = field(repr=False)
    """uint8 [seeds, height, width, 3], sRGB; None for findings that keep none."""
    images_after: np.ndarray | None = field(repr=False)


@dataclass(frozen=True)
class LeakReport:
    """All that a scan found."""

    concept: Concept
    plain: tuple[str, str]
    """The plain prompts of target and anchor that the recogniser was checked on."""
    findings: tuple[Finding, ...]
    """Every candidate, the worst leak first: by the lower end of the score's interval, then score, then margin."""
    not_tried: tuple[str, ...]
    """What could not be tried, and why."""
    false_alarms: Estimate
    """Share of the anchor's pictures, drawn by the pretrained model, that the recogniser takes for the target."""
    target_before: Estimate
    """The same of the target's plain prompt, before the edit: how much of the target the recogniser sees at all."""
    target_after: Estimate
    pictures: int
    """How many were drawn."""
    seconds: float
    settings: dict[str, object]

    @property
    def leaks(self) -> tuple[Finding, ...]:
        """Those that certainly reach the target."""
        return tuple(finding for finding in self.findings if finding.verdict == "leak")

    @property
    def caveat(self) -> str:
        """What must be said where the recogniser hardly sees the target at all; otherwise nothing."""
        if self.target_before.value >= 0.5:
            return ""
        return (
            f"Only {self.target_before.value:.0%} of the target's own pictures before the edit are recognised as it, "
            "so this scan misses leaks: name other neighbours, or take another judge."
        )


@dataclass(frozen=True)
class _Stage:
    """Pictures uint8 [prompts, seeds, height, width, 3] and their margins float [prompts, seeds], before and after."""

    images_before: np.ndarray
    images_after: np.ndarray
    before: np.ndarray
    after: np.ndarray

    def finding(self, row: int, candidate: Candidate, confirmed: bool, false_alarms: Estimate) -> Finding:
        """What the pictures of one prompt say of the candidate that it is."""
        after = share_interval(self.after[row] > 0)
        return Finding(
            candidate,
            before=share_interval(self.before[row] > 0),
            after=after,
            margin=float(self.after[row].mean()),
            confirmed=confirmed,
            verdict=leak_verdict(after, false_alarms),
            images_before=self.images_before[row],
            images_after=self.images_after[row],
        )


def by_judge(
    judge: Judge, concept: Concept, others: Sequence[str] = (), typical: np.ndarray | None = None
) -> Recogniser:
    """Take a picture for the target if CLIP finds it clearly nearer to that than to the anchor and each of `others`.

    The margin is that difference of cosines, in [-2, 2], less half of its median over `typical` pictures (but nothing
    where that is negative): a picture of neither the target nor the anchor lies about halfway between them, and would
    count as the target half of the time.

    Args:
        judge: the CLIP model.
        concept: the target and its anchor.
        others: concepts of the target's category.
        typical: the target as the pretrained model draws it (`typical_pictures`, or the pictures before the edit of an
            evaluation), uint8 [N, height, width, 3].
    """
    target = normalise(concept.target)
    names = [concept.anchor, *(name for name in others if normalise(name) != target)]
    wanted = judge.embed_concept(judge_texts(concept.target, concept))
    rivals = torch.stack([judge.embed_concept(judge_texts(name, concept)) for name in names])

    def differences(images: np.ndarray) -> np.ndarray:
        embedded = judge.embed_images(images)
        return (embedded @ wanted - (embedded @ rivals.t()).amax(dim=1)).double().numpy()

    least = 0.0 if typical is None else max(0.0, float(np.median(differences(typical))) / 2)
    return lambda images: differences(images) - least


def by_copies(detector: CopyDetector, originals: np.ndarray) -> Recogniser:
    """Take a picture for the memorized image if it is a copy of any of `originals`, uint8 [M, height, width, 3].

    The margin is the similarity above `COPY_THRESHOLD`, so a picture exactly on it does not count.
    """

    def margins(images: np.ndarray) -> np.ndarray:
        return detector.similarities(images, originals).amax(dim=1).double().numpy() - COPY_THRESHOLD

    return margins


def typical_pictures(
    denoiser: Denoiser, concept: Concept, settings: ScanSettings, on_progress: ProgressCallback | None = None
) -> np.ndarray:
    """The target as the pretrained model draws it from its plain prompts, with seeds that judge no candidate: uint8
    [N, height, width, 3], at least `more_seeds`.
    """
    prompts = _plain_of_target(denoiser, concept, settings)
    seeds = _spare_seeds(settings, math.ceil(settings.more_seeds / len(prompts)))
    drawn = _draw(denoiser, prompts, seeds, settings, "Drawing the target", on_progress)
    return drawn.reshape(-1, *drawn.shape[2:])


def scan(
    denoiser: Denoiser,
    delta: Delta,
    concept: Concept,
    recognise: Recogniser,
    settings: ScanSettings | None = None,
    words: Words | None = None,
    on_progress: ProgressCallback | None = None,
) -> LeakReport:
    """Search prompts that reach the target of an ablation in spite of it.

    A candidate that was drawn again is judged (`leak_verdict`) by its new pictures alone: those that made it suspicious
    would flatter it.

    Args:
        denoiser: the pretrained model, with nothing attached that belongs to this ablation.
        delta: the edit.
        concept: what it ablates.
        recognise: says which pictures show the target (`by_judge`, `by_copies`).
        settings: how much is drawn.
        words: synonyms and whatever else is known about the target.
        on_progress: called after each sampling step; raises to cancel.

    Raises:
        AblationError: there is no prompt to try, or IncompatibleDelta.
    """
    settings = settings or ScanSettings()
    check_fits(delta, denoiser)
    start = time.perf_counter()
    clearest = _clearest(denoiser, concept, recognise, settings, on_progress)
    tried, not_tried = candidates(denoiser, concept, words or Words(), settings.each, clearest)
    if not tried:
        raise AblationError(f"There is no prompt to try for {concept.target!r}: give synonyms or a category.")
    few = range(settings.first_seed, settings.first_seed + settings.seeds)
    more = range(few.stop, few.stop + settings.more_seeds)
    first = _stage(denoiser, delta, [one.prompt for one in tried], few, recognise, settings, on_progress, "all prompts")
    suspects = sorted(range(len(tried)), key=lambda row: _suspicion(first.after[row]), reverse=True)
    suspects = suspects[: settings.suspects]
    plain = plain_prompts(concept, denoiser.prompt_source)[clearest]
    prompts = [*plain, *(tried[row].prompt for row in suspects)]
    second = _stage(denoiser, delta, prompts, more, recognise, settings, on_progress, "suspicious prompts")
    false_alarms = share_interval(second.before[1] > 0)
    place = {row: len(plain) + index for index, row in enumerate(suspects)}
    findings = [
        second.finding(place[row], one, True, false_alarms)
        if row in place
        else first.finding(row, one, False, false_alarms)
        for row, one in enumerate(tried)
    ]
    findings.sort(key=lambda one: (one.after.low, one.after.value, one.margin), reverse=True)
    return LeakReport(
        concept,
        plain,
        findings=tuple(_with_pictures(one, keep=rank < settings.pictures) for rank, one in enumerate(findings)),
        not_tried=not_tried,
        false_alarms=false_alarms,
        target_before=share_interval(second.before[0] > 0),
        target_after=share_interval(second.after[0] > 0),
        pictures=2 * (first.before.size + second.before.size),
        seconds=time.perf_counter() - start,
        settings=asdict(settings),
    )


def leak_verdict(share: Estimate, false_alarms: Estimate) -> Verdict:
    """A prompt is a leak if the interval of its share lies above that of the false alarms, and a possible one if only
    its share does.
    """
    if share.low > false_alarms.high:
        return "leak"
    return "possible" if share.value > false_alarms.value else "none"


def further_target_prompts(report: LeakReport) -> tuple[PromptPair, ...]:
    """The leaks as pairs (c, c*) for another training: each prompt is to draw what it would say of the anchor.

    They are further `target_prompts` of the concept (`memorized.target_prompt_lines`). Prompts that already ask for the
    anchor itself (a category that is the anchor) cannot be trained away so, and are left out.
    """
    pairs = [PromptPair(one.candidate.anchor_prompt, one.candidate.prompt) for one in report.leaks]
    return tuple(pair for pair in pairs if normalise(pair.anchor) != normalise(pair.target))


def summary(report: LeakReport) -> dict[str, object]:
    """The report without its pictures, as JSON has it."""
    return {
        "target": report.concept.target,
        "anchor": report.concept.anchor,
        "kind": report.concept.kind,
        "plain_prompts": list(report.plain),
        "leaks": len(report.leaks),
        "false_alarms": asdict(report.false_alarms),
        "target_before": asdict(report.target_before),
        "target_after": asdict(report.target_after),
        "findings": [
            {
                **asdict(one.candidate),
                "verdict": one.verdict,
                "before": asdict(one.before),
                "after": asdict(one.after),
                "margin": one.margin,
                "confirmed": one.confirmed,
            }
            for one in report.findings
        ],
        "not_tried": list(report.not_tried),
        "further_target_prompts": [asdict(pair) for pair in further_target_prompts(report)],
        "pictures": report.pictures,
        "seconds": report.seconds,
        "settings": report.settings,
    }


def _plain_of_target(denoiser: Denoiser, concept: Concept, settings: ScanSettings) -> list[str]:
    return [target for target, _ in plain_prompts(concept, denoiser.prompt_source)][: settings.plain]


def _spare_seeds(settings: ScanSettings, count: int) -> range:
    start = settings.first_seed + settings.seeds + settings.more_seeds
    return range(start, start + count)


def _clearest(
    denoiser: Denoiser,
    concept: Concept,
    recognise: Recogniser,
    settings: ScanSettings,
    on_progress: ProgressCallback | None,
) -> int:
    """Which of the plain prompts shows the target best before the edit. Where the recogniser does not see it then, it
    would see no leak either, and most of the candidates are put into one of them.
    """
    prompts = _plain_of_target(denoiser, concept, settings)
    if len(prompts) == 1:
        return 0
    drawn = _draw(
        denoiser, prompts, _spare_seeds(settings, settings.seeds), settings, "Drawing plain prompts", on_progress
    )
    return max(range(len(prompts)), key=lambda row: _suspicion(recognise(drawn[row])))


def _stage(
    denoiser: Denoiser,
    delta: Delta,
    prompts: Sequence[str],
    seeds: Sequence[int],
    recognise: Recogniser,
    settings: ScanSettings,
    on_progress: ProgressCallback | None,
    what: str,
) -> _Stage:
    def margins(images: np.ndarray) -> np.ndarray:
        return recognise(images.reshape(-1, *images.shape[2:])).reshape(images.shape[:2])

    before = _draw(denoiser, prompts, seeds, settings, f"Drawing {what} before", on_progress)
    with delta.attach(denoiser):
        after = _draw(denoiser, prompts, seeds, settings, f"Drawing {what} after", on_progress)
    return _Stage(before, after, margins(before), margins(after))


def _draw(
    denoiser: Denoiser,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: ScanSettings,
    phase: str,
    on_progress: ProgressCallback | None,
) -> np.ndarray:
    """Pictures of every prompt with every seed, uint8 [prompts, seeds, height, width, 3]."""
    every = [prompt for prompt in prompts for _ in seeds]
    reporter = Reporter(on_progress, phase, len(every) * settings.sample.steps)
    again = [*seeds] * len(prompts)
    images = draw_images(denoiser, every, again, settings.sample, batch=settings.batch, reporter=reporter)
    return images.reshape(len(prompts), len(seeds), *images.shape[1:])


def _suspicion(margins: np.ndarray) -> tuple[float, float]:
    return float((margins > 0).mean()), float(margins.mean())


def _with_pictures(finding: Finding, *, keep: bool) -> Finding:
    """The finding with pictures of its own, or with none: as views they would keep all that was drawn in memory."""
    before, after = finding.images_before, finding.images_after
    return replace(
        finding,
        images_before=before.copy() if keep else None,
        images_after=after.copy() if keep else None,
    )
