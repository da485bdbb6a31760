"""What retrieval loses and gains through a FAISS index, tuned as a store tunes it, against exact search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexes import choice
from indexes.choice import EXACT, IMAGE, STORED, Tuned
from indexes.manifest import Wanted
from indexes.vectors import Hits, VectorIndex, Vectors, exact_search, ranked, rescored
from retrieval.metrics import KS, means_at_k
from retrieval.ranks import Ranks, Rows, Ties

AUTO = "auto"  # what a store of as many rows would choose by itself
_BATCH = 256  # queries


@dataclass(frozen=True)
class IndexScores:
    """Retrieval of one direction through one index.

    Attributes:
        way: ``t2i`` or ``i2t``.
        asked: a FAISS factory string, "exact" or "auto".
        kind: what that is here: a factory string, or "exact" for no index at all.
        rows: how many there are in it.
        metrics: hit@k, recall@k and nDCG@k of the right answers, as ``t2i_hit@1``; what is not found has no rank.
        recall: share of the ten rows nearest to each query that it finds; an equal score is as good as the same row.
        tuned: the same share for the queries that it was tuned on, by their kind; those are not the ones above.
        refine: its ``refine`` · k best candidates are scored anew to find k rows.
        effort: nprobe or efSearch; 0 where the kind has neither.
        queries_per_second: of single queries, from their median time, with the scoring anew.
        bytes: the size of its file, beside the vectors themselves; 0 for exact search, which needs none.
    """

    way: str
    asked: str
    kind: str
    rows: int
    metrics: Mapping[str, float]
    recall: float
    tuned: Mapping[str, float]
    refine: int
    effort: int
    queries_per_second: float
    bytes: int

    @property
    def name(self) -> str:
        """The kind, and that it was chosen if it was."""
        return f"{AUTO}: {self.kind}" if self.asked == AUTO else self.kind

    def to_json(self) -> dict[str, Any]:
        """In plain values."""
        return {
            "direction": self.way,
            "asked": self.asked,
            "kind": self.kind,
            "rows": self.rows,
            "metrics": dict(self.metrics),
            "recall": self.recall,
            "tuned": dict(self.tuned),
            "refine": self.refine,
            "effort": self.effort,
            "queries_per_second": self.queries_per_second,
            "bytes": self.bytes,
        }


@dataclass(frozen=True)
class Direction:
    """What is looked for, with what, and where the right answers stand by exact search.

    Attributes:
        way: ``t2i`` or ``i2t``.
        gallery: (N, D) what is searched.
        queries: (Q, D), one for each of the ranks' queries.
        ranks: by exact search.
        answers: (P,) rows of the gallery that are right, query by query as in ``ranks.first``.
    """

    way: str
    gallery: Vectors
    queries: Vectors
    ranks: Ranks
    answers: Rows


def check_kinds(kinds: Sequence[str], rows: Sequence[int], dim: int) -> None:
    """Refuse a kind that FAISS does not know, or cannot train on galleries of so many rows. Raises VectorError."""
    for kind in kinds:
        for count in rows:
            if kind not in (AUTO, EXACT):
                VectorIndex.check(kind, dim, count)


def evaluate_indexes(
    kinds: Sequence[str],
    direction: Direction,
    probes: Mapping[str, Vectors],
    ks: Sequence[int] = KS,
    ties: Ties = "pessimistic",
) -> tuple[IndexScores, ...]:
    """Measure exact search, and retrieval through an index of each kind, tuned as a store would be.

    Each index is built on the gallery and tuned on the probes and on rows of the gallery, never on the queries that it
    is then measured with. It names candidates, which are scored anew with the gallery's vectors.

    Args:
        kinds: FAISS factory strings, "exact" or "auto"; one that is named twice is measured once.
        direction: what to search, and with what.
        probes: queries to tune on, by their kind, (n, D) unit rows each.
        ks: for hit@k, recall@k and nDCG@k. hit@k is that of a search for k rows, or for ten if k is smaller.
        ties: as in :mod:`retrieval.ranks`.

    Returns:
        Exact search first, then the kinds in their order.

    Raises:
        VectorError: FAISS does not know a kind, or needs more rows to train it.
    """
    gallery = direction.gallery
    truth = exact_search(gallery, direction.queries, choice.K)
    exact = IndexScores(
        way=direction.way,
        asked=EXACT,
        kind=EXACT,
        rows=len(gallery),
        metrics=_named(direction.way, means_at_k(direction.ranks, ks)),
        recall=1.0,
        tuned={},
        refine=1,
        effort=0,
        queries_per_second=_per_second(_Search(gallery, None), direction.queries),
        bytes=0,
    )
    out = [exact]
    for kind in dict.fromkeys(kinds):
        if kind == EXACT:
            continue
        tuned = _tuned(kind, direction, probes)
        if tuned is None:
            out.append(replace(exact, asked=kind))
            continue
        search = _Search(gallery, tuned)
        metrics, recall = _measured(search, direction, truth, ks, ties)
        out.append(
            IndexScores(
                way=direction.way,
                asked=kind,
                kind=tuned.index.factory,
                rows=len(gallery),
                metrics=_named(direction.way, metrics),
                recall=recall,
                tuned=tuned.recall,
                refine=tuned.refine,
                effort=tuned.effort,
                queries_per_second=_per_second(search, direction.queries),
                bytes=tuned.index.size,
            )
        )
    return tuple(out)


def _tuned(kind: str, direction: Direction, probes: Mapping[str, Vectors]) -> Tuned | None:
    """The index of a kind, or the one that a store would choose; None: exact search."""
    gallery = direction.gallery
    rows, dim = gallery.shape
    wanted = Wanted(None if kind == AUTO else kind)
    kinds = choice.kinds(rows, dim, wanted) if wanted.factory is None else [wanted.factory]
    if not kinds:
        return None
    stored = IMAGE if direction.way == "t2i" else STORED  # as a store calls them
    queries = {**probes, stored: gallery[choice.evenly(rows, choice.PROBES)]}
    truth = {name: exact_search(gallery, each, choice.K) for name, each in queries.items()}

    def tuned(kind: str) -> Tuned:
        index = VectorIndex.fill(kind, dim, rows, lambda count: gallery[choice.evenly(rows, count)], [gallery])
        return choice.tune(index, queries, truth, gallery.__getitem__, wanted.recall, wanted.factory is not None)

    return choice.first_enough(kinds, tuned, forced=wanted.factory is not None)


@dataclass(frozen=True)
class _Search:
    """Search as a store does it: see Snapshot.search. ``tuned`` is None for exact search."""

    gallery: Vectors
    tuned: Tuned | None

    def __call__(self, queries: Vectors, k: int = choice.K) -> Hits:
        if self.tuned is None:
            return exact_search(self.gallery, queries, k)
        found = list(self.candidates(queries, k))
        return ranked(queries, min(k, len(self.gallery)), found.__getitem__)

    def candidates(self, queries: Vectors, k: int) -> Iterator[tuple[Rows, NDArray[np.float32]]]:
        """Rows and scores among which the best k are, query by query; ties at rank k are whole as far as it knows."""
        assert self.tuned is not None
        rows = len(self.gallery)
        fetch = self.tuned.refine * max(k, choice.K)
        for i in range(0, len(queries), _BATCH):
            some = queries[i : i + _BATCH]
            # Of few rows the index would name all, and where it loses its way, exact search steps in.
            near = self.tuned.index.candidates(some, min(k, rows), fetch) if fetch < rows else [None] * len(some)
            for query, found in zip(some, near, strict=True):
                if found is None or len(found[0]) < min(k, rows):
                    yield rescored(query, np.arange(rows), self.gallery, k)
                else:
                    chosen = np.sort(found[0])
                    yield rescored(query, chosen, self.gallery[chosen], k)


def _measured(
    search: _Search, direction: Direction, truth: Hits, ks: Sequence[int], ties: Ties
) -> tuple[dict[str, float], float]:
    """The measures at each k, and the share of the ten nearest rows that are found."""
    depths = sorted({choice.K, *(max(k, choice.K) for k in ks)})
    metrics: dict[str, float] = {}
    recall = 0.0
    for depth in depths:
        found = list(search.candidates(direction.queries, depth))
        if depth == choice.K:
            shares = [_share(scores, real) for (_, scores), real in zip(found, truth.scores, strict=True)]
            recall = float(np.mean(shares))
        ranks = _ranks_among(found, direction, ties)
        metrics |= means_at_k(ranks, [k for k in ks if max(k, choice.K) == depth])
    order = means_at_k(direction.ranks, ks)
    return {name: metrics[name] for name in order}, recall


def _share(scores: NDArray[np.float32], real: NDArray[np.float32]) -> float:
    return min(len(real), int((scores >= real[-1]).sum())) / len(real)


def _ranks_among(found: Sequence[tuple[Rows, NDArray[np.float32]]], direction: Direction, ties: Ties) -> Ranks:
    """The right answers' ranks among what is found; infinite where they are not."""
    ranks = np.full(len(direction.answers), np.inf)
    first = direction.ranks.first.tolist()
    for (rows, scores), begin, end in zip(found, first[:-1], first[1:], strict=True):
        right = np.isin(rows, direction.answers[begin:end])
        own = -np.sort(-scores[right])
        wrong = scores[~right]
        above = (wrong > own[:, None]).sum(axis=1)
        tied = (wrong == own[:, None]).sum(axis=1)
        behind = tied if ties == "pessimistic" else tied / 2
        ranks[begin : begin + len(own)] = above + behind + np.arange(1, len(own) + 1)
    return replace(direction.ranks, ranks=ranks)


def _per_second(search: _Search, queries: Vectors) -> float:
    return 1000 / float(np.median(choice.milliseconds(search, queries)))


def _named(way: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{way}_{name}": value for name, value in metrics.items()}
