"""All commands together, and what becomes of what goes wrong in them: exit code 1 if a task of a sweep or a
bench failed, 2 for bad input, 130 for Ctrl-C.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from io import TextIOWrapper

import typer
from rich.console import Console
from rich.text import Text

from ..core.errors import AblationError, is_out_of_memory
from .ablate import ablate
from .attack import attack
from .bench import bench
from .compress import compress
from .deltas import export, merge
from .demo import demo
from .evaluate import evaluate
from .leaks import leaks
from .sample import sample
from .sweep import sweep
from .ui import ui

OUT_OF_MEMORY = (
    "Out of memory: lower --images-at-once (in sample and attack --batch); in training lower --batch, add "
    "--checkpointing, or choose a smaller subset."
)

_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
"""Of a path that cannot even be looked at."""
_LAUNCHERS = "On several GPUs or machines: accelerate launch -m concept_ablation.cli ablate ..., or torchrun."

app = typer.Typer(
    help="Make a text-to-image model stop drawing a concept, and save the edit as a delta that loads like a LoRA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(epilog=_LAUNCHERS)(ablate)
for command in (sample, merge, export, demo, evaluate, leaks, attack, compress, bench, sweep, ui):
    app.command()(command)


def main() -> None:
    """Entry point: run a command and turn what goes wrong into one line and an exit code."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # redirected in Windows it has a code page, which has no arrow and not every name of a file
            stream.reconfigure(errors="replace")
    try:
        code = app(standalone_mode=False)
    except AblationError as error:
        _fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            # a usage error of typer, which knows how to print itself
            error.show()
            sys.exit(error.exit_code)
        if is_out_of_memory(error):
            _fail(OUT_OF_MEMORY, 2)
        if isinstance(error, OSError) and error.errno in _NO_ACCESS and error.filename is not None:
            _fail(f"{error.filename} cannot be used ({error.strerror}): check the path and what you may read.", 2)
        raise
    if code == 130:
        # newer typer returns this code for Ctrl-C, older raises Abort
        _fail("Interrupted: nothing that was half done was kept as finished; run the command again to go on.", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    Console(stderr=True).print(Text.assemble(("error:", "bold red"), " ", message), soft_wrap=True)
    sys.exit(code)
