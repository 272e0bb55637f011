"""A command that a launcher has started on several processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from os import environ
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def on_processes(console: Console) -> Iterator[None]:
    """Within the block, or the function that this decorates, work with the other processes of `accelerate launch` or
    `torchrun`, if there are any. Only the first prints, and what went wrong is said once.
    """
    if "WORLD_SIZE" not in environ:
        yield
        return
    from ..core.parallel import PeerStopped, joined

    first = True
    try:
        with joined() as processes:
            first = processes.first
            console.quiet = not first
            yield
    except PeerStopped as error:
        if error.here:
            sys.exit(2)
        raise
    except KeyboardInterrupt:
        if not first:
            sys.exit(130)
        raise
