"""Run tests inside Forge: `run.py FORGE HUGGINGFACE_GUESS DATA_FOLDER TEST…`.

Begins as Forge's webui.py begins, on the CPU and with a data folder of its own, except that no page is served. The
package comes from Forge's own import of the extension that lies in that folder.
"""

from __future__ import annotations

import sys


def main() -> int:
    forge, guess, data, *tests = sys.argv[1:]
    # not this file's folder, where other modules of Forge's names may lie
    sys.path[:1] = [forge, guess]
    sys.argv = ["webui.py", "--always-cpu", "--data-dir", data, "--skip-version-check"]

    from modules_forge.initialization import initialize_forge

    initialize_forge()

    from modules import initialize

    initialize.imports()
    initialize.initialize()

    import pytest
    from modules import script_loading

    ours = [module for path, module in script_loading.loaded_scripts.items() if path.endswith("concept_ablation.py")]
    ours[0].extension()
    return pytest.main(["-q", "-p", "no:cacheprovider", *tests])


if __name__ == "__main__":
    sys.exit(main())
