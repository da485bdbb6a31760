"""Classes that are rare: weights, focal loss, and rows that are drawn again, left out or made up.

For classes; several labels and numbers are left as they are, but for weights and the focal loss of labels.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from retrieval.errors import MissingExtra
from retrieval.heads.modalities import Inputs
from retrieval.heads.problem import Part, Problem, Treatment

RESAMPLED: tuple[Treatment, ...] = ("oversample", "undersample", "smote")  # by imbalanced-learn
GAMMA = 2.0  # of the focal loss: the paper's own
_NEIGHBOURS = 5  # of SMOTE: the paper's own


def check_installed(treatment: Treatment) -> None:
    """Refuse a treatment whose package is missing: MissingExtra."""
    if treatment in RESAMPLED and find_spec("imblearn") is None:
        raise MissingExtra(f"imbalance {treatment}", "'diptych[heads]'")


def class_weights(right: NDArray[Any], classes: int) -> NDArray[np.float64]:
    """(C,) N / (C · rows of the class), scikit-learn's ``balanced``; 1 of a class without rows."""
    counts = np.bincount(right, minlength=classes)
    there = (counts > 0).sum()
    return np.where(counts > 0, len(right) / (there * np.maximum(counts, 1)), 1.0)


def focal_loss(logits: Tensor, right: Tensor, gamma: float = GAMMA) -> Tensor:
    """Mean of -(1 - p)^γ log p, p of the right class: easy rows count less (Lin et al. 2017, arXiv:1708.02002).

    Args:
        logits: (B, C).
        right: (B,) int64 classes; or (B, C) zeros and ones of labels, and then the mean is over both.
        gamma: 0 is the cross-entropy.
    """
    if right.ndim == 2:
        entropy = F.binary_cross_entropy_with_logits(logits, right, reduction="none")
        return (entropy * (1 - torch.exp(-entropy)) ** gamma).mean()
    log_share = F.log_softmax(logits, dim=1).gather(1, right[:, None])[:, 0]
    return (-((1 - log_share.exp()) ** gamma) * log_share).mean()


def treated(problem: Problem) -> Part:
    """The rows to learn from after what the treatment does to them: drawn again, left out, or made up.

    - ``oversample``: rows of rare classes again, until each has as many as the largest
    - ``undersample``: as many rows of each class as the rarest has
    - ``smote``: between rows of a rare class and their neighbours of the same class (Chawla et al. 2002,
      doi:10.1613/jair.953), on all modalities joined; a new row has the modalities of the nearer one
    - ``augment``: other views of the pictures, as further rows, the rarer the class the more

    Raises:
        MissingExtra: imbalanced-learn is not installed.
    """
    train, kind = problem.train, problem.treatment
    if problem.target.task != "class" or kind in ("none", "class-weights", "focal"):
        return train
    if kind == "augment":
        return _augmented(problem)
    counts = np.bincount(train.right)
    if len(counts[counts > 0]) < 2:
        return train
    check_installed(kind)
    from imblearn.over_sampling import SMOTE, RandomOverSampler
    from imblearn.under_sampling import RandomUnderSampler

    if kind == "smote":
        return _smote(train, int(counts[counts > 0].min()), problem.seed, SMOTE)
    sampler = (RandomOverSampler if kind == "oversample" else RandomUnderSampler)(random_state=problem.seed)
    rows, _ = sampler.fit_resample(np.arange(len(train))[:, None], train.right)
    return train.take(rows[:, 0])


def _smote(train: Part, fewest: int, seed: int, method: Any) -> Part:
    if fewest < 2:  # no neighbour to go towards
        return train
    inputs = train.inputs
    joined = np.concatenate([inputs.joined(), inputs.present.astype(np.float32)], axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made, right = method(random_state=seed, k_neighbors=min(_NEIGHBOURS, fewest - 1)).fit_resample(
            joined, train.right
        )
    edges = np.cumsum([table.shape[1] for table in inputs.values])
    *tables, flags = np.split(np.asarray(made, np.float32), edges, axis=1)
    present = flags > 0.5
    tables = [np.where(present[:, i : i + 1], table, 0).astype(np.float32) for i, table in enumerate(tables)]
    return Part(Inputs(inputs.names, tuple(tables), present), np.asarray(right))


def _augmented(problem: Problem) -> Part:
    """All rows, and of each class so many other views that it comes as near to the largest as there are views."""
    train = problem.train
    counts = np.bincount(train.right, minlength=problem.target.outputs)
    parts, right = [train.inputs], [train.right]
    random = np.random.default_rng(problem.seed)
    wanted = counts.max() / np.maximum(counts, 1) - 1  # further rows for each row of a class
    for view in problem.views:
        share = np.clip(wanted, 0, 1)
        chosen = np.flatnonzero(random.random(len(train)) < share[train.right])
        parts.append(view.take(chosen))
        right.append(train.right[chosen])
        wanted = wanted - share
    return Part(Inputs.stacked(parts), np.concatenate(right))
