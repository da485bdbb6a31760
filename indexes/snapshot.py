"""One state of an index folder, for reading: what it holds does not change while others write.

A *slot* is a row as it lies in the segments, deleted ones too; a *position* counts the rows that are left, and is what
callers see. Both rise with the id.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from indexes.errors import StoreCorrupt, StoreError
from indexes.manifest import SEGMENTS, Manifest
from indexes.segments import ROW_SCHEMA, Row, Segment, decode_row, names, read_deleted, read_vectors, unit_rows
from indexes.vectors import Hits, VectorIndex, Vectors, cosines, exact_search, ranked

ANN_FILE = "vectors.faiss"
_FEW = 8  # one row in so many at most is worth reading by row groups; more, and all vectors are read


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
            held.get(ref) or Segment(folder / SEGMENTS / ref.file, ref.rows, dim) for ref in manifest.segments
        ]
        self._starts = np.cumsum([0, *(segment.rows for segment in self.segments)], dtype=np.int64)
        # Row groups that were read lately: those of one commit serve the next as well.
        self._recent: Callable[[Segment, int], NDArray[np.float16]] = (
            before._recent if before else functools.lru_cache(8)(Segment.halves)
        )
        self._recent_facts: Callable[[Segment, int], pa.Table] = (
            before._recent_facts if before else functools.lru_cache(8)(Segment.facts)
        )
        self.filed: NDArray[np.int64] = np.empty(0, np.int64)  # the ids in the file of deleted rows
        if before and before.manifest.deleted == manifest.deleted:
            self.filed = before.filed
        elif manifest.deleted:
            self.filed = read_deleted(folder / manifest.deleted.file, manifest.deleted.rows)

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
                    missing = next((file for file in files if not file.exists()), files[0])
                    raise StoreCorrupt(f"{missing} is missing: delete the folder {folder} and index again") from error
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
        return self.columns(*ROW_SCHEMA.names).combine_chunks()

    def columns(self, *names: str) -> pa.Table:
        """Some columns by position, and no other is read."""
        if "rows" in self.__dict__:
            return self.rows.select(names)
        tables = [ROW_SCHEMA.empty_table().select(names)]
        tables += [segment.columns(*names).select(names) for segment in self.segments]
        table = pa.concat_tables(tables)
        return table.take(self.live) if len(self.dead) else table

    def row(self, position: int) -> Row:
        """One row; only its row group is read."""
        segment, group, row = self._locate(int(self.live[position]))
        return decode_row(self._recent_facts(segment, group), row)

    @functools.cached_property
    def paths(self) -> list[str]:
        """The exact file names, by position."""
        return names(self.rows)

    @functools.cached_property
    def vectors(self) -> Vectors:
        """Unit rows, by position."""
        stored = read_vectors(self.segments, self.manifest.model.dim)
        return stored[self.live] if len(self.dead) else stored

    def halves(self, position: int) -> NDArray[np.float16]:
        """One vector (D,) as it is stored."""
        slot = int(self.live[position])
        segment, group, row = self._locate(slot)
        half: NDArray[np.float16] = self._recent(segment, group)[row]
        return half

    @functools.cached_property
    def covered(self) -> int:
        """How many positions the FAISS file covers: the first ones. 0 where there is none, or it cannot be used."""
        return int(np.searchsorted(self.live, self.manifest.ann.rows)) if self._ann else 0  # type: ignore[union-attr]

    def search(self, queries: Vectors, k: int, allowed: NDArray[np.bool_] | None) -> Hits:
        """Search by position; see Store.search."""
        if not self.covered:
            return exact_search(self.vectors, queries, k, allowed)
        assert self._ann is not None
        mask = np.zeros(len(self._ann), dtype=np.bool_)  # deleted rows stay out
        mask[self.live[: self.covered]] = True if allowed is None else allowed[: self.covered]
        qualify = int(mask.sum())
        near = self._ann.search(queries, k, None if qualify == len(mask) else mask)
        if (near.rows[:, : min(k, qualify)] < 0).any():  # an approximate kind lost its way: never fewer than there are
            return exact_search(self.vectors, queries, k, allowed)
        newer = exact_search(self._newer, queries, k, None if allowed is None else allowed[self.covered :])
        found = np.unique(near.rows[near.rows >= 0])
        stored = self._gather(found)

        def candidates(i: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
            slots = near.rows[i][near.rows[i] >= 0]
            beside = newer.rows[i] >= 0
            scores = cosines(queries[i], stored[np.searchsorted(found, slots)])
            return (
                np.concatenate([np.searchsorted(self.live, slots), newer.rows[i][beside] + self.covered]),
                np.concatenate([scores, newer.scores[i][beside]]),
            )

        return ranked(queries, min(k, len(self.live)), candidates)

    @functools.cached_property
    def _ann(self) -> VectorIndex | None:
        """The FAISS file, if it is whole and the one that the manifest speaks of."""
        ann = self.manifest.ann
        if ann is None or not ann.rows:
            return None
        try:
            index = VectorIndex.load(self.folder / ANN_FILE)
            # A writer first withdraws the old file from the manifest, then replaces it: read after the file, an
            # unchanged entry means that the file was this one.
            if Manifest.read(self.folder).ann != ann:
                return None
        except (OSError, StoreError):
            return None
        return index if (len(index), index.dim) == (ann.rows, self.manifest.model.dim) else None

    @functools.cached_property
    def _newer(self) -> Vectors:
        """The vectors behind those that the FAISS file covers."""
        ann = self.manifest.ann
        assert ann is not None
        stored = read_vectors(self.segments[ann.segments :], self.manifest.model.dim)
        return stored[self.live[self.covered :] - ann.rows]

    def _gather(self, slots: NDArray[np.int64]) -> Vectors:
        """Read the vectors in a few slots, which rise."""
        if "vectors" in self.__dict__ or len(slots) > len(self.live) // _FEW:
            return self.vectors[np.searchsorted(self.live, slots)]
        out = np.empty((len(slots), self.manifest.model.dim), dtype=np.float32)
        for i, slot in enumerate(slots):
            segment, group, row = self._locate(int(slot))
            out[i] = unit_rows(self._recent(segment, group)[row : row + 1], segment.file)[0]
        return out

    def _locate(self, slot: int) -> tuple[Segment, int, int]:
        """Segment, row group and row in it of a slot."""
        i = int(np.searchsorted(self._starts, slot, side="right")) - 1
        segment, row = self.segments[i], slot - int(self._starts[i])
        group = int(np.searchsorted(segment.group_starts, row, side="right")) - 1
        return segment, group, row - int(segment.group_starts[group])
