"""The rules of the tree: who may import whom, how big a file may be, and how each host finds the package."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import concept_ablation

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {"tests", "tools", "benchmarks", "build", "dist", "outputs"}
INSIDE = {"core", "nodes", "web", "scripts", "cli", "install", "concept_ablation"}
HOSTS = {"diffusers", "transformers", "comfy", "modules", "backend"}
ENTRY_POINTS = {"install.py"}  # run on its own, before there is a package


def sources(suffix: str) -> list[Path]:
    """Files of the project by suffix, as paths below the root. Hidden and built folders do not count."""
    paths = (path.relative_to(ROOT) for path in ROOT.rglob(f"*{suffix}"))
    skipped = {"build", "dist", "outputs", "node_modules"}
    return sorted(path for path in paths if not any(part.startswith(".") or part in skipped for part in path.parts))


PACKAGE = [path for path in sources(".py") if path.parts[0] not in OUTSIDE and str(path) not in ENTRY_POINTS]


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text("utf-8"), str(path))


def relative_targets(path: Path, tree: ast.Module) -> set[tuple[str, ...]]:
    """What a file's relative imports name, as parts below the root: `from ..delta import X` in core/hosts/a.py gives
    ("core", "delta", "X")."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            depth = len(path.parts) - node.level
            assert depth >= 0, f"{path}:{node.lineno} imports from above the package"
            module = (*path.parts[:depth], *(node.module.split(".") if node.module else ()))
            found |= {(*module, alias.name) for alias in node.names}
    return found


def absolute_targets(tree: ast.Module) -> set[str]:
    """The top-level modules that a file imports absolutely, by statement or by name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_the_helpers_see_every_form_of_import():
    tree = ast.parse(
        "import nodes.x as y\nfrom core import a\nfrom .. import web\nfrom ..delta import X\nfrom . import b"
    )
    assert absolute_targets(tree) == {"nodes", "core"}
    assert relative_targets(Path("core/hosts/a.py"), tree) == {
        ("core", "web"),
        ("core", "delta", "X"),
        ("core", "hosts", "b"),
    }


def test_the_package_is_found():
    assert {Path("__init__.py"), Path("core/errors.py")} <= set(PACKAGE)


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_imports_go_one_way(path):
    tree = parse(path)
    targets = relative_targets(path, tree)
    if path.parts[0] == "core":
        assert {target[0] for target in targets} <= {"core"}, "core knows nothing above it"
    if path.parts[0] == "core" and path.parts[1] != "hosts":
        assert not [target for target in targets if target[:2] == ("core", "hosts")], "core knows no host program"
        assert not absolute_targets(tree) & HOSTS, "core knows no host program"
    if path.parts[0] in ("nodes", "web", "scripts"):
        assert "cli" not in {target[0] for target in targets}, "one face does not need another"
    absolute = absolute_targets(tree) & INSIDE
    assert not absolute, f"import {absolute} relatively: in ComfyUI another module has that name"


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_nothing_is_unpickled(path):
    tree = parse(path)
    assert not absolute_targets(tree) & {"pickle", "dill", "joblib", "cloudpickle"}
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert "torch.load" not in calls


@pytest.mark.parametrize("path", [*sources(".py"), *sources(".js")], ids=str)
def test_a_file_stays_under_400_lines(path):
    assert len((ROOT / path).read_text("utf-8").splitlines()) < 400


def test_the_version_is_the_same_everywhere():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert re.search(r'^version = "([^"]+)"', text, re.MULTILINE)[1] == concept_ablation.__version__


def test_the_command_starts_the_cli():
    (entry,) = metadata.entry_points(group="console_scripts", name="concept-ablation")
    assert entry.value == "concept_ablation.cli:main"


def test_an_installed_module_imports_only_installed_packages():
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    folders = {Path(*name.split(".")[1:]) for name in re.findall(r'"([^"]+)"', listed[1])}
    assert Path("core") in folders
    for path in PACKAGE:
        if path.parent not in folders:
            continue
        for target in relative_targets(path, parse(path)):
            found = [Path(*target[:length]) for length in range(1, len(target) + 1)]
            for folder in (folder for folder in found if (ROOT / folder).is_dir()):
                assert folder in folders, f"{path} imports {folder}, which pyproject.toml does not install"


def test_the_root_loads_by_path_under_another_name_as_comfyui_loads_it():
    code = (
        "import importlib.util, sys\n"
        "root = sys.argv[1]\n"
        "spec = importlib.util.spec_from_file_location('custom_nodes.ca', root + '/__init__.py',"
        " submodule_search_locations=[root])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules[spec.name] = module\n"
        "spec.loader.exec_module(module)\n"
        "import importlib\n"
        "errors = importlib.import_module('custom_nodes.ca.core.errors')\n"
        "print(module.__version__, errors.AblationError.__module__, 'concept_ablation' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
        cwd=ROOT.parent,
    )
    assert result.stdout.split() == [concept_ablation.__version__, "custom_nodes.ca.core.errors", "False"]


def test_the_package_that_the_tests_import_is_this_folder():
    assert Path(importlib.util.find_spec("concept_ablation").origin).resolve() == ROOT / "__init__.py"
