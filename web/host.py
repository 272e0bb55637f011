"""What the tab asks of the program that it runs in: which models there are, one as a Denoiser, where files belong.

`standalone.py` is the program of its own (models of the diffusers library); a WebUI gives its loaded model instead.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from ..core.denoiser import Denoiser
    from ..core.metrics import Judge
    from ..core.progress import Progress, ProgressCallback
    from ..core.samplers import SampleSettings


@dataclass(frozen=True)
class ModelChoice:
    """A model that can be chosen: what it is called on the page, and what the host finds it by."""

    label: str
    value: str


@dataclass(frozen=True)
class Applied:
    """A saved delta that is at work on the host's model."""

    file: str
    strength: float


class Host(ABC):
    """The program around the tab.

    Attributes:
        models: what can be chosen, the first one at the start; a host with one loaded model gives that one.
        free_model: whether a model may be typed that is not among them (a folder, a file, a hub id).
        delta_folder: where deltas are saved and listed, such as a WebUI's LoRA folder.
        output_folder: where the reports of the runs go.
        draws: whether the page has a place to draw pictures; a WebUI has its own.
    """

    models: Sequence[ModelChoice]
    free_model: bool = False
    delta_folder: Path
    output_folder: Path
    draws: bool = False

    @abstractmethod
    def denoiser(self, model: str) -> contextlib.AbstractContextManager[Denoiser]:
        """The pretrained model with nothing applied to it, for one job at a time.

        Raises:
            AblationError: it cannot be loaded.
        """

    @abstractmethod
    def judge(self, model: str, denoiser: Denoiser) -> Judge:
        """The CLIP model that measures what `model` draws."""

    def style_anchor(self, model: str) -> str:
        """What a style is a style of, for most of what `model` draws: the anchor that is suggested for styles."""
        return "painting"

    def categories(self, model: str) -> Mapping[str, str]:
        """What each of the concepts that `model` is known to draw is one of; most models tell nothing."""
        return {}

    @abstractmethod
    def applied(self) -> tuple[Applied, ...]:
        """The deltas that are applied now, in the order in which they came."""

    @abstractmethod
    def apply(self, path: Path, strength: float) -> None:
        """Apply a saved delta to the loaded model, or change its strength.

        Raises:
            AblationError: it cannot be read, or does not fit.
        """

    @abstractmethod
    def remove(self, file: str | None = None) -> None:
        """Take one applied delta off, or all of them."""

    def draw(
        self,
        model: str,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SampleSettings,
        on_progress: ProgressCallback,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Pictures of the pretrained model and, if deltas are applied, of the model with them (see `draws`)."""
        raise NotImplementedError

    def files_changed(self) -> None:  # noqa: B027 - most hosts keep no list of their own
        """Take note that files in `delta_folder` were saved or deleted: a WebUI lists its LoRAs itself."""

    def interrupted(self) -> bool:
        """Whether the host's own interrupt button was pressed."""
        return False

    def show(self, progress: Progress | None) -> None:  # noqa: B027 - a host without a bar shows nothing
        """Show progress in the host's own bar; None when a job has ended."""
