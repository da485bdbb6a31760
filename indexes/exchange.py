"""Vectors of other tools taken in, without encoding anything: NumPy files with a table beside them.

Read are clip-retrieval's folder, and a .npy of vectors with a table (Parquet, CSV, JSONL) whose row i says what vector
i is. Vectors pass through memory maps in blocks, so that their number is bounded by the disk alone; of the tables, one
is in memory at a time, and the paths of all.

clip-retrieval (2.45) writes ``img_emb/img_emb_0.npy``, ``text_emb/text_emb_0.npy`` and ``metadata/metadata_0.parquet``
(image_path, caption, …), with as many parts as there are millions of rows: row i of the three files of one number is
one picture and its caption.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import posixpath
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from indexes import runtime
from indexes.columns import unified
from indexes.errors import ExchangeError, StoreError, VectorError
from indexes.manifest import SEGMENTS, ModelRef, SourceRef, cannot_write, sha256_of
from indexes.segments import ROW_SCHEMA, with_embeddings, write_segment
from indexes.store import Store
from indexes.tables import extras, read_table, texts
from indexes.vectors import as_vectors

PATH_COLUMNS = (
    *("image_path", "path", "filepath", "file_path", "file_name", "filename", "image", "image_name", "img", "url"),
)
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence", "comment")
CLIP_RETRIEVAL, NPY = "clip-retrieval", "npy"  # layouts
MARK, _FORMAT = b"diptych", 1
VECTORS, METADATA = "vectors.npy", "metadata.parquet"
_BLOCK = 2048  # rows at a time
_SHOWN = 3
_OWN = frozenset({*ROW_SCHEMA.names, "embedding"})
_KNOWN = ("width", "height", "taken_at", "latitude", "longitude")  # mean the same in other people's tables
_ESCAPE = "surrogatepass" if os.name == "nt" else "surrogateescape"  # as Python itself reads file names

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Mark:
    """What a Parquet file that was written here says of itself, in its metadata: JSON under the key `MARK`."""

    layout: str  # CLIP_RETRIEVAL or NPY
    model: ModelRef
    images: bool = True  # vectors of pictures belong to it
    texts: bool = False
    parts: int = 1  # that were written
    source: SourceRef | None = None  # of the index, if its rows are no files of its root

    def dump(self) -> bytes:
        """As bytes for the metadata."""
        return json.dumps({"format": _FORMAT, **asdict(self)}).encode()

    @classmethod
    def parse(cls, text: bytes) -> Mark | None:
        """What `dump` wrote; None for anything else."""
        try:
            fields = json.loads(text)
            if fields.pop("format") != _FORMAT:
                return None
            mark = cls(**{**fields, "model": ModelRef(**fields["model"]), "source": _source(fields.get("source"))})
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        return mark if mark.layout in (CLIP_RETRIEVAL, NPY) and isinstance(mark.parts, int) else None


def _source(fields: dict[str, Any] | None) -> SourceRef | None:
    if fields is None:
        return None
    return SourceRef(**{**fields, "files": tuple((str(f[0]), int(f[1]), int(f[2])) for f in fields["files"])})


@dataclass(frozen=True)
class Part:
    """A file of vectors, and the table whose row i says what vector i is.

    Attributes:
        vectors: a .npy file, (N, D).
        metadata: a table of N rows.
        kind: of all its rows, image or text. None: the table has a column ``kind``.
        paired: another part has the texts (or images) that belong to the same rows of the table.

    """

    vectors: Path
    metadata: Path
    kind: str | None = "image"
    paired: bool = False


@dataclass(frozen=True)
class Imported:
    """What an import took in, in rows.

    Attributes:
        images: rows that are pictures.
        texts: rows that are texts.
        repeated: rows that named a picture again, with the same vector; they are left out.
        missing: pictures whose files are not there; the next index run will forget them.
        changed: pictures whose files are not what they were when their vectors were made, as far as the table tells;
            the next index run will encode them anew.

    """

    images: int = 0
    texts: int = 0
    repeated: int = 0
    missing: int = 0
    changed: int = 0


@dataclass(frozen=True)
class Roles:
    """Which columns of a table mean what; None: the first that is there of `PATH_COLUMNS` and `CAPTION_COLUMNS`."""

    path: str | None = None
    caption: str | None = None


# ---- finding and opening what is to be read --------------------------------------------------------------------------


def find_parts(source: Path, metadata: Path | None = None, kind: str | None = None) -> list[Part]:
    """Find the files of vectors and the tables that belong to them.

    Args:
        source: a .npy file; a folder with ``vectors.npy`` and ``metadata.parquet``; or clip-retrieval's.
        metadata: the table of a .npy file; None: ``metadata.parquet`` beside it.
        kind: what the vectors of a .npy file are, image or text. None: what the table's own column says, or images.

    Raises:
        ExchangeError: something is missing, or numbered parts do not fit each other.

    """
    if not source.exists():
        raise ExchangeError(f"there is no {source}")
    if source.is_dir() and ((source / "img_emb").is_dir() or (source / "text_emb").is_dir()):
        if metadata is not None or kind is not None:
            raise ExchangeError(f"{source} is clip-retrieval's folder, which has its own tables: leave out --metadata")
        return _clip_retrieval_parts(source)
    file = source / VECTORS if source.is_dir() else source
    if not file.exists():
        hint = ""
        if (source / "image.index").exists() or (source / "text.index").exists():
            hint = "; its .index files are derived from them: give the folder that  clip-retrieval inference  wrote"
        raise ExchangeError(f"{source} holds no vectors: neither {VECTORS} nor img_emb/ nor text_emb/{hint}")
    table = metadata or file.with_name(METADATA)
    if not table.exists():
        told = f"{table} is missing" if metadata else f"nothing says what the vectors in {file} are of"
        raise ExchangeError(f"{told}: name a table of as many rows with --metadata (Parquet, CSV, JSONL)")
    return [Part(file, table, kind)]


def _clip_retrieval_parts(folder: Path) -> list[Part]:
    tables = _numbered(folder / "metadata", r"metadata_(\d+)\.parquet")
    found = {kind: _numbered(folder / f"{kind}_emb", rf"{kind}_emb_(\d+)\.npy") for kind in ("img", "text")}
    numbers = sorted({*tables, *found["img"], *found["text"]})
    if not numbers:
        raise ExchangeError(f"{folder} has no files of vectors: img_emb/img_emb_0.npy or text_emb/text_emb_0.npy")
    parts = []
    for number in numbers:
        mark = _mark(tables[number]) if number in tables else None
        present = {kind: number in files for kind, files in found.items()}
        wanted = {kind: bool(files) for kind, files in found.items()}
        if mark:
            wanted = {"img": mark.images, "text": mark.texts}
            if mark.parts != len(numbers):
                raise ExchangeError(f"{folder} has {len(numbers)} of the {mark.parts} parts that were written")
        lacking = [f"{kind}_emb/{kind}_emb" for kind in found if wanted[kind] and not present[kind]]
        lacking += [] if number in tables else ["metadata/metadata"]
        if lacking:
            there = next(file for files in (*found.values(), tables) for n, file in files.items() if n == number)
            raise ExchangeError(f"{folder}: there is {there.name}, but no {lacking[0]} of number {number}")
        paired = all(present.values())
        for kind, files in found.items():
            if number in files:
                parts.append(Part(files[number], tables[number], "image" if kind == "img" else kind, paired))
    return parts


def _numbered(folder: Path, pattern: str) -> dict[int, Path]:
    """The files of a folder by their number, in its order and not in that of their names."""
    files: dict[int, Path] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if match := re.fullmatch(pattern, file.name):
            if int(match[1]) in files:
                raise ExchangeError(f"{files[int(match[1])]} and {file.name} have one number: remove one of them")
            files[int(match[1])] = file
    return dict(sorted(files.items()))


def _mark(table: Path) -> Mark | None:
    """What was written here says of itself; None for other people's tables. Damage is told when the table is read."""
    if table.suffix.lower() != ".parquet":
        return None
    import pyarrow.parquet as pq

    try:
        with table.open("rb") as stream:
            text = (pq.read_schema(stream).metadata or {}).get(MARK)
        return None if text is None else Mark.parse(text)
    except (pa.ArrowException, OSError):
        return None


