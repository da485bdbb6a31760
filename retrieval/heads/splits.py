"""Which rows are learnt from, chosen by, and measured with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import KFold, StratifiedKFold

from retrieval.errors import DataError
from retrieval.pair_formats import some

RowNumbers = NDArray[np.int64]

_NAMES = {"train": "train", "val": "val", "validation": "val", "dev": "val", "valid": "val", "test": "test"}
_SHARE = 7  # one of so many rows is held out where the data do not say which


def split_rows(
    given: Sequence[str | None], strata: Sequence[Any], seed: int, note: Callable[[str], None]
) -> dict[str, RowNumbers]:
    """``train``, ``val`` and ``test``: as given; what is not given is drawn from ``train``, stratified.

    Args:
        given: each row's split; None of all where the data have none.
        strata: each row's class, or whatever should be as frequent in each part; numbers are not stratified by.
        seed: of what is drawn.
        note: told of what is drawn, and of rows that are left out.

    Raises:
        DataError: too few rows, or no row is of ``train``.
    """
    if not any(given):
        given = ["train"] * len(given)
    known = [_NAMES.get((split or "").lower()) for split in given]
    parts = {
        name: np.array([row for row, split in enumerate(known) if split == name], np.int64)
        for name in ("train", "val", "test")
    }
    if others := sorted({str(split) for split, name in zip(given, known, strict=True) if name is None}):
        note(f"rows of other splits than train, val and test are left out: {some(others)}")
    if not len(parts["train"]):
        raise DataError("no row with a label is of the split train: there is nothing to learn from")
    for name in ("test", "val"):
        if not len(parts[name]):
            parts["train"], parts[name] = _held_out(parts["train"], strata, seed)
            note(f"no row is of the split {name}: {len(parts[name])} are drawn from train")
    return parts


def fold_rows(strata: Sequence[Any], count: int, seed: int) -> list[dict[str, RowNumbers]]:
    """Stratified k-fold cross-validation: each fold is ``test`` once, and ``val`` is drawn from what is left.

    Raises:
        DataError: fewer rows than folds.
    """
    parts = []
    for rest, test in splits(np.arange(len(strata)), strata, count, seed):
        train, val = _held_out(rest, strata, seed)
        parts.append({"train": train, "val": val, "test": test})
    return parts


def _held_out(rows: RowNumbers, strata: Sequence[Any], seed: int) -> tuple[RowNumbers, RowNumbers]:
    if len(rows) < 2:
        raise DataError(f"{len(rows)} row with a label to learn from is too few: some have to be held out to choose by")
    kept, held = splits(rows, strata, min(_SHARE, len(rows)), seed)[0]
    return kept, held


def splits(rows: RowNumbers, strata: Sequence[Any], count: int, seed: int) -> list[tuple[RowNumbers, RowNumbers]]:
    """(rows kept, rows left out) of each fold, stratified where every class is in each; DataError for too few rows."""
    if len(rows) < count:
        raise DataError(f"{len(rows)} rows with a label are too few for {count} folds")
    own = [strata[row] for row in rows]
    _, counts = np.unique(np.array(list(map(str, own))), return_counts=True)
    if counts.min() >= count:
        splitter: Any = StratifiedKFold(count, shuffle=True, random_state=seed)
    else:  # scikit-learn would warn: a class that is rarer than the folds are many cannot be in each
        splitter = KFold(count, shuffle=True, random_state=seed)
    return [(rows[one], rows[other]) for one, other in splitter.split(rows, list(map(str, own)))]
