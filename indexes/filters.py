"""Filters: from a condition on the columns of the rows to a mask over their positions.

A condition is a pyarrow expression over the columns of `Store.rows`, the extra ones included, and over those of
`DERIVED`. A row without the value that a condition asks for does not qualify.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from indexes.conditions import (
    Condition,
    all_of,
    any_of,
    below,
    date_range,
    file_types,
    glob,
    globs,
    ids,
    modified,
    number_range,
    one_line,
    orientation,
    read_ids,
    taken,
    words,
)
from indexes.derived import DERIVED, known_columns, listed, no_column
from indexes.errors import FilterError
from indexes.language import EXAMPLE, parse

if TYPE_CHECKING:
    from indexes.snapshot import Snapshot

__all__ = [
    "DERIVED", "Condition", "all_of", "any_of", "below", "criteria", "date_range", "file_types", "glob", "globs", "ids",
    "known_columns", "mask", "modified", "number_range", "orientation", "parse", "read_ids", "taken", "words",
]  # fmt: skip


def mask(rows: Snapshot, where: Condition | str) -> NDArray[np.bool_]:
    """Find the rows that qualify: (N,) bool, by position. Reads only the columns that the condition names.

    Args:
        rows: where `schema` and `columns` come from.
        where: a pyarrow expression, or a text that `parse` takes.

    Raises:
        FilterError: the condition names a column that is not there, compares values of different types, is no
            expression, or its value is not true or false.

    """
    if isinstance(where, str):
        where = parse(where, rows.schema)
    if not isinstance(where, pc.Expression):
        raise FilterError(
            f"a filter is a pyarrow expression, as pyarrow.compute.field('width') > 1000, or a text, as {EXAMPLE!r}; "
            f"not {type(where).__name__}"
        )
    known = known_columns(rows.schema)
    named = _named_columns(where, known)
    derived = {name: DERIVED[name] for name in named if name not in rows.schema.names}
    stored = [name for name in named if name not in derived]
    table = rows.columns(*dict.fromkeys(["id", *stored, *(name for one in derived.values() for name in one.sources)]))
    for name, one in derived.items():
        table = table.append_column(name, one.make(table))
    out: NDArray[np.bool_] = pc.fill_null(_value(where, table, known).cast(pa.bool_()), False).to_numpy()
    return out


def _named_columns(where: Condition, known: pa.Schema) -> list[str]:
    """Which columns a condition names: those without which it cannot be bound. Raises FilterError."""
    if re.search(r"FieldPath\(\d+\)", _said(where)):
        raise FilterError(f"a filter calls columns by their names, not by numbers; {listed(known)}")
    empty = known.empty_table()
    value = _value(where, empty, known)
    if value.type not in (pa.bool_(), pa.null()):
        raise FilterError(f"the filter {_said(where)} is {value.type}, not true or false: compare it with something")
    return [name for name in known.names if not _binds(where, empty.drop_columns([name]))]


def _binds(where: Condition, table: pa.Table) -> bool:
    try:
        _evaluate(where, table)
    except pa.ArrowException:
        return False
    return True


def _evaluate(where: Condition, table: pa.Table) -> pa.ChunkedArray:
    import pyarrow.dataset as ds

    return ds.dataset(table).to_table(columns={"value": where})["value"]  # in the order of the rows, on all cores


def _value(where: Condition, table: pa.Table, known: pa.Schema) -> pa.ChunkedArray:
    """Evaluate a condition, or say in one line why that cannot be."""
    try:
        return _evaluate(where, table)
    except pa.ArrowException as error:
        missing = re.match(r"No match for FieldRef\.Name\((.*?)\) in ", str(error), re.DOTALL)
        if missing:
            raise no_column(missing[1], known) from error
        said = _said(where)
        types = [
            f"; {field.name} is {field.type}" for field in known if re.search(rf"\b{re.escape(field.name)}\b", said)
        ]
        raise FilterError(f"the filter {said} cannot be applied: {one_line(str(error))}{''.join(types)}") from error


def _said(where: Condition) -> str:
    try:
        return one_line(str(where))
    except UnicodeDecodeError:  # of bytes that are looked for
        return "on bytes"


def criteria(
    schema: pa.Schema,
    *,
    folder: str = "",
    path: Collection[str] = (),
    taken_in: str | None = None,
    modified_in: str | None = None,
    width: str | None = None,
    height: str | None = None,
    orientations: Collection[str] = (),
    types: Collection[str] = (),
    containing: str | None = None,
    among: Iterable[int] | None = None,
    where: str | None = None,
) -> Condition | None:
    """Join what the options of the command line ask for; None if that is nothing.

    Args:
        schema: of the rows.
        folder: what the patterns of `path` are relative to.
        path: see `globs`.
        taken_in: see `taken`.
        modified_in: see `modified`.
        width: see `number_range`.
        height: see `number_range`.
        orientations: see `orientation`; commas may stand between several.
        types: see `file_types`; commas as well.
        containing: see `words`.
        among: see `ids`.
        where: see `parse`.

    Raises:
        FilterError: one of them cannot be read.

    """
    return all_of(
        [
            globs(path, folder),
            None if taken_in is None else taken(taken_in),
            None if modified_in is None else modified(modified_in),
            None if width is None else number_range("width", width),
            None if height is None else number_range("height", height),
            orientation(*_split(orientations)),
            file_types(*_split(types)),
            None if containing is None else words(containing, schema),
            None if among is None else ids(among),
            None if where is None else parse(where, schema),
        ]
    )


def _split(values: Collection[str]) -> list[str]:
    return [part.strip() for value in values for part in value.split(",")]
