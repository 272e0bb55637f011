"""Names of files and folders that nodes write: made of a user's text, but never outside the folder meant for them."""

from __future__ import annotations

import re
from pathlib import Path

_LONGEST = 60


def safe_name(text: str, default: str) -> str:
    """`text` as one file name that every system takes: letters, digits, `-`, `_` and inner dots; `default` if nothing
    is left of it.
    """
    return re.sub(r"[^\w.-]+", "_", text)[:_LONGEST].strip("._- ") or default


def numbered(folder: Path, name: str, suffix: str = "") -> Path:
    """`name_00001`, or one above the highest number that `folder` has for this name."""
    pattern = re.compile(re.escape(name) + r"_(\d{5,})" + re.escape(suffix), re.IGNORECASE)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    taken = [int(match[1]) for match in map(pattern.fullmatch, names) if match]
    return folder / f"{name}_{max(taken, default=0) + 1:05d}{suffix}"
