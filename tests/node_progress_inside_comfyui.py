"""Tests of what a node shows while it works, collected by `test_nodes.py` only: they need ComfyUI's modules."""

from __future__ import annotations

import base64
import io
import json
import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comfy import model_management
from comfy.latent_formats import SD15
from PIL import Image
from server import PromptServer

from concept_ablation.core.errors import IncompatibleDelta
from concept_ablation.core.progress import Progress
from concept_ablation.nodes import images, progress


@pytest.fixture
def sent(monkeypatch):
    """What goes out over the websocket."""
    messages = []
    server = SimpleNamespace(
        client_id="me",
        send_sync=lambda *message: messages.append(message),
        send_progress_text=lambda *message: messages.append(message),
    )
    monkeypatch.setattr(PromptServer, "instance", server, raising=False)
    return messages


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it."""
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.time)
    return now


@pytest.fixture
def bar(monkeypatch):
    """What the progress bar is told: (done, total, preview)."""
    calls = []
    monkeypatch.setattr("comfy.utils.PROGRESS_BAR_HOOK", lambda *call, node_id: calls.append(call))
    return calls


def model() -> SimpleNamespace:
    return SimpleNamespace(load_device=torch.device("cpu"), model=SimpleNamespace(latent_format=SD15()))


# Pictures.


def test_images_keep_their_values():
    pictures = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    assert np.array_equal((images.as_image(pictures) * 255).round().numpy(), pictures)
    assert images.as_image(pictures[0]).shape == (1, 3, 4, 3)


def test_grid_places_row_by_row():
    shades = [Image.new("RGB", (4, 2), (10 * index,) * 3) for index in range(3)]
    canvas = np.array(images.grid(shades))
    assert canvas.shape == (4, 8, 3)
    assert [canvas[0, 0, 0], canvas[0, 4, 0], canvas[2, 0, 0], canvas[2, 4, 0]] == [0, 10, 20, 0]


def test_thumbnails_are_small_jpegs():
    uri = images.data_uri(np.full((300, 600, 3), 200, np.uint8))
    assert uri.startswith("data:image/jpeg;base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert picture.format == "JPEG"
    assert picture.size == (128, 64)


@pytest.mark.parametrize("count", [1, 5, 5000])
def test_the_loss_curve_falls_as_the_losses_do(count):
    canvas = np.array(images.loss_curve(np.linspace(1.0, 0.1, count).tolist())).astype(int)
    teal = (canvas[:, :, 2] - canvas[:, :, 0] > 30) & (canvas[:, :, 0] < 120)
    columns = np.flatnonzero(teal.any(axis=0))
    heights = [np.flatnonzero(teal[:, column])[0] for column in columns]
    assert columns[0] <= 12
    if count > 1:
        assert columns[-1] >= 468
        assert heights == sorted(heights)
        assert heights[-1] > 180


# Progress.


def test_events_are_few_and_the_last_is_always_sent(sent, clock, bar):
    callback = progress.NodeProgress("12:3", model(), chart=True)
    for step in range(1, 101):
        clock.time += 0.01
        callback(Progress("Training", step, 100, step * 0.01, 1 / step))
    assert len(bar) == 100
    assert 5 <= len(sent) <= 7
    assert {(name, client) for name, _, client in sent} == {("concept_ablation.progress", "me")}
    assert sent[-1][1] == {
        "node": "12:3",
        "phase": "Training",
        "step": 100,
        "total": 100,
        "seconds_left": 0.0,
        "loss": 0.01,
    }
    previews = [preview for _, _, preview in bar if preview is not None]
    assert 2 <= len(previews) <= 3
    assert bar[-1][2] is not None, "the finished curve is shown"


def test_events_are_json(sent, clock, bar):
    progress.NodeProgress("1", model(), chart=True)(Progress("Training", 0, 10, 0.0, math.nan))
    assert sent[0][1]["loss"] is sent[0][1]["seconds_left"] is None
    json.dumps(sent[0][1], allow_nan=False)


def test_nobody_is_told_without_a_client(sent, clock, bar):
    PromptServer.instance.client_id = None
    progress.NodeProgress("1", model(), chart=True)(Progress("Training", 1, 10, 0.0, 1.0))
    assert not sent


def test_a_node_without_the_chart_sends_no_event_and_shows_pictures_itself(sent, clock, bar):
    """Events name a node by its number, which a node of another workflow that is open may have."""
    callback = progress.NodeProgress("5", model())
    callback(Progress("Drawing", 1, 1, 0.0))
    before, after = np.zeros((4, 8, 8, 3), np.uint8), np.full((4, 8, 8, 3), 255, np.uint8)
    callback.send_pictures(before, after)
    assert not sent
    _, picture, _ = bar[-1][2]
    assert picture.size == (32, 16) and picture.getpixel((0, 0)) != picture.getpixel((0, 15))


def test_a_name_in_a_shared_workflow_cannot_put_script_on_the_page(sent):
    progress.show_text("3", "<img src=x onerror=alert(1)> & co: 75% → 0%")
    assert sent == [("&lt;img src=x onerror=alert(1)&gt; &amp; co: 75% → 0%", "3", "me")]


def test_phases_share_a_bar(clock, bar):
    callback = progress.NodeProgress("1", model(), ("before", "after"))
    for phase in ("before", "after", "other"):
        callback(Progress(phase, 5, 10, 0.0))
    assert [call[:2] for call in bar] == [(5, 20), (15, 20), (5, 10)]


def test_up_to_four_latents_are_shown_twice_a_second(clock, bar):
    callback = progress.NodeProgress("1", model())
    latents = torch.zeros(9, 4, 16, 24)
    for step in range(1, 5):
        callback(Progress("drawing", step, 10, 0.0, latents=latents))
        clock.time += 0.3
    previews = [preview for _, _, preview in bar]
    assert [preview is not None for preview in previews] == [True, False, True, False]
    kind, picture, limit = previews[0]
    assert (kind, picture.size, limit) == ("JPEG", (48, 32), 512)


def test_a_preview_that_fails_does_no_harm(clock, bar):
    callback = progress.NodeProgress("1", model())
    callback(Progress("drawing", 1, 10, 0.0, latents=torch.zeros(1, 7, 3, 3)))
    assert bar == [(1, 10, None)]


def test_cancel_stops_the_next_step(clock, bar):
    callback = progress.NodeProgress("1", model())
    model_management.interrupt_current_processing(True)
    with pytest.raises(model_management.InterruptProcessingException):
        callback(Progress("Training", 1, 10, 0.0, 1.0))
    assert not bar


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("MPS backend out of memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_to_do(error):
    with (
        pytest.raises(model_management.OOM_EXCEPTION, match=r"^Out of memory: lower it\.$"),
        progress.memory_advice("lower it"),
    ):
        raise error


def test_what_the_failed_step_held_is_free_when_comfyui_frees_its_models():
    held = []

    def fail() -> None:
        activations = torch.zeros(3)
        held.append(weakref.ref(activations))
        raise MemoryError

    with pytest.raises(model_management.OOM_EXCEPTION), progress.memory_advice("lower it"):
        fail()
    assert held[0]() is None


def test_other_errors_are_left_alone():
    error = IncompatibleDelta("It does not fit.")
    with pytest.raises(IncompatibleDelta) as caught, progress.memory_advice("lower it"):
        raise error
    assert caught.value is error
