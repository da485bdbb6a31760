"""Retrieval and classification measures: arrays in, numbers out.

Each measure of retrieval is computed from the ranks of the right items; see :mod:`retrieval.ranks` for what a rank is
and for the rule of ties. Names state definitions: ``hit@k`` is what CLIP papers call recall@k, ``recall@k`` is the
share of right items found; with one right item they are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from indexes.runtime import one_blas_thread
from retrieval.ranks import Ranking, Ranks, Rows, Ties, Values, rank_pairs

Interval: TypeAlias = tuple[float, float]

KS = (1, 5, 10)
LEVEL = 0.95  # of intervals
_SEED = 0  # of the bootstrap: the same data give the same interval, and two models meet the same draws
_DRAWS = 100  # bootstrap draws at a time: 25 MB of weights at 31,000 pictures


# ---- measures of retrieval -------------------------------------------------------------------------------------------


def hit_at_k(ranks: Ranks, k: int) -> Values:
    """(Q,) 1 if any right item is among the first k. Its mean is what CLIP papers call recall@k."""
    return (ranks.best <= k).astype(np.float64)


def recall_at_k(ranks: Ranks, k: int) -> Values:
    """(Q,) share of the right items that are among the first k: recall as information retrieval has it."""
    return ranks.per_query((ranks.ranks <= k).astype(np.float64)) / ranks.relevant


def r_precision(ranks: Ranks) -> Values:
    """(Q,) share of right items among the first R, where R is how many there are (`Rprec` in trec_eval)."""
    among = ranks.ranks <= np.repeat(ranks.relevant, ranks.relevant)
    return ranks.per_query(among.astype(np.float64)) / ranks.relevant


def average_precision(ranks: Ranks) -> Values:
    """(Q,) mean of the precision at each right item's rank; its mean is mAP (`map` in trec_eval)."""
    return ranks.per_query(ranks.ordinal / ranks.ranks) / ranks.relevant


def ndcg_at_k(ranks: Ranks, k: int) -> Values:
    """(Q,) gain of right items among the first k, 1 / log2(1 + rank) each, over the most that could be had.

    Järvelin & Kekäläinen 2002, doi:10.1145/582415.582418, with relevance 0 or 1 (`ndcg_cut` in trec_eval).
    """
    gains = np.where(ranks.ranks <= k, 1 / np.log2(1 + ranks.ranks), 0)
    most = np.concatenate([[0], np.cumsum(1 / np.log2(1 + np.arange(1, ranks.relevant.max(initial=1) + 1)))])
    shares: Values = ranks.per_query(gains) / most[np.minimum(ranks.relevant, k)]
    return shares


def reciprocal_rank(ranks: Ranks) -> Values:
    """(Q,) 1 / rank of the first right item; its mean is MRR (`recip_rank` in trec_eval)."""
    return 1 / ranks.best


_AT_K: Mapping[str, Callable[[Ranks, int], Values]] = {"hit": hit_at_k, "recall": recall_at_k, "ndcg": ndcg_at_k}
_PLAIN: Mapping[str, Callable[[Ranks], Values]] = {
    "r_precision": r_precision,
    "map": average_precision,
    "mrr": reciprocal_rank,
    "mean_rank": lambda ranks: ranks.best,
}


def per_query(ranks: Ranks, ks: Sequence[int] = KS) -> dict[str, Values]:
    """Every measure that is a mean over the queries, as its value for each: (Q,) by name."""
    return {**_at_k(ranks, ks), **{name: function(ranks) for name, function in _PLAIN.items()}}


def _at_k(ranks: Ranks, ks: Sequence[int]) -> dict[str, Values]:
    return {f"{name}@{k}": function(ranks, k) for name, function in _AT_K.items() for k in ks}


def means_at_k(ranks: Ranks, ks: Sequence[int] = KS) -> dict[str, float]:
    """hit@k, recall@k and nDCG@k: all that can be known of a search that ends; a rank beyond its end is infinite."""
    return {name: _mean(values) for name, values in _at_k(ranks, ks).items()}


