"""Near-duplicates among vectors: equal hashes, close pairs, and groups of them. Vectors and hashes in, labels out.

Rows are counted by position. A *label* is the position of the row that a group is named after; a row alone is labelled
with its own position. What the rows are vectors of is not known here.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from indexes import runtime
from indexes.snapshot import Snapshot
from indexes.vectors import as_vectors

Block: TypeAlias = Callable[[int, int], NDArray[Any]]
"""(start, stop) -> the vectors of these positions, (stop - start, D), float16 or float32, of any length but zero."""

_READ = 16_384  # rows at a time: 32 MB in float32 at 512 dimensions
_EXACT = 20_000  # rows that are all compared with each other: 3 s on two cores at 512 dimensions
_CELL = 500  # rows in a cell, on average; see _cells for the cost
_PROBES = 6  # cells that each row is compared with
_SAMPLE = 50  # rows that k-means sees for each cell: FAISS warns below 39
_PRODUCTS = 1 << 24  # cosines held at a time: 64 MB
_LINKS = 1 << 25  # links kept in all, so that memory is bounded whatever the rows are …
_FEWEST, _MOST = 16, 256  # … and of one row: the nearest


@dataclass(frozen=True)
class Pairs:
    """Pairs of rows, each once, ``first < second``, in rising order.

    Attributes:
        first: (P,) int64 positions.
        second: (P,) int64 positions.
        scores: (P,) float32 cosines.

    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    scores: NDArray[np.float32]

    def take(self, which: NDArray[Any]) -> Pairs:
        """Some of the pairs, by a mask or by their numbers."""
        return Pairs(self.first[which], self.second[which], self.scores[which])


def stored_block(snapshot: Snapshot) -> Block:
    """The vectors of a store, by position, read from its segments when they are asked for."""

    def block(start: int, stop: int) -> NDArray[np.float16]:
        slots, parts, base = snapshot.live[start:stop], [np.empty((0, snapshot.manifest.model.dim), np.float16)], 0
        for segment in snapshot.segments:
            for i, (begin, end) in enumerate(pairwise(base + segment.group_starts)):
                inside = slots[np.searchsorted(slots, begin) : np.searchsorted(slots, end)]
                if len(inside):
                    parts.append(segment.halves(i)[inside - begin])
            base += segment.rows
        return np.concatenate(parts)

    return block


def equal_hashes(hashes: pa.ChunkedArray) -> NDArray[np.int64]:
    """Label (N,) rows by their hashes (N strings): the first of each that are equal. An empty hash equals none."""
    codes = pa.chunked_array(hashes).combine_chunks().dictionary_encode()
    labels = _first_of_equals(codes.indices.to_numpy())
    unknown = np.isin(codes.indices.to_numpy(), np.flatnonzero(codes.dictionary.to_numpy(zero_copy_only=False) == ""))
    labels[unknown] = np.flatnonzero(unknown)
    return labels


def _first_of_equals(keys: NDArray[Any]) -> NDArray[np.int64]:
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    labels: NDArray[np.int64] = first[which].astype(np.int64)
    return labels


# ---- pairs -----------------------------------------------------------------------------------------------------------


