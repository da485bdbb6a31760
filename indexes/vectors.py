"""Vectors in, ranked rows out: exact search, and every kind of FAISS index behind one class.

A score is the cosine of two unit rows: their dot product summed in float64 and rounded to float32, so it does not
depend on the batch, the number of threads or the kernel. Rows are ranked by falling score, equal scores by rising row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from indexes import runtime
from indexes.errors import StoreCorrupt, VectorError
from indexes.manifest import replacing

Vectors: TypeAlias = NDArray[np.float32]
"""(N, D) float32, C-contiguous, unit rows."""

_CHUNK = 4096  # rows that are widened to float64 at a time: 16 MB at 512 dimensions
_UNIT = 2e-7  # rows of length 1 to within float32's rounding stay as they are, bit for bit
_SCORES = 1 << 24  # scores that a batch of queries may hold at a time: 64 MB
_MORE = 16  # rows asked for beyond k, so that a tie at rank k is usually whole at the first try
_NAMED = 3  # bad rows that a message names
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
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if bad.size:
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


def ranked(
    queries: Vectors, columns: int, candidates: Callable[[int], tuple[NDArray[np.int64], NDArray[np.float32]]]
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
    margin = rounding_margin(vectors.shape[1])
    batch = max(1, _SCORES // max(1, len(pool)))
    products = np.empty((0, 0), dtype=np.float32)

    def candidates(i: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        nonlocal products
        if i % batch == 0:
            products = queries[i : i + batch] @ pool.T
        row = products[i % batch]
        near = np.arange(len(pool))
        if wanted < len(pool):
            kth = np.partition(row, len(pool) - wanted)[len(pool) - wanted]
            near = np.flatnonzero(row >= kth - margin)
        return near if some is None else some[near], cosines(queries[i], pool[near])

    if not wanted:
        return ranked(queries, min(k, len(vectors)), lambda _: (np.empty(0, np.int64), np.empty(0, np.float32)))
    return ranked(queries, min(k, len(vectors)), candidates)


class VectorIndex:
    """An index of unit vectors, of any kind that FAISS can name.

    "Flat" is exact. Scores are computed from the rows as the index can decode them; quantised rows are not quite the
    rows given, so their scores are cosines only to the precision of the quantiser. The store, which keeps the vectors,
    scores them anew.
    """

    def __init__(self, index: Any, factory: str) -> None:
        self._index = index
        self.factory = factory

    @classmethod
    def build(cls, vectors: Vectors, factory: str = "Flat") -> VectorIndex:
        """Train (where the kind needs it) and fill an index.

        Args:
            vectors: (N, D) unit rows; none at all is fine.
            factory: a FAISS factory string: Flat, SQfp16, HNSW32, "IVF1024,Flat", …

        Raises:
            VectorError: FAISS does not know the factory string, or needs more rows to train it.

        """
        faiss = runtime.faiss()
        try:
            index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
            if len(vectors):
                index.train(vectors)
                index.add(vectors)
        except RuntimeError as error:
            raise VectorError(
                f"FAISS cannot build an index of kind {factory!r} on {len(vectors)} vectors: {_reason(error)}"
            ) from error
        return cls(index, factory)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        """The width D of its vectors."""
        return int(self._index.d)

    def search(self, queries: Vectors, k: int, allowed: NDArray[np.bool_] | None = None) -> Hits:
        """Find the k rows of highest score for each query.

        Args:
            queries: (Q, D) unit rows.
            k: how many rows to return, at least 1.
            allowed: (N,) which rows may be returned, applied inside the search; None is all of them.

        Raises:
            VectorError: the queries have another width.

        """
        check_search(k, allowed, len(self))
        check_width(queries, self.dim)
        columns = min(k, len(self))
        if not columns or not len(queries):
            return ranked(queries, columns, lambda _: (np.empty(0, np.int64), np.empty(0, np.float32)))
        margin = rounding_margin(self.dim)
        fetch = min(columns + _MORE, len(self))
        scores, rows = self._nearest(queries, fetch, allowed)

        def candidates(i: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
            found, products, asked = rows[i], scores[i], fetch
            # Equal vectors may be cut at rank k; which of them FAISS keeps is chance, so ask on until the tie is whole.
            while asked < len(self) and found[-1] >= 0 and products[-1] >= products[columns - 1] - margin:
                asked = min(4 * asked, len(self))
                (products,), (found,) = self._nearest(queries[i : i + 1], asked, allowed)
            real = found >= 0
            return found[real], self._scores(queries[i], found[real], products[real])

        return ranked(queries, columns, candidates)

    def save(self, path: Path) -> None:
        """Replace a file, which any FAISS reads too, in one step. Raises OSError."""
        faiss = runtime.faiss()
        with replacing(path) as file:  # not FAISS's own open: it takes no names that are not UTF-8
            faiss.write_index(self._index, faiss.PyCallbackIOWriter(file.write))
            file.write(_FACTORY + self.factory.encode())

    @classmethod
    def load(cls, path: Path) -> VectorIndex:
        """Read what `save` wrote.

        Raises:
            StoreCorrupt: the file is damaged, or was not written by `save`.
            OSError: it cannot be opened.

        """
        faiss = runtime.faiss()
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 1024))
            _, mark, factory = file.read().rpartition(_FACTORY)
            file.seek(0)
            try:
                if not mark:
                    raise RuntimeError("it is incomplete")
                return cls(faiss.read_index(faiss.PyCallbackIOReader(file.read)), factory.decode())
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
        try:
            # The IVF class of parameters serves all kinds that take plain ones; nprobe must be carried over.
            inverted = faiss.try_extract_index_ivf(self._index)
            nprobe = inverted.nprobe if inverted else 1
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=nprobe)
            return self._index.search(queries, fetch, params=parameters)  # type: ignore[no-any-return]
        except RuntimeError:  # product quantisers and refined kinds: rank all their rows, then drop
            scores, rows = self._index.search(queries, len(self))
            rows = np.where(allowed[rows], rows, -1)
            order = np.argsort(rows < 0, axis=1, kind="stable")[:, :fetch]
            return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)

    def _scores(
        self, query: NDArray[np.float32], rows: NDArray[np.int64], products: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Score decoded rows; for kinds that cannot decode (inverted lists), take FAISS's products."""
        try:
            return cosines(query, self._index.reconstruct_batch(rows))
        except RuntimeError:
            return np.clip(products, -1, 1)


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
    return " ".join(str(error).rpartition("Error: ")[2].split())[:200]
