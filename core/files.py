"""Writing files so that each is either whole or absent."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from .errors import AblationError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well it becomes `path`, otherwise it is removed.

    The temporary name keeps the suffix, because writers choose their format by it.

    Raises:
        AblationError: the folder cannot be written, the disk is full, or the file that is there cannot be replaced.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    whole = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        # safetensors makes files that only their owner can read; other programs are meant to load these
        temporary.chmod(mode)
        whole = not path.is_dir()
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        if whole:
            # perhaps the work of hours, and Windows lets nobody replace a file that a program has open
            raise AblationError(
                f"Cannot replace {path} ({getattr(error, 'strerror', error)}): close the programs that use it; what "
                f"was made is in {temporary}."
            ) from error
        raise AblationError(_explain(path, error)) from error
    finally:
        if not whole:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with `\\n` line ends on every system."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented strict JSON (NaN is refused with a ValueError)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def require_writable(directory: Path) -> None:
    """Prove that a file can be written in `directory`, which need not exist yet, before hours are spent on what goes
    into it. Leaves nothing behind: the first file that is written creates the folder.

    Raises:
        AblationError: it cannot be created or written.
    """
    probe, missing = directory / ".write-probe", []
    try:
        missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
        if directory.is_file():
            raise AblationError(f"{directory} is a file: choose a folder.")
        with replacing(probe) as temporary:
            temporary.write_bytes(b"")
    except OSError as error:
        raise AblationError(_explain(directory, error)) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
            for folder in missing:
                folder.rmdir()


def _explain(path: Path, error: OSError | SafetensorError) -> str:
    # safetensors has an error of its own for whatever the system says, and repeats it there
    full = any(words in str(error) for words in ("No space left", "not enough space on the disk"))
    if getattr(error, "errno", None) == errno.ENOSPC or full:
        return f"The disk is full: free some space and write {path} again."
    reason = getattr(error, "strerror", None) or str(error)
    return f"Cannot write {path} ({reason}): choose an output folder that you may write to."
