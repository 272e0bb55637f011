"""How the `balanced` preset was chosen: a small search on targets and prompts that no evaluation uses.

The targets are none of `first_table.py`; the prompts are the last ten training templates, taken out of training here;
the seeds are others too; the judge is the embedded one. Each candidate changes one thing of `BASE`. 20 images a concept
tell a difference of 0.2 and no less. Prints a line for each candidate and writes results/balanced.json after each task.

    python benchmarks/choose_balanced.py
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from concept_ablation.core import dataset, trainer
from concept_ablation.core.concept import Concept, evaluation_prompts, judge_texts
from concept_ablation.core.delta import Delta
from concept_ablation.core.denoiser import Denoiser
from concept_ablation.core.files import write_json
from concept_ablation.core.hosts.diffusers import load_denoiser
from concept_ablation.core.metrics import Judge, clip_accuracy
from concept_ablation.core.presets import recipe
from concept_ablation.core.samplers import SampleSettings, draw_images
from concept_ablation.core.trainer import TrainSettings

RESULTS = Path(__file__).parent / "results" / "balanced.json"
TASKS = {
    "tulip": ("flower", ("rose", "hibiscus", "sunflower")),
    "duck": ("bird", ("penguin", "owl", "rooster")),
}
BASE = TrainSettings(steps=100, learning_rate=2e-3, batch=16, preserve_batch=16, preserve_weight=1.0)
CANDIDATES: dict[str, dict[str, object]] = {
    "as it is": {},
    "rate / 2": {"learning_rate": 1e-3},
    "rate x 2": {"learning_rate": 4e-3},
    "half the steps": {"steps": 50},
    "preservation x 4": {"preserve_weight": 4.0},
    "preservation x 10": {"preserve_weight": 10.0},
    "no preservation": {"preserve_batch": 0},
}
SAMPLE = SampleSettings(steps=15)
PROMPTS, SEEDS = 5, range(1000, 1004)


def accuracies(
    denoiser: Denoiser, judge: Judge, concept: Concept, names: list[str], delta: Delta | None
) -> list[float]:
    """CLIP accuracy of each name against the anchor."""
    other = judge.embed_concept(judge_texts(concept.anchor, concept))
    requests = [
        (prompt, seed)
        for name in names
        for prompt in evaluation_prompts(name, concept, denoiser.prompt_source, PROMPTS)
        for seed in SEEDS
    ]
    with nullcontext() if delta is None else delta.attach(denoiser):
        images = draw_images(denoiser, [p for p, _ in requests], [s for _, s in requests], SAMPLE)
    embedded = judge.embed_images(images).chunk(len(names))
    texts = [judge.embed_concept(judge_texts(name, concept)) for name in names]
    return [clip_accuracy(image, text, other) for image, text in zip(embedded, texts, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=CANDIDATES, help="try these candidates only, and write no file")
    only = parser.parse_args().only
    denoiser = load_denoiser()
    train, held = denoiser.prompt_source.instance_train[:-10], denoiser.prompt_source.instance_train[-10:]
    denoiser.prompt_source = replace(denoiser.prompt_source, instance_train=train, instance_evaluation=held)
    judge = Judge.load()
    rows = []
    for target, (anchor, surrounding) in TASKS.items():
        concept = Concept(target, anchor)
        names = [target, *surrounding]
        images = recipe("balanced", denoiser).dataset
        data = dataset.build(denoiser, [concept], images, surrounding=[surrounding])
        before = accuracies(denoiser, judge, concept, names, None)
        print(f"{target} -> {anchor}: before {before}", flush=True)
        for label in only or CANDIDATES:
            settings = replace(BASE, **CANDIDATES[label])
            start = time.perf_counter()
            delta = trainer.train(denoiser, data, settings).delta
            seconds = time.perf_counter() - start
            after = accuracies(denoiser, judge, concept, names, delta)
            kept = sum(after[1:]) / max(sum(before[1:]), 1e-9)
            print(f"  {label:18s} target {after[0]:.2f}  kept {kept:.2f}  {after[1:]}  {seconds:.0f} s", flush=True)
            rows.append(
                {
                    "task": target,
                    "candidate": label,
                    "changes": CANDIDATES[label],
                    "before": before,
                    "after": after,
                    "kept": kept,
                    "seconds": seconds,
                }
            )
        if not only:
            write_json(RESULTS, {"tasks": list(TASKS), "base": asdict(BASE), "rows": rows})


if __name__ == "__main__":
    main()
