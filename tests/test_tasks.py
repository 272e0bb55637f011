from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path

import pytest

from concept_ablation.core.concept import Concept, pairs
from concept_ablation.core.errors import AblationError
from concept_ablation.core.prompts import BUILT_IN
from concept_ablation.core.tasks import ListedTask, TaskList, load_tasks

pytest.importorskip("tomllib")

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools" / "emoji_diffusion"
EMOJI, PAPER = ROOT / "benchmarks" / "tasks.toml", ROOT / "benchmarks" / "paper_tasks.toml"
HINTS = json.loads((ROOT / "assets" / "emoji_diffusion" / "ablation_hints.json").read_text(encoding="utf-8"))
CATEGORIES: dict[str, str] = HINTS["categories"]
STYLES = ("noto", "blob", "twemoji", "fluent", "flat", "firefox", "emojione", "streamline")
# Unicode's groups, by the first concept of each: the order of Unicode goes through one after another.
FIRST_OF_GROUP = {
    "grinning face": "smileys-emotion",
    "monkey face": "animals-nature",
    "grapes": "food-drink",
    "locomotive": "travel-places",
    "soccer ball": "activities",
    "saxophone": "objects",
}

INSTANCE = """
[[task]]
name = "rooster"
kind = "instance"
target = "rooster"
anchor = "bird"
surrounding = ["turkey", "chicken", "owl", "duck"]
"""
MEMORIZED = """
[[task]]
name = "night-bus"
kind = "memorized"
target = "Night bus to Marzipan Square"
target_prompts = ["the bus at midnight"]
anchor = "a bus at night"
anchor_prompts = ["a bus at night", "a bus"]
picture = "night bus 1.png"
surrounding = ["bus", "ship", "owl", "duck", "car"]
"""


def of_kind(tasks: TaskList, kind: str) -> list[ListedTask]:
    return [task for task in tasks.tasks if task.concept.kind == kind]


def group_of_each() -> dict[str, str]:
    """Concept -> Unicode's group."""
    groups, group = {}, ""
    for name in CATEGORIES:
        group = FIRST_OF_GROUP.get(name, group)
        groups[name] = group
    return groups


def fill_up(target: str, leave: set[str], count: int) -> tuple[str, ...]:
    """The rule in the head of `tasks.toml`."""
    order, groups = list(CATEGORIES), group_of_each()
    place = order.index(target)
    own = [name for name in order if CATEGORIES[name] == CATEGORIES[target] and name not in leave]
    near = [name for name in order if groups[name] == groups[target] and name not in {*own, *leave}]
    near.sort(key=lambda name: (abs(order.index(name) - place), order.index(name)))
    return tuple([*own, *near][:count])


@pytest.mark.parametrize("path", [EMOJI, PAPER])
def test_lists_have_sixteen_tasks_that_can_be_trained(path: Path) -> None:
    tasks = load_tasks(path)
    assert [len(of_kind(tasks, kind)) for kind in ("instance", "style", "memorized")] == [4, 4, 8]
    for task in tasks.tasks:
        assert len(set(task.surrounding)) in (4, 5)
        assert not {task.concept.target, task.concept.anchor} & set(task.surrounding)
        assert pairs(task.concept, BUILT_IN)
        assert (task.picture is not None) == (task.concept.kind == "memorized")


@pytest.fixture(scope="module")
def emoji() -> TaskList:
    return load_tasks(EMOJI)


def test_emoji_tasks_are_known_to_the_model(emoji: TaskList) -> None:
    assert emoji.model is None
    for task in of_kind(emoji, "instance"):
        assert {task.concept.target, *task.surrounding} <= CATEGORIES.keys()
        # An anchor is the name of a category, of which the target is one.
        assert CATEGORIES[task.concept.target] == task.concept.anchor
    for task in of_kind(emoji, "style"):
        assert {task.concept.target, *task.surrounding} <= set(STYLES) and task.concept.anchor == HINTS["medium"]
    for task in of_kind(emoji, "memorized"):
        assert set(task.surrounding) <= CATEGORIES.keys()


def test_emoji_tasks_are_the_chosen_ones(emoji: TaskList) -> None:
    assert [task.concept.target for task in emoji.tasks[:8]] == [
        "tropical fish",
        "rooster",
        "sunflower",
        "pouting cat",
        "twemoji",
        "noto",
        "fluent",
        "blob",
    ]


def test_surrounding_styles_follow_the_rule(emoji: TaskList) -> None:
    for task in of_kind(emoji, "style"):
        assert task.surrounding == tuple(style for style in STYLES if style != task.concept.target)[:5]


def test_surrounding_instances_begin_with_their_category(emoji: TaskList) -> None:
    for task in of_kind(emoji, "instance"):
        own = [
            name
            for name, category in CATEGORIES.items()
            if category == task.concept.anchor and name not in (task.concept.target, task.concept.anchor)
        ]
        assert task.surrounding[: len(own)] == tuple(own[:5])


