"""Running one job, and what it will cost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..attack import TargetImages, attack, draw_target
from ..compiling import compiled
from ..concept import Concept
from ..delta import Delta
from ..errors import AblationError, Interrupted
from ..files import replacing
from ..leak_candidates import Words, words_from_categories
from ..leak_sheets import write_leak_report
from ..leaks import Finding, LeakReport, Recogniser, by_copies, by_judge, leak_verdict, scan, summary
from ..merged import merged
from ..metrics import Judge
from ..samplers import draw_images
from ..statistics import share_interval
from ..tasks import ListedTask
from .bench import Bench
from .edits import dataset_folder, edit_folder, is_made, make, ranking_rows
from .measures import observe, observe_copies, observe_position
from .pace import attack_rows, dataset_rows, sampling_rows, scan_rows, training_rows
from .plan import BenchJob, Unit, digest
from .sheets import sample, write_sheet
from .store import has_pictures
from .units import pictures, unit_key, units


def run_job(bench: Bench, job: BenchJob, key: str) -> dict[str, Any]:
    """The result of a job, ready for JSON. Bad input of this one job is a result as well: {"failed": why}.

    Raises:
        Interrupted: the time is up, or a callback cancelled. What was drawn is kept.
    """
    try:
        if job.kind == "evaluate":
            return _evaluate(bench, job, key)
        return _scan(bench, job, key) if job.kind == "leaks" else _attack(bench, job)
    except Interrupted:
        raise
    except AblationError as error:
        return {"failed": str(error)}


def expected_rows(bench: Bench, job: BenchJob, key: str, counted: set[str]) -> int:
    """Rows that a job still needs; what earlier calls with the same `counted` have included costs nothing again."""

    def once(name: str, rows: int, present: bool) -> int:
        if present or name in counted:
            return 0
        counted.add(name)
        return rows

    def before(unit: Unit) -> int:
        name = unit_key(unit, bench.tools.model, bench.protocol)
        present = has_pictures(bench.store.cache("pretrained", name), len(unit.prompts))
        return once(name, sampling_rows(unit.pictures, bench.protocol.sample), present)

    def after(unit: Unit) -> int:
        name = unit_key(unit, bench.tools.model, bench.protocol)
        present = has_pictures(bench.store.scratch(key) / name, len(unit.prompts))
        return once(key + name, sampling_rows(unit.pictures, bench.protocol.sample), present)

    total = _edit_rows(bench, job, once)
    if job.kind == "evaluate":
        drawn = units(job.task, bench.denoiser.prompt_source, bench.protocol, job.robustness)[0]
        return total + sum(before(unit) + after(unit) for unit in drawn)
    total += before(_target_unit(bench, job.task))
    if job.kind == "leaks":
        return total + scan_rows(bench.protocol.scan_settings)
    return total + attack_rows(bench.protocol.attack_settings)


def _edit_rows(bench: Bench, job: BenchJob, once: Callable[[str, int, bool], int]) -> int:
    edit = job.edit
    if edit is None:
        return 0
    made, present = bench.recipe(edit), is_made(bench, edit)
    total = once(str(edit_folder(bench, edit)), training_rows(made), present)
    folder = dataset_folder(bench, made, edit.tasks)
    every = dataset_rows(made, len(edit.tasks))
    if edit.method.ranked:
        # its captions, and so the folder of its dataset, are not known before they are ranked
        total += once(f"dataset of {edit_folder(bench, edit)}", every, present)
        total += once("captions " + job.task.name, sum(ranking_rows(bench, task) for task in edit.tasks), present)
    elif made.dataset is not None:
        drawn = made.dataset.batch * len(list(folder.glob("shard-*.safetensors")))
        total += once(str(folder), max(0, every - sampling_rows(drawn, made.dataset.sample)), present)
    else:
        total += once(str(folder), every, present or (folder / "manifest.json").is_file())
    return total


def _evaluate(bench: Bench, job: BenchJob, key: str) -> dict[str, Any]:
    if job.edit is None:
        raise ValueError("an evaluation needs an edit")
    made = make(bench, job.edit)
    delta = made.delta(job.step)
    found: dict[str, Any] = {"edit": {**made.info, "losses": _thinned(made.info["losses"])}, "observations": []}
    if delta is None:
        if not made.info["diverged"]:
            raise AblationError(f"{made.folder} lacks a delta that it should have: delete it and run with --retry.")
        return {**found, "diverged": made.info["diverged"]}
    wanted, found["not_measured"] = units(job.task, bench.denoiser.prompt_source, bench.protocol, job.robustness)
    original = bench.original(job.task)
    if job.task.concept.kind == "memorized" and original is None:
        found["not_measured"].append("copies: the picture or the copy detector is missing.")
    sheet = []
    for unit in wanted:
        name = unit_key(unit, bench.tools.model, bench.protocol)
        before = _draw(bench, unit, bench.store.cache("pretrained", name), None, f"Drawing {unit.name} before")
        after = _draw(bench, unit, bench.store.scratch(key) / name, delta, f"Drawing {unit.name} after")
        seen = [
            one for judge in bench.judges for one in observe(judge, job.task.concept, unit, before, after, bench.words)
        ]
        if unit.role in ("target", "surrounding"):
            seen.append(observe_position(unit, before, after))
        if original is not None and bench.detector is not None and unit.role != "surrounding":
            seen.append(observe_copies(bench.detector, original, unit, before, after))
        found["observations"] += [asdict(one) for one in seen]
        sheet.append((unit, sample(before), sample(after)))
        bench.pace.check()
    if job.robustness:
        # not for the many checkpoints of the objectives
        label = job.edit.method.label.replace(":", "_")
        write_sheet(bench.store.root / "pictures" / f"{job.task.name}-{label}-{key[:8]}.png", sheet)
    return found


def _draw(bench: Bench, unit: Unit, folder: Path, delta: Delta | None, phase: str) -> np.ndarray:
    rows = sampling_rows(unit.pictures, bench.protocol.sample)
    with contextlib.nullcontext() if delta is None else merged(delta, bench.denoiser), compiled(bench.denoiser, rows):
        return pictures(bench.denoiser, unit, folder, bench.protocol, bench.batch, phase, bench.progress)


def _scan(bench: Bench, job: BenchJob, key: str) -> dict[str, Any]:
    """A leak scan by the main judge; with a validation judge, that one's opinion of every finding as well."""
    delta = _finished(bench, job)
    settings, concept = bench.protocol.scan_settings, job.task.concept
    bench.pace.require(scan_rows(settings))
    settings = replace(settings, batch=bench.batch)
    recognisers = _recognisers(bench, job.task)
    # the other judge needs the pictures of every finding, and not only of the worst
    kept = settings if len(recognisers) == 1 else replace(settings, pictures=10**6)
    report = scan(bench.denoiser, delta, concept, recognisers[0], kept, _words(bench, concept), bench.progress)
    found: dict[str, Any] = {"scan": _plain(summary(report))}
    if len(recognisers) > 1:
        found["validation"] = _second_opinion(bench, report, recognisers[1])
    worst = tuple(_only_pictures_of_the_worst(report, settings.pictures))
    write_leak_report(bench.store.root / "leaks" / key, replace(report, findings=worst))
    return found


