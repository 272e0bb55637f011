"""The node that says what to ablate."""

from __future__ import annotations

import re
from typing import get_args

from comfy_api.latest import io

from ..core.ablation import Task, check_tasks
from ..core.concept import Concept, Kind
from .types import CATEGORY, Concepts


class ConceptAblationConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptAblationConcept",
            display_name="Concept to Ablate",
            category=CATEGORY,
            description=(
                "What the model is to stop drawing (the target) and what it draws instead (the anchor). "
                "Chain several of these nodes to remove several concepts with one delta."
            ),
            inputs=[
                io.String.Input(
                    "target",
                    default="tropical fish",
                    tooltip="What to remove: a thing or person ('Grumpy Cat'), a style ('Van Gogh'), or the caption "
                    "that reproduces a memorized image.",
                ),
                io.String.Input(
                    "anchor",
                    default="fish",
                    tooltip="What to draw instead, usually the wider category: 'cat', 'painting', or a caption that "
                    "does not reproduce the memorized image.",
                ),
                io.Combo.Input(
                    "kind",
                    options=list(get_args(Kind)),
                    default="instance",
                    tooltip="instance: a thing, animal or person. style: a way of drawing. memorized: one training "
                    "image that a caption brings back.",
                ),
                io.String.Input(
                    "surrounding",
                    multiline=True,
                    default="",
                    optional=True,
                    placeholder="blowfish, shark",
                    tooltip="Neighbours that must stay as they are, separated by commas or lines: they are preserved "
                    "in the dataset and measured in the evaluation.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    optional=True,
                    placeholder="a photo of a fish in a bowl",
                    tooltip="Your own prompts for the anchor, one a line, in place of the built-in ones. For an "
                    "instance each must contain the anchor.",
                ),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="Further prompts that reach the target, one a line: captions that reproduce a memorized "
                    "image, or 'prompt => anchor prompt' as Scan for Leaks finds them.",
                ),
                Concepts.Input(
                    "concepts", optional=True, tooltip="Concepts from another of these nodes; this one is added."
                ),
            ],
            outputs=[Concepts.Output(display_name="concepts", tooltip="All concepts so far.")],
        )

    @classmethod
    def execute(
        cls,
        target: str,
        anchor: str,
        kind: str,
        surrounding: str = "",
        prompts: str = "",
        captions: str = "",
        concepts: tuple[Task, ...] = (),
    ) -> io.NodeOutput:
        concept = Concept(target, anchor, kind, tuple(prompts.splitlines()), tuple(captions.splitlines()))
        tasks = (*concepts, Task(concept, names(surrounding)))
        check_tasks(tasks)
        return io.NodeOutput(tasks)


def names(text: str) -> tuple[str, ...]:
    """The names in a list that is separated by commas or lines."""
    return tuple(name for name in map(str.strip, re.split(r"[,\n]", text)) if name)
