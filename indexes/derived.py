"""The columns that a filter may name: those of the rows, and those that are computed from them when they are named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from indexes.errors import FilterError

SPELLINGS = {"jpg": "jpeg", "jpe": "jpeg", "jfif": "jpeg", "tif": "tiff", "heif": "heic", "hif": "heic"}
OFFSETS_KNOWN = (31_536_000, 4_102_444_800)  # 1971 to 2100: outside, some systems cannot tell local time from UTC
_WEEK = 604_800  # seconds; a zone keeps its offset for longer than that
TEXT, TEXTS, DATES, NUMBERS, FLAG = "text", "lists of texts", "dates", "numbers", "True or False"  # see kind_of


@dataclass(frozen=True)
class Derived:
    """A column that is computed from stored ones when a condition names it.

    Attributes:
        type: of its values.
        sources: the stored columns it is made of.
        make: from a table of the sources to the values.
        spell: what a text that it is compared with in a written condition (see `parse`) is taken for.

    """

    type: pa.DataType
    sources: tuple[str, ...]
    make: Callable[[pa.Table], Any]
    spell: Callable[[str], str] = str


def _folder(rows: pa.Table) -> Any:
    parts = pc.split_pattern(rows["path"], "/", max_splits=1, reverse=True)
    return pc.if_else(pc.equal(pc.list_value_length(parts), 2), pc.list_element(parts, 0), "")


def _type(rows: pa.Table) -> Any:
    parts = pc.split_pattern(rows["path"], ".", max_splits=1, reverse=True)
    suffix = pc.binary_join(pc.list_slice(parts, 1, 2), "").combine_chunks().dictionary_encode()
    types = [None if not text or "/" in text else file_type(text) for text in suffix.dictionary.to_pylist()]
    return pa.array(types, pa.string()).take(suffix.indices)


def _orientation(rows: pa.Table) -> Any:
    width, height = rows["width"], rows["height"]
    uneven = pc.if_else(pc.greater(width, height), "landscape", "portrait")
    return pc.if_else(pc.equal(width, height), "square", uneven)


def _mtime(rows: pa.Table) -> Any:
    moments = rows["mtime_ns"].to_numpy() // 1000
    seconds = np.clip(moments // 1_000_000, *OFFSETS_KNOWN)
    return pa.array(moments + 1_000_000 * _utc_offsets(seconds), pa.timestamp("us"))


def file_type(suffix: str) -> str:
    """Spell a suffix, with or without its dot, as its type: JPG is jpeg."""
    name = suffix.strip().removeprefix(".").lower()
    return SPELLINGS.get(name, name)


def _utc_offsets(seconds: NDArray[np.int64]) -> NDArray[np.int64]:
    """By how many seconds local time is ahead at moments of UTC. The system is asked once a week, not once a moment."""

    def ahead(second: int) -> int:
        offset = datetime.fromtimestamp(second, timezone.utc).astimezone().utcoffset()
        return round(offset.total_seconds()) if offset else 0

    if not len(seconds):
        return seconds
    weeks = range(int(seconds.min()), int(seconds.max()) + _WEEK, _WEEK)
    begins, offsets = [weeks[0]], [ahead(weeks[0])]
    for week in weeks[1:]:
        if (after := ahead(week)) != offsets[-1]:
            low, high = week - _WEEK, week  # the clocks are changed in (low, high]
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if ahead(middle) == after else (middle, high)
            begins.append(high)
            offsets.append(after)
    return np.array(offsets)[np.searchsorted(begins, seconds, side="right") - 1]


DERIVED = {
    "folder": Derived(pa.string(), ("path",), _folder),  # "" in the root
    "type": Derived(pa.string(), ("path",), _type, file_type),  # jpeg, png, heic, …: the suffix, in its usual spelling
    "orientation": Derived(pa.string(), ("width", "height"), _orientation),  # landscape, portrait or square
    "mtime": Derived(pa.timestamp("us"), ("mtime_ns",), _mtime),  # when the file was changed, by local clocks
}
"""Columns that conditions may name beside the stored ones. A stored column of the same name goes first."""


def known_columns(schema: pa.Schema) -> pa.Schema:
    """What a condition on rows of a schema may name: stored and derived columns with their types."""
    extra = [pa.field(name, derived.type) for name, derived in DERIVED.items() if name not in schema.names]
    return pa.schema([*schema, *extra])


def kind_of(type_: pa.DataType) -> str:
    """What columns of a type hold: TEXT, TEXTS, DATES, NUMBERS or FLAG, or else the type's own name."""
    is_ = pa.types
    kinds: dict[str, bool] = {
        TEXT: is_.is_string(type_) or is_.is_large_string(type_),
        TEXTS: is_.is_list(type_) and is_.is_string(type_.value_type),
        DATES: is_.is_timestamp(type_) or is_.is_date(type_),
        NUMBERS: is_.is_integer(type_) or is_.is_floating(type_),
        FLAG: is_.is_boolean(type_),
    }
    return next((kind for kind, holds in kinds.items() if holds), str(type_))


def no_column(name: str, known: pa.Schema) -> FilterError:
    """Say that a condition names a column that is not there."""
    return FilterError(f"there is no column {name!r}; {listed(known)}")


def listed(known: pa.Schema) -> str:
    """Say which columns there are."""
    return f"the columns are {', '.join(known.names)}"
