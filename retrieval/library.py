"""The object a user holds: one folder of photos, kept searchable."""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from indexes.errors import StoreNotFound
from indexes.store import MANIFEST, Failure, ModelRef, Row, Store, Writer
from indexes.vectors import Vectors
from retrieval.bundle import Bundle
from retrieval.encoders import BUILTIN, Encoder, data_folder, find_bundle, lasting_spec, load_encoder
from retrieval.errors import ImageError, UsageError
from retrieval.folder import ScannedFile, scan
from retrieval.images import MAX_BYTES, MAX_PIXELS, Photo, os_reason, read_photo
from retrieval.pipeline import map_ahead

STORE_NAME = ".diptych"
_BATCH = 16
_MAX_WEIGHT = 1000  # beside it, nothing else in the query counts
QUICK_SCAN = 50_000  # pictures; looking through a folder costs about 10 microseconds a file
QUICK_FILES = 50  # embedding one costs tens of milliseconds
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Term:
    """One part of a query: a sentence or a picture, and how much it counts. Negative: away from it."""

    text: str = ""
    image: Path | None = None
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str, sign: float = 1.0) -> Term:
        """A sentence as typed, a weight in front of it as rclip writes it: ``2:golden retriever``."""
        weighted = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+):(.*)", text, re.DOTALL)
        weight, rest = (float(weighted[1]), weighted[2]) if weighted else (1.0, text)
        if not rest.strip():
            raise UsageError("the query is empty: say what the picture shows")
        if weight > _MAX_WEIGHT:
            raise UsageError(f"the weight of {rest.strip()!r} is too large: {_MAX_WEIGHT} is the most")
        return cls(text=rest.strip(), weight=sign * weight)


@dataclass(frozen=True)
class Match:
    """One picture found. ``score`` is the cosine between query and picture, from -1 to 1."""

    path: str
    score: float
    file: Path
    width: int | None
    height: int | None
    taken_at: datetime | None


@dataclass(frozen=True)
class IndexReport:
    """What one run did, in files. ``failures`` are all that the store still holds of the folder, old ones too.

    ``embedded`` counts the pictures that the model had to look at, ``skipped`` those that were as before.
    """

    added: int = 0
    changed: int = 0
    renamed: int = 0
    deleted: int = 0
    embedded: int = 0
    skipped: int = 0
    failures: tuple[Failure, ...] = ()


@dataclass
class _Plan:
    """A scan set against the store: what there is to do."""

    todo: list[ScannedFile] = field(default_factory=list)  # new, or changed by size or time
    unchanged: int = 0
    known: dict[str, tuple[int, str]] = field(default_factory=dict)  # path -> (id, hash) of todo files seen before
    missing: dict[str, tuple[int, str]] = field(default_factory=dict)  # path -> (id, hash) of rows without a file
    forgotten: list[str] = field(default_factory=list)  # failures whose file is gone
    unreadable: list[Failure] = field(default_factory=list)  # folders that could not be listed

    @property
    def pending(self) -> int:
        return len(self.todo) + len(self.missing)


@dataclass(frozen=True)
class _Read:
    """What a thread made of one file: its hash, and the prepared picture unless its vector is known already."""

    hash: str
    photo: Photo | None


