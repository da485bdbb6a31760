"""One index run: what changed in a folder since the last one, and taking it in."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from indexes.runtime import thread_count
from indexes.segments import ESCAPE, exact_names
from indexes.store import Failure, Row, SourceRef
from indexes.vectors import Vectors
from retrieval.errors import ImageError, UsageError
from retrieval.folder import ScannedFile, scan_columns
from retrieval.images import MAX_BYTES, Photo, os_reason, read_photo
from retrieval.pipeline import Behind, Stopwatch, map_ahead

if TYPE_CHECKING:
    from PIL import Image

    from indexes.writer import Writer
    from retrieval.library import Library
    from retrieval.pairs import Picture

_BATCH = 16
_SENTENCES = 128  # the same of sentences
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Stages:
    """Seconds that each stage of a run was at work. They overlap: a stage that waits for another is not at work.

    ``scan``: listing the source and comparing it with the store. ``decode``: reading, hashing, decoding and resizing,
    the seconds of its threads divided by their number. ``encode``: the model, opening it included. ``write``: rows into
    the store.
    """

    scan: float = 0.0
    decode: float = 0.0
    encode: float = 0.0
    write: float = 0.0


@dataclass(frozen=True)
class IndexReport:
    """What one run did, in files. ``failures`` are all that the store still holds of the folder, old ones too.

    ``embedded`` counts the pictures that the model had to look at, ``skipped`` those that were as before. ``elapsed``
    are the seconds of it all, up to the last row that is searchable; building a FAISS index is not among them.
    """

    added: int = 0
    changed: int = 0
    renamed: int = 0
    deleted: int = 0
    embedded: int = 0
    skipped: int = 0
    failures: tuple[Failure, ...] = ()
    seconds: Stages = field(default=Stages(), compare=False)
    elapsed: float = field(default=0.0, compare=False)

    @property
    def bounded_by(self) -> str:
        """The stage that waited least for the others: ``scan``, ``decode``, ``encode`` or ``write``."""
        seconds = asdict(self.seconds)
        return max(seconds, key=lambda stage: seconds[stage])


@dataclass(frozen=True)
class Item(ScannedFile):
    """A picture or a sentence of a source that is no folder, and what it says of it.

    ``path`` is what the store calls it; of a sentence, the picture that it is about, or "".
    """

    picture: Picture | None = None
    text: str | None = None  # a sentence, and then there is no picture
    caption: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Plan:
    """A scan set against the store: what there is to do."""

    todo: list[ScannedFile] = field(default_factory=list)  # new, or changed by size or time
    unchanged: int = 0
    known: dict[str, tuple[int, str]] = field(default_factory=dict)  # path -> (id, hash) of todo files seen before
    missing: dict[str, tuple[int, str]] = field(default_factory=dict)  # path -> (id, hash) of rows without a file
    forgotten: list[str] = field(default_factory=list)  # failures whose file is gone
    unreadable: list[Failure] = field(default_factory=list)  # folders that could not be listed
    relabelled: list[tuple[int, Row]] = field(
        default_factory=list
    )  # id -> the same content, and what is said of it now
    begun: SourceRef | None = None  # what the store is to remember of its source before anything is done,
    ended: SourceRef | None = None  # and when all of it is

    @property
    def pending(self) -> int:
        """How many files a run would touch."""
        return len(self.todo) + len(self.missing) + len(self.relabelled)


@dataclass(frozen=True)
class _Read:
    """What a thread made of one file: its hash, and the prepared picture unless its vector is known already."""

    hash: str
    photo: Photo | None
    text: str | None = None


def make_plan(library: Library, below: str) -> Plan:
    """Look at names, sizes and times of a folder, and set them against the store. Raises UsageError.

    Files and rows are compared as columns: objects are made only of files that are new, changed, missing or bad.
    """
    import pyarrow.compute as pc

    folder = library.root / below
    if not folder.is_dir():
        raise UsageError(f"the indexed folder {folder} is not there: is a drive not mounted?")
    library.store.refresh()
    plan = Plan()

    def unreadable(path: str, reason: str) -> None:
        plan.unreadable.append(Failure(path, reason, datetime.now(timezone.utc), 0, 0))

    files = scan_columns(library.root, below, on_error=unreadable)
    stored = library.store.columns("id", "path", "path_bytes", "size", "mtime_ns")
    pictures = ~library.store.texts()  # texts, which an import may bring, name pictures and are no files
    names = exact_names(stored)
    file_of = pc.fill_null(pc.index_in(names, value_set=files.paths), -1).to_numpy()  # each row's file, -1 is none
    file_of = np.where(pictures, file_of, -1)
    row_of = np.full(len(files), -1)  # and each file's row
    row_of[file_of[file_of >= 0]] = np.flatnonzero(file_of >= 0)
    known = np.flatnonzero(row_of >= 0)
    unchanged = np.zeros(len(files), dtype=np.bool_)
    unchanged[known] = (stored["size"].to_numpy()[row_of[known]] == files.sizes[known]) & (
        stored["mtime_ns"].to_numpy()[row_of[known]] == files.mtimes_ns[known]
    )
    plan.unchanged = int(unchanged.sum())

    failed = {failure.path: failure for failure in library.store.failures()}
    refused = {failure.path for failure in plan.unreadable}  # what lies in there is not gone, only unseen
    closed = tuple(path + "/" for path in refused)
    scope = below + "/" if below else ""

    def seen(path: str) -> bool:
        return path not in refused and not path.startswith(closed)

    unmatched = pictures & (file_of < 0)
    if scope:
        unmatched &= pc.starts_with(names, scope.encode("utf-8", ESCAPE)).to_numpy()
    changed = row_of[known[~unchanged[known]]]
    before = _identities(library, names, np.concatenate([changed, np.flatnonzero(unmatched)]))
    plan.known = dict(before[: len(changed)])
    plan.missing = {path: row for path, row in before[len(changed) :] if seen(path)}
    plan.todo = [
        file
        for file in files.take(np.flatnonzero(~unchanged))
        if file.path in plan.known or file.path not in failed or not _same_file(failed[file.path], file)
    ]
    if failed:
        gone = [path for path in failed if path.startswith(scope) and seen(path)]
        wanted = pa.array([path.encode("utf-8", ESCAPE) for path in gone], pa.large_binary())
        there = pc.is_in(wanted, value_set=files.paths).to_pylist()
        plan.forgotten = [path for path, is_there in zip(gone, there, strict=True) if not is_there]
    return plan


def _identities(library: Library, names: pa.ChunkedArray, rows: NDArray[np.int64]) -> list[tuple[str, tuple[int, str]]]:
    """(path, (id, hash)) of some rows of the store."""
    if not len(rows):
        return []
    which = pa.array(rows)
    columns = library.store.columns("id", "hash").take(which)
    paths = (name.decode("utf-8", ESCAPE) for name in names.take(which).to_pylist())
    return list(zip(paths, zip(columns["id"].to_pylist(), columns["hash"].to_pylist(), strict=True), strict=True))


class Run:
    """One index run: files in, committed rows out."""

    def __init__(
        self, library: Library, writer: Writer, plan: Plan, max_pixels: int, progress: Progress | None
    ) -> None:
        self.library, self.writer, self.plan = library, writer, plan
        self.source = library.source
        self.max_pixels, self.progress = max_pixels, progress
        self.counts = dict.fromkeys(("added", "changed", "renamed", "deleted", "embedded"), 0)
        self.failed = {failure.path for failure in library.store.failures()}
        self.movable: dict[str, list[str]] = defaultdict(list)  # content hash -> paths that are gone
        for path, (_, content) in plan.missing.items():
            self.movable[content].append(path)
        self.batch: list[tuple[Row, Image.Image]] = []
        self.sentences: list[tuple[Row, str]] = []
        self.behind = Behind()
        self.decoding, self.encoding, self.writing = Stopwatch(), Stopwatch(), Stopwatch()
        if plan.todo:  # loaded here, not by every thread at once
            self.preprocessing = library.encoder.preprocessing
            self.batch_size: int = getattr(library.encoder, "batch_size", _BATCH)

    def finish(self) -> dict[str, int]:
        """Do it; the counts of the report. Threads decode ahead of the model, and another one writes behind it."""
        with self.writing.running():
            if self.plan.begun:
                self.writer.note_source(self.plan.begun)
            for row_id, row in self.plan.relabelled:
                self.writer.replace(row_id, row)
                self.counts["changed"] += 1
            for path in self.plan.forgotten:
                self.writer.forgive(path)
            for failure in self.plan.unreadable:
                self.writer.fail(failure)
        if self.plan.todo:
            with self.behind:
                try:
                    read_ahead = map_ahead(self._read, self.plan.todo, self.batch_size)
                    for done, (file, read) in enumerate(read_ahead, 1):
                        self._take(file, read)
                        if self.progress:
                            self.progress(done, len(self.plan.todo))
                finally:
                    self._embed()
        with self.writing.running():
            for row_id, _ in self.plan.missing.values():
                self.writer.remove(row_id)
                self.counts["deleted"] += 1
            if self.plan.ended:
                self.writer.note_source(self.plan.ended)
            self.writer.commit()
        return self.counts

    def stages(self, scan: float) -> Stages:
        """The seconds of each stage, when it is done."""
        decoders = max(1, min(thread_count(), len(self.plan.todo)))
        return Stages(scan, self.decoding.seconds / decoders, self.encoding.seconds, self.writing.seconds)

    def _write(self, change: Callable[..., object], *arguments: object) -> None:
        """Have a change made behind the encoder: in order, and by nobody else until the last of them is made."""

        def task() -> None:
            with self.writing.running():
                change(*arguments)

        self.behind.do(task)

    def _read(self, file: ScannedFile, reuse: bool = True) -> _Read | ImageError | None:
        """In a thread. ``reuse``: do not decode what the store holds already. None: the file vanished."""
        with self.decoding.running():
            return self._decoded(file, reuse)

    def _decoded(self, file: ScannedFile, reuse: bool) -> _Read | ImageError | None:
        if file.size > MAX_BYTES:
            return ImageError(f"{file.size / 2**20:,.0f} MB, more than the limit of {MAX_BYTES // 2**20:,} MB")
        try:
            data = self.source.read(file)
        except FileNotFoundError:
            return None
        except OSError as error:
            return ImageError(os_reason(error))
        content = hashlib.sha256(data).hexdigest()
        if reuse and (content in self.movable or content == self._old_hash(file)):
            return _Read(content, None)
        if isinstance(file, Item) and file.text is not None:
            return _Read(content, None, file.text)
        try:
            return _Read(content, read_photo(data, self.max_pixels, self.preprocessing))
        except ImageError as error:
            return error

    def _old_hash(self, file: ScannedFile) -> str | None:
        known = self.plan.known.get(file.path)
        return known[1] if known else None

    def _take(self, file: ScannedFile, read: _Read | ImageError | None) -> None:
        old = self.plan.known.get(file.path)
        if isinstance(read, _Read):
            if file.path in self.failed:
                self._write(self.writer.forgive, file.path)
            self._keep(file, read, old)
            return
        if old is not None:  # what is stored is the vector of a picture that is not there any more
            self._write(self.writer.remove, old[0])
            self.counts["deleted"] += read is None
        if read is not None:
            now = datetime.now(timezone.utc)
            self._write(self.writer.fail, Failure(file.path, str(read), now, file.size, file.mtime_ns))

    def _keep(self, file: ScannedFile, read: _Read, old: tuple[int, str] | None) -> None:
        if read.photo is not None:
            self.batch.append((_row(file, read.hash, read.photo), read.photo.image))
            if len(self.batch) == self.batch_size:
                self._embed()
        elif read.text is not None:
            self.sentences.append((_row(file, read.hash), read.text))
            if len(self.sentences) == _SENTENCES:
                self._embed()
        elif old is not None and old[1] == read.hash:  # only touched
            self._write(self._move, old[0], file)
            self.counts["changed"] += 1
        elif self.movable[read.hash]:
            source = self.movable[read.hash].pop()
            if old is not None:  # renamed over another file
                self._write(self.writer.remove, old[0])
            self._write(self._move, self.plan.missing.pop(source)[0], file)
            self.counts["renamed"] += 1
        else:  # one more copy of something renamed: its stored vector has gone with the first
            self._take(file, self._read(file, reuse=False))

    def _move(self, row_id: int, file: ScannedFile) -> None:
        """The stored row under another name or time: same content, same vector."""
        row = self.library.store.row(row_id)
        if isinstance(file, Item):
            row = replace(row, caption=file.caption, columns=file.columns)
        self.writer.replace(row_id, replace(row, path=file.path, size=file.size, mtime_ns=file.mtime_ns))

    def _embed(self) -> None:
        if self.batch:
            with self.encoding.running():
                vectors = self.library.encoder.encode_images([image for _, image in self.batch])
            self._write(self._add, [row for row, _ in self.batch], vectors)
            self.batch = []
        if self.sentences:
            with self.encoding.running():
                vectors = self.library.encoder.encode_texts([text for _, text in self.sentences])
            self._write(self._add, [row for row, _ in self.sentences], vectors)
            self.sentences = []

    def _add(self, rows: list[Row], vectors: Vectors) -> None:
        for row, vector in zip(rows, vectors, strict=True):
            old = self.plan.known.get(row.path)
            if old is None:
                self.writer.add(row, vector)
            else:
                self.writer.replace(old[0], row, vector)
            self.counts["added" if old is None else "changed"] += 1
            self.counts["embedded"] += 1


def _row(file: ScannedFile, content: str, photo: Photo | None = None) -> Row:
    row = Row(path=file.path, size=file.size, mtime_ns=file.mtime_ns, hash=content)
    if isinstance(file, Item):
        kind = "image" if file.text is None else "text"
        row = replace(row, kind=kind, caption=file.caption, columns=file.columns)
    if photo is None:
        return row
    return replace(
        row,
        width=photo.width,
        height=photo.height,
        taken_at=photo.taken_at,
        latitude=photo.latitude,
        longitude=photo.longitude,
    )


def _same_file(failure: Failure, file: ScannedFile) -> bool:
    return (failure.size, failure.mtime_ns) == (file.size, file.mtime_ns)
