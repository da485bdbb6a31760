"""Corpora that are no folder of pictures: tars, a file that lists pictures, and sentences.

Each is read by the one reader of data (`retrieval.pairs`) and set against the store; what follows from that is the same
index run as a folder's (`retrieval.indexing`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timezone
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from indexes.columns import aligned, decode_columns, encode_columns, storable, unified
from indexes.segments import ROW_SCHEMA
from indexes.store import Failure, SourceRef, Store
from retrieval.errors import DataError, UsageError
from retrieval.folder import scan
from retrieval.images import os_reason
from retrieval.indexing import Item, Plan
from retrieval.origin import LIST, OFFSET, TARS, TEXTS, Folder, Source
from retrieval.pair_formats import Shard, is_pattern, list_shards, read_rows, read_shard
from retrieval.pair_formats.tars import HEAD, holds_tars, is_tar
from retrieval.pairs import Picture, PictureBytes, Record, Sentence, TarMember, read_pairs, read_sentences

if TYPE_CHECKING:
    from retrieval.library import Library

STORE_SUFFIX = ".diptych"

_TAKEN = frozenset({*ROW_SCHEMA.names, "embedding", "captions", "labels", "split", OFFSET})
_ADDRESS = re.compile(r"(?:^|/)(?:https?|ftp|s3|gs|hdfs|pipe):/?")
_Stat = tuple[int, int]  # size, time of change in ns
_GONE, _UNREAD = (0, 0), (-1, -1)


@dataclass(frozen=True)
class Corpus:
    """What a user named: the folder that paths are relative to, how it is read, and where its index lies beside it."""

    root: Path
    source: SourceRef
    store: Path


def check_given(given: Path) -> Path:
    """The absolute path of a folder, a file or a pattern of tars. Raises UsageError for anything else."""
    if _ADDRESS.match(str(given)):
        raise UsageError(f"{given} is an address: download it first, only files on this machine are indexed")
    absolute = given.expanduser().absolute()
    if not absolute.exists() and not is_pattern(absolute):
        raise UsageError(f"there is no folder {given}, nor a file of that name")
    if absolute.exists() and not absolute.is_dir() and not absolute.is_file():
        raise UsageError(f"{given} is not a folder, nor a regular file")
    return absolute


def recognise(given: Path, texts: bool = False, images: Path | None = None) -> Corpus | None:
    """Say how a file, a pattern or a folder is to be indexed. None: as a folder of pictures.

    A folder that holds tars (directly, or in a folder in it) and not one picture is a folder of tars. A file without
    pictures is a corpus of sentences; with them, only its pictures are indexed, or with ``texts`` only its sentences.

    Raises:
        UsageError: it is not there, or the two options do not fit it.
        DataError: it is of no kind that is read, or something in it is wrong.
    """
    given = check_given(given)
    if given.is_dir():
        if not _is_folder_of_tars(given):
            if texts or images:
                option = "--texts" if texts else "--images"
                raise UsageError(f"{option} goes with a file or with tars, and {given} is a folder of pictures")
            return None
        kind, root, name = TARS, given, "."
    else:
        root, name = _root_and_name(given)
        kind = TARS if is_pattern(given) or _is_tar(given) else _kind_of_list(given, texts)
    if images and not images.expanduser().is_dir():
        raise DataError(f"{images}: there is no such folder of pictures")
    if kind == TARS:
        list_shards(given)  # raises DataError where some that a pattern stands for are missing
    if images and kind == TARS:
        raise UsageError(f"--images goes with a file that lists pictures, and {given} holds its own")
    kind = TEXTS if texts else kind
    place = None if images is None else named(images.expanduser().absolute(), root)
    return Corpus(root, SourceRef(kind, name, place), store_beside(given))


def store_beside(given: Path) -> Path:
    """Where the index of a corpus lies: in a folder of tars, else beside the file under its name."""
    if given.is_dir():
        return given / STORE_SUFFIX
    root, name = _root_and_name(given)
    return root / (name.replace("/", "-") + STORE_SUFFIX)


def open_source(root: Path, ref: SourceRef | None) -> Source:
    """The source of a store; nothing is read yet."""
    if ref is None:
        return Folder(root)
    kinds: dict[str, type[_Tars] | type[_List] | type[_Texts]] = {TARS: _Tars, LIST: _List, TEXTS: _Texts}
    if ref.kind not in kinds:
        raise UsageError(f"{ref.path} was indexed in a way that this release does not know: upgrade diptych")
    return kinds[ref.kind](root, ref)


def _root_and_name(given: Path) -> tuple[Path, str]:
    """The folder that a file or a pattern lies in, none of whose own parts has braces, and the rest."""
    parts = given.parts
    first = next((i for i, part in enumerate(parts) if "{" in part), len(parts)) if is_pattern(given) else len(parts)
    root = Path(*parts[: min(first, len(parts) - 1)])
    return root.resolve(), given.relative_to(root).as_posix()


def _is_folder_of_tars(folder: Path) -> bool:
    try:
        return holds_tars(folder) and next(scan(folder), None) is None
    except (OSError, UsageError):  # what cannot be looked at is said when it is indexed
        return False


def _is_tar(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return is_tar(file, stream.read(HEAD))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error


def _kind_of_list(file: Path, texts: bool) -> str:
    rows = read_rows(file, pictured=False).rows
    if texts:
        if not any(text.strip() for row in rows for text in row.texts):
            raise DataError(f"{file} has no sentences: none of its {len(rows)} rows has one")
        return LIST
    addresses = [row.image for row in rows if isinstance(row.image, str) and _ADDRESS.match(row.image)]
    if addresses:
        raise DataError(
            f"{file} lists addresses, not files: {len(addresses)} of its {len(rows)} pictures; download them first, as "
            "img2dataset does, and index its tars"
        )
    if any(row.image for row in rows):
        return LIST
    if any("url" in row.columns for row in rows):
        raise DataError(
            f"{file} lists addresses of pictures, not files: download them first, as img2dataset does, and index its "
            "tars; --texts indexes the sentences alone"
        )
    return TEXTS


# ---- what all of them share ------------------------------------------------------------------------------------------


class _Corpus:
    """A source of items; read anew for each plan that needs it."""

    def __init__(self, root: Path, ref: SourceRef) -> None:
        self.root, self.ref = root, ref
        self.place = root / ref.path

    @property
    def images(self) -> Path | None:
        """The folder of pictures that was told."""
        return None if self.ref.images is None else self.root / self.ref.images

    def read(self, file: Any) -> bytes:
        """The bytes of an item: of the encoded picture, or of the sentence. Raises OSError."""
        if file.text is not None:
            return storable(file.text).encode()
        data: bytes = file.picture.read_bytes()
        return data

    def picture(self, path: str, fields: Mapping[str, Any]) -> Picture:  # noqa: ARG002
        """The picture of a stored row, to be read when it is shown."""
        return self.root / path

    def own_files(self) -> dict[str, _Stat]:
        """Name -> size and time of the file that all of this is read from. UsageError when it is gone."""
        found = _stat(self.place)
        if found is None:
            raise UsageError(f"the indexed file {self.place} is not there: is a drive not mounted?")
        return {self.ref.path: found}

    def noted(self, files: Mapping[str, _Stat]) -> SourceRef:
        """What the store is to remember of files that have been read."""
        return replace(self.ref, files=tuple((name, *found) for name, found in sorted(files.items())))


def _taken_in(store: Store) -> dict[str, _Stat]:
    ref = store.source
    return {name: (size, mtime_ns) for name, size, mtime_ns in ref.files} if ref else {}


def _compare(
    store: Store,
    items: Iterable[Item],
    faults: Sequence[Failure],
    covered: Callable[[str], bool],
    reading: str = "image",
) -> Plan:
    """Set items against the rows of one kind whose paths are covered.

    Args:
        store: as it is.
        items: everything there is under the covered paths, of one kind.
        faults: what cannot even be tried.
        covered: whether a path is one of those that were looked at; rows under others stay as they are.
        reading: the kind of the items and rows.
    """
    plan = Plan()
    rows = store.rows()
    offsets = rows[OFFSET] if OFFSET in rows.column_names else None
    fields = (rows[name].to_pylist() for name in ("id", "kind", "size", "mtime_ns", "hash"))
    stored: dict[str, tuple[int, int, int, int, str]] = {}
    for position, (path, row_id, kind, size, mtime_ns, content) in enumerate(zip(store.paths(), *fields, strict=True)):
        if kind == reading and covered(path):
            stored[_key(kind, path, content)] = (position, row_id, size, mtime_ns, content)
    failed = {failure.path: failure for failure in store.failures() if covered(failure.path)}
    seen: set[str] = set()
    same: list[tuple[Item, int, int]] = []  # item, position, id
    for item in items:
        key = item.path if item.text is None else _key(reading, item.path, _hash(item.text))
        if not covered(item.path) or key in seen:
            continue
        seen.add(key)
        if key in stored:
            position, row_id, size, mtime_ns, content = stored[key]
            if item.text is not None or _unchanged(item, size, mtime_ns, offsets, position):
                same.append((item, position, row_id))
                continue
            plan.known[item.path] = (row_id, content)
        elif item.path in failed and (failed[item.path].size, failed[item.path].mtime_ns) == (item.size, item.mtime_ns):
            continue
        plan.todo.append(item)
    plan.relabelled = list(_relabelled(store, same))
    plan.unchanged = len(same) - len(plan.relabelled)
    known = {(failure.path, failure.reason, failure.size, failure.mtime_ns) for failure in failed.values()}
    plan.unreadable = [f for f in faults if (f.path, f.reason, f.size, f.mtime_ns) not in known]
    faulty = {failure.path for failure in faults}
    plan.missing = {key: (row[1], row[4]) for key, row in stored.items() if key not in seen}
    plan.forgotten = [path for path in failed if path not in seen and path not in faulty]
    return plan


def _unchanged(item: Item, size: int, mtime_ns: int, offsets: Any, position: int) -> bool:
    if (size, mtime_ns) != (item.size, item.mtime_ns):
        return False
    return not isinstance(item.picture, TarMember) or (
        offsets is not None and offsets[position].as_py() == item.picture.offset
    )


def _key(kind: str, path: str, content: str) -> str:
    return path if kind == "image" else f"{content} {path}"


def _relabelled(store: Store, same: Sequence[tuple[Item, int, int]]) -> Iterator[tuple[int, Any]]:
    """The rows of unchanged contents about which something else is said now, as they are to be."""
    if not same:
        return
    rows = store.rows()
    positions = [position for _, position, _ in same]
    captions = rows["caption"].take(positions).to_pylist()
    old, new = (
        rows.drop_columns(ROW_SCHEMA.names).take(positions),
        encode_columns([item.columns for item, _, _ in same]),
    )
    common = unified([old.schema, new.schema])
    nothing: list[dict[str, Any]] = [{}] * len(same)
    was, now = (decode_columns(aligned(one, common)) if one.num_columns else nothing for one in (old, new))
    for (item, _, row_id), caption, before, after in zip(same, captions, was, now, strict=True):
        if (caption, before) != (item.caption, after):
            yield row_id, replace(store.row(row_id), caption=item.caption, columns=item.columns)


def _hash(text: str) -> str:
    return hashlib.sha256(storable(text).encode()).hexdigest()


def _stat(file: Path) -> _Stat | None:
    """Size and time of a regular file; None if there is none, or it may not be looked at."""
    try:
        found = file.stat()
    except (OSError, ValueError):
        return None
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def named(picture: Path, root: Path) -> str:
    """A path as the store has it: relative to the root if it lies in it or beside it, else absolute."""
    plain, base = os.path.normpath(picture), str(root)
    if plain.startswith(base.rstrip("/") + "/"):
        return plain[len(base.rstrip("/")) + 1 :]
    above = str(root.parent)
    return os.path.relpath(plain, base) if len(root.parts) > 2 and plain.startswith(above + "/") else plain


def _scope(below: str) -> Callable[[str], bool]:
    prefix = f"{below}/"
    return lambda path: not below or path == below or path.startswith(prefix)


def _caption_and_columns(
    texts: Sequence[str], labels: Sequence[str], split: str | None, columns: Mapping[str, Any], **own: Any
) -> dict[str, Any]:
    """What a row says of an item: the first caption, all if they are several, labels, split, and the columns."""
    texts = list(dict.fromkeys(storable(text) for text in texts if text.strip()))
    said: dict[str, Any] = dict(own)
    if len(texts) > 1:
        said["captions"] = texts
    if labels:
        said["labels"] = list(labels)
    if split is not None:
        said["split"] = split
    for name, value in columns.items():
        if (plain := _plain(value)) is not None:
            said[_column_name(name, said)] = plain
    return {"caption": texts[0] if texts else None, "columns": said}


def _column_name(name: str, others: Container[str]) -> str:
    """A name that no column of the store has: one that is taken gets an underscore behind it."""
    name = storable(str(name)) or "_"
    while name in _TAKEN or name in others:
        name += "_"
    return name


def _plain(value: Any) -> Any:
    """A value as a column can hold it: parts of its own become JSON; empty text, bytes and NaN are no value."""
    if isinstance(value, str):
        return value or None
    if isinstance(value, bool | date):  # a datetime is a date
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else str(value)
    if isinstance(value, float | Decimal):
        return None if math.isnan(value) else float(value)
    if value is None or isinstance(value, bytes):
        return None
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return list(value)
    return json.dumps(value, ensure_ascii=False, default=str)


# ---- tars ------------------------------------------------------------------------------------------------------------


class _Tars(_Corpus):
    """One tar, several, or a folder of them. A picture is called ``shard.tar/name``.

    A tar that is as it was when all of it was taken in is not opened; of any other, the names are listed anew.
    """

    def plan(self, library: Library, below: str) -> Plan:
        """See `Source.plan`; below: a tar, or a folder of them."""
        store, inside = library.store, _scope(below)
        store.refresh()
        shards, done = self.shards(), _taken_in(store)
        files = {name: _stat(shard.tar) or _GONE for name, shard in shards.items()}
        kept = {name for name, found in files.items() if done.get(name) == found or not inside(name)}
        fresh = [name for name in shards if name not in kept]
        gone = [name for name in done if name not in files and inside(name)]
        if not fresh and not gone:
            return Plan(unchanged=len(store))
        items, faults, closed = self._items({name: shards[name] for name in fresh}, files)
        if faults and len(closed) == len(shards):
            raise DataError(f"{self.root / faults[0].path}: {faults[0].reason}")

        def covered(path: str) -> bool:
            tar = _first_of(path, files)
            return inside(path) if tar is None else tar not in kept and (path == tar or tar not in closed)

        plan = _compare(store, items, faults, covered)
        plan.unchanged += sum(_first_of(path, kept) is not None and inside(path) for path in store.paths())
        plan.begun = self.noted(done | dict.fromkeys(fresh, _UNREAD))
        read = {name: files[name] for name in fresh}
        plan.ended = self.noted({name: found for name, found in done.items() if name not in gone} | read)
        return plan

    def shards(self) -> dict[str, Shard]:
        """Name -> tar. Raises DataError, UsageError."""
        try:
            found = list_shards(self.place)
        except OSError as error:
            raise DataError(f"{self.place} cannot be read: {error.strerror or error}") from error
        if not found or not any(shard.tar.is_file() for shard in found):
            raise UsageError(f"{self.place} is not there, or holds no tar any more: is a drive not mounted?")
        return {named(shard.tar, self.root): shard for shard in found}

    def _items(
        self, shards: Mapping[str, Shard], files: Mapping[str, _Stat]
    ) -> tuple[list[Item], list[Failure], set[str]]:
        """What the tars hold; what is wrong with samples and whole tars; and the latter's names."""
        items: list[Item] = []
        faults: list[Failure] = []
        closed: set[str] = set()
        now = datetime.now(timezone.utc)
        for name, shard in shards.items():
            wrong: dict[str, str] = {}
            try:
                rows = read_shard(shard, wrong)
            except (DataError, OSError) as error:
                reason = os_reason(error) if isinstance(error, OSError) else str(error)
                faults.append(Failure(name, reason.removeprefix(f"{shard.tar} "), now, *files[name]))
                closed.add(name)
                continue
            faults += [
                Failure(f"{name}/{key.removeprefix('./')}", reason.removeprefix(f"{shard.tar}, "), now, *files[name])
                for key, reason in wrong.items()
            ]
            for row in rows:
                member = row.image
                assert isinstance(member, TarMember)
                said = _caption_and_columns(row.texts, row.labels, row.split, row.columns, offset=member.offset)
                path = f"{name}/{member.path.removeprefix('./')}"
                items.append(Item(path, member.size, files[name][1], picture=member, **said))
        return items, faults, closed

    def picture(self, path: str, fields: Mapping[str, Any]) -> Picture:
        """The member of a tar that a row names."""
        places = [at for at, letter in enumerate(path) if letter == "/"]
        tar = next((at for at in places if (self.root / path[:at]).is_file()), None)
        if tar is None or fields.get(OFFSET) is None:
            return self.root / path
        inside = path[tar + 1 :]
        return TarMember(self.root / path[:tar], inside.rpartition("/")[2], fields[OFFSET], fields["size"], inside)


