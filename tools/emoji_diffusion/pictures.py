"""Pictures of concepts, each drawn in several styles: what every training stage learns from, and how it is kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from concept_ablation.core.errors import AblationError
from concept_ablation.core.files import replacing, write_json

TENSORS = "pictures.safetensors"
MANIFEST = "manifest.json"
OTHERS = "other_pictures"
"""Folder of a run for the concepts that only the judges see."""


@dataclass(frozen=True)
class Concept:
    """One thing that is drawn: "tropical fish" of the category "fish" in the group "animals-nature"."""

    name: str
    category: str
    group: str


@dataclass(frozen=True)
class Pictures:
    """N cut-out pictures and what each shows.

    Attributes:
        rgba: straight (not premultiplied) alpha, uint8 [N, 4, S, S].
        concept: index into `concepts` of each, int64 [N].
        style: index into `styles` of each, int64 [N].
        credits: for each style its source, author and licence.
    """

    rgba: Tensor
    concept: Tensor
    style: Tensor
    concepts: tuple[Concept, ...]
    styles: tuple[str, ...]
    credits: tuple[dict[str, str], ...]

    def __len__(self) -> int:
        return len(self.rgba)

    def find(self, concept: str, style: str) -> int | None:
        """The index of one picture, or None where that style has no such concept."""
        for index, (which, how) in enumerate(zip(self.concept.tolist(), self.style.tolist(), strict=True)):
            if self.concepts[which].name == concept and self.styles[how] == style:
                return index
        return None

    def premultiplied(self, index: Tensor) -> Tensor:
        """Pictures [B, 4, S, S] in [0, 1], colours times alpha, so that they can be interpolated and summed."""
        rgba = self.rgba[index].float() / 255
        return torch.cat((rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]), dim=1)


def joined(one: Pictures, other: Pictures) -> Pictures:
    """The pictures of both, first those of `one`; they have no concept in common and the same styles."""
    return Pictures(
        torch.cat((one.rgba, other.rgba)),
        torch.cat((one.concept, other.concept + len(one.concepts))),
        torch.cat((one.style, other.style)),
        one.concepts + other.concepts,
        one.styles,
        one.credits,
    )


def of_concepts(pictures: Pictures, kept: Sequence[int]) -> Pictures:
    """The pictures of some concepts, which are numbered anew."""
    number = torch.full((len(pictures.concepts),), -1)
    number[list(kept)] = torch.arange(len(kept))
    rows = (number[pictures.concept] >= 0).nonzero().flatten()
    return Pictures(
        pictures.rgba[rows],
        number[pictures.concept[rows]],
        pictures.style[rows],
        tuple(pictures.concepts[index] for index in kept),
        pictures.styles,
        pictures.credits,
    )


def save_pictures(folder: Path, pictures: Pictures) -> None:
    """Write `pictures.safetensors` and, last, `manifest.json`: a folder with a manifest is complete."""
    with replacing(folder / TENSORS) as temporary:
        save_file({"rgba": pictures.rgba, "concept": pictures.concept, "style": pictures.style}, temporary)
    manifest: dict[str, Any] = {
        "pictures": len(pictures),
        "concepts": [asdict(concept) for concept in pictures.concepts],
        "styles": list(pictures.styles),
        "credits": list(pictures.credits),
    }
    write_json(folder / MANIFEST, manifest)


def load_pictures(folder: Path) -> Pictures:
    """Read what `save_pictures` wrote.

    Raises:
        AblationError: there are no complete pictures in `folder`.
    """
    if not (folder / MANIFEST).is_file():
        raise AblationError(f"{folder} holds no pictures: make them with tools/emoji_diffusion/icons.py first.")
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    tensors = load_file(folder / TENSORS)
    return Pictures(
        tensors["rgba"],
        tensors["concept"],
        tensors["style"],
        tuple(Concept(**concept) for concept in manifest["concepts"]),
        tuple(manifest["styles"]),
        tuple(manifest["credits"]),
    )
