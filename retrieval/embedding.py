"""From pictures and sentences to vectors: the one way there, with the one cache, so that nothing is encoded twice.

A vector is kept under a SHA-256 over what it was made of: a picture's content (wherever it lies, whatever it is
called), or a sentence. The model's fingerprint is the folder. What comes out of the cache is what went in, bit for bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
import uuid
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from indexes.manifest import replacing
from indexes.vectors import Vectors
from retrieval.encoders import Encoder
from retrieval.errors import DataError, ImageError
from retrieval.images import os_reason, read_file, read_photo
from retrieval.pairs import Picture
from retrieval.pipeline import map_ahead

Progress = Callable[[int, int], None]
Result = TypeVar("Result")
_Keys = NDArray[np.uint8]  # (N, 32), a SHA-256 each

_BATCH = 64  # pictures handed to the encoder at a time
_SENTENCES = 1024  # the same of sentences; enough to sort by length
_KEPT_EVERY, _KEPT_SECONDS = 256, 3.0  # a killed run loses no more rows, or work, than that
_PICTURE = b"picture 2\0"  # of keys; the number rises when the same file comes to give other pixels
_TEXT = b"text\0"


# ---- pictures and sentences to vectors -------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """What is made of each picture, in threads, before it is encoded.

    ``name`` tells the vector from that of other views: everything but the content that decides what ``draw`` returns.
    """

    name: Callable[[Picture], str]
    draw: Callable[[Image.Image, Picture], Image.Image]


def cache_name(encoder: Encoder) -> str:
    """Where an encoder's vectors are kept: those computed in bf16, whose fingerprint is the same, apart."""
    in_bf16 = getattr(encoder, "precision", "fp32") == "bf16"
    return f"{encoder.fingerprint}-bf16" if in_bf16 else encoder.fingerprint


class KnownVectors(Protocol):
    """Vectors of one model by key: what is in there is not encoded, and what is encoded is handed to it.

    The keys are those of :func:`picture_key` and :func:`sentence_key`.
    """

    def __contains__(self, key: object) -> bool:
        """Whether a key was there at the last refresh. May be asked by several threads."""

    def refresh(self) -> None:
        """See what is there now."""

    def get(self, keys: Sequence[bytes]) -> Found:
        """Look keys up."""

    def put(self, keys: Sequence[bytes], vectors: Vectors) -> None:
        """Keep vectors (N, D), float32. Never fails."""


def encode_pictures(
    encoder: Encoder,
    pictures: Sequence[Picture],
    *,
    cache: KnownVectors | None = None,
    progress: Progress | None = None,
    view: View | None = None,
) -> Vectors:
    """Pictures -> (N, D) unit rows, in order, each content encoded once.

    What is in the cache is not even decoded; what is encoded is in it after seconds, however this ends. The last bits
    of a vector may depend on what it was encoded together with: with a cache, the first one computed stands.

    Args:
        encoder: the model.
        pictures: paths, or whatever else has bytes.
        cache: of the encoder's fingerprint.
        progress: called with (pictures done, pictures in all); those in the cache count at once.
        view: what is encoded of each picture; None is the whole of it, as search sees it.

    Raises:
        UnreadablePictures: a DataError; how many, and the first of them. All have been tried then.
    """
    if cache is not None:
        cache.refresh()
    return _encode_pictures(encoder, pictures, cache, cache or (), progress, view)


def _encode_pictures(
    encoder: Encoder,
    pictures: Sequence[Picture],
    cache: KnownVectors | None,
    known: Container[bytes],  # keys that need not be decoded
    progress: Progress | None,
    view: View | None,
) -> Vectors:
    slots: dict[bytes, int] = {}  # a key's row in `unique`
    where = np.empty(len(pictures), np.int64)
    unique = np.empty((len(pictures), encoder.dim), np.float32)
    batch: dict[bytes, Image.Image] = {}
    cached: dict[bytes, Picture] = {}

    def prepare(picture: Picture, data: bytes) -> tuple[bytes, Image.Image | None]:
        key = picture_key(hashlib.sha256(data).digest(), view.name(picture) if view else "")
        if key in slots or key in known:
            return key, None
        image = read_photo(data, preprocessing=None if view else encoder.preprocessing).image
        return key, view.draw(image, picture) if view else image

    with _Keeper(cache) as keeper:

        def encode() -> None:
            vectors = encoder.encode_images([*batch.values()])
            unique[[slots[key] for key in batch]] = vectors
            keeper.add([*batch], vectors)
            batch.clear()

        for number, (key, image) in enumerate(read_all(prepare, pictures)):
            if key not in slots:
                slots[key] = len(slots)
                if image is None:
                    cached[key] = pictures[number]
                else:
                    batch[key] = image
            where[number] = slots[key]
            if len(batch) == getattr(encoder, "batch_size", _BATCH):
                encode()
            if progress and (number + 1) % _BATCH == 0:
                progress(number + 1 - len(batch), len(pictures))
        if batch:
            encode()
    if cached and cache is not None:
        unique[[slots[key] for key in cached]] = _fetch(encoder, cached, cache, view)
    if progress:
        progress(len(pictures), len(pictures))
    return unique if len(slots) == len(pictures) else unique[where]