def near_pairs(
    block: Block,
    rows: NDArray[np.int64],
    threshold: float,
    *,
    exact: int = _EXACT,
    progress: Callable[[int, int], None] | None = None,
) -> Pairs:
    """Find the pairs of rows with a cosine of at least the threshold, out of core.

    Up to 20,000 distinct rows this is exact. Above, each row is compared with those in the cells of k-means that it is
    nearest to (as FAISS's IVF does: Jégou et al., PAMI 2011); ``benchmarks.duplicates`` measures what that misses. The
    vectors are copied to a temporary file in the precision they come in, and memory holds a block of them.

    Rows that are equal bit for bit are compared as one: each is paired with the first of them alone, with a cosine of
    1. Of a row with very many near ones only pairs with the nearest are kept (16 to 256, the more the fewer rows there
    are), unless the other one keeps it too. So neither memory nor the number of pairs is ever quadratic.

    Args:
        block: the vectors.
        rows: the positions that are to be compared, rising.
        threshold: a cosine, above 0.
        exact: up to how many distinct rows all are compared with each other.
        progress: called with (rows done, rows to do); a row that is compared with several cells counts several times.

    Raises:
        VectorError: a row is zero, NaN or infinite.
        OSError: there is no room for the temporary file.

    """
    if len(rows) < 2:
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    with tempfile.TemporaryFile() as file:
        copy, same = _copy(block, rows, file)
        distinct = np.flatnonzero(same == np.arange(len(rows)))
        twins = np.flatnonzero(same != np.arange(len(rows)))
        found = _Links(len(rows), twins, same[twins])
        cells = [(distinct, distinct)] if len(distinct) <= exact else list(_cells(copy, distinct))
        done, total = 0, sum(len(a) for a, _ in cells)
        for a, b in cells:
            for asked, pairs in _across(copy, a, b, threshold, found.most):
                found.add(*pairs)
                done += asked
                if progress:
                    progress(done, total)
    first, second, scores = found.result()
    return Pairs(rows[first], rows[second], scores)


