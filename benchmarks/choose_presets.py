"""How the presets `fast` and `balanced` are chosen, and the rate of `paper`: a search on what no reported figure uses.

The targets are those of development_tasks.toml; the prompts are the last ten training templates of each sort, taken
out of training here (core/prompts.py `development`); the seeds are others too; the judge is the embedded one. The first
candidate is the preset as it was, every other one changes one thing of it.

The choice is made by a rule that was written down before anything was measured (`chosen`): of all candidates whose mean
score over the tasks is at most `MARGIN` below the best, the one that asks the network least. The score is how far the
target's CLIP accuracy falls minus how far the surrounding concepts' falls. The closed form alone is there to compare
with: it is the preset `instant`, so `fast` is chosen among the others. (This exception was made while the search ran;
the closed form alone came out 0.09 below the best.)

`paper` is what others are compared with, so it gets the learning rate with the best score, all else as published but
for the 25 sampling steps that speed.py gives it. Its own rate is one for Stable Diffusion, and the factor of the
embedded model was found for presets that preserve.

`subsets` chooses the learning rate of `balanced` for each subset that is not its default: the one with the best score.
Memorized pictures get that of `full`: all eight are in what is reported, so none is left to choose by.

`guidance` chooses the negative guidance of `balanced`, for instances and styles, and `quick_guidance` that of `fast`
and `instant`, by the rule of the first choice: of values that cost the same the smallest that is good enough, as
colours grow stronger with it.

Writes results/preset_PRESET.json with every figure. Finished candidates are kept (job_store.py).

    python benchmarks/choose_presets.py fast
    python benchmarks/choose_presets.py balanced
    python benchmarks/choose_presets.py paper
    python benchmarks/choose_presets.py subsets
    python benchmarks/choose_presets.py guidance
    python benchmarks/choose_presets.py quick_guidance
    python benchmarks/choose_presets.py fast --again    choose again among the candidates in results/preset_fast.json
    python benchmarks/choose_presets.py fast --tiny     to see that it runs; writes below outputs/ only
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from job_store import FOLDER, RESULTS, JobStore, environment
from measuring import Hits, accuracy, costs, hits, only, plain

from concept_ablation.core.ablation import Task as Ablated
from concept_ablation.core.ablation import ablate
from concept_ablation.core.bench.pace import dataset_rows, training_rows
from concept_ablation.core.concept import Kind
from concept_ablation.core.delta import Delta
from concept_ablation.core.denoiser import Denoiser
from concept_ablation.core.errors import Diverged
from concept_ablation.core.evaluation import EvaluationSettings, make_jobs
from concept_ablation.core.files import write_json
from concept_ablation.core.hosts.diffusers import load_denoiser
from concept_ablation.core.metrics import Judge
from concept_ablation.core.presets import Recipe, recipe
from concept_ablation.core.prompts import development
from concept_ablation.core.samplers import SampleSettings
from concept_ablation.core.tasks import ListedTask, load_tasks

TASKS = Path(__file__).with_name("development_tasks.toml")
FIRST_SEED = 1000
MARGIN = 0.05
"""About half of what the accuracy of 40 pictures can tell."""
BEST = ("paper", "subsets")
"""Where the best is chosen, and no cheaper one that comes near it."""
GROUPED = ("subsets", "guidance", "quick_guidance")
"""Where something is chosen for each group of candidates: what their names begin with."""
RATES = {"full": (1, 0.3, 0.1, 0.03), "attn": (1, 0.3), "embedding": (1, 0.3, 0.1)}
"""By subset: factors on a hundred times the rate for Stable Diffusion."""
GUIDANCE = (0.0, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Candidate:
    """What is changed of a preset's recipe.

    Attributes:
        training: factors on fields of `TrainSettings`.
        drawn: factors on fields of `DatasetSettings` or `HarvestSettings`.
        sampling_steps: factor on the steps of each image or trajectory.
        kept: which share of the steps of a trajectory gives rows, from the noisiest (0) to the last (1).
        warm: whether training begins with the closed form, where the preset's does.
        trained: False leaves the closed form as it is.
        subset: what is trained in place of the preset's subset.
        preset: what is changed, where that is not what is chosen for.
        one_rate: take the model's factor on learning rates, whatever it says of the subset.
        negative_guidance: replaces the preset's.
    """

    training: Mapping[str, float] = field(default_factory=dict)
    drawn: Mapping[str, float] = field(default_factory=dict)
    sampling_steps: float = 1.0
    kept: tuple[float, float] = (0.0, 1.0)
    warm: bool = True
    trained: bool = True
    subset: str | None = None
    preset: str | None = None
    one_rate: bool = False
    negative_guidance: float | None = None

    def recipe(self, preset: str, denoiser: Denoiser, kind: Kind) -> Recipe:
        """The preset's recipe with these changes."""
        if self.one_rate:
            denoiser.learning_rate_scales = {}
        named = {"subset": self.subset, "negative_guidance": self.negative_guidance}
        made = recipe(self.preset or preset, denoiser, kind, **named)
        if not self.trained or made.training is None:
            return replace(made, harvest=None, training=None)
        if not self.warm:
            made = replace(made, closed_form=None)
        drawn = made.dataset or made.harvest
        assert drawn is not None
        steps = max(1, round(drawn.sample.steps * self.sampling_steps))
        drawn = replace(_scaled(drawn, self.drawn), sample=replace(drawn.sample, steps=steps))
        training = _scaled(made.training, self.training)
        if made.harvest is None:
            return replace(made, dataset=drawn, training=training)
        return replace(made, harvest=replace(drawn, keep=kept_steps(self.kept, steps)), training=training)