def _fetch(encoder: Encoder, cached: Mapping[bytes, Picture], cache: KnownVectors, view: View | None) -> Vectors:
    """The vectors that the cache had; what has been deleted meanwhile, or shows itself damaged now, is encoded."""
    found = cache.get([*cached])
    if found.known.all():
        return found.vectors
    rows = np.empty((len(cached), encoder.dim), np.float32)
    rows[found.known] = found.vectors
    rows[~found.known] = _encode_pictures(encoder, _where(cached.values(), ~found.known), cache, (), None, view)
    return rows


class UnreadablePictures(DataError):
    """Pictures cannot be read; all have been tried. ``reasons`` says of each by its row which it is, and why."""

    def __init__(self, reasons: Mapping[int, str], count: int) -> None:
        first = next(iter(reasons.values()))
        super().__init__(f"{len(reasons)} of {count} pictures cannot be read, the first: {first}")
        self.reasons = reasons


def try_all(
    prepare: Callable[[Picture, bytes], Result], pictures: Sequence[Picture]
) -> Iterator[tuple[Picture, Result | ImageError]]:
    """Yield each picture and ``prepare(picture, its bytes)``, or why there is none; computed ahead by threads."""

    def attempt(picture: Picture) -> Result | ImageError:
        try:
            return prepare(picture, picture_bytes(picture))
        except ImageError as error:
            return error

    yield from map_ahead(attempt, pictures)


def read_all(prepare: Callable[[Picture, bytes], Result], pictures: Sequence[Picture]) -> Iterator[Result]:
    """Yield ``prepare(picture, its bytes)`` in order, computed ahead by threads; an ImageError of it is collected.

    Raises:
        UnreadablePictures: at the end. What follows the first of them is tried, and not yielded.
    """
    reasons: dict[int, str] = {}
    for row, (picture, result) in enumerate(try_all(prepare, pictures)):
        if isinstance(result, ImageError):
            reasons[row] = f"{picture}: {result}"
        elif not reasons:
            yield result
    if reasons:
        raise UnreadablePictures(reasons, len(pictures))


def encode_sentences(encoder: Encoder, texts: Sequence[str], *, cache: KnownVectors | None = None) -> Vectors:
    """Sentences -> (N, D) unit rows, in order, each encoded once; those in the cache not at all.

    The last bits of a vector may depend on the padding, and so on the sentences beside it: with a cache, the first one
    computed stands.
    """
    if not texts:
        return encoder.encode_texts(texts)
    keys = {text: sentence_key(text) for text in texts}
    found = cache.get([*keys.values()]) if cache is not None else Found.nothing(len(keys))
    missing = _where(keys, ~found.known)
    parts = [found.vectors] if found.known.any() else []
    with _Keeper(cache) as keeper:
        for i in range(0, len(missing), _SENTENCES):
            chunk = missing[i : i + _SENTENCES]
            parts.append(encoder.encode_texts(chunk))
            keeper.add([keys[text] for text in chunk], parts[-1])
    rows = np.concatenate(parts)
    slots = {text: row for row, text in enumerate([*_where(keys, found.known), *missing])}
    return rows[[slots[text] for text in texts]]


def picture_key(content: bytes, view: str = "") -> bytes:
    """The key of a picture by the SHA-256 of its file, and of the view of it that was encoded."""
    return hashlib.sha256(_PICTURE + view.encode("utf-8", "surrogatepass") + b"\0" + content).digest()


