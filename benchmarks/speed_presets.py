"""Jobs of speed.py on the embedded model: what a preset costs and does, and what the loop costs over the network."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from job_store import JobStore
from measuring import Hits, costs, hits
from torch import Tensor

from concept_ablation.core import ablation, delta_file
from concept_ablation.core.denoiser import Conditioning, Denoiser
from concept_ablation.core.evaluation import EvaluationSettings, make_jobs
from concept_ablation.core.harvest import HarvestSettings, harvest
from concept_ablation.core.harvest_training import train_harvested
from concept_ablation.core.metrics import Judge
from concept_ablation.core.presets import Recipe, recipe
from concept_ablation.core.progress import Progress
from concept_ablation.core.samplers import SampleSettings
from concept_ablation.core.subsets import select
from concept_ablation.core.tasks import ListedTask
from concept_ablation.core.trainer import TrainSettings

PAPER_SAMPLE = SampleSettings(steps=25, guidance=6.0, eta=1.0)
"""How `paper` draws its 1,000 images here: the issue's 25 steps in place of the published 50, in its favour."""

PAPER_RATE = 1.6e-4
"""Learning rate of `paper`, a tenth of the preset's for this model: the best of four by choose_presets.py."""


@dataclass(frozen=True)
class Sizes:
    """How much is run.

    Attributes:
        evaluation: held-out prompts and seeds of the accuracies.
        dataset: fields of `DatasetSettings` to replace, by preset.
        training: fields of `TrainSettings` to replace, by preset.
        floor_steps: training steps of which the overhead over the bare network is measured.
        floor_trajectories: trajectories whose rows those steps are made of.
        floor_repeats: how often that is done. The difference is a few hundredths, about what one repeat is off by.
    """

    evaluation: EvaluationSettings = field(
        default_factory=lambda: EvaluationSettings(prompts=10, seeds=8, sample=SampleSettings(steps=12))
    )
    dataset: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"paper": {"sample": PAPER_SAMPLE}})
    training: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"paper": {"learning_rate": PAPER_RATE}})
    floor_steps: int = 20
    floor_trajectories: int = 16
    floor_repeats: int = 9


TINY = Sizes(
    evaluation=EvaluationSettings(prompts=2, seeds=1, sample=SampleSettings(steps=2)),
    dataset={
        "fast": {"images": 4, "preserve": 4, "sample": SampleSettings(steps=2)},
        "balanced": {"images": 4, "preserve": 4, "sample": SampleSettings(steps=2)},
        "paper": {"images": 4, "sample": SampleSettings(steps=2, guidance=6.0)},
    },
    training={name: {"steps": 3, "batch": 4} for name in ("fast", "balanced", "paper")},
    floor_steps=3,
    floor_trajectories=2,
    floor_repeats=2,
)
"""To see that everything runs. The figures mean nothing."""


