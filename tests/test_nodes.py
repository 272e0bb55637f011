"""The ComfyUI host and nodes, without a server but on ComfyUI's real modules.

Those take over top-level names (`nodes`, `server`, `utils`) and set up torch for themselves, so the tests proper, in
`node*_inside_comfyui.py`, run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from concept_ablation.tests.conftest import unavailable

ROOT = Path(__file__).resolve().parents[1]
COMFYUI = Path(os.environ.get("CONCEPT_ABLATION_COMFYUI", ROOT / ".comfyui" / "ComfyUI"))
DEPS = Path(os.environ.get("CONCEPT_ABLATION_COMFYUI_DEPS", ROOT / ".comfyui" / "deps"))
# As ComfyUI's main.py begins: `utils` before its `nodes` puts another one on the path, and no search for a GPU.
RUN = """
import sys, pytest, utils.extra_config
from comfy.cli_args import args
args.cpu = True
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_the_package_can_be_imported_without_comfyui():
    code = "import concept_ablation, sys; print(concept_ablation.WEB_DIRECTORY, 'comfy_api' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=True)
    assert result.stdout.split() == ["web/comfyui", "False"]


@pytest.mark.parametrize("subject", ["node", "host"])
def test_inside_comfyui(subject):
    if not (COMFYUI / "comfy_api").is_dir():
        unavailable(f"there is no ComfyUI in {COMFYUI}: run python -m tools.comfyui.get_comfyui")
    path = os.pathsep.join([str(COMFYUI), str(DEPS), *filter(None, [os.environ.get("PYTHONPATH")])])
    tests = sorted(map(str, Path(__file__).parent.glob(f"{subject}*_inside_comfyui.py")))
    result = subprocess.run(
        [sys.executable, "-c", RUN, "-q", "-p", "no:cacheprovider", *tests],
        env={**os.environ, "PYTHONPATH": path, "PYTHONUTF8": "1"},
        cwd=COMFYUI,  # in our own folder its `import nodes` would find ours
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
