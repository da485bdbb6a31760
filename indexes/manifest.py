"""The commit point of an index folder: one JSON file, replaced whole, and the way every file here is replaced."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from indexes.errors import StoreCorrupt, StoreError, StoreNotFound

MANIFEST = "manifest.json"
SEGMENTS = "segments"
FAILURES = "failures.parquet"
ANN_FILE = "vectors.faiss"
TOMBSTONES = 1000  # ids of deleted rows that the manifest itself holds at most
REPAIR = "take in again what is still there with  diptych index --repair"
FORMAT = 2  # 1 had no file of deleted ids
_SEAL = b',\n "checksum": "'  # of all bytes before it; the last field
_FIELDS = {"format", "counts", "model", "root", "generation", "next_id", "segments", "tombstones", "deleted", "ann",
           "wanted", "source"}  # fmt: skip
_SEGMENT_NAME = re.compile(r"\d{8}\.parquet")
_DELETED_NAME = re.compile(r"deleted-\d{8}\.parquet")


@dataclass(frozen=True)
class ModelRef:
    """The model that made the vectors: the name a user types, the SHA-256 of what decides a vector, the width D."""

    name: str
    fingerprint: str
    dim: int


UNVERIFIED = "unverified"  # in place of a fingerprint: a model that was only named, by who imported its vectors


@dataclass(frozen=True)
class SegmentRef:
    """One immutable file of rows below ``segments/``; ``rows`` counts deleted ones too, as long as they are in it.

    ``texts`` of them are sentences, the others pictures. ``footer`` is the SHA-256 of the end of the file, which tells
    Parquet what lies where and is looked at before it is believed; "" in segments of older releases.
    """

    file: str
    rows: int
    sha256: str
    texts: int = 0
    footer: str = ""


@dataclass(frozen=True)
class Wanted:
    """Which FAISS index a store is to have: a factory string, "exact" for none at all, or None to choose one.

    A chosen kind takes at most ``memory`` bytes, and finds at least the share ``recall`` of the ten nearest rows.
    """

    factory: str | None = None
    memory: int = 4 << 30
    recall: float = 0.95


@dataclass(frozen=True)
class Measured:
    """What the FAISS index was measured to do when it was built, against exact search over the same rows.

    Attributes:
        recall: share of the ten nearest rows that are found, by the kind of query (text, stored rows, …).
        queries: how many queries of each kind.
        p50_ms: median time of one query with its scoring anew, in milliseconds.
        p99_ms: 99th percentile.
        bytes: size of the FAISS file.

    """

    recall: dict[str, float]
    queries: dict[str, int]
    p50_ms: float
    p99_ms: float
    bytes: int


@dataclass(frozen=True)
class DeletedRef:
    """One immutable file beside the manifest: the ids of ``rows`` deleted rows that are still in a segment."""

    file: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class AnnRef:
    """The FAISS file: its factory string, what it covers, and how it is searched.

    It covers all rows of the first ``segments`` segments, deleted ones too: row i of it is the i-th of them. Its
    ``refine`` · k best candidates are scored anew to find k rows; ``effort`` is nprobe or efSearch, 0 where the kind
    has neither.
    """

    factory: str
    segments: int
    rows: int
    sha256: str
    refine: int = 1
    effort: int = 0
    measured: Measured | None = None


@dataclass(frozen=True)
class SourceRef:
    """Where rows come from if not from the files of the root itself; what it means is the caller's business.

    ``kind`` says how ``path`` (of a file, relative to the root or absolute) is read, and ``images`` is the folder of
    the pictures that it names, if that was told. ``files`` are the name, size and time of change (ns) of what was read
    when all of it had been taken in.
    """

    kind: str
    path: str
    images: str | None = None
    files: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True)
class Manifest:
    """What an index folder holds at one moment. Every commit writes the next ``generation``."""

    model: ModelRef
    root: str | None  # None: the folder that the index folder lies in, so that both can be moved
    generation: int = 0
    next_id: int = 0
    segments: tuple[SegmentRef, ...] = ()  # in the order of their ids
    tombstones: tuple[int, ...] = ()  # ids of deleted rows that are still in a segment: the latest …
    deleted: DeletedRef | None = None  # … and, where they are many, the rest
    ann: AnnRef | None = None
    wanted: Wanted = field(default_factory=Wanted)
    failures: int = 0
    source: SourceRef | None = None  # None: the files of the root

    @property
    def stored(self) -> int:
        """Rows in the segments, deleted ones too."""
        return sum(segment.rows for segment in self.segments)

    @property
    def rows(self) -> int:
        """Rows that count."""
        return self.stored - len(self.tombstones) - (self.deleted.rows if self.deleted else 0)

    def write(self, folder: Path) -> None:
        """Make this the state of the folder, in one step. Raises OSError, and then the old state stays."""
        counts = {"rows": self.rows, "failures": self.failures}  # for people who look; `rows` follows from the rest
        fields = {"format": FORMAT, "counts": counts, **asdict(self)}
        del fields["failures"]
        with replacing(folder / MANIFEST) as file:
            file.write(_sealed(json.dumps(fields, indent=1).removesuffix("\n}").encode("ascii")))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the state of a folder.

        Raises:
            StoreNotFound: there is no index.
            StoreCorrupt: the file is damaged.
            StoreError: it cannot be read, or a newer release wrote it.

        """
        file = folder / MANIFEST
        try:
            text = file.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise StoreNotFound(f"there is no index at {folder}: make one with  diptych index FOLDER") from None
        except OSError as error:
            raise StoreError(f"{file} cannot be read: {error.strerror}") from error
        try:
            fields = json.loads(text)
            if isinstance(fields["format"], int) and fields["format"] > FORMAT:
                raise StoreError(
                    f"{file} has format {fields['format']}, and this release reads up to {FORMAT}: upgrade diptych"
                )
            # Releases before the checksum wrote none; and where its name is what was damaged, that name is unknown.
            if "checksum" in fields and text != _sealed(text.rpartition(_SEAL)[0]):
                raise ValueError("its content is not what was written")
            if fields.keys() - _FIELDS - {"checksum"}:
                raise ValueError("it has unknown fields")
            return _parsed(fields)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise damaged(file, f"{type(error).__name__}: {error}") from error