def test_memorized_tasks_are_the_scenes(emoji: TaskList, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    from memorized import SCENES

    tasks = of_kind(emoji, "memorized")
    assert [task.concept.target for task in tasks] == [scene.caption for scene in SCENES]
    assert [task.concept.anchor_prompts[2:] for task in tasks] == [scene.paraphrases for scene in SCENES]
    assert [task.surrounding[:3] for task in tasks] == [tuple(name for name, _ in scene.icons) for scene in SCENES]
    assert len({task.picture for task in tasks}) == 8
    for task in tasks:
        first, second, third = (f"an {name}" if name[0] in "aeiou" else f"a {name}" for name in task.surrounding[:3])
        plain = (f"{first} with {second}", f"{first}, {second} and {third}")
        assert task.concept.anchor_prompts[:2] == plain and task.concept.anchor == plain[0]


def test_every_emoji_task_follows_the_rule(emoji: TaskList) -> None:
    assert tuple(HINTS["styles"]) == STYLES and FIRST_OF_GROUP.keys() <= CATEGORIES.keys()
    for task in of_kind(emoji, "instance"):
        assert task.surrounding == fill_up(task.concept.target, {task.concept.target, task.concept.anchor}, 5)
    for task in of_kind(emoji, "memorized"):
        shown = task.surrounding[:3]
        assert task.surrounding[3:] == fill_up(shown[0], set(shown), 2)


def test_paper_tasks_are_those_of_the_paper() -> None:
    tasks = load_tasks(PAPER)
    assert tasks.model == "CompVis/stable-diffusion-v1-4"
    assert [(task.concept.target, task.concept.anchor) for task in tasks.tasks[:8]] == [
        ("Grumpy Cat", "cat"),
        ("Snoopy", "dog"),
        ("Nemo", "fish"),
        ("R2D2", "robot"),
        ("Van Gogh", "painting"),
        ("Salvador Dali", "painting"),
        ("Claude Monet", "painting"),
        ("Greg Rutkowski", "painting"),
    ]
    assert [len(task.surrounding) for task in tasks.tasks[:8]] == [4] * 4 + [5] * 4
    assert "BB8" in tasks.tasks[3].surrounding
    assert all(len(task.concept.anchor_prompts) == 5 for task in tasks.tasks[8:])


def write(folder: Path, text: str) -> Path:
    path = folder / "tasks.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_everything_is_read(tmp_path: Path) -> None:
    tasks = load_tasks(write(tmp_path, "\ufeffmodel = 'some/folder'\n" + INSTANCE + MEMORIZED))
    memorized = Concept(
        "Night bus to Marzipan Square",
        "a bus at night",
        "memorized",
        anchor_prompts=("a bus at night", "a bus"),
        target_prompts=("the bus at midnight",),
    )
    assert tasks == TaskList(
        (
            ListedTask("rooster", Concept("rooster", "bird"), ("turkey", "chicken", "owl", "duck")),
            ListedTask("night-bus", memorized, ("bus", "ship", "owl", "duck", "car"), "night bus 1.png"),
        ),
        "some/folder",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no task"),
        ("task = []", "there is no task"),
        ("task = 3", "there is no task"),
        ("task = [3]", "there is no task"),
        ("[[task]", "is not TOML"),
        ("model = 3\n" + INSTANCE, "model is not a text"),
        ("modell = 'x'\n" + INSTANCE, "the list has an unknown key modell"),
        (INSTANCE + INSTANCE, "several tasks are called 'rooster'"),
        (INSTANCE.replace('anchor = "bird"', ""), r"task 1 \(rooster\) has no anchor: add it"),
        (INSTANCE.replace('name = "rooster"', ""), "task 1 has no name"),
        (INSTANCE.replace('name = "rooster"', "name = 3"), "name of task 1 is not a text"),
        (INSTANCE.replace('name = "rooster"', 'name = "../Rooster"'), "small letters, digits and hyphens"),
        (INSTANCE.replace('kind = "instance"', 'kind = "object"'), "kind 'object' is unknown"),
        (INSTANCE.replace('anchor = "bird"', 'anchor = "Rooster"'), "target and the anchor are both"),
        (INSTANCE.replace('"turkey", ', ""), "There are 3 surrounding concepts: name 4 or 5"),
        (INSTANCE.replace('"turkey"', '"a", "b", "turkey"'), "There are 6 surrounding concepts"),
        (INSTANCE.replace('"turkey"', '"duck"'), "There are 3 surrounding concepts"),
        (INSTANCE.replace('"turkey"', '"BIRD"'), "'BIRD' is the target or the anchor itself"),
        (INSTANCE.replace('["turkey"', '["", "turkey"'), "surrounding of .* is not a list of texts"),
        (INSTANCE.replace('["turkey", "chicken", "owl", "duck"]', '"turkey"'), "surrounding of .* is not a list"),
        (INSTANCE + 'picture = "a.png"', "unknown key picture"),
        (MEMORIZED.replace('picture = "night bus 1.png"', ""), r"task 1 \(night-bus\) has no picture"),
        (MEMORIZED.replace("night bus 1.png", "../secret.png"), "not the plain name"),
        (MEMORIZED.replace("night bus 1.png", "picture.svg"), "not the plain name"),
        (MEMORIZED.replace('["a bus at night", "a bus"]', "[]"), "anchor_prompts of .* is not a list of texts"),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(AblationError, match=message) as error:
        load_tasks(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(AblationError, match="cannot be read"):
        load_tasks(tmp_path / "missing.toml")
    path = tmp_path / "latin.toml"
    path.write_bytes('model = "Zéphyrine"'.encode("latin-1"))
    with pytest.raises(AblationError, match="not TOML in UTF-8"):
        load_tasks(path)


def test_old_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = builtins.__import__

    def without_tomllib(name: str, *args: object, **options: object) -> object:
        if name == "tomllib":
            raise ModuleNotFoundError(name)
        return known(name, *args, **options)

    monkeypatch.delitem(sys.modules, "tomllib")
    monkeypatch.setattr(builtins, "__import__", without_tomllib)
    with pytest.raises(AblationError, match=r"tasks\.toml needs Python 3\.11"):
        load_tasks(write(tmp_path, INSTANCE))
