"""The pages *Saved deltas* and *Try it* without a browser: what their events answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from concept_ablation.core.delta import Delta, LayerDelta
from concept_ablation.core.errors import AblationError
from concept_ablation.core.progress import Progress
from concept_ablation.tests.web.tiny import TinyHost
from concept_ablation.web.ablating import Pictures
from concept_ablation.web.jobs import Job, Runner
from concept_ablation.web.library import save_new

SECONDS = 60
HEADER = {"concept_ablation.target": "fish"}


@pytest.fixture
def host(tmp_path: Path, make_model: Callable[..., Any]) -> TinyHost:
    """A host with two saved deltas, of which `b` is the newer one."""
    host = TinyHost(tmp_path, make_model())
    for name in ("a", "b"):
        save_new(Delta({"lora_unet_x": LayerDelta(torch.ones(2, 2))}, HEADER), host.delta_folder, name)
    return host


@pytest.fixture
def saved(gradio: Any, host: TinyHost) -> Any:
    """The page *Saved deltas*."""
    from concept_ablation.web.saved_page import SavedPage

    with gradio.Blocks():
        return SavedPage(host)


# --- Saved deltas


def test_a_delta_that_a_busy_model_uses_is_not_deleted(saved, host):
    def busy(file: str | None = None) -> None:
        raise AblationError("The model is busy: wait.")

    path = host.delta_folder / "a.safetensors"
    host.remove = busy
    assert "The model is busy" in saved._do_delete(path.name, path.name)[0] and path.is_file()
    assert "The model is busy" in saved._do_remove(path.name)[0]
    del host.remove
    assert "is deleted" in saved._do_delete(path.name, path.name)[0] and not path.exists()


def test_what_was_asked_about_is_deleted_and_not_what_is_chosen_by_then(gradio, host):
    from concept_ablation.web.saved_page import SavedPage

    with gradio.Blocks() as blocks:
        page = SavedPage(host)
        page.connect()
    (deletion,) = (event for event in blocks.fns.values() if event.fn == page._do_delete)
    assert deletion.inputs == [page._asked, page.choice]
    told, asked, question, confirm = page._ask("a.safetensors")
    assert (told, asked, confirm["visible"]) == ("", "a.safetensors", True) and "Delete a.safetensors?" in question
    told, listed, *rest = page._do_delete(asked, "b.safetensors")
    assert "a.safetensors is deleted" in told and [path.name for path in host.delta_folder.iterdir()] == [
        "b.safetensors"
    ]
    assert listed["choices"] == ["b.safetensors"] and "value" not in listed
    assert rest[:-1] == [gradio.skip()] * 3
    assert "no saved delta" in page._ask("a.safetensors")[0]


def test_reading_the_list_again_leaves_what_is_chosen_and_asked(gradio, saved):
    listed, *rest, _ = saved.refresh("a.safetensors")
    assert len(listed["choices"]) == 2 and "value" not in listed and rest == [gradio.skip()] * 3
    listed, details, _, confirm, _ = saved.refresh("gone.safetensors")
    assert listed["value"] in listed["choices"] and listed["value"] in details and confirm["visible"] is False


def test_what_chooses_another_delta_takes_the_question_away(saved):
    merged = saved._do_merge([("a.safetensors", 1.0), ("b.safetensors", 1.0)], "both")
    exported = saved._do_export("a.safetensors", 1)
    for (listed, details, _, confirm, _), file in (
        (merged[3:], "both.safetensors"),
        (exported[1:], "a-rank1.safetensors"),
    ):
        assert listed["value"] == file and file in details and confirm["visible"] is False


def test_the_host_hears_of_files_that_are_made_and_deleted(saved, host):
    heard = []
    host.files_changed = lambda: heard.append(sorted(path.stem for path in host.delta_folder.iterdir()))
    saved._do_merge([("a.safetensors", 1.0), ("b.safetensors", 1.0)], "c")
    saved._do_export("a.safetensors", 1)
    saved._do_delete("a.safetensors", "a.safetensors")
    assert heard == [["a", "b", "c"], ["a", "a-rank1", "b", "c"], ["a-rank1", "b", "c"]]


def test_only_who_downloads_a_delta_has_it_copied(gradio, saved, tmp_path):
    """gradio copies every file that it is given for a download."""
    from concept_ablation.web.app import KEPT_COPIES, make_app

    for answer in (saved._choose("a.safetensors"), saved.refresh(None)[1:]):
        assert answer[1] == gradio.update(value=None, visible=False)
    told, file = saved._do_download("a.safetensors")
    assert told == "" and file["value"].endswith("a.safetensors")
    assert "no saved delta" in saved._do_download("../a.safetensors")[0]
    assert make_app(tmp_path).delete_cache == KEPT_COPIES


# --- Try it


def test_a_page_that_is_loaded_while_a_picture_is_drawn_gets_it(gradio, host):
    from concept_ablation.web.draw_page import DrawPage

    runner, go = Runner(), threading.Event()
    pictures = Pictures("a fish", (7,), np.zeros((1, 8, 8, 3), np.uint8), None)

    def draw(job: Job) -> Pictures:
        while not go.wait(0.005):
            job.step(Progress("Drawing", 1, 2, 0.1))
        return pictures

    with gradio.Blocks():
        page = DrawPage(host, runner, gradio.State(""), gradio.Textbox())
    assert [value for value in page.refresh("me")[1:] if isinstance(value, str)] == ["", ""]
    job = runner.submit(Job("me-draw", "a fish", draw))
    for look, shown in ((page.refresh, ""), (page._poll, gradio.skip())):
        _, status, cancel, timer, drawn = look("me")
        assert "ca-note" in status and cancel["visible"] and timer["active"] and drawn == shown
    go.set()
    assert job.wait(SECONDS)
    for look in (page._poll, page.refresh):
        _, status, cancel, timer, drawn = look("me")
        assert status == "" and not cancel["visible"] and not timer["active"] and "seed 7" in drawn
    assert "seed 7" not in page.refresh("another")[-1]


def test_cancel_is_gone_when_it_was_pressed_and_the_pictures_before_stay(gradio, host):
    from concept_ablation.web.draw_page import DrawPage

    runner, begun, go = Runner(), threading.Event(), threading.Event()

    def draw(job: Job) -> None:
        begun.set()
        assert go.wait(SECONDS)
        job.step(Progress("Drawing", 1, 2, 0.1))

    with gradio.Blocks():
        page = DrawPage(host, runner, gradio.State(""), gradio.Textbox())
    pictures = Pictures("a fish", (7,), np.zeros((1, 8, 8, 3), np.uint8), None)
    assert runner.submit(Job("me-draw", "a fish", lambda job: pictures)).wait(SECONDS)
    job = runner.submit(Job("me-draw", "a fish", draw))
    assert begun.wait(SECONDS)
    page._stop("me")
    _, _, cancel, timer, _ = page._poll("me")
    assert not cancel["visible"] and timer["active"], "it is watched until it has stopped"
    go.set()
    assert job.wait(SECONDS)
    _, status, cancel, timer, drawn = page._poll("me")
    assert "Cancelled." in status and not cancel["visible"] and not timer["active"] and "seed 7" in drawn