def sentence_key(text: str) -> bytes:
    """The key of a sentence."""
    return hashlib.sha256(_TEXT + text.encode("utf-8", "surrogatepass")).digest()


def picture_bytes(picture: Picture) -> bytes:
    """Read an encoded picture; raises ImageError."""
    if isinstance(picture, Path):
        return read_file(picture)
    try:
        return picture.read_bytes()
    except OSError as error:
        raise ImageError(os_reason(error)) from error


def _where(items: Iterable[Result], mask: NDArray[np.bool_]) -> list[Result]:
    return [item for item, kept in zip(items, mask.tolist(), strict=True) if kept]


class _Keeper:
    """Hands vectors to the cache in portions, and when the block ends, however it ends, what is left."""

    def __init__(self, cache: KnownVectors | None) -> None:
        self.cache = cache
        self.keys: list[bytes] = []
        self.vectors: list[Vectors] = []
        self.since = time.monotonic()

    def __enter__(self) -> _Keeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()

    def add(self, keys: Sequence[bytes], vectors: Vectors) -> None:
        self.keys += keys
        self.vectors.append(vectors)
        if len(self.keys) >= _KEPT_EVERY or time.monotonic() - self.since >= _KEPT_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self.cache is not None and self.keys:
            self.cache.put(self.keys, np.concatenate(self.vectors))
        self.keys, self.vectors = [], []  # not before: a put that Ctrl-C ends is done again on the way out
        self.since = time.monotonic()


# ---- the cache -------------------------------------------------------------------------------------------------------

_GROUP = 2048  # rows read at a time when a few are wanted: 4 MB at 512 dimensions
_MANY = 32  # files of one width; more are merged
_TRIES = 5  # of a look-up while other processes merge files under it
_OLD = 3600.0  # seconds: nobody is writing that file any more
_FOLDER_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,127}")
_FILE_NAME = re.compile(r"[0-9a-f]{32}\.parquet")


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/diptych/embeddings``: may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diptych" / "embeddings"


@dataclass(frozen=True)
class Found:
    """The answer to N keys: which of them are known (N,), and the vectors of those, in order (K, D)."""

    known: NDArray[np.bool_]
    vectors: Vectors

    @classmethod
    def nothing(cls, count: int, dim: int = 0) -> Found:
        """No key of so many is known."""
        return cls(np.zeros(count, bool), np.empty((0, dim), np.float32))


