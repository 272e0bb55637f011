"""Chromium, as the tests and the programs that take screenshots start it, and the command line of the latter."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Playwright

NO_CHROMIUM = "there is no chromium: install it, or name its program in the environment variable CHROMIUM"


def find_chromium() -> str | None:
    """The browser's program, or None."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


def launch(playwright: Playwright, program: str) -> Browser:
    """Start the browser, without a window."""
    # Chromium's own sandbox does not start for root, which CI is
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    return playwright.chromium.launch(executable_path=program, args=["--no-sandbox"] if root else [])


def main(what: str, path: str, take: Callable[[Path, str], None]) -> None:
    """Command line.

    Args:
        what: what the program does, for its help.
        path: what its one argument is, for its help.
        take: told that path and the browser's program.
    """
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("path", type=Path, help=path)
    parser.add_argument("--chromium", default=find_chromium(), help="the browser's program")
    options = parser.parse_args()
    if options.chromium is None:
        parser.error(NO_CHROMIUM)
    take(options.path, options.chromium)
