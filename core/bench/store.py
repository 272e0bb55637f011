"""The folder of a benchmark: results, pictures, deltas, and who works on what.

    jobs/KEY.json          one result, whole or absent
    jobs/KEY.claim         somebody works on it; its time of change is when they were last seen
    cache/pretrained/KEY/  pictures of the pretrained model, one PNG for each prompt
    cache/deltas/KEY/      an edit's delta and the checkpoints of its training
    cache/datasets/KEY/    what deltas are trained on
    cache/captions/KEY/    captions that were chosen for a memorized image
    cache/attacked/KEY/    what attackers have of a target
    scratch/KEY/           pictures of a job that is not finished
    pictures/, leaks/      contact sheets, for people

Several processes and machines may share it. Everything in it may be deleted; it is then made again.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import AblationError
from ..files import replacing, write_json

_BEAT = 20.0
"""Seconds between signs of life of whoever works on a job."""
_STALE = 150.0
"""Seconds without one after which a job may be taken over."""


class Store:
    """Paths and files below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def result_path(self, key: str) -> Path:
        """The file of a job's result, which need not be there."""
        return self.root / "jobs" / f"{key}.json"

    def claim_path(self, key: str) -> Path:
        """The file that is there while somebody works on a job."""
        return self.root / "jobs" / f"{key}.claim"

    def cache(self, kind: str, key: str) -> Path:
        """A folder for things that several jobs use."""
        return self.root / "cache" / kind / key

    def scratch(self, key: str) -> Path:
        """A folder that is removed when the job is done."""
        return self.root / "scratch" / key

    def result(self, key: str) -> dict[str, Any] | None:
        """The result of a job, or None if it is not there or was damaged by something else than this program."""
        try:
            found = json.loads(self.result_path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and "result" in found else None

    def results(self) -> Iterator[dict[str, Any]]:
        """Every result that is there and whole, by key."""
        for path in sorted((self.root / "jobs").glob("*.json")):
            if (found := self.result(path.stem)) is not None:
                yield found

    def has_result(self, key: str) -> bool:
        """Whether a job is done, without reading what came out."""
        return self.result_path(key).is_file()

    def finish(self, key: str, value: dict[str, Any], *, keep_scratch: bool = False) -> None:
        """Write a job's result and remove its pictures.

        Raises:
            AblationError: the folder cannot be written.
        """
        write_json(self.result_path(key), value)
        if not keep_scratch:
            shutil.rmtree(self.scratch(key), ignore_errors=True)

    @contextlib.contextmanager
    def claimed(self, key: str) -> Iterator[bool]:
        """Whether this process may work on a job; if so, others see that it does until the block ends.

        Claims save work, they guard nothing: two that take over the same job do it twice with the same result.
        """
        path = self.claim_path(key)
        if not _take(path):
            yield False
            return
        ended = threading.Event()
        beating = threading.Thread(target=_beat, args=(path, ended), daemon=True)
        beating.start()
        try:
            yield True
        finally:
            ended.set()
            beating.join()
            with contextlib.suppress(OSError):
                path.unlink()


def save_pictures(folder: Path, images: np.ndarray) -> None:
    """Write uint8 [prompts, seeds, height, width, 3], one PNG with the seeds side by side for each prompt.

    Raises:
        AblationError: the folder cannot be written.
    """
    for number, row in enumerate(images):
        with replacing(folder / f"{number:03d}.png") as temporary:
            Image.fromarray(np.concatenate(list(row), axis=1)).save(temporary)


def load_pictures(folder: Path, prompts: int, seeds: int) -> np.ndarray | None:
    """What `save_pictures` wrote, or None if a picture is missing or damaged."""
    rows = []
    for number in range(prompts):
        try:
            with Image.open(folder / f"{number:03d}.png") as picture:
                row = np.asarray(picture.convert("RGB"))
        except (OSError, ValueError):
            return None
        if row.shape[1] % seeds:
            return None
        rows.append(np.stack(np.split(row, seeds, axis=1)))
    return np.stack(rows) if len({row.shape for row in rows}) == 1 else None


def has_pictures(folder: Path, prompts: int) -> bool:
    """Whether `load_pictures` would find a file for each prompt."""
    return all((folder / f"{number:03d}.png").is_file() for number in range(prompts))


def _take(path: Path) -> bool:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(f"{platform.node()} {os.getpid()}\n")
    except FileExistsError:
        try:
            if time.time() - path.stat().st_mtime < _STALE:
                return False
            os.utime(path)
        except FileNotFoundError:
            return _take(path)
    except OSError as error:
        raise AblationError(
            f"Cannot write {path} ({error.strerror or error}): choose another output folder."
        ) from error
    return True


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(_BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)
