"""Put the gradio that Forge pins into a folder of its own, for the tests that run the page on it.

    python -m tools.web.get_gradio

Whoever puts that folder first on PYTHONPATH has it in place of the newest gradio of `.venv`, with everything else
(torch, open_clip, pytest) as it is there.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tools.provision import main, pip, say

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ROOT / ".gradio4"

PACKAGES = (
    # what Forge pins: https://github.com/lllyasviel/stable-diffusion-webui-forge/blob/main/requirements_versions.txt
    "gradio==4.40.0",
    "pydantic==2.8.2",
    "fastapi==0.104.1",
    # what gradio 4.40 needs but does not ask for, and the newest that go with it
    "huggingface-hub<1",
    "numpy<2",
    "transformers<5",
    "diffusers==0.35.2",
)


def fill(folder: Path, scratch: Path) -> None:
    """Install the packages and what they require into `folder`.

    Raises:
        ProvisionError: pip failed.
    """
    say(f"installing {', '.join(PACKAGES)}")
    pip("install", "--no-warn-script-location", "--target", str(folder), *PACKAGES)


if __name__ == "__main__":
    sys.exit(main("The gradio of Forge", DEFAULT, Path(__file__), fill))
