"""The file that Stable Diffusion WebUI imports: registers the tab, the settings and what a newly loaded model is given,
all of which `web/extension.py` makes.

The WebUI imports it by its path, from an extension folder of any name and outside of any package, so it first makes
that folder importable as the package `concept_ablation`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from modules import script_callbacks

PACKAGE = "concept_ablation"


def extension() -> ModuleType:
    """`web/extension.py` of the folder that this file is in."""
    if PACKAGE not in sys.modules:
        root = Path(__file__).resolve().parents[1]
        spec = importlib.util.spec_from_file_location(
            PACKAGE, root / "__init__.py", submodule_search_locations=[str(root)]
        )
        package = importlib.util.module_from_spec(spec)
        sys.modules[PACKAGE] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"{PACKAGE}.web.extension")


def on_ui_tabs() -> list[tuple[Any, str, str]]:
    """The tab: its Blocks, title and element id."""
    made = extension()
    return [(made.make_tab(), made.TITLE, made.ELEMENT)]


def on_ui_settings() -> None:
    """The section of the settings."""
    extension().add_settings()


def on_model_loaded(model: Any) -> None:
    """Give it the deltas that were applied to the same checkpoint before."""
    extension().apply_again(model)


script_callbacks.on_ui_tabs(on_ui_tabs)
script_callbacks.on_ui_settings(on_ui_settings)
script_callbacks.on_model_loaded(on_model_loaded)
