"""Hard negatives from the whole training set, and batches in which they meet.

A batch drawn at random from many pictures has few negatives that are hard to tell from a picture's own sentence. They
are found beforehand, by searching the training set with its own vectors, and pictures that are mistaken for each other
are put into one batch.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from indexes.vectors import Hits, VectorIndex, Vectors, as_vectors, check_width, cosines, exact_search, rounding_margin

Rows: TypeAlias = NDArray[np.int64]

_MORE = 16  # rows asked for beyond k at first: own and nearly own ones are dropped from them
_SCORES = 1 << 24  # cosines held at a time: 64 MB


@dataclass(frozen=True)
class _Groups:
    """Numbers by key: those of key i are ``values[first[i]:first[i + 1]]``."""

    first: Rows
    values: Rows

    @classmethod
    def by(cls, keys: Rows, values: Rows, count: int) -> _Groups:
        order = np.argsort(keys, kind="stable")
        return cls(np.searchsorted(keys[order], np.arange(count + 1)), values[order])

    def __getitem__(self, i: int) -> Rows:
        return self.values[self.first[i] : self.first[i + 1]]


@dataclass(frozen=True, eq=False)
class HardNegatives:
    """What the model finds most similar and should not, for N pictures and M texts; the hardest first.

    Attributes:
        texts: for each picture, rows of texts of other pictures and their cosines, (N, min(k, M)).
        images: for each text, rows of other pictures and their cosines, (M, min(k, N)).
        owner: (M,) the picture of each text.
        twins: (P, 2) pairs of different pictures (a, b), and (b, a) too, of which two texts say nearly the same:
            neither's texts are hard negatives of the other. There are none without a ceiling.
    """

    texts: Hits
    images: Hits
    owner: Rows
    twins: Rows

    @cached_property
    def links(self) -> tuple[Rows, Rows, NDArray[np.float32]]:
        """Pictures of which one is mistaken for the other, (L,) and (L,), each pair both ways, in order; by how much.

        The last (L,) is the highest cosine between a picture of the pair and a text of the other, as far as mined.
        """
        pictures, columns = np.nonzero(self.texts.rows >= 0)
        texts, others = np.nonzero(self.images.rows >= 0)
        one = np.concatenate([pictures, self.owner[texts]])
        other = np.concatenate([self.owner[self.texts.rows[pictures, columns]], self.images.rows[texts, others]])
        scores = np.concatenate([self.texts.scores[pictures, columns], self.images.scores[texts, others]])
        a, b, scores = np.concatenate([one, other]), np.concatenate([other, one]), np.tile(scores, 2)
        order = np.lexsort((-scores, b, a))
        a, b, scores = a[order], b[order], scores[order]
        new = np.ones(len(a), np.bool_)
        new[1:] = (a[1:] != a[:-1]) | (b[1:] != b[:-1])
        return a[new], b[new], scores[new]


def mine(
    images: ArrayLike,
    texts: ArrayLike,
    owner: ArrayLike,
    k: int,
    *,
    ceiling: float | None = None,
    factory: str | None = None,
) -> HardNegatives:
    """Find the k hardest negatives of every picture and of every text in a training set.

    Captions of different pictures may say the same ("a dog runs on grass"); then the model is not wrong. With a
    ceiling, a picture and a text are no negatives of each other if one of the picture's own texts is that similar to
    the text. (Finding those compares all texts with each other, with a ``factory`` too.)

    Args:
        images: (N, D), of any length but zero.
        texts: (M, D), likewise.
        owner: (M,) the row of the picture that each text belongs to. A picture that owns none is a negative of all.
        k: how many, at least 1; where fewer qualify, the rest is row -1 with score -1.
        ceiling: the cosine of two texts from which on they say the same; None: each is of its own picture alone.
        factory: a FAISS factory string for an index of a large set, see :class:`indexes.vectors.VectorIndex`; None
            compares every picture with every text.

    Raises:
        VectorError: vectors of different widths, or zero, NaN or infinite ones.
        ValueError: an owner that is no row of the pictures, or a k below 1.
    """
    pictures, sentences, owners = as_vectors(images), as_vectors(texts), np.asarray(owner, dtype=np.int64)
    check_width(sentences, pictures.shape[1])
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if owners.shape != (len(sentences),) or not ((owners >= 0) & (owners < len(pictures))).all():
        raise ValueError(f"owner must name one of {len(pictures)} pictures for each of {len(sentences)} texts")
    same = _same(sentences, owners, ceiling)
    texts_like = _Groups.by(owners[same[:, 0]], same[:, 1], len(pictures))
    pictures_like = _Groups.by(same[:, 0], owners[same[:, 1]], len(sentences))
    return HardNegatives(
        _nearest(sentences, pictures, k, factory, lambda i, r: (owners[r] != i) & ~np.isin(r, texts_like[i])),
        _nearest(pictures, sentences, k, factory, lambda i, r: (r != owners[i]) & ~np.isin(r, pictures_like[i])),
        owners,
        np.unique(owners[same], axis=0),
    )


def _same(texts: Vectors, owners: Rows, ceiling: float | None) -> Rows:
    """(S, 2) pairs of texts of different pictures that say the same, each pair both ways."""
    if ceiling is None or not len(texts):
        return np.empty((0, 2), np.int64)
    found = [np.empty((0, 2), np.int64)]
    margin = rounding_margin(texts.shape[1])
    batch = max(1, _SCORES // len(texts))
    for begin in range(0, len(texts), batch):
        near = texts[begin : begin + batch] @ texts.T >= ceiling - margin
        for i, row in enumerate(near, begin):
            others = np.flatnonzero(row & (owners != owners[i]))
            if len(others):
                others = others[cosines(texts[i], texts[others]) >= ceiling]
                found.append(np.stack([np.full_like(others, i), others], axis=1))
    return np.concatenate(found)


def _nearest(
    vectors: Vectors, queries: Vectors, k: int, factory: str | None, keep: Callable[[int, Rows], NDArray[np.bool_]]
) -> Hits:
    """The best k rows for each query among those that `keep(query, rows)`; asked for more of until there are enough."""
    search = partial(exact_search, vectors) if factory is None else VectorIndex.build(vectors, factory).search
    columns = min(k, len(vectors))
    hits = Hits(
        np.full((len(queries), columns), -1, dtype=np.int64), np.full((len(queries), columns), -1, dtype=np.float32)
    )
    asking, asked = np.arange(len(queries)), k + _MORE
    while columns and len(asking):
        found = search(queries[asking], asked)
        short = np.zeros(len(asking), np.bool_)
        for at, (query, rows, scores) in enumerate(zip(asking.tolist(), found.rows, found.scores, strict=True)):
            kept = np.flatnonzero(keep(query, rows) | (rows < 0))[:columns]  # -1: the index has no more to give
            hits.rows[query, : len(kept)] = rows[kept]
            hits.scores[query, : len(kept)] = scores[kept]
            short[at] = len(kept) < columns
        asking, asked = asking[short & (asked < len(vectors))], 4 * asked
    return hits


def hard_batches(
    negatives: HardNegatives,
    size: int,
    *,
    group: int | None = None,
    seed: int | Sequence[int] = 0,
) -> list[Rows]:
    """One epoch of batches in which pictures meet that the model mistakes for each other; every picture once.

    Groups are grown one by one: from a picture drawn at random, the free picture that is mistaken most for any member
    joins, until the group is full or nothing free is linked to it. Twins are kept out of each other's groups, or they
    would be the hardest negatives, and wrong ones. Batches are groups put together at random. (Grouping a whole epoch
    by what the model finds alike: Sachidananda et al. 2023, arXiv:2210.12874, by a bandwidth-minimising permutation;
    Yang et al. 2023, arXiv:2306.03355, by random walks. This is the greedy form of both.)

    Args:
        negatives: of N pictures, from :func:`mine`.
        size: pictures in a batch; the last to be filled is smaller where N is no multiple of it.
        group: pictures in a group; None: a whole batch. Smaller is easier, and 1 is batches drawn at random.
        seed: decides everything; another for each epoch, for example (seed, epoch).

    Returns:
        Picture rows of each batch, in random order.

    Raises:
        ValueError: a size below 1, or a group that is not from 1 to the size.
    """
    group = size if group is None else group
    if not 1 <= group <= size:
        raise ValueError(f"a group must have from 1 to {size} pictures, as many as a batch, not {group}")
    random = np.random.default_rng(seed)
    grower = _Grower(negatives)
    grown = [grower.grow(start, group) for start in random.permutation(len(grower.free)).tolist() if grower.free[start]]
    random.shuffle(grown)
    grown.sort(key=lambda members: len(members) < group)  # whole ones first, so that batches cut none of them in two
    order = np.array([picture for members in grown for picture in members], dtype=np.int64)
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    random.shuffle(batches)
    return batches


class _Grower:
    """Takes the pictures of an epoch group by group."""

    def __init__(self, negatives: HardNegatives) -> None:
        count = len(negatives.texts.rows)
        one, self.others, self.scores = negatives.links
        self.first = np.searchsorted(one, np.arange(count + 1))
        self.twins = _Groups.by(negatives.twins[:, 0], negatives.twins[:, 1], count)
        self.free = np.ones(count, np.bool_)

    def grow(self, start: int, size: int) -> list[int]:
        members: list[int] = []
        barred: set[int] = set()
        near = [(-np.inf, start)]
        while near and len(members) < size:
            _, picture = heapq.heappop(near)
            if not self.free[picture] or picture in barred:
                continue
            self.free[picture] = False
            members.append(picture)
            barred.update(self.twins[picture].tolist())
            links = slice(self.first[picture], self.first[picture + 1])
            for score, other in zip(self.scores[links].tolist(), self.others[links].tolist(), strict=True):
                if self.free[other]:
                    heapq.heappush(near, (-score, other))
        return members
