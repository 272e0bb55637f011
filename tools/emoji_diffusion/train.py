"""Train Emoji Diffusion from nothing: pictures, autoencoder, latents, denoiser, two judges, assets.

    python tools/emoji_diffusion/train.py --minutes 480 --out outputs/emoji

Each stage has its share of the minutes. A run that was killed goes on where its last checkpoint was with the same
command and `--resume`. `--start assets/emoji_diffusion` trains an exported model further instead.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoencoder import build as build_autoencoder
from autoencoder import train_autoencoder
from denoiser import train_denoiser
from export import export
from icons import prepare
from judge import seen_and_unseen, train_judge
from latents import encode_pictures, load_latents
from pictures import OTHERS, Pictures, load_pictures
from settings import Settings, Tower
from stage import CHECKPOINT, START, Budget, load_average
from start import start_from

from concept_ablation.core.errors import AblationError
from concept_ablation.core.files import require_writable

STAGES = ("pictures", "autoencoder", "latents", "denoiser", "judge", "validation_judge", "export")

# Share of the minutes, and the most that the stage gains from; the denoiser gets what the others leave.
_SHARES = {
    "autoencoder": (0.15, 75.0),
    "latents": (0.05, 20.0),
    "judge": (0.08, 30.0),
    "validation_judge": (0.08, 30.0),
}


@dataclass(frozen=True)
class Run:
    """One run's folder and plan; `steps` replaces the minutes of every training stage (tests, comparisons)."""

    out: Path
    settings: Settings
    minutes: float
    steps: int | None = None

    def budget(self, stage: str) -> Budget:
        return Budget(minutes=shares(self.minutes)[stage]) if self.steps is None else Budget(steps=self.steps)

    def pictures(self) -> Pictures:
        return load_pictures(self.out / "pictures")


def shares(minutes: float) -> dict[str, float]:
    """The minutes of each stage that takes time."""
    parts = {stage: min(share * minutes, most) for stage, (share, most) in _SHARES.items()}
    return parts | {"denoiser": minutes - sum(parts.values())}


def run_stages(run: Run, stages: Sequence[str] = STAGES) -> None:
    """Run `stages` in their order; each goes on from what is in the folder.

    Raises:
        AblationError: an earlier stage is missing, or a stage cannot be done here.
    """
    for stage in STAGES:
        if stage in stages:
            print(f"== {stage}", flush=True)
            _ACTIONS[stage](run)


def _pictures(run: Run) -> None:
    prepare(run.out / "pictures", run.out / OTHERS, run.out / "npm")


def _autoencoder(run: Run) -> None:
    if (run.out / "autoencoder" / START).is_file():
        print("autoencoder: kept, because the denoiser that the run started from knows its latents", flush=True)
        return
    if any((run.out / "latents").glob("round-*.safetensors")):
        print("autoencoder: kept, because there are latents of it (delete latents/ to train it further)", flush=True)
        return
    train_autoencoder(run.pictures(), run.settings, run.out / "autoencoder", run.budget("autoencoder"))


def _latents(run: Run) -> None:
    if (run.out / "denoiser" / CHECKPOINT).is_file():
        print("latents: kept, because the denoiser is trained on them", flush=True)
        return
    model = load_average(build_autoencoder(run.settings), run.out / "autoencoder")
    encode_pictures(model, run.pictures(), run.settings, run.out / "latents", shares(run.minutes)["latents"])


def _denoiser(run: Run) -> None:
    latents = load_latents(run.out / "latents")
    train_denoiser(run.pictures(), latents, run.settings, run.out / "denoiser", run.budget("denoiser"))


def _judge(run: Run) -> None:
    _any_judge(run, "judge", run.settings.judge)


def _validation_judge(run: Run) -> None:
    _any_judge(run, "validation_judge", run.settings.validation_judge)


def _any_judge(run: Run, name: str, tower: Tower) -> None:
    others, _ = seen_and_unseen(load_pictures(run.out / OTHERS))
    train_judge(name, run.pictures(), others, run.settings, tower, run.out / name, run.budget(name))


def _export(run: Run) -> None:
    export(run.out, run.settings, run.out / "model")


_ACTIONS: dict[str, Callable[[Run], None]] = {
    "pictures": _pictures,
    "autoencoder": _autoencoder,
    "latents": _latents,
    "denoiser": _denoiser,
    "judge": _judge,
    "validation_judge": _validation_judge,
    "export": _export,
}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train Emoji Diffusion from nothing.")
    parser.add_argument("--minutes", type=float, required=True, help="wall-clock time of all training stages together")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="only these, in their usual order")
    parser.add_argument("--start", type=Path, metavar="MODEL", help="train an exported model further instead")
    parser.add_argument(
        "--start-validation", type=Path, metavar="JUDGE", help="with --start: this validation judge, too"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run that is in --out")
    options = parser.parse_args()
    if options.start_validation and not options.start:
        parser.error("--start-validation goes with --start")
    if options.start and options.resume:
        parser.error("--start begins a run and --resume goes on with one: give one of the two")
    try:
        require_writable(options.out)
        if not options.resume and any(options.out.glob("*/*.safetensors")):
            raise AblationError(f"{options.out} holds a run: add --resume to go on with it, or choose another folder.")
        if options.start is not None:
            start_from(options.start, options.out, options.start_validation)
        run_stages(Run(options.out, Settings(), options.minutes), options.stages)
    except AblationError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
