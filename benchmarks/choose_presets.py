"""How the `fast` preset is chosen: a small search on targets, prompts and seeds that no reported figure uses.

The targets are those of development_tasks.toml; the prompts are the last ten training templates of each sort, taken
out of training here (core/prompts.py `development`); the seeds are others too; the judge is the embedded one. Each
candidate changes one thing of `BASE`: the training steps, the learning rate, how many trajectories are harvested, how
many steps each has and which of them are kept (the range of noise levels).

The choice is made by a rule that was written down before anything was measured (`chosen`): of all candidates whose mean
score over the tasks is at most `MARGIN` below the best, the one that asks the network least. The score is how far the
target's CLIP accuracy falls minus how far the surrounding concepts' falls. Writes results/presets.json with every
figure. Finished candidates are kept (job_store.py).

    python benchmarks/choose_presets.py
    python benchmarks/choose_presets.py --tiny     to see that it runs; writes below outputs/ only
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from job_store import FOLDER, ROOT, JobStore, environment
from measuring import Hits, PhaseMeter, accuracy, hits, only, plain

from concept_ablation.core.ablation import Task as Ablated
from concept_ablation.core.ablation import ablate
from concept_ablation.core.closed_form import ClosedFormSettings
from concept_ablation.core.delta import Delta
from concept_ablation.core.denoiser import Denoiser
from concept_ablation.core.evaluation import EvaluationSettings, make_jobs
from concept_ablation.core.files import write_json
from concept_ablation.core.hosts.diffusers import load_denoiser
from concept_ablation.core.metrics import Judge
from concept_ablation.core.presets import recipe
from concept_ablation.core.prompts import development
from concept_ablation.core.samplers import SampleSettings
from concept_ablation.core.tasks import Task, load_tasks

RESULTS = ROOT / "benchmarks" / "results" / "presets.json"
TASKS = Path(__file__).with_name("development_tasks.toml")
FIRST_SEED = 1000
MARGIN = 0.05
"""About half of what the accuracy of 40 pictures can tell."""


@dataclass(frozen=True)
class Candidate:
    """Settings of `fast`.

    Attributes:
        steps: of training; 0 leaves the closed form as it is.
        learning_rate: at Stable Diffusion's scale, as in core/presets.py.
        trajectories: harvested for the target, and as many for what is preserved.
        sampling_steps: of each trajectory.
        guidance: of sampling.
        kept: which share of the sampling steps gives rows, from the noisiest (0) to the last (1).
        batch: rows of a step that ablate, and as many that preserve.
        preserve_weight: of the rows that preserve.
        warm: whether training begins with the closed form.
    """

    steps: int = 40
    learning_rate: float = 2e-5
    trajectories: int = 16
    sampling_steps: int = 8
    guidance: float = 4.0
    kept: tuple[float, float] = (0.0, 1.0)
    batch: int = 16
    preserve_weight: float = 4.0
    warm: bool = True

    def keep(self) -> tuple[int, ...]:
        """The sampling steps that give rows, at least one."""
        first, last = (round(share * self.sampling_steps) for share in self.kept)
        return tuple(range(first, max(last, first + 1)))


BASE = Candidate()
CANDIDATES: dict[str, Candidate] = {
    "base": BASE,
    "closed form only": replace(BASE, steps=0),
    "no warm start": replace(BASE, warm=False),
    "20 steps": replace(BASE, steps=20),
    "80 steps": replace(BASE, steps=80),
    "rate / 2": replace(BASE, learning_rate=1e-5),
    "rate x 2": replace(BASE, learning_rate=4e-5),
    "8 trajectories": replace(BASE, trajectories=8),
    "32 trajectories": replace(BASE, trajectories=32),
    "4 sampling steps": replace(BASE, sampling_steps=4),
    "15 sampling steps": replace(BASE, sampling_steps=15),
    "noisy half": replace(BASE, kept=(0.0, 0.5)),
    "without the noisiest quarter": replace(BASE, kept=(0.25, 1.0)),
    "batch 8": replace(BASE, batch=8),
}


@dataclass(frozen=True)
class Sizes:
    """How much is drawn for each candidate, and the closed form's settings."""

    evaluation: EvaluationSettings = field(
        default_factory=lambda: EvaluationSettings(10, 4, SampleSettings(steps=12), first_seed=FIRST_SEED)
    )
    closed_form: ClosedFormSettings | None = None
    """None for the preset's."""


TINY = Sizes(
    EvaluationSettings(2, 1, SampleSettings(steps=2), first_seed=FIRST_SEED),
    ClosedFormSettings(prompts=2, preserve_prompts=2),
)
TINY_CANDIDATES = {
    "base": Candidate(steps=2, trajectories=2, sampling_steps=2, batch=4),
    "closed form only": Candidate(steps=0, trajectories=2, sampling_steps=2, batch=4),
}


