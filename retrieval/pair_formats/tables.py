"""Tables: CSV, TSV and their like, and Parquet."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from retrieval.errors import DataError
from retrieval.images import IMAGE_SUFFIXES
from retrieval.pair_formats.flickr import flickr_splits
from retrieval.pair_formats.rows import (
    IMAGE_NAMES,
    LABEL_NAMES,
    TEXT_NAMES,
    PictureBytes,
    Row,
    Rows,
    class_name,
    first_line,
    one_line,
    places,
    strings,
)

_SUFFIXES = tuple(IMAGE_SUFFIXES)
_SEPARATORS = "\t,;|"
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2})?")


@dataclass(frozen=True)
class _Roles:
    """Which columns of a table mean what, by their own spelling; None: there is none."""

    image: str | None
    texts: str | None
    labels: str | None
    split: str | None

    @classmethod
    def of(cls, header: Iterable[str]) -> _Roles:
        known = {name.lower(): name for name in reversed(list(header))}
        groups = (IMAGE_NAMES, TEXT_NAMES, LABEL_NAMES, ("split",))
        return cls(*(next((known[name] for name in names if name in known), None) for names in groups))


def _table_rows(roles: _Roles, images: list[Any], columns: dict[str, list[Any]]) -> list[Row]:
    """One row per picture, from the columns beside them."""
    nothing = [None] * len(images)
    own = (roles.texts, roles.labels, roles.split)
    texts, labels, splits = (nothing if name is None else columns.pop(name, nothing) for name in own)
    extras = zip(*columns.values(), strict=True) if columns else iter([()] * len(images))
    return [
        Row(image, strings(text), strings(label), None if split is None else str(split), dict(zip(columns, extra)))  # noqa: B905
        for image, text, label, split, extra in zip(images, texts, labels, splits, extras, strict=True)
    ]


def is_csv(file: Path, text: str) -> bool:
    """Whether a text is a table, by its name or by its line of column names."""
    return (
        file.suffix.lower() in (".csv", ".tsv", ".tab", ".txt") or _understood(first_line(text), _separator(text)) > 0
    )


def is_paths(_: Path, text: str) -> bool:
    """Whether a text is nothing but names of pictures, one a line."""
    return all(line.strip().lower().endswith(_SUFFIXES) for line in text.split("\n") if line.strip())


def read_paths(file: Path, text: str) -> Rows:
    """Names of pictures, one a line, and nothing about them; `find` and `ls` write such lists."""
    return Rows([Row(line.strip(), (), (), None, {}) for line in text.split("\n") if line.strip()], places(file))


def is_lines(file: Path, text: str) -> bool:
    """Whether a text that may name no pictures is one sentence a line: no table by name, and no line of names."""
    line = first_line(text)
    return file.suffix.lower() not in (".csv", ".tsv", ".tab") and not any(
        _understood(line, mark, pictured=False) for mark in _SEPARATORS
    )


def read_lines(_: Path, text: str) -> Rows:
    """One sentence a line, and no pictures."""
    return Rows([Row("", (line.strip(),), (), None, {}) for line in text.split("\n") if line.strip()])


def _separator(text: str) -> str:
    """The separator under which the first line holds most of the names that are understood."""
    line = first_line(text)
    return max(_SEPARATORS, key=lambda mark: (_understood(line, mark), line.count(mark)))


def _understood(line: str, mark: str, pictured: bool = True) -> int:
    """How many parts of a table a line of column names tells; 0 without a column of pictures (or else of sentences)."""
    try:
        roles = _Roles.of(name.strip() for name in next(csv.reader([line], delimiter=mark), []))
    except csv.Error:
        return 0
    useful = roles.image or (roles.texts and not pictured)
    return sum(name is not None for name in astuple(roles)) if useful else 0


def read_csv(file: Path, text: str, pictured: bool = True, bare: bool = False) -> Rows:
    """A table in text with RFC 4180's quotes: open_clip's, Kaggle's, a spreadsheet's.

    Not ``pictured``: a column of sentences will do, and images are then "". ``bare``: any columns will, and an empty
    field in that of pictures is no picture.
    """
    mark = _separator(text)
    padded = f"{mark} " in first_line(text)  # "image, caption"
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True, skipinitialspace=padded)
    try:
        header = [name.strip() for name in next(line for line in lines if line)]
        roles = _Roles.of(header)
        _check_header(file, header, roles, pictured, bare)
        cells = list(_csv_lines(file, lines, header, roles, bare))
    except csv.Error as error:
        fault = f"{error}; is a double quote left open? Inside a quoted field it is written twice"
        raise DataError(f"{file}, line {lines.line_num} is not CSV: {fault}") from error
    columns: dict[str, list[Any]] = {name: list(column) for name, column in zip(header, zip(*cells))}  # noqa: B905
    columns.pop("", None)  # the row number that pandas writes
    images = columns.pop(roles.image, []) if roles.image else [""] * len(cells)
    for name, values in columns.items():
        meant = name in (roles.texts, roles.labels, roles.split)
        columns[name] = [value or None for value in values] if meant else _numbers(values)
    rows = _table_rows(roles, images, columns)
    if roles.split is None and (splits := flickr_splits(file)):
        rows = [row._replace(split=splits.get(_base_name(str(row.image)))) for row in rows]
    return Rows(rows, places(file))


def _csv_lines(file: Path, lines: Any, header: list[str], roles: _Roles, bare: bool) -> Iterator[list[str]]:
    at = header.index(roles.image) if roles.image else None
    for line in lines:
        if not line:
            continue
        if len(line) != len(header):
            fault = f"{len(line)} fields instead of {len(header)}: put what holds a separator into double quotes"
            raise DataError(f"{file}, line {lines.line_num}: {fault}")
        if at is not None and not line[at] and not bare:
            raise DataError(f"{file}, line {lines.line_num}: no picture under {roles.image!r}")
        yield line


def _check_header(file: Path, header: list[str], roles: _Roles, pictured: bool, bare: bool) -> None:
    found = f"{', '.join(map(one_line, header)):.300}"
    if roles.image is None and "url" in header:
        raise DataError(
            f"{file} lists addresses of pictures, not files: its columns are {found}; "
            "read the .tar files that img2dataset wrote beside it, or their folder"
        )
    if roles.image is None and (pictured or roles.texts is None) and not bare:
        raise DataError(
            f"{file} has no column that names pictures: its columns are {found}; understood are "
            f"{', '.join(IMAGE_NAMES)} (pictures), {', '.join(TEXT_NAMES)} (captions), "
            f"{', '.join(LABEL_NAMES)} (labels), split"
        )
    if len(set(header)) < len(header):
        raise DataError(f"{file} has two columns of one name: {found}")


def _numbers(values: list[str]) -> list[Any]:
    """A column of numbers, where all of its cells are such (or empty: None); any other stays text."""
    for form, convert in ((_INTEGER, int), (_NUMBER, float)):
        if all(not value or form.fullmatch(value) for value in values) and any(values):
            return [convert(value) if value else None for value in values]
    return values


def is_parquet(_: Path, head: bytes) -> bool:
    """Whether a file is Parquet, by its first bytes."""
    return head.startswith(b"PAR1")


def read_parquet(file: Path, pictured: bool = True, bare: bool = False) -> Rows:
    """A Parquet file: pictures by name, as bytes, or both (the struct of Hugging Face's datasets).

    Not ``pictured``: a column of sentences will do, and images are then "". ``bare``: any columns will, and
    null in that of pictures is no picture.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file).read()
        header = table.column_names
        kinds = [table.schema.field(number).type for number in range(len(header))]
        holding = [
            name
            for name, kind in zip(header, kinds, strict=True)
            if pa.types.is_struct(kind) or kind in (pa.binary(), pa.large_binary())
        ]
        roles = _Roles.of(header)
        roles = replace(
            roles, image=_Roles.of(holding).image or roles.image
        )  # what holds pictures before what names them
        _check_header(file, header, roles, pictured, bare)
        columns: dict[str, list[Any]] = {name: table[name].to_pylist() for name in header}
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{file} is damaged, or no Parquet file: {' '.join(str(error).split())}") from error
    if roles.labels and (classes := _hugging_face_classes(table.schema.metadata, roles.labels)):
        columns[roles.labels] = [class_name(file, value, classes) for value in columns[roles.labels]]
    if roles.image is None:
        return Rows(_table_rows(roles, [""] * table.num_rows, columns))
    others = {name: values for name, values in columns.items() if name != roles.image}
    names = others.get(_Roles.of(others).image or "", [None] * table.num_rows)
    images = [
        "" if bare and value in (None, "") else _picture(file, number, value, name)
        for number, (value, name) in enumerate(zip(columns[roles.image], names, strict=True), 1)
    ]
    return Rows(_table_rows(roles, images, others), places(file))


def _picture(file: Path, number: int, value: Any, name: Any) -> str | PictureBytes:
    """What a cell says: a path, bytes, or {bytes, path} with either."""
    data, path = value, name
    if isinstance(value, dict):
        data = value.get("path") if value.get("bytes") is None else value["bytes"]
        path = value.get("path") or name
    if isinstance(data, bytes) and data:
        return PictureBytes(_base_name(str(path or "")) or f"{file.stem}-{number}", data)
    if isinstance(data, str) and data:
        return data
    raise DataError(f"{file}, row {number}: expected a picture's path or its bytes, not {value!r:.50}")


def _base_name(path: str) -> str:
    return path.rpartition("/")[2]


def _hugging_face_classes(metadata: Mapping[bytes, bytes] | None, column: str) -> list[str]:
    """The names behind a column of ClassLabel, which stores numbers; none, if it is no such column."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return []
    return names if isinstance(names, list) else []
