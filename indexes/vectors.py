"""Vectors in, ranked rows out: exact search, and every kind of FAISS index behind one class.

A score is the cosine of two unit rows: their dot product summed in float64 and rounded to float32, so it does not
depend on the batch, the number of threads or the kernel. Rows are ranked by falling score, equal scores by rising row.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from indexes import runtime
from indexes.errors import StoreCorrupt, VectorError
from indexes.manifest import replacing, sha256_of

Vectors: TypeAlias = NDArray[np.float32]
"""(N, D) float32, C-contiguous, unit rows."""

_CHUNK = 4096  # rows that are widened to float64 at a time: 16 MB at 512 dimensions
_UNIT = 2e-7  # rows of length 1 to within float32's rounding stay as they are, bit for bit
_SCORES = 1 << 24  # scores that a batch of queries may hold at a time: 64 MB
_MORE = 16  # rows asked for beyond k, so that a tie at rank k is usually whole at the first try
_NAMED = 3  # bad rows that a message names
_POINTS, _FEWEST = 64, 39  # training rows for each centroid: enough, and what FAISS wants at least
_TRAINING = 16_384  # rows that kinds without centroids are trained on: quantisers' ranges, rotations
_AXES = 16_384  # of them, those that principal axes are found from
_MAPPED = 256 << 20  # bytes of a FAISS file from which on it is mapped instead of read
_FAISS_PLACE = re.compile(r"^Error in .*? at \S+:\d+: ")
_FACTORY = b"\ndiptych factory "  # FAISS files do not say which factory string made them; readers ignore what follows


@dataclass(frozen=True)
class Hits:
    """The answer to Q queries, best first.

    There are min(k, N) columns for an index of N rows: every row at most, and no padding for a k that is too large.
    Where fewer rows than that qualify, the rest is row -1 with score -1.

    Attributes:
        rows: (Q, min(k, N)) int64, -1 = none.
        scores: (Q, min(k, N)) float32, cosines, falling.

    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]


def as_vectors(array: ArrayLike, names: Sequence[str] | None = None) -> Vectors:
    """Rows scaled to length 1 (float32 to within 1e-6), as a new C-contiguous array.

    Args:
        array: (N, D) numbers.
        names: what to call each row in an error; without them, rows are called by their numbers.

    Raises:
        VectorError: not two-dimensional, or rows that are zero, NaN or infinite (in float32); it names the first ones.

    """
    with np.errstate(over="ignore"):  # too large for float32: infinite, and refused below
        given = np.asarray(array, dtype=np.float32)
    if given.ndim != 2:
        raise VectorError(f"vectors must be a table of rows and columns, not an array of shape {given.shape}")
    unit = np.empty(given.shape, dtype=np.float32)
    lengths = np.empty(len(given))
    for i in range(0, len(given), _CHUNK):  # float64: the squares of very large or small numbers leave float32's range
        wide = given[i : i + _CHUNK].astype(np.float64)
        norms = np.sqrt(np.einsum("nd,nd->n", wide, wide))
        norms[np.abs(norms - 1) < _UNIT] = 1
        lengths[i : i + _CHUNK] = norms
        with np.errstate(divide="ignore", invalid="ignore"):
            unit[i : i + _CHUNK] = wide / norms[:, None]
    if len(lengths) and not (lengths.min() > 0 and lengths.max() < np.inf):  # NaN is neither
        bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
        shown = ", ".join(names[i] if names is not None else f"row {i}" for i in bad[:_NAMED])
        more = ", …" if bad.size > _NAMED else ""
        raise VectorError(f"{bad.size} of {len(given)} vectors are zero, NaN or infinite: {shown}{more}")
    return unit


def cosines(query: NDArray[np.float32], vectors: Vectors) -> NDArray[np.float32]:
    """Score one query (D,) against unit rows (N, D) -> (N,); equal rows get equal scores, bit for bit."""
    out = np.empty(len(vectors), dtype=np.float32)
    for i in range(0, len(vectors), _CHUNK):
        out[i : i + _CHUNK] = (vectors[i : i + _CHUNK].astype(np.float64) * query).sum(axis=1)
    return np.clip(out, -1, 1, out=out)