@dataclass(frozen=True)
class Bench:
    """What every job needs: a fresh model, the judge, sizes, finished jobs and what all results depend on."""

    load: Callable[[], Denoiser]
    judge: Judge
    sizes: Sizes
    store: JobStore
    key: Mapping[str, Any]

    def before(self, task: Task) -> Hits:
        """Of the target and the surrounding concepts, without an edit."""
        return self.store.run(f"before-{task.name}", self._inputs(task), lambda: self._hits(task, self.model(), None))

    def try_out(self, task: Task, candidate: Candidate) -> dict[str, Any]:
        """Make a delta with a candidate and measure it."""
        inputs = {**self._inputs(task), "candidate": json.loads(json.dumps(asdict(candidate)))}
        return self.store.run(f"candidate-{task.name}", inputs, lambda: self._try_out(task, candidate))

    def model(self) -> Denoiser:
        """The pretrained model with development prompts in the place of its evaluation prompts."""
        denoiser = self.load()
        denoiser.prompt_source = development(denoiser.prompt_source)
        return denoiser

    def _try_out(self, task: Task, candidate: Candidate) -> dict[str, Any]:
        denoiser = self.model()
        with PhaseMeter(denoiser) as meter:
            delta = fast(denoiser, task, candidate, self.sizes.closed_form, meter)
        found = self._hits(task, denoiser, delta)
        return {"seconds": meter.seconds, "phases": meter.summary(), "hits": found}

    def _hits(self, task: Task, denoiser: Denoiser, delta: Delta | None) -> dict[str, list[list[int]]]:
        jobs = make_jobs(denoiser, [task.concept], [task.surrounding], self.sizes.evaluation)
        return hits(denoiser, self.judge, [job for job in jobs if job.role != "anchor"], self.sizes.evaluation, delta)

    def _inputs(self, task: Task) -> dict[str, Any]:
        described = [task.concept.kind, task.concept.target, task.concept.anchor, *task.surrounding]
        return {**self.key, "task": described, "sizes": json.loads(json.dumps(asdict(self.sizes)))}


def fast(
    denoiser: Denoiser, task: Task, candidate: Candidate, closed_form: ClosedFormSettings | None, meter: PhaseMeter
) -> Delta:
    """The delta of a task by the preset with a candidate's settings; None leaves the closed form's as they are."""
    made = recipe("fast", denoiser, task.concept.kind)
    if made.training is None or made.harvest is None:
        raise ValueError("the preset does not train on harvested rows")
    start = closed_form or made.closed_form
    if not candidate.steps:
        made = replace(made, harvest=None, training=None, closed_form=start)
    else:
        drawn = replace(
            made.harvest,
            trajectories=candidate.trajectories,
            preserve=candidate.trajectories,
            keep=candidate.keep(),
            sample=replace(made.harvest.sample, steps=candidate.sampling_steps, guidance=candidate.guidance),
        )
        training = replace(
            made.training,
            steps=candidate.steps,
            learning_rate=candidate.learning_rate * denoiser.learning_rate_scale,
            batch=candidate.batch,
            preserve_batch=candidate.batch,
            preserve_weight=candidate.preserve_weight,
        )
        made = replace(made, harvest=drawn, training=training, closed_form=start if candidate.warm else None)
    return ablate(denoiser, [Ablated(task.concept, task.surrounding)], made, on_progress=meter).delta


def row(bench: Bench, tasks: Sequence[Task], name: str, candidate: Candidate) -> dict[str, Any]:
    """One candidate on all tasks: its cost, its accuracies and its score."""
    found = [(task, bench.before(task), bench.try_out(task, candidate)) for task in tasks]
    phases = [phase for _, _, tried in found for phase in tried["phases"].values()]
    return {
        "candidate": name,
        "settings": asdict(candidate),
        "score": sum(score(before, tried["hits"], task) for task, before, tried in found) / len(found),
        # a backward pass costs about as much as two forward passes
        "passes": sum(phase["forward"] + 3 * phase["trained"] for phase in phases) / len(found),
        "seconds": sum(tried["seconds"] for _, _, tried in found) / len(found),
        "tasks": {
            task.name: {
                "seconds": tried["seconds"],
                "phases": tried["phases"],
                "target": [plain(accuracy(only(one, [task.concept.target]))) for one in (before, tried["hits"])],
                "surrounding": [plain(accuracy(only(one, task.surrounding))) for one in (before, tried["hits"])],
            }
            for task, before, tried in found
        },
    }


def score(before: Hits, after: Hits, task: Task) -> float:
    """How far the target's accuracy falls minus how far that of the surrounding concepts does."""
    falls = []
    for names in ([task.concept.target], task.surrounding):
        first, second = (accuracy(only(found, names)).value for found in (before, after))
        falls.append(first - second)
    return falls[0] - falls[1]


def chosen(rows: Sequence[Mapping[str, Any]], margin: float = MARGIN) -> str:
    """The candidate that asks the network least, of those whose score is at most `margin` below the best."""
    best = max(found["score"] for found in rows)
    enough = [found for found in rows if found["score"] >= best - margin]
    return min(enough, key=lambda found: found["passes"])["candidate"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes and one task, for a test; below outputs/")
    options = parser.parse_args()
    folder = FOLDER / "tiny" if options.tiny else FOLDER
    results = folder / "presets.json" if options.tiny else RESULTS
    candidates = TINY_CANDIDATES if options.tiny else CANDIDATES
    tasks = load_tasks(TASKS).tasks[: 1 if options.tiny else None]
    machine = environment()
    key = {"environment": machine, "model": load_denoiser().fingerprint()}
    sizes = TINY if options.tiny else Sizes()
    bench = Bench(load_denoiser, Judge.load(), sizes, JobStore(folder / "choose_presets"), key)
    rows: list[dict[str, Any]] = []
    for name, candidate in candidates.items():
        rows.append(row(bench, tasks, name, candidate))
        found = rows[-1]
        print(f"{name:30s} score {found['score']:+.2f}  {found['passes']:6.0f} passes  {found['seconds']:5.1f} s")
        write_json(
            results,
            {
                "environment": machine,
                "sizes": json.loads(json.dumps(asdict(sizes))),
                "margin": MARGIN,
                "chosen": chosen(rows) if len(rows) == len(candidates) else None,
                "tasks": [task.name for task in tasks],
                "rows": rows,
            },
        )
    print(f"chosen: {chosen(rows)}")


if __name__ == "__main__":
    main()
