"""Folders that the tests need beside `.venv`, made once and only made again when what decides their content changes.

Only the standard library and pip are used. The Python that runs this must be the one that will run the tests.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

Fill = Callable[[Path, Path], None]
"""Makes a folder's content, given the folder and one for scraps."""


class ProvisionError(Exception):
    """What went wrong and what to do, in one sentence."""


def provide(folder: Path, program: Path, fill: Fill) -> bool:
    """Make `folder` by `fill` unless it is up to date. Returns whether there was anything to do.

    Everything is made in a temporary folder beside it and renamed, so that a run that is cut short leaves nothing
    that looks complete.

    Args:
        program: the file with what decides the content; another text makes the folder anew.

    Raises:
        ProvisionError: `folder` holds something else, or pip failed.
    """
    stamp = current_stamp(program)
    stamp_file = folder / "stamp"
    if stamp_file.is_file() and stamp_file.read_text(encoding="utf-8") == stamp:
        return False
    if folder.exists() and not stamp_file.is_file():
        raise ProvisionError(f"{folder} is there and was not made by this program: give another folder, or delete it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        fill(new, Path(temporary))
        (new / "stamp").write_text(stamp, encoding="utf-8")
        if folder.exists():
            os.replace(folder, Path(temporary) / "old")
        os.replace(new, folder)
    return True


def current_stamp(program: Path) -> str:
    """A hash of all that decides what the folder holds: the programs, and what is installed in this Python."""
    installed = sorted(installed_versions().items())
    texts = [file.read_text(encoding="utf-8") for file in (program, Path(__file__))]
    return hashlib.sha256("\0".join([sys.version, *texts, json.dumps(installed)]).encode()).hexdigest()


def installed_versions() -> dict[str, str]:
    """Normalized name -> version of what is installed in this Python."""
    return {
        normalized(item.metadata["Name"]): item.version for item in metadata.distributions() if item.metadata["Name"]
    }


def normalized(name: str) -> str:
    """A distribution's name as packaging tools compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pip(*arguments: str) -> None:
    """Run pip of this Python, quietly unless it fails.

    Raises:
        ProvisionError: it failed; what it printed has been shown.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace"
    )
    if result.returncode:
        print(result.stdout, file=sys.stderr)
        raise ProvisionError(
            f"pip {arguments[0]} failed (its message is above): check the connection and the free disk space and run "
            "this again."
        )


_started = time.monotonic()


def say(message: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"[{time.monotonic() - _started:4.0f} s] {message}", flush=True)


def main(what: str, default: Path, program: Path, fill: Fill) -> int:
    """The command line of a program that makes such a folder. Returns the exit code."""
    parser = argparse.ArgumentParser(description=f"{what}.")
    parser.add_argument("folder", nargs="?", type=Path, default=default, help=f"where (default: {default})")
    folder = parser.parse_args().folder.resolve()
    try:
        made = provide(folder, program, fill)
    except (ProvisionError, OSError) as error:
        print(f"{what}: {error}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    say(f"{'made' if made else 'is up to date'}: {folder} ({size / 1e6:.0f} MB)")
    return 0