def mark_of(parts: Sequence[Part]) -> Mark | None:
    """What the tables say of themselves, if they were written here. Raises ExchangeError where they contradict."""
    marks = [mark for mark in (_mark(part.metadata) for part in parts) if mark]
    if len({(mark.model, mark.source) for mark in marks}) > 1:
        raise ExchangeError(f"{parts[0].metadata.parent} has vectors of several indexes: import each for itself")
    return marks[0] if marks else None


def open_vectors(file: Path) -> NDArray[Any]:
    """Map a .npy file of vectors, (N, D) numbers, as they are on the disk. Raises ExchangeError."""
    try:
        with file.open("rb") as stream:
            if stream.read(6) != b"\x93NUMPY":
                raise ExchangeError(
                    f"{file} is no .npy file: write the vectors with numpy.save (pickles are never loaded)"
                )
        array: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ExchangeError(f"{file} is missing") from None
    except (ValueError, EOFError, OSError) as error:
        raise ExchangeError(f"{file} is no array of vectors: {error}") from error
    if array.ndim != 2 or not array.shape[1] or array.dtype.kind not in "fiu":
        raise ExchangeError(f"{file} holds {array.dtype} of shape {array.shape}: vectors are numbers, one row each")
    return array


def to_halves(block: NDArray[Any]) -> NDArray[np.float16]:
    """Unit rows rounded to float16: (N, D) numbers as a store keeps them.

    Rows whose numbers are float16 already, and whose length is 1 to within that rounding, stay as they are, bit for
    bit: bringing them to length 1 once more would only round them again.

    Raises:
        VectorError: a row is zero, NaN or infinite.

    """
    with np.errstate(over="ignore"):
        near = block.astype(np.float16)
    wide = near.astype(np.float64)
    lengths = np.sqrt(np.einsum("nd,nd->n", wide, wide))
    rounding = 2.0**-11 + block.shape[1] ** 0.5 * 2.0**-25  # of normal numbers, and of those near zero
    kept = (near == block).all(axis=1) & (np.abs(lengths - 1) <= rounding)
    if not kept.all():
        near[~kept] = as_vectors(block[~kept]).astype(np.float16)
    return near


