"""Changes to an index folder: buffered, written as a segment, and made true by one swap of the manifest."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from indexes import choice
from indexes.columns import unified
from indexes.errors import StoreError
from indexes.manifest import SEGMENTS, AnnRef, SegmentRef, SourceRef, Wanted, remove_leftovers, sha256_of
from indexes.segments import (
    FAILURES,
    Failure,
    Row,
    encode_rows,
    extra_columns,
    read_failures,
    with_embeddings,
    write_failures,
    write_segment,
)
from indexes.snapshot import ANN_FILE, Snapshot
from indexes.vectors import VectorIndex, Vectors, as_vectors, check_width

if TYPE_CHECKING:
    from indexes.store import Store

_BUFFERED = 100  # changes that a kill may lose at most …
_SECONDS = 2.0  # … unless they are older than this at the next call
_SEGMENTS = 16  # each costs a reader about a millisecond
_TOMBSTONES = 1000


@dataclass(frozen=True)
class _New:
    """A row that is not written yet."""

    row: Row
    half: NDArray[np.float16]  # (D,)


class Writer:
    """What `Store.write` yields. It commits by itself; `commit` does it now.

    Rows of the store keep their ids for ever; a changed row is a new row with a new id.
    """

    def __init__(self, store: Store) -> None:
        self.failed = False  # the last commit could not be written
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
        return self._put(row, self._half(row, vector))

    def remove(self, row_id: int) -> None:
        """Delete a row. Raises KeyError when there is none with this id, StoreError when a due commit failed."""
        self._forget(row_id)
        self._changed()

    def replace(self, row_id: int, row: Row, vector: ArrayLike | None = None) -> int:
        """Put a row in the place of another, in one commit; the new row's id.

        Without a vector it keeps the stored one, bit for bit. Raises what `add` and `remove` do.
        """
        half = self._kept(row_id) if vector is None else self._half(row, vector)
        encode_rows({row_id: row})  # refuse it before the old row is gone
        self._forget(row_id)
        return self._put(row, half)

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
                dead = tuple(sorted({*manifest.tombstones, *self._dead}))
                self._swap(next_id=self._next_id, segments=segments, tombstones=dead, failures=failures)
            self._settle()
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
        if len(self._snapshot.segments) > 1 or self._snapshot.manifest.tombstones:
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
            return choice.tune(index, queries, truth, snapshot.stored, wanted.recall)

        return choice.first_enough(kinds, tuned, forced=wanted.factory is not None)

    def _sample(self, count: int) -> Vectors:
        """Stored vectors, evenly drawn, always the same."""
        live = self._snapshot.live
        return self._snapshot.stored(live[choice.evenly(len(live), count)])

    def _probe(self) -> dict[str, Vectors]:
        return {choice.STORED: self._sample(choice.PROBES)}

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

    def _put(self, row: Row, half: NDArray[np.float16]) -> int:
        row_id = self._next_id
        encode_rows({row_id: row})  # a wrong type is refused here, not at a commit that holds 99 other rows
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
        if len(self._new) + len(self._dead) + len(self._failures) >= _BUFFERED or now - self._since >= _SECONDS:
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
        self._dead = {row_id for row_id in self._dead if self._snapshot.position(row_id) is not None}

    def _table(self) -> pa.Table:
        rows = encode_rows({row_id: new.row for row_id, new in self._new.items()})
        return with_embeddings(rows, np.stack([new.half for new in self._new.values()]))

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
        if len(manifest.tombstones) > max(_TOMBSTONES, manifest.stored // 4):
            first = 0
        elif len(counts) - covered > _SEGMENTS:
            first = next((i for i in range(covered, len(counts)) if counts[i] < sum(counts[i + 1 :])), None)
        if first is not None:
            with contextlib.suppress(OSError):  # a full disk: every row is committed, tidying up can wait
                self._merge(first)

    def _merge(self, first: int) -> None:
        """Rewrite the segments from one on as one, without the deleted rows."""
        snapshot, manifest = self._snapshot, self._snapshot.manifest
        dead = np.array(manifest.tombstones, dtype=np.int64)

        def living() -> Iterator[pa.Table]:
            for segment in snapshot.segments[first:]:
                for i in range(len(segment.group_starts) - 1):
                    table = segment.group(i)
                    yield table.filter(pa.array(~np.isin(table["id"].to_numpy(), dead)))

        merged = self._write_segment(living(), unified(segment.extra for segment in snapshot.segments[first:]))
        begin = snapshot.slot_ids[sum(segment.rows for segment in snapshot.segments[:first])]
        ann = manifest.ann
        self._swap(
            segments=manifest.segments[:first] + ((merged,) if merged.rows else ()),
            tombstones=tuple(int(row_id) for row_id in dead[dead < begin]),
            ann=None if ann and ann.segments > first else ann,  # what it covers is gone; `wanted` says what to build
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


def cannot_write(folder: Path, error: OSError) -> StoreError:
    """Say that an index cannot be written, why, and what is left."""
    return StoreError(
        f"the index at {folder} cannot be written ({error.strerror or error}): it stays as it was at its last commit; "
        "make room or allow writing there, and run again"
    )
