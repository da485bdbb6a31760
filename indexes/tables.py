"""Tables of metadata as other tools write them (Parquet, CSV, TSV, JSONL), read into columns that an index can hold."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from indexes.columns import read_parquet
from indexes.errors import ExchangeError

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson")
_SEPARATORS = ",\t;|"
_INTEGER, _NUMBER = r"^-?(0|[1-9][0-9]{0,17})$", r"^-?(0|[1-9][0-9]{0,17})(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?$"
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")
_TEXTS = pa.list_(pa.field("element", pa.string()))


def read_table(file: Path) -> pa.Table:
    """Read a table whole; its kind is told by its name.

    In CSV a column is read as numbers if each of its cells is one or empty (007 is none), and an empty cell is null.
    Row numbers that pandas writes are left out.

    Raises:
        ExchangeError: there is no such file, it is of another kind, damaged, or has two columns of one name.

    """
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise ExchangeError(f"{file} is no table that can be read here: give {', '.join(SUFFIXES[:-1])}")
    try:
        table = _read_parquet(file) if suffix == ".parquet" else _read_text(file, suffix)
    except FileNotFoundError:
        raise ExchangeError(f"{file} is missing") from None
    except (pa.ArrowException, OSError, ValueError, csv.Error) as error:
        raise ExchangeError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from error
    twice = {name for name in table.column_names if table.column_names.count(name) > 1}
    if twice:
        raise ExchangeError(f"{file} has two columns of one name: {', '.join(sorted(twice))}")
    return table.select([name for name in table.column_names if name and not _PANDAS_INDEX.fullmatch(name)])


def extras(table: pa.Table, taken: Collection[str]) -> pa.Table:
    """The columns as an index can hold them; those without a value are left out.

    Whole numbers become int64 (text where they do not fit), other numbers float64, moments UTC without a zone, and
    what is nested JSON. A column whose name is taken is called ``source_NAME``.
    """
    columns: dict[str, pa.ChunkedArray] = {}
    for name in table.column_names:
        column = _storable(table[name])
        if column.null_count < len(column):
            own = name
            while own in taken or own in columns or (own != name and own in table.column_names):
                own = f"source_{own}"
            columns[own] = column
    if not columns:  # a table without columns forgets its rows
        return pa.table({"": pa.nulls(len(table))}).select([])
    return pa.table(columns)


def texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """One text for each row: of a list the first one; null where there is none."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return texts(column.cast(kind.value_type))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        firsts = [next((str(item) for item in value or () if item is not None), None) for value in column.to_pylist()]
        return pa.chunked_array([pa.array(firsts, pa.string())])
    return column.cast(pa.string()) if _is_text(kind) else _written(column)


def _read_parquet(file: Path) -> pa.Table:
    with file.open("rb") as stream:  # not Arrow's own open: it takes no names that are not UTF-8
        return read_parquet(stream)


def _read_text(file: Path, suffix: str) -> pa.Table:
    if not file.stat().st_size:
        raise ValueError("it is empty")
    with file.open("rb") as stream:
        if suffix in (".jsonl", ".ndjson"):
            from pyarrow import json as arrow_json

            return arrow_json.read_json(stream)
        from pyarrow import csv as arrow_csv

        first = stream.readline().decode("utf-8-sig").strip("\r\n")
        stream.seek(0)
        mark = "\t" if suffix == ".tsv" else max(_SEPARATORS, key=first.count)
        header = next(csv.reader([first], delimiter=mark), [])
        table = arrow_csv.read_csv(
            stream,
            parse_options=arrow_csv.ParseOptions(delimiter=mark, newlines_in_values=True),
            convert_options=arrow_csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string())),
        )
    columns = [_numbers(column.cast(pa.string())) for column in table.columns]
    return pa.Table.from_arrays(columns, names=[name.strip() for name in table.column_names])


def _numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    column = pc.if_else(pc.equal(column, ""), None, column)
    for form, kind in ((_INTEGER, pa.int64()), (_NUMBER, pa.float64())):
        fits = pc.all(pc.match_substring_regex(column, form)).as_py()  # nulls do not count; none but nulls: None
        if fits and column.null_count < len(column):
            return column.cast(kind)
    return column


def _storable(column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _storable(column.cast(kind.value_type))
    if pa.types.is_integer(kind):
        try:
            return column.cast(pa.int64())
        except pa.ArrowInvalid:
            return column.cast(pa.string())
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return column.cast(pa.float64())
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return column.cast(pa.timestamp("us"), safe=False)
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _is_text(kind.value_type):
        return pa.chunked_array([pa.array(column.to_pylist(), _TEXTS)])
    if pa.types.is_boolean(kind) or pa.types.is_null(kind):
        return column
    return column.cast(pa.string()) if _is_text(kind) else _written(column)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _written(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array([_shown(value) for value in column.to_pylist()], pa.string())])


def _shown(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return json.dumps(value, default=str, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
