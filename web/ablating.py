"""The two jobs of the page: an ablation (dataset, training, delta, evaluation, report) and drawing pictures."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..core.ablation import DATASET_FOLDER, Task, ablate, report_inputs, screen_of
from ..core.denoiser import Denoiser
from ..core.errors import AblationError, Interrupted
from ..core.evaluation import Evaluation, EvaluationSettings, evaluate, make_jobs
from ..core.files import require_writable
from ..core.instruments import Instruments, load_instruments
from ..core.memorized import SearchSettings, find_anchors, paraphrases_of
from ..core.metrics import Judge
from ..core.presets import Recipe, recipe
from ..core.progress import Progress, ProgressCallback
from ..core.report import write_report
from ..core.samplers import SampleSettings
from ..core.screening import Screen
from ..core.subsets import select
from ..core.trainer import PHASE
from .form import Request
from .host import Host
from .jobs import FieldError, Job
from .library import name_for, safe_name, save_new

STAGES = (
    "Encoding prompts",
    "Solving the closed form",
    "Harvesting",
    "Drawing the dataset",
    PHASE,
    "Drawing before",
    "Drawing after",
)
"""The phases that an ablation may have, as core reports them."""
SEARCH = "Drawing paraphrases"
"""The phase before these, where anchors are still to be found."""
PREVIEW_SHARE = 0.05
"""At most this share of a job's time goes into showing what it draws."""
LARGEST_ON_CPU = 32 * 32
"""Latent positions of a picture that a CPU decodes in less than seconds."""
PREVIEWED = 4
"""Pictures of a preview."""
SHOWN = 256
"""Longest edge of the pictures that the page keeps and shows; the report on the disk has larger ones."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AblationResult:
    """What an ablation leaves."""

    delta: Path
    """The saved delta, in the host's folder."""
    folder: Path
    """Report, contact sheet and dataset."""
    evaluation: Evaluation = field(repr=False)
    """With pictures of at most `SHOWN`."""

    @property
    def files(self) -> list[Path]:
        """What there is to download."""
        return [self.delta, self.folder / "report.html", self.folder / "before_after.png"]


@dataclass(frozen=True)
class Pictures:
    """Pictures of one prompt, uint8 [N, height, width, 3], without and (if any delta was applied) with the deltas."""

    prompt: str
    seeds: tuple[int, ...]
    plain: np.ndarray = field(repr=False)
    edited: np.ndarray | None = field(repr=False)


def ablation(host: Host, request: Request) -> Callable[[Job], AblationResult]:
    """The work of an ablation job."""

    def work(job: Job) -> AblationResult:
        require_writable(host.delta_folder)
        require_writable(host.output_folder)
        with ExitStack() as stack:
            denoiser, judge = _load(host, request.model, stack)
            made_by = _recipe(request, denoiser)
            job.expected = (*((SEARCH,) if request.find_anchors else ()), *stages_of(made_by))
            instruments = _instruments(request, denoiser)
            task = request.task
            concepts, surrounding = [task.concept], [task.surrounding]
            _check_prompts(denoiser, task, request.evaluation)
            on_progress = _watch(host, job, denoiser)
            stack.callback(host.show, None)
            if request.find_anchors:
                task = _with_found_anchors(request, denoiser, instruments, on_progress)
                concepts = [task.concept]
            screen = screen_of(instruments)
            folder = _folder(host, request, task, made_by, denoiser, screen)
            made = ablate(
                denoiser, [task], made_by, directory=folder / DATASET_FOLDER, screen=screen, on_progress=on_progress
            )
            path = save_new(made.delta, host.delta_folder, request.name or name_for(task.concept))
            job.saved = path.name
            found = evaluate(
                denoiser, made.delta, concepts, surrounding, judge, request.evaluation, on_progress, instruments
            )
            # each name has its report: another one for the same edit is another file
            report = folder / path.stem
            write_report(report, report_inputs(denoiser, [task], path, found, recipe=made_by, made=made))
        return AblationResult(path, report, _as_shown(found))

    return work


def _check_prompts(denoiser: Denoiser, task: Task, settings: EvaluationSettings) -> None:
    """Raise FieldError, at its field, if the model has not so many prompts to measure with."""
    for name, asked in (("eval_prompts", replace(settings, misspellings=0)), ("misspellings", settings)):
        try:
            make_jobs(denoiser, [task.concept], [task.surrounding], asked)
        except AblationError as error:
            raise FieldError(name, str(error)) from error


def _as_shown(found: Evaluation) -> Evaluation:
    concepts = (
        replace(one, images_before=_shrunk(one.images_before), images_after=_shrunk(one.images_after))
        for one in found.concepts
    )
    return replace(found, concepts=tuple(concepts))


