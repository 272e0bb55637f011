"""Write a run's model as one checkpoint in Stable Diffusion's layout, which this package loads. ComfyUI and the WebUIs
tell models by their sizes, and do not know one so narrow.

python tools/emoji_diffusion/export_single_file.py --run outputs/emoji --out emoji-diffusion.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

from autoencoder import build as build_autoencoder
from denoiser import SCHEDULE, TextToLatent
from denoiser import build as build_denoiser
from diffusers import AutoencoderTiny
from latents import load_latents
from settings import Settings
from stage import load_average

from concept_ablation.core.hosts.single_file import write_single_file


def export_single_file(run: Path, settings: Settings, out: Path) -> None:
    """Write the model that the run in `run` has reached, in fp16, to the file `out`.

    Raises:
        AblationError: a stage is missing, or the file cannot be written.
    """
    latents = load_latents(run / "latents")
    model = load_average(build_denoiser(settings, latents), run / "denoiser")
    autoencoder = load_average(build_autoencoder(settings), run / "autoencoder")
    autoencoder.register_to_config(scaling_factor=latents.scale)
    write(out, model, autoencoder)


def write(out: Path, model: TextToLatent, autoencoder: AutoencoderTiny) -> None:
    """Write trained parts; `autoencoder` has the latent scale in its configuration."""
    prediction = str(SCHEDULE["prediction_type"])
    write_single_file(out, model.unet, model.text_encoder, autoencoder, prediction_type=prediction)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the trained model as one checkpoint file.")
    parser.add_argument("--run", type=Path, required=True, help="the folder that train.py was given as --out")
    parser.add_argument("--out", type=Path, required=True, help="the file to write, ending in .safetensors")
    options = parser.parse_args()
    export_single_file(options.run, Settings(), options.out)


if __name__ == "__main__":
    main()
