"""The optimizer of the training stages: Muon for inner matrices, AdamW for everything else.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) orthogonalizes the momentum of each matrix; a
convolution is the matrix [out, in * height * width]. Its steps are brought to the size of AdamW's (Liu et al. 2025,
"Muon is Scalable for LLM Training"), so both follow one learning rate.

PyTorch's own Muon iterates on the whole matrix in bf16, which a CPU without bf16 emulates: half of a training step
there. `Muon` iterates on the Gram matrix in fp32, whose side is the matrix's shorter one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_NARROW = 32
"""A matrix with a shorter side than this (first and last layers) has too few directions to orthogonalize."""

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
_MOMENTUM = 0.95


def orthogonalized(matrix: Tensor) -> Tensor:
    """`matrix` [M, N] with all its singular values near 1 (0.7 to 1.2), by Muon's quintic iteration.

    X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X is a polynomial of G = X Xᵀ times X, step after step, so the product of the
    polynomials is found first, on matrices of the shorter side, and X is multiplied by it once.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    wide = wide / wide.norm().clamp(min=1e-7)
    gram = wide @ wide.t()
    a, b, c = _NEWTON_SCHULZ
    product = torch.eye(len(gram))
    for step in range(_NEWTON_SCHULZ_STEPS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor @ product
        if step + 1 < _NEWTON_SCHULZ_STEPS:
            gram = factor @ gram @ factor
    found = product @ wide
    return found if matrix.shape[0] <= matrix.shape[1] else found.t()


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, decoupled weight decay and steps as large as AdamW's."""

    def __init__(self, params: Iterable[nn.Parameter], weight_decay: float) -> None:
        super().__init__(params, {"lr": 1e-3, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move the matrices by the gradients that they hold."""
        for group in self.param_groups:
            rate = group["lr"]
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                momentum = state["momentum_buffer"].lerp_(matrix.grad, 1 - _MOMENTUM)
                update = orthogonalized(matrix.grad.lerp(momentum, _MOMENTUM))
                matrix.mul_(1 - rate * group["weight_decay"])
                matrix.sub_(update, alpha=rate * 0.2 * math.sqrt(max(matrix.shape)))


class MuonWithAdamW:
    """Both optimizers as one, whose state is kept by the names of the model's parameters."""

    def __init__(self, model: nn.Module, betas: tuple[float, float], weight_decay: float) -> None:
        self._parameters = dict(model.named_parameters())
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        self._matrices: dict[str, nn.Parameter] = {}
        for name, parameter in self._parameters.items():
            if _is_matrix(parameter) and id(parameter) not in embeddings:
                # Muon takes nothing but matrices, so it gets the same memory seen as one
                parameter.data = parameter.data.contiguous()
                self._matrices[name] = nn.Parameter(parameter.data.view(len(parameter), -1))
        others = {name: parameter for name, parameter in self._parameters.items() if name not in self._matrices}
        self._parts: list[tuple[dict[str, nn.Parameter], torch.optim.Optimizer]] = []
        if others:
            adamw = torch.optim.AdamW(others.values(), betas=betas, weight_decay=weight_decay, fused=True)
            self._parts.append((others, adamw))
        if self._matrices:
            self._parts.append((self._matrices, Muon(self._matrices.values(), weight_decay)))

    def step(self, learning_rate: float) -> None:
        """Move the parameters by the gradients that they hold."""
        for name, matrix in self._matrices.items():
            gradient = self._parameters[name].grad
            matrix.grad = None if gradient is None else gradient.reshape(matrix.shape)
        for _, optimizer in self._parts:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on beside the parameters, as `<parameter>.<quantity>`."""
        return {
            f"{name}.{key}": value
            for parameters, optimizer in self._parts
            for name, parameter in parameters.items()
            for key, value in optimizer.state.get(parameter, {}).items()
        }

    def load_state(self, stored: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        for parameters, optimizer in self._parts:
            places = {name: index for index, name in enumerate(parameters)}
            found: dict[int, dict[str, Any]] = {}
            for full_name, value in stored.items():
                name, _, key = full_name.rpartition(".")
                if name in places:
                    found.setdefault(places[name], {})[key] = _laid_out_like(parameters[name], value)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": found})


def _is_matrix(parameter: nn.Parameter) -> bool:
    return parameter.dim() >= 2 and min(len(parameter), parameter[0].numel()) >= _NARROW


def _laid_out_like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    # the fused optimizer walks through memory, so moments in another order than the weights would be mixed up
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
