"""Fixtures of the tests that talk to a real ComfyUI server; tools/comfyui/get_comfyui.py makes that ComfyUI."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from concept_ablation.tests.comfyui.checkpoint import write_sd15
from concept_ablation.tests.comfyui.client import Client, connected
from concept_ablation.tests.comfyui.frontend import FrontEnd, opened
from concept_ablation.tests.comfyui.server import ROOT, Server, running

COMFYUI = Path(os.environ.get("CONCEPT_ABLATION_COMFYUI") or ROOT / ".comfyui" / "ComfyUI")
DEPENDENCIES = Path(os.environ.get("CONCEPT_ABLATION_COMFYUI_DEPS") or ROOT / ".comfyui" / "deps")
REQUIRED = bool(os.environ.get("CI") or os.environ.get("CONCEPT_ABLATION_REQUIRE_COMFYUI"))


def unavailable(reason: str) -> None:
    """Skip the test; fail it where everything must be there."""
    if REQUIRED:
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A ComfyUI server with the pack and the probe nodes."""
    if not (COMFYUI / "main.py").is_file():
        unavailable(f"there is no ComfyUI in {COMFYUI}: run python -m tools.comfyui.get_comfyui")
    with running(COMFYUI, DEPENDENCIES, tmp_path_factory.mktemp("comfyui")) as started:
        yield started


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[Client]:
    """The one connection to `server` that the tests share."""
    with connected(server.address) as connection:
        yield connection


@pytest.fixture(scope="session")
def comfyui(server: Server) -> tuple[Path, Path]:
    """The folders of the server's ComfyUI and of its dependencies."""
    return COMFYUI, DEPENDENCIES


@pytest.fixture(scope="session")
def sd15(server: Server) -> str:
    """The name of a small random SD1.5 checkpoint in the server's checkpoints folder."""
    name = "sd15-small.safetensors"
    write_sd15(server.base / "models" / "checkpoints" / name)
    return name


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's program."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        unavailable("there is no chromium: install it, or name its program in the environment variable CHROMIUM")
    return str(path)


@pytest.fixture(scope="session")
def front_end(
    server: Server, client: Client, chromium: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FrontEnd]:
    """The real front end; its screenshots are kept where CONCEPT_ABLATION_ARTEFACTS says, or with pytest's files."""
    folder = os.environ.get("CONCEPT_ABLATION_ARTEFACTS")
    artefacts = Path(folder) if folder else tmp_path_factory.mktemp("screenshots")
    with opened(server.address, client, chromium, artefacts) as shown:
        yield shown
