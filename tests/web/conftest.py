"""Fixtures of the tests that serve the page: a real gradio server, and the page in a browser."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from concept_ablation.tests.conftest import unavailable

# gradio 4's own page asks for this script; without a network it goes without
GRADIO_4 = "https://cdnjs.cloudflare.com/ajax/libs/iframe-resizer/"


@dataclass(frozen=True)
class Site:
    """A page that is being served."""

    url: str
    output: Path


@contextlib.contextmanager
def served(app: Any, output: Path, **access: Any) -> Iterator[Site]:
    """Serve a page on a free port of this machine."""
    from concept_ablation.web.app import Access, serve

    _, url, _ = serve(app, output, Access(**access), port=None, prevent_thread_lock=True, quiet=True)
    try:
        yield Site(url, output)
    finally:
        app.close(verbose=False)


@pytest.fixture(scope="session")
def gradio() -> Any:
    """The installed gradio."""
    try:
        import gradio
    except ImportError:
        unavailable('there is no gradio: pip install "gradio>=4.40"')
    return gradio


@pytest.fixture(scope="session")
def site(gradio: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The stand-alone app as users get it, on the embedded model."""
    from concept_ablation.web.app import make_app

    output = tmp_path_factory.mktemp("app") / "out"
    output.mkdir()
    with served(make_app(output), output) as started:
        yield started


@pytest.fixture
def open_page(browser: Any, site: Site) -> Iterator[Callable[..., Any]]:
    """Open the app as somebody who was never there; what the page complains about fails the test."""
    contexts, complaints = [], []

    def opened(width: int = 1280) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("request", lambda request: complaints.append(request.url) if _is_foreign(request.url) else None)
        page.goto(f"{site.url}?__theme=light")
        page.get_by_label("Draw instead").wait_for()
        # gradio draws a page some 0.1 s before it listens to it; the key is set by the first event that runs
        page.wait_for_function("localStorage.getItem('concept-ablation-session')")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def _is_foreign(url: str) -> bool:
    return url.startswith("http") and not url.startswith(("http://127.0.0.1:", GRADIO_4))
