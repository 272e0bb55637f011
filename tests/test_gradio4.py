"""The page on the gradio that Forge pins: its tests without a browser, once more, in a Python that has that gradio, and
with it older numpy, transformers and diffusers. No other test runs ablations on those.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from concept_ablation.tests.conftest import unavailable

ROOT = Path(__file__).resolve().parents[1]
GRADIO = Path(os.environ.get("CONCEPT_ABLATION_GRADIO4", ROOT / ".gradio4"))
FILES = ("tests/test_web.py", "tests/web/test_jobs.py", "tests/web/test_pages.py", "tests/web/test_server.py")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(GRADIO), "PYTHONUTF8": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", errors="replace"
    )


def test_the_page_works_on_the_gradio_of_forge():
    if not GRADIO.is_dir():
        unavailable(f"there is no gradio 4.40 in {GRADIO}: run python -m tools.web.get_gradio")
    assert run("-c", "import gradio; print(gradio.__version__)").stdout.split()[-1] == "4.40.0"
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]
