"""Starts and stops a real ComfyUI server that has the repository in its custom_nodes folder."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACK = "concept-ablation"
START_SECONDS = 180


@dataclass(frozen=True)
class Server:
    """A running server."""

    address: str
    """host:port"""
    base: Path
    """The folder that has its custom_nodes, models, input, output."""
    log_file: Path
    process: subprocess.Popen[bytes]

    @property
    def log(self) -> str:
        """All that it has printed so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")


def link(folder: Path, target: Path) -> None:
    """Make `folder` a link to the folder `target`, on Windows one that needs no privilege."""
    if os.name == "nt":
        import _winapi

        _winapi.CreateJunction(str(target), str(folder))
    else:
        folder.symlink_to(target, target_is_directory=True)


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def running(comfyui: Path, dependencies: Path, base: Path, *options: str) -> Iterator[Server]:
    """A server whose folders are all below `base`, on the CPU; it is stopped at the end of the block.

    Raises:
        RuntimeError: it ended, or did not answer in time; with the end of its log.
    """
    for name in ("custom_nodes", "models/checkpoints", "models/loras", "input", "output", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    link(base / "custom_nodes" / PACK, ROOT)
    probes = Path(__file__).with_name("probe_nodes.py")
    (base / "custom_nodes" / probes.name).write_bytes(probes.read_bytes())
    address = f"127.0.0.1:{free_port()}"
    command = [
        *(sys.executable, str(comfyui / "main.py"), "--cpu", "--listen", "127.0.0.1"),
        *("--port", address.split(":")[1], "--base-directory", str(base)),
        *("--database-url", "sqlite:///:memory:", "--disable-api-nodes", *options),
    ]
    environment = {**os.environ, "PYTHONPATH": str(dependencies), "PYTHONUTF8": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    log = base / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=comfyui, env=environment, stdout=output, stderr=subprocess.STDOUT)
    server = Server(address, base, log, process)
    try:
        _wait(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        # a junction must go before a recursive delete could follow it
        (base / "custom_nodes" / PACK).unlink()


def _wait(server: Server) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            opener.open(f"http://{server.address}/system_stats", timeout=5).close()
            return
        time.sleep(0.2)
    raise RuntimeError(f"ComfyUI did not start:\n{server.log[-8000:]}")