class Library:
    """A folder of photos with its index. Get one from :meth:`open` or :meth:`create`.

    >>> library = Library.create(Path("~/Pictures").expanduser())  # doctest: +SKIP
    >>> library.index()  # doctest: +SKIP
    >>> library.search("two dogs playing in snow", k=5)  # doctest: +SKIP
    """

    def __init__(self, store: Store, encoder: Encoder | None = None, **loading: object) -> None:
        self.store = store
        self._given = encoder
        self._loading = loading  # device, threads, preprocess: handed to load_encoder when the model is first needed

    @classmethod
    def open(
        cls, path: Path = Path(), *, index: Path | None = None, encoder: Encoder | None = None, **loading: object
    ) -> Library:
        """Open the index that covers a folder: its own, that of a folder above it, or the one at ``index``.

        Raises:
            StoreNotFound: there is none.
            ModelMismatch: ``encoder`` is not the model the index was made with.
        """
        folder = path.expanduser().absolute()
        found = index or find_store(folder)
        if found is None:
            raise StoreNotFound(f"no index for {folder} or a folder above it: make one with  diptych index {folder}")
        library = cls(Store.open(found), encoder, **loading)
        if encoder is not None:
            library.store.check_model(encoder.fingerprint, encoder.name)
        return library

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        index: Path | None = None,
        encoder: Encoder | None = None,
        model: str = BUILTIN,
        **loading: object,
    ) -> Library:
        """Make an empty index for a folder; nothing is read yet.

        The store lies in ``FOLDER/.diptych``, at ``index`` if given, or below ``$XDG_DATA_HOME/diptych`` when the
        folder cannot be written to.
        """
        folder = folder.expanduser().absolute()
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder" if folder.exists() else f"there is no folder {folder}")
        name = encoder.name if encoder else lasting_spec(model)
        encoder = encoder or load_encoder(model, **loading)  # type: ignore[arg-type]
        inside = index is None and os.access(folder, os.W_OK)
        place = folder / STORE_NAME if inside else (index or _outside_store(folder)).expanduser().absolute()
        reference = ModelRef(name, encoder.fingerprint, encoder.dim)
        return cls(Store.create(place, root=None if inside else folder, model=reference), encoder, **loading)

    @cached_property
    def encoder(self) -> Encoder:
        """The model the index was made with, loaded when first needed."""
        if self._given is not None:
            return self._given
        encoder = load_encoder(self.store.model.name, **self._loading)  # type: ignore[arg-type]
        self.store.check_model(encoder.fingerprint, encoder.name)
        return encoder

    @property
    def root(self) -> Path:
        """The indexed folder."""
        return self.store.root

    def below(self, folder: Path) -> str:
        """A folder as the store names it: relative to the root, "" for the root itself and for folders outside it."""
        try:
            relative = folder.expanduser().resolve().relative_to(self.root.resolve())
        except ValueError:
            return ""
        return "" if relative == Path() else relative.as_posix()

    # ---- keeping the index current -------------------------------------------------------------------------------

    def pending(self, below: str = "") -> int:
        """How many files an :meth:`index` run would touch now: a look at names, sizes and times only."""
        return self._plan(below).pending

    def catch_up(self, progress: Progress | None = None) -> int:
        """Take in what changed if that is a matter of a second or two; the number of files left for :meth:`index`.

        A folder of more than ``QUICK_SCAN`` pictures is not even looked through.
        """
        if len(self.store) > QUICK_SCAN:
            return 0
        pending = self.pending()
        if pending > QUICK_FILES:
            return pending
        if pending:
            self.index(progress=progress)
        return 0

    def index(
        self, below: str = "", *, progress: Progress | None = None, max_pixels: int = MAX_PIXELS, wait: float = 0.0
    ) -> IndexReport:
        """Take in what was added, changed, renamed or deleted since the last run.

        Args:
            below: only this folder, relative to the root.
            progress: called with (files done, files to do).
            max_pixels: a picture of more is a failure, not a memory problem.
            wait: seconds to wait for another process that is writing.

        Raises:
            StoreLocked: another process is writing.
            UsageError: the folder is gone; or it is empty, and the index, which lies elsewhere, knows pictures in it.
        """
        with self.store.write(wait=wait) as writer:
            plan = self._plan(below)
            elsewhere = not self.store.path.is_relative_to(self.root)  # else the drive is there, for the index is
            if elsewhere and plan.missing and not plan.unchanged and not plan.todo and not below:
                raise UsageError(
                    f"{self.root / below} holds no picture any more, but its index knows {len(plan.missing)}: is a "
                    f"drive not mounted? If they are really gone, delete {self.store.path}"
                )
            report = _Run(self, writer, plan, max_pixels, progress).finish()
        if self.store.index_is_stale():
            self.store.rebuild_index()
        failures = tuple(f for f in self.store.failures() if not below or f.path.startswith(below + "/"))
        return IndexReport(**report, skipped=plan.unchanged, failures=failures)

    def _plan(self, below: str) -> _Plan:
        folder = self.root / below
        if not folder.is_dir():
            raise UsageError(f"the indexed folder {folder} is not there: is a drive not mounted?")
        self.store.refresh()
        plan = _Plan()

        def unreadable(path: str, reason: str) -> None:
            plan.unreadable.append(Failure(path, reason, datetime.now(timezone.utc), 0, 0))

        rows = self.store.rows()
        columns = (rows[name].to_pylist() for name in ("id", "size", "mtime_ns", "hash"))
        stored = dict(zip(self.store.paths(), zip(*columns, strict=True), strict=True))
        failed = {failure.path: failure for failure in self.store.failures()}
        seen: set[str] = set()
        for file in scan(self.root, below, on_error=unreadable):
            seen.add(file.path)
            if file.path in stored:
                row_id, size, mtime_ns, content = stored[file.path]
                if (size, mtime_ns) == (file.size, file.mtime_ns):
                    plan.unchanged += 1
                    continue
                plan.known[file.path] = (row_id, content)
            elif file.path in failed and _same_file(failed[file.path], file):
                continue
            plan.todo.append(file)
        refused = {failure.path for failure in plan.unreadable}  # what lies in there is not gone, only unseen
        closed = tuple(path + "/" for path in refused)
        scope = below + "/" if below else ""

        def gone(path: str) -> bool:
            return path.startswith(scope) and path not in seen and path not in refused and not path.startswith(closed)

        plan.missing = {path: (row[0], row[3]) for path, row in stored.items() if gone(path)}
        plan.forgotten = [path for path in failed if gone(path)]
        return plan

    def check(self) -> list[str]:
        """Recompute every checksum of the index, and its model's fingerprint; a line for each thing that is wrong."""
        problems = self.store.check()
        folder = find_bundle(self.store.model.name)
        if folder is not None:
            bundle = Bundle.load(folder)
            if bundle.compute_fingerprint() != bundle.fingerprint:
                problems.append(f"the model in {folder} is damaged: its files do not fit its fingerprint")
            if bundle.fingerprint != self.store.model.fingerprint:
                problems.append(f"the model in {folder} is not the one that this index was made with")
        return problems

    # ---- searching -----------------------------------------------------------------------------------------------

    def search(
        self, query: str | Sequence[Term], k: int = 10, *, below: str = "", threshold: float = -1.0
    ) -> list[Match]:
        """The k pictures nearest to a query, best first; fewer if there are fewer.

        Args:
            query: a sentence, or terms whose weighted sum is searched.
            k: how many.
            below: only pictures in this folder, relative to the root.
            threshold: only pictures with at least this cosine.
        """
        terms = [Term.parse(query)] if isinstance(query, str) else list(query)
        vector = self.query_vector(terms)
        if k < 1 or not len(self.store):
            return []
        hits = self.store.search(vector[None, :], k, self._rows_below(below))
        found = hits.rows[0][(hits.rows[0] >= 0) & (hits.scores[0] >= threshold)]
        picked = self.store.rows().take(found)
        paths = self.store.paths()
        return [
            Match(
                paths[row], float(score), self.root / paths[row], fields["width"], fields["height"], fields["taken_at"]
            )
            for row, score, fields in zip(found, hits.scores[0], picked.to_pylist(), strict=False)
        ]

    def query_vector(self, terms: Sequence[Term]) -> Vectors:
        """(D,) unit vector: the normalised weighted sum of the terms' vectors. UsageError when they cancel out."""
        if not terms:
            raise UsageError("the query is empty: say what the picture shows")
        total = np.zeros(self.encoder.dim, np.float32)
        texts = [term for term in terms if term.image is None]
        for term, vector in zip(texts, self.encoder.encode_texts([term.text for term in texts]), strict=True):
            total += term.weight * vector
        for term in terms:
            if term.image is not None:
                total += term.weight * self.encoder.encode_images([_query_image(term.image)])[0]
        length = float(np.linalg.norm(total))
        if length < 1e-6:
            raise UsageError("the parts of the query cancel each other out: change a weight or leave one out")
        unit: Vectors = total / np.float32(length)
        return unit

    def _rows_below(self, below: str) -> NDArray[np.bool_] | None:
        if not below:
            return None
        prefix = below + "/"
        return np.fromiter((path.startswith(prefix) for path in self.store.paths()), bool, len(self.store))


