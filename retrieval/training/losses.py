"""Training objectives: functions of two (B, D) matrices of unit rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(images: Tensor, texts: Tensor, scale: Tensor, owner: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE, the loss of CLIP (Radford et al. 2021, arXiv:2103.00020, figure 3).

    Args:
        images: (B, D) unit rows; row i belongs with row i of ``texts``.
        texts: (B, D) unit rows.
        scale: the inverse temperature, a scalar.
        owner: (B,) what each row is of. Rows of the same owner are no negatives of each other: two captions of one
            photo, or two photos of one class. None: every row is of its own.

    Returns:
        The mean of both directions' cross-entropies, in nats; log B when the encoders know nothing.
    """
    logits = scale * images @ texts.T  # (B, B)
    if owner is not None:
        same = owner[:, None] == owner[None, :]
        same.fill_diagonal_(False)
        logits = logits.masked_fill(same, -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
