"""Where the right items stand: ranks of all pairs in both directions, from one pass over the scores, nothing sorted.

A score is the cosine of two unit rows, summed in float64 and rounded to float32, as in :mod:`indexes.vectors`: ranks
depend on the vectors alone, not on the processor, the number of threads or the order of the rows.

Ranks count from 1. Wrong items that score exactly as high as a right one are *tied* with it, and ``ties`` says where
the right one then stands: ``pessimistic``, behind all of them (a model that gives everything the same score finds
nothing), or ``mean``, in the middle between the best and the worst place (ranks may then end in a half). Right items
tied among themselves do not stand in each other's way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from indexes.errors import VectorError
from indexes.runtime import one_blas_thread, thread_count
from indexes.vectors import Vectors, as_vectors

Ties: TypeAlias = Literal["pessimistic", "mean"]
Rows: TypeAlias = NDArray[np.int64]
Values: TypeAlias = NDArray[np.float64]

# A tile of scores: 2 MB, and so small that counts fit a byte on the way (see _true_in_rows, _compare).
_TILE_IMAGES = 240
_TILE_TEXTS = 2032
_UNSURE = 4096  # scores of a tile too close to call in float32; more, and all of it is computed in float64
_FEW = 32  # a part of so many of a tile's scores at most is looked at one by one
_PAIRS = 2048  # rows widened to float64 at a time: 8 MB at 512 dimensions


@dataclass(frozen=True, eq=False)
class Ranks:
    """Where the right items stand for each of Q queries of one direction; every query has at least one.

    Attributes:
        queries: (Q,) the query's row: of the texts for text to image, of the images for image to text.
        images: (Q,) row of the (first) image that the query belongs to: what the bootstrap draws.
        first: (Q + 1,) the right items of query q are ``ranks[first[q]:first[q + 1]]``.
        ranks: (P,) from 1, rising within each query.
    """

    queries: Rows
    images: Rows
    first: Rows
    ranks: Values

    @property
    def best(self) -> Values:
        """(Q,) rank of the first right item."""
        best: Values = self.ranks[self.first[:-1]]
        return best

    @property
    def relevant(self) -> Rows:
        """(Q,) how many right items there are."""
        return np.diff(self.first)

    @property
    def ordinal(self) -> Rows:
        """(P,) 1 for a query's first right item, 2 for its second, …."""
        return np.arange(1, len(self.ranks) + 1) - np.repeat(self.first[:-1], self.relevant)

    def per_query(self, values: Values) -> Values:
        """(P,) values summed for each query -> (Q,)."""
        sums: Values = np.add.reduceat(values, self.first[:-1]) if len(self.queries) else np.empty(0)
        return sums

    def select(self, chosen: NDArray[np.bool_]) -> Ranks:
        """Only some of the queries; they were ranked among all items."""
        kept = np.repeat(chosen, self.relevant)
        first = np.concatenate([[0], np.cumsum(self.relevant[chosen])])
        return Ranks(self.queries[chosen], self.images[chosen], first, self.ranks[kept])


@dataclass(frozen=True, eq=False)
class Ranking:
    """Both directions, from one pass over the scores. Images without text, and texts without image, only distract."""

    t2i: Ranks
    i2t: Ranks

    def select(self, texts: NDArray[np.bool_], images: NDArray[np.bool_]) -> Ranking:
        """Only the queries among some texts (M,) and some images (N,); they were ranked among all items."""
        return Ranking(self.t2i.select(texts[self.t2i.queries]), self.i2t.select(images[self.i2t.queries]))


