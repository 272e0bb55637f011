"""Peak memory of Ablate Concept on a model of Stable Diffusion 1.5's size in ComfyUI, with and without checkpointing.

    python -m tools.comfyui.get_comfyui
    python benchmarks/comfyui_memory.py

The weights are random, which memory does not mind; 512 x 512 pixels, cross-attention keys and values, on the CPU. Each
case is a process of its own. Writes results/comfyui_memory.json, or with another --batch the same below outputs/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from job_store import ROOT, results_folder
from safetensors.torch import save_file

from concept_ablation.core.files import write_json

STEPS = 2


def main() -> None:
    """Command line; `--case` is what the script runs itself with, inside ComfyUI."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, default=ROOT / ".comfyui", help="folder that get_comfyui.py made")
    parser.add_argument("--batch", type=int, default=2, help="rows that ablate in each step")
    parser.add_argument("--case", choices=["plain", "checkpointing"], help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.checkpoint, options.batch, options.case == "checkpointing")))
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "random_sd15.safetensors"
        write_checkpoint(checkpoint)
        cases = {case: run_inside(options, case, checkpoint) for case in ("plain", "checkpointing")}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, ComfyUI on the CPU"
    write_json(
        results_folder(parser, options, free=("comfyui",)) / "comfyui_memory.json",
        {"tasks": list(cases), "batch": options.batch, "steps": STEPS, "machine": machine, "cases": cases},
    )
    print(json.dumps(cases, indent=2))


def write_checkpoint(path: Path) -> None:
    """Stable Diffusion 1.5's layout and size with random weights, in fp16."""
    from diffusers import AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from concept_ablation.core.hosts.single_file import ldm_tensors

    torch.manual_seed(0)
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    tensors = ldm_tensors(unet, CLIPTextModel(text), AutoencoderTiny())
    save_file({name: tensor.detach().half().contiguous() for name, tensor in tensors.items()}, path)


def run_inside(options: argparse.Namespace, case: str, checkpoint: Path) -> dict[str, float]:
    """One case in a process that has ComfyUI's modules."""
    comfyui, dependencies = options.comfyui / "ComfyUI", options.comfyui / "deps"
    command = [sys.executable, __file__, "--case", case, "--checkpoint", str(checkpoint), "--batch", str(options.batch)]
    result = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(comfyui), str(dependencies)])},
        cwd=comfyui,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(result.stdout.splitlines()[-1])


def measure(checkpoint: Path, batch: int, checkpointing: bool) -> dict[str, float]:
    """Train `STEPS` steps on random latents and say what memory and time that took."""
    from comfy.cli_args import args

    args.cpu = True
    import comfy.sd

    from concept_ablation.core.concept import Concept
    from concept_ablation.core.dataset import AblationDataset, DatasetSettings, Plan
    from concept_ablation.core.hosts.comfyui import opened
    from concept_ablation.core.trainer import TrainSettings, train

    with torch.inference_mode():
        model, clip, *_ = comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_vae=False)
        with opened(model, clip) as denoiser:
            plan = Plan(("a photo of a cat", "a photo of a grumpy cat"), ((0, 1),) * batch)
            latents = torch.randn(batch, *denoiser.latent_shape)
            data = AblationDataset(latents, plan, DatasetSettings(images=batch), (Concept("grumpy cat", "cat"),), "")
            denoiser.encode(plan.prompts)
            before = resident("VmRSS")
            # from here on: loading takes more than a training with checkpointing may
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
            start = time.perf_counter()
            settings = TrainSettings(steps=STEPS, batch=batch, learning_rate=1e-6, checkpointing=checkpointing)
            train(denoiser, data, settings)
            seconds = time.perf_counter() - start
            return {"loaded_gb": before, "peak_gb": resident("VmHWM"), "seconds_per_step": seconds / STEPS}


def resident(field: str) -> float:
    """A figure of this process's memory from Linux, in GB: VmRSS is now, VmHWM the most so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return round(int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024 / 1e9, 2)


if __name__ == "__main__":
    main()
