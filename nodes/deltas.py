"""The nodes that keep, combine and apply deltas."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths
from comfy.cli_args import args
from comfy_api.latest import io, ui

from ..core import delta_file
from ..core.delta import Delta, merge, to_lora
from ..core.hosts.comfyui import fitted, patched
from .paths import numbered, safe_name
from .progress import show_text
from .types import CATEGORY, AblationDelta, model_inputs, strength_input

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP

_SUFFIX = ".safetensors"


class ConceptAblationSaveDelta(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptAblationSaveDelta",
            display_name="Save Ablation Delta",
            category=CATEGORY,
            description="Saves the edit into the loras folder, where ComfyUI's own Load LoRA finds it as well.",
            is_output_node=True,
            inputs=[
                AblationDelta.Input("delta", tooltip="The edit to save."),
                io.String.Input(
                    "name",
                    default="concept_ablation",
                    tooltip="Beginning of the file name. A number is added; no file is ever overwritten.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The file that was written.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, delta: Delta, name: str) -> io.NodeOutput:
        folder = Path(folder_paths.get_folder_paths("loras")[0])
        path = numbered(folder, safe_name(name, "concept_ablation"), _SUFFIX)
        delta_file.save(replace(delta, metadata={**delta.metadata, **workflow_metadata(cls.hidden)}), path)
        text = f"{path.name}, {path.stat().st_size / 1e6:.1f} MB, in {folder}"
        show_text(cls.hidden.unique_id, text)
        return io.NodeOutput(str(path), ui=ui.PreviewText(text))


class ConceptAblationLoadDelta(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = [name for name in folder_paths.get_filename_list("loras") if name.endswith(_SUFFIX)]
        return io.Schema(
            node_id="ConceptAblationLoadDelta",
            display_name="Load Ablation Delta",
            category=CATEGORY,
            description=(
                "Loads a saved edit, or a LoRA, and applies it. Unlike Load LoRA it refuses a file that does not fit "
                "the model, and hands on the delta for merging."
            ),
            inputs=[
                *model_inputs("to apply the edit to"),
                io.Combo.Input("file", options=files, tooltip="A .safetensors file in the loras folder."),
                strength_input("strength_model", "the model is edited"),
                strength_input("strength_clip", "the text encoder is edited"),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the edit applied."),
                io.Clip.Output(display_name="clip", tooltip="The text encoder with the edit applied."),
                AblationDelta.Output(display_name="delta", tooltip="The edit at full strength."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None) -> bool | str:
        """Whether the file is there; ComfyUI then leaves out its own check of the list, which names no remedy. None is
        a name that another node will give.
        """
        if file is not None and folder_paths.get_full_path("loras", file) is None:
            return f"There is no {file} in the loras folder: choose another file, or save one under this name first."
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str | None, **kwargs: Any) -> list[int]:
        if file is None:
            return []
        stat = _lora_path(file).stat()
        return [stat.st_mtime_ns, stat.st_size]

    @classmethod
    def execute(
        cls, model: ModelPatcher, clip: CLIP, file: str, strength_model: float, strength_clip: float
    ) -> io.NodeOutput:
        delta = fitted(model, clip, without_workflow(delta_file.load(_lora_path(file))))
        return io.NodeOutput(*patched(model, clip, delta, strength_model, strength_clip), delta)


class ConceptAblationApplyDelta(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptAblationApplyDelta",
            display_name="Apply Ablation Delta",
            category=CATEGORY,
            description="Applies an edit to a model, at any strength and together with LoRAs.",
            inputs=[
                *model_inputs("to apply the edit to"),
                AblationDelta.Input("delta", tooltip="The edit to apply."),
                strength_input("strength_model", "the model is edited"),
                strength_input("strength_clip", "the text encoder is edited"),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the edit applied."),
                io.Clip.Output(display_name="clip", tooltip="The text encoder with the edit applied."),
            ],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, clip: CLIP, delta: Delta, strength_model: float, strength_clip: float
    ) -> io.NodeOutput:
        return io.NodeOutput(*patched(model, clip, delta, strength_model, strength_clip))


class ConceptAblationMergeDeltas(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptAblationMergeDeltas",
            display_name="Merge Ablation Deltas",
            category=CATEGORY,
            description="Adds two edits of the same model up into one; chain several nodes for more than two.",
            inputs=[
                AblationDelta.Input("delta_a", tooltip="The first edit."),
                AblationDelta.Input("delta_b", tooltip="The second edit, made for the same model."),
                strength_input("strength_a", "the first edit counts"),
                strength_input("strength_b", "the second edit counts"),
            ],
            outputs=[AblationDelta.Output(display_name="delta", tooltip="The sum of both edits.")],
        )

    @classmethod
    def execute(cls, delta_a: Delta, delta_b: Delta, strength_a: float, strength_b: float) -> io.NodeOutput:
        return io.NodeOutput(merge([(delta_a, strength_a), (delta_b, strength_b)]))


class ConceptAblationToLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptAblationToLora",
            display_name="Ablation Delta → LoRA",
            category=CATEGORY,
            description="Compresses an edit to a LoRA of a chosen rank, and says how much of the edit it keeps.",
            inputs=[
                AblationDelta.Input("delta", tooltip="The edit to compress."),
                io.Int.Input(
                    "rank",
                    default=16,
                    min=1,
                    max=512,
                    tooltip="Rank of each layer's change: lower is smaller and keeps less of the edit.",
                ),
            ],
            outputs=[
                AblationDelta.Output(display_name="delta", tooltip="The compressed edit."),
                io.String.Output(display_name="kept", tooltip="How much of the change's energy is kept, and the size."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, delta: Delta, rank: int) -> io.NodeOutput:
        lora, kept = to_lora(delta, rank)
        text = f"rank {rank} keeps {kept:.1%} of the change's energy, {file_megabytes(lora):.1f} MB"
        show_text(cls.hidden.unique_id, text)
        return io.NodeOutput(lora, text, ui=ui.PreviewText(text))


def workflow_metadata(hidden: io.HiddenHolder) -> dict[str, str]:
    """The graph, as ComfyUI's own nodes put it into files, so that dropping the file on the canvas opens it."""
    if args.disable_metadata:
        return {}
    fields = {"prompt": hidden.prompt, **(hidden.extra_pnginfo or {})}
    return {name: json.dumps(value) for name, value in fields.items() if value is not None}


def without_workflow(delta: Delta) -> Delta:
    """A loaded delta without the graph that its file was saved by: whoever saves it again has another one, or wants
    none in files.
    """
    return replace(delta, metadata={k: v for k, v in delta.metadata.items() if k not in ("prompt", "workflow")})


def file_megabytes(delta: Delta) -> float:
    """Size of the delta's tensors in a file, in MB: fp16, two bytes a number."""
    return 2 * sum(tensor.numel() for tensor in delta_file.to_tensors(delta).values()) / 1e6


def _lora_path(name: str) -> Path:
    return Path(folder_paths.get_full_path_or_raise("loras", name))
