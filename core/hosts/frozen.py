"""Layers that are not trained, made to keep nothing that only their own gradients would need.

A backward pass goes through the whole network to reach the few weights that are trained. On its way PyTorch keeps the
input of every convolution, for a gradient of its weight that nobody asks for; under autocast a copy of every weight in
the compute type; and results that are cheap to compute again. Here a frozen layer computes the same and keeps the
least: a convolution and a linear layer nothing but their weight as it is stored, a group normalization its input in the
type that it came in, an activation after it nothing more (the normalization is done again), a gated linear unit the
input of its projection, an eighth of what that gives (the projection is done again).

Without gradients, or where the weight itself is trained, a layer is the one that it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def keep_little(network: nn.Module, compute: torch.dtype) -> nn.Module:
    """Have convolutions, linear layers, gated linear units and activations of `network` keep little for a backward
    pass. Weights, names and results stay.

    Args:
        network: any module; layers of other classes, derived ones among them, are left as they are.
        compute: what its layers compute in, by their own type or by autocast.
    """
    kinds = {nn.Conv2d: _Conv2d, nn.Linear: _Linear, GEGLU: _Gated, nn.SiLU: _SiLU}
    for module in _become(network, kinds):
        module.compute = compute
    return network


def speed_up_norms(network: nn.Module) -> nn.Module:
    """Have every group normalization of `network` computed in fp32; weights and names stay.

    PyTorch's CPU kernel takes 4 to 8 times longer for bf16 in channels_last than for fp32: with it the embedded model's
    U-Net spends a quarter of its time in 30 normalizations (torch 2.14, AMD EPYC).
    """
    _become(network, {nn.GroupNorm: _GroupNorm})
    return network


def _become(network: nn.Module, kinds: Mapping[type[nn.Module], type[nn.Module]]) -> list[nn.Module]:
    """Give every module of exactly one of these classes the one derived from it; returns those modules."""
    changed = [
        module
        for module in network.modules()
        if type(module) in kinds and getattr(module, "padding_mode", "zeros") == "zeros"
    ]
    for module in changed:
        module.__class__ = kinds[type(module)]
    return changed


class _Conv2d(nn.Conv2d):
    compute: torch.dtype

    def forward(self, input: Tensor) -> Tensor:
        if not _is_passed(self, input):
            return super().forward(input)
        how = self.stride, self.padding, self.dilation, self.groups
        return _convolve(input.to(self.compute), self.weight, self.bias, *how)


class _Linear(nn.Linear):
    compute: torch.dtype

    def forward(self, input: Tensor) -> Tensor:
        # a weight of the compute type is kept as it is, which costs nothing
        if not _is_passed(self, input) or self.weight.dtype == self.compute:
            return super().forward(input)
        return _project(input.to(self.compute), self.weight, self.bias)


class _GroupNorm(nn.GroupNorm):
    """In fp32, and in the type that it got."""

    def forward(self, input: Tensor) -> Tensor:
        if _is_passed(self, input):
            how = self.weight, self.bias, self.num_groups, self.eps
            normalized = _normalize(input, *how)
            normalized.made_of = (input.detach(), *how)
            return normalized
        weight, bias = _cast(torch.float32, self.weight, self.bias)
        return F.group_norm(input.float(), self.num_groups, weight, bias, self.eps).to(input.dtype)


class _SiLU(nn.SiLU):
    """Of what a `_GroupNorm` has just made, which says of what in `made_of`."""

    def forward(self, input: Tensor) -> Tensor:
        made_of = getattr(input, "made_of", None)
        return super().forward(input) if made_of is None else _activate(input, *made_of)


class _Gated(GEGLU):
    compute: torch.dtype

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(hidden_states, *args, **kwargs)
        # a delta's hook needs the projection to be called
        if _is_passed(self.proj, hidden_states) and not self.proj._forward_hooks:
            return _project_and_gate(hidden_states.to(self.compute), self.proj.weight, self.proj.bias)
        return _gate(self.proj(hidden_states))


class _Convolution(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.how = x.shape, how
        return F.conv2d(x, *_cast(x.dtype, weight, bias), *how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        back = torch.nn.grad.conv2d_input(ctx.shape, weight.to(gradient.dtype), gradient, *ctx.how)
        return back, None, None, *(None for _ in ctx.how)


class _Projection(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, *_cast(x.dtype, weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), None, None


class _GatedUnit(Function):
    """value * gelu(gate) of the two halves of a tensor."""

    @staticmethod
    def forward(ctx: Any, halves: Tensor) -> Tensor:
        ctx.save_for_backward(halves)
        return _gated(halves)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (halves,) = ctx.saved_tensors
        return _gated_backward(gradient, halves)


class _GatedProjection(Function):
    """The same of a projection that is not trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return _gated(F.linear(x, *_cast(x.dtype, weight, bias)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        weight, bias = _cast(x.dtype, *weights)
        return _gated_backward(gradient, F.linear(x, weight, bias)) @ weight, None, None


class _Normalization(Function):
    """Group normalization in fp32 that keeps its input in the type that it came in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> Tensor:
        normalized, mean, deviation = _group_norm(x, weight, bias, groups, eps)
        ctx.sizes = _sizes(x, groups)
        ctx.save_for_backward(x, weight, mean, deviation)
        return normalized.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, deviation = ctx.saved_tensors
        layout = _layout(x)
        exact, upper = (part.float().contiguous(memory_format=layout) for part in (x, gradient))
        back, _, _ = torch.ops.aten.native_group_norm_backward(
            upper, exact, mean, deviation, *_cast(torch.float32, weight), *ctx.sizes, [True, False, False]
        )
        return back.to(x.dtype), None, None, None, None


class _Activation(Function):
    """SiLU of group normalization's result: what that was made of is kept instead, which is kept for it anyway."""

    @staticmethod
    def forward(ctx: Any, normalized: Tensor, x: Tensor, *how: Any) -> Tensor:
        weight, bias, *ctx.how = how
        ctx.save_for_backward(x, weight, bias)
        return F.silu(normalized)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        normalized = _group_norm(x, *weights, *ctx.how)[0].to(x.dtype)
        return torch.ops.aten.silu_backward(gradient, normalized), *(None,) * 5


_convolve, _project, _gate, _project_and_gate, _normalize, _activate = (
    kind.apply for kind in (_Convolution, _Projection, _GatedUnit, _GatedProjection, _Normalization, _Activation)
)


def _gated(halves: Tensor) -> Tensor:
    value, gate = halves.chunk(2, dim=-1)
    return value * F.gelu(gate)


def _gated_backward(gradient: Tensor, halves: Tensor) -> Tensor:
    value, gate = halves.chunk(2, dim=-1)
    back = torch.empty_like(halves)
    to_value, to_gate = back.chunk(2, dim=-1)
    torch.mul(gradient, F.gelu(gate), out=to_value)
    to_gate.copy_(torch.ops.aten.gelu_backward(gradient * value, gate))
    return back


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(normalized, mean, reciprocal deviation), all in fp32."""
    exact = x.float().contiguous(memory_format=_layout(x))
    return torch.native_group_norm(exact, *_cast(torch.float32, weight, bias), *_sizes(x, groups), eps)


def _sizes(x: Tensor, groups: int) -> tuple[int, int, int, int]:
    """Rows, channels, positions and groups, as PyTorch's group normalization takes them."""
    return x.shape[0], x.shape[1], x[0, 0].numel(), groups


def _is_passed(module: nn.Conv2d | nn.Linear | nn.GroupNorm, x: Tensor) -> bool:
    """Whether a gradient goes through the layer to its input and to nothing else."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return False
    return not any(part is not None and part.requires_grad for part in (module.weight, module.bias))


def _cast(dtype: torch.dtype, *parts: Tensor | None) -> list[Tensor | None]:
    """The tensors in a type; what a layer does not have stays None."""
    return [None if part is None else part.to(dtype) for part in parts]


def _layout(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
