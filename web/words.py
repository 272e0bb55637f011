"""What the page calls the kinds of concepts, and the fields that depend on the kind: label and hint."""

from __future__ import annotations

KIND_LABELS = {"instance": "A thing, animal or character", "style": "A style", "memorized": "A memorized picture"}
TARGET_WORDS = {
    "instance": ("Remove", "Grumpy Cat"),
    "style": ("Remove the style", "Van Gogh"),
    "memorized": ("Caption that reproduces the picture", "the exact words that bring it up"),
}
ANCHOR_WORDS = {
    "instance": ("Draw instead", "a broader word: cat"),
    "style": ("Draw instead", "what the style is a style of: painting"),
    "memorized": ("Draw instead", "a caption that does not reproduce it; empty: found with the picture"),
}
