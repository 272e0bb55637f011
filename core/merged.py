"""A delta merged for drawing: the model computes with W + dW, without a hook's second pass through edited layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from .delta import TEXT_PREFIXES, Delta, LowRank, check_fits
from .denoiser import Denoiser


@contextlib.contextmanager
def merged(delta: Delta, denoiser: Denoiser) -> Iterator[None]:
    """Within the block the model is the edited one, as a program that merges a LoRA has it. Where all layers are edited
    it draws about twice as fast as with `Delta.attach`, for a copy of their weights.

    No weight is written: an edited layer has another parameter for the time, and gets its own back however the block
    ends. Layers that are not in fp32, where rounding would swallow a small change, and those of the text encoder, whose
    results are cached, are edited by hooks.

    Raises:
        IncompatibleDelta: a layer is missing in the model, or has another shape there.
    """
    check_fits(delta, denoiser)
    by_hook = {
        name: change
        for name, change in delta.layers.items()
        if name.startswith(TEXT_PREFIXES) or denoiser.layers[name].weight.dtype != torch.float32
    }
    with contextlib.ExitStack() as stack:
        if by_hook:
            stack.enter_context(Delta(by_hook, delta.metadata).attach(denoiser))
        for name in delta.layers.keys() - by_hook.keys():
            change, module = delta.layers[name], denoiser.layers[name]
            for part, value in (("weight", change.weight), ("bias", change.bias)):
                if value is None:
                    continue
                own = getattr(module, part)
                dense = value.dense() if isinstance(value, LowRank) else value
                # into a tensor of the same layout, which a convolution's speed depends on
                edited = torch.add(own.detach(), dense.detach().to(own), out=torch.empty_like(own, requires_grad=False))
                stack.callback(setattr, module, part, own)
                setattr(module, part, nn.Parameter(edited, requires_grad=False))
        yield