@dataclass(frozen=True)
class Bench:
    """What every job needs.

    Attributes:
        load: gives a fresh pretrained model, so that no job finds prompts that another one has encoded.
        judge: the CLIP model.
        sizes: how much is run.
        store: finished jobs.
        key: what all results depend on: the machine, the commit, the model.
    """

    load: Callable[[], Denoiser]
    judge: Judge
    sizes: Sizes
    store: JobStore
    key: Mapping[str, Any]

    def recipe(self, preset: str, denoiser: Denoiser, task: ListedTask, seed: int) -> Recipe:
        """The preset's settings for a task, with this run's sizes."""
        changes = {
            name: dict(by_preset[preset])
            for name, by_preset in (("dataset", self.sizes.dataset), ("training", self.sizes.training))
            if preset in by_preset
        }
        return recipe(preset, denoiser, task.concept.kind, seed=seed, **changes)

    def delta_path(self, task: ListedTask, preset: str, repeat: int) -> Path:
        """Where the delta of a job is kept for its evaluation."""
        return self.store.path(*self._made(task, preset, repeat), suffix=".safetensors")

    def make(self, task: ListedTask, preset: str, repeat: int) -> dict[str, Any]:
        """From the concept to the delta file, timed; the seed is `repeat`."""
        return self.store.run(*self._made(task, preset, repeat), lambda: self._make(task, preset, repeat))

    def hits(self, task: ListedTask, preset: str | None) -> Hits:
        """Of the target and the surrounding concepts: with the delta of the first repeat, or without an edit."""
        evaluation = asdict(self.sizes.evaluation)
        inputs = {**self.key, "task": _described(task), "preset": preset, "evaluation": evaluation}
        if preset is not None:
            inputs["delta"] = self.delta_path(task, preset, 0).stem
        return self.store.run(f"hits-{task.name}-{preset or 'none'}", inputs, lambda: self._hits(task, preset))

    def overhead(self, task: ListedTask, preset: str, repeat: int) -> dict[str, float]:
        """Seconds of a step of training on rows, and of the bare network on the same rows."""
        sizes = {"steps": self.sizes.floor_steps, "trajectories": self.sizes.floor_trajectories}
        inputs = {**self.key, "task": _described(task), "preset": preset, "repeat": repeat, **sizes}
        return self.store.run(f"floor-{preset}", inputs, lambda: self._overhead(task, preset, repeat))

    def _made(self, task: ListedTask, preset: str, repeat: int) -> tuple[str, dict[str, Any]]:
        sizes = {
            name: _jsonable(by_preset.get(preset, {}))
            for name, by_preset in (("dataset", self.sizes.dataset), ("training", self.sizes.training))
        }
        name = f"make-{task.name}-{preset}-{repeat}"
        return name, {**self.key, "task": _described(task), "preset": preset, "repeat": repeat, **sizes}

    def _make(self, task: ListedTask, preset: str, repeat: int) -> dict[str, Any]:
        denoiser = self.load()
        warm_up(denoiser)
        settings = self.recipe(preset, denoiser, task, repeat)
        path = self.delta_path(task, preset, repeat)
        start = time.perf_counter()
        made = ablation.ablate(denoiser, [ablation.Task(task.concept, task.surrounding)], settings)
        delta_file.save(made.delta, path)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "phases": costs(made.phases, seconds), "bytes": path.stat().st_size}

    def _hits(self, task: ListedTask, preset: str | None) -> dict[str, list[list[int]]]:
        denoiser = self.load()
        jobs = make_jobs(denoiser, [task.concept], [task.surrounding], self.sizes.evaluation)
        delta = None if preset is None else delta_file.load(self.delta_path(task, preset, 0))
        measured = [job for job in jobs if job.role != "anchor"]
        return hits(denoiser, self.judge, measured, self.sizes.evaluation, delta)

    def _overhead(self, task: ListedTask, preset: str, repeat: int) -> dict[str, float]:
        denoiser = self.load()
        warm_up(denoiser)
        settings = HarvestSettings(
            trajectories=self.sizes.floor_trajectories,
            preserve=self.sizes.floor_trajectories,
            sample=SampleSettings(steps=4),
        )
        rows = harvest(denoiser, [task.concept], settings, surrounding=[task.surrounding])
        training = replace(
            self.recipe(preset, denoiser, task, repeat).training,
            objective="model",
            steps=self.sizes.floor_steps,
            flip=False,
            regularization=0.0,
            negative_guidance=0.0,
        )
        loop, calls = timed_training(denoiser, rows, training)
        return {"loop": loop, "floor": bare_steps(denoiser, calls, training.subset)}


def timed_training(denoiser: Denoiser, rows: Any, settings: TrainSettings) -> tuple[float, list[_Call]]:
    """Median seconds of a step after the first, and what the network was given in each."""
    calls: list[_Call] = []
    marks: list[float] = []
    denoise = denoiser.denoise

    def recorded(x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        calls.append((x, sigma, cond))
        return denoise(x, sigma, cond)

    def mark(progress: Progress) -> None:
        _wait(denoiser)
        marks.append(time.perf_counter())

    denoiser.denoise = recorded
    try:
        train_harvested(denoiser, rows, settings, on_progress=mark)
    finally:
        del denoiser.denoise
    return _median_gap(marks), calls


def bare_steps(denoiser: Denoiser, calls: Sequence[_Call], subset: str) -> float:
    """Median seconds, after the first, of a forward and a backward pass of the network alone over the same inputs, with
    gradients for the weights of `subset`: no loss, no edit, no optimizer, no choice of rows.
    """
    weights = [layer.weight for layer in select(subset, denoiser).values()]
    marks: list[float] = []
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for x, sigma, cond in calls:
            output = denoiser.denoise(x, sigma, cond)
            output.backward(torch.ones_like(output))
            for weight in weights:
                weight.grad = None
            _wait(denoiser)
            marks.append(time.perf_counter())
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return _median_gap(marks)


def warm_up(denoiser: Denoiser) -> None:
    """One forward and one backward pass, so that no job pays for what a process does once."""
    x = torch.randn(2, *denoiser.latent_shape, device=denoiser.device).requires_grad_(True)
    with torch.no_grad():
        # by the text encoder itself: the job is to encode its own prompts
        cond = denoiser._encode(["", "a"])
    sigma = torch.ones(2, device=denoiser.device)
    denoiser.denoise(x, sigma, cond).square().mean().backward()


_Call = tuple[Tensor, Tensor, Conditioning]


def _median_gap(marks: Sequence[float]) -> float:
    return median(after - before for before, after in itertools.pairwise(marks))


def _wait(denoiser: Denoiser) -> None:
    if denoiser.device.type == "cuda":
        torch.cuda.synchronize()


def _described(task: ListedTask) -> dict[str, Any]:
    """A task as a part of a job's inputs."""
    return _jsonable(asdict(task))


def _jsonable(value: Any) -> Any:
    """Dataclasses and tuples as JSON gives them back."""
    if isinstance(value, Mapping):
        return {name: _jsonable(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_jsonable(item) for item in value]
    return asdict(value) if isinstance(value, SampleSettings) else value