def _second_opinion(bench: Bench, report: LeakReport, recognise: Recogniser) -> dict[str, Any]:
    """What another recogniser says of the pictures of a scan: shares by prompt, and its false alarms."""
    settings = bench.protocol.scan_settings
    first = settings.first_seed + settings.seeds
    anchors = draw_images(
        bench.denoiser,
        [report.plain[1]] * settings.more_seeds,
        range(first, first + settings.more_seeds),
        settings.sample,
        batch=bench.batch,
    )
    false_alarms = share_interval(recognise(anchors) > 0)
    findings = []
    for one in report.findings:
        if one.images_after is None:
            continue
        share = share_interval(recognise(one.images_after) > 0)
        verdict = leak_verdict(share, false_alarms)
        findings.append({"prompt": one.candidate.prompt, "verdict": verdict, "after": asdict(share)})
    return {"judge": bench.judges[1].name, "false_alarms": asdict(false_alarms), "findings": findings}


def _only_pictures_of_the_worst(report: LeakReport, count: int) -> list[Finding]:
    return [
        one if rank < count else replace(one, images_before=None, images_after=None)
        for rank, one in enumerate(report.findings)
    ]


def _attack(bench: Bench, job: BenchJob) -> dict[str, Any]:
    """An attack; the first judge says which pictures succeed, and the validation judge counts the same pictures."""
    delta = _finished(bench, job) if job.edit else None
    settings, concept = replace(bench.protocol.attack_settings, draw_batch=bench.batch), job.task.concept
    bench.pace.require(attack_rows(settings))
    recognisers = _recognisers(bench, job.task)
    images = _target_images(bench, concept)
    curve = attack(bench.denoiser, delta, concept, recognisers[0], settings, images, bench.progress, name=job.task.name)
    points = []
    for point in curve.checkpoints:
        flat = point.images.reshape(-1, *point.images.shape[2:])
        shares = [
            [int(count) for count in (recognise(flat) > 0).reshape(point.images.shape[:2]).sum(axis=1)]
            for recognise in recognisers
        ]
        points.append({"steps": point.steps, "images": point.images.shape[1], "successes": shares})
    return {"attack": points, "judges": [judge.name for judge in bench.judges][: len(recognisers)]}


