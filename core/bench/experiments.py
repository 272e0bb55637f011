"""The experiments by name, each a list of jobs: the paper's figures, and what goes beyond them.

Experiments share jobs: an edit that several of them need is made and measured once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..errors import AblationError
from ..tasks import ListedTask
from ..trainer import OBJECTIVES
from .plan import IMAGE_PRESETS, BenchJob, Edit, Method

INSTANCE_SUBSETS = ("cross-attn", "embedding", "full", "attn")
STYLE_SUBSETS = ("cross-attn", "embedding", "full")
MEMORIZED_SUBSETS = ("full", "cross-attn", "embedding")
ATTACKED_SUBSETS = ("embedding", "full")
"""Subsets whose edits are attacked beside the default method's."""


@dataclass(frozen=True)
class Selection:
    """What the experiments are run on."""

    tasks: tuple[ListedTask, ...]
    methods: tuple[Method, ...]
    """The first is the default one; comparisons of objectives and subsets are based on `varied`, memorized images on
    `forgetting`.
    """
    seeds: tuple[int, ...] = (0,)
    compare: int = 4
    """Tasks in each comparison of methods."""
    checkpoints: tuple[int, ...] = (25, 50, 100, 200)

    def of(self, *kinds: str) -> list[ListedTask]:
        """The tasks of some kinds, in the list's order."""
        return [task for task in self.tasks if task.concept.kind in kinds]

    def compared(self) -> list[ListedTask]:
        """Half of the tasks in a comparison instances, half styles; one sort makes up for a lack of the other."""
        instances, styles = self.of("instance"), self.of("style")
        half = max(self.compare - len(styles), self.compare // 2)
        chosen = instances[:half]
        return [*chosen, *styles[: self.compare - len(chosen)]]

    @property
    def base(self) -> Method:
        """The default method."""
        return self.methods[0]

    @property
    def varied(self) -> Method:
        """What comparisons of objectives and subsets vary: the first method that trains on images. The other presets
        have one objective and few subsets.
        """
        return next((method for method in self.methods if method.preset in IMAGE_PRESETS), Method())

    @property
    def forgetting(self) -> Method:
        """What memorized images are ablated by unless something else is compared: all weights, and the captions that
        the paper's pipeline chooses, as `ablate` does.
        """
        return replace(self.varied, subset="full", ranked=True)

    @property
    def default_labels(self) -> dict[str, str]:
        """The label of the default method, by kind of concept."""
        return {
            "instance": self.base.label,
            "style": self.base.label,
            "memorized": self.forgetting.label,
        }


def plan_jobs(names: Sequence[str], selection: Selection) -> dict[str, list[BenchJob]]:
    """The jobs of the named experiments, in order.

    Raises:
        AblationError: no such experiment.
    """
    for name in names:
        if name not in EXPERIMENTS:
            raise AblationError(f"There is no experiment {name!r}: choose some of {', '.join(EXPERIMENTS)}.")
    return {name: EXPERIMENTS[name](selection) for name in dict.fromkeys(names)}


def union(tasks: Sequence[ListedTask]) -> tuple[ListedTask, ...]:
    """Tasks as one edit can have them: no target is to be preserved beside another one, or drawn in its place.

    Raises:
        AblationError: the anchor of a task is the target of another one.
    """
    targets = {task.concept.target.casefold() for task in tasks}
    for task in tasks:
        if task.concept.anchor.casefold() in targets:
            raise AblationError(f"The anchor of {task.name} is ablated by another task: leave one of the two out.")
    return tuple(
        replace(task, surrounding=tuple(name for name in task.surrounding if name.casefold() not in targets))
        for task in tasks
    )


def sibling_anchors(task: ListedTask, count: int = 2) -> list[ListedTask]:
    """The task with other anchors: its first surrounding concepts, each no longer a surrounding one then.

    Of the same category as the target, as British Shorthair is of Grumpy Cat's in Fig. 11.
    """
    return [
        replace(
            task,
            concept=replace(task.concept, anchor=name, anchor_prompts=()),
            surrounding=tuple(other for other in task.surrounding if other != name),
        )
        for name in task.surrounding[:count]
    ]


def _evaluations(tasks: Sequence[ListedTask], methods: Sequence[Method], seeds: Sequence[int]) -> list[BenchJob]:
    return [
        BenchJob("evaluate", task, Edit((task,), method, seed))
        for method in methods
        for task in tasks
        for seed in seeds
    ]


def _table(selection: Selection) -> list[BenchJob]:
    """Every instance and style by every method, every memorized image by its own: the main results."""
    named = _evaluations(selection.of("instance", "style"), selection.methods, selection.seeds)
    return [*named, *_evaluations(selection.of("memorized"), [selection.forgetting], selection.seeds)]


def _objectives(selection: Selection) -> list[BenchJob]:
    """Fig. 3, 12 and 13: objectives against steps, as checkpoints of one training at a constant rate. Without negative
    guidance, which some of them could not have.
    """
    changes = {"constant_rate": True, "steps": selection.checkpoints[-1], "negative_guidance": 0.0}
    methods = [replace(selection.varied, objective=name, **changes) for name in OBJECTIVES]
    return [
        BenchJob("evaluate", task, Edit((task,), method, seed), step, robustness=False)
        for task in selection.compared()
        for method in methods
        for seed in selection.seeds
        for step in selection.checkpoints
    ]


def _subsets(selection: Selection) -> list[BenchJob]:
    """Fig. 4 and 6: parameter subsets on instances, with misspelled prompts."""
    methods = [replace(selection.varied, subset=name) for name in INSTANCE_SUBSETS]
    return _evaluations(selection.of("instance")[: selection.compare], methods, selection.seeds)


def _styles(selection: Selection) -> list[BenchJob]:
    """Fig. 4 and 8: parameter subsets on styles."""
    methods = [replace(selection.varied, subset=name) for name in STYLE_SUBSETS]
    return _evaluations(selection.of("style")[: selection.compare], methods, selection.seeds)


def _memorized(selection: Selection) -> list[BenchJob]:
    """Fig. 9 and Table 1: copies of memorized images, by subset, and the paper's choice of captions."""
    methods = [replace(selection.varied, subset=name) for name in MEMORIZED_SUBSETS]
    methods.append(selection.forgetting)
    return _evaluations(selection.of("memorized")[: selection.compare], methods, selection.seeds)


def _several(selection: Selection) -> list[BenchJob]:
    """Fig. 10: one model without all instances, one without all styles, against models without one of them each."""
    jobs = []
    for kind in ("instance", "style"):
        tasks = selection.of(kind)
        if len(tasks) < 2:
            continue
        joint = union(tasks)
        for seed in selection.seeds:
            jobs += [BenchJob("evaluate", task, Edit((task,), selection.base, seed)) for task in tasks]
            jobs += [BenchJob("evaluate", task, Edit(joint, selection.base, seed)) for task in joint]
    return jobs


def _anchors(selection: Selection) -> list[BenchJob]:
    """Fig. 11: other anchors for the same target."""
    tasks = selection.of("instance")[: max(1, selection.compare // 2)]
    every = [variant for task in tasks for variant in (task, *sibling_anchors(task))]
    return _evaluations(every, [selection.base], selection.seeds)


def _limits(selection: Selection) -> list[BenchJob]:
    """Fig. 14 a: prompts that still reach the target."""
    return [
        BenchJob("leaks", task, Edit((task,), selection.base, seed))
        for task in selection.compared()
        for seed in selection.seeds[:1]
    ]


def _attack(selection: Selection) -> list[BenchJob]:
    """Section 5: how hard it is to bring the target back by an optimised prompt, also from the pretrained model."""
    methods = [selection.base, *(replace(selection.varied, subset=name) for name in ATTACKED_SUBSETS)]
    return [
        BenchJob("attack", task, edit)
        for task in selection.compared()
        for edit in (None, *(Edit((task,), method, selection.seeds[0]) for method in methods))
    ]


EXPERIMENTS: dict[str, Callable[[Selection], list[BenchJob]]] = {
    "table": _table,
    "objectives": _objectives,
    "subsets": _subsets,
    "styles": _styles,
    "memorized": _memorized,
    "several": _several,
    "anchors": _anchors,
    "limits": _limits,
    "attack": _attack,
}
