"""The real front end in a headless Chromium: loads workflows, turns them into API form, presses its buttons."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Locator, Page

from concept_ablation.tests.comfyui.client import Client

START_MILLISECONDS = 90_000
# What a user has clicked away by the second visit (the dialog about the checkpoint of an example, which no test
# downloads, would lie over whatever is tested next), and a map that would lie over the graph.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.Minimap.Visible": False,
}


class FrontEnd:
    """One page with the front end in it."""

    def __init__(self, page: Page, artefacts: Path) -> None:
        self.page = page
        self._artefacts = artefacts
        self.complaints: list[str] = []
        """Warnings and errors of the console that name this pack."""
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def open(self, workflow: dict[str, Any]) -> None:
        """Load a workflow as if its file had been dropped on the canvas."""
        # loading changes the object that it is given
        self.page.evaluate(
            "workflow => app.loadGraphData(workflow, true, true, 'test')", json.loads(json.dumps(workflow))
        )

    def fit(self) -> None:
        """Show the whole workflow."""
        self.page.keyboard.press(".")
        self.page.wait_for_timeout(1000)  # it glides there

    def unknown_nodes(self) -> list[str]:
        """Types of nodes of the open workflow that the front end does not know."""
        return self.page.evaluate(
            "() => app.graph.nodes.map(node => node.type).filter(type => !LiteGraph.registered_node_types[type])"
        )

    def alerts(self) -> list[str]:
        """Messages that pop up, as for a workflow that is not of the front end's format."""
        return self.page.locator(".p-toast-message").all_inner_texts()

    def wait_for_quiet(self) -> None:
        """Wait until messages of what was done before, such as a Cancel, have gone."""
        self.page.wait_for_function("() => !document.querySelector('.p-toast-message')", timeout=START_MILLISECONDS)

    def prompt(self) -> dict[str, Any]:
        """The open workflow in API form, as the Run button would queue it."""
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def set(self, node_type: str, **values: Any) -> None:
        """Set widgets of every node of a type."""
        changed = self.page.evaluate(
            """([type, values]) => {
                const nodes = app.graph.nodes.filter(node => node.type === type);
                for (const node of nodes)
                    for (const widget of node.widgets) if (widget.name in values) widget.value = values[widget.name];
                return nodes.length;
            }""",
            [node_type, values],
        )
        assert changed, f"the workflow has no {node_type}"

    def look_at(self, node_type: str) -> None:
        """Bring the first node of a type into view at full size: zoomed out, the front end hides the chart."""
        self.page.evaluate(
            """type => {
                const node = app.graph.nodes.find(node => node.type === type);
                app.canvas.ds.scale = 1;
                app.canvas.centerOnNode(node);
                app.canvas.setDirty(true, true);
            }""",
            node_type,
        )

    def button(self, name: str) -> Locator:
        """A button of the menu, by the name that a screen reader reads."""
        return self.page.get_by_role("button", name=name, exact=True).first

    def screenshot(self, name: str) -> None:
        """Keep what is seen."""
        self._artefacts.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=self._artefacts / f"{name}.png")

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type in ("warning", "error") and "Concept Ablation" in message.text:
            self.complaints.append(message.text)


@contextlib.contextmanager
def opened(address: str, client: Client, browser: Browser, artefacts: Path) -> Iterator[FrontEnd]:
    """The front end of the server at host:port; screenshots go to the folder `artefacts`."""
    client.post("/settings", SETTINGS)
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    front_end = FrontEnd(page, artefacts)
    page.goto(f"http://{address}/", timeout=START_MILLISECONDS)
    page.wait_for_function("window.app?.extensionManager && app.graph", timeout=START_MILLISECONDS)
    page.locator(".side-tool-bar-container, .side-bar-button").first.wait_for(timeout=START_MILLISECONDS)
    yield front_end
    page.close()
