"""One of several processes that test_parallel.py starts: trains alone and together, fails in several ways, and writes
what it found to <folder>/<rank>.json. Its model is torch only, so that it starts quickly.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from concept_ablation.core import dataset, evaluation, harvest
from concept_ablation.core.concept import Concept
from concept_ablation.core.dataset import DatasetSettings
from concept_ablation.core.denoiser import Conditioning, Denoiser, LatentCodec
from concept_ablation.core.errors import AblationError, Interrupted
from concept_ablation.core.evaluation import EvaluationSettings
from concept_ablation.core.harvest import HarvestSettings
from concept_ablation.core.harvest_training import train_harvested
from concept_ablation.core.parallel import current, joined
from concept_ablation.core.prompts import BUILT_IN
from concept_ablation.core.samplers import SampleSettings
from concept_ablation.core.trainer import TrainSettings, train

CAT = Concept("grumpy cat", "cat")
SAMPLE = SampleSettings(steps=2, guidance=2.0)
IMAGES = DatasetSettings(images=7, preserve=4, prompts=4, sample=SAMPLE, batch=3)
HARVEST = HarvestSettings(trajectories=5, preserve=3, prompts=4, sample=SAMPLE, batch=3)
TRAIN = TrainSettings(steps=5, batch=5, preserve_batch=3, learning_rate=1e-2)
RUNS = {
    "model": TRAIN,
    "unequal shares": replace(TRAIN, batch=4, preserve_batch=1),
    "one has no row that ablates": replace(TRAIN, batch=1, preserve_batch=2, regularization=0.5),
    "one has no row that preserves": replace(TRAIN, batch=2, preserve_batch=1),
    "model-self": replace(TRAIN, objective="model-self", regularization=0.5, flip=True),
    "noise": replace(TRAIN, objective="noise", preserve_weight=3.0),
    "reverse-kl": replace(TRAIN, objective="reverse-kl"),
    "loss-max": replace(TRAIN, objective="loss-max", batch=3, preserve_batch=2, distance_weight=3e-3),
    "some gradients clipped": replace(TRAIN, clip_norm=3e-4),
    "harvested": TRAIN,
    "harvested, unequal shares": replace(TRAIN, batch=1, preserve_batch=2),
}


class Codec(LatentCodec):
    def encode(self, images):
        return images * 2 - 1

    def decode(self, latents):
        return latents.sigmoid()


class Model(Denoiser):
    """The best linear denoiser of unit-variance data, plus a cross-attention over four tokens."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        sizes = {"query": (3, 16), "to_k": (8, 16), "to_v": (8, 16), "out": (16, 3)}
        self.network = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
        for module in self.network.values():
            module.weight.data = torch.randn(module.weight.shape, generator=generator) / module.in_features**0.5
        self.architecture, self.name, self.text_network, self.vae = "sd1", "toy", None, Codec()
        self.layers = {f"lora_unet_mid_attn2_{name}": self.network[name] for name in ("to_k", "to_v")}
        self.sigmas, self.latent_shape = torch.linspace(0.05, 10, 100), (3, 4, 4)
        self.prompt_source, self.device = BUILT_IN, torch.device("cpu")

    def denoise(self, x, sigma, cond):
        level = sigma.view(-1, 1, 1, 1)
        query = self.network["query"](x.flatten(2).transpose(1, 2) / (level.flatten(1)[..., None] + 1))
        key, value = self.network["to_k"](cond.context), self.network["to_v"](cond.context)
        seen = self.network["out"](torch.softmax(query @ key.transpose(1, 2) / 4, -1) @ value)
        return x / (level**2 + 1) + 0.2 * level / (level + 1) * seen.transpose(1, 2).reshape(x.shape)

    def tokenize(self, text):
        return [int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big") for word in text.split()]

    def _encode(self, prompts):
        rows = []
        for prompt in prompts:
            seeds = (self.tokenize(prompt) + [0] * 4)[:4]
            rows.append(torch.stack([torch.randn(8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]))
        return Conditioning({"context": torch.stack(rows)})


def tensors(delta):
    return torch.cat([tensor.flatten() for layer in delta.layers.values() for tensor in layer.tensors()])


def everything(folder):
    """What is to be the same on one process and on several: rows, images, losses and deltas."""
    model = Model()
    alike = torch.full((3,), float(current().rank))
    current().begin_alike([alike])
    data = dataset.build(model, [CAT], IMAGES, surrounding=[["dog"]], directory=folder)
    of_target = dataset.build(model, [CAT], replace(IMAGES, source="target"), surrounding=[["dog"]])
    rows = harvest.harvest(model, [CAT], HARVEST, surrounding=[["dog"]])
    found, deltas = {}, {}
    for name, settings in RUNS.items():
        if name.startswith("harvested"):
            result = train_harvested(model, rows, settings)
        else:
            chosen = of_target if settings.objective in ("reverse-kl", "loss-max") else data
            result = train(model, chosen, settings)
        deltas[name] = tensors(result.delta)
        found[name] = {"losses": result.losses, "norm": deltas[name].norm().item()}
    settings = EvaluationSettings(prompts=3, seeds=3, sample=SAMPLE, batch=4)
    steps = []
    images = evaluation.draw(
        model, evaluation.make_jobs(model, [CAT], [["dog"]], settings), settings, "Drawing", steps.append
    ).images
    found["images"] = [hashlib.sha256(part.tobytes()).hexdigest() for part in images]
    found["progress"] = steps[-1].step, steps[-1].total
    found["data"] = [data.digest(), of_target.digest(), rows.digest()]
    found["alike"] = alike.tolist()
    return found, deltas


def failing(name, rank, folder):
    """Work that fails on one process, or on all."""
    model = Model()
    if name == "unwritable":
        (folder / "file").write_text("mine", "utf-8")
        dataset.build(model, [CAT], IMAGES, directory=folder / "file" / "dataset")
    if name == "other settings":
        dataset.build(model, [CAT], replace(IMAGES, seed=rank))
    data = dataset.build(model, [CAT], IMAGES)
    if name == "diverged":
        train(model, data, replace(TRAIN, learning_rate=1e9, cosine=False, steps=40))
    if name == "few rows":
        train(model, data, replace(TRAIN, batch=1, preserve_batch=0))

    def fail(progress):
        if rank == 1 and progress.step == 3:
            if name == "killed":
                os._exit(9)
            raise Interrupted("cancelled here") if name == "cancelled" else ZeroDivisionError("a defect")

    train(model, data, replace(TRAIN, steps=50), fail)


def main(folder: Path, ports: list[str]) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    alone, apart = everything(None) if rank == 0 else (None, None)
    os.environ["MASTER_PORT"] = ports.pop()
    with joined():
        together, deltas = everything(folder / "dataset" if rank == 0 else folder / "nothing")
    found = {"together": together, "failures": {}}
    found["digests"] = {name: hashlib.sha256(delta.numpy().tobytes()).hexdigest() for name, delta in deltas.items()}
    if rank == 0:
        found["alone"] = alone
        found["apart"] = {name: (deltas[name] - apart[name]).norm().item() for name in deltas}
    for name in ("cancelled", "defect", "diverged", "few rows", "unwritable", "other settings", "killed"):
        os.environ["MASTER_PORT"] = ports.pop()
        start = time.monotonic()
        try:
            with joined():
                failing(name, rank, folder)
        except (AblationError, ZeroDivisionError) as error:
            found["failures"][name] = [type(error).__name__, str(error), time.monotonic() - start]
        (folder / f"{rank}.json").write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