def kept_steps(kept: tuple[float, float], steps: int) -> tuple[int, ...]:
    """The sampling steps between two shares of all, at least one."""
    first, last = (round(share * steps) for share in kept)
    return tuple(range(first, max(last, first + 1)))


def _scaled(settings: Any, factors: Mapping[str, float]) -> Any:
    """Settings with some of their fields multiplied; whole numbers stay whole, and at least 1."""
    changed: dict[str, float] = {}
    for name, factor in factors.items():
        value = getattr(settings, name)
        changed[name] = max(1, round(value * factor)) if isinstance(value, int) else value * factor
    return replace(settings, **changed)


def _guidance(preset: str) -> dict[str, Candidate]:
    return {f"{preset}, {eta:g}": Candidate(preset=preset, negative_guidance=eta) for eta in GUIDANCE}


_AS_IT_IS = {"as it is": Candidate()}
_BOTH: dict[str, Candidate] = {
    "steps / 2": Candidate({"steps": 0.5}),
    "steps x 2": Candidate({"steps": 2}),
    "rate / 2": Candidate({"learning_rate": 0.5}),
    "rate x 2": Candidate({"learning_rate": 2}),
    "rate x 4": Candidate({"learning_rate": 4}),
    "preservation / 4": Candidate({"preserve_weight": 0.25}),
}
CANDIDATES: dict[str, dict[str, Candidate]] = {
    "fast": {
        **_AS_IT_IS,
        "closed form only": Candidate(trained=False),
        "no closed form": Candidate(warm=False),
        **_BOTH,
        "trajectories / 2": Candidate(drawn={"trajectories": 0.5, "preserve": 0.5}),
        "trajectories x 2": Candidate(drawn={"trajectories": 2, "preserve": 2}),
        "sampling steps / 2": Candidate(sampling_steps=0.5),
        "noisy half": Candidate(kept=(0.0, 0.5)),
        "without the noisiest quarter": Candidate(kept=(0.25, 1.0)),
        "batch x 2": Candidate({"batch": 2, "preserve_batch": 2}),
        "the way up only": Candidate(subset="cross-attn-up"),
    },
    "balanced": {
        **_AS_IT_IS,
        **_BOTH,
        "images / 2": Candidate(drawn={"images": 0.5, "preserve": 0.5}),
    },
    "paper": {
        "as it is": Candidate(sampling_steps=0.5),
        **{
            f"rate / {divisor}": Candidate({"learning_rate": 1 / divisor}, sampling_steps=0.5)
            for divisor in (3, 10, 30)
        },
    },
    "subsets": {
        f"{subset}, rate x {factor:g}": Candidate(
            {"learning_rate": factor}, subset=subset, preset="balanced", one_rate=True
        )
        for subset, factors in RATES.items()
        for factor in factors
    },
    "guidance": _guidance("balanced"),
    "quick_guidance": {**_guidance("fast"), **_guidance("instant")},
}


