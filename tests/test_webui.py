"""The extension for Stable Diffusion WebUI: on stand-ins everywhere, on Forge's real modules where Forge is there.

Set `CONCEPT_ABLATION_FORGE` to Forge's folder, `CONCEPT_ABLATION_FORGE_GUESS` to a checkout of huggingface_guess and
`CONCEPT_ABLATION_FORGE_PYTHON` to a Python with Forge's requirements; the tests proper, in `*_inside_forge.py`, then
run in a process of their own.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from concept_ablation.core import delta_file
from concept_ablation.core.delta import Delta, LayerDelta
from concept_ablation.core.errors import AblationError
from concept_ablation.core.progress import Progress
from concept_ablation.tests.conftest import unavailable
from concept_ablation.tests.forge import contract
from concept_ablation.web import extension
from concept_ablation.web.host import Applied

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "concept_ablation.py"
SOURCES = (SCRIPT, ROOT / "web" / "extension.py", ROOT / "core" / "hosts" / "webui.py")
FORGE = os.environ.get("CONCEPT_ABLATION_FORGE")
GUESS = os.environ.get("CONCEPT_ABLATION_FORGE_GUESS")
PYTHON = os.environ.get("CONCEPT_ABLATION_FORGE_PYTHON", sys.executable)
with_forge = pytest.mark.skipif(not FORGE, reason="CONCEPT_ABLATION_FORGE does not name a Forge")

# What a WebUI does with the script, in a process that has never seen the package.
AS_A_WEBUI = """
import json, sys
tests, script, folder, webui, version = sys.argv[1:]
sys.path.insert(0, tests)
import contract
callbacks = contract.run_script(script, folder, webui)
callbacks.found["on_model_loaded"](object())
import gradio
if version:
    gradio.__version__ = version
[(blocks, title, element)] = callbacks.found["on_ui_tabs"]()
callbacks.found["on_ui_settings"]()
from modules import shared
print(json.dumps({
    "registered": sorted(callbacks.found),
    "blocks": type(blocks).__name__,
    "title": title,
    "element": element,
    "labels": [block.label for block in blocks.blocks.values() if getattr(block, "label", None)],
    "html": [block.value for block in blocks.blocks.values() if type(block).__name__ == "HTML"],
    "settings": {key: info["section"] for key, info in shared.opts.data.items()},
    "package": list(sys.modules["concept_ablation"].__path__),
    "taken": [name for name in ("core", "nodes", "web", "scripts", "tools", "cli") if name in sys.modules],
}))
"""


@pytest.fixture(scope="session")
def gradio():
    """The installed gradio; without it the test is skipped, except where everything must be there."""
    try:
        import gradio
    except ImportError:
        unavailable('there is no gradio: pip install "gradio>=4.40"')
    return gradio


def as_a_webui(folder: Path, webui: str, version: str = "") -> dict[str, Any]:
    arguments = [ROOT / "tests" / "forge", SCRIPT, folder, webui, version]
    result = subprocess.run(
        [sys.executable, "-c", AS_A_WEBUI, *map(str, arguments)],
        env={**os.environ, "PYTHONUTF8": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture
def webui(tmp_path, monkeypatch):
    """Stand-ins for Forge's modules in this process, as one object."""
    modules = contract.stand_ins(str(tmp_path), "forge")
    monkeypatch.setattr(extension, "_kept", {})
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules["modules"]


# --- The script -------------------------------------------------------------------------------------------------------


def test_in_forge_the_script_shows_the_tab(gradio, tmp_path):
    found = as_a_webui(tmp_path, "forge")
    assert found["registered"] == ["on_model_loaded", "on_ui_settings", "on_ui_tabs"]
    assert (found["blocks"], found["title"], found["element"]) == ("Blocks", "Concept Ablation", "concept_ablation")
    assert "Draw instead" in found["labels"]
    assert set(found["settings"]) == {extension.JUDGE, extension.SUBFOLDER}
    assert all(section == ["concept_ablation", "Concept Ablation"] for section in found["settings"].values())
    assert found["package"] == [str(ROOT)]
    assert found["taken"] == []


@pytest.mark.parametrize(("webui", "version"), [("a1111", ""), ("forge", "3.41.2"), ("a1111", "3.41.2"), ("neo", "")])
def test_elsewhere_the_tab_says_what_to_do_instead(gradio, tmp_path, webui, version):
    found = as_a_webui(tmp_path, webui, version)
    assert (found["title"], found["labels"]) == ("Concept Ablation", [])
    (page,) = found["html"]
    assert "concept-ablation" in page and f"ui --model &quot;{tmp_path}/&lt;a&gt; model.safetensors&quot;" in page
    loras = "models/Lora" if webui == "neo" else f"{tmp_path}/Lora"
    assert "install.py" in page and f"<code>{loras}</code>" in page and "&lt;lora:its-name:1&gt;" in page
    assert set(found["settings"]) == {extension.JUDGE, extension.SUBFOLDER}


