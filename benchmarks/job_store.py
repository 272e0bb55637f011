"""Results of finished jobs, one JSON file each, so that a benchmark that was stopped goes on where it was.

A job is known by its name and by everything that its result depends on: settings, the model's fingerprint, the machine,
the commit. Change one of them and it is done again; results of other inputs stay beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from concept_ablation.core.files import write_json

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "outputs" / "benchmarks"
"""Where the programs keep their jobs; not part of the repository."""
RESULTS = ROOT / "benchmarks" / "results"
"""What is published."""


@dataclass(frozen=True)
class JobStore:
    """Finished jobs in a folder."""

    folder: Path

    def path(self, name: str, inputs: Mapping[str, Any], suffix: str = ".json") -> Path:
        """The file of a job: its name and a hash of its inputs."""
        text = json.dumps(inputs, sort_keys=True, ensure_ascii=False)
        return self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}{suffix}"

    def run(self, name: str, inputs: Mapping[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The job's result: what an earlier run found, or else what `work` finds now.

        Args:
            name: what the job is called; part of a file name.
            inputs: everything that the result depends on; goes into JSON and comes back unchanged.
            work: does the job; its result goes into JSON (no NaN).
        """
        path = self.path(name, inputs)
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))["result"]
        result = work()
        write_json(path, {"name": name, "inputs": dict(inputs), "result": result})
        return result


def results_folder(parser: argparse.ArgumentParser, options: argparse.Namespace, free: Collection[str] = ()) -> Path:
    """Where a program writes its results: to what is published if every option has its default, else below outputs/.

    Args:
        parser: of the program.
        options: what it was given; --tiny has a folder of its own.
        free: options that take nothing away from the results.
    """
    given = {name for name, value in vars(options).items() if value != parser.get_default(name)} - set(free)
    return RESULTS if not given else FOLDER / "tiny" if "tiny" in given else FOLDER


def environment() -> dict[str, Any]:
    """The machine and the code that figures come from."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def commit() -> str:
    """The last commit that changed the code that is measured or that measures; behind a "+", a hash of what was changed
    since and not committed.
    """
    paths = ["core", "benchmarks/*.py", "benchmarks/*.toml", "assets"]
    changed = _git("status", "--porcelain", "--", *paths)
    mark = ""
    if changed:
        mark = "+" + hashlib.sha256((changed + _git("diff", "HEAD", "--", *paths)).encode()).hexdigest()[:8]
    return _git("log", "-1", "--format=%h", "--", *paths) + mark or "unknown"


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, encoding="utf-8", check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()


def _cpu() -> str:
    """The processor's name as Linux gives it; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