def _shrunk(images: np.ndarray) -> np.ndarray:
    """uint8 [prompts, seeds, height, width, 3] with a longest edge of `SHOWN`; smaller ones as they are."""
    if max(images.shape[2:4]) <= SHOWN:
        return images
    pictures = [Image.fromarray(one) for one in images.reshape(-1, *images.shape[2:])]
    for picture in pictures:
        picture.thumbnail((SHOWN, SHOWN), Image.Resampling.LANCZOS)
    small = np.stack([np.asarray(picture) for picture in pictures])
    return small.reshape(*images.shape[:2], *small.shape[1:])


def stages_of(made_by: Recipe) -> tuple[str, ...]:
    """Those of `STAGES` that a recipe goes through."""
    left_out = {
        STAGES[1]: made_by.closed_form is None,
        STAGES[2]: made_by.harvest is None,
        STAGES[3]: made_by.dataset is None,
        STAGES[4]: made_by.training is None,
    }
    return tuple(stage for stage in STAGES if not left_out.get(stage))


def drawing(
    host: Host, model: str, prompt: str, seed: int, count: int, settings: SampleSettings
) -> Callable[[Job], Pictures]:
    """The work of a job that draws `count` pictures of a prompt, with consecutive seeds."""

    def work(job: Job) -> Pictures:
        job.only_last = True
        seeds = tuple(range(seed, seed + count))
        on_progress = _watch(host, job, None)
        plain, edited = host.draw(model, [prompt] * count, seeds, settings, on_progress)
        return Pictures(prompt, seeds, plain, edited)

    return work


def _load(host: Host, model: str, stack: ExitStack) -> tuple[Denoiser, Judge]:
    try:
        denoiser = stack.enter_context(host.denoiser(model))
        return denoiser, host.judge(model, denoiser)
    except AblationError as error:
        raise FieldError("model", str(error)) from error


def _recipe(request: Request, denoiser: Denoiser) -> Recipe:
    dataset = dict(request.dataset)
    drawn = recipe(request.preset, denoiser, request.task.concept.kind).sample
    if request.sampling is not None and drawn is not None:
        dataset["sample"] = replace(drawn, steps=request.sampling)
    made = recipe(
        request.preset,
        denoiser,
        request.task.concept.kind,
        concepts=[request.task.concept],
        objective=request.objective,
        subset=request.subset,
        seed=request.seed,
        training=dict(request.training),
        dataset=dataset,
        auto_preserve=request.auto_preserve,
        negative_guidance=request.negative_guidance,
    )
    try:
        select(made.subset, denoiser)
    except AblationError as error:
        raise FieldError("subset", str(error)) from error
    return made


def _instruments(request: Request, denoiser: Denoiser) -> Instruments:
    if request.original is None:
        return Instruments()
    originals = {request.task.concept.target: request.original}
    try:
        return load_instruments(originals=originals, device=denoiser.device)
    except AblationError as error:
        raise FieldError("original", str(error)) from error


def _with_found_anchors(
    request: Request, denoiser: Denoiser, instruments: Instruments, on_progress: ProgressCallback
) -> Task:
    caption = request.task.concept.target
    assert instruments.detector is not None
    found = find_anchors(
        denoiser,
        caption,
        instruments.originals[caption],
        instruments.detector,
        paraphrases_of(caption, SearchSettings().paraphrases),
        SearchSettings(sample=request.evaluation.sample, first_seed=request.seed),
        on_progress,
    )
    return replace(request.task, concept=found.concept)


def _folder(
    host: Host, request: Request, task: Task, made_by: Recipe, denoiser: Denoiser, screen: Screen | None
) -> Path:
    """One folder for each set of settings and model, so that a cancelled run goes on with the pictures it has."""
    facts = [asdict(task), asdict(made_by), asdict(request.evaluation), denoiser.fingerprint(), denoiser.setup()]
    if screen is not None:
        facts.append(screen.described)
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:10]
    return host.output_folder / "runs" / f"{safe_name(task.concept.target)[:40]}-{digest}"


def _watch(host: Host, job: Job, denoiser: Denoiser | None) -> ProgressCallback:
    """The callback of a job: note, show, preview, stop."""
    shown, cost = 0.0, 0.0

    def on_progress(progress: Progress) -> None:
        nonlocal shown, cost
        if host.interrupted():
            raise Interrupted("Interrupted.")
        job.step(progress)
        host.show(progress)
        now = time.perf_counter()
        if denoiser is None or progress.latents is None or now - shown < max(1.0, cost / PREVIEW_SHARE):
            return
        if denoiser.device.type == "cpu" and progress.latents[0, 0].numel() > LARGEST_ON_CPU:
            return
        try:
            job.preview = _decode(denoiser, progress)
        except Exception:
            # the work is worth more than a picture of it, and what failed once (memory) would fail again
            _log.warning("no previews of this job", exc_info=True)
            shown = math.inf
            return
        shown = time.perf_counter()
        cost = shown - now

    return on_progress


@torch.no_grad()
def _decode(denoiser: Denoiser, progress: Progress) -> np.ndarray:
    images = denoiser.vae.decode(progress.latents[:PREVIEWED])
    return (images.permute(0, 2, 3, 1) * 255).round().to("cpu", torch.uint8).numpy()
