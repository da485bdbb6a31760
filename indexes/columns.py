"""Extra columns of rows: which values they take, and how columns of several segments become one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import date, datetime, time, timezone
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from indexes.errors import ColumnError

_BOOL, _INT, _FLOAT, _TEXT, _TIME = pa.bool_(), pa.int64(), pa.float64(), pa.string(), pa.timestamp("us")
_TEXTS = pa.list_(pa.field("element", pa.string()))
_KINDS = (_BOOL, _INT, _FLOAT, _TEXT, _TIME, _TEXTS)
_SAID = "yes or no, a whole number of 64 bits, a number, text, a moment, or a list of texts"


def check_names(names: Iterable[str], taken: Collection[str]) -> None:
    """Refuse names that are no text, or that the store uses itself. Raises ColumnError."""
    for name in names:
        if not isinstance(name, str) or not name or not _is_text(name):
            raise ColumnError(f"a column cannot be called {name!r}: a name is text, and not empty")
        if name in taken:
            raise ColumnError(f"a column cannot be called {name!r}: the index has one of that name; choose another")


def encode_columns(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Turn the extra values of N rows into columns, in the order in which names appear; a row without one gets null.

    Columns without any value are left out. Values of several kinds in a column come out as `unified` says. A moment
    with a time zone is turned into UTC and loses the zone; a date is its midnight.

    Raises:
        ColumnError: a value is of no kind that a column can hold.

    """
    names = dict.fromkeys(name for row in rows for name, value in row.items() if value is not None)
    return pa.table({name: _column(name, [row.get(name) for row in rows]) for name in names})


def decode_columns(table: pa.Table) -> list[dict[str, Any]]:
    """Turn extra columns back into one mapping for each row, without nulls."""
    return [{name: value for name, value in row.items() if value is not None} for row in table.to_pylist()]


def is_extra(fields: Iterable[pa.Field], taken: Collection[str]) -> bool:
    """Whether fields of a file are extra columns that `encode_columns` may have made."""
    found = list(fields)
    names = [field.name for field in found]
    own = all(field.nullable and field.type in _KINDS for field in found)
    return own and len({*names, *taken}) == len(names) + len(taken)


def unified(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """The columns of several tables as one schema, in the order in which they appear.

    Kinds that differ: whole numbers and numbers become numbers (beyond 2**53 rounded), a list of texts takes anything
    in as a list of one, and everything else becomes text.
    """
    kinds: dict[str, pa.DataType] = {}
    for schema in schemas:
        for field in schema:
            kinds[field.name] = _common(kinds.get(field.name, field.type), field.type)
    return pa.schema(list(kinds.items()))


def aligned(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table with exactly the columns of a schema, which `unified` made: missing ones null, others converted."""
    if table.schema.equals(schema):
        return table
    have = set(table.column_names)
    columns = [
        _converted(table[field.name], field.type) if field.name in have else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _column(name: str, values: Sequence[Any]) -> pa.Array:
    plain = [_plain(name, value) for value in values]
    kinds = [_kind(value) for value in plain if value is not None]
    kind = reduce(_common, kinds)
    try:
        if all(one == kind for one in kinds):
            return pa.array(plain, kind)
        parts = [_converted(pa.chunked_array([pa.array([value], _kind(value))]), kind) for value in plain]
        return pa.concat_arrays([chunk for part in parts for chunk in part.chunks])
    except (pa.ArrowException, OverflowError) as error:
        raise ColumnError(f"column {name!r}: {' '.join(str(error).split())}; it takes {_SAID}") from error


def _plain(name: str, value: Any) -> Any:
    """A value as one of the few Python types that the kinds stand for."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, datetime):
        return value.astimezone(timezone.utc).replace(tzinfo=None) if value.tzinfo else value
    if isinstance(value, date):
        return datetime.combine(value, time())
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return [storable(item) for item in value]
    raise ColumnError(f"column {name!r} cannot hold {value!r:.60}: it takes {_SAID}")


def _kind(value: Any) -> pa.DataType:
    kinds = {bool: _BOOL, int: _INT, float: _FLOAT, str: _TEXT, list: _TEXTS, type(None): pa.null()}
    return next((kind for type_, kind in kinds.items() if isinstance(value, type_)), _TIME)


def _common(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    if one == other:
        return one
    if {one, other} == {_INT, _FLOAT}:
        return _FLOAT
    return _TEXTS if _TEXTS in (one, other) else _TEXT


def _converted(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if column.type == kind:
        return column
    if kind != _TEXTS or column.type == pa.null():
        return column.cast(kind, safe=False)
    texts = column.cast(_TEXT).combine_chunks()
    offsets = np.arange(len(texts) + 1, dtype=np.int32)
    lists = pa.ListArray.from_arrays(pa.array(offsets), texts, mask=texts.is_null())
    return pa.chunked_array([lists.cast(_TEXTS)])


def _is_text(name: str) -> bool:
    return name == storable(name)


def storable(text: str) -> str:
    """Text that Parquet can hold: half a surrogate pair becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def numbers(values: NDArray[np.int64]) -> pa.Int64Array:
    """Whole numbers for Arrow, which takes them from NumPy by importing pandas, where that is installed."""
    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(np.ascontiguousarray(values, np.int64))])


def read_parquet(stream: Any) -> pa.Table:
    """All columns of a Parquet file, read in this thread.

    Not by Arrow's ``read_table``: it scans in threads of its own, which may let go of a Python stream only as Python
    ends, and that aborts the process.
    """
    import pyarrow.parquet as pq

    return pq.ParquetFile(stream).read(use_threads=False)