class EmbeddingCache:
    """A :class:`KnownVectors` in immutable Parquet files: ``FOLDER/FINGERPRINT/*.parquet``.

    Processes may read and write at once, without a lock: a file appears whole, under a name of its own, and is deleted
    only when another holds all of its rows. What is damaged, foreign or of another width is passed over. Where nothing
    can be written nothing is kept, and ``problem`` says why.
    """

    def __init__(self, fingerprint: str, dim: int | None = None, folder: Path | None = None) -> None:
        """Open the cache of a model; nothing is read or written yet.

        Args:
            fingerprint: of the encoder.
            dim: width of the vectors; None where it is not known before one is computed.
            folder: instead of :func:`cache_folder`.
        """
        if not _FOLDER_NAME.fullmatch(fingerprint):  # it may come from a file that somebody else wrote
            fingerprint = hashlib.sha256(fingerprint.encode("utf-8", "surrogatepass")).hexdigest()
        self.folder = (folder or cache_folder()) / fingerprint
        self.dim = dim
        self.problem: str | None = None
        self._files: dict[str, _File] = {}
        self._passed_over: set[str] = set()
        self._index = _Index.over([])  # replaced, never changed: threads may be reading it

    def __contains__(self, key: object) -> bool:
        """Whether a key was there at the last refresh. May be asked by several threads."""
        return isinstance(key, bytes) and bool(self._index.find(_as_rows([key]))[0] >= 0)

    def refresh(self) -> None:
        """See what has been written or deleted, by this process or another."""
        for _ in range(_TRIES):
            names = _names(self.folder) - self._passed_over
            files = {name: file for name, file in self._files.items() if name in names}
            vanished = False
            for name in sorted(names - files.keys()):
                try:
                    files[name] = _File.open(self.folder / name)
                except FileNotFoundError:  # merged a moment ago, into one that is not among these names
                    vanished = True
                except _Damaged:
                    self._passed_over.add(name)
            if not vanished:
                break
        if files.keys() != self._files.keys():
            self._files = files
            self._index = _Index.over([file for file in files.values() if self.dim in (None, file.dim)])

    def get(self, keys: Sequence[bytes]) -> Found:
        """Look keys up. Only the vectors asked for are read."""
        wanted = _as_rows(keys)
        for _ in range(_TRIES):
            self.refresh()
            found, damaged = self._index.read(wanted, self.dim)
            if not damaged:
                break
            self._passed_over |= damaged  # their keys may be in other files too
        return found

    def put(self, keys: Sequence[bytes], vectors: Vectors) -> None:
        """Keep vectors (N, D), float32. Never fails: see ``problem``."""
        if not keys:
            return
        dim = vectors.shape[1]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder, [(_as_rows(keys), vectors)], dim)
        except OSError as error:
            self.problem = f"vectors are not kept for the next time, {self.folder} cannot be written to: {error}"
            return
        if len(_names(self.folder) - self._passed_over) > _MANY:
            with contextlib.suppress(OSError, _Damaged):  # nothing is lost; what is damaged is known by the next time
                self._merge(dim)

    def _merge(self, dim: int) -> None:
        """Make one file of many small ones. A row is copied about as often as the cache has doubled since."""
        self.refresh()
        files = sorted((file for file in self._files.values() if file.dim == dim), key=lambda file: len(file.keys))
        if len(files) <= _MANY:
            return
        while len(files) > 2 and len(files[-1].keys) > sum(len(file.keys) for file in files[:-1]):
            files.pop()
        index = _Index.over(files)
        first = index.find(index.keys) == np.arange(len(index.keys))  # of equal keys

        def portions() -> Iterator[tuple[_Keys, Vectors]]:
            for number, file in enumerate(files):
                rows = np.sort(index.row[first & (index.file == number)])
                for i in range(0, len(rows), _GROUP):
                    part = rows[i : i + _GROUP]
                    try:
                        yield file.keys[part], file.read(part)
                    except _Damaged:
                        self._passed_over.add(file.path.name)
                        raise

        _write(self.folder, portions(), dim)
        old = time.time() - _OLD
        leftovers = [path for path in self.folder.glob("*.tmp") if _FILE_NAME.fullmatch(path.stem)]
        for path in (*(file.path for file in files), *leftovers):
            with contextlib.suppress(OSError):  # Windows keeps what a reader has open; the next merge takes it in
                if path.suffix != ".tmp" or path.stat().st_mtime < old:
                    path.unlink()


class _Damaged(Exception):
    """A file is not what it should be."""


@dataclass(frozen=True)
class _File:
    """One file: its keys in memory, its vectors not."""

    path: Path
    dim: int
    keys: _Keys
    starts: NDArray[np.int64]  # the row that each row group begins with

    @classmethod
    def open(cls, path: Path) -> _File:
        """Read the keys. Raises _Damaged, or FileNotFoundError."""
        with _parquet(path) as parquet:
            dim = parquet.schema_arrow.field("embedding").type.list_size
            if not parquet.schema_arrow.equals(_schema(dim)):
                raise ValueError("other columns than expected")
            chunks = parquet.read(["key"], use_threads=False)["key"].chunks
            keys = [np.frombuffer(chunk.buffers()[1], np.uint8).reshape(-1, 32) for chunk in chunks]
            keys = [rows[chunk.offset :][: len(chunk)] for rows, chunk in zip(keys, chunks, strict=True)]
            sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
            return cls(path, dim, np.concatenate([np.empty((0, 32), np.uint8), *keys]), np.cumsum([0, *sizes])[:-1])

    def read(self, rows: NDArray[np.int64]) -> Vectors:
        """Some rows' vectors (K, D). Raises _Damaged, or FileNotFoundError."""
        out = np.empty((len(rows), self.dim), np.float32)
        groups = np.searchsorted(self.starts, rows, side="right") - 1
        with _parquet(self.path) as parquet:
            for group in np.unique(groups).tolist():
                column = parquet.read_row_group(group, columns=["embedding"], use_threads=False)["embedding"]
                vectors = column.combine_chunks().flatten().to_numpy().reshape(-1, self.dim)
                here = groups == group
                out[here] = vectors[rows[here] - self.starts[group]]
        return out


