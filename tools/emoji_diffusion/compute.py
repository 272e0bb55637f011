"""How training computes on the CPU: the precision, and which of PyTorch's kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from concept_ablation.core.precision import cpu_has_bf16


@contextlib.contextmanager
def fast_forward() -> Iterator[None]:
    """bf16 where the processor has it (elsewhere it would be emulated), and attention as plain matrix products, whose
    backward pass takes half the time of the CPU's flash attention at these sizes.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()), sdpa_kernel(SDPBackend.MATH):
        yield
