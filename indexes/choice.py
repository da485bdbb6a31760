"""The FAISS index of a store: chosen by its size, tuned on queries until it finds what exact search finds.

Which kinds are tried, and in which order, comes from measurements on CLIP-like vectors of 512 dimensions
(benchmarks/indexes.py). Half of the principal axes hold 97 % of their variance; four bits for every two numbers along
those, scanned by fast-scan kernels (Andre et al. 2017, https://arxiv.org/abs/1704.07355), need a sixteenth of a
float16's bytes, and the candidates found are scored anew with the stored vectors. RaBitQ (Gao & Long 2024,
https://arxiv.org/abs/2405.12497) needs no such axes, for four times the time. Inverted lists in front of either are
faster still, from a few hundred thousand rows on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from indexes.errors import VectorError
from indexes.manifest import Measured, Wanted
from indexes.vectors import Hits, VectorIndex, Vectors, cosines

EXACT = "exact"  # no FAISS file at all
IMAGE, STORED = "image", "stored"  # kinds of queries: stored vectors, of pictures alone or of what there is
K = 10  # the recall that is measured is that of the ten nearest rows
_EXACT_ROWS = 20_000  # up to here exact search takes a few milliseconds
_LISTS_ROWS = 300_000  # from here on inverted lists pay for their k-means …
_LISTS_SHARE = 0.25  # … as long as no more of them are visited than this
_REFINE = (1, 2, 3, 5, 10, 20, 40)  # candidates for each row wanted
PROBES = 300  # stored rows that are searched with, beside the caller's queries
_CERTAIN = 1.64  # standard errors: the recall is at least the one asked for with 95 % certainty, not just on average
_TIMED = 100  # queries


def kinds(rows: int, dim: int, wanted: Wanted) -> list[str]:
    """FAISS factory strings to try in turn, the fastest first; none where exact search is as good.

    Args:
        rows: how many there are.
        dim: their width D.
        wanted: only its ``memory`` counts here.

    """
    if rows <= _EXACT_ROWS:
        return []
    lists = 2 ** round(np.log2(4 * np.sqrt(rows)))
    codes: list[tuple[str, str, float]] = [("", "RaBitQfs", dim / 8 + 8)]  # axes, code, bytes of a row
    if dim % 8 == 0:
        codes.insert(0, (f"PCAR{dim // 2},", f"PQ{dim // 4}x4fs", dim / 8))
    found: list[tuple[str, float]] = []
    for axes, code, size in codes:
        if rows >= _LISTS_ROWS:
            found.append((f"{axes}IVF{lists},{code}", size + 16 + 4 * dim * lists / rows))
        found.append((axes + code, size))
    found.append(("SQfp16", 2 * dim))  # slow, but it misses nothing: for vectors that no short code tells apart
    if min(size for _, size in found) * rows > wanted.memory:  # coarser codes take even less, and find less
        found = [(f"PCAR{dim // 2},PQ{dim // n}x4fs", dim / n / 2) for n in (8, 16) if dim % (2 * n) == 0]
    return [kind for kind, size in found if size * rows <= wanted.memory]


@dataclass(frozen=True)
class Tuned:
    """An index, how it is to be searched, and what it does then. ``enough``: it finds what was asked for."""

    index: VectorIndex
    refine: int
    effort: int
    recall: dict[str, float]
    enough: bool


def tune(
    index: VectorIndex,
    probes: Mapping[str, Vectors],
    truth: Mapping[str, Hits],
    take: Callable[[NDArray[np.int64]], Vectors],
    recall: float,
    forced: bool,
) -> Tuned:
    """Find the least effort and the fewest candidates at which every kind of query finds what is asked for.

    Args:
        index: filled.
        probes: queries by their kind, each (Q, D) unit rows.
        truth: what exact search finds for them, `K` rows each.
        take: the stored vectors of some of the index's rows.
        recall: the share of the truth that is to be found.
        forced: whether this very kind was asked for. Else no more than a quarter of its inverted lists are visited:
            from there on a kind without lists is as fast.

    Returns:
        The first setting that finds it with 95 % certainty; else the one that finds most.

    """
    best: Tuned | None = None
    for effort in index.efforts(1.0 if forced else _LISTS_SHARE) or (0,):
        if effort:
            index.set_effort(effort)
        # Searched anew for each: a graph's first rows depend on how many are asked for. The most of them first, since
        # where they are not enough, fewer are not.
        for refine in (_REFINE[-1], *_REFINE[:-1]):
            found = {name: _found(index, queries, truth[name], take, refine) for name, queries in probes.items()}
            shares = {name: float(rows.mean()) for name, rows in found.items()}
            enough = all(_surely(rows) >= recall for rows in found.values())
            if best is None or enough or min(shares.values()) > min(best.recall.values()):
                best = Tuned(index, refine, effort, shares, enough)
            if enough != (refine == _REFINE[-1]):
                break
        if best and best.enough:
            return best
    assert best is not None
    if best.effort:
        index.set_effort(best.effort)
    return best


def first_enough(kinds: Sequence[str], tuned: Callable[[str], Tuned], forced: bool) -> Tuned | None:
    """Try kinds in turn: the first index that finds enough, else the one that finds most.

    Args:
        kinds: FAISS factory strings.
        tuned: builds an index of a kind, and tunes it.
        forced: whether a kind that FAISS cannot build is an error, and not passed over.

    Returns:
        None where none of them can be built.

    Raises:
        VectorError: what is forced cannot be built.

    """
    best: Tuned | None = None
    for kind in kinds:
        try:
            found = tuned(kind)
        except VectorError:
            if forced:
                raise
            continue  # an older FAISS that does not know it
        if best is None or found.enough or min(found.recall.values()) > min(best.recall.values()):
            best = found
        if found.enough:
            break
    return best


def measured(tuned: Tuned, search: Callable[[Vectors], object], queries: Mapping[str, Vectors], size: int) -> Measured:
    """Time single queries of all kinds in turn; ``search`` answers one (1, D)."""
    times = [took for rows in queries.values() for took in milliseconds(search, rows)]
    counts = {name: len(rows) for name, rows in queries.items()}
    p50, p99 = np.percentile(times, [50, 99])
    return Measured(tuned.recall, counts, round(float(p50), 3), round(float(p99), 3), size)


def milliseconds(search: Callable[[Vectors], object], queries: Vectors) -> list[float]:
    """How long the first hundred queries take, each alone; ``search`` answers one (1, D)."""
    times = []
    for query in queries[:_TIMED]:
        began = time.perf_counter()
        search(query[None])
        times.append(1000 * (time.perf_counter() - began))
    return times


def evenly(rows: int, count: int) -> NDArray[np.int64]:
    """At most so many of the row numbers, evenly drawn, always the same."""
    return np.linspace(0, rows - 1, min(count, rows)).astype(np.int64)


def _found(
    index: VectorIndex, queries: Vectors, truth: Hits, take: Callable[[NDArray[np.int64]], Vectors], refine: int
) -> NDArray[np.float64]:
    """(Q,) shares of the truth among the candidates; an equal score is as good as the same row."""
    out = np.empty(len(queries))
    for i, (rows, _) in enumerate(index.candidates(queries, K, refine * K)):
        real = truth.scores[i][truth.rows[i] >= 0]
        good = int(np.count_nonzero(cosines(queries[i], take(rows)) >= real[-1]))
        out[i] = min(len(real), good) / len(real)
    return out


def _surely(shares: NDArray[np.float64]) -> float:
    """The lower end of the mean's one-sided 95 % interval."""
    spread = float(shares.std(ddof=1)) if len(shares) > 1 else 0.0
    return float(shares.mean() - _CERTAIN * spread / np.sqrt(len(shares)))
