"""The node that measures an edit: the same prompts and seeds before and after, judged by CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import folder_paths
from comfy_api.latest import io, ui
from torch import Tensor

from ..core import delta_file
from ..core.ablation import DELTA_FILE, Task, check_tasks, report_inputs
from ..core.delta import Delta
from ..core.errors import AblationError
from ..core.evaluation import Evaluation, EvaluationSettings, compare, draw, make_jobs
from ..core.files import require_writable
from ..core.hosts.comfyui import opened, patched
from ..core.hosts.ldm_patcher import PIXELS_PER_LATENT
from ..core.metrics import Judge
from ..core.report import before_after_grid, write_report
from ..core.samplers import SAMPLERS, SampleSettings
from . import instruments
from .images import picture_as_image
from .paths import leads_elsewhere, numbered, safe_name
from .progress import NodeProgress, memory_advice, show_text
from .types import CATEGORY, AblationDelta, Concepts, images_at_once_input, model_inputs, seed_input, size_inputs

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

_EMBEDDED = "embedded"
_BEFORE, _AFTER = "Drawing before", "Drawing after"


class ConceptAblationEvaluate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptAblationEvaluate",
            display_name="Evaluate Ablation",
            category=CATEGORY,
            description=(
                "Draws the targets, anchors and surrounding concepts before and after the edit from held-out prompts, "
                "lets a CLIP model judge them and writes a report."
            ),
            is_output_node=True,
            inputs=[
                *model_inputs("before the edit"),
                io.Vae.Input("vae", tooltip="Decodes the images."),
                Concepts.Input(
                    "concepts", tooltip="What was removed; their surrounding concepts are measured beside them."
                ),
                io.String.Input(
                    "judge",
                    default=_EMBEDDED,
                    tooltip="The CLIP model that judges. 'embedded' knows the pictures of Emoji Diffusion only; for "
                    "any other model give an open_clip name such as ViT-B-32/laion2b_s34b_b79k (downloaded once) or a "
                    "folder in open_clip format below ComfyUI's models folder.",
                ),
                io.Int.Input(
                    "prompts", default=4, min=1, max=100, tooltip="Held-out prompts for each concept that is measured."
                ),
                io.Int.Input(
                    "images_per_prompt", default=4, min=1, max=1000, tooltip="Images for each of these prompts."
                ),
                io.Combo.Input("sampler", options=list(SAMPLERS), default="ddim", tooltip="How images are sampled."),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Sampling steps of each image."),
                io.Float.Input(
                    "cfg",
                    default=4.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Classifier-free guidance scale; 1 is no guidance and twice as fast.",
                ),
                *size_inputs(),
                images_at_once_input(),
                seed_input(),
                io.String.Input(
                    "folder",
                    default="evaluation",
                    tooltip="Name of the report's folder in output/concept_ablation; a number is added to it.",
                ),
                AblationDelta.Input("delta", optional=True, tooltip="The edit. Connect this or model_after."),
                io.Model.Input(
                    "model_after",
                    optional=True,
                    tooltip="The edited model, where it is no delta: a merge or another checkpoint of the same family.",
                ),
                io.Clip.Input(
                    "clip_after",
                    optional=True,
                    tooltip="The text encoder of model_after; without it the one before the edit.",
                ),
                io.Int.Input(
                    "misspellings",
                    default=0,
                    min=0,
                    max=100,
                    optional=True,
                    tooltip="Also measure so many prompts that misspell the target; 0 is none.",
                ),
                io.Boolean.Input(
                    "composition",
                    default=False,
                    optional=True,
                    tooltip="Also measure whether words of colour, place, size and style are still obeyed.",
                ),
                instruments.original_input("whose copies are counted"),
                instruments.detector_input(),
                io.String.Input(
                    "inception",
                    default="",
                    optional=True,
                    tooltip="clean-fid's inception-2015-12-05.pt below ComfyUI's models folder, for KID over Inception "
                    "features; a program, so take it from NVIDIA or clean-fid only. Empty: not measured.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="before and after", tooltip="A sheet of pictures, same seeds side by side."
                ),
                io.String.Output(display_name="metrics", tooltip="The figures as JSON: the report's report.json."),
                io.String.Output(display_name="report folder", tooltip="Where report.html and its files are."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: CLIP,
        vae: VAE,
        concepts: tuple[Task, ...],
        judge: str,
        prompts: int,
        images_per_prompt: int,
        sampler: str,
        steps: int,
        cfg: float,
        width: int,
        height: int,
        images_at_once: int,
        seed: int,
        folder: str,
        delta: Delta | None = None,
        model_after: ModelPatcher | None = None,
        clip_after: CLIP | None = None,
        misspellings: int = 0,
        composition: bool = False,
        original: Tensor | None = None,
        copy_detector: str = "",
        inception: str = "",
    ) -> io.NodeOutput:
        check_tasks(concepts)
        sample = SampleSettings(steps, cfg, sampler)
        settings = EvaluationSettings(
            prompts, images_per_prompt, sample, images_at_once, seed, misspellings, composition
        )
        after_model, after_clip = edited(model, clip, delta, model_after, clip_after)
        reports = Path(folder_paths.get_output_directory()) / "concept_ablation"
        require_writable(reports)
        progress = NodeProgress(cls.hidden.unique_id, model, (_BEFORE, _AFTER))
        names = [task.concept for task in concepts], [task.surrounding for task in concepts]
        with memory_advice("lower images_at_once, or draw smaller images"):
            with opened(model, clip, vae, width=width or None, height=height or None) as denoiser:
                height, width = (edge * PIXELS_PER_LATENT for edge in denoiser.latent_shape[1:])
                jobs = make_jobs(denoiser, *names, settings)
                referee = Judge.load(judge_source(judge), denoiser.device)
                measured = instruments.load(concepts, original, copy_detector, inception, denoiser.device)
                before = draw(denoiser, jobs, settings, _BEFORE, progress)
            # of the same size, whatever the edited model's own may be
            with opened(after_model, after_clip, vae, width=width, height=height) as denoiser:
                after = draw(denoiser, jobs, settings, _AFTER, progress)
                found = compare(jobs, before, after, referee, settings, measured)
        report = numbered(reports, safe_name(folder, "evaluation"))
        file = None
        if delta is not None:
            file = report / DELTA_FILE
            delta_file.save(delta, file)
        write_report(report, report_inputs(denoiser, concepts, file, found))
        picture = before_after_grid(found)
        progress.show(picture)
        sheet = picture_as_image(picture)
        metrics = (report / "report.json").read_text(encoding="utf-8")
        text = table(found)
        show_text(cls.hidden.unique_id, text)
        shown = ui.PreviewImage(sheet, cls=cls).as_dict() | ui.PreviewText(text).as_dict()
        return io.NodeOutput(sheet, metrics, str(report), ui=shown)


def edited(
    model: ModelPatcher, clip: CLIP, delta: Delta | None, model_after: ModelPatcher | None, clip_after: CLIP | None
) -> tuple[ModelPatcher, CLIP]:
    """The model after the edit.

    Raises:
        AblationError: not exactly one of `delta` and `model_after` is given, or IncompatibleDelta.
    """
    if (delta is None) == (model_after is None):
        raise AblationError("Connect either delta or model_after, so that it is clear which edit is measured.")
    if delta is None:
        return model_after, clip if clip_after is None else clip_after
    if clip_after is not None:
        raise AblationError("Disconnect clip_after: the delta edits the text encoder itself where it needs to.")
    return patched(model, clip, delta)


def judge_source(judge: str) -> str | Path | None:
    """What `Judge.load` is given: None for the embedded judge, a folder below ComfyUI's models folder, or a name.

    Raises:
        AblationError: a path that leads elsewhere.
    """
    name = judge.strip()
    if name in ("", _EMBEDDED):
        return None
    folder = Path(folder_paths.models_dir) / name
    # a name that is a folder where ComfyUI was started would be opened there
    if leads_elsewhere(name) or (Path(name).is_dir() and not folder.is_dir()):
        raise AblationError(
            f"The judge '{name}' is outside ComfyUI's models folder: give 'embedded', an open_clip name, or a folder "
            "below models."
        )
    return folder if folder.is_dir() else name


def table(found: Evaluation) -> str:
    """The CLIP accuracies, and copy rates where they were measured, as lines of text."""
    lines = [
        f"{row.name} ({row.role}): {row.before.clip_accuracy:.0%} → {row.after.clip_accuracy:.0%}"
        for row in found.concepts
    ]
    for row in found.concepts:
        if row.details is not None and row.details.copies is not None:
            rates = row.details.copies
            change = f"{rates.rate_before.value:.0%} → {rates.rate_after.value:.0%}"
            lines.append(f"copies of the original, {row.name} ({row.role}): {change}")
    return "\n".join([f"Pictures recognised by the judge ({found.judge}), before → after:", *lines])
