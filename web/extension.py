"""The tab inside Stable Diffusion WebUI: Forge's loaded model as the host, or what to do where there is no Forge.

`scripts/concept_ablation.py`, which the WebUI finds, registers `make_tab`, `add_settings` and `apply_again`. Imports of
the WebUI and of gradio are inside functions: the first exist only there, and gradio 3 could not import the tab.
"""

from __future__ import annotations

import contextlib
import functools
import html
import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core import delta_file
from ..core.delta import Delta
from ..core.errors import AblationError
from .host import Applied, Host, ModelChoice
from .library import safe_name

if TYPE_CHECKING:
    import gradio as gr
    from backend.diffusion_engine.base import ForgeDiffusionEngine

    from ..core.denoiser import Denoiser
    from ..core.metrics import Judge
    from ..core.progress import Progress
    from .jobs import Runner

TITLE, ELEMENT = "Concept Ablation", "concept_ablation"
JUDGE, SUBFOLDER = "concept_ablation_judge", "concept_ablation_subfolder"
"""Names of the settings."""
OLDEST_GRADIO = (4, 40)

_MARK = "concept_ablation:"
"""How the names of our patches begin among a patcher's; the file's name and its time follow."""
_LOADED = "loaded"
_kept: dict[str, list[tuple[Path, float]]] = {}
"""A checkpoint's file -> the deltas that are applied to it and their strengths, which outlive the loaded model."""
_log = logging.getLogger(__name__)


class WebUIHost(Host):
    """Forge's loaded model. Without LoRAs of the last prompt, which belong to that prompt; without applied deltas.

    Whoever works with the model holds the WebUI's queue lock, so that no generation runs at the same time.
    """

    def __init__(self) -> None:
        from modules import paths_internal, shared

        self.models = [ModelChoice("The checkpoint chosen at the top of the page", _LOADED)]
        subfolder = str(getattr(shared.opts, SUBFOLDER, "") or "").strip()
        loras = Path(shared.cmd_opts.lora_dir)
        self.delta_folder = loras / safe_name(subfolder) if subfolder else loras
        self.output_folder = Path(paths_internal.default_output_dir) / "concept-ablation"

    @contextlib.contextmanager
    def denoiser(self, model: str) -> Iterator[Denoiser]:
        from modules import shared
        from modules.call_queue import queue_lock

        from ..core.hosts.webui import opened

        with queue_lock:
            shared.state.begin(job=TITLE)
            try:
                engine = _engine()
                engine.set_clip_skip(int(shared.opts.CLIP_stop_at_last_layers))
                with opened(engine, _without_ours(engine)) as denoiser:
                    yield denoiser
            finally:
                # as Forge does after a generation: the next job must not find the button pressed
                shared.state.interrupted = shared.state.stopping_generation = shared.state.skipped = False
                shared.state.textinfo = None
                shared.state.end()

    def judge(self, model: str, denoiser: Denoiser) -> Judge:
        from modules import shared

        from ..core.judges import NETWORK_JUDGE
        from ..core.metrics import Judge

        name = str(getattr(shared.opts, JUDGE, "") or "").strip() or NETWORK_JUDGE
        # not kept: Forge could not move it aside when a generation needs the memory
        return Judge.load(name, denoiser.device)

    def applied(self) -> tuple[Applied, ...]:
        from modules import shared

        objects = getattr(shared.sd_model, "forge_objects_original", None)
        if objects is None:
            return ()
        keys = dict.fromkeys((*objects.unet.lora_patches, *objects.clip.patcher.lora_patches))
        return tuple(Applied(_file(key[0]), key[1]) for key in keys if key[0].startswith(_MARK))

    def apply(self, path: Path, strength: float) -> None:
        delta = delta_file.load(path)
        with _free_queue():
            engine = _engine()
            _patch(engine, delta, path, strength)
            _forget(engine, path.name)
            _kept.setdefault(engine.filename, []).append((path, strength))

    def remove(self, file: str | None = None) -> None:
        from modules import shared

        if any(file in (None, applied.file) for applied in self.applied()):
            with _free_queue():
                _install(shared.sd_model, _without_ours(shared.sd_model, file))
        _forget(shared.sd_model, file)

    def files_changed(self) -> None:
        """Let Forge's LoRA extension, if it is on, see what was saved and what is gone."""
        networks = sys.modules.get("networks")
        if networks is not None:
            networks.list_available_networks()

    def interrupted(self) -> bool:
        from modules import shared

        return bool(shared.state.interrupted or shared.state.stopping_generation)

    def show(self, progress: Progress | None) -> None:
        from modules import shared

        if progress is None:
            self.files_changed()
            return
        state = shared.state
        state.job_count, state.job_no = 1, 0
        state.sampling_steps, state.sampling_step = progress.total, progress.step
        state.textinfo = f"{progress.phase}: {progress.step} of {progress.total}"