@dataclass(frozen=True)
class _Index:
    """The keys of some files, in an order to search in: that of their first 8 bytes as a number."""

    files: Sequence[_File]
    start: NDArray[np.uint64]  # (N,) rising
    keys: _Keys
    file: NDArray[np.int64]  # (N,) where it is: number of the file,
    row: NDArray[np.int64]  # and row in it

    @classmethod
    def over(cls, files: Sequence[_File]) -> _Index:
        keys = np.concatenate([np.empty((0, 32), np.uint8), *(file.keys for file in files)])
        start = _start(keys)
        order = np.argsort(start, kind="stable")
        sizes = [len(file.keys) for file in files]
        row = np.concatenate([np.empty(0, np.int64), *map(np.arange, sizes)])
        return cls(files, start[order], keys[order], np.repeat(np.arange(len(files)), sizes)[order], row[order])

    def find(self, wanted: _Keys) -> NDArray[np.int64]:
        """Where each key stands; -1 = nowhere."""
        starts, found = _start(wanted), np.full(len(wanted), -1, np.int64)
        at = np.searchsorted(self.start, starts)
        left = np.arange(len(wanted))
        while True:
            left = left[at[left] < len(self.start)]
            left = left[self.start[at[left]] == starts[left]]
            if not left.size:
                return found
            equal = (self.keys[at[left]] == wanted[left]).all(1)
            found[left[equal]] = at[left[equal]]
            left = left[~equal]
            at[left] += 1  # another key with the same first 8 bytes: of a true SHA-256, never seen

    def read(self, wanted: _Keys, dim: int | None) -> tuple[Found, set[str]]:
        """The vectors of these keys as far as they can be read, and the names of the files where they cannot."""
        at = self.find(wanted)
        bad: set[str] = set()
        known = at >= 0
        if not known.any():
            return Found.nothing(len(wanted), dim or 0), bad
        at = np.where(known, at, 0)
        number, row = self.file[at], self.row[at]
        dim = dim or self.files[number[known][0]].dim
        vectors = np.empty((len(wanted), dim), np.float32)
        for i in np.unique(number[known]).tolist():
            here = known & (number == i)
            try:
                if self.files[i].dim != dim:
                    raise _Damaged
                vectors[here] = self.files[i].read(row[here])
            except (_Damaged, FileNotFoundError):
                bad.add(self.files[i].path.name)
                known &= ~here
        return Found(known, vectors if known.all() else vectors[known]), bad


def _as_rows(keys: Sequence[bytes]) -> _Keys:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), 32)


def _start(keys: _Keys) -> NDArray[np.uint64]:
    return np.ascontiguousarray(keys[:, :8]).view(np.uint64).ravel()


def _names(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if _FILE_NAME.fullmatch(entry.name) and entry.is_file()}
    except OSError:
        return set()


def _schema(dim: int) -> Any:
    import pyarrow as pa

    item = pa.field("element", pa.float32(), nullable=False)
    return pa.schema(
        [pa.field("key", pa.binary(32), nullable=False), pa.field("embedding", pa.list_(item, dim), nullable=False)]
    )


def _write(folder: Path, portions: Iterable[tuple[_Keys, Vectors]], dim: int) -> None:
    """Write one more file, whole or not at all. Raises OSError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(dim)
    waiting: list[Any] = []
    with (
        replacing(folder / f"{uuid.uuid4().hex}.parquet") as stream,
        # Neither column can be compressed. The checksums make a flipped bit a damaged file instead of a wrong vector.
        pq.ParquetWriter(
            stream, schema, compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True
        ) as writer,
    ):

        def flush() -> None:
            writer.write_table(pa.concat_tables(waiting), row_group_size=_GROUP)
            waiting.clear()

        for keys, vectors in portions:
            key = pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(keys), [None, pa.py_buffer(keys)])
            flat = pa.array(np.ascontiguousarray(vectors, np.float32).ravel())
            embedding = pa.FixedSizeListArray.from_arrays(flat, type=schema.field("embedding").type)
            waiting.append(pa.Table.from_arrays([key, embedding], schema=schema))
            if sum(map(len, waiting)) >= _GROUP:
                flush()
        if waiting:
            flush()


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """Open a file; whatever Arrow and the system say of it is _Damaged, but for FileNotFoundError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pa.OSFile(os.fsencode(path)) as stream:
            yield pq.ParquetFile(stream, page_checksum_verification=True)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise _Damaged(path) from error