@dataclass(frozen=True, eq=False)
class Scores(Mapping[str, float]):
    """Measures by name, as a mapping; and what is known of their certainty, where a bootstrap was asked for.

    Attributes:
        metrics: the measures.
        units: (U,) rows of the images that the bootstrap draws.
        drawn: each measure in each draw, (B,); empty without a bootstrap.
    """

    metrics: Mapping[str, float]
    units: Rows
    drawn: Mapping[str, Values]

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """The middle 95 % of each measure's draws; draws without any query of a kind are left out of its interval."""
        ends = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
        return {name: tuple(np.nanquantile(values, ends).tolist()) for name, values in self.drawn.items()}

    def __getitem__(self, name: str) -> float:
        return self.metrics[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.metrics)

    def __len__(self) -> int:
        return len(self.metrics)


def difference(one: Scores, other: Scores) -> Scores:
    """Measures less those of another model on the same data, with paired intervals.

    Both met the same draws of images, so that what is hard for both cancels out: an interval without 0 tells two models
    apart even where their own intervals overlap.

    Raises:
        ValueError: they are not of the same queries, or not of the same number of draws.
    """
    draws = [{name: len(values) for name, values in scores.drawn.items()} for scores in (one, other)]
    if not np.array_equal(one.units, other.units) or list(one) != list(other) or draws[0] != draws[1]:
        raise ValueError("the scores are not of the same queries, measures and number of draws")
    return Scores(
        {name: one[name] - other[name] for name in one},
        one.units,
        {name: one.drawn[name] - other.drawn[name] for name in one.drawn},
    )


def evaluate_retrieval(
    images: ArrayLike,
    texts: ArrayLike,
    owner: ArrayLike,
    ks: Sequence[int] = KS,
    bootstrap: int = 0,
    ties: Ties = "pessimistic",
) -> Scores:
    """Every measure of retrieval, text to image (``t2i_…``) and image to text (``i2t_…``), from one pass.

    Args:
        images: (N, D), of any length but zero. An image that owns no text is no query and distracts.
        texts: (M, D), likewise.
        owner: (M,) the row of the image that each text belongs to. (For texts of several images: :func:`rank_pairs`.)
        ks: for hit@k, recall@k and nDCG@k; a k above the number of items finds them all.
        bootstrap: draws for 95 % intervals, see :func:`measure`; 0 for none.
        ties: where a right item stands that scores exactly as high as wrong ones; see the module.

    Raises:
        VectorError: vectors of different widths, or zero, NaN or infinite ones; it says which.
        ValueError: an owner that is no row of the images, or no text at all.
    """
    owner = np.asarray(owner)
    count = len(np.asarray(texts))
    if owner.shape != (count,):
        raise ValueError(f"owner must name one image row for each of the {count} texts, not have shape {owner.shape}")
    return measure(rank_pairs(images, texts, owner, np.arange(count), ties), ks, bootstrap)


def measure(ranking: Ranking, ks: Sequence[int] = KS, bootstrap: int = 0) -> Scores:
    """Measures from ranks; see :func:`evaluate_retrieval`. A direction without queries (in a slice) has none.

    The intervals are percentiles (2.5 and 97.5) of the measures over ``bootstrap`` draws of as many images as there
    are, with replacement, each with all of its texts (a cluster bootstrap: texts of one image are not independent).
    Images and texts are drawn as queries only: what they were ranked among stays whole.
    """
    _check_ks(ks)
    units = np.unique(np.concatenate([ranks.images for ranks in (ranking.t2i, ranking.i2t)]))
    return Scores(_point(ranking, ks), units, _draw(ranking, units, ks, bootstrap) if bootstrap else {})


def _check_ks(ks: Sequence[int]) -> None:
    if not all(k >= 1 for k in ks):
        raise ValueError(f"every k must be at least 1, not {list(ks)}")


def _ways(ranking: Ranking) -> list[tuple[str, Ranks]]:
    return [(way, ranks) for way, ranks in (("t2i", ranking.t2i), ("i2t", ranking.i2t)) if len(ranks.queries)]


