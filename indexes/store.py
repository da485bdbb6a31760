"""An index folder: rows, vectors and failures under one manifest, with no server.

Any number of processes read it, each the state of one moment; one at a time writes. See docs/format.md for the files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from indexes.errors import ModelMismatch, StoreError, StoreLocked
from indexes.manifest import (
    ANN_FILE,
    FAILURES,
    MANIFEST,
    SEGMENTS,
    UNVERIFIED,
    AnnRef,
    Manifest,
    ModelRef,
    SourceRef,
    Wanted,
    cannot_write,
    remove_leftovers,
    sha256_of,
)
from indexes.segments import Failure, Row, read_failures
from indexes.snapshot import Snapshot
from indexes.vectors import Hits, Vectors, as_vectors, check_search, check_width

if TYPE_CHECKING:
    from indexes.damage import Repaired
    from indexes.filters import Condition
    from indexes.writer import Writer

__all__ = ["MANIFEST", "UNVERIFIED", "Failure", "ModelRef", "Row", "SourceRef", "Store", "Wanted"]

# What only writes, filters, repairs or builds is imported where that is done: a search that is a process of its own
# begins in half the time.

_LOCK = "write.lock"
_STALE_ROWS = 1000  # searched exactly beside the FAISS file in under a millisecond …
_STALE_SHARE = 10  # … and up to one in so many, so that rebuilding stays a small part of a growing store's work


class Store:
    """One index folder, in the state of the moment it was opened or last refreshed. Get one from `open` or `create`.

    Rows are counted by *position*, from 0 in the order of their ids: `rows`, `paths`, `vectors` and `search` speak of
    the same positions until `refresh`, or a commit through this object, shows a newer state. Ids stay.
    """

    def __init__(self, path: Path, snapshot: Snapshot) -> None:
        self.path = path
        self.snapshot = snapshot

    @classmethod
    def create(cls, path: Path, root: Path | None, model: ModelRef, source: SourceRef | None = None) -> Store:
        """Make an empty index.

        Args:
            path: the index folder; it and the folders above it are made where missing.
            root: the folder that the rows' paths are relative to. None: the one that the index folder lies in, and then
                both can be moved together.
            model: what makes the vectors.
            source: where the rows come from, if not from the files of the root.

        Raises:
            StoreError: there is an index already, or the folder cannot be written.

        """
        path = path.absolute()
        try:
            (path / SEGMENTS).mkdir(parents=True, exist_ok=True)
            with _locked(path, 0):
                if (path / MANIFEST).exists():
                    raise StoreError(f"there is an index at {path} already: open it, or delete that folder first")
                Manifest(model, None if root is None else str(root.absolute()), source=source).write(path)
        except OSError as error:
            raise cannot_write(path, error) from error
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open an index for reading, and for writing through `write`. Writes nothing.

        Raises:
            StoreNotFound: there is none.
            StoreCorrupt: its manifest is damaged, or a segment is missing.
            StoreError: it cannot be read, or a newer release wrote it.

        """
        path = path.absolute()
        return cls(path, Snapshot.open(path))

    @classmethod
    def repair(cls, path: Path, wait: float = 0.0) -> Repaired:
        """Take damaged and missing segments out of an index, so that an index run takes in anew what was in them.

        Raises:
            StoreNotFound: there is none.
            StoreLocked: another process is writing.
            StoreError: it cannot be written, or more is damaged than segments.

        """
        from indexes.damage import repair

        path = path.absolute()
        Manifest.read(path)  # no lock is made where there is no index
        with _locked(path, wait):
            try:
                return repair(path)
            except OSError as error:
                raise cannot_write(path, error) from error

    @property
    def model(self) -> ModelRef:
        """What made the vectors."""
        return self.snapshot.manifest.model

    @property
    def root(self) -> Path:
        """The folder that the rows' paths are relative to."""
        root = self.snapshot.manifest.root
        return self.path.parent if root is None else Path(root)

    @property
    def source(self) -> SourceRef | None:
        """Where the rows come from; None: from the files of the root."""
        return self.snapshot.manifest.source

    def check_model(self, fingerprint: str, name: str) -> None:
        """Refuse a model whose vectors cannot be compared with the stored ones. Raises ModelMismatch."""
        if self.model.fingerprint == UNVERIFIED:
            if name == self.model.name:
                return
            raise ModelMismatch(
                f"the vectors in {self.path} were imported as those of {self.model.name}: leave out --model, or "
                "make a second index with --index PATH"
            )
        if fingerprint != self.model.fingerprint:
            same = " in another version" if name == self.model.name else f", not with {name}"
            raise ModelMismatch(
                f"the index at {self.path} was made with {self.model.name}{same}: use --model {self.model.name} as it "
                "was then, or make a second index with --index PATH"
            )

    def refresh(self) -> bool:
        """Take over what others have committed; whether there was anything. Raises what `open` does."""
        if Manifest.read(self.path) == self.snapshot.manifest:
            return False
        self.snapshot = Snapshot.open(self.path, self.snapshot)
        return True

    # ---- reading ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.snapshot.manifest.rows

    def rows(self) -> pa.Table:
        """All columns but the embeddings, one row for each position; extra ones of any row last.

        `path` is for reading: see `paths`.
        """
        return self.snapshot.rows

    def columns(self, *names: str) -> pa.Table:
        """Some of the columns of `rows`; only these are read."""
        return self.snapshot.columns(*names)

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns of `rows`."""
        return self.snapshot.schema

    def mask(self, where: Condition | str) -> NDArray[np.bool_]:
        """Find the rows that qualify, for `search`: (N,) bool. Reads only the columns that the condition names.

        Args:
            where: a pyarrow expression over the columns of `rows` and of `filters.DERIVED`, or a text as
                `filters.parse` takes it.

        Raises:
            FilterError: it names a column that is not there, compares values of different types, or is no condition.

        """
        from indexes.filters import mask

        return mask(self.snapshot, where)

    def texts(self) -> NDArray[np.bool_]:
        """Which positions hold a sentence, and not a picture: (N,)."""
        return self.snapshot.texts

    def paths(self) -> list[str]:
        """List the exact file name at each position, relative to the root."""
        return self.snapshot.paths

    def row(self, row_id: int) -> Row:
        """Look up one row by its id. Raises KeyError."""
        position = self.snapshot.position(row_id)
        if position is None:
            raise KeyError(f"no row has the id {row_id}")
        return self.snapshot.row(position)

    def vectors(self) -> Vectors:
        """Read the vector at each position: (N, D) unit rows, widened from the stored float16."""
        return self.snapshot.vectors

    def failures(self) -> list[Failure]:
        """Files that could not be read, as of the last commit on disk. Raises StoreCorrupt."""
        return read_failures(self.path / FAILURES)

    def search(self, queries: ArrayLike, k: int, allowed: NDArray[np.bool_] | None = None) -> Hits:
        """Find the k positions of highest cosine for each query.

        Exact, unless a FAISS file of an approximate kind was asked for (see `rebuild_index`); then that finds the
        candidates among the rows it covers, the rest is searched exactly beside it, and all scores are computed from
        the stored vectors. With or without it, a query gets min(k, allowed rows) hits.

        Args:
            queries: (Q, D), of any length but zero.
            k: how many, at least 1.
            allowed: (N,) which positions may be found; None is all of them.

        Raises:
            VectorError: the queries have another width, or are zero, NaN or infinite.
            StoreCorrupt: a segment is damaged.

        """
        unit = as_vectors(queries)
        check_width(unit, self.model.dim)
        check_search(k, allowed, len(self))
        return self.snapshot.search(unit, k, allowed)

    def check(self) -> list[str]:
        """Recompute every checksum of what the folder holds now; one line for each thing that is wrong.

        Of a damaged segment the line says what is lost with it. Anything may be wrong, and nothing is raised.
        """
        from indexes.damage import check

        return check(self.path)

    # ---- writing ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def write(self, wait: float = 0.0) -> Iterator[Writer]:
        """Take the lock and change the index; what is buffered is committed when the block is left, however it is left.

        Args:
            wait: seconds to wait for another writer.

        Raises:
            StoreLocked: another process, or another block of this one, is writing.
            StoreError: the folder cannot be written.

        """
        from indexes.writer import Writer

        with _locked(self.path, wait):
            self.refresh()
            try:
                (self.path / SEGMENTS).mkdir(exist_ok=True)
                remove_leftovers(self.path, self.snapshot.manifest)
            except OSError as error:
                raise cannot_write(self.path, error) from error
            writer = Writer(self)
            try:
                yield writer
            except BaseException:
                if not writer.failed:  # a disk that is full stays so, and the first message says it best
                    writer.commit()
                raise
            writer.commit()

    def index_is_stale(self) -> bool:
        """Whether the FAISS file is not the one that is wanted, is damaged, or has too many rows lying beside it.

        Too many: more than 1,000, and more than a tenth of those inside.
        """
        from indexes.choice import EXACT, kinds

        manifest, rows = self.snapshot.manifest, len(self)
        wanted, ann = manifest.wanted, manifest.ann
        if wanted.factory == EXACT or (wanted.factory is None and not kinds(rows, self.model.dim, wanted)):
            return ann is not None
        if ann and not self._ann_is_whole(ann):
            return True
        inside = int(np.searchsorted(self.snapshot.live, ann.rows)) if ann else 0
        return rows - inside > max(_STALE_ROWS, inside // _STALE_SHARE)

    def _ann_is_whole(self, ann: AnnRef) -> bool:
        try:
            return sha256_of(self.path / ANN_FILE) == ann.sha256
        except OSError:
            return False

    def rebuild_index(self, wanted: Wanted | str | None = None, probes: Mapping[str, Vectors] | None = None) -> None:
        """Build the FAISS file over all rows, outside of any `write` block. Vectors are not encoded again.

        What is wanted is remembered, tuned on queries, and measured against exact search: see `ann`.

        Args:
            wanted: a FAISS factory string, or "exact" for none, or how to choose; None is what was wanted last.
            probes: queries by their kind, (Q, D) unit rows each, on which the recall is measured beside stored rows.

        Raises:
            VectorError: FAISS does not know the kind, or needs more rows to train it; the index stays as it was.
            StoreLocked, StoreError: as `write`.

        """
        with self.write() as writer:
            if isinstance(wanted, str):
                wanted = Wanted(wanted)
            writer.rebuild_index(wanted or self.snapshot.manifest.wanted, probes or {})

    @property
    def wanted(self) -> Wanted:
        """Which FAISS index the store is to have."""
        return self.snapshot.manifest.wanted

    @property
    def ann(self) -> AnnRef | None:
        """The FAISS file, and what it was measured to do; None where search is exact."""
        return self.snapshot.manifest.ann


@contextlib.contextmanager
def _locked(path: Path, wait: float) -> Iterator[None]:
    """Hold the lock of an index folder. The system lets go of it when the process ends, however it ends."""
    from filelock import FileLock, Timeout

    lock = FileLock(path / _LOCK)
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        raise StoreLocked(f"another process is writing to the index at {path}: wait until it is done") from None
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        yield
    finally:
        lock.release()
