"""install.py: what it finds missing, what it tells pip, and that it stays away from pip when nothing is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest

from concept_ablation.tests import conftest

ROOT = Path(__file__).resolve().parents[1]
HOST = {"torch": "2.4.1+cu121", "torchvision": "0.19.1+cu121"}


@pytest.fixture
def install(monkeypatch):
    """A fresh copy of install.py as a module. Any attempt to start a program fails the test."""
    spec = importlib.util.spec_from_file_location("install_under_test", ROOT / "install.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)

    def refuse(*arguments, **_):
        raise AssertionError(f"started a program: {arguments}")

    monkeypatch.setattr(module.subprocess, "run", refuse)
    monkeypatch.setattr(module.subprocess, "Popen", refuse)
    return module


@pytest.fixture
def distributions(monkeypatch, tmp_path):
    """Make a set of {name: version} look like all that is installed."""

    def pretend(versions: dict[str, str]) -> None:
        folder = tmp_path / "site-packages"
        folder.mkdir()
        for name, version in versions.items():
            info = folder / f"{re.sub('[-.]', '_', name).lower()}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "utf-8")
        monkeypatch.setattr(sys, "path", [str(folder)])

    return pretend


@pytest.fixture
def project(install, monkeypatch, tmp_path):
    """A root folder of our own with a short requirements.txt."""
    root = tmp_path / "a project"
    root.mkdir()
    (root / "requirements.txt").write_text("# why\nnumpy>=1.23\n\nopen_clip_torch>=2.24\ntimm>=0.9\n", "utf-8")
    (root / "pyproject.toml").write_text("[project]\nname = 'x'\n", "utf-8")
    monkeypatch.setattr(install, "ROOT", root)
    monkeypatch.setattr(install, "ENVIRONMENT", root / ".venv")
    return root


class FakePip:
    """Stands in for run_quietly: keeps each command and the constraints that it named, and answers as told."""

    def __init__(self, *answers: tuple[int, str]) -> None:
        self.answers = list(answers)
        self.commands: list[list[str]] = []
        self.constraints: list[list[str]] = []

    def __call__(self, command: list[str], verbose: bool) -> tuple[int, str]:
        self.commands.append(command)
        if "-c" in command and "install" in command:
            self.constraints.append(Path(command[command.index("-c") + 1]).read_text("utf-8").splitlines())
        return self.answers.pop(0)


def test_every_requirement_has_the_form_that_install_reads(install):
    names = [requirement.name for requirement in install.read_requirements(ROOT / "requirements.txt")]
    assert "diffusers" in names and "torch" not in names
    assert len(names) == len(set(names))


@pytest.mark.parametrize("line", ["numpy", "numpy==1.2", "numpy>=1.23,<2", "numpy>=1.23 ; python_version<'3.12'"])
def test_other_forms_of_requirement_are_refused(install, tmp_path, line):
    (tmp_path / "requirements.txt").write_text(line, "utf-8")
    with pytest.raises(install.InstallError, match="name>=version"):
        install.read_requirements(tmp_path / "requirements.txt")


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.4.1+cu121", (2, 4, 1)), ("1.0.0", (1,)), ("1!2.10", (2, 10)), ("5.0.0rc1", (5,)), ("unknown", ())],
)
def test_release_numbers(install, version, numbers):
    assert install.release(version) == numbers


def test_nothing_missing_starts_no_program_and_is_silent(install, project, distributions, capsys):
    distributions({**HOST, "numpy": "1.23.0", "Open.Clip-Torch": "3.10", "timm": "1.0"})
    assert install.main([]) == 0
    assert capsys.readouterr().out == ""


def test_only_what_is_missing_is_installed_and_all_else_is_held(install, project, distributions, monkeypatch, capsys):
    distributions({**HOST, "numpy": "1.26.2", "xformers": "0.0.27", "torchaudio": "2.4.1", "Zope.Thing_x": "1.0"})
    pip = FakePip((0, ""))
    monkeypatch.setattr(install, "run_quietly", pip)
    assert install.main([]) == 0
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert command[-2:] == ["open_clip_torch>=2.24", "timm>=0.9"]
    assert "--upgrade" not in command and "-U" not in command
    held = ["numpy==1.26.2", "torch==2.4.1+cu121", "torchaudio==2.4.1", "torchvision==0.19.1+cu121", "xformers==0.0.27"]
    assert pip.constraints == [[*held, "zope-thing-x==1.0"]]
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if "missing" in line] == [
        "Concept Ablation: open_clip_torch>=2.24 is missing",
        "Concept Ablation: timm>=0.9 is missing",
    ]


def test_a_host_that_contradicts_itself_still_keeps_torch_and_the_shared_packages(
    install, project, distributions, monkeypatch
):
    distributions({**HOST, "numpy": "1.26.2", "timm": "1.0", "setuptools": "65.5.0"})
    pip = FakePip((1, "ERROR: ResolutionImpossible: see ...\n"), (0, ""))
    monkeypatch.setattr(install, "run_quietly", pip)
    assert install.main([]) == 0
    strict, loose = pip.constraints
    assert set(strict) - set(loose) == {"setuptools==65.5.0"}
    assert loose == ["numpy==1.26.2", "timm==1.0", "torch==2.4.1+cu121", "torchvision==0.19.1+cu121"]


def test_an_old_package_of_the_host_is_named_and_left_alone(install, project, distributions, capsys):
    distributions({**HOST, "numpy": "1.26.2", "open_clip_torch": "2.20.0", "timm": "1.0"})
    assert install.main([]) == 0
    assert "open_clip_torch>=2.24 is wanted and 2.20.0 is installed" in capsys.readouterr().out


def test_the_constraints_hold_the_torch_that_is_really_installed(install):
    for lines in install.constraint_sets(install.installed_distributions(), []):
        assert f"torch=={metadata.version('torch')}" in lines
        assert f"numpy=={metadata.version('numpy')}" in lines


def test_without_torch_pip_is_not_asked_to_choose_one(install, project, distributions, capsys):
    distributions({"numpy": "1.26.2"})
    assert install.main([]) == 1
    assert "torch and torchvision must be installed first" in capsys.readouterr().err


def test_a_failing_pip_gives_its_output_and_one_sentence(install, project, distributions, monkeypatch, capsys):
    distributions({**HOST, "numpy": "1.26.2", "timm": "1.0"})
    monkeypatch.setattr(install, "run_quietly", FakePip((1, "ERROR: no network\n")))
    assert install.main([]) == 1
    error = capsys.readouterr().err
    assert "ERROR: no network" in error
    assert error.splitlines()[-1].startswith("Concept Ablation: pip could not add open_clip_torch>=2.24 ")


def test_an_unknown_argument_exits_2_with_a_sentence():
    result = subprocess.run(
        [sys.executable, str(ROOT / "install.py"), "dmeo"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1 and "'dmeo'" in result.stderr


def test_help_names_both_tasks(install, capsys):
    assert install.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert " demo " in printed and " test " in printed


def test_an_old_python_gets_one_sentence(install):
    assert "3.9" in install.python_problem((3, 9, 18))
    assert install.python_problem((3, 10, 0)) is None
    assert install.python_problem((4, 0, 0)) is None


def test_the_environments_python_on_each_system(install):
    environment = PurePosixPath("/x/.venv")
    assert install.environment_python(environment, windows=True) == environment / "Scripts" / "python.exe"
    assert install.environment_python(environment, windows=False) == environment / "bin" / "python"


def make_python(install, root: Path) -> Path:
    python = install.environment_python(root / ".venv", windows=os.name == "nt")
    python.parent.mkdir(parents=True)
    python.touch()
    return python


def test_a_current_environment_is_used_as_it_is(install, project):
    python = make_python(install, project)
    install.mark_current(project / ".venv", install.stamp_of(project))
    assert install.prepare_environment(verbose=False) == python


@pytest.mark.parametrize("name", ["requirements.txt", "pyproject.toml"])
def test_a_changed_dependency_list_makes_the_stamp_stale(install, project, name):
    make_python(install, project)
    install.mark_current(project / ".venv", install.stamp_of(project))
    with (project / name).open("a", encoding="utf-8") as file:
        file.write("\n# changed\n")
    assert not install.is_current(project / ".venv", install.stamp_of(project))


def test_torch_comes_first_falls_back_and_a_stamp_follows(install, project, monkeypatch):
    python = make_python(install, project)
    no_such = (1, "ERROR: No matching distribution found for torch==2.14.1\n")
    pip = FakePip((0, "pip 21.2"), (0, ""), (1, "no torch"), no_such, (0, ""), (0, ""))
    monkeypatch.setattr(install, "run_quietly", pip)
    assert install.prepare_environment(verbose=False) == python
    installs = [command[6:] for command in pip.commands if "install" in command]
    assert installs == [
        ["pip>=22.2"],  # the pip of a .venv that the user made may be older
        ["torch==2.14.1", "torchvision==0.29.1"],
        ["torch>=2.4", "torchvision>=0.19"],
        ["-e", f"{project}[test]"],
    ]
    assert install.is_current(project / ".venv", install.stamp_of(project))


def test_a_full_disk_is_not_tried_twice_and_leaves_no_stamp(install, project, monkeypatch, capsys):
    make_python(install, project)
    pip = FakePip((0, "pip 26"), (0, ""), (1, "no torch"), (1, "ERROR: No space left on device\n"))
    monkeypatch.setattr(install, "run_quietly", pip)
    assert install.main(["demo"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not install.is_current(project / ".venv", install.stamp_of(project))


def test_an_existing_torch_in_the_environment_is_kept(install, project, monkeypatch):
    make_python(install, project)
    pip = FakePip((0, "pip 26"), (0, ""), (0, ""), (0, ""))
    monkeypatch.setattr(install, "run_quietly", pip)
    install.prepare_environment(verbose=False)
    installs = [command[6:] for command in pip.commands if "install" in command]
    assert installs == [["pip>=22.2"], ["-e", f"{project}[test]"]]


def test_test_runs_ruff_then_pytest_and_passes_arguments_to_pytest(install, monkeypatch):
    python = Path("python")
    monkeypatch.setattr(install.os, "cpu_count", lambda: 2)
    assert install.commands("test", python, ["-k", "x"]) == [
        ["python", "-m", "ruff", "check", "."],
        ["python", "-m", "ruff", "format", "--check", "."],
        ["python", "-m", "pip", "install", *install.COPY_DETECTOR],
        ["python", "-m", "tools.comfyui.get_comfyui"],
        ["python", "-m", "tools.web.get_gradio"],
        ["python", "-m", "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "-k", "x"],
    ]
    assert install.commands("demo", python, ["--steps", "5"]) == [
        ["python", "-m", "concept_ablation.cli", "demo", "--steps", "5"]
    ]


def test_one_worker_gets_all_of_comfyuis_tests_and_the_longest_files_come_first():
    names = ("test_a.py::x", "test_a.py::y", "comfyui/test_a.py::x", "web/test_browser.py::x", "comfyui/test_b.py::x")
    items = [SimpleNamespace(nodeid=f"tests/{name}") for name in names]
    conftest.pytest_collection_modifyitems(items)
    assert [item.nodeid.removeprefix("tests/") for item in items] == [
        "comfyui/test_a.py::x",
        "comfyui/test_b.py::x",
        "web/test_browser.py::x",
        "test_a.py::x",
        "test_a.py::y",
    ]
    assert all((ROOT / name).exists() for name in conftest.LONGEST)
    options = SimpleNamespace(getvalue={"dist": "loadfile", "tx": ["popen"]}.get)
    scheduler = conftest.pytest_xdist_make_scheduler(options, None)
    units = [scheduler._split_scope(item.nodeid) for item in items]
    assert len(set(units[:2])) == 1 and units[2:] == ["tests/web/test_browser.py", "tests/test_a.py", "tests/test_a.py"]


@pytest.mark.parametrize(("codes", "expected", "runs"), [([0] * 5 + [5], 5, 6), ([0, 1], 1, 2), ([0] * 6, 0, 6)])
def test_the_first_failing_step_ends_a_task_with_its_code(install, monkeypatch, codes, expected, runs):
    seen = []

    def run(command, **_):
        seen.append(command)
        return subprocess.CompletedProcess(command, codes[len(seen) - 1])

    monkeypatch.setattr(install, "prepare_environment", lambda verbose: Path("python"))
    monkeypatch.setattr(install.subprocess, "run", run)
    assert install.main(["test"]) == expected
    assert len(seen) == runs


def test_output_of_a_program_is_kept_and_shown_only_on_request(install, monkeypatch, capfd):
    monkeypatch.undo()
    command = [sys.executable, "-c", "import sys; print('out', flush=True); print('err', file=sys.stderr); sys.exit(3)"]
    assert install.run_quietly(command, verbose=False) == (3, "out\nerr\n")
    assert capfd.readouterr().out == ""
    install.run_quietly(command, verbose=True)
    assert capfd.readouterr().out == "out\nerr\n"


def test_install_imports_only_the_standard_library():
    code = (
        "import json, runpy, sys; before = set(sys.modules); runpy.run_path(sys.argv[1]);"
        "print(json.dumps([m for m in set(sys.modules) - before if m.split('.')[0] not in sys.stdlib_module_names]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "install.py")], capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout) == []
