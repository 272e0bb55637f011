"""The node that searches prompts which still reach a concept after its ablation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import folder_paths
from comfy_api.latest import io, ui
from torch import Tensor

from ..core.ablation import Task
from ..core.delta import Delta
from ..core.errors import AblationError
from ..core.files import require_writable
from ..core.hosts.comfyui import opened
from ..core.leak_candidates import Words
from ..core.leak_sheets import contact_sheet, feed_back_lines, write_leaks
from ..core.leaks import LeakReport, ScanSettings, by_copies, by_judge, scan, typical_pictures
from ..core.metrics import Judge
from ..core.samplers import SAMPLERS, SampleSettings
from . import instruments
from .concept import names
from .evaluate import judge_source
from .images import picture_as_image
from .paths import numbered, safe_name
from .progress import NodeProgress, memory_advice, show_text
from .types import CATEGORY, AblationDelta, Concepts, images_at_once_input, model_inputs, seed_input, size_inputs

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

_SHOWN = 8


class ConceptAblationScanForLeaks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def listed(name: str, tooltip: str) -> io.Input:
            tooltip += ", separated by commas or lines."
            return io.String.Input(name, default="", multiline=True, optional=True, tooltip=tooltip)

        return io.Schema(
            node_id="ConceptAblationScanForLeaks",
            display_name="Scan for Leaks",
            category=CATEGORY,
            description=(
                "Searches prompts that still reach the target in spite of an edit: category words, synonyms, typing "
                "errors, styles, scenes and near words, drawn before and after and judged. What it finds can be "
                "removed by a second ablation: connect prompts to the captions of Concept to Ablate."
            ),
            is_output_node=True,
            inputs=[
                *model_inputs("before the edit"),
                io.Vae.Input("vae", tooltip="Decodes the images."),
                AblationDelta.Input("delta", tooltip="The edit to search leaks of."),
                Concepts.Input("concepts", tooltip="What was removed; the first of these concepts is searched."),
                io.String.Input(
                    "judge",
                    default="embedded",
                    tooltip="The CLIP model that judges: 'embedded' for Emoji Diffusion only, otherwise an open_clip "
                    "name or a folder below ComfyUI's models folder, as in Evaluate Ablation.",
                ),
                listed("synonyms", "Other names of the target"),
                listed("categories", "What the target is one of"),
                listed("neighbours", "Other concepts of that sort, which the judge must tell the target from"),
                io.Int.Input("each", default=12, min=1, max=1000, tooltip="Most prompts of a sort that are tried."),
                io.Int.Input(
                    "seeds", default=3, min=1, max=1000, tooltip="Images of every prompt, before and after the edit."
                ),
                io.Int.Input(
                    "suspects", default=16, min=0, max=1000, tooltip="Suspicious prompts that are drawn again."
                ),
                io.Int.Input(
                    "more_seeds",
                    default=12,
                    min=1,
                    max=1000,
                    tooltip="Images of each of those, which alone decide: with fewer than about 8 nothing is certain.",
                ),
                io.Combo.Input("sampler", options=list(SAMPLERS), default="ddim", tooltip="How images are sampled."),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Sampling steps of each image."),
                io.Float.Input(
                    "cfg", default=4.0, min=0.0, max=100.0, step=0.1, tooltip="Classifier-free guidance scale."
                ),
                *size_inputs(),
                images_at_once_input(),
                seed_input(),
                io.String.Input(
                    "folder",
                    default="leaks",
                    tooltip="Name of the results' folder in output/concept_ablation; a number is added to it.",
                ),
                instruments.original_input("that a memorized concept is recognised by"),
                instruments.detector_input(),
            ],
            outputs=[
                io.Image.Output(display_name="sheet", tooltip="The worst findings, before (left) and after (right)."),
                io.String.Output(
                    display_name="prompts",
                    tooltip="The leaks, one a line, as the captions of Concept to Ablate; empty without a leak.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: CLIP,
        vae: VAE,
        delta: Delta,
        concepts: tuple[Task, ...],
        judge: str,
        each: int,
        seeds: int,
        suspects: int,
        more_seeds: int,
        sampler: str,
        steps: int,
        cfg: float,
        width: int,
        height: int,
        images_at_once: int,
        seed: int,
        folder: str,
        synonyms: str = "",
        categories: str = "",
        neighbours: str = "",
        original: Tensor | None = None,
        copy_detector: str = "",
    ) -> io.NodeOutput:
        concept = concepts[0].concept
        if (concept.kind == "memorized") != (original is not None):
            raise AblationError(
                "A memorized image is recognised by the image itself, and nothing else is: connect the original if the "
                "first concept is memorized, and leave it out otherwise."
            )
        sample = SampleSettings(steps, cfg, sampler)
        settings = ScanSettings(each, seeds, suspects, more_seeds, sample=sample, batch=images_at_once, first_seed=seed)
        words = Words(categories=names(categories), synonyms=names(synonyms), neighbours=names(neighbours))
        reports = Path(folder_paths.get_output_directory()) / "concept_ablation"
        require_writable(reports)
        progress = NodeProgress(cls.hidden.unique_id, model)
        advice = "lower images_at_once, or draw smaller images"
        with memory_advice(advice), opened(model, clip, vae, width=width or None, height=height or None) as denoiser:
            if original is None:
                referee = Judge.load(judge_source(judge), denoiser.device)
                typical = typical_pictures(denoiser, concept, settings, progress)
                recognise = by_judge(referee, concept, words.neighbours, typical)
            else:
                found = instruments.load(concepts, original, copy_detector, device=denoiser.device)
                recognise = by_copies(found.detector, found.originals[concept.target][None])
            report = scan(denoiser, delta, concept, recognise, settings, words, progress)
        write_leaks(numbered(reports, safe_name(folder, "leaks")), report)
        picture = contact_sheet(report)
        progress.show(picture)
        text = table(report)
        show_text(cls.hidden.unique_id, text)
        sheet = picture_as_image(picture)
        shown = ui.PreviewImage(sheet, cls=cls).as_dict() | ui.PreviewText(text).as_dict()
        return io.NodeOutput(sheet, "\n".join(feed_back_lines(report)), ui=shown)


def table(report: LeakReport) -> str:
    """The worst findings as lines of text."""
    lines = [
        f"{one.verdict}: {one.candidate.prompt}: {one.before.value:.0%} → {one.after.value:.0%}"
        for one in report.findings[:_SHOWN]
    ]
    said = f"{len(report.leaks)} leaks; pictures that show '{report.concept.target}', before → after:"
    return "\n".join(filter(None, [report.caveat, said, *lines]))