class _Run:
    """One index run: files in, committed rows out."""

    def __init__(
        self, library: Library, writer: Writer, plan: _Plan, max_pixels: int, progress: Progress | None
    ) -> None:
        self.library, self.writer, self.plan = library, writer, plan
        self.max_pixels, self.progress = max_pixels, progress
        self.counts = dict.fromkeys(("added", "changed", "renamed", "deleted", "embedded"), 0)
        self.failed = {failure.path for failure in library.store.failures()}
        self.movable: dict[str, list[str]] = defaultdict(list)  # content hash -> paths that are gone
        for path, (_, content) in plan.missing.items():
            self.movable[content].append(path)
        self.batch: list[tuple[Row, Image.Image]] = []
        if plan.todo:
            self.preprocessing = library.encoder.preprocessing  # loaded here, not by every thread at once

    def finish(self) -> dict[str, int]:
        try:
            for path in self.plan.forgotten:
                self.writer.forgive(path)
            for failure in self.plan.unreadable:
                self.writer.fail(failure)
            for done, (file, read) in enumerate(map_ahead(self._read, self.plan.todo), 1):
                self._take(file, read)
                if self.progress:
                    self.progress(done, len(self.plan.todo))
        finally:
            self._embed()
        for row_id, _ in self.plan.missing.values():
            self.writer.remove(row_id)
            self.counts["deleted"] += 1
        return self.counts

    def _read(self, file: ScannedFile, reuse: bool = True) -> _Read | ImageError | None:
        """In a thread. ``reuse``: do not decode what the store holds already. None: the file vanished."""
        path = self.library.root / file.path
        if file.size > MAX_BYTES:
            return ImageError(f"{file.size / 2**20:,.0f} MB, more than the limit of {MAX_BYTES // 2**20:,} MB")
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            return ImageError(os_reason(error))
        content = hashlib.sha256(data).hexdigest()
        if reuse and (content in self.movable or content == self._old_hash(file)):
            return _Read(content, None)
        try:
            photo = read_photo(data, self.max_pixels)
        except ImageError as error:
            return error
        small = self.preprocessing.fit(photo.image)  # the full picture is not kept while it waits its turn
        return _Read(content, replace(photo, image=small))

    def _old_hash(self, file: ScannedFile) -> str | None:
        known = self.plan.known.get(file.path)
        return known[1] if known else None

    def _take(self, file: ScannedFile, read: _Read | ImageError | None) -> None:
        old = self.plan.known.get(file.path)
        if isinstance(read, _Read):
            if file.path in self.failed:
                self.writer.forgive(file.path)
            self._keep(file, read, old)
            return
        if old is not None:  # what is stored is the vector of a picture that is not there any more
            self.writer.remove(old[0])
            self.counts["deleted"] += read is None
        if read is not None:
            now = datetime.now(timezone.utc)
            self.writer.fail(Failure(file.path, str(read), now, file.size, file.mtime_ns))

    def _keep(self, file: ScannedFile, read: _Read, old: tuple[int, str] | None) -> None:
        if read.photo is not None:
            self.batch.append((_row(file, read.hash, read.photo), read.photo.image))
            if len(self.batch) == _BATCH:
                self._embed()
        elif old is not None and old[1] == read.hash:  # only touched
            self._move(old[0], file)
            self.counts["changed"] += 1
        elif self.movable[read.hash]:
            source = self.movable[read.hash].pop()
            if old is not None:  # renamed over another file
                self.writer.remove(old[0])
            self._move(self.plan.missing.pop(source)[0], file)
            self.counts["renamed"] += 1
        else:  # one more copy of something renamed: its stored vector has gone with the first
            self._take(file, self._read(file, reuse=False))

    def _move(self, row_id: int, file: ScannedFile) -> None:
        """The stored row under another name or time: same content, same vector."""
        row = self.library.store.row(row_id)
        self.writer.replace(row_id, replace(row, path=file.path, size=file.size, mtime_ns=file.mtime_ns))

    def _embed(self) -> None:
        if not self.batch:
            return
        vectors = self.library.encoder.encode_images([image for _, image in self.batch])
        for (row, _), vector in zip(self.batch, vectors, strict=True):
            old = self.plan.known.get(row.path)
            if old is None:
                self.writer.add(row, vector)
            else:
                self.writer.replace(old[0], row, vector)
            self.counts["added" if old is None else "changed"] += 1
            self.counts["embedded"] += 1
        self.batch = []