def _first_of(path: str, names: Container[str]) -> str | None:
    """The name, of a tar, that is the path itself or a folder of it as it is written."""
    end = path.find("/")
    while end >= 0:
        if path[:end] in names:
            return path[:end]
        end = path.find("/", end + 1)
    return path if path in names else None


# ---- lists of pictures -----------------------------------------------------------------------------------------------


class _List(_Corpus):
    """A file that lists pictures. Those that a Parquet file holds itself are called ``FILE/name``."""

    def plan(self, library: Library, below: str) -> Plan:
        """See `Source.plan`."""
        store, inside = library.store, _scope(below)
        store.refresh()
        files = self.own_files()
        if files == _taken_in(store) and (unchanged := self._all_as_before(store, inside)) is not None:
            return Plan(unchanged=unchanged)
        items, faults = self._items()
        if not items:
            raise UsageError(
                f"none of the {len(faults)} pictures that {self.place} names is there, the first: {faults[0].path}; "
                "is a drive not mounted? If they lie elsewhere, name their folder with --images"
            )
        plan = _compare(store, items.values(), faults, inside)
        plan.ended = None if below else self.noted(files)
        return plan

    def _all_as_before(self, store: Store, inside: Callable[[str], bool]) -> int | None:
        """How many rows there are, if all of their pictures are as they were, and so are those that failed."""
        rows, own = store.rows(), f"{self.ref.path}/"
        kinds, sizes, times = (rows[name].to_pylist() for name in ("kind", "size", "mtime_ns"))
        pictures = zip(store.paths(), kinds, sizes, times, strict=True)
        known = [(path, size, mtime_ns) for path, kind, size, mtime_ns in pictures if kind == "image" and inside(path)]
        failed = [(f.path, f.size, f.mtime_ns) for f in store.failures() if inside(f.path)]
        for path, size, mtime_ns in (*known, *failed):
            if not path.startswith(own) and (_stat(self.root / path) or _GONE) != (size, mtime_ns):
                return None
        return len(known)

    def _items(self) -> tuple[dict[str, Item], list[Failure]]:
        """Path -> picture, each once with all that is said of it; and those that are not there."""
        records = read_pairs(self.place, images=self.images, may_lack=1.0, captioned=False)
        self._check_addresses(records)
        listed: dict[str, list[Record]] = {}
        for record in records:
            listed.setdefault(self._path(record.image, listed), []).append(record)
        now = datetime.now(timezone.utc)
        items, faults = {}, []
        own = _stat(self.place) or _GONE
        for path, named in listed.items():
            picture = named[0].image
            found = _stat(picture) if isinstance(picture, Path) else (len(picture.read_bytes()), own[1])
            if found is None:
                faults.append(Failure(path, f"{self.place.name} names it, but there is no such file", now, *_GONE))
            else:
                items[path] = Item(path, *found, picture=picture, **_described(named))
        return items, faults

    def _check_addresses(self, records: Sequence[Record]) -> None:
        addresses = [r.image for r in records if isinstance(r.image, Path) and _ADDRESS.search(str(r.image))]
        if addresses:
            raise DataError(
                f"{self.place} lists addresses, not files: {len(addresses)} of its {len(records)} pictures; download "
                "them first, as img2dataset does, and index its tars"
            )

    def _path(self, picture: Picture, before: Mapping[str, Sequence[Record]]) -> str:
        if isinstance(picture, Path):
            return named(picture, self.root)
        name = path = f"{self.ref.path}/{picture.name}"
        number = 1
        while path in before and before[path][0].image != picture:
            number += 1
            path = f"{name}#{number}"
        return path

    def picture(self, path: str, fields: Mapping[str, Any]) -> Picture:  # noqa: ARG002
        """The file that a row names, or what the list itself holds."""
        own = f"{self.ref.path}/"
        return _Held(path.removeprefix(own), path, self) if path.startswith(own) else self.root / path

    @cached_property
    def held(self) -> dict[str, Item]:
        """The pictures that the file itself holds: read whole, when one of them is to be shown."""
        return {path: item for path, item in self._items()[0].items() if isinstance(item.picture, PictureBytes)}


