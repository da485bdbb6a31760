"""Who is drawn how often: sources by their share of the batches, pictures by what they show.

Data are rarely balanced: one source is ten times another, and most photos are of people. A weight gives a source its
share of the batches; balance draws the pictures of each value of a column equally often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import DataError
from retrieval.evaluation import LABEL
from retrieval.pairs import Record

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Balance:
    """Groups of the rows of a source, and how often each is drawn: as n ** power, where it has n rows.

    With power 0 all groups are drawn equally often, with 1 as often as they have rows. (Softening by an exponent:
    word2vec's negatives, Mikolov et al. 2013, arXiv:1310.4546; languages in XLM, Conneau & Lample 2019,
    arXiv:1901.07291, section 3.1.)
    """

    groups: Sequence[Rows]  # a row may be in several
    power: float = 0.0

    def draw(self, count: int, random: np.random.Generator) -> Rows:
        """(count,) rows in random order. None of a group comes again before all of it have come."""
        share = np.array([len(rows) for rows in self.groups], np.float64) ** self.power
        # One random number decides all roundings (systematic sampling): the expectation of each is exact, also of a
        # group whose share of an epoch is less than one picture, and their sum is the count.
        bounds = np.floor(np.cumsum(share) / share.sum() * count + random.random()).astype(np.int64)
        bounds[-1] = count  # which the sum of rounded shares may miss
        drawn = [_again_and_again(rows, many, random) for rows, many in zip(self.groups, _steps(bounds), strict=True)]
        return random.permutation(np.concatenate(drawn))


def _steps(bounds: Rows) -> list[int]:
    values: list[int] = np.diff(bounds, prepend=0).tolist()
    return values


def _again_and_again(rows: Rows, count: int, random: np.random.Generator) -> Rows:
    """The first so many of the rows in random order, then of them in another, and so on."""
    passes = [random.permutation(rows) for _ in range(-(-count // len(rows)))]
    return np.concatenate(passes)[:count] if passes else rows[:0]


def balance_by(records: Sequence[Record], column: str, power: float) -> Balance:
    """Groups by the values of a column, or by ``label``; pictures without a value are a group of their own.

    A picture with several values is in the group of each.

    Raises:
        DataError: no picture has a value, with the names of the columns that there are.
    """
    groups: dict[str, list[int]] = {}
    for row, record in enumerate(records):
        for value in dict.fromkeys(_values(record, column)) or [""]:
            groups.setdefault(value, []).append(row)
    if groups.keys() == {""}:
        known = dict.fromkeys(name for record in records for name in record.columns)
        raise DataError(f"there is nothing to balance by in {column!r}: columns are {', '.join([LABEL, *known])}")
    return Balance([np.array(rows, np.int64) for _, rows in sorted(groups.items())], power)


def _values(record: Record, column: str) -> list[str]:
    value: Any = record.labels if column == LABEL else record.columns.get(column)
    values = value if isinstance(value, (list, tuple)) else [value]
    return [str(item) for item in values if item not in (None, "")]


def batches_of_sources(passes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many batches of each source an epoch has, at least one.

    Args:
        passes: batches in one epoch's passes over each source: what a source without a weight gets.
        weights: its share of all batches, 0 for none. Where every source has one, they count against each other, and
            an epoch has as many batches as passes.
    """
    if not any(weights):
        return [*passes]
    if all(weights):
        total, shares = float(sum(passes)), [weight / sum(weights) for weight in weights]
    else:
        unweighted = sum(count for count, weight in zip(passes, weights, strict=True) if not weight)
        total, shares = unweighted / (1 - sum(weights)), [*weights]
    return [max(1, round(total * s)) if s else count for count, s in zip(passes, shares, strict=True)]
