"""From rows of data to numbers: one table for each modality, with NaN where a row has nothing of it.

Image and text are vectors of the encoder, through the one cache. Named columns are modalities of their own: a number,
a category (one-hot), or a vector that is ready-made (of audio, video, sensors).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from indexes.vectors import Vectors
from retrieval.embedding import (
    KnownVectors,
    Progress,
    UnreadablePictures,
    View,
    encode_pictures,
    encode_sentences,
)
from retrieval.encoders import Encoder
from retrieval.errors import DataError
from retrieval.heads import Modalities, Rows
from retrieval.pair_formats import some
from retrieval.pairs import Example, Picture

IMAGE, TEXT = "image", "text"
Note = Callable[[str], None]
_MOST_CATEGORIES = 200
FURTHEST = 10.0  # standard deviations: what lies further out of a column is measured wrongly, or of another unit


@dataclass(frozen=True)
class Column:
    """A named column as a modality."""

    name: str
    kind: Literal["number", "category", "vector"]
    width: int
    categories: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, examples: Sequence[Example]) -> Column:
        """Find out what a column is from the rows to learn from: all numbers, all lists of as many, or anything else.

        Raises:
            DataError: no row has a value, vectors differ in width, or there are too many categories.
        """
        values = [example.columns.get(name) for example in examples]
        known: list[Any] = [value for value in values if not _is_nothing(value)]
        if not known:
            have = sorted({key for example in examples for key in example.columns})
            raise DataError(
                f"no row to learn from has a value in the column {name!r}: its columns are {some(have) or 'none'}"
            )
        if all(isinstance(value, (list, tuple)) for value in known):
            widths = Counter(len(value) for value in known)
            if len(widths) > 1:
                raise DataError(f"the vectors in the column {name!r} have different widths: {some(sorted(widths))}")
            return cls(name, "vector", len(known[0]))
        if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in known):
            return cls(name, "number", 1)
        categories = tuple(sorted({str(value) for value in known}))
        if len(categories) > _MOST_CATEGORIES:
            raise DataError(
                f"the column {name!r} has {len(categories)} different values, at most {_MOST_CATEGORIES} make a "
                "category: leave it out, or give it as vectors"
            )
        return cls(name, "category", len(categories), categories)

    def rows(self, examples: Sequence[Example]) -> Rows:
        """(N, width); NaN where a row says nothing, or a category that was not learnt.

        Raises:
            DataError: a value that is none of the column's kind, or infinite.
        """
        out = np.full((len(examples), self.width), np.nan, np.float32)
        places = {category: i for i, category in enumerate(self.categories)}
        for row, example in enumerate(examples):
            value = example.columns.get(self.name)
            if _is_nothing(value):
                continue
            if self.kind == "category":
                if str(value) in places:
                    out[row] = 0
                    out[row, places[str(value)]] = 1
                continue
            try:
                numbers = np.asarray(value, np.float64).reshape(-1)
            except (TypeError, ValueError):
                numbers = np.empty(0)
            if len(numbers) != self.width or np.isinf(numbers).any():
                wanted = "a number" if self.kind == "number" else f"a vector of {self.width} numbers"
                raise DataError(f"row {row + 1} has {value!r:.60} in the column {self.name!r}: expected {wanted}")
            out[row] = np.nan if np.isnan(numbers).any() else numbers
        return out


def _is_nothing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def encode_examples(
    examples: Sequence[Example],
    names: Sequence[str],
    columns: Sequence[Column],
    encoder: Encoder | None,
    *,
    cache: KnownVectors | None = None,
    progress: Progress | None = None,
    view: View | None = None,
    note: Note | None = None,
) -> dict[str, Rows]:
    """Tables of the modalities asked for: ``image`` and ``text`` of the encoder, and the columns.

    Args:
        examples: N rows.
        names: of the modalities, in order; those that are no columns are the encoder's.
        columns: by name.
        encoder: None where neither picture nor text is asked for.
        cache: of the encoder's fingerprint; nothing is encoded twice.
        progress: called with (pictures done, pictures in all).
        view: of the pictures, see :func:`retrieval.embedding.encode_pictures`.
        note: told of pictures that cannot be read; their rows are as if they had none.

    Raises:
        DataError: values that do not fit, or no picture can be read.
    """
    tables: dict[str, Rows] = {}
    by_name = {column.name: column for column in columns}
    for name in names:
        if name in by_name:
            tables[name] = by_name[name].rows(examples)
            continue
        assert encoder is not None  # see above
        rows = np.full((len(examples), encoder.dim), np.nan, np.float32)
        if name == IMAGE:
            pictures = [(row, example.image) for row, example in enumerate(examples) if example.image is not None]
            shown: list[Picture] = [picture for _, picture in pictures]
            if shown:
                at, vectors = _encode_readable(encoder, shown, cache, progress, view, note)
                rows[np.array([row for row, _ in pictures])[at]] = vectors
        else:
            said = [row for row, example in enumerate(examples) if example.text.strip()]
            if said:
                rows[said] = encode_sentences(encoder, [examples[row].text for row in said], cache=cache)
        tables[name] = rows
    return tables


def _encode_readable(
    encoder: Encoder,
    pictures: Sequence[Picture],
    cache: KnownVectors | None,
    progress: Progress | None,
    view: View | None,
    note: Note | None,
) -> tuple[NDArray[np.int64], Vectors]:
    """Which pictures can be read, and their vectors."""
    at = np.arange(len(pictures))
    try:
        return at, encode_pictures(encoder, pictures, cache=cache, progress=progress, view=view)
    except UnreadablePictures as error:  # all have been tried
        if len(error.reasons) == len(pictures):
            raise
        if note:
            note(f"{error}; such rows are taken as if they had none")
        at = np.array([row for row in at if row not in error.reasons])
        return at, encode_pictures(
            encoder, [pictures[row] for row in at.tolist()], cache=cache, progress=progress, view=view
        )


# ---- standardised ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the models take: standardised tables, zero (the mean) where a row has nothing, and who has what.

    Attributes:
        names: of M modalities.
        values: M tables (N, width), float32.
        present: (N, M) booleans.
    """

    names: tuple[str, ...]
    values: tuple[NDArray[np.float32], ...]
    present: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.present)

    def take(self, rows: NDArray[Any]) -> Inputs:
        """Some of the rows."""
        return Inputs(self.names, tuple(table[rows] for table in self.values), self.present[rows])

    def only(self, *names: str) -> Inputs:
        """Some of the modalities."""
        at = [self.names.index(name) for name in names]
        return Inputs(names, tuple(self.values[i] for i in at), self.present[:, at])

    def without(self, name: str) -> Inputs:
        """The same rows as if they had nothing of a modality."""
        at = self.names.index(name)
        values, present = list(self.values), self.present.copy()
        values[at], present[:, at] = np.zeros_like(values[at]), False
        return Inputs(self.names, tuple(values), present)

    def joined(self) -> NDArray[np.float32]:
        """(N, sum of widths): all tables side by side."""
        return np.concatenate(self.values, axis=1)

    @classmethod
    def stacked(cls, parts: Sequence[Inputs]) -> Inputs:
        """The rows of several, one after the other."""
        return cls(
            parts[0].names,
            tuple(np.concatenate(tables) for tables in zip(*(part.values for part in parts), strict=True)),
            np.concatenate([part.present for part in parts]),
        )


