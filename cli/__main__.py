"""`python -m concept_ablation.cli`, which launchers such as torchrun can start."""

from __future__ import annotations

from . import main

if __name__ == "__main__":
    main()