@dataclass(frozen=True)
class Sizes:
    """How much is drawn for each candidate.

    Attributes:
        evaluation: prompts and seeds of the accuracies.
        extra: a change that every candidate has beside its own (small ones for tests).
    """

    evaluation: EvaluationSettings = field(
        default_factory=lambda: EvaluationSettings(10, 4, SampleSettings(steps=12), first_seed=FIRST_SEED)
    )
    extra: Callable[[Recipe], Recipe] | None = None


def _tiny(made: Recipe) -> Recipe:
    """A recipe of a few rows."""
    if made.training is None:
        return made
    name = "harvest" if made.harvest is not None else "dataset"
    drawn = getattr(made, name)
    small = {"trajectories" if made.harvest else "images": 2, "preserve": min(2, drawn.preserve)}
    if made.harvest is not None:
        small["keep"] = ()
    drawn = replace(drawn, sample=SampleSettings(steps=2), **small)
    training = replace(made.training, steps=2, batch=4, preserve_batch=min(4, made.training.preserve_batch))
    return replace(made, training=training, **{name: drawn})


TINY = Sizes(EvaluationSettings(2, 1, SampleSettings(steps=2), first_seed=FIRST_SEED), _tiny)


@dataclass(frozen=True)
class Bench:
    """What every job needs: preset, fresh model, judge, sizes, finished jobs and what all results depend on."""

    preset: str
    load: Callable[[], Denoiser]
    judge: Judge
    sizes: Sizes
    store: JobStore
    key: Mapping[str, Any]

    def before(self, task: ListedTask) -> Hits:
        """Of the target and the surrounding concepts, without an edit."""
        return self.store.run(f"before-{task.name}", self._inputs(task), lambda: self._hits(task, self.model(), None))

    def try_out(self, task: ListedTask, candidate: Candidate) -> dict[str, Any]:
        """Make a delta with a candidate and measure it."""
        denoiser = self.model()
        made = candidate.recipe(self.preset, denoiser, task.concept.kind)
        made = self.sizes.extra(made) if self.sizes.extra else made
        inputs = {**self._inputs(task), "recipe": _stored(made)}
        return self.store.run(f"{self.preset}-{task.name}", inputs, lambda: self._try_out(task, denoiser, made))

    def model(self) -> Denoiser:
        """The pretrained model with development prompts in the place of its evaluation prompts."""
        denoiser = self.load()
        denoiser.prompt_source = development(denoiser.prompt_source)
        return denoiser

    def _try_out(self, task: ListedTask, denoiser: Denoiser, made: Recipe) -> dict[str, Any]:
        # images that several candidates train on are drawn once
        drawn = {**self._inputs(task), "dataset": asdict(made.dataset)} if made.dataset else None
        folder = self.store.path(f"dataset-{task.name}", drawn, "") if drawn else None
        tasks = [Ablated(task.concept, task.surrounding)]
        diverged, done = None, None
        start = time.perf_counter()
        try:
            done = ablate(denoiser, tasks, made, directory=folder)
        except Diverged as error:
            diverged = str(error)
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "phases": costs(done.phases if done else (), seconds),
            "rows": dataset_rows(made, 1) + training_rows(made),
            "recipe": _stored(made),
            # an ablation that failed has changed nothing
            "hits": self._hits(task, denoiser, done.delta if done else None),
            "diverged": diverged,
        }

    def _hits(self, task: ListedTask, denoiser: Denoiser, delta: Delta | None) -> dict[str, list[list[int]]]:
        jobs = make_jobs(denoiser, [task.concept], [task.surrounding], self.sizes.evaluation)
        return hits(denoiser, self.judge, [job for job in jobs if job.role != "anchor"], self.sizes.evaluation, delta)

    def _inputs(self, task: ListedTask) -> dict[str, Any]:
        described = [task.concept.kind, task.concept.target, task.concept.anchor, *task.surrounding]
        return {**self.key, "task": described, "evaluation": _stored(self.sizes.evaluation)}


def _stored(settings: Any) -> Any:
    """Settings as JSON gives them back, so that a result is the same when it is read again."""
    return json.loads(json.dumps(asdict(settings)))