@dataclass(frozen=True, eq=False)
class Scaling:
    """Mean and standard deviation of each modality, of the rows to learn from alone."""

    mean: Mapping[str, NDArray[np.float32]]
    std: Mapping[str, NDArray[np.float32]]

    @classmethod
    def of(cls, tables: Modalities) -> Scaling:
        """Learn them. A number that is always the same has a deviation of 1, and so has one that is never there."""
        mean, std = {}, {}
        for name, table in tables.items():
            there = table[~np.isnan(table).any(axis=1)].astype(np.float64)
            mean[name] = (there.mean(0) if len(there) else np.zeros(table.shape[1])).astype(np.float32)
            spread = there.std(0) if len(there) else np.zeros(table.shape[1])
            std[name] = np.where(spread > 1e-6 * (1 + np.abs(mean[name])), spread, 1).astype(np.float32)
        return cls(mean, std)

    def apply(self, tables: Modalities) -> Inputs:
        """Standardise; what lies further out than ten deviations stands there."""
        present = np.stack([~np.isnan(tables[name]).any(axis=1) for name in self.mean], axis=1)
        values = []
        for i, (name, mean) in enumerate(self.mean.items()):
            scaled = np.clip((tables[name] - mean) / self.std[name], -FURTHEST, FURTHEST)
            values.append(np.where(present[:, i : i + 1], scaled, 0).astype(np.float32))
        return Inputs(tuple(self.mean), tuple(values), present)