def rounding_margin(dim: int) -> float:
    """By how much two float32 dot products of unit rows can be off together: the bound 2·D·2^-24 of any summation."""
    return 2 * dim * 2.0**-24


def near_best(products: NDArray[np.float32], k: int, dim: int) -> NDArray[np.int64]:
    """Which of some float32 dot products of unit rows of width `dim` may be among the k largest, but for rounding."""
    if k >= len(products):
        return np.arange(len(products))
    kth = np.partition(products, len(products) - k)[len(products) - k]
    return np.flatnonzero(products >= kth - rounding_margin(dim))


def rescored(
    query: NDArray[np.float32], rows: NDArray[np.int64], vectors: Vectors, k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Score candidates anew with their vectors (n, D): those rows that may be among the best k, and their cosines."""
    best = near_best(vectors @ query, k, vectors.shape[1])
    return rows[best], cosines(query, vectors[best])


def ranked(
    queries: Sized, columns: int, candidates: Callable[[int], tuple[NDArray[np.int64], NDArray[np.float32]]]
) -> Hits:
    """Hits with a number of columns, from `candidates(i)`: the rows and scores that may be in the answer to query i."""
    hits = Hits(
        np.full((len(queries), columns), -1, dtype=np.int64), np.full((len(queries), columns), -1, dtype=np.float32)
    )
    for i in range(len(queries)):
        rows, scores = candidates(i)
        best = np.lexsort((rows, -scores))[:columns]
        hits.rows[i, : len(best)] = rows[best]
        hits.scores[i, : len(best)] = scores[best]
    return hits


def exact_search(vectors: Vectors, queries: Vectors, k: int, allowed: NDArray[np.bool_] | None = None) -> Hits:
    """Find the k rows of highest cosine for each query, compared with every row (or every allowed one).

    One matrix product finds what may be among the best, to within rounding; those few are then scored and ranked by
    value. On 100,000 × 512 this takes 25 ms for one query, half of what FAISS's flat index takes.

    Args:
        vectors: (N, D) unit rows.
        queries: (Q, D) unit rows.
        k: how many rows to return, at least 1.
        allowed: (N,) which rows may be returned; None is all of them.

    """
    check_search(k, allowed, len(vectors))
    some = None if allowed is None else np.flatnonzero(allowed)
    pool = vectors if some is None else vectors[some]
    wanted = min(k, len(pool))
    batch = max(1, _SCORES // max(1, len(pool)))
    products = np.empty((0, 0), dtype=np.float32)

    def candidates(i: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        nonlocal products
        if i % batch == 0:
            products = queries[i : i + batch] @ pool.T
        near = near_best(products[i % batch], wanted, pool.shape[1])
        return near if some is None else some[near], cosines(queries[i], pool[near])

    if not wanted:
        return ranked(queries, min(k, len(vectors)), lambda _: (np.empty(0, np.int64), np.empty(0, np.float32)))
    return ranked(queries, min(k, len(vectors)), candidates)


class VectorIndex:
    """An index of unit vectors, of any kind that FAISS can name.

    "Flat" is exact. Scores are computed from the rows as the index can decode them; quantised rows are not quite the
    rows given, so their scores are cosines only to the precision of the quantiser. The store, which keeps the vectors,
    takes `candidates` and scores them anew.
    """

    def __init__(self, index: Any, factory: str) -> None:
        self._index = index
        self.factory = factory

    @classmethod
    def build(cls, vectors: Vectors, factory: str = "Flat") -> VectorIndex:
        """Train (where the kind needs it) and fill an index.

        Args:
            vectors: (N, D) unit rows; none at all is fine.
            factory: a FAISS factory string: Flat, SQfp16, HNSW32, "IVF64,Flat", …

        Raises:
            VectorError: FAISS does not know the factory string, or needs more rows to train it.

        """
        return cls.fill(factory, vectors.shape[1], len(vectors), lambda wanted: vectors[:wanted], [vectors])

    @classmethod
    def fill(
        cls, factory: str, dim: int, rows: int, sample: Callable[[int], Vectors], blocks: Iterable[Vectors]
    ) -> VectorIndex:
        """Train an index on some rows and fill it a block at a time, for vectors that memory does not hold at once.

        Args:
            factory: a FAISS factory string.
            dim: the width D.
            rows: how many there are, N.
            sample: given how many rows are wanted for training, at most so many of them, (n, D).
            blocks: all rows, in order.

        Raises:
            VectorError: FAISS does not know the factory string, or needs more rows to train it.

        """
        with _building(factory, rows):
            index, points = _untrained(factory, dim, rows)
            if rows:
                if not index.is_trained:
                    training = sample(min(rows, max(points, _TRAINING)))
                    _train_axes(index, training)
                    index.train(training)
                for block in blocks:
                    index.add(block)
        return cls(index, factory)

    @classmethod
    def check(cls, factory: str, dim: int, rows: int) -> None:
        """Refuse what `fill` would refuse, before there are any vectors. Raises VectorError."""
        with _building(factory, rows):
            _untrained(factory, dim, rows)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        """The width D of its vectors."""
        return int(self._index.d)

    @property
    def size(self) -> int:
        """How many bytes `save` would write."""
        faiss, parts = runtime.faiss(), [len(_FACTORY), len(self.factory.encode())]
        faiss.write_index(self._index, faiss.PyCallbackIOWriter(lambda part: parts.append(len(part))))
        return sum(parts)

    def efforts(self, share: float = 1.0) -> tuple[int, ...]:
        """Values worth trying of what trades time for recall: nprobe or efSearch; none where there is neither.

        Args:
            share: of the inverted lists, how many may be visited.

        """
        inverted = runtime.faiss().try_extract_index_ivf(self._index)
        if inverted:
            most = max(1, int(share * inverted.nlist))
            steps = {round(2 ** (i / 2)) for i in range(2, 26)}
            return (*sorted(step for step in steps if step < most), most)
        return (32, 64, 128, 256, 512) if self._graph else ()

    @property
    def _graph(self) -> Any:
        """The HNSW graph, if the index is one."""
        index = runtime.faiss().downcast_index(self._index)
        return getattr(index, "hnsw", None)

    def set_effort(self, value: int) -> None:
        """Set nprobe or efSearch."""
        if self._graph is not None:
            self._graph.efSearch = value
        else:
            runtime.faiss().extract_index_ivf(self._index).nprobe = value

    def search(self, queries: Vectors, k: int, allowed: NDArray[np.bool_] | None = None) -> Hits:
        """Find the k rows of highest score for each query.

        Args:
            queries: (Q, D) unit rows.
            k: how many rows to return, at least 1.
            allowed: (N,) which rows may be returned, applied inside the search; None is all of them.

        Raises:
            VectorError: the queries have another width.

        """
        columns = min(k, len(self))
        found = self.candidates(queries, k, columns, allowed)

        def scored(i: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
            rows, products = found[i]
            return rows, self._scores(queries[i], rows, products)

        return ranked(queries, columns, scored)

    def candidates(
        self, queries: Vectors, k: int, fetch: int, allowed: NDArray[np.bool_] | None = None
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Find, for each query, rows among which the best k may be: the `fetch` best by the index's own products.

        There are more of them where a tie at rank k would be cut, and fewer where an approximate kind finds no more.

        Args:
            queries: (Q, D) unit rows.
            k: how many of them are wanted in the end, at least 1.
            fetch: how many rows to look for, at least k.
            allowed: (N,) which rows may be found; None is all of them.

        Returns:
            (rows int64, products float32) of each query, best product first.

        Raises:
            VectorError: the queries have another width.

        """
        check_search(k, allowed, len(self))
        check_width(queries, self.dim)
        columns = min(k, len(self))
        if not columns or not len(queries):
            return [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(queries)
        margin = rounding_margin(self.dim)
        fetch = min(max(fetch, columns + _MORE), len(self))
        products, rows = self._nearest(queries, fetch, allowed)
        out = []
        for i in range(len(queries)):
            found, scores, asked = rows[i], products[i], fetch
            # Equal vectors may be cut at rank k; which of them FAISS keeps is chance, so ask on until the tie is whole.
            while asked < len(self) and found[-1] >= 0 and scores[-1] >= scores[columns - 1] - margin:
                asked = min(4 * asked, len(self))
                (scores,), (found,) = self._nearest(queries[i : i + 1], asked, allowed)
            real = found >= 0
            out.append((found, scores) if real.all() else (found[real], scores[real]))
        return out

    def save(self, path: Path) -> None:
        """Replace a file, which any FAISS reads too, in one step. Raises OSError."""
        faiss = runtime.faiss()
        with replacing(path) as file:  # not FAISS's own open: it takes no names that are not UTF-8
            faiss.write_index(self._index, faiss.PyCallbackIOWriter(file.write))
            file.write(_FACTORY + self.factory.encode())

    @classmethod
    def load(cls, path: Path, sha256: str | None = None) -> VectorIndex:
        """Read what `save` wrote.

        Args:
            path: the file. One of more than 256 MB is mapped, where its name is UTF-8, and read as it is searched.
            sha256: its checksum, for a file that is read whole: FAISS believes what it reads, and may crash on it.

        Raises:
            StoreCorrupt: the file is damaged, or was not written by `save`.
            OSError: it cannot be opened.

        """
        faiss = runtime.faiss()
        with path.open("rb") as file:
            size = path.stat().st_size
            file.seek(max(0, size - 1024))
            _, mark, factory = file.read().rpartition(_FACTORY)
            try:
                if not mark:
                    raise RuntimeError("it is incomplete")
                # FAISS's own open takes no names that are not UTF-8, on Windows none that are not ASCII.
                named = str(path).isascii() if os.name == "nt" else str(path).isprintable()
                if size > _MAPPED and named:
                    return cls(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC), factory.decode())
                if sha256 is not None and sha256_of(path) != sha256:
                    raise RuntimeError("its content is not what was written")
                file.seek(0)
                content = str(path) if named else faiss.PyCallbackIOReader(file.read)
                return cls(faiss.read_index(content), factory.decode())
            except (RuntimeError, ValueError) as error:
                raise StoreCorrupt(
                    f"{path} is no readable index of vectors ({_reason(error)}): delete it, it can be built again"
                ) from error

    def _nearest(
        self, queries: Vectors, fetch: int, allowed: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """FAISS's own answer: products and rows, (Q, fetch), padded with row -1."""
        faiss = runtime.faiss()
        if allowed is None:
            return self._index.search(queries, fetch)  # type: ignore[no-any-return]
        bits = np.packbits(allowed, bitorder="little")
        selector = faiss.IDSelectorBitmap(len(bits), faiss.swig_ptr(bits))
        share = max(float(allowed.mean()), 1 / len(allowed))
        inverted = faiss.try_extract_index_ivf(self._index)
        # As many rows that qualify are looked at as without a filter.
        if inverted:
            nprobe = min(inverted.nlist, math.ceil(inverted.nprobe / share))
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=nprobe)
        elif self._graph is not None:
            ef = min(len(self), math.ceil(max(self._graph.efSearch, fetch) / share))
            parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=ef)
        else:
            parameters = faiss.SearchParameters(sel=selector)
        try:
            return self._index.search(queries, fetch, params=parameters)  # type: ignore[no-any-return]
        except RuntimeError:  # fast-scan and refined kinds take no filter: look for more, then drop
            enough = min(fetch, int(np.count_nonzero(allowed)))
            asked = min(len(self), math.ceil(1.2 * fetch / share))
            while True:
                scores, rows = self._index.search(queries, asked)
                left = (rows >= 0) & allowed[rows]
                if asked == len(self) or (left.sum(axis=1) >= enough).all():
                    break
                asked = min(len(self), 4 * asked)
            rows = np.where(left, rows, -1)
            order = np.argsort(~left, axis=1, kind="stable")[:, :fetch]
            return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)

    def _scores(
        self, query: NDArray[np.float32], rows: NDArray[np.int64], products: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Score decoded rows; for kinds that cannot decode (inverted lists), take FAISS's products."""
        try:
            return cosines(query, self._index.reconstruct_batch(rows))
        except RuntimeError:
            return np.clip(products, -1, 1)


@contextlib.contextmanager
def _building(factory: str, rows: int) -> Iterator[None]:
    """Turn what FAISS says of a kind that it cannot build into VectorError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise VectorError(
            f"FAISS cannot build an index of kind {factory!r} on {rows:,} vectors: {_reason(error)}"
        ) from error


def _train_axes(index: Any, sample: Vectors) -> None:
    """Train principal axes about zero, and not about the mean as FAISS does.

    Of vectors with their mean taken off, products are no longer those of the vectors: each row's product with the mean
    is missing. A sample beside its negative has no mean.
    """
    faiss = runtime.faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        step = faiss.downcast_VectorTransform(index.chain.at(0))
        if isinstance(step, faiss.PCAMatrix):
            some = sample[:: max(1, len(sample) // _AXES)]
            step.train(np.concatenate([some, -some]))


def _untrained(factory: str, dim: int, rows: int) -> tuple[Any, int]:
    """FAISS's index of a kind, and how many rows to train it on (0: none). RuntimeError if there are too few."""
    faiss = runtime.faiss()
    index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    points = 0 if index.is_trained else _training_points(index)
    if 0 < rows < points // _POINTS * _FEWEST:
        raise RuntimeError(f"Error: it needs at least {points // _POINTS * _FEWEST:,} to be trained")
    return index, points


def _training_points(index: Any) -> int:
    """How many rows an index is trained on; FAISS's remarks that they are few are switched off, for the caller's own.

    Kinds with k-means inside (inverted lists, product quantisers) want 39 rows for each centroid, and are hardly better
    for more than 64.
    """
    faiss = runtime.faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        return _training_points(index.base_index)
    if isinstance(index, faiss.IndexPreTransform):
        steps = [faiss.downcast_VectorTransform(index.chain.at(i)) for i in range(index.chain.size())]
        rotated = any(isinstance(step, faiss.OPQMatrix) for step in steps)  # by a product quantiser of 8 bits
        return max(_training_points(index.index), _POINTS * 256 * rotated)
    centroids = 0
    if isinstance(index, faiss.IndexIVF):
        index.cp.min_points_per_centroid, centroids = 1, index.nlist
    quantizer = getattr(index, "pq", None)
    if quantizer is not None:
        quantizer.cp.min_points_per_centroid, centroids = 1, max(centroids, quantizer.ksub)
    return _POINTS * centroids


def check_width(vectors: NDArray[Any], dim: int) -> None:
    """Refuse vectors that are not (N, dim)."""
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise VectorError(f"vectors of shape {vectors.shape} cannot be compared with vectors of width {dim}")


def check_search(k: int, allowed: NDArray[np.bool_] | None, rows: int) -> None:
    """Refuse a k below 1 and a mask that does not fit the number of rows: both are mistakes of a program."""
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if allowed is not None and (allowed.shape != (rows,) or allowed.dtype != np.bool_):
        raise ValueError(f"allowed must be {rows} booleans, not {allowed.dtype} of shape {allowed.shape}")


def _reason(error: Exception) -> str:
    """Strip the C++ signature from what FAISS says, and put it on one line."""
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    said = _FAISS_PLACE.sub("", " ".join(str(error).split()))
    return said.rpartition("Error: ")[2][:200]