# --- The host on stand-ins --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lacking", ["sd20", "lora_dir"])
def test_a_fork_that_lacks_what_we_use_is_not_taken_for_forge(gradio, webui, lacking, monkeypatch):
    assert extension.can_work()
    if lacking == "sd20":
        monkeypatch.delitem(sys.modules, "backend.diffusion_engine.sd20")
    else:
        del webui.shared.cmd_opts.lora_dir
    assert not extension.can_work()


def test_the_host_uses_the_webuis_folders(webui, tmp_path):
    host = extension.WebUIHost()
    assert host.delta_folder == tmp_path / "Lora"
    assert host.output_folder == tmp_path / "outputs" / "concept-ablation"
    assert len(host.models) == 1 and not host.draws and not host.free_model
    setattr(webui.shared.opts, extension.SUBFOLDER, "../../my edits")
    assert extension.WebUIHost().delta_folder == tmp_path / "Lora" / "my-edits"


def test_progress_and_interruption_go_through_the_webuis_state(webui):
    host, state = extension.WebUIHost(), webui.shared.state
    host.show(Progress("Training", 3, 10, 1.0))
    assert (state.job_count, state.job_no, state.sampling_step, state.sampling_steps) == (1, 0, 3, 10)
    assert state.textinfo == "Training: 3 of 10" and not host.interrupted()
    state.stopping_generation = True
    assert host.interrupted()


def test_what_is_saved_is_shown_to_the_lora_extension(webui, monkeypatch):
    listed = []
    call = contract.checked(
        "extensions-builtin/sd_forge_lora/networks.py:list_available_networks", lambda: listed.append(1)
    )
    extension.WebUIHost().show(None)
    monkeypatch.setitem(sys.modules, "networks", SimpleNamespace(list_available_networks=call))
    extension.WebUIHost().show(None)
    extension.WebUIHost().files_changed()
    assert listed == [1, 1]


def test_a_job_that_cannot_begin_leaves_lock_and_state_free(webui):
    host = extension.WebUIHost()
    with pytest.raises(AblationError, match="choose one at the top"), host.denoiser("loaded"):
        pass
    assert webui.call_queue.queue_lock.acquire(blocking=False)
    assert webui.shared.state.job == ""


def test_applied_deltas_are_read_from_the_models_own_patches(webui):
    host = extension.WebUIHost()
    assert host.applied() == ()
    patches = {
        ("concept_ablation:123:a:b.safetensors", 0.5, 1.0, False): {},
        ("/somewhere/else.safetensors", 1.0, 1.0, False): {},
    }
    webui.shared.sd_model.forge_objects_original = SimpleNamespace(
        unet=SimpleNamespace(lora_patches=patches), clip=SimpleNamespace(patcher=SimpleNamespace(lora_patches={}))
    )
    assert host.applied() == (Applied("a:b.safetensors", 0.5),)
    webui.call_queue.queue_lock.acquire()
    with pytest.raises(AblationError, match="busy"):
        host.remove()
    host.remove("no such file")


class Patcher:
    """A network's or the text encoder's patcher, with nothing but its patches."""

    def __init__(self, patches=()):
        self.lora_patches = dict(patches)

    def clone(self):
        return Patcher(self.lora_patches)


class Clip:
    def __init__(self, patcher):
        self.patcher = patcher

    def clone(self):
        return Clip(self.patcher.clone())


class Objects(SimpleNamespace):
    def shallow_copy(self):
        return Objects(**vars(self))


@pytest.fixture
def load(webui, monkeypatch):
    """Loads a checkpoint as Forge does, which makes a new engine each time."""

    def patched(unet, clip, delta, strength, name):
        assert not torch.is_inference_mode_enabled() and delta.layers
        unet = unet.clone()
        unet.lora_patches[name, strength, 1.0, False] = {}
        return unet, clip

    def engine(checkpoint):
        with torch.inference_mode(), webui.call_queue.queue_lock:
            made = SimpleNamespace(filename=checkpoint)
            made.forge_objects_original = Objects(unet=Patcher(), clip=Clip(Patcher()))
            made.forge_objects = made.forge_objects_original.shallow_copy()
            webui.shared.sd_model = made
            extension.apply_again(made)
        return made

    monkeypatch.setattr("concept_ablation.core.hosts.webui.patched", patched)
    monkeypatch.setattr("concept_ablation.core.hosts.webui.architecture_of", lambda engine: "sd1")
    monkeypatch.setattr(extension, "_engine", lambda: webui.shared.sd_model)
    return engine


@pytest.fixture
def deltas(tmp_path):
    """Two saved deltas."""
    paths = [tmp_path / f"{name}.safetensors" for name in ("a", "b")]
    for path in paths:
        delta_file.save(Delta({"lora_unet_x": LayerDelta(torch.ones(2, 2))}), path)
    return paths


