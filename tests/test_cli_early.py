"""What the command line finds before it loads a model, and what it says on streams that are not UTF-8."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from concept_ablation.cli import inputs
from concept_ablation.core import delta_file
from concept_ablation.tests.test_cli import ONE, PAIR, SMALL, deltas, refuse, run  # noqa: F401

TASKS = """
[[task]]
name = "rooster"
target = "rooster"
anchor = "bird"
kind = "instance"
surrounding = ["owl", "duck", "dove", "eagle"]
"""


@pytest.fixture
def unloaded(monkeypatch):
    """Fails the test where a model is loaded."""

    def load(*_):
        pytest.fail("a model was loaded")

    monkeypatch.setattr(inputs, "load_model", load)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "best"], "preset 'best'"),
        (["--subset", "brain"], "subset 'brain'"),
        (["--objective", "magic"], "objective 'magic'"),
        (["--steps", "0"], "at least one step"),
        (["--learning-rate", "nan"], "learning rate must be"),
        (["--surrounding", "tropical fish"], "'tropical fish' is the target or the anchor"),
        (["--target", "tropical fish", "--anchor", "shark"], "named twice"),
        (["--output", "file"], "file is a file: choose a folder"),
        (["--output", "a" * 300], "Cannot write"),
    ],
)
def test_ablate_loads_nothing_for_what_it_refuses(arguments, said, unloaded, refuse, tmp_path):  # noqa: F811
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert said in refuse("ablate", *SMALL, "--output", "out", *ONE, *PAIR, *arguments)


def test_leaks_and_attack_load_nothing_for_what_they_refuse(unloaded, refuse, deltas, tmp_path):  # noqa: F811
    strong, known = deltas / "strong.safetensors", ["--target", "a", "--anchor", "b"]
    for command in ("leaks", "attack"):
        start = [command, "--delta", strong, "--output", "out"]
        assert "names 0 targets" in refuse(*start)
        assert "--original is a memorized image" in refuse(*start, *known, "--original", "none.png")
        assert "no delta file" in refuse(command, "--delta", "none.safetensors", "--output", "out")
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "is a file" in refuse(*["leaks", *start[1:]], *known, "--feed-back", "file/further.txt")


def test_a_sweep_does_no_task_with_options_that_serve_none(refuse, tmp_path):  # noqa: F811
    (tmp_path / "tasks.toml").write_text(TASKS, encoding="utf-8")
    start = ["sweep", "tasks.toml", "--output", "out", "--workers", "1"]
    for arguments, said in (
        (["--preset", "best"], "preset 'best'"),
        (["--subset", "brain"], "subset 'brain'"),
        (["--eval-prompts", "0"], "at least one prompt"),
        (["--model", "nowhere/at/all"], "no model at nowhere"),
    ):
        assert said in refuse(*start, *arguments)


def test_no_command_writes_over_the_delta_that_it_reads(refuse, deltas, tmp_path):  # noqa: F811
    strong = deltas / "strong.safetensors"
    before = strong.read_bytes()
    for arguments in (
        ["export", "--delta", strong, "--rank", "1"],
        ["compress", "--delta", strong],
        ["merge", "--delta", f"{strong}:0.5", "--delta", strong],
    ):
        assert "is the delta itself" in refuse(*arguments, "--output", strong)
    assert strong.read_bytes() == before
    (tmp_path / "a.safetensors").mkdir()
    assert "is a folder" in refuse("export", "--delta", strong, "--rank", "1", "--output", "a.safetensors")


@pytest.mark.parametrize("command", ["merge", "sample"])
def test_a_path_that_cannot_be_looked_at_is_one_sentence(command, refuse):  # noqa: F811
    name = "a" * 300 + ".safetensors"
    rest = ["--output", "b.safetensors"] if command == "merge" else ["--prompt", "x", "--output", "out"]
    assert "cannot be used" in refuse(command, "--delta", name, *rest)


def test_a_stream_without_every_letter_ends_no_command(deltas, tmp_path):  # noqa: F811
    command = [sys.executable, "-m", "concept_ablation.cli", "merge", "--delta", deltas / "strong.safetensors"]
    ended = subprocess.run(
        [*command, "--output", tmp_path / "\u9b5a.safetensors"],
        env={**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"},
        capture_output=True,
        timeout=120,
    )
    assert ended.returncode == 0 and b"?.safetensors" in ended.stdout, ended.stderr
    assert delta_file.load(tmp_path / "\u9b5a.safetensors").layers
