"""The optimizer of the training stages: Muon for inner matrices, AdamW for everything else.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) orthogonalizes the momentum of each matrix; a
convolution is the matrix [out, in * height * width]. Its steps are brought to the size of AdamW's (Liu et al. 2025,
"Muon is Scalable for LLM Training"), so both follow one learning rate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_NARROW = 32
"""A matrix with a shorter side than this (first and last layers) has too few directions to orthogonalize."""


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
            muon = torch.optim.Muon(self._matrices.values(), weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self._parts.append((self._matrices, muon))

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
