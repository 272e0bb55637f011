"""A way round a slow path of PyTorch's CPU convolutions.

Where a convolution's output is 5×5 or smaller, has a stride, or has 4 channels or fewer on either side, oneDNN's bf16
weight gradient can fall back to a reference kernel: 256 channels at 4×4 and batch 64 take 500 ms where a matrix product
of the unfolded input takes 7 ms (torch 2.14, AMD EPYC with AVX512-BF16). The U-Net spent four fifths of a training step
in twenty such layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SMALL_OUTPUT = 25
_FEW_CHANNELS = 4


class _UnfoldedGradient(torch.autograd.Function):
    """conv2d without groups or dilation, whose weight gradient is a matrix product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding, ctx.has_bias = stride, padding, bias is not None
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        to_input = None
        if ctx.needs_input_grad[0]:
            to_input = torch.nn.grad.conv2d_input(x.shape, weight, gradient, ctx.stride, ctx.padding)
        columns = F.unfold(x, weight.shape[2:], padding=ctx.padding, stride=ctx.stride).transpose(0, 1).flatten(1)
        flat = gradient.flatten(2).transpose(0, 1).flatten(1)
        to_weight = (flat @ columns.t()).view_as(weight)
        to_bias = flat.float().sum(1).to(gradient.dtype) if ctx.has_bias else None
        return to_input, to_weight, to_bias, None, None


class _Conv2d(nn.Conv2d):
    """`nn.Conv2d` with the same parameters and values, but a gradient that is fast on the CPU for every shape."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        stride, padding = self.stride[0], self.padding[0]
        height, width = ((edge + 2 * padding - self.kernel_size[0]) // stride + 1 for edge in input.shape[2:])
        slow = height * width <= _SMALL_OUTPUT or stride > 1 or min(weight.shape[:2]) <= _FEW_CHANNELS
        if not slow or not torch.is_grad_enabled() or not torch.is_autocast_enabled("cpu"):
            return super()._conv_forward(input, weight, bias)
        dtype = torch.get_autocast_dtype("cpu")
        return _UnfoldedGradient.apply(
            input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), stride, padding
        )


def speed_up(model: nn.Module) -> nn.Module:
    """Give the fast gradient to every convolution of `model` that may need it; weights and names stay."""
    for module in model.modules():
        if type(module) is nn.Conv2d and module.groups == 1 and module.kernel_size[0] > 1 and _is_square(module):
            module.__class__ = _Conv2d
    return model


def _is_square(module: nn.Conv2d) -> bool:
    return (
        not isinstance(module.padding, str)
        and len({*module.kernel_size}) == len({*module.stride}) == len({*module.padding}) == 1
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
    )