def _sealed(body: bytes) -> bytes:
    """End the JSON with the SHA-256 of all that stands before it."""
    return body + _SEAL + hashlib.sha256(body).hexdigest().encode("ascii") + b'"\n}'


def _parsed(fields: dict[str, Any]) -> Manifest:
    manifest = Manifest(
        model=ModelRef(**fields["model"]),
        root=fields["root"],
        generation=fields["generation"],
        next_id=fields["next_id"],
        segments=tuple(SegmentRef(**segment) for segment in fields["segments"]),
        tombstones=tuple(fields["tombstones"]),
        deleted=DeletedRef(**fields["deleted"]) if fields.get("deleted") else None,
        ann=_ann(fields["ann"]) if fields["ann"] else None,
        wanted=Wanted(**fields.get("wanted", {})),
        failures=fields["counts"]["failures"],
        source=_parsed_source(fields.get("source")),
    )
    numbers = [manifest.model.dim, manifest.generation, manifest.next_id, manifest.failures, *manifest.tombstones]
    numbers += [number for segment in manifest.segments for number in (segment.rows, segment.texts)]
    numbers += [manifest.deleted.rows] if manifest.deleted else []
    if not all(type(number) is int and number >= 0 for number in numbers) or fields["format"] not in (1, FORMAT):
        raise ValueError("a number is not what it should be")
    if not all(_SEGMENT_NAME.fullmatch(segment.file) for segment in manifest.segments):  # never a path out of here
        raise ValueError("a segment has a wrong name")
    if manifest.deleted and not _DELETED_NAME.fullmatch(manifest.deleted.file):
        raise ValueError("the file of deleted rows has a wrong name")
    if not isinstance(manifest.root, str | None) or manifest.rows < 0:
        raise ValueError("its parts contradict each other")
    if manifest.ann and manifest.ann.rows != sum(s.rows for s in manifest.segments[: manifest.ann.segments]):
        raise ValueError("its parts contradict each other")
    return manifest


def _ann(fields: dict[str, Any]) -> AnnRef:
    measured = fields.get("measured")
    return AnnRef(**{**fields, "measured": Measured(**measured) if measured else None})


def _parsed_source(fields: dict[str, Any] | None) -> SourceRef | None:
    if fields is None:
        return None
    files = tuple((str(name), int(size), int(mtime_ns)) for name, size, mtime_ns in fields["files"])
    source = SourceRef(**{**fields, "files": files})
    if (
        not isinstance(source.kind, str)
        or not isinstance(source.path, str)
        or not isinstance(source.images, str | None)
    ):
        raise ValueError("its source is none")
    return source


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under its name whole or not at all, and is on the disk when the block is left."""
    temporary = target.with_name(target.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if os.name != "nt":  # Windows cannot open folders, and keeps renames in its journal
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_leftovers(folder: Path, manifest: Manifest) -> None:
    """Delete what a killed writer left, and files that no longer count. Only for the holder of the lock."""
    kept = {segment.file for segment in manifest.segments} | ({manifest.deleted.file} if manifest.deleted else set())
    own = [
        file
        for place, name in ((folder / SEGMENTS, _SEGMENT_NAME), (folder, _DELETED_NAME))
        for file in place.iterdir()
        if file.name not in kept and name.fullmatch(file.name.removesuffix(".tmp"))
    ]
    for file in (*own, *(folder / f"{name}.tmp" for name in (MANIFEST, FAILURES, ANN_FILE))):
        with contextlib.suppress(OSError):  # Windows keeps what a reader has open; the next writer tries again
            file.unlink(missing_ok=True)


def sha256_of(file: Path) -> str:
    """Hash a file's content."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def damaged(file: Path, reason: object) -> StoreCorrupt:
    """Say which file of an index is damaged, why, and what helps."""
    what = " ".join(str(reason).split())[:200]
    return StoreCorrupt(f"{file} is damaged ({what}): {remedy(file)}")


def remedy(file: Path) -> str:
    """What helps when a file of an index is damaged or missing."""
    if file.parent.name == SEGMENTS:
        return f"see what is lost with  diptych info --check  and {REPAIR}"
    if file.name == ANN_FILE:
        return "search does without it, and the next  diptych index  builds it again"
    if file.name == FAILURES:
        return "delete it, it only names files that could not be read"
    return f"delete the folder {file.parent} and index again"


def cannot_write(folder: Path, error: OSError) -> StoreError:
    """Say that an index cannot be written, why, and what is left."""
    return StoreError(
        f"the index at {folder} cannot be written ({error.strerror or error}): it stays as it was at its last commit; "
        "make room or allow writing there, and run again"
    )
