"""What the extension takes from Stable Diffusion WebUI Forge, as read in its source at commit dfdcbab, and stand-ins
that allow just that. Imports nothing of this package, so that a test can begin without it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

CALLS: dict[str, tuple[str, ...]] = {
    "modules/script_callbacks.py:on_ui_tabs": ("callback",),
    "modules/script_callbacks.py:on_ui_settings": ("callback",),
    "modules/script_callbacks.py:on_model_loaded": ("callback",),
    "modules/options.py:OptionInfo.__init__": ("default", "label", "section"),
    "modules/options.py:Options.add_option": ("key", "info"),
    "modules/shared_state.py:State.begin": ("job",),
    "modules/shared_state.py:State.end": (),
    "modules/fifo_lock.py:FIFOLock.acquire": ("blocking",),
    "modules/fifo_lock.py:FIFOLock.release": (),
    "modules/sd_models.py:forge_model_reload": (),
    "modules/prompt_parser.py:SdConditioning.__init__": ("prompts", "width", "height"),
    "extensions-builtin/sd_forge_lora/networks.py:list_available_networks": (),
    "backend/memory_management.py:load_models_gpu": ("models", "memory_required"),
    "backend/memory_management.py:soft_empty_cache": (),
    "backend/attention.py:attention_pytorch": ("q", "k", "v", "heads"),
    "backend/patcher/base.py:ModelPatcher.clone": (),
    "backend/patcher/base.py:ModelPatcher.add_patches": ("filename", "patches", "strength_patch", "online_mode"),
    "backend/patcher/clip.py:CLIP.clone": (),
    "backend/patcher/lora.py:load_lora": ("lora", "to_load"),
    "backend/patcher/lora.py:model_lora_keys_clip": ("model", "key_map"),
    "backend/patcher/lora.py:model_lora_keys_unet": ("model", "key_map"),
    "backend/patcher/lora.py:merge_lora_to_weight": ("patches", "weight"),
    "backend/patcher/vae.py:VAE.encode": ("pixel_samples",),
    "backend/patcher/vae.py:VAE.decode": ("samples_in",),
    "backend/nn/vae.py:IntegratedAutoencoderKL.process_in": ("latent",),
    "backend/nn/vae.py:IntegratedAutoencoderKL.process_out": ("latent",),
    "backend/modules/k_model.py:KModel.apply_model": ("x", "t", "c_crossattn", "transformer_options"),
    "backend/modules/k_model.py:KModel.memory_required": ("input_shape",),
    "backend/diffusion_engine/base.py:ForgeObjects.shallow_copy": (),
    "backend/diffusion_engine/sd15.py:StableDiffusion.get_learned_conditioning": ("prompt",),
    "backend/diffusion_engine/sd20.py:StableDiffusion2.get_learned_conditioning": ("prompt",),
    "backend/diffusion_engine/sdxl.py:StableDiffusionXL.get_learned_conditioning": ("prompt",),
    "backend/diffusion_engine/sdxl.py:StableDiffusionXL.set_clip_skip": ("clip_skip",),
    "packages_3rdparty/comfyui_lora_collection/utils.py:unet_to_diffusers": ("unet_config",),
}
"""Source file and definition -> the parameters that we give. What it asks for beyond these must have a default."""

NAMES: dict[str, str] = {
    "modules/shared_state.py": "interrupted stopping_generation skipped job_count job_no sampling_step sampling_steps "
    "textinfo begin end",
    "modules/shared.py": "OptionInfo cmd_opts opts sd_model state",
    "modules/shared_options.py": "CLIP_stop_at_last_layers",
    "modules/call_queue.py": "queue_lock",
    "modules/paths_internal.py": "default_output_dir",
    "modules/sd_models.py": "checkpoints_list filename forge_loading_parameters checkpoint_info model_data "
    "model_loaded_callback",
    "extensions-builtin/sd_forge_lora/preload.py": "--lora-dir",
    "backend/operations.py": "merge_lora_to_weight Linear",
    "backend/diffusion_engine/base.py": "forge_objects forge_objects_original forge_objects_after_applying_lora "
    "current_lora_hash",
    "backend/modules/k_model.py": "computation_dtype diffusion_model predictor storage_dtype",
    "backend/modules/k_prediction.py": "prediction_type sigmas",
    "backend/nn/unet.py": "attn1 attn2 input_blocks n_heads output_blocks patches_replace ResBlock SpatialTransformer",
    "backend/patcher/base.py": "load_device lora_patches model model_options",
    "backend/patcher/clip.py": "cond_stage_model patcher tokenizer",
    "backend/patcher/vae.py": "first_stage_model latent_channels",
    "backend/text_processing/classic_engine.py": "clip_skip emphasis",
}
"""Source file -> what else of it we read or set."""

IMPORTS = {
    "backend.attention.attention_pytorch",
    "backend.diffusion_engine.base.ForgeDiffusionEngine",
    "backend.diffusion_engine.base.ForgeObjects",
    "backend.diffusion_engine.sd15.StableDiffusion",
    "backend.diffusion_engine.sd20.StableDiffusion2",
    "backend.diffusion_engine.sdxl.StableDiffusionXL",
    "backend.memory_management",
    "backend.operations",
    "backend.patcher.clip.CLIP",
    "backend.patcher.lora.load_lora",
    "backend.patcher.lora.model_lora_keys_clip",
    "backend.patcher.lora.model_lora_keys_unet",
    "backend.patcher.unet.UnetPatcher",
    "modules.call_queue.queue_lock",
    "modules.paths_internal",
    "modules.prompt_parser.SdConditioning",
    "modules.script_callbacks",
    "modules.sd_models",
    "modules.shared",
    "packages_3rdparty.comfyui_lora_collection.utils.unet_to_diffusers",
}
"""Every name that we import from Forge."""


def checked(call: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which fails if it is called with other parameters than the table has."""
    names = CALLS[call]

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        unknown = set(kwargs) - set(names)
        if unknown or len(args) > len(names):
            raise TypeError(f"{call} is called with {args} {kwargs}, which the contract does not have")
        return function(**dict(zip(names, args, strict=False)), **kwargs)

    return stand_in


