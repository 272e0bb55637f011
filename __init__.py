"""Concept Ablation: make a text-to-image model stop drawing a concept, and save the edit as a small delta."""

__version__ = "0.1.0"