def _check_directions(file: Path, vectors: NDArray[Any]) -> None:
    """Refuse a file with rows that are zero or no numbers, naming the first ones."""
    bad: list[int] = []
    for start in range(0, len(vectors), _BLOCK):
        with np.errstate(over="ignore", invalid="ignore"):
            wide = vectors[start : start + _BLOCK].astype(np.float32).astype(np.float64)
            lengths = np.einsum("nd,nd->n", wide, wide)
        bad += (start + np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))).tolist()
    if bad:
        shown = ", ".join(map(str, bad[:_SHOWN])) + (", …" if len(bad) > _SHOWN else "")
        raise VectorError(
            f"{file}: {len(bad)} of {len(vectors)} vectors are zero, NaN or infinite, rows {shown} (counted from 0): "
            "take them out, there and in the table"
        )


def _open_all(parts: Sequence[Part]) -> list[NDArray[Any]]:
    arrays = [open_vectors(part.vectors) for part in parts]
    for part, array in zip(parts, arrays, strict=True):
        if array.shape[1] != arrays[0].shape[1]:
            raise ExchangeError(
                f"{part.vectors} has vectors of width {array.shape[1]}, {parts[0].vectors} of {arrays[0].shape[1]}"
            )
        _check_directions(part.vectors, array)
    return arrays


def width_of(parts: Sequence[Part]) -> int:
    """The width D of the vectors. Raises ExchangeError."""
    return int(open_vectors(parts[0].vectors).shape[1])


# ---- what a table says -----------------------------------------------------------------------------------------------


