"""Retrieval and classification measures: arrays in, numbers out.

Ranks count from 1. A tie counts against the retriever: whatever scores as high as the right answer stands before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from indexes.vectors import Vectors

Ranks = NDArray[np.int64]
_TILE = 1024  # rows scored at a time: a tile against 100,000 columns is 400 MB


def text_to_image_ranks(images: Vectors, texts: Vectors, owner: NDArray[np.int64]) -> Ranks:
    """Rank of each text's own picture among all pictures.

    Args:
        images: (N, D) unit rows.
        texts: (M, D) unit rows.
        owner: (M,) the row of the picture that each text belongs to.

    Returns:
        (M,) ranks from 1 to N.
    """
    ranks = np.empty(len(texts), np.int64)
    for start in range(0, len(texts), _TILE):
        scores = texts[start : start + _TILE] @ images.T  # (T, N)
        own = scores[np.arange(len(scores)), owner[start : start + _TILE]]
        ranks[start : start + _TILE] = (scores >= own[:, None]).sum(1)
    return ranks


def image_to_text_ranks(images: Vectors, texts: Vectors, owner: NDArray[np.int64]) -> Ranks:
    """Rank of each picture's best own text among all texts; pictures without text are left out.

    Other texts of the same picture do not stand in the way: only those of other pictures are counted.

    Returns:
        (P,) ranks from 1, of the P pictures that own a text, in row order.
    """
    owners = np.unique(owner)
    ranks = np.empty(len(owners), np.int64)
    for start in range(0, len(owners), _TILE):
        rows = owners[start : start + _TILE]
        scores = images[rows] @ texts.T  # (T, M)
        mine = owner[None, :] == rows[:, None]
        best = np.where(mine, scores, -np.inf).max(1)
        ranks[start : start + _TILE] = 1 + ((scores >= best[:, None]) & ~mine).sum(1)
    return ranks


def hit_at_k(ranks: Ranks, k: int) -> float:
    """Share of queries with a right answer among the first k: what CLIP papers call recall@k."""
    return float((ranks <= k).mean())


def evaluate_retrieval(
    images: Vectors, texts: Vectors, owner: NDArray[np.int64], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """hit@k and median rank, text to image (``t2i_…``) and image to text (``i2t_…``).

    Args and shapes as in :func:`text_to_image_ranks`.
    """
    result: dict[str, float] = {}
    for way, ranks in (
        ("t2i", text_to_image_ranks(images, texts, owner)),
        ("i2t", image_to_text_ranks(images, texts, owner)),
    ):
        result |= {f"{way}_hit@{k}": hit_at_k(ranks, k) for k in ks}
        result[f"{way}_median_rank"] = float(np.median(ranks))
    return result


def top_k_accuracy(scores: NDArray[np.float32], right: NDArray[np.bool_], k: int) -> float:
    """Share of rows with a right class among the k best scored.

    Args:
        scores: (N, C).
        right: (N, C), true where the class is a right answer; one or more in each row.
        k: how many guesses are allowed.
    """
    best = np.where(right, scores, -np.inf).max(1)
    before = ((scores >= best[:, None]) & ~right).sum(1)
    return float((before < k).mean())
