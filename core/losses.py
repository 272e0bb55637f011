"""The objectives of concept ablation, one pure function each.

All are written on d = (x - D) / sigma, which is the noise for epsilon and v models and the velocity for rectified
flows, with t uniform and w_t = 1 as the paper has it; the squared L2 norm is averaged over elements. Equation numbers
are those of Kumari et al., ICCV 2023. Which latents and prompts go in is the trainer's business: model-based with the
frozen teacher (Eq. 4), with the student's own stopped gradient (Eq. 5) and reverse KL (section 4.3) share one function.
"""

from __future__ import annotations

import torch
from torch import Tensor


def model_based(student: Tensor, teacher: Tensor) -> Tensor:
    """Eq. 4 and 5: || sg[teacher(x_t, c)] - student(x_t, c*) ||^2.

    Args:
        student: d of the edited network for the target prompt, [B, C, h, w].
        teacher: d for the anchor prompt at the same x_t; from the frozen network (Eq. 4) or the edited one (Eq. 5).
    """
    return (student - teacher.detach()).square().mean()


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
