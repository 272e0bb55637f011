"""The host that is a program of its own: models of the diffusers library, loaded one at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from ..core import delta_file
from ..core.delta import Delta, check_fits
from ..core.errors import AblationError
from ..core.judges import NETWORK_JUDGE
from ..core.progress import ProgressCallback, Reporter
from ..core.samplers import SampleSettings, draw_images
from .host import Applied, Host, ModelChoice

if TYPE_CHECKING:
    import numpy as np

    from ..core.denoiser import Denoiser
    from ..core.hosts.diffusers import ModelHints
    from ..core.metrics import Judge

EMBEDDED = "Emoji Diffusion"


class StandaloneHost(Host):
    """Models of the diffusers library: the embedded one, those offered at the start, and, if allowed, any typed one.

    Deltas are applied in `draw` only, so that an ablation always starts from the pretrained model.

    Args:
        output: folder that everything is written to.
        models: folders, `.safetensors` files or hub ids to offer beside the embedded model; the first is the default.
        free_model: whether others may be typed.
        device: as `load_denoiser` takes it.
        precision: as `load_denoiser` takes it.
        judge: as `Judge.load` takes it; None takes the embedded one for the embedded model.
    """

    draws = True

    def __init__(
        self,
        output: Path,
        models: Sequence[str] = (),
        *,
        free_model: bool = True,
        device: str | None = None,
        precision: str = "auto",
        judge: str | None = None,
    ) -> None:
        self.output_folder = output.resolve()
        self.delta_folder = self.output_folder / "deltas"
        self.models = [*(ModelChoice(name, name) for name in models), ModelChoice(f"{EMBEDDED} (embedded)", EMBEDDED)]
        self.free_model = free_model
        self._device, self._precision, self._judge_name = device, precision, judge
        self._lock = threading.Lock()
        self._loaded: tuple[str, Denoiser] | None = None
        self._judges: dict[str | None, Judge] = {}
        self._applied: dict[str, tuple[Delta, float]] = {}

    @contextlib.contextmanager
    def denoiser(self, model: str) -> Iterator[Denoiser]:
        with self._lock:
            if self._loaded is None or self._loaded[0] != model:
                self._loaded = None  # before the next one is loaded: two may not fit into memory
                self._loaded = (model, self._load(model))
            yield self._loaded[1]

    def judge(self, model: str, denoiser: Denoiser) -> Judge:
        from ..core.metrics import Judge

        name = self._judge_name or (None if model == EMBEDDED else NETWORK_JUDGE)
        if name not in self._judges:
            self._judges[name] = Judge.load(name, denoiser.device)
        return self._judges[name]

    def style_anchor(self, model: str) -> str:
        return self._hints(model).medium

    def categories(self, model: str) -> Mapping[str, str]:
        return self._hints(model).categories

    def _hints(self, model: str) -> ModelHints:
        from ..core.hosts.diffusers import EMBEDDED_MODEL, ModelHints, load_hints

        # only folders that may be chosen are looked into
        offered = self.free_model or model in {choice.value for choice in self.models}
        path = EMBEDDED_MODEL if model == EMBEDDED else Path(model)
        try:
            return load_hints(path) if offered and path.is_dir() else ModelHints()
        except (AblationError, OSError, ValueError):
            return ModelHints()

    def applied(self) -> tuple[Applied, ...]:
        return tuple(Applied(file, strength) for file, (_, strength) in self._applied.items())

    def apply(self, path: Path, strength: float) -> None:
        delta = delta_file.load(path)
        # for another model than the loaded one `draw` checks, when that is there
        loaded, made_for = self._loaded, delta.metadata.get("concept_ablation.base_model", "")
        if loaded is not None and made_for in ("", loaded[1].name):
            check_fits(delta, loaded[1])
        self._applied[path.name] = (delta, strength)

    def remove(self, file: str | None = None) -> None:
        if file is None:
            self._applied.clear()
        else:
            self._applied.pop(file, None)

    def draw(
        self,
        model: str,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SampleSettings,
        on_progress: ProgressCallback,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        edits = list(self._applied.values())
        count = len(prompts) * settings.steps
        with self.denoiser(model) as denoiser, ExitStack() as stack:
            for delta, _ in edits:
                check_fits(delta, denoiser)
            reporter = Reporter(on_progress, "Drawing", count * 2 if edits else count)
            plain = draw_images(denoiser, prompts, seeds, settings, reporter=reporter)
            if not edits:
                return plain, None
            for delta, strength in edits:
                stack.enter_context(delta.attach(denoiser, strength))
            return plain, draw_images(denoiser, prompts, seeds, settings, reporter=reporter)

    def _load(self, model: str) -> Denoiser:
        from ..core.hosts.diffusers import load_denoiser

        if not self.free_model and model not in {choice.value for choice in self.models}:
            raise AblationError(f"The model '{model}' is not offered here: choose one of the list.")
        name = None if model == EMBEDDED else model
        return load_denoiser(name, device=self._device, precision=self._precision)