def rank_pairs(
    images: ArrayLike, texts: ArrayLike, image_rows: ArrayLike, text_rows: ArrayLike, ties: Ties = "pessimistic"
) -> Ranking:
    """Rank every text among all images and every image among all texts.

    Args:
        images: (N, D), of any length but zero.
        texts: (M, D), likewise.
        image_rows: (P,) with ``text_rows`` the pairs that belong together: an image may own several texts, and a text
            several images.
        text_rows: (P,).
        ties: where a right item stands that scores exactly as high as wrong ones; see the module.

    Raises:
        VectorError: vectors of different widths, or zero, NaN or infinite ones; it says which.
        ValueError: rows that are out of range, pairs that are given twice, or no pair at all.
    """
    if ties not in get_args(Ties):
        raise ValueError(f"ties must be one of {', '.join(get_args(Ties))}, not {ties!r}")
    left, right = _unit("images", images), _unit("texts", texts)
    if left.shape[1] != right.shape[1]:
        raise VectorError(f"images have {left.shape[1]} dimensions and texts {right.shape[1]}: are they of one model?")
    rows, columns = _pairs(image_rows, text_rows, len(left), len(right))
    own = _exact(left, right, rows, columns)
    by_image, by_text = _count(left, right, rows, columns, own)
    images_of_texts = np.full(len(right), len(left))
    np.minimum.at(images_of_texts, columns, rows)
    return Ranking(
        _ranks(columns, images_of_texts, own, by_text, ties), _ranks(rows, np.arange(len(left)), own, by_image, ties)
    )


@dataclass(frozen=True)
class _Wrong:
    """How many wrong items stand above each pair, and how many are tied with it: (P,) each."""

    above: Rows
    tied: Rows

    @classmethod
    def none(cls, pairs: int) -> _Wrong:
        return cls(np.zeros(pairs, np.int64), np.zeros(pairs, np.int64))


def _ranks(queries: Rows, images: Rows, own: NDArray[np.float32], wrong: _Wrong, ties: Ties) -> Ranks:
    order = np.lexsort((-own, queries))
    asked, counts = np.unique(queries, return_counts=True)
    first = np.concatenate([[0], np.cumsum(counts)])
    ordinal = np.arange(1, len(order) + 1) - np.repeat(first[:-1], counts)
    behind = wrong.tied if ties == "pessimistic" else wrong.tied / 2
    return Ranks(asked, images[asked], first, (wrong.above + behind)[order] + ordinal)


def _unit(what: str, vectors: ArrayLike) -> Vectors:
    """Unit rows. Those that are so already are not copied: they may be most of the memory."""
    if isinstance(vectors, np.ndarray) and _are_unit(vectors):
        return vectors
    try:
        return as_vectors(vectors)
    except VectorError as error:
        raise VectorError(f"{what}: {error}") from error


def _are_unit(vectors: NDArray[Any]) -> bool:
    if vectors.ndim != 2 or vectors.dtype != np.float32 or not vectors.flags.c_contiguous:
        return False
    parts = (vectors[i : i + _PAIRS] for i in range(0, len(vectors), _PAIRS))
    try:
        return all(np.array_equal(part, as_vectors(part)) for part in parts)
    except VectorError:  # of a row that is counted within its part
        return False


def _pairs(image_rows: ArrayLike, text_rows: ArrayLike, images: int, texts: int) -> tuple[Rows, Rows]:
    rows, columns = np.asarray(image_rows), np.asarray(text_rows)
    for name, values, count in (("image", rows, images), ("text", columns, texts)):
        whole = np.issubdtype(values.dtype, np.integer) or values.size == 0  # an empty list makes floats
        if values.ndim != 1 or len(values) != len(rows) or not whole:
            raise ValueError(f"the pairs' {name} rows must be one integer each, not {values.dtype} {values.shape}")
        if len(values) and not (values.min() >= 0 and values.max() < count):
            raise ValueError(f"a pair names {name} {values.min()} or {values.max()}, and there are {count}")
    if not len(rows):
        raise ValueError("there is no pair: no text belongs to any image")
    rows, columns = rows.astype(np.int64), columns.astype(np.int64)
    if len(np.unique(rows * texts + columns)) < len(rows):
        raise ValueError("a pair is given twice")
    return rows, columns


def _exact(images: Vectors, texts: Vectors, rows: Rows, columns: Rows) -> NDArray[np.float32]:
    """Scores of single pairs -> (P,)."""
    out = np.empty(len(rows), np.float32)
    for i in range(0, len(rows), _PAIRS):
        some = slice(i, i + _PAIRS)
        out[some] = (images[rows[some]].astype(np.float64) * texts[columns[some]]).sum(1)
    return out


