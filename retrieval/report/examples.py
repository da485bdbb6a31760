"""Which queries and pictures an evaluation shows, and the curves: data in, data out, for :mod:`retrieval.report`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from indexes.vectors import Vectors, cosines, exact_search
from retrieval.evaluation import ClassificationDetails, RetrievalDetails
from retrieval.ranks import Ranks, Rows

_Z = 1.96


@dataclass(frozen=True)
class Way:
    """One direction: Q queries, among the items of the other side."""

    name: str  # t2i or i2t
    ranks: Ranks
    asked: Vectors  # of all texts, or of all images
    items: Vectors
    query_of: Rows  # (P,) of each pair
    item_of: Rows

    def right(self, query: int) -> Rows:
        """The right items of a query."""
        chosen: Rows = self.item_of[self.query_of == query]
        return chosen


@dataclass(frozen=True)
class Case:
    """A query, the right item that comes first, and what was found."""

    query: int
    rank: float
    own: int
    score: float
    found: Sequence[tuple[int, float, bool]]  # item, score, whether it is right

    def placed(self) -> list[tuple[int, int, float, bool]]:
        """What was found, each with its place behind the item."""
        return [(item, place, score, right) for place, (item, score, right) in enumerate(self.found, 1)]


def ways(details: RetrievalDetails) -> list[Way]:
    """The directions in which there is anything to ask for."""
    images, texts = details.image_vectors, details.text_vectors
    both = [
        Way("t2i", details.ranking.t2i, texts, images, details.text_rows, details.image_rows),
        Way("i2t", details.ranking.i2t, images, texts, details.image_rows, details.text_rows),
    ]
    return [way for way in both if len(way.ranks.queries)]


# ---- shares ----------------------------------------------------------------------------------------------------------


def hit_curve(ranks: Ranks, ks: Sequence[int]) -> list[tuple[float, float, float]]:
    """hit@k for each k with the ends of its 95 % interval.

    Queries of one picture are not independent: the standard error is that of a ratio over clusters (Cochran 1977,
    Sampling Techniques, chapter 11; with n/(n - 1)), and the interval is cut off at 0 and 1.
    """
    images, cluster = np.unique(ranks.images, return_inverse=True)
    sizes = np.bincount(cluster)
    points = []
    for k in ks:
        hits = ranks.best <= k
        share = float(hits.mean())
        off = np.bincount(cluster, weights=hits) - share * sizes
        error = _Z * math.sqrt(float((off**2).sum()) * len(images) / max(1, len(images) - 1)) / len(hits)
        points.append((share, max(0.0, share - error), min(1.0, share + error)))
    return points


def chance(way: Way, ks: Sequence[int]) -> list[float]:
    """hit@k of a random order: 1 less the chance that none of a query's R right items is among k of the N items."""
    items = len(way.items)
    relevant, counts = np.unique(way.ranks.relevant, return_counts=True)
    k = np.array(ks)
    missed = np.zeros(len(ks))
    for right, count in zip(relevant.tolist(), counts.tolist(), strict=True):
        places = np.arange(right)[:, None]
        missed += count * np.prod(np.clip(items - k - places, 0, None) / (items - places), axis=0)
    chances: list[float] = (1 - missed / len(way.ranks.queries)).tolist()
    return chances


# ---- examples --------------------------------------------------------------------------------------------------------


def worst(way: Way, count: int, shown: int) -> list[Case]:
    """The ``count`` queries whose first right item ranks lowest; equal ranks by row. ``shown``: items of each."""
    ranks = way.ranks.best
    order = np.argsort(-ranks, kind="stable")[:count]
    return _cases(way, order[ranks[order] > 1], shown)


def best(way: Way, count: int, shown: int, probed: int) -> list[Case]:
    """The ``count`` queries that found a right item first, by how far the first wrong one scores below it.

    ``shown``: items of each. Of more than ``probed`` such queries, as many are looked at, evenly spread.
    """
    found = np.flatnonzero(way.ranks.best == 1)
    depth = int(way.ranks.relevant[found].max(initial=0)) + 1  # far enough down to meet a wrong item, if there is one
    most = max(1, min(probed, 4_000_000 // depth))
    if len(found) > most:
        found = found[np.linspace(0, len(found) - 1, most).round().astype(np.int64)]
    queries = way.ranks.queries[found]
    hits = exact_search(way.items, way.asked[queries], depth)
    right = np.isin(queries[:, None] * len(way.items) + hits.rows, way.query_of * len(way.items) + way.item_of)
    wrong = ~right & (hits.rows >= 0)
    first = wrong.argmax(axis=1)
    margin = np.where(wrong.any(axis=1), hits.scores[:, 0] - hits.scores[np.arange(len(found)), first], -np.inf)
    order = np.argsort(-margin, kind="stable")[:count]
    return _cases(way, found[order], shown)


def _cases(way: Way, places: Rows, shown: int) -> list[Case]:
    """What queries found, by their places among the ranks."""
    queries = way.ranks.queries[places]
    hits = exact_search(way.items, way.asked[queries], shown)
    cases = []
    for query, rank, found, scores in zip(
        queries.tolist(), way.ranks.best[places].tolist(), hits.rows.tolist(), hits.scores.tolist(), strict=True
    ):
        right = way.right(query)
        own = cosines(way.asked[query], way.items[right])
        first = int(own.argmax())
        mine = set(right.tolist())
        listed = [(item, score, item in mine) for item, score in zip(found, scores, strict=True) if item >= 0]
        cases.append(Case(query, rank, int(right[first]), float(own[first]), listed))
    return cases


# ---- classes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guesses:
    """What each of N pictures is, and what it was taken for: (N,) each."""

    right: Rows  # the right class; the best scored, if there are several
    first: Rows  # the first guess
    gap: NDArray[np.float32]  # by how much it scores above the right class; 0 where it is right


def guesses(details: ClassificationDetails) -> Guesses:
    """As :func:`retrieval.metrics.evaluate_classification` counts them: a tie is a mistake."""
    own = np.where(details.right, details.scores, -np.inf)
    wrong = np.where(details.right, -np.inf, details.scores)
    mine = own.argmax(axis=1)
    first = np.where(details.result.ranks <= 1, mine, wrong.argmax(axis=1))
    every = np.arange(len(mine))
    return Guesses(mine, first, details.scores[every, first] - details.scores[every, mine])