def make_tab() -> gr.Blocks:
    """The tab, or a page that says what to do instead where it cannot work."""
    import gradio as gr

    if can_work():
        from .tab import build_tab

        return build_tab(WebUIHost(), runner=_runner())
    with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        gr.HTML(_instead())
    return blocks


@functools.cache
def _runner() -> Runner:
    """One queue for as long as the program runs: *Reload UI* makes the tab anew while jobs go on."""
    from .jobs import Runner

    return Runner()


def add_settings() -> None:
    """Our section of the WebUI's settings."""
    from modules import shared

    section = (ELEMENT, TITLE)
    judge = "CLIP model that measures results: an open_clip name, or a local open_clip folder (empty: ViT-B-32)"
    subfolder = "Subfolder of the LoRA folder for saved deltas (empty: the LoRA folder; reload the UI afterwards)"
    shared.opts.add_option(JUDGE, shared.OptionInfo("", judge, section=section))
    shared.opts.add_option(SUBFOLDER, shared.OptionInfo("", subfolder, section=section))


def apply_again(engine: ForgeDiffusionEngine) -> None:
    """Apply the deltas of a checkpoint to the engine that Forge has just made of it.

    Forge makes a new one, which has no patches, for every other VAE or precision and when it comes back from another
    checkpoint (refiner, second pass, X/Y/Z plot). It calls this at the end of its loading, where the engine is whole.
    Whoever made it load has the queue lock already, and a generation goes on afterwards: so nothing is raised.
    """
    for path, strength in tuple(_kept.get(getattr(engine, "filename", ""), ())):
        try:
            # as when it was applied by hand, where Forge's loading is not around it
            with torch.inference_mode(False):
                _patch(engine, delta_file.load(path), path, strength)
        except Exception:
            _log.exception("The model was loaded again, and %s could not be applied to it", path.name)


def can_work() -> bool:
    """Whether this is Forge, with a gradio that can show the tab.

    Not one of the forks that have Forge's packages but went on from there: Neo has no engine of Stable Diffusion 2 any
    more, no emphasis setting in its text engines, and in its newer versions a list of LoRA folders.
    """
    import gradio as gr
    from modules import shared

    version = tuple(int(number) for number in gr.__version__.split(".")[:2])
    try:
        engines = importlib.util.find_spec("backend.diffusion_engine.sd20") is not None
    except ModuleNotFoundError:
        return False
    return engines and version >= OLDEST_GRADIO and hasattr(shared.cmd_opts, "lora_dir")


def _instead() -> str:
    from modules import sd_models, shared

    root = Path(__file__).resolve().parents[1]
    program = root / ".venv" / ("Scripts/concept-ablation.exe" if sys.platform == "win32" else "bin/concept-ablation")
    checkpoints = [info.filename for info in getattr(sd_models, "checkpoints_list", {}).values()]
    model = checkpoints[0] if checkpoints else "the checkpoint's path"
    loras = getattr(shared.cmd_opts, "lora_dir", "models/Lora")
    output = root / "outputs" / "ui"
    command = f'"{program}" ui --model "{model}" --output "{output}"'
    # PowerShell takes a command that begins with a quotation mark for a text
    terminal = "the Command Prompt (not PowerShell)" if sys.platform == "win32" else "a terminal"
    install, command, deltas, loras = (
        f"<code>{html.escape(str(text))}</code>"
        for text in (f'python "{root / "install.py"}" demo', command, output / "deltas", loras)
    )
    return (
        "<p>Inside a WebUI, Concept Ablation works in lllyasviel's Forge only (not in Neo, Classic, reForge or A1111), "
        "so here it runs as a program of its own, for Stable Diffusion 1.x checkpoints: in "
        f"{terminal}, run {install} once, then {command}.</p>"
        f"<p>Copy the file that it saves in {deltas} into {loras} and put &lt;lora:its-name:1&gt; into a prompt: the "
        "WebUI's own Lora extension loads it.</p>"
    )


