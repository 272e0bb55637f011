"""Names of files and folders that nodes write: made of a user's text, but never outside the folder meant for them."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath, PureWindowsPath

_LONGEST = 60
_given: dict[tuple[Path, str, str], int] = {}
"""The last number that this process gave for a folder, a name and a suffix."""


def safe_name(text: str, default: str) -> str:
    """`text` as one file name that every system takes: letters, digits, `-`, `_` and inner dots; `default` if nothing
    is left of it.
    """
    return re.sub(r"[^\w.-]+", "_", text)[:_LONGEST].strip("._- ") or default


def leads_elsewhere(name: str) -> bool:
    """Whether a user's path could leave the folder that it is meant to be below, on any system."""
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor
    return name.startswith("~") or ".." in parts or bool(absolute)


def numbered(folder: Path, name: str, suffix: str = "") -> Path:
    """`name_00001`, or one above the highest number that `folder` has for this name or that this process gave for it.

    So the number of a deleted file is not given again: Load LoRA keeps its last file in memory by the path, and would
    take the new file for the deleted one.
    """
    pattern = re.compile(re.escape(name) + r"_(\d{5,})" + re.escape(suffix), re.IGNORECASE)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    taken = [int(match[1]) for match in map(pattern.fullmatch, names) if match]
    # lower case, for systems on which that is the same name
    key = (folder, name.lower(), suffix)
    _given[key] = max([_given.get(key, 0), *taken]) + 1
    return folder / f"{name}_{_given[key]:05d}{suffix}"
