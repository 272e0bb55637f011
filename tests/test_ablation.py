"""Tasks that contradict each other are refused before anything is drawn."""

from __future__ import annotations

import pytest

from concept_ablation.core.ablation import Task, check_tasks
from concept_ablation.core.concept import Concept
from concept_ablation.core.errors import AblationError

SHARK, CAT = Concept("shark", "fish"), Concept("grumpy cat", "cat")


def test_independent_tasks_pass_until_one_comes_that_is_not():
    tasks = [Task(SHARK, ("octopus", "cat")), Task(CAT, ("lion",))]
    assert check_tasks(tasks) is None
    with pytest.raises(AblationError, match="'lion' is to be preserved beside 'grumpy cat'"):
        check_tasks([*tasks, Task(Concept("lion", "animal"))])


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([Task(SHARK), Task(CAT, ("Shark",))], "to be preserved beside 'grumpy cat'"),
        ([Task(CAT), Task(Concept("lion", "Grumpy Cat"))], "the anchor of 'lion'"),
        ([Task(SHARK), Task(Concept("Shark", "animal"))], "named twice"),
        ([Task(SHARK, ("fish",))], "leave it out"),
    ],
)
def test_contradictions_are_refused(tasks, message):
    with pytest.raises(AblationError, match=message):
        check_tasks(tasks)