# ---- counting --------------------------------------------------------------------------------------------------------
#
# The rank of a right item is the number of wrong ones above it, so nothing is sorted: tiles of the product are compared
# with the pairs' own scores while they lie in the cache, along the rows for one direction and along the columns for the
# other. The product is float32; where it comes so close to a pair's own score that rounding could decide, the score is
# computed again in float64.


@dataclass(frozen=True)
class _Side:
    """The pairs as the queries of one direction have them.

    Queries are put in the order of falling numbers of pairs; slot q holds the q-th pair of each that has so many, and
    those are the first ones.
    """

    vectors: Vectors  # (N, D) of the queries, in the order of their places
    place: Rows  # (P,) the place of each pair's query
    slots: list[Rows]  # slots[q][i] is the q-th pair of the query in place i

    @classmethod
    def of(cls, vectors: Vectors, queries: Rows) -> _Side:
        pairs_of = np.bincount(queries, minlength=len(vectors))
        order = np.argsort(-pairs_of, kind="stable")
        places = np.empty(len(vectors), np.int64)
        places[order] = np.arange(len(vectors))
        place = places[queries]
        by_place = np.argsort(place, kind="stable")
        starts = np.cumsum(pairs_of[order]) - pairs_of[order]
        slot = np.empty(len(queries), np.int64)
        slot[by_place] = np.arange(len(queries)) - starts[place[by_place]]
        slots = np.split(np.lexsort((place, slot)), np.cumsum(np.bincount(slot))[:-1])
        in_order = bool((order[1:] > order[:-1]).all())
        return cls(vectors if in_order else vectors[order], place, slots)


@dataclass(frozen=True)
class _Tile:
    """Scores of some images against some texts."""

    scores: NDArray[np.float32]  # (r, c)
    corner: tuple[int, int]  # place of the first image and of the first text
    masks: NDArray[np.bool_]  # (2, r, at least c) to work in; beyond c all False


@dataclass(frozen=True)
class _Part:
    """What a tile says of some pairs."""

    pairs: Rows  # (n,)
    above: Rows  # (n,) how many scores are surely higher than the pair's own
    close: Rows  # (n,) how many may be or may not
    where: tuple[Rows, Rows, Rows]  # of the close ones: place of the image, place of the text, pair


def _count(
    images: Vectors, texts: Vectors, rows: Rows, columns: Rows, own: NDArray[np.float32]
) -> tuple[_Wrong, _Wrong]:
    """Wrong texts against each pair's text for its image, and wrong images against its image for its text."""
    sides = _Side.of(images, rows), _Side.of(texts, columns)
    # Rounding of a float32 sum of D products of unit rows: hardly ever more than sqrt(D) steps of 2^-24 (Higham & Mary
    # 2019, doi:10.1137/18M1226312), never more than D. The pairs' own scores tell whether it did. The 8 steps more
    # are for what a few dimensions do not average out, and for rounding the score and the bounds themselves.
    dim = images.shape[1]
    for steps in (8 + 2 * math.sqrt(dim), 8 + 2 * dim):
        wrong, error = _count_within(sides, own, steps * 2.0**-24)
        if error <= steps * 2.0**-25:
            break
    return wrong


def _count_within(
    sides: tuple[_Side, _Side], own: NDArray[np.float32], margin: float
) -> tuple[tuple[_Wrong, _Wrong], float]:
    """Count, with scores nearer than the margin taken for uncertain; and how far the product was off at most."""
    corners = [
        (row, column)
        for column in range(0, len(sides[1].vectors), _TILE_TEXTS)
        for row in range(0, len(sides[0].vectors), _TILE_IMAGES)
    ]
    counters = [_Counter(sides, own, margin) for _ in range(min(thread_count(), len(corners)))]
    left = iter(corners)  # shared: whoever is done takes the next
    if len(counters) == 1:
        counters[0].run(left)
    else:
        # Threads of our own, one product in each: comparing runs in parallel as well, and nobody waits for the other.
        with one_blas_thread(), ThreadPoolExecutor(len(counters)) as pool:
            list(pool.map(lambda counter: counter.run(left), counters))
    for other in counters[1:]:
        counters[0].add(other)
    return counters[0].wrong, max(counter.error for counter in counters)


