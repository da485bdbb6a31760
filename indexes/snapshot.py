"""One state of an index folder, for reading: what it holds does not change while others write.

A *slot* is a row as it lies in the segments, deleted ones too; a *position* counts the rows that are left, and is what
callers see. Both rise with the id.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from indexes.columns import aligned, numbers, unified
from indexes.errors import StoreCorrupt, StoreError
from indexes.manifest import ANN_FILE, SEGMENTS, Manifest
from indexes.segments import ROW_SCHEMA, Row, Segment, decode_row, names, read_deleted, read_vectors, unit_rows
from indexes.vectors import Hits, VectorIndex, Vectors, exact_search, ranked, rescored

_SINGLE = 64  # rows at most that are read one by one; Arrow's `take` also imports pyarrow.compute, which takes 25 ms
_HELD = 256 << 20  # bytes of vectors, widened to float32, that exact search holds; more are read a block at a time
_BLOCK = 16_384  # rows

Cell: TypeAlias = Callable[[int], Any]  # the value of a row, in one column of a row group


def joined(ids: NDArray[np.int64], more: NDArray[np.int64]) -> NDArray[np.int64]:
    """Join two sets of ids that rise and share none. A commit may do so: np.union1d takes 50 ms for 200,000 ids."""
    return np.insert(ids, np.searchsorted(ids, more), more)


class Snapshot:
    """The rows and vectors of one manifest. All segments are opened at once, so that a later cleaning does no harm."""

    def __init__(self, folder: Path, manifest: Manifest, before: Snapshot | None = None) -> None:
        """Open what the manifest names; what `before` holds open is taken over. Raises OSError."""
        # By name and checksum: an index that was deleted and made anew has the same names.
        held = dict(zip(before.manifest.segments, before.segments, strict=True)) if before else {}
        dim = manifest.model.dim
        self.folder = folder
        self.manifest: Manifest = manifest
        self.segments: list[Segment] = [
            held.get(ref) or Segment(folder / SEGMENTS / ref.file, ref, dim) for ref in manifest.segments
        ]
        self._starts = np.cumsum([0, *(segment.rows for segment in self.segments)], dtype=np.int64)
        self._begins: list[int] = self._starts.tolist()  # for single rows, of which an array is slow to search
        self._columns: dict[str, pa.ChunkedArray] = {}
        self._tables: dict[tuple[str, ...], pa.Table] = {}  # of some of them
        self._groups: dict[tuple[Segment, int, tuple[str, ...]], Sequence[Cell | None]] = {}  # see _cells
        # Row groups that single rows were read from lately: those of one commit serve the next as well.
        self._recent: Callable[[Segment, int], pa.Table] = (
            before._recent if before else functools.lru_cache(8)(Segment.facts)
        )
        self.filed: NDArray[np.int64] = np.empty(0, np.int64)  # the ids in the file of deleted rows
        if before and before.manifest.deleted == manifest.deleted:
            self.filed = before.filed
        elif manifest.deleted:
            self.filed = read_deleted(folder / manifest.deleted.file, manifest.deleted)

    @classmethod
    def open(cls, folder: Path, before: Snapshot | None = None) -> Snapshot:
        """Open what the folder holds now. Raises what Manifest.read does, StoreCorrupt for a missing segment."""
        while True:
            manifest = Manifest.read(folder)
            try:
                return cls(folder, manifest, before)
            except FileNotFoundError as error:
                if Manifest.read(folder) == manifest:  # else: merged and deleted by a writer just now
                    files = [folder / SEGMENTS / segment.file for segment in manifest.segments]
                    files += [folder / manifest.deleted.file] if manifest.deleted else []
                    file = next((file for file in files if not file.exists()), files[0])
                    from indexes.damage import missing

                    raise StoreCorrupt(missing(folder, manifest, file)) from error
            except OSError as error:
                raise StoreError(f"the index at {folder} cannot be read: {error}") from error

    @functools.cached_property
    def slot_ids(self) -> NDArray[np.int64]:
        """The id in each slot, rising."""
        return np.concatenate([np.empty(0, np.int64), *(segment.ids for segment in self.segments)])

    @functools.cached_property
    def dead(self) -> NDArray[np.int64]:
        """The ids of deleted rows that are still in a segment, rising."""
        return joined(self.filed, np.array(self.manifest.tombstones, dtype=np.int64))

    @functools.cached_property
    def live(self) -> NDArray[np.int64]:
        """The slot of each position."""
        if not len(self.dead):
            return np.arange(self._starts[-1])
        return np.flatnonzero(~np.isin(self.slot_ids, self.dead))

    @functools.cached_property
    def ids(self) -> NDArray[np.int64]:
        """The id at each position, rising."""
        return self.slot_ids[self.live]

    def position(self, row_id: int) -> int | None:
        """Where the row of an id is, if it is there."""
        i = int(np.searchsorted(self.ids, row_id))
        return i if i < len(self.ids) and self.ids[i] == row_id else None

    @functools.cached_property
    def rows(self) -> pa.Table:
        """All columns but the embeddings, by position."""
        return self.columns(*self.schema.names)

    def row(self, position: int) -> Row:
        """One row; only its row group is read."""
        segment, group, row = self._locate(int(self.live[position]))
        return decode_row(aligned(self._recent(segment, group).slice(row, 1), self.schema), 0)

    @functools.cached_property
    def schema(self) -> pa.Schema:
        """Names and types of the columns of `rows`."""
        return pa.schema([*ROW_SCHEMA, *unified(segment.extra for segment in self.segments)])

    @functools.cached_property
    def texts(self) -> NDArray[np.bool_]:
        """Which positions hold a sentence, and not a picture."""
        if not any(segment.texts for segment in self.manifest.segments):
            return np.zeros(len(self.live), dtype=np.bool_)
        import pyarrow.compute as pc

        found: NDArray[np.bool_] = pc.equal(self.columns("kind")["kind"], "text").to_numpy()
        return found

    @functools.cached_property
    def text_count(self) -> int:
        """How many positions hold a sentence."""
        return int(np.count_nonzero(self.texts))

    def columns(self, *names: str) -> pa.Table:
        """Some columns of `rows`; what was read once is kept."""
        new = [name for name in names if name not in self._columns]
        if new:
            schema = self._schema_of(new)
            tables = [aligned(segment.columns(*new), schema) for segment in self.segments]
            table = _joined(tables, schema).combine_chunks()
            table = table.take(numbers(self.live)) if len(self.dead) else table
            self._columns |= zip(new, table.columns, strict=True)
        if names not in self._tables:  # making one costs more than finding ten rows in it
            schema = self._schema_of(names)
            self._tables[names] = pa.table([self._columns[name] for name in names], schema=schema)
        return self._tables[names]

    def _schema_of(self, names: Sequence[str]) -> pa.Schema:
        return pa.schema([self.schema.field(name) for name in names])

    def records(self, positions: NDArray[np.int64], *names: str) -> list[dict[str, Any]]:
        """Some columns of some rows, by name. Where the rows are few, only their row groups are read, and kept."""
        if len(positions) > _SINGLE:
            found: list[dict[str, Any]] = self.columns(*names).take(numbers(positions)).to_pylist()
            return found
        return [
            {
                name: cell(row) if cell else None
                for name, cell in zip(names, self._cells(segment, i, names), strict=True)
            }
            for segment, i, row in map(self._locate, self.live[positions].tolist())
        ]

    def _cells(self, segment: Segment, i: int, names: tuple[str, ...]) -> Sequence[Cell | None]:
        """Some columns of a row group, each as what gives the value of a row; None for those that hold nothing."""
        key = (segment, i, names)
        if key not in self._groups:
            table = aligned(segment.group(i, *names), self._schema_of(names)).combine_chunks()
            self._groups[key] = [_cell(column.chunk(0)) if len(column) else None for column in table.columns]
        return self._groups[key]

    @functools.cached_property
    def paths(self) -> list[str]:
        """The exact file names, by position."""
        return names(self.columns("path", "path_bytes"))

    @functools.cached_property
    def vectors(self) -> Vectors:
        """Unit rows, by position."""
        stored = read_vectors(self.segments, self.manifest.model.dim)
        return stored[self.live] if len(self.dead) else stored

    def stored(self, slots: NDArray[np.int64]) -> Vectors:
        """Read the vectors in some slots, in any order, as unit rows. Only their part of the files is read."""
        if len(self.segments) == 1:
            return self.segments[0].take(slots)
        out = np.empty((len(slots), self.manifest.model.dim), dtype=np.float32)
        inside = np.searchsorted(self._starts, slots, side="right") - 1
        for i in np.unique(inside):
            mine = inside == i
            out[mine] = self.segments[i].take(slots[mine] - self._starts[i])
        return out

    def halves(self, position: int) -> NDArray[np.float16]:
        """One vector (D,) as it is stored."""
        segment, group, row = self._locate(int(self.live[position]))
        half: NDArray[np.float16] = segment.halves(group)[row].copy()
        return half

    def _locate(self, slot: int) -> tuple[Segment, int, int]:
        """Segment, row group and row in it of a slot."""
        i = bisect_right(self._begins, slot) - 1
        segment, row = self.segments[i], slot - self._begins[i]
        group = bisect_right(segment.group_begins, row) - 1
        return segment, group, row - segment.group_begins[group]

    def blocks(self, first: int = 0) -> Iterator[tuple[int, Vectors]]:
        """All vectors, deleted ones too, a row group at a time from a segment on: first slot and unit rows."""
        for segment, start in zip(self.segments[first:], self._starts[first:], strict=False):
            for i, row in enumerate(segment.group_starts[:-1]):
                yield int(start + row), unit_rows(segment.halves(i), segment.file)

    @functools.cached_property
    def covered(self) -> int:
        """How many positions the FAISS file covers: the first ones. 0 where there is none, or it cannot be used."""
        return int(np.searchsorted(self.live, self.manifest.ann.rows)) if self._ann else 0  # type: ignore[union-attr]

    def search(self, queries: Vectors, k: int, allowed: NDArray[np.bool_] | None) -> Hits:
        """Search by position; see Store.search."""
        ann, inside = self._ann, self.covered
        if ann is None or not inside:
            return self.exact(queries, k, allowed)
        if allowed is not None:
            inside = int(np.count_nonzero(allowed[: self.covered]))
        fetch = self.fetch(k)
        if inside <= fetch or inside**2 <= fetch * self.covered:  # the index would look at as many as qualify
            return self.exact(queries, k, allowed)
        near = ann.candidates(queries, min(k, inside), fetch, self._slots_allowed(allowed))
        if any(len(slots) < min(k, inside) for slots, _ in near):  # it lost its way: never fewer than there are
            return self.exact(queries, k, allowed)
        newer = None
        if len(self._newer):
            newer = exact_search(self._newer, queries, k, None if allowed is None else allowed[self.covered :])

        def candidates(i: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
            slots = np.sort(near[i][0])
            slots, scores = rescored(queries[i], slots, self.stored(slots), k)
            positions = slots if len(self.live) == self._starts[-1] else np.searchsorted(self.live, slots)
            if newer is None:
                return positions, scores
            beside = newer.rows[i] >= 0
            return (
                np.concatenate([positions, newer.rows[i][beside] + self.covered]),
                np.concatenate([scores, newer.scores[i][beside]]),
            )

        return ranked(queries, min(k, len(self.live)), candidates)

    def fetch(self, k: int) -> int:
        """How many candidates of the FAISS index are scored anew to find k rows."""
        assert self.manifest.ann is not None
        return self.manifest.ann.refine * max(k, 10)  # for fewer than ten as for ten, for which it was measured

    def exact(self, queries: Vectors, k: int, allowed: NDArray[np.bool_] | None = None) -> Hits:
        """Compare the queries with every row, or with every allowed one; the FAISS file plays no part."""
        dim = self.manifest.model.dim
        if "vectors" in self.__dict__ or (allowed is None and 4 * dim * len(self.live) <= _HELD):
            return exact_search(self.vectors, queries, k, allowed)
        columns = min(k, len(self.live))
        if allowed is not None and 4 * dim * (qualify := int(np.count_nonzero(allowed))) <= _HELD:
            positions = np.flatnonzero(allowed)
            hits = exact_search(self.stored(self.live[positions]), queries, min(k, max(1, qualify)))
            return ranked(queries, columns, lambda i: (positions[hits.rows[i]], hits.scores[i]))
        best = ranked(queries, columns, lambda _: (np.empty(0, np.int64), np.empty(0, np.float32)))
        for first, block in self.living_blocks():
            part = None if allowed is None else allowed[first : first + len(block)]
            best = _merged(best, exact_search(block, queries, k, part), first, columns)
        return best

    def living_blocks(self, rows: int = _BLOCK) -> Iterator[tuple[int, Vectors]]:
        """All vectors that count, about so many at a time: first position and unit rows."""
        waiting: list[Vectors] = []
        first = 0
        for slot, block in self.blocks():
            begin, end = np.searchsorted(self.live, [slot, slot + len(block)])
            waiting.append(block if end - begin == len(block) else block[self.live[begin:end] - slot])
            if end - first >= rows:
                yield first, np.concatenate(waiting)
                waiting, first = [], int(end)
        if first < len(self.live):
            yield first, np.concatenate(waiting)

    @functools.cached_property
    def _ann(self) -> VectorIndex | None:
        """The FAISS file, if it is whole and the one that the manifest speaks of."""
        ann = self.manifest.ann
        if ann is None or not ann.rows:
            return None
        try:
            index = VectorIndex.load(self.folder / ANN_FILE, ann.sha256)
            # A writer first withdraws the old file from the manifest, then replaces it: read after the file, an
            # unchanged entry means that the file was this one.
            if Manifest.read(self.folder).ann != ann:
                return None
        except (OSError, StoreError):
            return None
        if (len(index), index.dim) != (ann.rows, self.manifest.model.dim):
            return None
        if ann.effort:
            index.set_effort(ann.effort)
        return index

    @functools.cached_property
    def _newer(self) -> Vectors:
        """The vectors behind those that the FAISS file covers."""
        ann = self.manifest.ann
        assert ann is not None
        stored = read_vectors(self.segments[ann.segments :], self.manifest.model.dim)
        return stored[self.live[self.covered :] - ann.rows]

    def _slots_allowed(self, allowed: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
        """Which rows of the FAISS file may be found: deleted ones stay out. None: all of them."""
        if allowed is None:
            return self._alive
        mask = np.zeros(len(self._ann or ()), dtype=np.bool_)
        mask[self.live[: self.covered]] = allowed[: self.covered]
        return mask

    @functools.cached_property
    def _alive(self) -> NDArray[np.bool_] | None:
        everything = np.ones(self.covered, dtype=np.bool_)
        return None if self.covered == len(self._ann or ()) else self._slots_allowed(everything)


def _cell(column: pa.Array) -> Cell | None:
    """What gives one value of a column; None if there are none. Arrow takes a microsecond for each."""
    if column.null_count == len(column):
        return None
    if not column.null_count and (pa.types.is_integer(column.type) or column.type == pa.timestamp("us")):
        dated = pa.types.is_timestamp(column.type)
        plain = np.from_dlpack(column.view(pa.int64())).view("datetime64[us]") if dated else np.from_dlpack(column)
        return plain.item
    return lambda row: column[row].as_py()


def _joined(tables: Sequence[pa.Table], schema: pa.Schema) -> pa.Table:
    """Join tables of one schema. Arrow makes an empty table by importing pandas, where that is installed."""
    return pa.concat_tables(tables) if tables else schema.empty_table()


def _merged(hits: Hits, more: Hits, first: int, columns: int) -> Hits:
    """The best of both, when the rows of `more` are counted from `first`."""

    def both(i: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        old, new = hits.rows[i] >= 0, more.rows[i] >= 0
        return (
            np.concatenate([hits.rows[i][old], more.rows[i][new] + first]),
            np.concatenate([hits.scores[i][old], more.scores[i][new]]),
        )

    return ranked(hits.rows, columns, both)
