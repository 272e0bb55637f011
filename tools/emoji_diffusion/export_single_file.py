"""Write a model as one checkpoint in Stable Diffusion's layout, which this package loads. ComfyUI and the WebUIs tell
models by their sizes, and do not know one so narrow.

python tools/emoji_diffusion/export_single_file.py --out emoji-diffusion.safetensors
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from concept_ablation.core.errors import AblationError
from concept_ablation.core.hosts.diffusers import EMBEDDED_MODEL, load_parts
from concept_ablation.core.hosts.single_file import write_single_file


def export_single_file(model: Path, out: Path) -> None:
    """Write the model in the diffusers folder `model`, in fp16, to the file `out`.

    Raises:
        AblationError: there is no such model, the layout has no place for it, or the file cannot be written.
    """
    parts = load_parts(model)
    prediction = str(parts.schedule["prediction_type"])
    write_single_file(out, parts.unet, parts.text_encoder, parts.vae, prediction_type=prediction)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write a model as one checkpoint file.")
    parser.add_argument(
        "--model", type=Path, default=EMBEDDED_MODEL, help="model/ of a run of train.py (default: the one that ships)"
    )
    parser.add_argument("--out", type=Path, required=True, help="the file to write, ending in .safetensors")
    options = parser.parse_args()
    try:
        export_single_file(options.model, options.out)
    except AblationError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