class State:
    """`shared.state`, with nothing but what the table names."""

    __slots__ = ("job", *(name for name in NAMES["modules/shared_state.py"].split() if name not in ("begin", "end")))

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, None)
        self.interrupted = self.stopping_generation = False
        self.job = ""

    def begin(self, *args: Any, **kwargs: Any) -> None:
        checked("modules/shared_state.py:State.begin", lambda job: setattr(self, "job", job))(*args, **kwargs)
        self.interrupted = False

    def end(self) -> None:
        self.job = ""


class Lock:
    """`call_queue.queue_lock`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.acquire = checked("modules/fifo_lock.py:FIFOLock.acquire", self._acquire)

    def _acquire(self, blocking: bool = True) -> bool:
        return self._lock.acquire(blocking)

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()


def stand_ins(folder: str, webui: str) -> dict[str, ModuleType]:
    """Modules of a WebUI whose files are in `folder`, by name; `modules.script_callbacks.found` is what was registered.

    Args:
        webui: "forge"; "neo", its fork with a backend of the same name; or "a1111", which has no backend.
    """
    found: dict[str, Any] = {}
    callbacks = {
        name: checked(f"modules/script_callbacks.py:{name}", lambda callback, name=name: found.update({name: callback}))
        for name in ("on_ui_tabs", "on_ui_settings", "on_model_loaded")
    }
    data: dict[str, Any] = {}
    opts = SimpleNamespace(data=data, CLIP_stop_at_last_layers=1)
    opts.add_option = checked("modules/options.py:Options.add_option", lambda key, info: data.update({key: info}))
    made = {
        "modules.script_callbacks": {"found": found, **callbacks},
        "modules.shared": {
            "OptionInfo": checked("modules/options.py:OptionInfo.__init__", lambda **given: given),
            "opts": opts,
            "cmd_opts": SimpleNamespace(**{"lora_dirs": []} if webui == "neo" else {"lora_dir": f"{folder}/Lora"}),
            "state": State(),
            "sd_model": SimpleNamespace(),
        },
        "modules.call_queue": {"queue_lock": Lock()},
        "modules.paths_internal": {"default_output_dir": f"{folder}/outputs"},
        "modules.sd_models": {
            "checkpoints_list": {"a": SimpleNamespace(filename=f"{folder}/<a> model.safetensors")},
            "model_data": SimpleNamespace(forge_loading_parameters={}),
        },
    }
    engines = {"forge": ("base", "sd15", "sd20", "sdxl"), "neo": ("base", "sd15", "sdxl"), "a1111": ()}[webui]
    if engines:
        made |= {"backend": {}, "backend.diffusion_engine": {}}
        made |= {f"backend.diffusion_engine.{name}": {} for name in engines}
    modules = {name: _module(name, contents) for name, contents in {"modules": {}, **made}.items()}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    return modules


def _module(name: str, contents: dict[str, Any]) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__path__ = []
    vars(module).update(contents)
    return module


def run_script(path: str, folder: str, webui: str) -> ModuleType:
    """Import the extension's script as the WebUI does, into a process with stand-ins; returns `script_callbacks`."""
    import importlib.util

    modules = stand_ins(folder, webui)
    sys.modules.update(modules)
    spec = importlib.util.spec_from_file_location("concept_ablation.py", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return modules["modules.script_callbacks"]