def _engine() -> ForgeDiffusionEngine:
    """The model of the chosen checkpoint, which Forge itself loads when the next generation begins."""
    from modules import sd_models

    parameters = sd_models.model_data.forge_loading_parameters
    if not parameters or parameters.get("checkpoint_info") is None:
        raise AblationError("There is no checkpoint: choose one at the top of the page.")
    try:
        engine, _ = sd_models.forge_model_reload()
        if engine is None:
            # after one that it could not load, Forge takes the checkpoint before it for loaded still
            sd_models.model_data.forge_hash = ""
            engine, _ = sd_models.forge_model_reload()
    except ValueError as error:
        raise AblationError(f"Forge cannot load the chosen checkpoint ({error}): choose another one.") from error
    except AttributeError as error:
        # its loader gives None, which is then used
        raise AblationError("Forge does not know this kind of checkpoint: choose another one.") from error
    return engine


def _patch(engine: ForgeDiffusionEngine, delta: Delta, path: Path, strength: float) -> None:
    """Put a delta on the engine, in place of what is there of the same file."""
    from ..core.hosts.webui import architecture_of, patched

    architecture_of(engine)
    objects = _without_ours(engine, path.name)
    # the time, because Forge takes patches of the same name and strength for the same patches
    name = f"{_MARK}{path.stat().st_mtime_ns}:{path.name}"
    objects.unet, objects.clip = patched(objects.unet, objects.clip, delta, strength, name)
    _install(engine, objects)


def _forget(engine: ForgeDiffusionEngine, file: str | None) -> None:
    """Keep one delta, or all of them, no longer for the engine's checkpoint."""
    checkpoint = getattr(engine, "filename", "")
    _kept[checkpoint] = [kept for kept in _kept.get(checkpoint, ()) if file not in (None, kept[0].name)]


def _without_ours(engine: ForgeDiffusionEngine, file: str | None = None) -> Any:
    """The engine's own `ForgeObjects` with our patches of that file, or all of ours, left out."""

    def ours(key: tuple[Any, ...]) -> bool:
        return key[0].startswith(_MARK) and file in (None, _file(key[0]))

    objects = engine.forge_objects_original.shallow_copy()
    objects.unet, objects.clip = objects.unet.clone(), objects.clip.clone()
    for patcher in (objects.unet, objects.clip.patcher):
        patcher.lora_patches = {key: patches for key, patches in patcher.lora_patches.items() if not ours(key)}
    return objects


def _install(engine: ForgeDiffusionEngine, objects: Any) -> None:
    """Make `objects` what every generation starts from, and its LoRAs be counted from there."""
    engine.forge_objects_original = objects
    engine.forge_objects = objects.shallow_copy()
    engine.forge_objects_after_applying_lora = objects.shallow_copy()
    engine.current_lora_hash = str([])


def _file(mark: str) -> str:
    return mark.removeprefix(_MARK).partition(":")[2]


@contextlib.contextmanager
def _free_queue() -> Iterator[None]:
    """The WebUI's queue lock for a moment.

    Raises:
        AblationError: a generation or an ablation has it, for which no page should wait.
    """
    from modules.call_queue import queue_lock

    if not queue_lock.acquire(blocking=False):
        raise AblationError("The model is busy: wait until the generation or the ablation has ended, then try again.")
    try:
        yield
    finally:
        queue_lock.release()