class _Counter:
    """Counts over some of the tiles, in memory of its own."""

    def __init__(self, sides: tuple[_Side, _Side], own: NDArray[np.float32], margin: float) -> None:
        self.sides, self.own = sides, own
        self.near = (own - np.float32(margin), own + np.float32(margin))
        self.equal = (own, np.nextafter(own, np.float32(np.inf)))  # nothing but equal scores between these bounds
        self.wrong = _Wrong.none(len(own)), _Wrong.none(len(own))
        self.error = 0.0
        self.memory = np.empty(_TILE_IMAGES * _TILE_TEXTS, np.float32)
        self.masks = np.zeros((2, _TILE_IMAGES, _TILE_TEXTS), np.bool_)
        # pairs by tile: first by text, then by image
        self.order = np.lexsort((sides[0].place // _TILE_IMAGES, sides[1].place // _TILE_TEXTS))
        self.tile_of = self._number(sides[0].place[self.order], sides[1].place[self.order])

    def _number(self, row: Any, column: Any) -> Any:
        return column // _TILE_TEXTS * (len(self.sides[0].vectors) // _TILE_IMAGES + 1) + row // _TILE_IMAGES

    def run(self, corners: Iterator[tuple[int, int]]) -> None:
        for row, column in corners:
            images = self.sides[0].vectors[row : row + _TILE_IMAGES]
            texts = self.sides[1].vectors[column : column + _TILE_TEXTS]
            scores = self.memory[: len(images) * len(texts)].reshape(len(images), len(texts))
            np.matmul(images, texts.T, out=scores)
            self._count(_Tile(scores, (row, column), self._masks(len(texts))))

    def _masks(self, width: int) -> NDArray[np.bool_]:
        """Two masks, of a multiple of eight columns; those beyond the width are False."""
        eights = -(-width // 8) * 8
        if self.masks.shape[2] != eights:
            self.masks = np.zeros((2, _TILE_IMAGES, eights), np.bool_)
        self.masks[:, :, width:] = False
        return self.masks

    def _count(self, tile: _Tile) -> None:
        number = self._number(*tile.corner)
        pairs = self.order[slice(*np.searchsorted(self.tile_of, (number, number + 1)))]
        mine = (self.sides[0].place[pairs] - tile.corner[0], self.sides[1].place[pairs] - tile.corner[1])
        self.error = max(self.error, float(np.abs(tile.scores[mine] - self.own[pairs]).max(initial=0)))
        tile.scores[mine] = -np.inf  # right items stand in nobody's way
        parts = [_compare(tile, axis, self.sides[axis], self.near) for axis in (0, 1)]
        close = sum(int(part.close.sum()) for side in parts for part in side)
        if close > _UNSURE:
            tile.scores[:] = _in_float64(tile, self.sides)
            tile.scores[mine] = -np.inf
            parts = [_compare(tile, axis, self.sides[axis], self.equal) for axis in (0, 1)]
        for wrong, side in zip(self.wrong, parts, strict=True):
            for part in side:
                wrong.above[part.pairs] += part.above
                if close > _UNSURE:
                    wrong.tied[part.pairs] += part.close
                else:
                    image, text, pair = part.where
                    scores = _exact(self.sides[0].vectors, self.sides[1].vectors, image, text)
                    np.add.at(wrong.above, pair, scores > self.own[pair])
                    np.add.at(wrong.tied, pair, scores == self.own[pair])

    def add(self, other: _Counter) -> None:
        for mine, theirs in zip(self.wrong, other.wrong, strict=True):
            mine.above[:] += theirs.above
            mine.tied[:] += theirs.tied


def _compare(
    tile: _Tile, axis: int, side: _Side, bounds: tuple[NDArray[np.float32], NDArray[np.float32]]
) -> list[_Part]:
    """Count a tile's scores from the pairs' upper bounds on, and those between the bounds, for every slot.

    Axis 0: the queries are the rows. Axis 1: they are the columns.
    """
    start, parts = tile.corner[axis], []
    slots = [slot[start : start + tile.scores.shape[axis]] for slot in side.slots]
    slots = [pairs for pairs in slots if len(pairs)]
    if axis == 0 and len(slots) > 1:
        high = _high_scores(tile, slots, bounds[0])
        if high is not None:
            return [_count_high(tile, pairs, bounds, *high) for pairs in slots]
    height, width = tile.scores.shape
    for pairs in slots:
        counts = []
        for mask, bound in zip(tile.masks, bounds, strict=True):
            if axis == 0:
                np.greater_equal(tile.scores[: len(pairs)], bound[pairs, None], out=mask[: len(pairs), :width])
                counts.append(_true_in_rows(mask[: len(pairs)]))
            else:
                chosen = mask[:height, : len(pairs)]
                np.greater_equal(tile.scores[:, : len(pairs)], bound[pairs], out=chosen)
                counts.append(np.add.reduce(chosen.view(np.uint8), axis=0, dtype=np.uint8).astype(np.int64))
        close = counts[0] - counts[1]
        parts.append(_Part(pairs, counts[1], close, _locate(tile, axis, pairs, close)))
    return parts


def _high_scores(
    tile: _Tile, slots: list[Rows], lower: NDArray[np.float32]
) -> tuple[Rows, Rows, NDArray[np.float32]] | None:
    """Row, column and score of all that reach the lower bound of any pair of their row; None if they are not few.

    A model that is worth measuring puts few texts above the right ones: then one look at the tile serves all slots.
    """
    height, width = tile.scores.shape
    least = np.full(len(slots[0]), np.inf, np.float32)
    for pairs in slots:
        np.minimum(least[: len(pairs)], lower[pairs], out=least[: len(pairs)])
    mask = tile.masks[0][: len(least)]
    np.greater_equal(tile.scores[: len(least)], least[:, None], out=mask[:, :width])
    if int(_true_in_rows(mask).sum()) * _FEW > height * width:
        return None
    row, column = np.divmod(np.flatnonzero(mask), mask.shape[1])
    return row, column, tile.scores[row, column]


def _count_high(
    tile: _Tile,
    pairs: Rows,
    bounds: tuple[NDArray[np.float32], NDArray[np.float32]],
    row: Rows,
    column: Rows,
    scores: NDArray[np.float32],
) -> _Part:
    """What `_compare` says of one slot, from the scores that may count alone; they are sorted by row."""
    end = int(np.searchsorted(row, len(pairs)))
    row, column, scores = row[:end], column[:end], scores[:end]
    lower, upper = (bound[pairs][row] for bound in bounds)
    above, near = scores >= upper, np.flatnonzero((scores >= lower) & (scores < upper))
    where = (tile.corner[0] + row[near], tile.corner[1] + column[near], pairs[row[near]])
    return _Part(
        pairs, np.bincount(row[above], minlength=len(pairs)), np.bincount(row[near], minlength=len(pairs)), where
    )


def _true_in_rows(mask: NDArray[np.bool_]) -> Rows:
    """(n, 8 w) -> (n,). Eight bytes are added at a time, none of which runs over: there are at most 254 eights."""
    eights = np.add.reduce(mask.view(np.uint64), axis=1)
    counts: Rows = eights.view(np.uint8).reshape(-1, 8).sum(axis=1, dtype=np.int64)
    return counts


def _locate(tile: _Tile, axis: int, pairs: Rows, close: Rows) -> tuple[Rows, Rows, Rows]:
    """Where the masks differ: place of the image, place of the text, pair. Nothing where there are too many."""
    chosen = np.flatnonzero(close)
    if close.sum() > _UNSURE:
        chosen = chosen[:0]
    height, width = tile.scores.shape
    lower, upper = (mask[chosen, :width] if axis == 0 else mask[:height, chosen] for mask in tile.masks)
    row, column = np.nonzero(lower ^ upper)
    if axis == 0:
        row = chosen[row]
        return tile.corner[0] + row, tile.corner[1] + column, pairs[row]
    column = chosen[column]
    return tile.corner[0] + row, tile.corner[1] + column, pairs[column]


def _in_float64(tile: _Tile, sides: tuple[_Side, _Side]) -> Values:
    row, column = tile.corner
    height, width = tile.scores.shape
    images, texts = sides[0].vectors[row : row + height], sides[1].vectors[column : column + width]
    scores: Values = images.astype(np.float64) @ texts.astype(np.float64).T
    return scores
