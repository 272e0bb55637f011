"""Folders that are filled shard by shard and can be finished after a kill.

`manifest.json` says what the folder is to hold and is written first; each shard of tensors is renamed into place when
it is complete. What the manifest and the tensors mean is the caller's business.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .concept import Concept
from .errors import AblationError, OtherDataset
from .files import replacing, write_json
from .parallel import current

_MANIFEST = "manifest.json"


def as_stored(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """`manifest` as it will be read back: what JSON makes of tuples and keys."""
    return json.loads(json.dumps(manifest))


def claim(directory: Path | None, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, unless the folder already has this very one; without a folder, only see that all processes
    of the job mean the same.

    Raises:
        OtherDataset: the folder belongs to another dataset.
        AblationError: it cannot be written, or the processes differ.
    """
    current().require_same(json.dumps(as_stored(manifest)), "model, concepts or settings")
    if directory is None or not current().first:
        return
    found = read_manifest(directory)
    if found is None or not any(directory.glob("shard-*")):
        # nothing was drawn for the manifest that may be there: the first batch did not fit into memory, say
        write_json(directory / _MANIFEST, as_stored(manifest))
    elif {**found, "setup": found.get("setup", manifest.get("setup"))} != as_stored(manifest):
        # a folder of before setups were written down may be gone on with, too
        raise OtherDataset(
            f"{directory} holds a dataset of other concepts, settings or another model, size or precision: choose "
            "another folder, or delete it."
        )


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The folder's manifest, or None if it has none.

    Raises:
        AblationError: it is damaged.
    """
    path = directory / _MANIFEST
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AblationError(f"{path} is damaged: delete the folder and build the dataset again.") from error


def ranges(rows: int, size: int) -> list[range]:
    """Which rows are in which shard."""
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


def read_shard(directory: Path, number: int, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor] | None:
    """The tensors of one shard, or None if it has to be made (again)."""
    try:
        tensors = load_file(_path(directory, number))
    except (SafetensorError, OSError, ValueError):  # what Forge makes of safetensors' errors
        return None
    fits = all(name in tensors and tensors[name].shape == tuple(shape) for name, shape in shapes.items())
    return tensors if fits else None


def write_shard(directory: Path, number: int, tensors: Mapping[str, Tensor]) -> None:
    """Put one shard into the folder, whole or not at all.

    Raises:
        AblationError: the folder cannot be written.
    """
    with replacing(_path(directory, number)) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def complete(
    directory: Path | None,
    shapes: Sequence[Mapping[str, Sequence[int]]],
    make: Callable[[int], Mapping[str, Tensor]],
    on_given: Callable[[], None],
) -> list[Mapping[str, Tensor]]:
    """Every shard, in order: those that the folder has, and the others made, by all processes of the job in turn, and
    written by the first one as soon as they are there.

    Args:
        directory: where shards are kept; None keeps them in memory only.
        shapes: of the tensors of each shard.
        make: makes the shard of that number.
        on_given: called for each shard that this process did not have to make.

    Raises:
        AblationError: the folder cannot be written, or another process has stopped.
    """
    processes = current()
    found: dict[int, Mapping[str, Tensor]] = {}
    if directory is not None and processes.first:
        stored = ((number, read_shard(directory, number, shape)) for number, shape in enumerate(shapes))
        found = {number: shard for number, shard in stored if shard is not None}
    there = processes.sum(torch.tensor([float(number in found) for number in range(len(shapes))])).bool().tolist()
    for number in (number for number, is_there in enumerate(there) if is_there):
        found[number] = processes.send(found.get(number), 0)
        on_given()
    missing = [number for number, is_there in enumerate(there) if not is_there]
    for number, shard, own in processes.spread(missing, make):
        found[number] = shard
        if directory is not None and processes.first:
            write_shard(directory, number, shard)
        if not own:
            on_given()
    return [found[number] for number in range(len(shapes))]


def read_all(directory: Path, names: Sequence[str]) -> list[list[Tensor]]:
    """The named tensors of every shard that is there, in order: one list a shard.

    Raises:
        AblationError: a shard is damaged.
    """
    shards = []
    for path in sorted(directory.glob("shard-*.safetensors")):
        try:
            tensors = load_file(path)
            shards.append([tensors[name] for name in names])
        except (SafetensorError, KeyError, OSError, ValueError) as error:
            raise AblationError(f"{path} is damaged: delete it and build the dataset again to replace it.") from error
    return shards


def describe_concepts(concepts: Sequence[Concept]) -> list[dict[str, Any]]:
    """Concepts as a manifest holds them."""
    return [asdict(concept) for concept in concepts]


def read_concepts(described: Sequence[Mapping[str, Any]]) -> tuple[Concept, ...]:
    """The inverse of `describe_concepts`."""
    return tuple(
        Concept(**{**c, "anchor_prompts": tuple(c["anchor_prompts"]), "target_prompts": tuple(c["target_prompts"])})
        for c in described
    )


def _path(directory: Path, number: int) -> Path:
    return directory / f"shard-{number:05d}.safetensors"
