"""What generated vectors and pictures are worth: arrays in, numbers out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from indexes.vectors import Vectors
from retrieval.errors import DataError


def frechet_distance(rows: NDArray[np.floating], others: NDArray[np.floating]) -> float:
    """Fréchet distance of two sets of features, taken as Gaussians: |m - m'|² + tr(S + S' - 2 (S S')^½).

    As FID has it (Heusel et al. 2017, arXiv:1706.08500), but of whatever features these are: not to be compared with
    published figures, which are of Inception's. It falls with the number of rows: compare equally many.

    Args:
        rows: (N, D), at least 2.
        others: (N', D), at least 2.
    """
    if min(len(rows), len(others)) < 2:
        raise DataError("a Fréchet distance needs at least 2 rows on either side")
    first, second = np.asarray(rows, np.float64), np.asarray(others, np.float64)
    ahead = first.mean(0) - second.mean(0)
    left, right = np.cov(first.T), np.cov(second.T)
    # The product of two covariances has the eigenvalues of a symmetric matrix: no square root of a general one.
    values, directions = np.linalg.eigh(left)
    root = directions * np.sqrt(values.clip(min=0)) @ directions.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ right @ root).clip(min=0)).sum()
    return float(ahead @ ahead + np.trace(left) + np.trace(right) - 2 * shared)


def mean_distance(rows: Vectors) -> float:
    """Mean of 1 - cosine over all pairs of different rows; 0 if all are the same. Of 1 row there is none: NaN."""
    count = len(rows)
    if count < 2:
        return float("nan")
    total = np.asarray(rows, np.float64).sum(0)
    return float(1 - (total @ total - count) / (count * (count - 1)))


def coverage(real: Vectors, made: Vectors, k: int = 5) -> float:
    """Share of the real rows with a made one no further than their k-th nearest real neighbour (Naeem et al. 2020).

    What a collapsed generator has little of: it meets a few real pictures, however well.

    Args:
        real: (N, D) unit rows, more than k.
        made: (M, D) unit rows.
        k: as in arXiv:2002.09797.
    """
    if len(real) <= k:
        raise DataError(f"coverage needs more than {k} real rows")
    among = real @ real.T
    np.fill_diagonal(among, -np.inf)
    radius = np.partition(among, -k, axis=1)[:, -k]  # the cosine of the k-th nearest
    return float(((real @ made.T).max(axis=1) >= radius).mean())


def area_under_curve(odd: NDArray[np.floating], ordinary: NDArray[np.floating]) -> float:
    """How often an odd row has the higher score of two, ties half: the area under the ROC curve."""
    from sklearn.metrics import roc_auc_score

    right = np.repeat([1, 0], [len(odd), len(ordinary)])
    return float(roc_auc_score(right, np.concatenate([odd, ordinary])))
