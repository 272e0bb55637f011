"""Prompts: grammars, templates, the built-in source, `prompts.json` and user files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from concept_ablation.core.errors import AblationError
from concept_ablation.core.prompts import (
    BUILT_IN,
    PromptSource,
    expand,
    fill,
    load_prompt_source,
    read_prompt_file,
)

FUNCTION_WORDS = {"a", "an", "the", "of", "in", "on", "at", "by", "with", "and", "to", "as", "{}"}

VALID = {
    "instance": {"train": [["a", "one "], ["{} emoji"], ["", ", smiling"]], "evaluation": [["the {} icon"]]},
    "style": {
        "train": [["an {} of"], ["a cat", "a dog"]],
        "evaluation": [["an {} of a car"]],
        "suffixes_train": [", {} style"],
        "suffixes_evaluation": [" by {}"],
    },
}


def words(templates: tuple[str, ...]) -> set[str]:
    return {word for template in templates for word in re.findall(r"[\w{}]+", template.casefold())}


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_expand_is_the_product_in_order_with_tidy_spaces() -> None:
    grammar = [["a photo of ", " a  drawing of"], ["a {}"], ["", " , at night", "in\ta box"]]
    assert expand(grammar) == [
        "a photo of a {}",
        "a photo of a {}, at night",
        "a photo of a {} in a box",
        "a drawing of a {}",
        "a drawing of a {}, at night",
        "a drawing of a {} in a box",
    ]


def test_expand_drops_duplicates() -> None:
    assert expand([["a {}", "a  {} "], ["", " "]]) == ["a {}"]


def test_expand_refuses_an_explosion() -> None:
    with pytest.raises(AblationError, match="more than 100,000 prompts"):
        expand([[str(i) for i in range(10)]] * 12)


@pytest.mark.parametrize(
    ("template", "name", "expected"),
    [
        ("a {}", "cat", "a cat"),
        ("a {}", "orange cat", "an orange cat"),
        ("a photo of an {}", "cat", "a photo of a cat"),
        ("A {} on a mat", "owl", "An owl on a mat"),
        ("An {}", "Snoopy", "A Snoopy"),
        ("a cute {}", "owl", "a cute owl"),
        ("the {}", "owl", "the owl"),
        ("Banana {}", "owl", "Banana owl"),
        ("a {}", r"C-3PO (robot) \1 {}", r"a C-3PO (robot) \1 {}"),
    ],
)
def test_fill_makes_the_article_agree(template: str, name: str, expected: str) -> None:
    assert fill(template, name) == expected


def test_built_in_is_large_enough_and_starts_varied() -> None:
    assert len(set(BUILT_IN.instance_train)) >= 200
    assert len(set(BUILT_IN.style_train)) >= 200
    assert min(len(set(BUILT_IN.instance_evaluation)), len(set(BUILT_IN.style_evaluation))) >= 10
    for templates in (BUILT_IN.instance_train, BUILT_IN.style_train):
        assert len({template.split("{}")[0] for template in templates[:20]}) >= 3
        assert len({template.split("{}")[1] for template in templates[:20]}) >= 8


@pytest.mark.parametrize(
    ("train", "evaluation"),
    [
        (BUILT_IN.instance_train, BUILT_IN.instance_evaluation),
        (BUILT_IN.style_train, BUILT_IN.style_evaluation),
        (BUILT_IN.style_suffixes_train, BUILT_IN.style_suffixes_evaluation),
    ],
)
def test_built_in_evaluation_shares_only_function_words(train: tuple[str, ...], evaluation: tuple[str, ...]) -> None:
    assert words(train) & words(evaluation) <= FUNCTION_WORDS
    for template in evaluation:
        assert words((template,)) - FUNCTION_WORDS, template


@pytest.mark.parametrize("bad", ["a photo", "{} and {}"])
@pytest.mark.parametrize("field", ["instance_train", "style_evaluation", "style_suffixes_train"])
def test_template_needs_one_slot(field: str, bad: str) -> None:
    good = dict.fromkeys(PromptSource.__dataclass_fields__, ())
    with pytest.raises(AblationError, match="exactly once"):
        PromptSource(**{**good, field: (bad,)})


@pytest.mark.parametrize("what", ["instance", "style", "style_suffixes"])
def test_training_and_evaluation_must_differ_after_normalisation(what: str) -> None:
    good = dict.fromkeys(PromptSource.__dataclass_fields__, ())
    both = {f"{what}_train": ("x {}", "a {} there"), f"{what}_evaluation": ("A  {}\tThere",)}
    with pytest.raises(AblationError, match="both in training and in evaluation"):
        PromptSource(**{**good, **both})


def test_load_prompt_source(tmp_path: Path) -> None:
    source = load_prompt_source(write(tmp_path / "prompts.json", VALID))
    assert sorted(source.instance_train) == [
        "a {} emoji",
        "a {} emoji, smiling",
        "one {} emoji",
        "one {} emoji, smiling",
    ]
    assert source.instance_evaluation == ("the {} icon",)
    assert sorted(source.style_train) == ["an {} of a cat", "an {} of a dog"]
    assert source.style_evaluation == ("an {} of a car",)
    assert source.style_suffixes_train == (", {} style",)
    assert source.style_suffixes_evaluation == (" by {}",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("style"), "the key style is missing"),
        (lambda c: c.update(instance=[]), "the key instance is missing or is not an object"),
        (lambda c: c["instance"].pop("evaluation"), "the key instance.evaluation is missing"),
        (lambda c: c["style"].pop("suffixes_train"), "the key style.suffixes_train is missing"),
        (lambda c: c["instance"].update(train=["a {}"]), "instance.train is not a list of slots"),
        (lambda c: c["instance"].update(train=[["a {}"], []]), "instance.train is not a list of slots"),
        (lambda c: c["instance"].update(train=[]), "instance.train is not a list of slots"),
        (lambda c: c["style"].update(evaluation=[["a {}", 3]]), "style.evaluation is not a list of slots"),
        (
            lambda c: c["style"].update(suffixes_evaluation=" by {}"),
            "style.suffixes_evaluation is not a list of strings",
        ),
        (lambda c: c["instance"].update(evaluation=[["a"], ["{} emoji"]]), "both in training and in evaluation"),
        (lambda c: c["instance"].update(train=[["emoji"]]), "exactly once"),
        (lambda c: c["style"].update(train=[["a", "b"]] * 20), "more than 100,000"),
    ],
)
def test_load_prompt_source_says_what_is_wrong(
    tmp_path: Path, change: Callable[[dict[str, dict[str, object]]], object], message: str
) -> None:
    content = json.loads(json.dumps(VALID))
    change(content)
    path = write(tmp_path / "prompts.json", content)
    with pytest.raises(AblationError, match=re.escape(message)) as raised:
        load_prompt_source(path)
    assert str(raised.value).count(str(path)) == 1


def test_load_prompt_source_rejects_what_is_not_json(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    with pytest.raises(AblationError, match="cannot be read"):
        load_prompt_source(path)
    path.write_text('{"instance":\n oops}', encoding="utf-8")
    with pytest.raises(AblationError, match=r"not valid JSON \(line 2"):
        load_prompt_source(path)
    write(path, ["a list"])
    with pytest.raises(AblationError, match="the key instance is missing"):
        load_prompt_source(path)


def test_read_prompt_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(
        "\ufeffa photo of a cat\r\n\r\n# a comment\n  # another\n  une   café\nA photo of a  CAT\n".encode()
    )
    assert read_prompt_file(path) == ("a photo of a cat", "une café")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"", "no prompt"), (b"# only\n\n \n", "no prompt"), (b"caf\xe9", "not UTF-8")],
)
def test_read_prompt_file_errors(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AblationError, match=message):
        read_prompt_file(path)


def test_read_prompt_file_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(AblationError, match="cannot be read"):
        read_prompt_file(tmp_path)
