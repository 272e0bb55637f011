"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NETWORK_JUDGE = "ViT-B-32/laion2b_s34b_b79k"

Model = Annotated[
    str | None,
    typer.Option(
        help="Diffusers folder, SD 1.x .safetensors file or hub id.", show_default="the embedded Emoji Diffusion"
    ),
]
Targets = Annotated[list[str], typer.Option("--target", help="The concept to remove; give it again for several.")]
Anchors = Annotated[list[str], typer.Option("--anchor", help="What to draw instead; one for each target.")]
Surrounding = Annotated[
    list[str] | None, typer.Option(help="A neighbour to preserve and to measure; give it again for several.")
]
Preset = Annotated[
    str,
    typer.Option(help="instant (closed form, nothing is trained), fast, balanced or paper; from quick to thorough."),
]
Objective = Annotated[
    str | None, typer.Option(help="model, model-self, noise, reverse-kl or loss-max.", show_default="the preset's")
]
Subset = Annotated[
    str | None,
    typer.Option(
        help="cross-attn, attn, embedding, full, or cross-attn-up: of cross-attn the middle and the way up, with less "
        "time and memory.",
        show_default="the preset's",
    ),
]
AutoPreserve = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Preserve this many more concepts: those that the model knows and the text encoder finds nearest to the "
        "target. They are not measured.",
        show_default="the preset's",
    ),
]
Profile = Annotated[
    Path | None, typer.Option(help="Write a profiler trace of a few training steps to this .json file.")
]
KindOption = Annotated[str, typer.Option(help="instance, style or memorized.")]
Output = Annotated[Path, typer.Option(help="Folder for the results; created if it does not exist.")]
Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="Random seed: the same one gives the same result on the same machine.")
]
JudgeOption = Annotated[
    str | None,
    typer.Option(
        help="CLIP model that measures: an open_clip name such as ViT-L-14/openai, or a local open_clip folder.",
        show_default=f"the embedded judge for the embedded model, else {NETWORK_JUDGE}",
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.", show_default="a GPU if there is one")]
Precision = Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")]
Prediction = Annotated[
    str | None, typer.Option(help="epsilon or v_prediction.", show_default="what the model's files say")
]
EvalPrompts = Annotated[int, typer.Option(help="Held-out prompts for each concept that is measured.")]
EvalSeeds = Annotated[int, typer.Option(help="Images for each of these prompts.")]
