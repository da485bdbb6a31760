"""Damaged segments: what they held, and an index without them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from indexes.errors import StoreCorrupt, StoreError
from indexes.manifest import (
    ANN_FILE,
    FAILURES,
    MANIFEST,
    REPAIR,
    SEGMENTS,
    TOMBSTONES,
    Manifest,
    SegmentRef,
    remedy,
    remove_leftovers,
    sha256_of,
)
from indexes.segments import Segment, names, read_deleted, read_failures, write_deleted

_SHOWN = 3
_CHANGED = (-1, 0)  # no file has this size and time: all of a source is read again


@dataclass(frozen=True)
class Repaired:
    """What a repair took out of an index: ``rows`` that counted, in segments of these names."""

    rows: int = 0
    segments: tuple[str, ...] = ()


def whole(file: Path, sha256: str) -> str | None:
    """Compare a file with its checksum: None, or what is wrong with it."""
    try:
        return None if sha256_of(file) == sha256 else f"{file} is damaged: its content is not what was written"
    except FileNotFoundError:
        return f"{file} is missing"
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}"


def check(folder: Path) -> list[str]:
    """Recompute every checksum of an index folder; one line for each thing that is wrong, none if it is sound."""
    while True:
        try:
            manifest = Manifest.read(folder)
            wrong = _wrong(folder, manifest)
            if not wrong or Manifest.read(folder) == manifest:  # else: what is missing was merged by a writer just now
                return wrong
        except StoreError as error:
            return [str(error)]


def _wrong(folder: Path, manifest: Manifest) -> list[str]:
    wrong = []
    for segment in manifest.segments:
        file = folder / SEGMENTS / segment.file
        if reason := whole(file, segment.sha256):
            wrong.append(f"{reason}; it held {lost(folder, manifest, segment)}: {REPAIR}")
    if manifest.deleted:
        file = folder / manifest.deleted.file
        if reason := whole(file, manifest.deleted.sha256):
            wrong.append(f"{reason}: {remedy(file)}")
    try:
        if not wrong and not _fits(folder, manifest):
            wrong.append(f"{folder / MANIFEST} does not fit the segments: {remedy(folder / MANIFEST)}")
    except (OSError, StoreError) as error:
        wrong.append(str(error))
    ann = folder / ANN_FILE
    ref = manifest.ann
    if ref and ref.rows and ann.exists() and (reason := whole(ann, ref.sha256)):  # it may be deleted at any time
        wrong.append(f"{reason}: {remedy(ann)}")
    try:
        read_failures(folder / FAILURES)  # may be another than the manifest's: a kill between the two does no harm
    except StoreError as error:
        wrong.append(str(error))
    return wrong


def _fits(folder: Path, manifest: Manifest) -> bool:
    """Whether the ids rise, none is given twice, and the rows are as many as the manifest says."""
    segments = [Segment(folder / SEGMENTS / ref.file, ref, manifest.model.dim) for ref in manifest.segments]
    ids = np.concatenate([np.empty(0, np.int64), *(segment.ids for segment in segments)])
    rising = bool((np.diff(ids) > 0).all() and (ids < manifest.next_id).all())
    return rising and np.count_nonzero(~np.isin(ids, _deleted(folder, manifest))) == manifest.rows


def lost(folder: Path, manifest: Manifest, ref: SegmentRef) -> str:
    """Say which rows a damaged or missing segment held: how many, their ids, and paths as far as they can be read."""
    first, end = _ids(folder, manifest, ref)
    try:
        gone = _deleted(folder, manifest)
    except (OSError, StoreError):
        gone = np.array(manifest.tombstones, np.int64)
    rows = ref.rows - int(np.count_nonzero((gone >= first) & (gone < end)))
    paths = _paths(folder / SEGMENTS / ref.file, ref, manifest.model.dim, gone)
    said = f"{rows:,} row{'' if rows == 1 else 's'} (ids between {first} and {end - 1})"
    if not paths:
        return f"{said}, whose paths cannot be read"
    more = f" and {len(paths) - _SHOWN:,} more" if len(paths) > _SHOWN else ""
    unread = f"; paths of {rows - len(paths):,} cannot be read" if len(paths) < rows else ""
    return f"{said}: {', '.join(paths[:_SHOWN])}{more}{unread}"


def missing(folder: Path, manifest: Manifest, file: Path) -> str:
    """Say what is lost with a file that the manifest names and that is not there."""
    held = next((f" with {lost(folder, manifest, ref)}" for ref in manifest.segments if ref.file == file.name), "")
    return f"{file} is missing{held}: {REPAIR if held else remedy(file)}"


def repair(folder: Path) -> Repaired:
    """Take segments that are damaged or missing out of an index; what else is in it stays as it is.

    For the holder of the lock. An index run then takes in anew what those segments held and still lies in its place.

    Raises:
        StoreNotFound, StoreCorrupt, StoreError: there is none, or something else is damaged that no run replaces.
        OSError: it cannot be written.

    """
    manifest = Manifest.read(folder)
    bad = [s for s in manifest.segments if whole(folder / SEGMENTS / s.file, s.sha256)]
    if not bad:
        return Repaired()
    try:
        dead = _deleted(folder, manifest)
    except FileNotFoundError as error:
        raise StoreCorrupt(missing(folder, manifest, Path(os.fsdecode(error.filename)))) from error
    for ref in bad:
        first, end = _ids(folder, manifest, ref)
        dead = dead[(dead < first) | (dead >= end)]
    generation = manifest.generation + 1
    segments = tuple(s for s in manifest.segments if s not in bad)
    tombstones, deleted = dead, None
    if len(dead) > TOMBSTONES:
        tombstones, deleted = dead[:0], write_deleted(folder / f"deleted-{generation:08d}.parquet", dead)
    source = manifest.source
    after = replace(
        manifest,
        generation=generation,
        segments=segments,
        tombstones=tuple(tombstones.tolist()),
        deleted=deleted,
        ann=None if manifest.ann and set(bad) & set(manifest.segments[: manifest.ann.segments]) else manifest.ann,
        source=source and replace(source, files=tuple((name, *_CHANGED) for name, *_ in source.files)),
    )
    after.write(folder)
    remove_leftovers(folder, after)
    return Repaired(manifest.rows - after.rows, tuple(ref.file for ref in bad))


def _deleted(folder: Path, manifest: Manifest) -> NDArray[np.int64]:
    """Ids of deleted rows. Raises FileNotFoundError, StoreCorrupt."""
    ref = manifest.deleted
    filed = read_deleted(folder / ref.file, ref) if ref else np.empty(0, np.int64)
    return np.union1d(filed, np.array(manifest.tombstones, np.int64))


def _ids(folder: Path, manifest: Manifest, ref: SegmentRef) -> tuple[int, int]:
    """The ids that a segment may hold, from the first to before the last: those between its whole neighbours'."""
    at = manifest.segments.index(ref)

    def edge(others: Sequence[SegmentRef], end: int, otherwise: int) -> int:
        for other in others:
            file = folder / SEGMENTS / other.file
            if whole(file, other.sha256) is None and other.rows:
                return int(Segment(file, other, manifest.model.dim).ids[end])
        return otherwise

    first = edge(manifest.segments[:at][::-1], -1, -1) + 1
    return first, edge(manifest.segments[at + 1 :], 0, manifest.next_id)


def _paths(file: Path, ref: SegmentRef, dim: int, gone: NDArray[np.int64]) -> list[str]:
    """Paths of rows that count, from the row groups that can still be read."""
    found: list[str] = []
    try:
        segment = Segment(file, ref, dim)
        groups = len(segment.group_starts) - 1
    except (OSError, StoreError):
        return found
    for i in range(groups):
        with contextlib.suppress(StoreError, ValueError):  # a damaged page; text that is none
            table = segment.group(i, "id", "path", "path_bytes")
            here = ~np.isin(table["id"].to_numpy(), gone)
            found += [name for name, counts in zip(names(table), here, strict=True) if counts]
    return found