def test_a_checkpoint_that_is_loaded_again_gets_its_deltas_again(load, deltas):
    host = extension.WebUIHost()
    load("one.safetensors")
    host.apply(deltas[0], 1.0)
    host.apply(deltas[1], 1.0)
    host.apply(deltas[0], 0.5)
    applied = (Applied("b.safetensors", 1.0), Applied("a.safetensors", 0.5))
    assert host.applied() == applied
    other = load("other.safetensors")
    assert host.applied() == () and not other.forge_objects.unet.lora_patches
    engine = load("one.safetensors")
    assert host.applied() == applied
    assert engine.forge_objects.unet.lora_patches == engine.forge_objects_after_applying_lora.unet.lora_patches
    assert len(engine.forge_objects.unet.lora_patches) == 2
    host.remove("b.safetensors")
    load("one.safetensors")
    assert host.applied() == (Applied("a.safetensors", 0.5),)
    host.remove()
    load("one.safetensors")
    assert host.applied() == ()


def test_a_delta_that_cannot_be_applied_again_is_logged_and_stops_neither_the_others_nor_forge(load, deltas, caplog):
    host = extension.WebUIHost()
    load("one.safetensors")
    for path in deltas:
        host.apply(path, 1.0)
    deltas[0].unlink()
    with caplog.at_level(logging.ERROR):
        load("one.safetensors")
    assert host.applied() == (Applied("b.safetensors", 1.0),)
    (record,) = caplog.records
    assert "a.safetensors could not be applied" in record.getMessage()
    host.remove("a.safetensors")
    caplog.clear()
    load("one.safetensors")
    assert not caplog.records, "what was taken off is not tried again"


# --- The contract -----------------------------------------------------------------------------------------------------


def test_the_contract_names_every_import_from_forge():
    found = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                top = node.module.partition(".")[0]
                if top in ("modules", "backend", "packages_3rdparty", "modules_forge"):
                    found |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert found == contract.IMPORTS


@with_forge
@pytest.mark.parametrize("call", contract.CALLS)
def test_forge_has_what_we_call(call):
    path, _, name = call.partition(":")
    node: Any = ast.parse((Path(FORGE) / path).read_text(encoding="utf-8"))
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    own = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args) if argument.arg != "self"]
    own_keywords = [argument.arg for argument in node.args.kwonlyargs]
    given = contract.CALLS[call]
    # those that we give without their names come first, in this order
    assert [argument for argument in own if argument in given] == [argument for argument in given if argument in own]
    assert set(given) <= {*own, *own_keywords}
    required = own[: len(own) - len(node.args.defaults)]
    required += [name for name, default in zip(own_keywords, node.args.kw_defaults, strict=True) if default is None]
    assert set(required) <= set(given)
    if name.endswith("get_learned_conditioning"):
        # taken off by `inspect.unwrap`, and nothing else would be lost with it
        assert [ast.unparse(decorator) for decorator in node.decorator_list] == ["torch.inference_mode()"]


@with_forge
@pytest.mark.parametrize("path", contract.NAMES)
def test_forge_has_what_we_read_and_set(path):
    tree = ast.parse((Path(FORGE) / path).read_text(encoding="utf-8"))
    fields = ("id", "attr", "name", "asname", "arg", "value")
    found = {getattr(node, field, None) for node in ast.walk(tree) for field in fields if _is_word(node, field)}
    assert set(contract.NAMES[path].split()) <= found


def _is_word(node: ast.AST, field: str) -> bool:
    return isinstance(getattr(node, field, None), str)


@with_forge
@pytest.mark.parametrize("name", sorted(contract.IMPORTS))
def test_forge_has_what_we_import(name):
    module = Path(FORGE, *name.split(".")).with_suffix(".py")
    if module.is_file():
        return
    folder, _, wanted = name.rpartition(".")
    tree = ast.parse(Path(FORGE, *folder.split(".")).with_suffix(".py").read_text(encoding="utf-8"))
    defined = {getattr(node, "name", None) for node in tree.body}
    defined |= {target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets}
    assert wanted in defined


# --- Forge itself -----------------------------------------------------------------------------------------------------


@with_forge
@pytest.mark.parametrize("subject", ["host", "extension"])
def test_inside_forge(subject, tmp_path_factory):
    from concept_ablation.tests.forge.checkpoint import write_forge_sd15

    data = tmp_path_factory.mktemp("forge")
    for folder in ("models/Stable-diffusion", "models/Lora", "extensions"):
        (data / folder).mkdir(parents=True)
    write_forge_sd15(data / "models" / "Stable-diffusion" / "random.safetensors")
    (data / "extensions" / "of any name").symlink_to(ROOT, target_is_directory=True)
    tests = sorted(map(str, (ROOT / "tests").glob(f"{subject}*_inside_forge.py")))
    result = subprocess.run(
        [PYTHON, str(ROOT / "tests" / "forge" / "run.py"), str(FORGE), str(GUESS), str(data), *tests],
        env={**os.environ, "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"},
        cwd=FORGE,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