@dataclass(frozen=True)
class _Held:
    """A picture inside a Parquet file, read when it is wanted."""

    name: str
    path: str
    source: _List

    def read_bytes(self) -> bytes:
        """The encoded picture. Raises OSError."""
        try:
            return self.source.read(self.source.held[self.path])
        except (KeyError, DataError) as error:
            raise FileNotFoundError(f"{self.path} is not there any more") from error


def _described(records: Sequence[Record]) -> dict[str, Any]:
    """What all records of one picture say of it; of columns that differ, the first has its way."""
    columns: dict[str, Any] = {}
    for record in records:
        each = {name: [_text(value) for value in values] for name, values in record.text_columns.items()}
        for name, value in (*record.columns.items(), *each.items()):
            columns.setdefault(name, value)
    texts = [text for record in records for text in record.texts]
    labels = dict.fromkeys(label for record in records for label in record.labels)
    split = next((record.split for record in records if record.split is not None), None)
    return _caption_and_columns(texts, list(labels), split, columns)


def _text(value: Any) -> str:
    plain = _plain(value)
    return "" if plain is None else str(plain)


# ---- sentences -------------------------------------------------------------------------------------------------------


class _Texts(_Corpus):
    """Sentences, each once for each picture that it is about; a row's path is that of its picture, or empty."""

    def plan(self, library: Library, below: str) -> Plan:  # noqa: ARG002 - sentences lie in no folder
        """See `Source.plan`; all sentences are looked at, whatever ``below`` is."""
        store = library.store
        store.refresh()
        files = self._files()
        if files == _taken_in(store):
            return Plan(unchanged=len(store))
        try:
            sentences = read_sentences(self.place, self.images)
        except OSError as error:
            raise DataError(f"{self.place} cannot be read: {error.strerror or error}") from error
        newest = max(mtime_ns for _, mtime_ns in files.values())
        plan = _compare(store, (self._item(one, newest) for one in sentences), (), lambda _: True, "text")
        plan.ended = self.noted(files)
        return plan

    def _files(self) -> dict[str, _Stat]:
        if self.place.is_dir() or is_pattern(self.place):
            tars = _Tars(self.root, self.ref).shards()
            return {name: _stat(shard.tar) or _GONE for name, shard in tars.items()}
        return self.own_files()

    def _item(self, sentence: Sentence, mtime_ns: int) -> Item:
        image, text = sentence.image, storable(sentence.text.strip())
        path = named(image, self.root) if isinstance(image, Path) else ""
        if isinstance(image, TarMember):
            path = f"{named(image.tar, self.root)}/{image.path.removeprefix('./')}"
        elif image is not None and not path:
            path = f"{self.ref.path}/{image.name}"
        said = _caption_and_columns([text], sentence.labels, sentence.split, sentence.columns)
        return Item(path, len(text.encode()), mtime_ns, text=text, **said)
