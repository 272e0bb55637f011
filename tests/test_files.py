"""Files appear whole, with ordinary permissions, or not at all."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from concept_ablation.core.errors import AblationError
from concept_ablation.core.files import replacing, require_writable, write_json, write_text


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": "é"})
    with pytest.raises(TypeError), replacing(path) as temporary:
        temporary.write_bytes(b"half" + None)
    assert path.read_text(encoding="utf-8") == '{\n  "x": "é"\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"))
    assert list(tmp_path.iterdir()) == [path]


def test_the_temporary_name_keeps_the_suffix(tmp_path):
    with replacing(tmp_path / "new" / "a.png") as temporary:
        assert temporary.suffix == ".png" and temporary.parent == tmp_path / "new"
        temporary.write_bytes(b"x")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_clear_sentence(tmp_path, error):
    with pytest.raises(AblationError, match="disk is full"), replacing(tmp_path / "a"):
        raise error
    assert not list(tmp_path.iterdir())


def test_what_was_made_stays_where_the_old_file_cannot_be_replaced(tmp_path, monkeypatch):
    path = tmp_path / "delta.safetensors"
    path.write_bytes(b"old")

    def in_use(*_):
        raise PermissionError(errno.EACCES, "Access is denied")

    monkeypatch.setattr(os, "replace", in_use)
    said = r"close the programs that use it.*\.part\.safetensors"
    with pytest.raises(AblationError, match=said), replacing(path) as temporary:
        temporary.write_bytes(b"hours of work")
    assert path.read_bytes() == b"old" and temporary.read_bytes() == b"hours of work"


def test_a_folder_where_the_file_should_be_leaves_nothing_behind(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(AblationError, match="Cannot write"):
        write_json(tmp_path / "a.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_file_where_the_folder_should_be(tmp_path):
    write_text(tmp_path / "file", "")
    with pytest.raises(AblationError, match="is a file: choose a folder"):
        require_writable(tmp_path / "file")
    with pytest.raises(AblationError, match="Cannot write"):
        require_writable(tmp_path / "file" / "folder")
    with pytest.raises(AblationError, match="Cannot write"):
        require_writable(tmp_path / ("a" * 300))
    require_writable(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_tensors_are_as_readable_as_any_other_file(tmp_path):
    with replacing(tmp_path / "a.safetensors") as temporary:
        save_file({"x": torch.zeros(1)}, temporary)
    write_text(tmp_path / "b", "")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode
