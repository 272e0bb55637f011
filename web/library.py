"""The saved deltas: their folder's list, headers, names that are safe to write, merging, export, deletion.

A file is only ever reached through its name in the folder's own list, so no name that a page sends can lead elsewhere.
"""

from __future__ import annotations

import math
import re
import threading
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..core import delta_file
from ..core.concept import Concept
from ..core.delta import Delta, merge, to_lora
from ..core.errors import AblationError

OWN = "concept_ablation."
"""How the header fields of our files begin; files without any are not listed (a WebUI's folder is full of them)."""
MAX_NAME = 80
_MAX_BYTES = 180
_saving = threading.Lock()
"""Held from the choice of a file's name until the file is there."""
_used: set[Path] = set()
"""Files that this process has saved or deleted. Forge keeps LoRAs in memory by their path, so a new edit under the name
of a deleted one would be the deleted one there.
"""
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))}


@dataclass(frozen=True)
class Saved:
    """A saved delta, as far as its header tells."""

    path: Path
    bytes: int
    modified: float
    header: Mapping[str, str]

    @property
    def file(self) -> str:
        return self.path.name

    def field(self, name: str) -> str:
        """One of our header fields, or ''."""
        return self.header.get(OWN + name, "")


def safe_name(text: str) -> str:
    """`text` as a file name without folder and suffix: letters, digits, `-`, `_` and inner dots; never empty.

    What could leave the folder, hide the file or be a device of Windows is replaced.
    """
    text = unicodedata.normalize("NFKC", text)
    name = re.sub(r"[^\w.-]+", "-", text.removesuffix(".safetensors")).strip("-._")[:MAX_NAME]
    # file systems count bytes, of which other alphabets need up to four a letter
    name = name.encode()[:_MAX_BYTES].decode(errors="ignore").strip("-._")
    name = re.sub(r"\.{2,}", ".", name)
    if not name:
        return "delta"
    return f"delta-{name}" if name.split(".")[0].casefold() in _RESERVED else name


def name_for(concept: Concept) -> str:
    """A file name for what ablates `concept`."""
    return safe_name(f"{concept.target[:36]} to {concept.anchor[:36]}".casefold())


def save_new(delta: Delta, folder: Path, name: str) -> Path:
    """Save a delta under a name that no file in `folder` has, and that none has had since this process began: `name`,
    `name-2`, …
    """
    stem = safe_name(name)
    with _saving:
        path, number = folder / f"{stem}.safetensors", 2
        while path in _used or path.exists():
            path, number = folder / f"{stem}-{number}.safetensors", number + 1
        delta_file.save(delta, path)
        _used.add(path)
    return path


def saved(folder: Path) -> list[Saved]:
    """Our deltas in `folder`, the newest first. Files that cannot be read are left out."""
    if not folder.is_dir():
        return []
    found = [item for path in folder.glob("*.safetensors") if (item := _read(path)) is not None]
    return sorted(found, key=lambda item: (-item.modified, item.file))


def find(folder: Path, file: str | None) -> Saved:
    """The saved delta called `file`.

    Raises:
        AblationError: none in the folder's list has this name.
    """
    if not file:
        raise AblationError("No delta is chosen: choose one of the list.")
    for item in saved(folder):
        if item.file == file:
            return item
    raise AblationError(f"There is no saved delta '{str(file)[:80]}': choose one of the list.")


def delete(folder: Path, file: str) -> None:
    """Delete a saved delta.

    Raises:
        AblationError: there is none of this name, or it cannot be deleted.
    """
    path = find(folder, file).path
    _used.add(path)
    try:
        path.unlink()
    except OSError as error:
        raise AblationError(f"Cannot delete {path.name} ({error.strerror}): close the programs that use it.") from error


def merge_saved(folder: Path, parts: Sequence[tuple[str, float]], name: str) -> Path:
    """Add saved deltas up, each times its strength, into a new file.

    Raises:
        AblationError: fewer than two, an unknown name, a strength that is not finite, or different models.
    """
    if len(parts) < 2:
        raise AblationError("A merge needs at least two deltas: add another one.")
    if not all(math.isfinite(strength) for _, strength in parts):
        raise AblationError("The strength of a delta must be a finite number.")
    items = [(find(folder, file), strength) for file, strength in parts]
    models = {item.field("base_model_sha256") for item, _ in items} - {""}
    if len(models) > 1:
        raise AblationError("These deltas were made for different models and cannot be merged.")
    total = merge((delta_file.load(item.path), strength) for item, strength in items)
    return save_new(total, folder, name or "merged")


def export_lora(folder: Path, file: str, rank: int) -> tuple[Path, float]:
    """Write a LoRA of `rank` beside a saved delta; its path and the share of the energy that it keeps.

    Raises:
        AblationError: no such delta, or rank < 1.
    """
    item = find(folder, file)
    lora, kept = to_lora(delta_file.load(item.path), rank)
    return save_new(lora, folder, f"{item.path.stem[: MAX_NAME - 12]}-rank{rank}"), kept


def _read(path: Path) -> Saved | None:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        status = path.stat()
    except (SafetensorError, OSError):
        return None
    if not any(key.startswith(OWN) for key in header):
        return None
    return Saved(path, status.st_size, status.st_mtime, header)
