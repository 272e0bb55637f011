"""Fixtures of the tests that talk to a real ComfyUI server; tools/comfyui/get_comfyui.py makes that ComfyUI.

One worker of pytest-xdist runs all of these tests (tests/conftest.py). Server and front end end with the last of them:
they would take processor time from the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from concept_ablation.tests.comfyui.checkpoint import write_sd15
from concept_ablation.tests.comfyui.client import Client, connected
from concept_ablation.tests.comfyui.frontend import FrontEnd, opened
from concept_ablation.tests.comfyui.server import ROOT, Server, running
from concept_ablation.tests.conftest import unavailable

COMFYUI = Path(os.environ.get("CONCEPT_ABLATION_COMFYUI") or ROOT / ".comfyui" / "ComfyUI")
DEPENDENCIES = Path(os.environ.get("CONCEPT_ABLATION_COMFYUI_DEPS") or ROOT / ".comfyui" / "deps")


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A ComfyUI server with the pack and the probe nodes."""
    if not (COMFYUI / "main.py").is_file():
        unavailable(f"there is no ComfyUI in {COMFYUI}: run python -m tools.comfyui.get_comfyui")
    with running(COMFYUI, DEPENDENCIES, tmp_path_factory.mktemp("comfyui")) as started:
        yield started


@pytest.fixture(scope="package")
def client(server: Server) -> Iterator[Client]:
    """The one connection to `server` that the tests share."""
    with connected(server.address) as connection:
        yield connection


@pytest.fixture(scope="package")
def comfyui(server: Server) -> tuple[Path, Path]:
    """The folders of the server's ComfyUI and of its dependencies."""
    return COMFYUI, DEPENDENCIES


@pytest.fixture(scope="package")
def sd15(server: Server) -> str:
    """The name of a small random SD1.5 checkpoint in the server's checkpoints folder."""
    name = "sd15-small.safetensors"
    write_sd15(server.base / "models" / "checkpoints" / name)
    return name


@pytest.fixture(scope="package")
def front_end(server: Server, client: Client, browser: Any, artefacts: Path) -> Iterator[FrontEnd]:
    """The real front end."""
    with opened(server.address, client, browser, artefacts) as shown:
        yield shown
