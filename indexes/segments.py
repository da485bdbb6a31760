"""Rows and their Parquet files: what a segment holds, how it is written, and how it is read without Python objects."""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from indexes import runtime
from indexes.columns import aligned, check_names, decode_columns, encode_columns, is_extra, read_parquet, storable
from indexes.manifest import DeletedRef, SegmentRef, damaged, replacing, sha256_of
from indexes.vectors import Vectors

_GROUP = 2048  # rows read at a time when a few are wanted: 2 MB of embeddings at 512 dimensions
_SEAL, _STRING, _UNSEALED = b"diptych.sha256", b"\x18@", b"0" * 64  # the second is Thrift's for a string of 64 bytes
_TAIL = 8  # bytes behind a Parquet file's footer: its length, and a mark
_SEALED = re.compile(_STRING + rb"[0-9a-f]{64}")
_ONE_PAGE = {b"diptych.embedding": b"one page for each row group"}
_SIGN_AND_HALF = np.int32(0x8FFFE000 - (1 << 32))  # float32's sign, and where the other 15 bits of a float16 go
_EXPONENT = np.float32(2.0**112)  # float32 counts exponents from -127, float16 from -15
_INFINITE = 65_536
ESCAPE = "surrogatepass" if os.name == "nt" else "surrogateescape"  # as Python itself reads file names

