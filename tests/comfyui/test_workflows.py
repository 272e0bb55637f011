"""Every example workflow, turned into API form by the real front end, runs to its end; what one draws is judged."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from concept_ablation.tests.comfyui.graph import ablation
from concept_ablation.tests.comfyui.workflows import JUDGED, RANDOM, SMALL, TINY, WORKFLOWS, made_small, of_type

FILES = sorted(WORKFLOWS.glob("*.json"))


@pytest.fixture(scope="module")
def saved_delta(client) -> str:
    """A delta in the loras folder, for workflows that load one."""
    made = ablation()
    save = made.graph.add("ConceptAblationSaveDelta", delta=made.ablate[2], name="for_loading")
    return client.run(made.graph).text(save.id).split(",")[0]


def test_there_are_workflows_for_every_use():
    names = " ".join(file.stem for file in FILES)
    for use in ("instance", "style", "memorized", "several", "saved", "sd15"):
        assert use in names
    assert all(file.with_suffix(".jpg").is_file() for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_workflow_runs_to_its_end(front_end, client, server, request, file):
    front_end.open(json.loads(file.read_text(encoding="utf-8")))
    assert front_end.unknown_nodes() == front_end.alerts() == []
    front_end.fit()
    front_end.screenshot(f"workflow-{file.stem}")
    prompt = front_end.prompt()
    own = of_type(prompt, "CheckpointLoaderSimple")
    for node in own:
        prompt[node]["inputs"]["ckpt_name"] = request.getfixturevalue("sd15")
    for node in of_type(prompt, "ConceptAblationLoadDelta", "LoraLoader"):
        key = "file" if "file" in prompt[node]["inputs"] else "lora_name"
        prompt[node]["inputs"][key] = request.getfixturevalue("saved_delta")
    reports = reports_of(server.base)
    sizes = RANDOM if own else SMALL if file.stem == JUDGED else TINY
    run = client.run(made_small(prompt, sizes), timeout=1200)
    assert run.status == "success", run.error
    assert set(run.executed) | set(run.cached) == set(prompt)
    for node in of_type(prompt, "SaveImage", "PreviewImage"):
        assert all(picture.std() > 2 for picture in client.pictures(run, node))
    if file.stem == JUDGED:
        (report,) = reports_of(server.base) - reports
        judge(json.loads(report.read_text(encoding="utf-8"))["concepts"])


def reports_of(base: Path) -> set[Path]:
    """Reports of evaluations."""
    return set((base / "output" / "concept_ablation").glob("*/report.json"))


def judge(rows: list[dict[str, Any]]) -> None:
    """The targets are gone; the rest, taken together because the pictures are few, is as it was."""
    for row in rows:
        if row["role"] == "target":
            assert row["after"]["clip_accuracy"] <= max(0.25, row["before"]["clip_accuracy"] / 2), row["name"]
    others = [row for row in rows if row["role"] != "target"]
    before, after = (fmean(row[when]["clip_accuracy"] for row in others) for when in ("before", "after"))
    assert after >= before - 0.1
