"""Take the README's two pictures of ComfyUI: examples as they are, in the real front end, on the embedded model.

python -m tools.comfyui.screenshot docs

writes comfyui_run.jpg (ablate_several_concepts after a run to the end, with all of its nodes) and comfyui_training.jpg
(ablate_instance, Ablate Concept in the middle of its training). Minutes, most of them ComfyUI's.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from concept_ablation.tests.comfyui.client import connected
from concept_ablation.tests.comfyui.frontend import FrontEnd, opened
from concept_ablation.tests.comfyui.server import ROOT, running
from concept_ablation.tools.browser import launch, main
from concept_ablation.tools.comfyui.get_comfyui import DEFAULT, comfyui_folder, dependencies_folder

SECONDS = 1800
STEPS_SEEN = 40
"""How often the chart has changed when the picture of a training is taken."""
AROUND = {"x": 80, "y": 130, "width": 1300, "height": 720}
"""What of the window has neither menus nor tools on it."""
_CHART = ".concept-ablation-canvas"
_EXTENT = """() => {
    const view = app.canvas.ds, canvas = app.canvas.canvas.getBoundingClientRect(), title = 30, rim = 12;
    const all = [...app.graph.groups, ...app.graph.nodes];
    const left = Math.min(...all.map(one => one.pos[0])), top = Math.min(...all.map(one => one.pos[1] - title));
    const right = Math.max(...all.map(one => one.pos[0] + one.size[0]));
    const bottom = Math.max(...all.map(one => one.pos[1] + one.size[1]));
    return {
        x: canvas.x + (left + view.offset[0]) * view.scale - rim,
        y: canvas.y + (top + view.offset[1]) * view.scale - rim,
        width: (right - left) * view.scale + 2 * rim,
        height: (bottom - top) * view.scale + 2 * rim,
    };
}"""


def take(folder: Path, chromium: str) -> None:
    """Start a ComfyUI in a temporary folder, run both examples and save the pictures."""
    comfyui, dependencies = comfyui_folder(DEFAULT), dependencies_folder(DEFAULT)
    with (
        tempfile.TemporaryDirectory() as base,
        running(comfyui, dependencies, Path(base)) as server,
        connected(server.address) as client,
        sync_playwright() as playwright,
    ):
        browser = launch(playwright, chromium)
        with opened(server.address, client, browser, Path(base)) as front_end:
            page = front_end.page
            _open(front_end, "ablate_instance")
            front_end.look_at("ConceptAblationAblate")
            front_end.button("Run").click()
            chart = page.locator(_CHART).first
            for _ in range(STEPS_SEEN):
                shown = chart.evaluate("canvas => canvas.toDataURL()")
                page.wait_for_function(
                    f"shown => document.querySelector('{_CHART}').toDataURL() !== shown",
                    arg=shown,
                    timeout=SECONDS * 1000,
                )
            page.screenshot(path=folder / "comfyui_training.jpg", quality=85, clip=AROUND)
            client.interrupt()
            client.wait_until_idle(SECONDS)
            front_end.wait_for_quiet()
            page.set_viewport_size({"width": 2000, "height": 1200})
            _open(front_end, "ablate_several_concepts")
            front_end.button("Run").click()
            page.wait_for_timeout(5000)  # until it is in the queue
            client.wait_until_idle(SECONDS)
            page.wait_for_timeout(3000)  # until the last pictures are loaded
            front_end.fit()
            page.screenshot(path=folder / "comfyui_run.jpg", quality=85, clip=page.evaluate(_EXTENT))
        browser.close()


def _open(front_end: FrontEnd, name: str) -> None:
    front_end.open(json.loads((ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8")))
    front_end.page.wait_for_timeout(1000)


if __name__ == "__main__":
    main("Take the README's two pictures of ComfyUI.", "folder to write them to", take)
