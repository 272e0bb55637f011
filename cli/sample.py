"""`concept-ablation sample`: draw pictures with a model and its deltas."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import console, progress_bars
from .inputs import load_model, with_strength
from .options import Device, Model, Output, Precision, Prediction, Seed


def sample(
    prompt: Annotated[list[str], typer.Option(help="What to draw; give it again for several.")],
    output: Output,
    model: Model = None,
    delta: Annotated[
        list[str] | None, typer.Option(help="Delta file to apply, with :STRENGTH if not 1; give it again for several.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images for each prompt, with consecutive seeds.")] = 1,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 25,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 is none.")] = 4.0,
    sampler: Annotated[str, typer.Option(help="ddim, euler, euler_ancestral or dpmpp_2m.")] = "ddim",
    eta: Annotated[float, typer.Option(help="Fresh noise in ddim and euler_ancestral: 0 none, 1 DDPM.")] = 1.0,
    schedule: Annotated[str, typer.Option(help="Noise levels: timestep or karras.")] = "timestep",
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    batch: Annotated[int, typer.Option(min=1, help="Images drawn at once.")] = 16,
    seed: Seed = 0,
    device: Device = None,
    precision: Precision = "auto",
    prediction: Prediction = None,
) -> None:
    """Draw pictures with a model and any number of deltas; writes <prompt index>_<seed>.png files to --output."""
    from contextlib import ExitStack

    from PIL import Image

    from ..core import delta_file
    from ..core.files import replacing, require_writable
    from ..core.progress import Reporter
    from ..core.samplers import SampleSettings, draw_images

    settings = SampleSettings(steps, guidance, sampler, eta, schedule, negative)
    edits = [(delta_file.load(path), strength) for path, strength in map(with_strength, delta or [])]
    require_writable(output)
    denoiser = load_model(model, device, precision, prediction)
    requests = [(index, text, seed + i) for index, text in enumerate(prompt) for i in range(count)]
    with ExitStack() as stack:
        on_progress = stack.enter_context(progress_bars())
        for edit, strength in edits:
            stack.enter_context(edit.attach(denoiser, strength))
        reporter = Reporter(on_progress, "Drawing", len(requests) * steps)
        texts, seeds = [text for _, text, _ in requests], [number for _, _, number in requests]
        images = draw_images(denoiser, texts, seeds, settings, batch=batch, reporter=reporter)
    for (index, _, number), image in zip(requests, images, strict=True):
        with replacing(output / f"{index}_{number}.png") as temporary:
            Image.fromarray(image).save(temporary)
    console.print(f"{len(images)} images in {output}")