ID = pa.field("id", pa.int64(), nullable=False)
_NAME = [pa.field("path", pa.string(), nullable=False), pa.field("path_bytes", pa.binary())]
_ROW = [
    ID,
    pa.field("kind", pa.string(), nullable=False),
    *_NAME,
    pa.field("size", pa.int64(), nullable=False),
    pa.field("mtime_ns", pa.int64(), nullable=False),
    pa.field("hash", pa.string(), nullable=False),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("taken_at", pa.timestamp("us")),
    pa.field("latitude", pa.float64()),
    pa.field("longitude", pa.float64()),
    pa.field("caption", pa.string()),
]
ROW_SCHEMA = pa.schema(_ROW)
NO_COLUMNS = pa.schema([])
_TAKEN = frozenset({*ROW_SCHEMA.names, "embedding"})
_FAILURE_SCHEMA = pa.schema(
    [
        *_NAME,
        pa.field("reason", pa.string(), nullable=False),
        pa.field("when", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("mtime_ns", pa.int64(), nullable=False),
    ]
)
_DELETED_SCHEMA = pa.schema([pa.field("id", pa.int64(), nullable=False)])


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is known of one picture or text.

    Attributes:
        path: its name relative to the root, with ``/``, as Python has it (surrogate escapes where it is not UTF-8).
        kind: image or text.
        size: bytes.
        mtime_ns: when the file was changed last.
        hash: of the file's content, in hexadecimal digits.
        width: pixels, upright.
        height: pixels, upright.
        taken_at: by the camera's clock, without a time zone.
        latitude: degrees north.
        longitude: degrees east.
        caption: a sentence about it.
        columns: whatever else is known, by names that are none of these nor ``id``, ``path_bytes`` or ``embedding``:
            bool, int, float, str, datetime or date, lists of str. See `indexes.columns`; None is the same as nothing,
            and a list comes back as a list.

    """

    path: str
    kind: str = "image"
    size: int
    mtime_ns: int
    hash: str
    width: int | None = None
    height: int | None = None
    taken_at: datetime | None = None
    latitude: float | None = None
    longitude: float | None = None
    caption: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Failure:
    """A file that could not be read, why, and what it was like then: it is tried again when size or time change.

    ``when`` carries a time zone; it comes back in UTC.
    """

    path: str
    reason: str
    when: datetime
    size: int
    mtime_ns: int


def encode_rows(rows: dict[int, Row]) -> pa.Table:
    """Turn rows by id into columns, without embeddings; extra columns come last.

    Raises:
        ValueError, TypeError: a value has a wrong type.
        ColumnError: an extra column has a name that is taken, or a value of a kind that no column holds.

    """
    for row in rows.values():
        check_names(row.columns, _TAKEN)
    fields = [{**vars(row), "id": i, **_name(row.path), "caption": _text(row.caption)} for i, row in rows.items()]
    table = pa.Table.from_pylist(fields, schema=ROW_SCHEMA)
    extra = encode_columns([row.columns for row in rows.values()])
    for name in extra.column_names:
        table = table.append_column(name, extra[name])
    return table


def check_columns(rows: pa.Table) -> pa.Table:
    """Bring columns from elsewhere to the schema of rows without `id`, extra ones last; see Writer.add_many.

    Raises:
        ValueError, TypeError: a column is missing, there twice, of a wrong type, or null where it may not be.
        ColumnError: an extra column has a name that is taken.

    """
    from indexes.tables import extras

    given = rows.column_names
    if twice := sorted({name for name in given if given.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)}: a column must not be there twice")
    known = ROW_SCHEMA.remove(0)
    others = [name for name in given if name not in known.names]
    check_names(others, _TAKEN)
    columns = []
    for own in known:
        if own.name in given:
            try:
                column = rows[own.name].cast(own.type)
            except pa.ArrowNotImplementedError as error:
                raise TypeError(f"the column {own.name} cannot be made {own.type}: {error}") from error
        elif own.name == "kind":
            column = pa.repeat("image", len(rows))
        else:
            column = pa.nulls(len(rows), own.type)
        if column.null_count and not own.nullable:
            raise ValueError(f"the column {own.name} must be there, and without nulls")
        columns.append(column)
    extra = extras(rows.select(others), ()) if others else NO_COLUMNS.empty_table()
    return pa.table([*columns, *extra.columns], schema=pa.schema([*known, *extra.schema]))


def decode_row(rows: pa.Table, position: int) -> Row:
    """Turn one row of a table back into a Row."""
    one = rows.slice(position, 1)
    fields = one.select(ROW_SCHEMA.names).drop_columns(["id", "path_bytes"]).to_pylist()[0]
    extra = decode_columns(one.drop_columns(ROW_SCHEMA.names))[0] if one.num_columns > len(ROW_SCHEMA) else {}
    return Row(**{**fields, "path": names(one)[0], "columns": extra})


def names(table: pa.Table) -> list[str]:
    """Restore the exact file names of a table's rows, as the operating system takes them."""
    out: list[str] = table["path"].to_pylist()
    raw = table["path_bytes"]
    if raw.null_count < len(raw):
        for i in np.flatnonzero(raw.is_valid().to_numpy()):
            out[i] = raw[int(i)].as_py().decode("utf-8", ESCAPE)
    return out


def exact_name(fields: Mapping[str, Any]) -> str:
    """Restore the exact file name of one row, given by the names of its columns."""
    raw: bytes | None = fields["path_bytes"]
    name: str = fields["path"]
    return name if raw is None else raw.decode("utf-8", ESCAPE)


def exact_names(table: pa.Table) -> pa.ChunkedArray:
    """Get the exact file names of a table's rows as bytes (large_binary), without Python objects."""
    import pyarrow.compute as pc

    shown, raw = table["path"].cast(pa.large_binary()), table["path_bytes"]
    return shown if raw.null_count == len(raw) else pc.coalesce(raw.cast(pa.large_binary()), shown)


def write_failures(file: Path, failures: Iterable[Failure]) -> None:
    """Replace the file of failures. Raises OSError."""
    import pyarrow.parquet as pq

    fields = [{**asdict(failure), **_name(failure.path), "reason": _text(failure.reason)} for failure in failures]
    buffer = pa.BufferOutputStream()
    with pq.ParquetWriter(buffer, _FAILURE_SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(fields, schema=_FAILURE_SCHEMA))
        writer.add_key_value_metadata({_SEAL: _UNSEALED})
    with replacing(file) as stream:
        stream.write(_sealed(buffer.getvalue().to_pybytes()))


def read_failures(file: Path) -> list[Failure]:
    """Read the file of failures; none where it is missing. Raises StoreCorrupt."""
    with _reading(file):
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return []
        # Releases before the seal wrote none; where its name is damaged its value is not, and the other way round.
        if (_SEAL in content or _SEALED.search(content)) and _sealed(content) != content:
            raise ValueError("its content is not what was written")
        table = aligned(read_parquet(pa.BufferReader(content)), _FAILURE_SCHEMA)
        fields = table.drop_columns(["path_bytes"]).to_pylist()
        return [Failure(**{**one, "path": name}) for one, name in zip(fields, names(table), strict=True)]


def _sealed(content: bytes) -> bytes:
    """Write the SHA-256 of a Parquet file into its own metadata, computed with zeros in its place.

    It is found without the help of Parquet, which leaves out metadata that it does not understand. Raises ValueError.
    """
    at = content.rindex(_SEAL + _STRING) + len(_SEAL + _STRING)
    end = at + len(_UNSEALED)
    digest = hashlib.sha256(content[:at] + _UNSEALED + content[end:]).hexdigest()
    return content[:at] + digest.encode("ascii") + content[end:]


def extra_columns(schema: pa.Schema) -> pa.Schema:
    """What a table or a segment has beside the columns of every index."""
    return pa.schema([field for field in schema if field.name not in _TAKEN])


def with_columns(table: pa.Table, extra: pa.Schema) -> pa.Table:
    """Rows, with or without embeddings, with exactly these extra columns, which `unified` made of theirs and others."""
    schema = pa.schema([*ROW_SCHEMA, *extra, *(f for f in table.schema if f.name == "embedding")])
    return aligned(table, schema)


def write_segment(file: Path, tables: Iterable[pa.Table], dim: int, extra: pa.Schema = NO_COLUMNS) -> SegmentRef:
    """Write rows with their embeddings as one immutable file. Raises OSError, and then there is no file.

    Args:
        file: where.
        tables: of `encode_rows` and `with_embeddings`, or of other segments.
        dim: the width of the embeddings.
        extra: what `unified` makes of the tables' extra columns.

    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    schema = _segment_schema(dim, extra)
    rows = texts = 0
    columns = [field.name for field in (*_ROW, *extra)] + [f"{field.name}.list.element" for field in extra]
    with (
        replacing(file) as stream,
        pq.ParquetWriter(
            stream,
            schema,
            # Embeddings are noise to a compressor, and uncompressed ones are read at the speed of memory.
            compression={**dict.fromkeys(columns, "zstd"), "embedding.list.element": "none"},
            use_dictionary=["kind"],
            write_statistics=["id"],
            write_page_checksum=True,
            data_page_size=1 << 30,  # one page for each row group: its embeddings lie in one piece, see Segment.halves
        ) as writer,
    ):
        writer.add_key_value_metadata(_ONE_PAGE)
        for table in _regrouped(with_columns(table, extra) for table in tables):
            writer.write_table(table.cast(schema), row_group_size=_GROUP)
            rows += len(table)
            texts += pc.sum(pc.equal(table["kind"], "text")).as_py() or 0
    with file.open("rb") as written:
        written.seek(-_TAIL, os.SEEK_END)
        length = footer_length(written.read())
        written.seek(-length, os.SEEK_END)
        footer = hashlib.sha256(written.read()).hexdigest()
    return SegmentRef(file.name, rows, sha256_of(file), texts, footer)


def footer_length(tail: bytes) -> int:
    """How many bytes at the end of a Parquet file are its footer, its length and its mark; from the last eight."""
    return int.from_bytes(tail[:4], "little") + _TAIL


def with_embeddings(rows: pa.Table, halves: NDArray[np.float16]) -> pa.Table:
    """Add the column of embeddings (N, D) to columns of rows."""
    field = _segment_schema(halves.shape[1]).field("embedding")
    return rows.append_column(field, pa.FixedSizeListArray.from_arrays(pa.array(halves.ravel()), type=field.type))


def write_deleted(file: Path, ids: NDArray[np.int64]) -> DeletedRef:
    """Write the ids of deleted rows, which rise, as one immutable file. Raises OSError, and then there is no file."""
    import pyarrow.parquet as pq

    with replacing(file) as stream:
        pq.write_table(
            pa.table([pa.array(ids)], schema=_DELETED_SCHEMA),
            stream,
            use_dictionary=False,
            column_encoding={"id": "DELTA_BINARY_PACKED"},  # neighbours: a byte or two for each
        )
    return DeletedRef(file.name, len(ids), sha256_of(file))


def read_deleted(file: Path, ref: DeletedRef) -> NDArray[np.int64]:
    """Read what `write_deleted` wrote. Raises FileNotFoundError, StoreCorrupt."""
    with file.open("rb") as stream, _reading(file):
        content = stream.read()
        if hashlib.sha256(content).hexdigest() != ref.sha256:  # else deleted rows would come back, and others go
            raise ValueError("its content is not what was written")
        table = aligned(read_parquet(pa.BufferReader(content)), _DELETED_SCHEMA)
        return table["id"].to_numpy()  # type: ignore[no-any-return]


class Segment:
    """One segment, held open: what was opened stays readable when a writer deletes the file.

    Reading raises StoreCorrupt with the file's name when it is damaged.
    """

    def __init__(self, file: Path, ref: SegmentRef, dim: int) -> None:
        """Open and map the file. Raises OSError."""
        self.file, self.rows, self._footer, self._dim = file, ref.rows, ref.footer, dim
        self._stream = pa.OSFile(os.fsencode(file))  # bytes: Arrow takes no names with surrogate escapes
        with file.open("rb") as opened:  # an empty file cannot be mapped; reading it says what is wrong
            empty = not os.fstat(opened.fileno()).st_size
            self._map = b"" if empty else mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        _advise(self._map, "MADV_RANDOM")  # else megabytes are read around every single row

    @functools.cached_property
    def _metadata(self) -> Any:
        import pyarrow.parquet as pq

        with _reading(self.file):
            self._check_footer()
            opened = pq.ParquetFile(self._stream)
            if opened.metadata.num_rows != self.rows:
                raise ValueError(f"{opened.metadata.num_rows} rows instead of {self.rows}")
            extra = list(opened.schema_arrow)[len(_ROW) : -1]
            expected = _segment_schema(self._dim, pa.schema(extra))
            if not opened.schema_arrow.equals(expected) or not is_extra(extra, _TAKEN):
                raise ValueError("other columns than expected")
            return opened.metadata

    def _check_footer(self) -> None:
        """Look for damage in what Arrow believes: asked for a codec that does not exist, it ends the process."""
        self._check_size()
        footer = self._map[-footer_length(self._map[-_TAIL:]) :]
        if self._footer and hashlib.sha256(footer).hexdigest() != self._footer:
            raise ValueError("its footer is not what was written")

    def _check_size(self) -> None:
        """Touching what is not there any more kills the process."""
        if isinstance(self._map, mmap.mmap) and self._map.size() != len(self._map):
            raise ValueError("its size has changed")

    @functools.cached_property
    def extra(self) -> pa.Schema:
        """The columns beside those of every index."""
        with _reading(self.file):
            return extra_columns(self._open().schema_arrow)

    @functools.cached_property
    def group_starts(self) -> NDArray[np.int64]:
        """The row that each row group begins with, and at the end the number of rows."""
        counts = [self._metadata.row_group(i).num_rows for i in range(self._metadata.num_row_groups)]
        return np.cumsum([0, *counts], dtype=np.int64)

    @functools.cached_property
    def group_begins(self) -> list[int]:
        """The same as a list."""
        begins: list[int] = self.group_starts.tolist()
        return begins

    @functools.cached_property
    def ids(self) -> NDArray[np.int64]:
        """The id of each row, rising. They are kept, since every commit asks for them."""
        # Not Arrow's to_numpy, which imports pandas, where that is installed.
        chunks = [np.from_dlpack(chunk) for chunk in self.columns("id")["id"].chunks]
        return np.concatenate([np.empty(0, np.int64), *chunks])

    def columns(self, *names: str) -> pa.Table:
        """All rows of some columns."""
        with _reading(self.file):
            return _of_length(self._open().read(list(names), use_threads=False), self.rows)

    def group(self, i: int, *names: str) -> pa.Table:
        """One row group: some columns, or all."""
        with _reading(self.file):
            return _of_length(
                self._open().read_row_group(i, columns=list(names) or None, use_threads=False), self._rows_of(i)
            )

    def facts(self, i: int) -> pa.Table:
        """One row group, all columns but the embeddings."""
        with _reading(self.file):
            columns = [*ROW_SCHEMA.names, *self.extra.names]
            return _of_length(self._open().read_row_group(i, columns=columns, use_threads=False), self._rows_of(i))

    def _rows_of(self, group: int) -> int:
        return int(self.group_starts[group + 1] - self.group_starts[group])

    def halves(self, i: int) -> NDArray[np.float16]:
        """The embeddings of one row group as stored: (n, D) float16, a view of the mapped file."""
        with _reading(self.file):
            data, offsets = self._located()
            rows = self._rows_of(i)
            if data is self._map:
                _advise(data, "MADV_WILLNEED", int(offsets[i]), 8 * self._dim * rows)  # this group and those behind it
            return np.frombuffer(data, np.float16, rows * self._dim, int(offsets[i])).reshape(rows, self._dim)

    def take(self, rows: NDArray[np.int64]) -> Vectors:
        """The embeddings of some rows, in any order, as unit rows (n, D). Only their pages of the disk are read."""
        with _reading(self.file):
            data, offsets = self._located()
            group = np.searchsorted(self.group_starts, rows, side="right") - 1
            width = 2 * self._dim  # bytes
            at = offsets[group] + (rows - self.group_starts[group]) * width
            # Every place of the file as the beginning of a row, so that one indexing copies them all.
            places = np.ndarray((max(0, len(data) - width + 1),), np.dtype((np.void, width)), data, strides=(1,))
            halves = places[at].view(np.float16).reshape(len(rows), self._dim)
        return unit_rows(halves, self.file)

    def _located(self) -> tuple[Any, NDArray[np.int64]]:
        """`_embeddings`, unless the file was cut short since."""
        self._check_size()
        return self._embeddings

    @functools.cached_property
    def _embeddings(self) -> tuple[Any, NDArray[np.int64]]:
        """The bytes that hold the embeddings, and where in them those of each row group begin.

        Parquet keeps a page of values that are never null, neither compressed nor in a dictionary, as one array at the
        end of the page (https://parquet.apache.org/docs/file-format/data-pages/).
        """
        groups = range(len(self.group_starts) - 1)
        chunks = [self._metadata.row_group(i).column(self._metadata.num_columns - 1) for i in groups]
        if _ONE_PAGE.items() <= (self._metadata.metadata or {}).items():  # never compressed: see write_segment
            ends = np.array([c.data_page_offset + c.total_compressed_size for c in chunks], dtype=np.int64)
            return self._map, ends - 2 * self._dim * np.diff(self.group_starts)
        columns = [self._open().read_row_group(i, columns=["embedding"])["embedding"] for i in groups]
        parts = [chunk.flatten().to_numpy(zero_copy_only=True) for column in columns for chunk in column.chunks]
        return np.concatenate([np.empty(0, np.float16), *parts]).tobytes(), 2 * self._dim * self.group_starts[:-1]

    def _open(self) -> Any:
        import pyarrow.parquet as pq

        # Cheap; one for each thread that reads.
        return pq.ParquetFile(self._stream, metadata=self._metadata, page_checksum_verification=True)


def _advise(mapped: Any, advice: str, start: int = 0, length: int = 0) -> None:
    """Tell the system how a mapped file, or a part of it, is going to be read; some systems cannot be told."""
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, advice):
        begin = start // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(getattr(mmap, advice), begin, start + length - begin if length else len(mapped))


def read_vectors(segments: Sequence[Segment], dim: int) -> Vectors:
    """Read the embeddings of whole segments, one after the other, as unit rows. Raises StoreCorrupt."""
    out = np.empty((sum(segment.rows for segment in segments), dim), dtype=np.float32)
    starts = np.cumsum([0, *(segment.rows for segment in segments)])
    tasks = [
        (segment, i, start + int(segment.group_starts[i]))
        for segment, start in zip(segments, starts, strict=False)
        for i in range(len(segment.group_starts) - 1)
    ]

    def read(task: tuple[Segment, int, int]) -> None:
        segment, i, start = task
        halves = segment.halves(i)
        out[start : start + len(halves)] = unit_rows(halves, segment.file)

    if len(tasks) <= 2:
        for task in tasks:
            read(task)
    else:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(runtime.thread_count()) as pool:
            list(pool.map(read, tasks))
    return out


def widened(halves: NDArray[np.float16]) -> NDArray[np.float32]:
    """Float16 as float32, the same numbers; infinities and NaN become numbers of at least 65,536.

    Six times as fast as ``astype``, for which NumPy has no vector instructions on most processors: sign and the rest
    are shifted to where float32 has them, and the exponent is put right by a product, which is exact.
    """
    bits = halves.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= _SIGN_AND_HALF
    wide = bits.view(np.float32)
    wide *= _EXPONENT
    return wide


def unit_rows(halves: NDArray[np.float16], file: Path) -> Vectors:
    """Widen stored embeddings to float32 and undo the rounding of their length. Raises StoreCorrupt naming the file."""
    wide = widened(halves)
    lengths = np.sqrt(np.einsum("nd,nd->n", wide, wide))
    if not ((lengths > 0) & (lengths < _INFINITE)).all():
        raise damaged(file, "a vector is zero or not a number")
    wide /= lengths[:, None]
    return wide


def _of_length(table: pa.Table, rows: int) -> pa.Table:
    """Pass a table on. A damaged page may come back short, where its checksum, that of its content, is right."""
    if any(len(column) != rows for column in table.columns):
        raise ValueError(f"{len(table)} rows instead of {rows}")
    return table


def _segment_schema(dim: int, extra: pa.Schema = NO_COLUMNS) -> pa.Schema:
    item = pa.field("element", pa.float16(), nullable=False)
    return pa.schema([*ROW_SCHEMA, *extra, pa.field("embedding", pa.list_(item, dim), nullable=False)])


def _regrouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Join and cut tables so that each but the last fills a whole number of row groups."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        full = sum(map(len, waiting)) // _GROUP * _GROUP
        if full:
            joined = pa.concat_tables(waiting)
            yield joined.slice(0, full)
            waiting = [joined.slice(full)]
    if any(map(len, waiting)):
        yield pa.concat_tables(waiting)


def _name(path: str) -> dict[str, str | bytes | None]:
    """Make the two columns of a name: one to read, and the exact bytes where those are not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raw = path.encode("utf-8", ESCAPE)
        return {"path": raw.decode("utf-8", "replace"), "path_bytes": raw}
    return {"path": path, "path_bytes": None}


def _text(text: str | None) -> str | None:
    return None if text is None else storable(text)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn what Arrow and the system say of a file into StoreCorrupt."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError, IndexError) as error:
        raise damaged(file, error) from error
