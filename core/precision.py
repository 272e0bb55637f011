"""Which precision a processor is fast in, and what half precision asks of a training."""

from __future__ import annotations

import functools
import platform

import torch

_X86 = {"x86_64", "amd64"}
_FP16_GRADIENT_SCALE = 1024.0


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether this processor multiplies in bf16.

    oneDNN takes bf16 on every AVX-512 processor and says that it supports it, but emulates it on those without
    AVX512-BF16 or AMX, where it is several times slower than fp32.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine().lower() not in _X86:
        return True
    # an older PyTorch cannot tell; fp32 is right everywhere
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(asked and asked())


def gradient_scale(compute: torch.dtype) -> float:
    """What losses are multiplied by for a network that computes in `compute` (see `Denoiser.gradient_scale`)."""
    return _FP16_GRADIENT_SCALE if compute == torch.float16 else 1.0