def _described(part: Part, roles: Roles, root: Path) -> pa.Table:
    """What is known of each row of a part: the columns of every index but id and path, and extra ones.

    ``path_bytes`` is the exact name in every row, relative to the root. Size, time and hash are null where the table
    does not tell them.
    """
    table = read_table(part.metadata)
    mark = _mark(part.metadata)
    known, extra = _own(table, mark) if mark else _foreign(part, table, roles)
    if part.kind is not None:
        known["kind"] = pa.repeat(part.kind, len(table))
    if part.paired and part.kind == "image":
        known.pop("caption", None)  # it has a vector, and so a row, of its own
    elif part.paired:
        known = {name: known[name] for name in ("kind", "path", "caption") if name in known}
        extra = extra.select([])  # what else is said, is said of the picture
    paths = known.pop("path")
    known["path_bytes"] = paths if mark else _relative(part, known.get("kind"), paths, root)
    columns = {
        field.name: known[field.name].cast(field.type) if field.name in known else pa.nulls(len(table), field.type)
        for field in ROW_SCHEMA
        if field.name not in ("id", "path")
    }
    return pa.table({**columns, **{name: extra[name] for name in extra.column_names}})


def _own(table: pa.Table, mark: Mark) -> tuple[dict[str, Any], pa.Table]:
    known = {name: table[name] for name in ROW_SCHEMA.names if name in table.column_names}
    exact = known.pop("path_bytes", pa.nulls(len(table), pa.binary()))
    known["path"] = pc.coalesce(exact, known["path"].cast(pa.binary()))
    used = {*ROW_SCHEMA.names, *(("image_path",) if mark.layout == CLIP_RETRIEVAL else ())}
    return known, extras(table.select([name for name in table.column_names if name not in used]), _OWN)


def _foreign(part: Part, table: pa.Table, roles: Roles) -> tuple[dict[str, Any], pa.Table]:
    """What the columns of other people's tables mean: few are taken for the index's own, and only where they fit."""
    path = _column(part, table, roles.path, PATH_COLUMNS)
    caption = _column(part, table, roles.caption, CAPTION_COLUMNS)
    known: dict[str, Any] = {}
    used = {path}
    for name in _KNOWN:
        if name in table.column_names:
            with contextlib.suppress(pa.ArrowException):
                known[name] = table[name].cast(ROW_SCHEMA.field(name).type)
    if part.kind is None and "kind" in table.column_names:
        known["kind"] = texts(table["kind"])
        if not pc.all(pc.is_in(known["kind"], pa.array(["image", "text"])), skip_nulls=False).as_py():
            del known["kind"]
    if caption:
        known["caption"] = texts(table[caption])
        if not pa.types.is_nested(table[caption].type):  # of several captions one is the row's, and all stay
            used.add(caption)
    used |= known.keys() - {"caption"}
    known["path"] = texts(table[path]) if path else pa.nulls(len(table), pa.string())
    return known, extras(table.select([name for name in table.column_names if name not in used]), _OWN)


def _column(part: Part, table: pa.Table, wanted: str | None, usual: Sequence[str]) -> str | None:
    if wanted is not None and wanted not in table.column_names:
        raise ExchangeError(
            f"{part.metadata} has no column {wanted!r}: its columns are {_some(table.column_names, 20)}"
        )
    return wanted or next((name for name in usual if name in table.column_names), None)


def _relative(part: Part, kinds: Any, paths: pa.ChunkedArray, root: Path) -> pa.Array:
    """The paths of other people's tables, as they are written there, relative to the root."""
    roots = tuple({_slashed(str(place)).rstrip("/") + "/" for place in (root.absolute(), root.resolve())})
    out: list[bytes] = []
    outside: list[str] = []
    for i, name in enumerate(paths.to_pylist()):
        if not name:
            if kinds is None or kinds[i].as_py() != "text":
                raise ExchangeError(
                    f"{part.metadata} does not say which picture row {i} is: name the column of paths with "
                    f"--path-column; its columns are {_some(read_table(part.metadata).column_names, 20)}"
                )
            out.append(b"")
            continue
        relative = _below(_slashed(name), roots)
        if relative is None:
            outside.append(name)
            relative = name
        out.append(relative.encode("utf-8", _ESCAPE))
    if outside:
        raise ExchangeError(
            f"{part.metadata}: {len(outside)} of {len(out)} paths lie outside {root}: {_some(outside)}; name the "
            "folder that holds all of them with --root"
        )
    return pa.array(out, pa.binary())