def _point(ranking: Ranking, ks: Sequence[int]) -> dict[str, float]:
    result: dict[str, float] = {}
    for way, ranks in _ways(ranking):
        result |= {f"{way}_{name}": _mean(values) for name, values in per_query(ranks, ks).items()}
        result[f"{way}_median_rank"] = float(np.median(ranks.best))
    if len(_ways(ranking)) == 2:  # of six hit@k, whatever the ks are
        result["rsum"] = sum(_mean(hit_at_k(ranks, k)) for _, ranks in _ways(ranking) for k in KS)
    return result


def _mean(values: Values) -> float:
    """Rounded once, so that the order of the queries does not matter."""
    return math.fsum(values) / len(values)


# ---- the bootstrap ---------------------------------------------------------------------------------------------------


def _draw(ranking: Ranking, units: Rows, ks: Sequence[int], draws: int) -> dict[str, Values]:
    """Every measure in every draw, (B,) each. Means are weighted sums, so that all of them are one matrix product."""
    tables, medians = {}, {}
    for way, ranks in _ways(ranking):
        cluster = np.searchsorted(units, ranks.images)
        values = {**per_query(ranks, ks), **{f"#{k}": hit_at_k(ranks, k) for k in KS}, "": np.ones(len(cluster))}
        sums = [np.bincount(cluster, weights=column, minlength=len(units)) for column in values.values()]
        tables[way] = (list(values), np.stack(sums, axis=1))
        medians[way] = _Median(ranks.best, cluster, len(units))
    parts: dict[str, list[Values]] = {}
    with one_blas_thread():  # the products are small: with more, others would spin in between for longer than they take
        for weights in bootstrap_weights(len(units), draws):
            for way, (names, table) in tables.items():
                totals = weights @ table  # (b, measures and 1)
                with np.errstate(invalid="ignore"):  # a slice may have no query of this way in a draw
                    means = totals[:, :-1] / totals[:, -1:]
                for name, column in zip(names[:-1], means.T, strict=True):
                    parts.setdefault(f"{way}_{name}", []).append(column)
                parts.setdefault(f"{way}_median_rank", []).append(medians[way].of(weights))
    drawn = {name: np.concatenate(values) for name, values in parts.items()}
    hits = [drawn.pop(f"{way}_#{k}") for way in tables for k in KS]
    if len(tables) == 2:
        drawn["rsum"] = np.sum(hits, axis=0)
    return drawn


def bootstrap_weights(count: int, draws: int) -> Iterator[Values]:
    """How often each of ``count`` things comes up in each draw of ``count``, (b, count) at a time."""
    random = np.random.default_rng(_SEED)
    for begin in range(0, draws, _DRAWS):
        rows = min(_DRAWS, draws - begin)
        drawn = random.integers(0, count, (rows, count), dtype=np.int32) + count * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)


