"""Changes to an index folder: buffered, written as a segment, and made true by one swap of the manifest."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from indexes import choice
from indexes.columns import unified
from indexes.damage import whole
from indexes.errors import StoreCorrupt
from indexes.manifest import (
    ANN_FILE,
    FAILURES,
    SEGMENTS,
    TOMBSTONES,
    AnnRef,
    SegmentRef,
    SourceRef,
    Wanted,
    cannot_write,
    remedy,
    remove_leftovers,
    sha256_of,
)
from indexes.segments import (
    ID,
    Failure,
    Row,
    check_columns,
    encode_rows,
    extra_columns,
    read_failures,
    with_columns,
    with_embeddings,
    write_deleted,
    write_failures,
    write_segment,
)
from indexes.snapshot import Snapshot, joined
from indexes.vectors import VectorIndex, Vectors, as_vectors, check_width

if TYPE_CHECKING:
    from indexes.store import Store

_BUFFERED = 100  # new rows that a kill may lose at most …
_SECONDS = 2.0  # … unless they are older than this at the next call; so are removals and failures, soon found again
_SEGMENTS = 16  # each costs a reader about a millisecond
_TOMBSTONES = (
    TOMBSTONES  # more are swept up once they are a quarter of the rows, and stand in a file of their own until then
)
_SLAB = 8192  # rows of a bulk load that are prepared at a time: 24 MB of embeddings at 512 dimensions


@dataclass(frozen=True)
class _New:
    """A row that is not written yet."""

    row: pa.Table  # one row, with its id
    half: NDArray[np.float16]  # (D,)


class Writer:
    """What `Store.write` yields. It commits by itself; `commit` does it now.

    Rows of the store keep their ids for ever; a changed row is a new row with a new id.
    """

    def __init__(self, store: Store) -> None:
        self.failed = False  # the last commit could not be written
        self._room = True  # for a merge: where there was none, it is not tried again at every commit
        self._store = store
        self._next_id = self._snapshot.manifest.next_id
        self._new: dict[int, _New] = {}
        self._dead: set[int] = set()
        self._failures: dict[str, Failure | None] = {}  # None: forgiven
        self._since: float | None = None

    def add(self, row: Row, vector: ArrayLike) -> int:
        """Add a row with its vector (D,), of any length but zero; the new row's id.

        Raises:
            VectorError: the vector has another width, or is zero, NaN or infinite.
            ValueError, TypeError: a value of the row has a wrong type.
            ColumnError: an extra column has a name that is taken, or a value of a kind that cannot be stored.
            StoreError: a commit was due and failed.

        """
        return self._put(self._encoded(row), self._half(row, vector))

    def add_many(self, rows: pa.Table, vectors: ArrayLike) -> NDArray[np.int64]:
        """Add many rows in one commit of their own, all or none of them: for vectors that come from elsewhere.

        What is buffered is committed first. Memory: some 8,192 rows at a time beside what is given, so `vectors` may be
        a memory map.

        Args:
            rows: (N) columns named and typed as in `Store.rows`, or such as Arrow can cast safely, without `id`. A
                column that may be null can be left out; `kind` too, then they are images. Any others are extra columns,
                as `indexes.tables.extras` takes them.
            vectors: (N, D), of any length but zero.

        Returns:
            (N,) the ids of the new rows, in their order.

        Raises:
            VectorError: vectors have another width, or are zero, NaN or infinite.
            ValueError, TypeError: a column is missing, there twice, of a wrong type, or null where it may not be; or
                the numbers of rows and vectors differ.
            ColumnError: an extra column has a name that is taken.
            StoreError: they could not be written; then the last commit stands.

        """
        given = np.asanyarray(vectors)
        check_width(given, self._snapshot.manifest.model.dim)
        rows = check_columns(rows)
        if len(rows) != len(given):
            raise ValueError(f"{len(rows)} rows cannot have {len(given)} vectors")
        self.commit()
        ids = np.arange(self._next_id, self._next_id + len(rows), dtype=np.int64)

        def slabs() -> Iterator[pa.Table]:
            for i in range(0, len(rows), _SLAB):
                slab = rows.slice(i, _SLAB)
                halves = as_vectors(given[i : i + _SLAB], slab["path"].to_pylist()).astype(np.float16)
                yield with_embeddings(slab.add_column(0, ID, pa.array(ids[i : i + _SLAB])), halves)

        if len(ids):
            with self._writing():
                segment = self._write_segment(slabs(), extra_columns(rows.schema))
                self._next_id += len(ids)  # before the swap: an interrupt after it must not give an id twice
                self._swap(next_id=self._next_id, segments=(*self._snapshot.manifest.segments, segment))
            self._compact()
        return ids

    def remove(self, row_id: int) -> None:
        """Delete a row. Raises KeyError when there is none with this id, StoreError when a due commit failed."""
        self._forget(row_id)
        self._changed()

    def replace(self, row_id: int, row: Row, vector: ArrayLike | None = None) -> int:
        """Put a row in the place of another, in one commit; the new row's id.

        Without a vector it keeps the stored one, bit for bit. Raises what `add` and `remove` do.
        """
        half = self._kept(row_id) if vector is None else self._half(row, vector)
        encoded = self._encoded(row)  # refused before the old row is gone
        self._forget(row_id)
        return self._put(encoded, half)

    def fail(self, failure: Failure) -> None:
        """Note a file that could not be read, in place of what was noted of it before."""
        self._failures[failure.path] = failure
        self._changed()

    def forgive(self, path: str) -> None:
        """Forget the failure of a file, if there is one."""
        self._failures[path] = None
        self._changed()

    def commit(self) -> None:
        """Write what is buffered: segment first, then the manifest. Raises StoreError; then the last commit stands."""
        self._settle()
        if self._new or self._dead or self._failures:
            with self._writing():
                manifest = self._snapshot.manifest
                failures, segments = manifest.failures, manifest.segments
                if self._failures:
                    failures = self._write_failures()
                if self._new:
                    table = self._table()
                    segments = (*segments, self._write_segment([table], extra_columns(table.schema)))
                dead = joined(self._snapshot.dead, np.array(sorted(self._dead), dtype=np.int64))
                self._swap(next_id=self._next_id, segments=segments, failures=failures, **self._deletions(dead))
            self._settle()
            if manifest.deleted and manifest.deleted != self._snapshot.manifest.deleted:
                with contextlib.suppress(OSError):  # else the next writer removes it
                    (self._store.path / manifest.deleted.file).unlink(missing_ok=True)
            self._failures = {}
        self._since = None
        self._compact()

    def note_source(self, source: SourceRef) -> None:
        """Commit, and then note where the rows come from and what of it has been read. Raises StoreError."""
        self.commit()
        if source != self._snapshot.manifest.source:
            with self._writing():
                self._swap(source=source)

    def rebuild_index(self, wanted: Wanted, probes: Mapping[str, Vectors]) -> None:
        """Merge everything into one segment and build the FAISS file over it; see Store.rebuild_index."""
        self.commit()
        if len(self._snapshot.segments) > 1 or len(self._snapshot.dead):
            with self._writing():
                self._merge(0)
        tuned = self._tuned(wanted, probes)
        file = self._store.path / ANN_FILE
        with self._writing():
            self._swap(ann=None, wanted=wanted)  # first, so that nobody takes the new file for the old
            if tuned is None:
                file.unlink(missing_ok=True)
                return
            tuned.index.save(file)
            segments, rows = len(self._snapshot.segments), len(tuned.index)
            ann = AnnRef(tuned.index.factory, segments, rows, sha256_of(file), tuned.refine, tuned.effort)
            self._swap(ann=ann)
            if rows:
                search = functools.partial(self._snapshot.search, k=choice.K, allowed=None)
                measured = choice.measured(tuned, search, {**probes, **self._probe()}, file.stat().st_size)
                self._swap(ann=replace(ann, measured=measured))

    def _tuned(self, wanted: Wanted, probes: Mapping[str, Vectors]) -> choice.Tuned | None:
        """The wanted index, or the first of those to choose from that finds enough; None: exact search is as good."""
        snapshot, dim = self._snapshot, self._snapshot.manifest.model.dim
        rows = len(snapshot.live)
        kinds = [wanted.factory] if wanted.factory else choice.kinds(rows, dim, wanted)
        if not kinds or wanted.factory == choice.EXACT:
            return None
        queries = {**probes, **self._probe()} if rows else {}
        truth = {name: snapshot.exact(each, choice.K) for name, each in queries.items()}

        def tuned(kind: str) -> choice.Tuned:
            blocks = (block for _, block in snapshot.living_blocks())
            index = VectorIndex.fill(kind, dim, rows, self._sample, blocks)
            if not rows:
                return choice.Tuned(index, 1, 0, {}, True)
            return choice.tune(index, queries, truth, snapshot.stored, wanted.recall, wanted.factory is not None)

        return choice.first_enough(kinds, tuned, forced=wanted.factory is not None)

    def _sample(self, count: int) -> Vectors:
        """Stored vectors, evenly drawn, always the same."""
        live = self._snapshot.live
        return self._snapshot.stored(live[choice.evenly(len(live), count)])

    def _probe(self) -> dict[str, Vectors]:
        kind = choice.STORED if self._snapshot.text_count else choice.IMAGE
        return {kind: self._sample(choice.PROBES)}

    # ---- the buffer ------------------------------------------------------------------------------------------------

    @property
    def _snapshot(self) -> Snapshot:
        return self._store.snapshot

    def _half(self, row: Row, vector: ArrayLike) -> NDArray[np.float16]:
        given = np.asarray(vector)[None]
        check_width(given, self._snapshot.manifest.model.dim)
        half: NDArray[np.float16] = as_vectors(given, [row.path])[0].astype(np.float16)
        return half

    def _kept(self, row_id: int) -> NDArray[np.float16]:
        return self._new[row_id].half if row_id in self._new else self._snapshot.halves(self._position(row_id))

    def _position(self, row_id: int) -> int:
        position = self._snapshot.position(row_id)
        if position is None or row_id in self._dead:
            raise KeyError(f"no row has the id {row_id}")
        return position

    def _encoded(self, row: Row) -> pa.Table:
        """The row as it is to be written next: a wrong type is refused here, not with 99 other rows at a commit."""
        return encode_rows({self._next_id: row})

    def _put(self, row: pa.Table, half: NDArray[np.float16]) -> int:
        row_id = self._next_id
        self._new[row_id] = _New(row, half)
        self._next_id += 1
        self._changed()
        return row_id

    def _forget(self, row_id: int) -> None:
        if row_id in self._new:
            del self._new[row_id]
        else:
            self._position(row_id)
            self._dead.add(row_id)

    def _changed(self) -> None:
        now = time.monotonic()
        self._since = self._since or now
        if len(self._new) >= _BUFFERED or now - self._since >= _SECONDS:
            self.commit()

    # ---- the disk --------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Take over the state on disk, and drop from the buffer what it holds already.

        After a swap that is the state just written; and where Ctrl-C fell between a swap and what follows it, the next
        commit finds here that its work is done.
        """
        self._store.refresh()
        written = self._snapshot.manifest.next_id
        self._new = {row_id: new for row_id, new in self._new.items() if row_id >= written}
        if self._dead:
            dead = np.fromiter(self._dead, np.int64, len(self._dead))
            self._dead = set(dead[np.isin(dead, self._snapshot.ids)].tolist())

    def _table(self) -> pa.Table:
        rows = [new.row for new in self._new.values()]
        extra = unified(extra_columns(row.schema) for row in rows)
        table = pa.concat_tables([with_columns(row, extra) for row in rows]).combine_chunks()
        return with_embeddings(table, np.stack([new.half for new in self._new.values()]))

    def _write_segment(self, tables: Iterable[pa.Table], extra: pa.Schema) -> SegmentRef:
        manifest = self._snapshot.manifest
        name = f"{manifest.generation + 1:08d}.parquet"  # of the commit that is to name it: never used before
        return write_segment(self._store.path / SEGMENTS / name, tables, manifest.model.dim, extra)

    def _write_failures(self) -> int:
        file = self._store.path / FAILURES
        known: dict[str, Failure | None] = {failure.path: failure for failure in read_failures(file)}
        left = [failure for failure in {**known, **self._failures}.values() if failure is not None]
        write_failures(file, left)
        return len(left)

    def _deletions(self, dead: NDArray[np.int64]) -> dict[str, Any]:
        """What the next manifest says of the deleted rows: few by id; many in a file, rewritten for the next 1,000."""
        manifest, known = self._snapshot.manifest, self._snapshot.filed
        recent = np.setdiff1d(dead, known, assume_unique=True)
        deleted = manifest.deleted
        if len(recent) + len(known) > len(dead):  # some of the file's rows are gone for good
            recent, deleted = dead, None
        if len(recent) > _TOMBSTONES:
            name = f"deleted-{manifest.generation + 1:08d}.parquet"
            recent, deleted = dead[:0], write_deleted(self._store.path / name, dead)
        return {"tombstones": tuple(recent.tolist()), "deleted": deleted}

    def _swap(self, **changes: Any) -> None:
        """Make the next state true."""
        manifest = self._snapshot.manifest
        replace(manifest, generation=manifest.generation + 1, **changes).write(self._store.path)
        self._store.refresh()

    def _compact(self) -> None:
        """Keep the number of segments small.

        Every segment stays at least as large as all behind it together: each row is rewritten once for every doubling
        of the store at most, and the last photo added never rewrites the store. What the FAISS file covers stays as it
        is, until so much of it is deleted that all is rewritten.
        """
        manifest = self._snapshot.manifest
        covered = manifest.ann.segments if manifest.ann else 0
        counts = [segment.rows for segment in manifest.segments]
        first: int | None = None
        if len(self._snapshot.dead) > max(_TOMBSTONES, manifest.stored // 4):
            first = 0
        elif len(counts) - covered > _SEGMENTS:
            first = next((i for i in range(covered, len(counts)) if counts[i] < sum(counts[i + 1 :])), None)
        if first is not None and self._room:
            try:
                self._merge(first)
            except OSError:  # a full disk: every row is committed, tidying up can wait
                self._room = False

    def _merge(self, first: int) -> None:
        """Rewrite the segments from one on as one, without the deleted rows."""
        snapshot, manifest = self._snapshot, self._snapshot.manifest
        dead = snapshot.dead
        for ref in manifest.segments[first:]:  # what is damaged must not get a new, right checksum
            file = self._store.path / SEGMENTS / ref.file
            if reason := whole(file, ref.sha256):
                raise StoreCorrupt(f"{reason}: {remedy(file)}")

        def living() -> Iterator[pa.Table]:
            for segment in snapshot.segments[first:]:
                for i in range(len(segment.group_starts) - 1):
                    ids = segment.ids[segment.group_starts[i] : segment.group_starts[i + 1]]
                    gone = dead[np.searchsorted(dead, ids[0]) : np.searchsorted(dead, ids[-1], side="right")]
                    table = segment.group(i)
                    yield table.filter(pa.array(~np.isin(ids, gone))) if len(gone) else table

        merged = self._write_segment(living(), unified(segment.extra for segment in snapshot.segments[first:]))
        begin = snapshot.segments[first].ids[0]
        ann = manifest.ann
        self._swap(
            segments=manifest.segments[:first] + ((merged,) if merged.rows else ()),
            ann=None if ann and ann.segments > first else ann,  # what it covers is gone; `wanted` says what to build
            **self._deletions(dead[dead < begin]),
        )
        remove_leftovers(self._store.path, self._snapshot.manifest)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn what the system says of the disk into StoreError."""
        self.failed = False
        try:
            yield
        except OSError as error:
            self.failed = True
            raise cannot_write(self._store.path, error) from error