def _row(file: ScannedFile, content: str, photo: Photo) -> Row:
    return Row(
        path=file.path,
        size=file.size,
        mtime_ns=file.mtime_ns,
        hash=content,
        width=photo.width,
        height=photo.height,
        taken_at=photo.taken_at,
        latitude=photo.latitude,
        longitude=photo.longitude,
    )


def _same_file(failure: Failure, file: ScannedFile) -> bool:
    return (failure.size, failure.mtime_ns) == (file.size, file.mtime_ns)


def _query_image(path: Path) -> Image.Image:
    try:
        return read_photo(path.expanduser()).image
    except ImageError as error:
        raise ImageError(f"{path} cannot be searched with: {error}") from error


def describe(library: Library) -> dict[str, Any]:
    """What an index holds and was made with, in plain values."""
    store = library.store
    failures = [{"path": str(library.root / f.path), "reason": f.reason} for f in store.failures()]
    return {
        "folder": str(library.root),
        "index": str(store.path),
        "pictures": len(store),
        "model": store.model.name,
        "fingerprint": store.model.fingerprint,
        "dim": store.model.dim,
        "bytes": sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file()),
        "failures": failures,
    }


def find_store(folder: Path) -> Path | None:
    """The store that covers a folder: in it or the nearest folder above, as git looks for ``.git``."""
    for place in (folder, *folder.parents):
        for store in (place / STORE_NAME, _outside_store(place)):
            if (store / MANIFEST).is_file():
                return store
    return None


def _outside_store(folder: Path) -> Path:
    """Where the store of a folder that cannot be written to lies: named after the folder, below the data directory."""
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return data_folder() / "indexes" / name
