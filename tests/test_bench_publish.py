"""What the repository shows of a benchmark."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from concept_ablation.core.bench.store import Store
from concept_ablation.core.errors import AblationError
from concept_ablation.core.files import write_json

ROOT = Path(__file__).resolve().parent.parent
KEY = "a" * 32


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    """The program, imported as Python finds it when it is run."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("publish_bench")


def conclusion(text: str, verdict: str) -> dict[str, object]:
    figure = {"value": 0.04, "low": 0.01, "high": 0.09, "n": 640}
    return {"text": text, "verdict": verdict, "reason": "Why.", "figure": figure, "tasks": 8, "validation": None}


@pytest.fixture
def results() -> dict[str, object]:
    row = {
        "task": "rooster",
        "kind": "instance",
        "anchor": "bird",
        "method": "balanced",
        "concepts_in_the_edit": 1,
        "failed": None,
        "diverged": "Training diverged at step 3.",
        "copies": None,
        "judges": {},
        "position_kept": None,
        "position_kept_surrounding": None,
    }
    return {
        "made": "2026-01-02T03:04:05+00:00",
        "environment": {"model": "m", "model_sha256": "0" * 64},
        "settings": {
            "protocol": {"prompts": 10, "images": 8, "steps": 25},
            "judges": ["J"],
            "default_method": {"instance": "balanced"},
        },
        "jobs": {"table": {"done": 1, "failed": 0, "of": 2}},
        "cost": {
            "measurements": 1,
            "of": 2,
            "rows": 2_000_000,
            "seconds": 7200,
            "devices": ["cpu"],
            "torch": ["2"],
        },
        "keys": [KEY],
        "tasks": [row],
        "claims": [conclusion("A claim.", "holds")],
        "goals": [conclusion("A goal.", "met")],
    }


def write_jobs(output: Path, *keys: str) -> dict[str, dict[str, object]]:
    jobs = {key: {"key": key, "result": {"word": "Süden"}} for key in keys}
    for key, job in jobs.items():
        write_json(output / "jobs" / f"{key}.json", job)
    return jobs


def test_a_benchmark_goes_on_from_published_measurements(script, results, tmp_path):
    output, root, other = tmp_path / "out", tmp_path / "repository", tmp_path / "other"
    write_json(output / "results.json", {**results, "keys": ["a" * 32, "b" * 32]})
    # the last is of settings that were given up, and of no figure
    jobs = write_jobs(output, "b" * 32, "a" * 32, "d" * 32)
    (output / "jobs" / f"{'c' * 32}.claim").touch()
    script.publish(output, root)
    own = {"key": "a" * 32, "result": {"word": "mine"}}
    write_json(other / "jobs" / f"{'a' * 32}.json", own)
    assert script.restore(other, root) == 1 and script.restore(other, root) == 0
    store = Store(other)
    assert store.result("a" * 32) == own and store.result("b" * 32) == jobs["b" * 32]
    assert store.result("d" * 32) is None


def test_nothing_is_published_of_figures_whose_measurements_are_not_known(script, results, tmp_path):
    output, root = tmp_path / "out", tmp_path / "repository"
    write_jobs(output, KEY)
    for incomplete in ({**results, "keys": [KEY, "b" * 32]}, {k: v for k, v in results.items() if k != "keys"}):
        write_json(output / "results.json", incomplete)
        with pytest.raises(AblationError, match="bench --report"):
            script.publish(output, root)
    assert not root.exists()


def test_results_are_put_between_markers_again_and_again(script, results, tmp_path):
    output, root = tmp_path / "out", tmp_path / "repository"
    (output / "plots").mkdir(parents=True)
    (output / "results.json").write_text(json.dumps(results), encoding="utf-8")
    write_jobs(output, KEY)
    Image.new("RGB", (4, 4)).save(output / "plots" / "objectives.png")
    root.mkdir()
    begin, end = script.MARKERS
    readme = f"# Title\n\n{begin}\noutdated\n{end}\n\nThe rest.\n"
    (root / "README.md").write_text(readme, encoding="utf-8")
    outdated = root / "benchmarks" / "results" / "bench" / "attack.png"
    outdated.parent.mkdir(parents=True)
    outdated.touch()
    for _ in range(2):
        script.publish(output, root)
        assert not outdated.exists()
        text = (root / "README.md").read_text("utf-8")
        assert text.startswith("# Title\n") and text.endswith("\nThe rest.\n") and "outdated" not in text
        assert text.count("A goal.") == text.count("A claim.") == 1 and "0.04 [0.01, 0.09], n = 640" in text
        assert "![objectives](benchmarks/results/bench/objectives.png)" in text
        assert "2.00 million network rows in 2.0 hours" in text and "Training diverged at step 3." in text
        own = (root / "benchmarks" / "README.md").read_text("utf-8")
        assert own.startswith("## The paper's experiments\n") and own.count(begin) == 1
        assert "![objectives](results/bench/objectives.png)" in own
    assert (root / "benchmarks" / "results" / "bench" / "objectives.png").is_file()
    assert json.loads((root / "benchmarks" / "results" / "bench.json").read_text("utf-8")) == results


def test_a_lonely_marker_is_refused(script, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"text {script.MARKERS[0]}", encoding="utf-8")
    with pytest.raises(ValueError, match="once each"):
        script.marked.put(path, script.MARKERS, "content", "# Heading")