def row(bench: Bench, tasks: Sequence[ListedTask], name: str, candidate: Candidate) -> dict[str, Any]:
    """One candidate on all tasks: its cost, its accuracies and its score."""
    found = [(task, bench.before(task), bench.try_out(task, candidate)) for task in tasks]
    return {
        "candidate": name,
        "score": sum(score(before, tried["hits"], task) for task, before, tried in found) / len(found),
        "rows": sum(tried["rows"] for _, _, tried in found) / len(found),
        "tasks": {
            task.name: {
                "recipe": tried["recipe"],
                "seconds": tried["seconds"],
                "phases": tried["phases"],
                "diverged": tried["diverged"],
                "target": [plain(accuracy(only(one, [task.concept.target]))) for one in (before, tried["hits"])],
                "surrounding": [plain(accuracy(only(one, task.surrounding))) for one in (before, tried["hits"])],
            }
            for task, before, tried in found
        },
    }


def score(before: Hits, after: Hits, task: ListedTask) -> float:
    """How far the target's accuracy falls minus how far that of the surrounding concepts does."""
    falls = []
    for names in ([task.concept.target], task.surrounding):
        first, second = (accuracy(only(found, names)).value for found in (before, after))
        falls.append(first - second)
    return falls[0] - falls[1]


def choice(preset: str, rows: Sequence[Mapping[str, Any]], margin: float) -> str | dict[str, str]:
    """What is chosen for a preset, or by group of candidates."""
    if preset not in GROUPED:
        return chosen(rows, margin)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for found in rows:
        groups.setdefault(found["candidate"].partition(",")[0], []).append(found)
    return {name: chosen(found, margin) for name, found in groups.items()}


def chosen(rows: Sequence[Mapping[str, Any]], margin: float) -> str:
    """The candidate that asks the network least, of those whose score is at most `margin` below the best.
    Where some are trained, one of them.
    """
    best = max(found["score"] for found in rows)
    # a row without a training has no network rows
    trained = [found for found in rows if found["rows"]] or rows
    enough = [found for found in trained if found["score"] >= best - margin]
    return min(enough, key=lambda found: found["rows"])["candidate"]


def line(found: Mapping[str, Any]) -> str:
    """A row for people: score, network rows, and target and surrounding accuracy of each task after the edit."""
    tasks = [
        f"{name} {task['target'][0]['value']:.2f} -> {task['target'][1]['value']:.2f}"
        f" ({task['surrounding'][0]['value']:.2f} -> {task['surrounding'][1]['value']:.2f})"
        for name, task in found["tasks"].items()
    ]
    return f"{found['candidate']:28s} {found['score']:+.2f} {found['rows']:7.0f} rows  {', '.join(tasks)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=CANDIDATES)
    parser.add_argument("--tasks", nargs="+", help="names of tasks, to try something: no choice is made or written")
    parser.add_argument("--candidates", nargs="+", help="names of candidates, likewise")
    parser.add_argument("--again", action="store_true", help="only choose again among what was measured")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes and one task, for a test; below outputs/")
    options = parser.parse_args()
    folder = FOLDER / "tiny" if options.tiny else FOLDER
    results = (folder if options.tiny else RESULTS) / f"preset_{options.preset}.json"
    if options.again:
        found = json.loads(results.read_text(encoding="utf-8"))
        again = choice(options.preset, found["rows"], found["margin"])
        write_json(results, {**found, "chosen": again})
        print(f"chosen: {again}")
        return
    tasks = load_tasks(TASKS).tasks[: 1 if options.tiny else None]
    tasks = [task for task in tasks if task.name in (options.tasks or [task.name])]
    candidates = CANDIDATES[options.preset]
    candidates = {name: candidates[name] for name in options.candidates or candidates}
    machine = environment()
    key = {"environment": machine, "model": load_denoiser().fingerprint()}
    sizes = TINY if options.tiny else Sizes()
    bench = Bench(options.preset, load_denoiser, Judge.load(), sizes, JobStore(folder / "choose_presets"), key)
    rows: list[dict[str, Any]] = []
    for name, candidate in candidates.items():
        rows.append(row(bench, tasks, name, candidate))
        print(line(rows[-1]), flush=True)
    if options.tasks or options.candidates:
        return
    margin = 0.0 if options.preset in BEST else MARGIN
    made = choice(options.preset, rows, margin)
    write_json(
        results,
        {
            "preset": options.preset,
            "environment": machine,
            "evaluation": _stored(sizes.evaluation),
            "margin": margin,
            "chosen": made,
            "tasks": [task.name for task in tasks],
            "rows": rows,
        },
    )
    print(f"chosen: {made}")


if __name__ == "__main__":
    main()