def _slashed(name: str) -> str:
    return name.replace(os.sep, "/")


def _below(name: str, roots: Sequence[str]) -> str | None:
    """A path relative to a root, in its shortest form; None outside of it. Addresses (``https://…``) stay."""
    if "://" in name:
        return name
    if os.path.isabs(name):  # noqa: PTH117 - a Path costs ten times as much
        name = posixpath.normpath(name)
        found = next((root for root in roots if name.startswith(root)), None)
        return name.removeprefix(found) if found else None
    name = posixpath.normpath(name)
    return None if name in (".", "..") or name.startswith("../") else name


def _some(names: Sequence[str], most: int = _SHOWN) -> str:
    return ", ".join(map(repr, names[:most])) + (", …" if len(names) > most else "")


# ---- writing the index -----------------------------------------------------------------------------------------------


def check_free(path: Path) -> None:
    """Refuse a place for an index that is taken. Raises StoreError."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise StoreError(f"there is something at {path} already: delete it first, or name another place with --index")


def import_parts(
    parts: Sequence[Part],
    path: Path,
    root: Path,
    model: ModelRef,
    *,
    inside: bool = False,
    roles: Roles = Roles(),
    hashing: bool = True,
    look: Callable[[Path], Mapping[str, Any]] | None = None,
    check: Callable[[Store], None] | None = None,
    progress: Progress | None = None,
) -> Imported:
    """Make an index of vectors that are there already; it appears under its name whole or not at all.

    A picture whose file is there gets its size and time, and the hash of its content, so that a later index run knows
    it again, moved or touched. A table that was written here tells what the file was like when its vector was made:
    then the file is read only if its time has changed, and if its content has, the old size and time stay, and the
    next index run encodes it anew. Rows that repeat a picture with the same vector, as pairs do, are left out.

    Args:
        parts: of `find_parts`.
        path: the index folder to make.
        root: the folder that relative paths are relative to, and that absolute ones lie in.
        model: what made the vectors.
        inside: the root is the folder that the index folder lies in, and moves with it.
        roles: which columns of the tables mean what.
        hashing: False: files are not read, and what is moved or touched later is encoded anew.
        look: called with the file of each picture whose content is hashed; what it says of width, height, taken_at,
            latitude and longitude is taken where the table says nothing.
        check: called with the finished index, before it gets its name; what it raises undoes it.
        progress: called with (rows done, rows to do).

    Raises:
        ExchangeError: the files do not fit each other, or cannot be read.
        VectorError: a vector is zero, NaN or infinite.
        StoreError: there is an index already, or it cannot be written.

    """
    arrays = _open_all(parts)
    if arrays[0].shape[1] != model.dim:
        raise ExchangeError(
            f"{parts[0].vectors} has vectors of width {arrays[0].shape[1]}, and those of {model.name} have {model.dim}"
            ": name the model that made them with --model"
        )
    check_free(path)
    described = [_checked(part, len(array), roles, root) for part, array in zip(parts, arrays, strict=True)]
    kept = _first_of_each(parts, arrays, [table.paths for table in described])
    counts = dict.fromkeys(("images", "texts", "repeated", "missing", "changed"), 0)
    counts["repeated"] = sum(len(array) for array in arrays) - sum(map(len, kept))
    total = sum(map(len, kept))
    extra = unified(table.extra for table in described)
    aside = path.with_name(f"{path.name}.importing")
    mark = mark_of(parts)
    source = mark.source if mark else None

    def blocks() -> Iterator[pa.Table]:
        done = 0
        facts = _Facts(None if source else root, hashing, look, counts)
        for part, array, rows in zip(parts, arrays, kept, strict=True):
            table = _described(part, roles, root)
            for start in range(0, len(rows), _BLOCK):
                picked = rows[start : start + _BLOCK]
                block = facts.completed(table.take(picked), first_id=done)
                yield with_embeddings(block, to_halves(array[picked]))
                done += len(picked)
                if progress:
                    progress(done, total)

    try:
        shutil.rmtree(aside, ignore_errors=True)  # of an import that was killed
        store = Store.create(aside, None if inside else root, model, source)
        segment = write_segment(aside / SEGMENTS / "00000001.parquet", blocks(), model.dim, extra)
        if segment.rows:
            replace(store.snapshot.manifest, generation=1, next_id=total, segments=(segment,)).write(aside)
        if check:
            check(Store.open(aside))
        aside.replace(path)
    except (OSError, StoreError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise cannot_write(path, cause) from error  # by its own name, not the one that it has until it is whole
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Imported(**counts)


@dataclass(frozen=True)
class _Checked:
    """What stays of a part's table after the first look."""

    paths: pa.Array  # binary; null for texts
    extra: pa.Schema


