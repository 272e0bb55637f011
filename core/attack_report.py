"""What an attack leaves for people to read: attack.json, a plot of success against budget, and what it drew."""

from __future__ import annotations

import io
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from .attack import PRETRAINED, AttackCurve, AttackReport
from .files import replacing, write_json


def attack_summary(report: AttackReport) -> dict[str, object]:
    """The report without its pictures, as JSON has it: what is not finite becomes text."""
    return {
        "target": report.concept.target,
        "anchor": report.concept.anchor,
        "kind": report.concept.kind,
        "curves": {name: _curve(curve) for name, curve in report.curves.items()},
        "resistance": {name: _said(value) for name, value in report.resistance().items()},
        "settings": report.settings,
    }


def success_plot(report: AttackReport) -> bytes:
    """PNG of the share of successful pictures against the optimisation steps, with 95 % intervals."""
    figure = Figure(figsize=(7, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, curve in report.curves.items():
        steps = [point.steps for point in curve.checkpoints]
        shares = np.array([point.success.value for point in curve.checkpoints])
        ends = np.array([(point.success.low, point.success.high) for point in curve.checkpoints])
        spread = np.nan_to_num(np.abs(ends - shares[:, None]).T)
        style = "--" if name == PRETRAINED else "-"
        axes.errorbar(steps, shares, spread, linestyle=style, marker="o", markersize=4, capsize=3, label=name)
    axes.set_xlabel("optimisation steps")
    axes.set_ylabel(f"pictures that show “{report.concept.target}”")
    axes.set_ylim(-0.03, 1.03)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def write_attack(folder: Path, report: AttackReport) -> Path:
    """Write attack.png, one sheet of the last checkpoint's pictures for each curve and, last, attack.json.

    Returns:
        The path of attack.json.

    Raises:
        AblationError: `folder` cannot be written, or the disk is full.
    """
    plot = success_plot(report)
    with replacing(folder / "attack.png") as temporary:
        temporary.write_bytes(plot)
    for number, curve in enumerate(report.curves.values()):
        with replacing(folder / f"attack_{number}.png") as temporary:
            Image.fromarray(_sheet(curve.checkpoints[-1].images)).save(temporary)
    write_json(folder / "attack.json", attack_summary(report))
    return folder / "attack.json"


def _sheet(images: np.ndarray) -> np.ndarray:
    """Pictures [prompts, seeds, height, width, 3] in rows and columns, [prompts * height, seeds * width, 3]."""
    prompts, seeds, height, width, channels = images.shape
    return images.transpose(0, 2, 1, 3, 4).reshape(prompts * height, seeds * width, channels)


def _curve(curve: AttackCurve) -> dict[str, Any]:
    return {
        "checkpoints": [
            {"steps": point.steps, "success": {key: _said(value) for key, value in asdict(point.success).items()}}
            for point in curve.checkpoints
        ],
        "final_loss": curve.losses[-1] if curve.losses else None,
        "seconds": curve.seconds,
    }


def _said(value: float) -> float | str | None:
    """JSON has no infinity and no NaN."""
    if math.isnan(value):
        return None
    return "infinite" if math.isinf(value) else value
