"""What of someone's data is learnt from: a few bad pictures and empty captions do not end a run, and are said.

A benchmark over part of its data is none, so that `evaluate` refuses them; a training set of forty thousand photos from
the web always has some. More than half of it missing is a mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import DataError
from retrieval.evaluation import BACKGROUND_LABELS, prompts_of
from retrieval.pair_formats import one_line, some
from retrieval.pairs import Record, read_pairs

Note = Callable[[str], None]

MAY_LACK = 0.5  # share of the pictures: from there on, what is left is not what was meant


def read_for_training(
    source: Path,
    split: str | None = None,
    *,
    prefer: str | None = None,
    captioned: bool = True,
    note: Note | None = None,
) -> list[Record]:
    """Records with their captions that say something; those that do not are left out, and counted for ``note``.

    Missing pictures are among them, up to half: they are left out with all others that cannot be read, and with their
    reason. ``prefer`` and ``captioned`` are those of :func:`retrieval.pairs.read_pairs`.
    """
    records = read_pairs(source, split, prefer=prefer, captioned=captioned, may_lack=MAY_LACK)
    cleaned = [_without_empty(record) for record in records]
    empty = sum(len(record.texts) for record in records) - sum(len(record.texts) for record in cleaned)
    if empty and captioned and note:
        note(f"{source.name}: {empty} empty captions are left out")
    return cleaned


def _without_empty(record: Record) -> Record:
    said = tuple(text for text in record.texts if text.strip())
    return record if len(said) == len(record.texts) else replace(record, texts=said)


def without_unreadable(
    records: Sequence[Record], unreadable: Mapping[int, str], name: str, note: Note | None
) -> list[Record]:
    """The records whose pictures can be read; the others are counted, and the first of them named.

    Args:
        records: N of them.
        unreadable: of each picture that cannot be read, by its row, which it is and why.
        name: of the data, for people.
        note: is told.

    Raises:
        DataError: they are more than half.
    """
    if not unreadable:
        return [*records]
    said = f"{len(unreadable)} of {len(records)} pictures cannot be read"
    reasons = [*unreadable.values()]
    if len(unreadable) > MAY_LACK * len(records):
        raise DataError(f"{name}: {said}, the first: {one_line(reasons[0])}")
    if note:
        note(f"{name}: {said} and are left out: {some(reasons)}")
    return [record for row, record in enumerate(records) if row not in unreadable]


def is_labelled_only(records: Sequence[Record]) -> bool:
    """Whether there are labels, and no captions: then the labels are what is learnt."""
    return not any(record.texts for record in records) and any(record.labels for record in records)


def with_prompts(records: Sequence[Record]) -> list[Record]:
    """Labelled records with a prompt of each of their classes as a caption; without those of no nameable label.

    Fine-tuned as it was pretrained, contrastively on prompts, a model keeps more than with a classifier's loss (FLYP,
    Goyal et al. 2023, arXiv:2212.00638).
    """
    named = [record for record in records if record.labels and not set(record.labels) & set(BACKGROUND_LABELS)]
    return [replace(record, texts=tuple(prompts_of(record.labels))) for record in named]


def classes_of(records: Sequence[Record]) -> NDArray[np.int64]:
    """(N,) a number for each picture, the same for pictures of the same labels."""
    number: dict[frozenset[str], int] = {}
    return np.array([number.setdefault(frozenset(record.labels), len(number)) for record in records], np.int64)
