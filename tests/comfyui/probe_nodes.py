"""Nodes for the tests alone: the server's fixture puts this file into its custom_nodes folder."""

from __future__ import annotations

import hashlib
import json
import math

import comfy.model_management
import torch


class _Probe:
    FUNCTION = "look"
    CATEGORY = "tests"
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    @classmethod
    def IS_CHANGED(cls, **inputs):
        return math.nan


class TestWeights(_Probe):
    """What is left on the networks that all users of a MODEL and a CLIP share."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "clip": ("CLIP",)}}

    def look(self, model, clip):
        # whoever had patched the shared weights takes the patches out
        comfy.model_management.load_models_gpu([model, clip.patcher])
        digest = hashlib.sha256()
        found = {
            "hooks": 0,
            "gradients": 0,
            "parametrized": 0,
            "patches": len(model.patches) + len(clip.patcher.patches),
        }
        for network in (model.model, clip.cond_stage_model):
            for name, tensor in sorted(network.state_dict().items()):
                digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            for module in network.modules():
                found["hooks"] += len(module._forward_hooks) + len(module._forward_pre_hooks)
                found["parametrized"] += "forward" in vars(module)
            found["gradients"] += sum(parameter.grad is not None for parameter in network.parameters())
        found["sha256"] = digest.hexdigest()
        return {"ui": {"text": [json.dumps(found)]}, "result": ()}


class TestLatents(_Probe):
    """The largest difference of two latents, and how far they reach."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"a": ("LATENT",), "b": ("LATENT",)}}

    def look(self, a, b):
        first, second = a["samples"].float(), b["samples"].float()
        found = {"difference": (first - second).abs().max().item(), "largest": first.abs().max().item()}
        return {"ui": {"text": [json.dumps(found)]}, "result": ()}


NODE_CLASS_MAPPINGS = {"TestWeights": TestWeights, "TestLatents": TestLatents}
