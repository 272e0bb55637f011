"""Many concepts in one delta: what each costs, and what those that should stay suffer.

For each number of concepts, out of those that the embedded model's ablation_hints.json knows (each anchored on its
category), one delta is made in four ways:

closed form          the preset `instant`: one least-squares problem for all, one factorization for all layers
merged closed forms  one problem for each concept, the solutions added up
union                one training on the rows of all concepts, with --union-steps times the steps of one
merged               one training for each concept, the deltas added up

CLIP accuracy on held-out prompts, with 95 % intervals over concepts: of the targets, and of `--others` concepts that
nobody named (the interference: their change), though `instant` may preserve some of them, among the neighbours that it
chooses itself. These are the same for every number of concepts, of any category: the more concepts, the more of them
have a category in common with one. Finished jobs are kept (job_store.py), so that a run that was stopped goes on, and a
larger number of concepts uses the single deltas of a smaller one.

    python benchmarks/many_concepts.py                             1, 10, 30 and 100 concepts
    python benchmarks/many_concepts.py --concepts 10 --methods "closed form" union
    python benchmarks/many_concepts.py --tiny                      to see that it runs

With any option, results are written below outputs/ and not published.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from job_store import FOLDER, JobStore, environment, results_folder
from measuring import hits, plain

from concept_ablation.core import delta_file
from concept_ablation.core.ablation import Task, ablate, check_tasks
from concept_ablation.core.concept import Concept, evaluation_prompts
from concept_ablation.core.delta import Delta, merge
from concept_ablation.core.denoiser import Denoiser
from concept_ablation.core.errors import AblationError
from concept_ablation.core.evaluation import EvaluationJob, EvaluationSettings
from concept_ablation.core.files import write_json
from concept_ablation.core.hosts.diffusers import EMBEDDED_MODEL, load_denoiser, load_hints
from concept_ablation.core.metrics import Judge
from concept_ablation.core.presets import recipe
from concept_ablation.core.samplers import SampleSettings
from concept_ablation.core.statistics import difference_interval, mean_interval

METHODS = ("closed form", "merged closed forms", "union", "merged")
SEED = 7
_GROUPS = ("targets", "others")


@dataclass(frozen=True)
class Sizes:
    """How much is run.

    Attributes:
        preset: trains the deltas of "union" and "merged".
        training, dataset: what is replaced in it.
        union_steps: steps of "union" per concept, as a share of one concept's.
        closed_form: what is replaced in `instant`, which makes both closed forms.
        most: the largest number of concepts; the others are preserved or measured.
        neighbours: names that each ablation is told to preserve, if there are so many of its category.
        others: names that are measured and that no ablation was told of.
        evaluation: held-out prompts and seeds for each name.
    """

    preset: str = "fast"
    training: Mapping[str, Any] = field(default_factory=dict)
    dataset: Mapping[str, Any] = field(default_factory=dict)
    union_steps: float = 1.0
    closed_form: Mapping[str, Any] = field(default_factory=dict)
    most: int = 100
    neighbours: int = 3
    others: int = 30
    evaluation: EvaluationSettings = field(
        default_factory=lambda: EvaluationSettings(prompts=5, seeds=4, sample=SampleSettings(steps=12))
    )


TINY = Sizes(
    training={"steps": 2, "batch": 4},
    dataset={"images": 2, "preserve": 2, "sample": SampleSettings(steps=2)},
    closed_form={"prompts": 2, "preserve_prompts": 2},
    neighbours=1,
    others=2,
    evaluation=EvaluationSettings(prompts=1, seeds=1, sample=SampleSettings(steps=2)),
)


@dataclass(frozen=True)
class Choice:
    """Who is ablated, who is preserved and who is only measured, names with their categories."""

    tasks: tuple[Task, ...]
    others: tuple[Concept, ...]


def choose(categories: Mapping[str, str], count: int, sizes: Sizes) -> Choice:
    """Targets, neighbours and others out of the concepts that a model knows.

    The order is random but fixed: targets come from its front, others from its end and neighbours from in between, so
    that each target has the same neighbours whatever `count` is. A name that is a category is an anchor and no target.

    Raises:
        AblationError: there are not enough concepts.
    """
    names = sorted(categories.keys() - set(categories.values()))
    random.Random(SEED).shuffle(names)
    most = min(sizes.most, len(names) - sizes.others)
    if not 1 <= count <= most:
        raise AblationError(f"Of {len(names)} concepts at most {most} can be ablated: choose 1 to {most}, not {count}.")
    others, between = names[len(names) - sizes.others :], names[most : len(names) - sizes.others]
    tasks = []
    for target in names[:count]:
        near = [name for name in between if categories[name] == categories[target]]
        tasks.append(Task(Concept(target, categories[target]), tuple(near[: sizes.neighbours])))
    check_tasks(tasks)
    return Choice(tuple(tasks), tuple(Concept(name, categories[name]) for name in others))


@dataclass(frozen=True)
class Bench:
    """What every job needs: a fresh model, the judge, sizes, finished jobs and what all results depend on."""

    load: Callable[[], Denoiser]
    judge: Judge
    sizes: Sizes
    store: JobStore
    key: Mapping[str, Any]

    def make(self, method: str, tasks: Sequence[Task]) -> tuple[dict[str, Any], Path]:
        """Make the delta of `tasks`; what it cost, and its file. Merged ones cost what their parts and merging do."""
        name, inputs = f"make-{method.replace(' ', '-')}-{len(tasks)}", self._inputs(method, tasks)
        path = self.store.path(name, inputs, ".safetensors")

        def work() -> dict[str, Any]:
            if not method.startswith("merged"):
                denoiser = self.load()
                start = time.perf_counter()
                delta_file.save(self._edit(method, tasks, denoiser), path)
                return {"seconds": time.perf_counter() - start}
            parts = [self.make("closed form" if method == "merged closed forms" else "union", [task]) for task in tasks]
            start = time.perf_counter()
            total = merge((delta_file.load(part), 1.0) for _, part in parts)
            delta_file.save(total, path)
            spent = sum(made["seconds"] for made, _ in parts)
            return {"seconds": spent + time.perf_counter() - start}

        return self.store.run(name, inputs, work), path

    def accuracies(self, concepts: Sequence[Concept], method: str | None, tasks: Sequence[Task]) -> dict[str, float]:
        """CLIP accuracy of each concept against its category, with the delta of a method or without an edit."""
        inputs = {**self._inputs(method, tasks if method else ()), "measured": [concept.target for concept in concepts]}

        def work() -> dict[str, Any]:
            denoiser = self.load()
            count = self.sizes.evaluation.prompts
            jobs = [
                EvaluationJob(c.target, "target", c, evaluation_prompts(c.target, c, denoiser.prompt_source, count))
                for c in concepts
            ]
            delta: Delta | None = delta_file.load(self.make(method, tasks)[1]) if method else None
            found = hits(denoiser, self.judge, jobs, self.sizes.evaluation, delta)
            return {name: sum(map(sum, rows)) / sum(len(seeds) for seeds in rows) for name, rows in found.items()}

        return self.store.run(f"accuracy-{(method or 'none').replace(' ', '-')}-{len(concepts)}", inputs, work)

    def _edit(self, method: str, tasks: Sequence[Task], denoiser: Denoiser) -> Delta:
        if method == "closed form":
            made = recipe("instant", denoiser)
            assert made.closed_form is not None
            made = replace(made, closed_form=replace(made.closed_form, **self.sizes.closed_form))
            return ablate(denoiser, tasks, made).delta
        made = recipe(self.sizes.preset, denoiser, training=dict(self.sizes.training), dataset=dict(self.sizes.dataset))
        if made.training is None:
            raise AblationError(f"The preset '{self.sizes.preset}' trains nothing: choose another one for --preset.")
        if len(tasks) > 1:
            steps = max(1, round(made.training.steps * len(tasks) * self.sizes.union_steps))
            made = replace(made, training=replace(made.training, steps=steps))
        return ablate(denoiser, tasks, made).delta

    def _inputs(self, method: str | None, tasks: Sequence[Task]) -> dict[str, Any]:
        sizes = json.loads(json.dumps(asdict(self.sizes), default=asdict))
        named = [[task.concept.target, task.concept.anchor, *task.surrounding] for task in tasks]
        return {**self.key, "method": method, "tasks": named, "sizes": sizes}


def measure(
    bench: Bench, categories: Mapping[str, str], counts: Sequence[int], methods: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """One row for each number of concepts and method."""
    before = bench.accuracies(_measured(choose(categories, max(counts), bench.sizes)), None, ())
    for count in counts:
        choice = choose(categories, count, bench.sizes)
        for method in methods:
            made, path = bench.make(method, choice.tasks)
            after = bench.accuracies(_measured(choice), method, choice.tasks)
            yield {
                "concepts": count,
                "method": method,
                "seconds": made["seconds"],
                "seconds_per_concept": made["seconds"] / count,
                "bytes": path.stat().st_size,
                "targets": _change(before, after, [task.concept for task in choice.tasks]),
                "others": _change(before, after, choice.others),
                "accuracies": {name: [before[name], after[name]] for name in after},
            }


def _measured(choice: Choice) -> list[Concept]:
    return [*(task.concept for task in choice.tasks), *choice.others]


def _change(before: Mapping[str, float], after: Mapping[str, float], concepts: Sequence[Concept]) -> dict[str, Any]:
    """Mean accuracy of some concepts, before and after, and the change; what is resampled is concepts."""
    first, second = ([found[concept.target] for concept in concepts] for found in (before, after))
    return {
        "before": plain(mean_interval(first)),
        "after": plain(mean_interval(second)),
        "change": plain(difference_interval(first, second)),
    }


def _line(row: Mapping[str, Any]) -> str:
    changes = [f"{who} {row[who]['before']['value']:.2f} → {row[who]['after']['value']:.2f}" for who in _GROUPS]
    return f"{row['concepts']:4d} {row['method']:20s} {row['seconds_per_concept']:7.1f} s each   {'   '.join(changes)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, nargs="+", help="numbers of concepts; 1 10 30 100 if left out")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--preset", default=Sizes.preset, help="the preset that trains")
    parser.add_argument("--union-steps", type=float, default=Sizes.union_steps, help="of one concept's steps, for each")
    parser.add_argument("--others", type=int, help="concepts that are only measured")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for a test; results below outputs/")
    options = parser.parse_args()
    sizes = replace(TINY if options.tiny else Sizes(), preset=options.preset, union_steps=options.union_steps)
    if options.others is not None:
        sizes = replace(sizes, others=options.others)
    folder = FOLDER / "tiny" if options.tiny else FOLDER
    machine = environment()
    key = {"environment": machine, "model": load_denoiser().fingerprint()}
    bench = Bench(load_denoiser, Judge.load(), sizes, JobStore(folder / "many_concepts"), key)
    counts = options.concepts or ([2] if options.tiny else [1, 10, 30, 100])
    rows: list[dict[str, Any]] = []
    for row in measure(bench, load_hints(EMBEDDED_MODEL).categories, counts, options.methods):
        rows.append(row)
        print(_line(row), flush=True)
    # only now: what was published stays whole until there is something whole in its place
    results = results_folder(parser, options) / "many_concepts.json"
    write_json(results, {"environment": machine, "sizes": bench._inputs(None, ())["sizes"], "tasks": rows})


if __name__ == "__main__":
    main()