def _target_images(bench: Bench, concept: Concept) -> TargetImages:
    """What the attacker has of the target: drawn once for all edits."""
    settings = bench.protocol.attack_settings
    made_of = {"model": bench.tools.model, "prompts": bench.tools.prompts}
    name = digest({**made_of, "concept": asdict(concept), "attack": asdict(settings)})
    path = bench.store.cache("attacked", name) / "latents.safetensors"
    try:
        stored = load_file(path)
        return TargetImages(stored["latents"], tuple(stored["carriers"].tolist()))
    except (SafetensorError, OSError, KeyError):
        drawn = draw_target(bench.denoiser, concept, replace(settings, draw_batch=bench.batch), bench.progress)
    with replacing(path) as temporary:
        carriers = torch.tensor(drawn.carriers)
        save_file({"latents": drawn.latents.cpu().contiguous(), "carriers": carriers}, temporary)
    return drawn


def _finished(bench: Bench, job: BenchJob) -> Delta:
    if job.edit is None:
        raise ValueError("this job needs an edit")
    made = make(bench, job.edit)
    delta = made.delta()
    if delta is None:
        raise AblationError(f"There is no delta to measure: {made.info['diverged']}")
    return delta


def _recognisers(bench: Bench, task: ListedTask) -> list[Recogniser]:
    """One for each judge, calibrated on the evaluation's pictures of the target before the edit; for a memorized image
    the copy detector alone.
    """
    original = bench.original(task)
    if original is not None and bench.detector is not None:
        return [by_copies(bench.detector, original[None])]
    target = _target_unit(bench, task)
    folder = bench.store.cache("pretrained", unit_key(target, bench.tools.model, bench.protocol))
    drawn = _draw(bench, target, folder, None, f"Drawing {target.name} before")
    typical = drawn.reshape(-1, *drawn.shape[2:])

    def recogniser(judge: Judge) -> Recogniser:
        return by_judge(judge, task.concept, task.surrounding, typical)

    return [recogniser(judge) for judge in bench.judges]


def _target_unit(bench: Bench, task: ListedTask) -> Unit:
    return units(task, bench.denoiser.prompt_source, bench.protocol, robustness=False)[0][0]


def _words(bench: Bench, concept: Concept) -> Words:
    words = words_from_categories(concept.target, bench.categories)
    return replace(words, styles=bench.words.get("style", ()) if concept.kind == "instance" else ())


def _thinned(losses: list[float], most: int = 100) -> list[float]:
    """At most about so many of the losses, evenly spaced."""
    return losses[:: max(1, len(losses) // most)]


def _plain(value: Any) -> Any:
    """`value` with None for what JSON cannot hold."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