class _Median:
    """The median of weighted values, for many sets of weights: only values near the median are looked at."""

    def __init__(self, values: Values, cluster: Rows, clusters: int) -> None:
        order = np.argsort(values, kind="stable")
        self.values, self.cluster, self.clusters = values[order], cluster[order], clusters
        self.total = np.bincount(cluster, minlength=clusters).astype(np.float64)
        self._look(max(16, round(3 * len(values) / math.sqrt(clusters))))  # six standard errors

    def _look(self, reach: int) -> None:
        """Look at so many of the sorted values on each side of the middle; of those below, only the number counts."""
        middle = len(self.values) // 2
        self.reach, self.low, self.high = reach, max(0, middle - reach), middle + reach
        self.below = np.bincount(self.cluster[: self.low], minlength=self.clusters).astype(np.float64)

    def of(self, weights: Values) -> Values:
        """(b, clusters) weights -> (b,) medians; NaN where nothing has any weight."""
        total, below = weights @ self.total, weights @ self.below
        near = self.values[self.low : self.high]
        up_to = below[:, None] + weights[:, self.cluster[self.low : self.high]].cumsum(axis=1)  # (b, near)
        places = [np.maximum(total - 1, 0) // 2, total // 2]  # of the middle one, or the two in the middle, from 0
        some = total > 0
        if any((some & ((place < below) | (place >= up_to[:, -1]))).any() for place in places):
            self._look(4 * self.reach)
            return self.of(weights)
        lower, upper = (near[np.where(some, (up_to <= place[:, None]).sum(axis=1), 0)] for place in places)
        return np.where(some, (lower + upper) / 2, np.nan)


# ---- classification --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ClassScores(Scores):
    """Measures of classification, and what was taken for what.

    Attributes:
        ranks: (N,) of each row's best right class among the wrong ones, from 1; a tie counts against it.
        per_class: (C,) share of each class's rows that are right at the first guess; NaN for a class without rows.
        confusion: (C, C) rows by right class (the best scored, if there are several) and by first guess.
    """

    ranks: Rows
    per_class: Values
    confusion: Rows


def evaluate_classification(
    scores: ArrayLike, right: ArrayLike, ks: Sequence[int] = (1, 5), bootstrap: int = 0
) -> ClassScores:
    """``top1``, ``top5`` …, ``mean_per_class``, and ``map`` where rows have several right classes.

    Args:
        scores: (N, C).
        right: (N, C) booleans, true where the class is a right answer; one or more in each row.
        ks: how many guesses top-k allows; with more than one right class, a row is right if any is among them.
        bootstrap: draws of rows for 95 % intervals; 0 for none. `map` has none.

    ``mean_per_class`` is the mean over classes of the share of their rows that top-1 has right (balanced accuracy);
    ``map`` the mean over classes of the average precision of ranking the rows by their score for the class.

    Raises:
        ValueError: shapes that do not fit, a row without a right class, NaN or infinite scores.
    """
    _check_ks(ks)
    scores, right = np.asarray(scores), np.asarray(right)
    if scores.ndim != 2 or right.shape != scores.shape or right.dtype != np.bool_:
        raise ValueError(f"scores {scores.shape} and right {right.dtype} {right.shape} must be tables of one shape")
    if not len(scores) or not right.any(axis=1).all() or not np.isfinite(scores).all():
        raise ValueError("every row needs a right class and finite scores, and there must be a row")
    own = np.where(right, scores, -np.inf)
    wrong = np.where(right, -np.inf, scores)
    best = own.max(axis=1)
    ranks = 1 + (wrong >= best[:, None]).sum(axis=1)
    row, column = np.nonzero(right.T)[::-1]  # by class
    classes, starts, members = np.unique(column, return_index=True, return_counts=True)
    hits = (ranks <= 1).astype(np.float64)
    per_class = np.full(scores.shape[1], np.nan)
    per_class[classes] = np.add.reduceat(hits[row], starts) / members
    metrics = {f"top{k}": float((ranks <= k).mean()) for k in ks} | {"mean_per_class": float(np.nanmean(per_class))}
    if (right.sum(axis=1) > 1).any():
        metrics["map"] = _mean_average_precision(scores, right)
    drawn: dict[str, list[Values]] = {}
    for weights in bootstrap_weights(len(scores), bootstrap):
        for k in ks:
            drawn.setdefault(f"top{k}", []).append(weights @ (ranks <= k) / len(scores))
        right_ones, all_ones = (np.add.reduceat(w[:, row], starts, axis=1) for w in (weights * hits, weights))
        with np.errstate(invalid="ignore"):  # a class may be absent from a draw: then the others make the mean
            drawn.setdefault("mean_per_class", []).append(np.nanmean(right_ones / all_ones, axis=1))
    confusion = np.zeros((scores.shape[1],) * 2, np.int64)
    guess = np.where(ranks <= 1, own.argmax(axis=1), wrong.argmax(axis=1))
    np.add.at(confusion, (own.argmax(axis=1), guess), 1)
    return ClassScores(
        metrics,
        np.arange(len(scores)),
        {name: np.concatenate(values) for name, values in drawn.items()},
        ranks,
        per_class,
        confusion,
    )


def _mean_average_precision(scores: NDArray[np.float32], right: NDArray[np.bool_]) -> float:
    """Mean over classes; a tie counts against the right rows."""
    precisions = []
    for column, mine in zip(scores.T, right.T, strict=True):
        if mine.any():
            ranked = mine[np.lexsort((mine, -column))]  # wrong ones first among equals
            precisions.append(float((np.cumsum(ranked) / np.arange(1, len(ranked) + 1))[ranked].mean()))
    return float(np.mean(precisions))
