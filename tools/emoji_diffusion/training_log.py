"""How a model was trained: steps, minutes and losses of every stage, of this run and of those that it went on from."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from settings import Settings
from stage import CHECKPOINT

HISTORY = "history.json"
"""In a run's folder: the logs of the trainings before it, oldest first."""

TRAINING = "training.json"
"""In the assets: the same with the run that made them."""

Log = dict[str, dict[str, float]]


def whole_log(run: Path, settings: Settings) -> list[Log]:
    """One log for every training, oldest first; the last is this run's."""
    history = run / HISTORY
    before = json.loads(history.read_text(encoding="utf-8")) if history.is_file() else []
    return [*before, training_log(run, settings)]


def training_log(run: Path, settings: Settings) -> Log:
    """Steps, samples a step, minutes and losses of every stage that this run trained."""
    batches = {
        "autoencoder": settings.autoencoder_optimization.batch,
        "denoiser": settings.denoiser_optimization.batch,
        "judge": settings.judge.optimization.batch,
        "validation_judge": settings.validation_judge.optimization.batch,
    }
    found: Log = {}
    for name, batch in batches.items():
        if not (run / name / CHECKPOINT).is_file():
            continue  # taken over from the model that the run started from
        with safe_open(run / name / CHECKPOINT, framework="pt") as file:
            plan = file.metadata()
        found[name] = {"steps": int(plan["step"]), "batch": batch, "minutes": round(float(plan["seconds"]) / 60, 1)}
        if losses := logged(run / name / "tensorboard", f"{name}/loss"):
            last = losses[-max(1, len(losses) // 20) :]
            found[name] |= {"first_loss": round(losses[0], 4), "last_loss": round(sum(last) / len(last), 4)}
    return found


def logged(folder: Path, tag: str) -> list[float]:
    """The values of one curve in a tensorboard log; none if there is no log, or no tensorboard to read it."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        return []
    if not folder.is_dir():
        return []
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    log.Reload()
    return [event.value for event in log.Scalars(tag)] if tag in log.Tags()["scalars"] else []
