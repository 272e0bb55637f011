"""The objectives of concept ablation, one pure function each.

All are written on d = (x - D) / sigma, which is the noise for epsilon and v models and the velocity for rectified
flows, with t uniform and w_t = 1 as the paper has it; the squared L2 norm is averaged over elements. Equation numbers
are those of Kumari et al., ICCV 2023. Which latents and prompts go in is the trainer's business: model-based with the
frozen teacher (Eq. 4), with the student's own stopped gradient (Eq. 5) and reverse KL (section 4.3) share one function.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import AblationError


def model_based(student: Tensor, teacher: Tensor) -> Tensor:
    """Eq. 4 and 5: || sg[teacher(x_t, c)] - student(x_t, c*) ||^2.

    Args:
        student: d of the edited network for the target prompt, [B, C, h, w].
        teacher: d for the anchor prompt at the same x_t; from the frozen network (Eq. 4) or the edited one (Eq. 5).
    """
    return (student - teacher.detach()).square().mean()


def guided_away(anchor: Tensor, target: Tensor, eta: float) -> Tensor:
    """anchor + eta (anchor - target): what a teacher says for the anchor, guided away from the target.

    An anchor is often its target: some birds are roosters, and a plain emoji has one of the styles. The anchor's own
    prediction then leaves as much of the target as its pictures have. This is the negative guidance of ESD
    (Gandikota et al., "Erasing Concepts from Diffusion Models", ICCV 2023, arXiv 2303.07345), with the anchor in the
    place of the empty prompt.

    Args:
        anchor: d of the pretrained network for the anchor prompt, [B, C, h, w].
        target: d for the target prompt at the same x_t.
        eta: 0 gives `anchor`.
    """
    return anchor + eta * (anchor - target)


def check_guidance(eta: float) -> None:
    """Raise AblationError unless `guided_away` can take eta."""
    if not (math.isfinite(eta) and eta >= 0):
        raise AblationError(f"Negative guidance must be a number of at least 0, not {eta}.")


def noise_based(student: Tensor, truth: Tensor) -> Tensor:
    """Eq. 6: || eps - student(x_t, c*) ||^2, the diffusion loss of an anchor image under the target prompt.

    Also Eq. 1 (the regularization term) when `student` is the prediction for the anchor prompt itself.

    Args:
        student: d of the edited network, [B, C, h, w].
        truth: the d that leads from x_t to the image (`denoiser.true_direction`).
    """
    return (truth - student).square().mean()


def loss_maximization(loss: Tensor, distance: Tensor, weight: float) -> Tensor:
    """Eq. 7, the naive baseline: max(1 - L(x*, c*), 0) + weight * || edited weights - pretrained weights ||_2.

    Args:
        loss: L(x*, c*), scalar: `noise_based` of target images under the target prompt.
        distance: L2 norm of the delta, scalar.
        weight: lambda.
    """
    return torch.clamp(1 - loss, min=0) + weight * distance