def _checked(part: Part, rows: int, roles: Roles, root: Path) -> _Checked:
    table = _described(part, roles, root)
    if len(table) != rows:
        raise ExchangeError(
            f"{part.metadata} has {len(table)} rows, and {part.vectors} has {rows} vectors: both must agree"
        )
    known = {field.name for field in ROW_SCHEMA}
    pictures = pc.not_equal(pc.fill_null(table["kind"], "image"), "text")
    paths = pc.if_else(pictures, table["path_bytes"], None).combine_chunks()
    return _Checked(paths, pa.schema([field for field in table.schema if field.name not in known]))


def _first_of_each(
    parts: Sequence[Part], arrays: Sequence[NDArray[Any]], paths: Sequence[pa.Array]
) -> list[NDArray[np.int64]]:
    """The rows of each part that stay: of rows that name one picture the first, if their vectors are the same."""
    codes = pa.chunked_array([*paths, pa.array([], pa.binary())]).combine_chunks().dictionary_encode().indices
    numbers = codes.fill_null(-1).to_numpy(zero_copy_only=False)
    _, first, which = np.unique(numbers, return_index=True, return_inverse=True)
    origin = np.where(numbers < 0, np.arange(len(numbers)), first[which])  # texts are never the same row
    rows = np.arange(len(numbers))
    starts = np.cumsum([0, *map(len, arrays)])
    owner = np.searchsorted(starts, rows, side="right") - 1  # the part that a row is of
    repeats = np.flatnonzero(origin != rows)
    for start in range(0, len(repeats), _BLOCK):
        again = repeats[start : start + _BLOCK]
        for a, b in sorted(set(zip(owner[origin[again]].tolist(), owner[again].tolist(), strict=True))):
            both = again[(owner[origin[again]] == a) & (owner[again] == b)]
            i, j = origin[both] - starts[a], both - starts[b]
            differ = np.flatnonzero((arrays[a][i] != arrays[b][j]).any(axis=1))
            if differ.size:
                i, j = i[differ[0]], j[differ[0]]
                name = paths[b][int(j)].as_py().decode("utf-8", _ESCAPE)
                two = f"row {i} of {parts[a].vectors} and row {j} of {parts[b].vectors}"
                raise ExchangeError(f"{name} has two vectors, {two}: take one out")
    return [np.flatnonzero(origin[s:e] == rows[s:e]) for s, e in itertools.pairwise(starts)]


_Fact: TypeAlias = tuple[int, int, str, str]  # size, time, hash; and "", missing, changed, or to be read: new, touched