def _copy(block: Block, rows: NDArray[np.int64], file: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The vectors of some rows in a temporary file, (n, D), mapped into memory; and for each the first equal one."""
    digests, copied, shape = [], 0, (0, 0)
    for start in range(int(rows[0]), int(rows[-1]) + 1, _READ):
        wanted = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + _READ)]
        if not len(wanted):
            continue
        part = np.ascontiguousarray(block(start, int(wanted[-1]) + 1)[wanted - start])
        digests += [hashlib.blake2b(row, digest_size=16).digest() for row in part]
        file.write(part)
        copied, shape = copied + len(part), (len(rows), part.shape[1])
    file.flush()
    copy = np.memmap(file, part.dtype, "r", shape=shape)
    return copy, _first_of_equals(np.frombuffer(b"".join(digests), "V16"))


def _cells(copy: NDArray[Any], rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Sets of rows (a, b), so that nearly every near pair is one of a row in an `a` with a row in the `b` beside it.

    Each row lies in the `b` of the cell whose centre it is nearest to, and in the `a` of its nearest few cells. For n
    rows in k cells of which p are looked into, finding the cells takes n·k products and comparing n·p·n/k, times about
    4 since cells are of unequal sizes: with k = n / 500 and p = 6 a
    million rows take 2·10^9 and 1.2·10^10, and all with all 10^12.
    """
    count = max(1, len(rows) // _CELL)
    sample = np.random.default_rng(0).choice(rows, min(len(rows), count * _SAMPLE), replace=False)
    faiss = runtime.faiss()
    kmeans = faiss.Kmeans(copy.shape[1], count, niter=8, spherical=True, seed=1)
    kmeans.train(as_vectors(copy[np.sort(sample)]))
    probes = min(_PROBES, count)
    nearest = np.concatenate(
        [
            kmeans.index.search(as_vectors(copy[rows[i : i + _READ]]), probes)[1].astype(np.int32)
            for i in range(0, len(rows), _READ)
        ]
    )
    askers, owners = _by_cell(nearest.ravel(), count), _by_cell(nearest[:, 0], count)
    for asking, owned in zip(askers, owners, strict=True):
        # Rows by the thousand that k-means cannot tell apart: cut, to bound memory.
        for part in np.array_split(owned, math.ceil(len(owned) / _EXACT)) if len(owned) else ():
            yield rows[asking // probes], rows[part]


def _by_cell(cells: NDArray[np.int32], count: int) -> list[NDArray[np.int64]]:
    """For each cell where it stands in a list of cells, rising."""
    order = np.argsort(cells, kind="stable")
    return np.split(order, np.searchsorted(cells[order], np.arange(1, count)))


def _across(
    copy: NDArray[Any], a: NDArray[np.int64], b: NDArray[np.int64], threshold: float, most: int
) -> Iterator[tuple[int, tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]]]:
    """Some rows of `a` at a time: how many, and their pairs with other rows in `b`; of each with its nearest only."""
    others = as_vectors(copy[b])
    step = min(_READ, max(1, _PRODUCTS // len(b)))
    for start in range(0, len(a), step):
        some = a[start : start + step]
        products = as_vectors(copy[some]) @ others.T
        at = np.minimum(np.searchsorted(b, some), len(b) - 1)
        itself = np.flatnonzero(b[at] == some)
        products[itself, at[itself]] = -1
        near = products >= threshold
        for i in np.flatnonzero(np.count_nonzero(near, axis=1) > most):
            near[i] = False
            near[i, np.argpartition(-products[i], most)[:most]] = True
        row, other = np.nonzero(near)
        yield len(some), (some[row], b[other], products[row, other])


class _Links:
    """Pairs as they are found, from both sides and in several cells; each is kept once."""

    def __init__(self, rows: int, twins: NDArray[np.int64], of: NDArray[np.int64]) -> None:
        self.rows = rows
        self.most = int(np.clip(_LINKS // rows, _FEWEST, _MOST))
        self.keys, self.scores = of * rows + twins, np.ones(len(twins), np.float32)
        self.waiting: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []

    def add(self, first: NDArray[np.int64], second: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
        keys = np.minimum(first, second) * self.rows + np.maximum(first, second)
        self.waiting.append((keys, scores))
        if sum(len(keys) for keys, _ in self.waiting) > max(1 << 20, len(self.keys) // 2):
            self._merge()

    def _merge(self) -> None:
        keys = np.concatenate([self.keys, *(keys for keys, _ in self.waiting)])
        scores = np.concatenate([self.scores, *(scores for _, scores in self.waiting)])
        self.waiting = []
        self.keys, which = np.unique(keys, return_index=True)
        self.scores = scores[which]

    def result(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        self._merge()
        return self.keys // self.rows, self.keys % self.rows, np.minimum(self.scores, 1)


# ---- groups ----------------------------------------------------------------------------------------------------------


def star_groups(labels: NDArray[np.int64], first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """Join groups into larger ones, along links between their rows; the new labels (N,).

    Where all that is linked were joined, a chain of small steps (A like B like C …) would end in one giant group of
    unlike things. So every group is a star: the one with the most links takes all that it is linked with, then the next
    of those that are left, and so on (Butina, J. Chem. Inf. Comput. Sci. 1999). Equal numbers: the smaller label first.
    Each group of before is joined as a whole, or not at all.

    Args:
        labels: (N,) the groups so far; `np.arange(N)` where each row stands alone.
        first: (P,) positions.
        second: (P,) positions that they are linked with.

    """
    a, b = np.minimum(labels[first], labels[second]), np.maximum(labels[first], labels[second])
    links = np.unique((a * len(labels) + b)[a < b])
    groups, ends = np.unique([links // len(labels), links % len(labels)], return_inverse=True)
    source, target = np.concatenate([ends.reshape(2, -1), ends.reshape(2, -1)[::-1]], axis=1)
    order = np.argsort(source, kind="stable")
    target, starts = target[order], np.searchsorted(source[order], np.arange(len(groups) + 1))
    centre = np.full(len(groups), -1)
    for i in np.argsort(-np.diff(starts), kind="stable"):
        if centre[i] < 0:
            linked = target[starts[i] : starts[i + 1]]
            centre[linked[centre[linked] < 0]] = i
            centre[i] = i
    joined: NDArray[np.int64] = labels.copy()
    inside = np.isin(labels, groups)
    joined[inside] = groups[centre[np.searchsorted(groups, labels[inside])]]
    return joined


def members(labels: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """The positions in each group of at least two, by rising label."""
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    for begin, end in pairwise([*starts, len(order)]):
        if end - begin > 1:
            yield order[begin:end]
