"""`concept-ablation merge` and `export`: new files made of delta files, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import console
from .inputs import require_safetensors, with_strength


def merge(
    delta: Annotated[list[str], typer.Option(help="Delta file, with :STRENGTH if not 1; give it again for several.")],
    output: Annotated[Path, typer.Option(help="The merged .safetensors file.")],
) -> None:
    """Add deltas of the same model up into one file."""
    from ..core import delta_file
    from ..core.delta import merge as add

    parts = [with_strength(text) for text in delta]
    require_safetensors(output, *(path for path, _ in parts))
    total = add((delta_file.load(path), strength) for path, strength in parts)
    delta_file.save(total, output)
    console.print(f"{output}: {len(total.layers)} layers, {output.stat().st_size / 1e6:.1f} MB")


def export(
    delta: Annotated[Path, typer.Option(help="The delta file.")],
    rank: Annotated[int, typer.Option(help="Rank of the LoRA.")],
    output: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
) -> None:
    """Compress a delta to a LoRA of a chosen rank and say how much of it is kept."""
    from ..core import delta_file
    from ..core.delta import to_lora

    require_safetensors(output, delta)
    lora, kept = to_lora(delta_file.load(delta), rank)
    delta_file.save(lora, output)
    console.print(f"{output}: rank {rank}, {output.stat().st_size / 1e6:.1f} MB, {kept:.1%} of the energy kept")