class _Facts:
    """Sizes, times and hashes of the files behind rows."""

    def __init__(
        self,
        root: Path | None,
        hashing: bool,
        look: Callable[[Path], Mapping[str, Any]] | None,
        counts: dict[str, int],
    ) -> None:
        """Without a root the rows are of a source that is no folder, and what was told of them stands."""
        self.root, self.hashing, self.look, self.counts = root, hashing, look, counts

    def completed(self, table: pa.Table, first_id: int) -> pa.Table:
        """Rows as `_described` gives them, with all columns of an index."""
        exact = table["path_bytes"].combine_chunks()
        kinds = pc.fill_null(table["kind"], "image").to_pylist()
        told = zip(*(table[name].to_pylist() for name in ("size", "mtime_ns", "hash", "caption")), strict=True)
        paths = [value.decode("utf-8", _ESCAPE) for value in exact.to_pylist()]
        facts = list(map(self._look, paths, kinds, told))
        unread = [i for i, fact in enumerate(facts) if fact[3] in ("new", "touched")]
        with ThreadPoolExecutor(runtime.thread_count()) as pool:
            read = list(pool.map(self._read, [paths[i] for i in unread], [facts[i] for i in unread]))
        headers: dict[int, Mapping[str, Any]] = {}
        for i, (fact, header) in zip(unread, read, strict=True):
            facts[i], headers[i] = fact, header
        self.counts["texts"] += kinds.count("text")
        self.counts["images"] += kinds.count("image")
        for state in ("missing", "changed"):
            self.counts[state] += sum(fact[3] == state for fact in facts)
        sizes, times, hashes, _ = zip(*facts, strict=True)
        own = {
            "id": pa.array(range(first_id, first_id + len(table)), pa.int64()),
            "kind": pa.array(kinds, pa.string()),
            **_named(exact),
            "size": pa.array(sizes, pa.int64()),
            "mtime_ns": pa.array(times, pa.int64()),
            "hash": pa.array(hashes, pa.string()),
        }
        columns = {**own, **{name: table[name] for name in table.column_names if name not in own}}
        for name in _KNOWN if any(headers.values()) else ():
            told_of = enumerate(table[name].to_pylist())
            values = [headers.get(i, {}).get(name) if value is None else value for i, value in told_of]
            columns[name] = pa.array(values, ROW_SCHEMA.field(name).type)
        return pa.table(columns)

    def _look(self, path: str, kind: str, told: tuple[int | None, int | None, str | None, str | None]) -> _Fact:
        """What can be said of one file (or text) without reading it."""
        size, mtime_ns, content, text = told
        recorded = (size or 0, mtime_ns or 0, content or "")
        if kind == "text" and content is None:
            data = (text or "").encode()
            return len(data), 0, hashlib.sha256(data).hexdigest(), ""
        if kind == "text" or self.root is None:
            return (*recorded, "")
        try:
            info = os.stat(f"{self.root}/{path}")  # noqa: PTH116 - a Path costs more than the call
        except (OSError, ValueError):  # ValueError: a null byte in a name
            return (*recorded, "missing")
        if not stat.S_ISREG(info.st_mode):
            return (*recorded, "missing")
        now = (info.st_size, info.st_mtime_ns)
        if size is None or recorded[:2] == now:
            return (*now, content or "", "" if content or not self.hashing else "new")
        return (*recorded, "touched" if content and size == info.st_size else "changed")

    def _read(self, path: str, fact: _Fact) -> tuple[_Fact, Mapping[str, Any]]:
        """The same, once the file has been read (it is new, or its time is another than was told), and its header."""
        size, mtime_ns, content, state = fact
        assert self.root is not None
        file = self.root / path
        try:
            now = sha256_of(file)
            if state == "new":
                return (size, mtime_ns, now, ""), self.look(file) if self.look else {}
            same = now == content
            return (size, file.stat().st_mtime_ns if same else mtime_ns, content, "" if same else "changed"), {}
        except OSError:
            return (*((0, 0, "") if state == "new" else (size, mtime_ns, content)), "missing"), {}


def _named(exact: pa.Array) -> dict[str, pa.Array]:
    """The two columns of names: one to read, and the exact bytes where those are not UTF-8."""
    try:
        return {"path": exact.cast(pa.string()), "path_bytes": pa.nulls(len(exact), pa.binary())}
    except pa.ArrowInvalid:
        raw = exact.to_pylist()
        shown = [value.decode("utf-8", "replace") for value in raw]
        odd = [None if text.encode() == value else value for text, value in zip(shown, raw, strict=True)]
        return {"path": pa.array(shown, pa.string()), "path_bytes": pa.array(odd, pa.binary())}
