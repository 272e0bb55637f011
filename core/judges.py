"""Judges that are meant where none is named. They stand apart from `metrics.py`, which loads them and takes seconds to
import.
"""

from __future__ import annotations

from pathlib import Path

EMBEDDED_JUDGE = Path(__file__).resolve().parent.parent / "assets" / "emoji_diffusion" / "judge"
"""The small one in this package, which knows what the embedded model draws; an open_clip folder."""
NETWORK_JUDGE = "ViT-B-32/laion2b_s34b_b79k"
"""The one for any other model, by open_clip's name; it is downloaded once."""
