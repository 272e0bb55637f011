"""What a user sees of a long node while it works, and how it stops: bar, preview, websocket event, Cancel, memory."""

from __future__ import annotations

import contextlib
import html
import logging
import math
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from comfy import model_management
from comfy.utils import ProgressBar
from latent_preview import MAX_PREVIEW_RESOLUTION, Latent2RGBPreviewer, LatentPreviewer, get_previewer
from PIL import Image
from server import PromptServer
from torch import Tensor

from ..core.errors import is_out_of_memory
from ..core.progress import Progress
from .images import data_uri, grid, loss_curve

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

EVENT = "concept_ablation.progress"
_EVENT_SECONDS, _LATENT_SECONDS, _CURVE_SECONDS = 0.2, 0.5, 1.0
_PREVIEWED = 4

Preview = tuple[str, Image.Image, int | None]


class NodeProgress:
    """The progress callback of one node while it executes.

    Args:
        node_id: the node's unique id.
        model: whose latents will be drawn.
        phases: phases of equal length that share one bar; any other phase has the bar to itself.
        chart: whether the node has the live chart, which events are for; others show pictures as a preview.
        workflow: id of the workflow that the node is part of, which its events name; None where nobody knows.

    Raises:
        InterruptProcessingException: from a call, after the user pressed Cancel.
    """

    def __init__(
        self,
        node_id: str,
        model: ModelPatcher,
        phases: Sequence[str] = (),
        *,
        chart: bool = False,
        workflow: str | None = None,
    ) -> None:
        self._node_id = node_id
        self._chart = chart
        self._origin = {"workflow": workflow} if workflow else {}
        self._phases = tuple(phases)
        self._bar = ProgressBar(1, node_id)
        self._previewer = make_previewer(model)
        self._losses: list[float] = []
        self._last: dict[str, float] = {}

    def __call__(self, progress: Progress) -> None:
        model_management.throw_exception_if_processing_interrupted()
        if progress.loss is not None:
            self._losses.append(progress.loss)
        finished = progress.step >= progress.total
        index, count = 0, 1
        if progress.phase in self._phases:
            index, count = self._phases.index(progress.phase), len(self._phases)
        done = index * progress.total + progress.step
        self._bar.update_absolute(done, count * progress.total, self._preview(progress, finished))
        if self._chart and (self._due("event", _EVENT_SECONDS) or finished):
            send_event({**event(self._node_id, progress), **self._origin})

    def show(self, picture: Image.Image) -> None:
        """Leave `picture` on the node: the front end keeps the last preview, also when the node has finished."""
        self._bar.update_absolute(self._bar.total, preview=("JPEG", picture, MAX_PREVIEW_RESOLUTION))

    def send_pictures(self, before: np.ndarray, after: np.ndarray) -> None:
        """Show the same images before and after the edit, uint8 [N, H, W, 3], as thumbnails: two rows."""
        if not self._chart:
            rows = [np.concatenate(list(images), axis=1) for images in (before, after)]
            self.show(Image.fromarray(np.concatenate(rows)))
            return
        pictures = {"before": [data_uri(image) for image in before], "after": [data_uri(image) for image in after]}
        loss = self._losses[-1] if self._losses else None
        done = Progress("Before and after", len(before), len(before), 0.0, loss)
        send_event({**event(self._node_id, done), **self._origin, "pictures": pictures})

    def _preview(self, progress: Progress, finished: bool) -> Preview | None:
        try:
            if progress.latents is not None and self._due("latents", _LATENT_SECONDS):
                pictures = latent_pictures(self._previewer, progress.latents[:_PREVIEWED])
                return "JPEG", grid(pictures), MAX_PREVIEW_RESOLUTION
            if progress.loss is not None and (self._due("curve", _CURVE_SECONDS) or finished):
                return "JPEG", loss_curve(self._losses), None
        except Exception:
            logging.warning("Concept Ablation: no preview", exc_info=True)
        return None

    def _due(self, what: str, seconds: float) -> bool:
        now = time.monotonic()
        if now - self._last.get(what, -math.inf) < seconds:
            return False
        self._last[what] = now
        return True


def event(node_id: str, progress: Progress) -> dict[str, Any]:
    """The content of the websocket event; numbers that JSON lacks become null."""
    return {
        "node": node_id,
        "phase": progress.phase,
        "step": progress.step,
        "total": progress.total,
        "seconds_left": _finite(progress.seconds_left),
        "loss": _finite(progress.loss),
    }


def send_event(content: dict[str, Any]) -> None:
    """Send to the client that queued the graph; a graph that was queued without a client has no one to tell."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and server.client_id is not None:
        server.send_sync(EVENT, content, server.client_id)


def show_text(node_id: str, text: str) -> None:
    """Show text on the node, as stock nodes do. The front end takes it for HTML, and names come from the workflow's
    author, so what HTML would read as a tag is escaped.
    """
    server = getattr(PromptServer, "instance", None)
    if server is not None and server.client_id is not None:
        server.send_progress_text(html.escape(text), node_id, server.client_id)


def make_previewer(model: ModelPatcher) -> LatentPreviewer:
    """The previewer that the user's settings choose. ComfyUI's default is none; these nodes work for minutes, so they
    show the cheap one then.
    """
    latent_format = model.model.latent_format
    return get_previewer(model.load_device, latent_format) or Latent2RGBPreviewer(
        latent_format.latent_rgb_factors,
        latent_format.latent_rgb_factors_bias,
        latent_format.latent_rgb_factors_reshape,
    )


@torch.no_grad()
def latent_pictures(previewer: LatentPreviewer, latents: Tensor) -> list[Image.Image]:
    """What each of the latents [N, C, h, w] shows, roughly; usually h x w pixels."""
    # a previewer looks at the first of a batch only
    return [previewer.decode_latent_to_preview(latents[index : index + 1]) for index in range(len(latents))]


@contextlib.contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Say what to do when memory runs out, in one sentence and as the error that makes ComfyUI free its models."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # what the failed step had in its variables would stay in memory while ComfyUI tries to free some
        traceback.clear_frames(error.__traceback__)
        raise model_management.OOM_EXCEPTION(f"Out of memory: {advice}.") from None


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
