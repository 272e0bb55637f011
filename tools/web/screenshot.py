"""Take the README's picture of the page: one ablation with the `balanced` preset on the embedded model, in Chromium.

python -m tools.web.screenshot docs/page.png
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from concept_ablation.tools.browser import launch, main
from concept_ablation.web.app import Access, make_app, serve

WIDTH = 1280
MINUTES = 30
FORM = {"Remove": "tropical fish", "Draw instead": "fish", "Keep as they are": "shark, octopus"}
MEASURED = {"Prompts a concept": "3", "Pictures a prompt": "2"}


def take(path: Path, chromium: str) -> None:
    """Serve the page from a temporary folder, ablate, and save what it shows at the end, from the top to the pictures
    of the neighbours.
    """
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        app = make_app(Path(folder))
        _, url, _ = serve(app, Path(folder), Access(), port=None, prevent_thread_lock=True, quiet=True)
        browser = launch(playwright, chromium)
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, device_scale_factor=1)
        page.goto(f"{url}?__theme=light")
        page.get_by_label("Draw instead").wait_for()
        page.wait_for_function("localStorage.getItem('concept-ablation-session')")
        page.get_by_text("Advanced", exact=True).click()
        for label, text in (FORM | MEASURED).items():
            page.get_by_label(label, exact=True).first.fill(text)
        page.get_by_text("Advanced", exact=True).click()
        page.get_by_role("button", name="Ablate", exact=True).click()
        page.locator(".ca-card.ca-done").wait_for(timeout=MINUTES * 60_000)
        page.locator(".ca-pairs img").last.wait_for()
        page.mouse.move(0, 0)
        bottom = page.locator(".ca-pairs").first.bounding_box()
        height = bottom["y"] + bottom["height"] + 24
        page.screenshot(
            path=path, full_page=True, clip={"x": 0, "y": 0, "width": WIDTH, "height": height}, animations="disabled"
        )
        browser.close()
        app.close(verbose=False)


if __name__ == "__main__":
    main("Take the README's picture of the page.", "PNG file to write", take)
