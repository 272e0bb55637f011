"""The real front end: a workflow runs, the chart on Ablate Concept moves, Cancel stops it, pictures come at the end."""

from __future__ import annotations

import json

import pytest

from concept_ablation.tests.comfyui.workflows import WORKFLOWS

CHART = ".concept-ablation-canvas"
PICTURES = ".concept-ablation-picture"
DATASET, ABLATE = "ConceptAblationBuildDataset", "ConceptAblationAblate"
WAIT = 120_000


@pytest.fixture
def workflow(front_end):
    """An example workflow in the front end, made small."""
    front_end.wait_for_quiet()
    front_end.open(json.loads((WORKFLOWS / "ablate_instance.json").read_text(encoding="utf-8")))
    assert front_end.unknown_nodes() == front_end.alerts() == []
    front_end.set(DATASET, images=8, preserve=0, steps=4, keep_on_disk=False)
    front_end.look_at(ABLATE)
    return front_end


def drawn(front_end) -> str:
    """What the chart shows now, as a data URI."""
    return front_end.page.locator(CHART).first.evaluate("canvas => canvas.toDataURL()")


def wait_for_another_chart(front_end, shown: str) -> str:
    front_end.page.wait_for_function(
        f"shown => document.querySelector('{CHART}').toDataURL() !== shown", arg=shown, timeout=WAIT
    )
    return drawn(front_end)


def test_the_chart_moves_and_cancel_stops_the_training(workflow, client, server):
    workflow.set(ABLATE, steps=400, batch=2, seed=1)
    workflow.page.locator(CHART).first.wait_for()
    seen = [drawn(workflow)]
    workflow.button("Run").click()
    for _ in range(3):
        seen.append(wait_for_another_chart(workflow, seen[-1]))
    assert len(set(seen)) == len(seen)
    workflow.screenshot("training")
    before = server.log.count("Processing interrupted")
    workflow.button("Cancel current run").click()
    client.wait_until_idle()
    assert server.log.count("Processing interrupted") == before + 1
    workflow.page.get_by_text("stopped at").first.wait_for()
    workflow.screenshot("cancelled")
    assert workflow.complaints == []


def test_a_run_to_the_end_shows_pictures_before_and_after(workflow, client):
    workflow.set(ABLATE, steps=6, batch=2, seed=2)
    workflow.set("ConceptAblationEvaluate", prompts=1, images_per_prompt=1, steps=4)
    workflow.button("Run").click()
    workflow.page.locator(PICTURES).nth(7).wait_for(timeout=WAIT)
    client.wait_until_idle()
    workflow.page.wait_for_timeout(500)  # the browser hears of the end later than the server knows it
    workflow.screenshot("finished")
    history = client.json("/history")
    assert list(history.values())[-1]["status"]["status_str"] == "success"
    assert workflow.complaints == workflow.alerts() == []
