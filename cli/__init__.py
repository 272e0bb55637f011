"""The command line: `concept-ablation ablate | evaluate | leaks | attack | sample | merge | export | compress | ...`.

Arguments in, one call of `core` out, a table at the end. Each command has its module, which imports what is slow to
import when it runs.
"""

from __future__ import annotations

from .app import main

__all__ = ["main"]
