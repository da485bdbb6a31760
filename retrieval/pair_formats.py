"""How each kind of file and folder says which sentences and labels belong to which picture.

One reader per kind. `read_rows` finds the right one by content (by name only where content cannot tell) and every
reader gives the same: rows, and the folders in which the pictures that they name may lie.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from retrieval.errors import DataError, UsageError
from retrieval.folder import scan
from retrieval.images import IMAGE_SUFFIXES

KINDS = (
    "read are JSONL, JSON (a list of objects, Karpathy's, COCO's), CSV and TSV with a line of column names, "
    "captions.txt and .token files of Flickr8k and Flickr30k, Parquet, webdataset .tar, a folder of .tar, "
    "a folder of a.jpg with a.txt, and a folder with one sub-folder per class"
)

# Names of keys and columns, the first that is there counts. JSON keeps to the few that it always had for sentences and
# labels, so that a column "title" stays a column; tables come from anywhere (open_clip's are filepath and title).
_IMAGE_NAMES = ("image", "filepath", "file_name", "filename", "image_path", "image_name", "path", "img")
_TEXT_KEYS = ("captions", "caption", "texts", "text")
_TEXT_NAMES = (*_TEXT_KEYS, "title", "sentence", "comment")
_LABEL_KEYS = ("labels", "label")
_LABEL_NAMES = (*_LABEL_KEYS, "class")

_SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "dev": "val", "test": "test"}
_PICTURE_FOLDERS = (
    "Images",
    "Flicker8k_Dataset",  # so is it spelt in the archive
    "Flickr8k_Dataset",
    "flickr30k_images",
    "flickr30k-images",
)
_HEAD = 512  # bytes that tell a binary format: one block of a tar
_SHOWN = 3


class Picture(Protocol):
    """What holds a picture: a file, a member of a tar, or bytes. A `Path` is one."""

    @property
    def name(self) -> str:
        """The name without folders: what a checksum of the data counts."""

    def read_bytes(self) -> bytes:
        """Read the encoded picture. Raises OSError, as a file does."""


@dataclass(frozen=True)
class TarMember:
    """A picture inside an uncompressed tar, read in place."""

    tar: Path
    name: str  # without the folders inside the tar
    offset: int  # bytes from the beginning of the tar
    size: int  # bytes

    def __str__(self) -> str:
        return f"{self.tar}/{self.name}"

    def read_bytes(self) -> bytes:
        """Read the encoded picture. Raises OSError, also when the tar has become shorter."""
        with self.tar.open("rb") as stream:
            stream.seek(self.offset)
            data = stream.read(self.size)
        if len(data) < self.size:
            raise OSError(errno.EIO, "the tar has become shorter since it was listed", str(self.tar))
        return data


@dataclass(frozen=True)
class PictureBytes:
    """A picture that a table holds itself."""

    name: str
    data: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.name

    def read_bytes(self) -> bytes:
        """Give the encoded picture."""
        return self.data


class Row(NamedTuple):
    """What one line, entry or sample says. An image given as a string has still to be found."""

    image: str | Picture
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    split: str | None
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """What a reader gives."""

    rows: list[Row]
    places: tuple[Path, ...] = ()  # where the pictures may lie, the likeliest first; at least one if a row names a file
    droppable: bool = False  # whether the pictures may also lie there without the folders of their names


def read_rows(source: Path) -> Rows:
    """Read whatever pairs pictures with sentences or labels.

    Raises:
        DataError: it cannot be read, is of a kind that is not read, or something in it is wrong.
    """
    try:
        if source.is_dir():
            return next(read(source) for fits, read in _FOLDERS if fits(source))
        with source.open("rb") as stream:  # once: a pipe cannot be read again
            head = stream.read(_HEAD)
            for fits, read in _BINARY:
                if fits(source, head):
                    return read(source)
            _check_text(source, head)
            data = head + stream.read()
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}") from error
    text = _decode(source, data)
    if "\0" in text:
        raise DataError(f"{source} holds NUL bytes: it is damaged, or no text; {KINDS}")
    if not text.strip():
        raise DataError(f"{source} is empty; {KINDS}")
    reader = next((read for fits, read in _TEXTS if fits(source, text)), None)
    if reader is None:
        raise DataError(f"{source} is of an unknown kind; {KINDS}")
    return reader(source, text)


_COMPRESSED = re.compile(rb"\x1f\x8b|BZh[1-9]|\xfd7zXZ|\x28\xb5\x2f\xfd")
_UNPACK = "is compressed: unpack it, or re-tar it without compression (its pictures already are)"

# What is met under the name of data and never read: how it begins, and what to say.
_STRANGERS = {
    _COMPRESSED: _UNPACK,
    re.compile(rb"PK\x03\x04"): "is a ZIP archive: unpack it (.pt and .npz files are such, too, and are never loaded)",
    re.compile(rb"\x80[\x02-\x05]"): "is a pickle, and no pickle is ever loaded",
    re.compile(rb"\xff\xfe|\xfe\xff"): "is not UTF-8 text but UTF-16: save it as UTF-8",
    re.compile(rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP", re.DOTALL): (
        "is itself a picture: name the file that lists it, or the folder"
    ),
    re.compile(rb".*\0", re.DOTALL): f"is of an unknown kind: binary data; {KINDS}",
}


def _check_text(file: Path, head: bytes) -> None:
    for start, name in _STRANGERS.items():
        if start.match(head):
            raise DataError(f"{file} {name}")


def _decode(where: Path | str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{where} is not UTF-8 text (line {line}): save it as UTF-8") from error


def _places(file: Path, *more: str) -> tuple[Path, ...]:
    return tuple(file.parent / name for name in ("images", ".", file.stem, *_PICTURE_FOLDERS, *more))


def one_line(name: object) -> str:
    """A name as a message shows it: with its line breaks and the like escaped."""
    text = str(name)
    return text if text.isprintable() else repr(text)[1:-1]


def some(names: Sequence[object]) -> str:
    """The first few of the names, for a message."""
    return ", ".join(map(one_line, names[:_SHOWN])) + (", …" if len(names) > _SHOWN else "")


def _base_name(path: str) -> str:
    return path.rpartition("/")[2]


def _strings(value: object) -> tuple[str, ...]:
    """One value or a list of them, as strings; nulls are none."""
    if isinstance(value, str):  # nearly always
        return (value,)
    values = value if isinstance(value, list) else [value]
    return tuple(str(item) for item in values if item is not None)


def _take(fields: dict[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
    """Take the first of the keys out of the fields."""
    for key in keys:
        if key in fields:
            return _strings(fields.pop(key))
    return ()


def _take_split(fields: dict[str, Any]) -> str | None:
    split = fields.pop("split", None)
    return None if split is None else str(split)


# JSON ----------------------------------------------------------------------------------------------------------------


def _is_json(file: Path, text: str) -> bool:
    return text.lstrip()[0] in "{[" or file.suffix.lower() in (".json", ".jsonl", ".ndjson")


def _json(file: Path, text: str) -> Rows:
    """A document, or one object a line: JSONL is what goes on behind its first value."""
    try:
        document, end = json.JSONDecoder().raw_decode(text, len(text) - len(text.lstrip()))
    except (ValueError, RecursionError) as error:
        if file.suffix.lower() == ".json":
            raise DataError(f"{file} is not JSON, or only its beginning: {error}") from error
        return _json_lines(file, text)
    if not re.compile(r"\s*\Z").match(text, end):
        return _json_lines(file, text)
    if isinstance(document, list):
        objects = enumerate(document, 1)
        return Rows([_object_row(fields, file, "entry", number) for number, fields in objects], _places(file))
    if isinstance(document, dict) and "images" in document:
        return (_coco if "annotations" in document else _karpathy)(file, document)
    return Rows([_object_row(document, file, "line", 1)], _places(file))


def _json_lines(file: Path, text: str) -> Rows:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand inside a JSON string
        if line.strip():
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file}, line {number} is not JSON: {error}") from error
            rows.append(_object_row(fields, file, "line", number))
    return Rows(rows, _places(file))


def _object_row(fields: object, file: Path, unit: str, number: int) -> Row:
    if isinstance(fields, dict):
        rest = dict(fields)
        image = rest.pop(next((name for name in _IMAGE_NAMES if name in rest), ""), None)
        if isinstance(image, str) and image:
            return Row(image, _take(rest, _TEXT_KEYS), _take(rest, _LABEL_KEYS), _take_split(rest), rest)
    raise DataError(f'{file}, {unit} {number}: expected an object with "image", as {{"image": "a.jpg", …}}')


def _entries(file: Path, document: dict[str, Any], key: str, **kinds: type | tuple[type, ...]) -> list[dict[str, Any]]:
    """The objects of one of a document's lists, each with the given fields."""
    entries = document[key]
    if not isinstance(entries, list):
        raise DataError(f'{file}: expected a list at "{key}"')
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(name), kind) for name, kind in kinds.items()):
            names = " and ".join(f'"{name}"' for name in kinds)
            raise DataError(f"{file}, {key}[{number}]: expected an object with {names}")
    return entries


def _karpathy(file: Path, document: dict[str, Any]) -> Rows:
    """Karpathy's splits of Flickr8k, Flickr30k and COCO (cs.stanford.edu/people/karpathy/deepimagesent)."""
    rows = []
    for number, entry in enumerate(_entries(file, document, "images", filename=str, sentences=list)):
        rest = dict(entry)
        name, folder, sentences = rest.pop("filename"), rest.pop("filepath", None), rest.pop("sentences")
        if not name or not all(isinstance(s, dict) and isinstance(s.get("raw"), str) for s in sentences):
            raise DataError(f'{file}, images[{number}]: expected a "filename", and sentences with "raw"')
        image = f"{folder}/{name}" if folder else name
        rows.append(Row(image, tuple(s["raw"] for s in sentences), (), _take_split(rest), rest))
    return Rows(rows, _places(file, "..", "../images"), droppable=True)


_COCO_PART = re.compile(r"(train|val|test)20\d\d")


def _coco(file: Path, document: dict[str, Any]) -> Rows:
    """Captions or instances of COCO (cocodataset.org/#format-data); split and folder are told by the file's name."""
    images = _entries(file, document, "images", id=(int, str), file_name=str)
    categories = {}
    if "categories" in document:
        kinds = _entries(file, document, "categories", id=(int, str), name=str)
        categories = {kind["id"]: kind["name"] for kind in kinds}
    texts: dict[int | str, list[str]] = {image["id"]: [] for image in images}
    if len(texts) < len(images):
        raise DataError(f"{file}: {len(images) - len(texts)} of its images have the id of another one")
    labels: dict[int | str, dict[str, None]] = {key: {} for key in texts}  # an ordered set
    lost = []
    for number, entry in enumerate(_entries(file, document, "annotations", image_id=(int, str))):
        owner, caption, category = entry["image_id"], entry.get("caption"), entry.get("category_id")
        if owner not in texts:
            lost.append(owner)
        elif isinstance(caption, str):
            texts[owner].append(caption)
        elif isinstance(category, (int, str)) and category in categories:
            labels[owner][categories[category]] = None
        else:
            raise DataError(f'{file}, annotations[{number}]: expected "caption", or "category_id" of its categories')
    if lost:
        ids = some(list(dict.fromkeys(lost)))
        raise DataError(f"{len(lost)} annotations of {file} are of images that it does not list: ids {ids}")
    part = _COCO_PART.search(file.name)
    rows = []
    for number, image in enumerate(images):
        rest = dict(image)
        name = rest.pop("file_name")
        if not name:
            raise DataError(f'{file}, images[{number}]: "file_name" is empty')
        split = _take_split(rest) or (part and part[1])
        rows.append(Row(name, tuple(texts[image["id"]]), tuple(labels[image["id"]]), split, rest))
    more = (part[0], f"images/{part[0]}", f"../{part[0]}", f"../images/{part[0]}") if part else ()
    return Rows(rows, _places(file, *more, "..", "../images"))


# Lines of Flickr8k and Flickr30k --------------------------------------------------------------------------------------

_TOKEN = re.compile(r"(.+?)#\d+\s*\t(.*)")
# Kaggle's results.csv is no CSV: quotes mean nothing, and in one line ("2199200615.jpg| 4   A dog runs …") the second
# separator is missing.
_RESULT = re.compile(r"\s*([^|]+?)\s*\|\s*\d+\s*\|?\s*(.*?)\s*")
_RESULT_HEADER = re.compile(r"\s*image_name\s*\|\s*comment_number\s*\|\s*comment\s*")
# The one name in Flickr8k.token.txt that no archive has a picture for; Kaggle's captions.txt leaves it out, too.
_NO_PICTURE = "2258277193_586949ec62.jpg.1"
_SPLIT_FILES = {
    "Flickr_8k.trainImages.txt": "train",
    "Flickr_8k.devImages.txt": "val",
    "Flickr_8k.testImages.txt": "test",
}


_FIRST_LINE = re.compile(r"[\r\n]*([^\r\n]*)")


def _is_tokens(_: Path, text: str) -> bool:
    return _TOKEN.fullmatch(_first_line(text)) is not None


def _is_results(_: Path, text: str) -> bool:
    return _RESULT_HEADER.fullmatch(_first_line(text)) is not None


def _first_line(text: str) -> str:
    match = _FIRST_LINE.match(text)
    return match[1] if match else ""


def _tokens(file: Path, text: str) -> Rows:
    return _flickr(file, enumerate(text.split("\n"), 1), _TOKEN, "NAME#NUMBER, a tab and a caption")


def _results(file: Path, text: str) -> Rows:
    lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if not _RESULT_HEADER.fullmatch(line))
    return _flickr(file, lines, _RESULT, "NAME| NUMBER| CAPTION")


def _flickr(file: Path, lines: Iterable[tuple[int, str]], form: re.Pattern[str], expected: str) -> Rows:
    splits = _flickr_splits(file)
    rows = []
    for number, line in lines:
        if not line.strip():
            continue
        match = form.fullmatch(line.rstrip("\r"))
        if not match:
            raise DataError(f"{file}, line {number}: expected {expected}")
        name, caption = match.groups()
        if name != _NO_PICTURE:
            rows.append(Row(name, (caption,) if caption else (), (), splits.get(name), {}))
    return Rows(rows, _places(file, *(f"../{name}" for name in _PICTURE_FOLDERS)))


def _flickr_splits(file: Path) -> dict[str, str]:
    """Picture name -> split, from the lists of names that come with Flickr8k, where they lie beside the file."""
    splits: dict[str, str] = {}
    for name, split in _SPLIT_FILES.items():
        names = file.with_name(name)
        if names.is_file():
            for line in _decode(names, names.read_bytes()).splitlines():
                picture = line.strip()
                if splits.setdefault(picture, split) != split:
                    raise DataError(f"{names}: {one_line(picture)} is in split {splits[picture]!r} already")
    return splits


# Tables ---------------------------------------------------------------------------------------------------------------

_SEPARATORS = "\t,;|"
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2})?")


@dataclass(frozen=True)
class _Roles:
    """Which columns of a table mean what, by their own spelling; None: there is none."""

    image: str | None
    texts: str | None
    labels: str | None
    split: str | None

    @classmethod
    def of(cls, header: Iterable[str]) -> _Roles:
        known = {name.lower(): name for name in reversed(list(header))}
        groups = (_IMAGE_NAMES, _TEXT_NAMES, _LABEL_NAMES, ("split",))
        return cls(*(next((known[name] for name in names if name in known), None) for names in groups))


def _table_rows(roles: _Roles, images: list[Any], columns: dict[str, list[Any]]) -> list[Row]:
    """One row per picture, from the columns beside them."""
    nothing = [None] * len(images)
    texts, labels, splits = (columns.pop(name or "", nothing) for name in (roles.texts, roles.labels, roles.split))
    extras = zip(*columns.values(), strict=True) if columns else iter([()] * len(images))
    return [
        Row(image, _strings(text), _strings(label), None if split is None else str(split), dict(zip(columns, extra)))  # noqa: B905
        for image, text, label, split, extra in zip(images, texts, labels, splits, extras, strict=True)
    ]


def _is_csv(file: Path, text: str) -> bool:
    return (
        file.suffix.lower() in (".csv", ".tsv", ".tab", ".txt") or _understood(_first_line(text), _separator(text)) > 0
    )


def _separator(text: str) -> str:
    """The separator under which the first line holds most of the names that are understood."""
    line = _first_line(text)
    return max(_SEPARATORS, key=lambda mark: (_understood(line, mark), line.count(mark)))


def _understood(line: str, mark: str) -> int:
    """How many parts of a table a line of column names tells; 0 without a column of pictures."""
    try:
        roles = _Roles.of(name.strip() for name in next(csv.reader([line], delimiter=mark), []))
    except csv.Error:
        return 0
    return sum(name is not None for name in astuple(roles)) if roles.image else 0


def _csv(file: Path, text: str) -> Rows:
    """A table in text with RFC 4180's quotes: open_clip's, Kaggle's, a spreadsheet's."""
    mark = _separator(text)
    padded = f"{mark} " in _first_line(text)  # "image, caption"
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True, skipinitialspace=padded)
    try:
        header = [name.strip() for name in next(line for line in lines if line)]
        roles = _Roles.of(header)
        _check_header(file, header, roles)
        cells = list(_csv_lines(file, lines, header, roles))
    except csv.Error as error:
        fault = f"{error}; is a double quote left open? Inside a quoted field it is written twice"
        raise DataError(f"{file}, line {lines.line_num} is not CSV: {fault}") from error
    columns: dict[str, list[Any]] = {name: list(column) for name, column in zip(header, zip(*cells))}  # noqa: B905
    columns.pop("", None)  # the row number that pandas writes
    images = columns.pop(roles.image or "", [])
    for name, values in columns.items():
        meant = name in (roles.texts, roles.labels, roles.split)
        columns[name] = [value or None for value in values] if meant else _numbers(values)
    rows = _table_rows(roles, images, columns)
    if roles.split is None and (splits := _flickr_splits(file)):
        rows = [row._replace(split=splits.get(_base_name(str(row.image)))) for row in rows]
    return Rows(rows, _places(file))


def _csv_lines(file: Path, lines: Any, header: list[str], roles: _Roles) -> Iterator[list[str]]:
    at = header.index(roles.image or "")
    for line in lines:
        if not line:
            continue
        if len(line) != len(header):
            fault = f"{len(line)} fields instead of {len(header)}: put what holds a separator into double quotes"
            raise DataError(f"{file}, line {lines.line_num}: {fault}")
        if not line[at]:
            raise DataError(f"{file}, line {lines.line_num}: no picture under {roles.image!r}")
        yield line


def _check_header(file: Path, header: list[str], roles: _Roles) -> None:
    found = f"{', '.join(map(one_line, header)):.300}"
    if roles.image is None and "url" in header:
        raise DataError(
            f"{file} lists addresses of pictures, not files: its columns are {found}; "
            "read the .tar files that img2dataset wrote beside it, or their folder"
        )
    if roles.image is None:
        raise DataError(
            f"{file} has no column that names pictures: its columns are {found}; understood are "
            f"{', '.join(_IMAGE_NAMES)} (pictures), {', '.join(_TEXT_NAMES)} (captions), "
            f"{', '.join(_LABEL_NAMES)} (labels), split"
        )
    if len(set(header)) < len(header):
        raise DataError(f"{file} has two columns of one name: {found}")


def _numbers(values: list[str]) -> list[Any]:
    """A column of numbers, where all of its cells are such (or empty: None); any other stays text."""
    for form, convert in ((_INTEGER, int), (_NUMBER, float)):
        if all(not value or form.fullmatch(value) for value in values) and any(values):
            return [convert(value) if value else None for value in values]
    return values


def _is_parquet(_: Path, head: bytes) -> bool:
    return head.startswith(b"PAR1")


def _parquet(file: Path) -> Rows:
    """A Parquet file: pictures by name, as bytes, or both (the struct of Hugging Face's datasets)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file).read()
        header = table.column_names
        kinds = [table.schema.field(number).type for number in range(len(header))]
        holding = [
            name
            for name, kind in zip(header, kinds, strict=True)
            if pa.types.is_struct(kind) or kind in (pa.binary(), pa.large_binary())
        ]
        roles = _Roles.of(header)
        roles = replace(
            roles, image=_Roles.of(holding).image or roles.image
        )  # what holds pictures before what names them
        _check_header(file, header, roles)
        columns: dict[str, list[Any]] = {name: table[name].to_pylist() for name in header}
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{file} is damaged, or no Parquet file: {' '.join(str(error).split())}") from error
    if roles.labels and (classes := _hugging_face_classes(table.schema.metadata, roles.labels)):
        columns[roles.labels] = [_class_name(file, value, classes) for value in columns[roles.labels]]
    others = {name: values for name, values in columns.items() if name != roles.image}
    names = others.get(_Roles.of(others).image or "", [None] * table.num_rows)
    images = [
        _picture(file, number, value, name)
        for number, (value, name) in enumerate(zip(columns[roles.image or ""], names, strict=True), 1)
    ]
    return Rows(_table_rows(roles, images, others), _places(file))


def _picture(file: Path, number: int, value: Any, name: Any) -> str | PictureBytes:
    """What a cell says: a path, bytes, or {bytes, path} with either."""
    data, path = value, name
    if isinstance(value, dict):
        data = value.get("path") if value.get("bytes") is None else value["bytes"]
        path = value.get("path") or name
    if isinstance(data, bytes) and data:
        return PictureBytes(_base_name(str(path or "")) or f"{file.stem}-{number}", data)
    if isinstance(data, str) and data:
        return data
    raise DataError(f"{file}, row {number}: expected a picture's path or its bytes, not {value!r:.50}")


def _hugging_face_classes(metadata: Mapping[bytes, bytes] | None, column: str) -> list[str]:
    """The names behind a column of ClassLabel, which stores numbers; none, if it is no such column."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return []
    return names if isinstance(names, list) else []


def _class_name(where: Path | str, value: Any, classes: Sequence[str]) -> str | None:
    if value is None:
        return None
    try:
        number = int(value)
    except (TypeError, ValueError):
        return str(value)  # a name already
    if not classes:
        return str(number)
    if not 0 <= number < len(classes):
        raise DataError(f"{where}: class {number} is none of the {len(classes)} classes that are named")
    return str(classes[number])


# Webdataset -----------------------------------------------------------------------------------------------------------

_PICTURE_KINDS = {suffix[1:] for suffix in IMAGE_SUFFIXES}
_NOTE_KINDS = ("txt", "caption", "json", "cls")


def _is_tar(file: Path, head: bytes) -> bool:
    return head[257:262] == b"ustar" or (file.suffix.lower() == ".tar" and not _COMPRESSED.match(head))


def _one_tar(file: Path) -> Rows:
    return Rows(_tar_rows(file, None, _class_list(file.parent)))


def _tar_folder(folder: Path) -> Rows:
    """Shards, here or in one folder per split: webdataset's, img2dataset's, and the layout of CLIP_benchmark."""
    classes = _class_list(folder)
    rows = []
    for place, shards in _shards(folder):
        count = place / "nshards.txt"
        if count.is_file() and (promised := _decode(count, count.read_bytes()).strip()) != str(len(shards)):
            raise DataError(f"{place} holds {len(shards)} .tar files, but its nshards.txt says {one_line(promised)}")
        split = None if place == folder else _SPLIT_FOLDERS.get(place.name, place.name)
        for shard in shards:
            rows += _tar_rows(shard, split, classes)
    return Rows(rows)


def _holds_tars(folder: Path) -> bool:
    return any(shards for _, shards in _shards(folder))


def _shards(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """The folder and those in it, each with its tars in the order of their numbers."""
    with os.scandir(folder) as entries:
        inner = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    for place in (folder, *(folder / name for name in inner)):
        with os.scandir(place) as entries:
            tars = [entry.name for entry in entries if entry.name.lower().endswith((".tar", ".tar.gz", ".tgz"))]
        yield place, [place / name for name in sorted(tars, key=_by_number)]


def _by_number(name: str) -> str:
    return re.sub("[0-9]+", lambda digits: digits[0].zfill(20), name)


def _class_list(folder: Path) -> list[str]:
    """The lines of classnames.txt here or one folder up (a shard lies in the folder of its split); none without it."""
    for file in (folder / "classnames.txt", folder / ".." / "classnames.txt"):
        if file.is_file():
            return _decode(file, file.read_bytes()).splitlines()
    return []


def _tar_rows(tar: Path, split: str | None, classes: Sequence[str]) -> list[Row]:
    """The samples of one shard: members whose names agree up to the first dot of the base name, as in webdataset."""
    rows, lost = [], []
    with tar.open("rb") as stream:
        for key, fields in _samples(tar, stream).items():
            where = f"{tar}, sample {one_line(key)}"
            image = _member(where, fields, _PICTURE_KINDS)
            if image is None:
                lost.append(key)
                continue
            notes = {}
            for kind in _NOTE_KINDS:
                member = _member(where, fields, {kind})
                if member is not None:
                    stream.seek(member.offset)
                    notes[kind] = stream.read(member.size)
            rows.append(_noted_row(where, image, split, notes, classes))
    if lost:
        raise DataError(f"{len(lost)} of the {len(lost) + len(rows)} samples of {tar} have no picture: {some(lost)}")
    return rows


def _samples(tar: Path, stream: IO[bytes]) -> dict[str, dict[str, TarMember]]:
    """Key -> what follows the key in a member's name -> the member."""
    samples: dict[str, dict[str, TarMember]] = {}
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            while (info := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # or all of them are kept, at a kilobyte each
                folder, _, base = info.name.rpartition("/")
                stem, _, kind = base.partition(".")
                if not info.isreg() or info.issparse() or not stem or not kind or "__MACOSX" in folder:
                    continue
                if stem.startswith("__") and stem.endswith("__"):  # webdataset's own notes
                    continue
                member = TarMember(tar, base, info.offset_data, info.size)
                samples.setdefault(f"{folder}/{stem}" if folder else stem, {})[kind.lower()] = member
            stream.seek(archive.offset)
            end = stream.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        stream.seek(0)
        if _COMPRESSED.match(stream.read(_HEAD)):
            raise DataError(f"{tar} {_UNPACK}") from error
        raise DataError(f"{tar} is damaged or cut short, or no tar: {error}") from error
    if not end or end.strip(b"\0"):  # tarfile takes damage in the middle for the end
        raise DataError(f"{tar} is damaged or cut short: it has no end mark behind its {len(samples)} first samples")
    return samples


def _member(where: str, fields: Mapping[str, TarMember], kinds: Collection[str]) -> TarMember | None:
    """The one member of a kind: `KEY.jpg`, else `KEY.any.thing.jpg`."""
    names = [name for name in fields if name in kinds] or [n for n in fields if n.rpartition(".")[2] in kinds]
    if len(names) > 1:
        found = some([fields[name].name for name in names])
        raise DataError(f"{where} has {len(names)} members of one kind: {found}; a key ends at the first dot of a name")
    return fields[names[0]] if names else None


def _noted_row(
    where: str, image: Picture, split: str | None, notes: Mapping[str, bytes], classes: Sequence[str]
) -> Row:
    """A picture and what lies beside it: captions one a line, a JSON object, a class or its number."""
    texts = {kind: _decode(f"{where}.{kind}", data) for kind, data in notes.items()}
    rest: dict[str, Any] = {}
    if "json" in texts:
        try:
            rest = json.loads(texts["json"])
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}.json is not JSON: {error}") from error
        if not isinstance(rest, dict):
            raise DataError(f"{where}.json: expected an object")
    captions = _lines(texts.get("txt", texts.get("caption", "")))
    told = _take(others := dict(rest), _TEXT_KEYS)
    if not captions or captions == _lines("\n".join(told)):  # what says something else than the text stays a column
        captions, rest = told, others
    labels = _take(rest, _LABEL_KEYS)
    if "cls" in texts and (label := _class_name(f"{where}.cls", texts["cls"].strip(), classes)):
        labels = tuple(dict.fromkeys((label, *labels)))
    return Row(image, captions, labels, _take_split(rest) or split, rest)


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line for line in text.replace("\r\n", "\n").split("\n") if line.strip())


# Folders --------------------------------------------------------------------------------------------------------------

_LISTS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".token")
_NO_NOTES = ("readme", "license", "licence", "notice")


def _tree(folder: Path) -> Rows:
    """`a.jpg` with `a.txt`, or a folder per class as torchvision's ImageFolder takes it; splits above either."""
    try:
        pictures = [file.path for file in scan(folder)]
    except UsageError as error:
        raise DataError(str(error)) from error
    notes = _notes(folder, {path.rpartition("/")[0] for path in pictures})
    if not notes:
        return Rows(_class_rows(folder, pictures))
    owners: dict[str, str] = {}
    rows = []
    for path in pictures:
        stem = path.rpartition(".")[0]
        beside = notes.get(stem, {})
        if beside and owners.setdefault(stem, path) != path:
            raise DataError(
                f"{folder}: {one_line(owners[stem])} and {one_line(path)} share the text beside them: rename one"
            )
        read = {kind: file.read_bytes() for kind, file in beside.items()}
        split = _split_and_rest(path)[0]
        rows.append(_noted_row(one_line(folder / stem), folder / path, split, read, ()))
    lost = [str(file) for stem in notes.keys() - owners.keys() for file in notes[stem].values()]
    if lost:
        raise DataError(
            f"{len(lost)} text files in {folder} have no picture of their name beside them: {some(sorted(lost))}; "
            "if one of them lists the pictures, name that file itself"
        )
    return Rows(rows)


def _notes(folder: Path, holding: set[str]) -> dict[str, dict[str, Path]]:
    """Path without suffix, relative to the folder -> kind -> file, for all that may belong to a picture."""
    places = set(holding)  # the walk does not follow links, the scan for pictures did
    for place, inner, _ in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith(".")]
        places.add("" if Path(place) == folder else Path(place).relative_to(folder).as_posix())
    notes: dict[str, dict[str, Path]] = {}
    for place in sorted(places):
        with os.scandir(folder / place) as entries:
            names = [entry.name for entry in entries]
        for name in names:
            stem, _, kind = name.rpartition(".")
            if kind.lower() in _NOTE_KINDS and stem and stem[0] != "." and stem.lower() not in _NO_NOTES:
                path = f"{place}/{stem}" if place else stem
                notes.setdefault(path, {})[kind.lower()] = folder / place / name
    return notes


def _class_rows(folder: Path, pictures: Sequence[str]) -> list[Row]:
    lists = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in _LISTS)
    if lists:
        raise DataError(f"{folder} is a folder with {some(lists)} in it: name that file itself")
    rows = []
    for path in pictures:
        split, rest = _split_and_rest(path)
        label, *inner = rest.split("/")
        rows.append(Row(folder / path, (), (label,) if inner else (), split, {}))
    if rows and not any(row.labels for row in rows):
        raise DataError(f"{folder} has {len(rows)} pictures and nothing that goes with them; {KINDS}")
    return rows


def _split_and_rest(path: str) -> tuple[str | None, str]:
    """The split that the uppermost folder of a path names, and the path below it."""
    first, _, rest = path.partition("/")
    split = _SPLIT_FOLDERS.get(first.lower()) if rest else None
    return split, rest if split else path


# The first that fits reads it.
_FOLDERS: tuple[tuple[Callable[[Path], bool], Callable[[Path], Rows]], ...] = (
    (_holds_tars, _tar_folder),
    (Path.is_dir, _tree),
)
_BINARY: tuple[tuple[Callable[[Path, bytes], bool], Callable[[Path], Rows]], ...] = (
    (_is_parquet, _parquet),
    (_is_tar, _one_tar),
)
_TEXTS: tuple[tuple[Callable[[Path, str], bool], Callable[[Path, str], Rows]], ...] = (
    (_is_json, _json),
    (_is_tokens, _tokens),
    (_is_results, _results),
    (_is_csv, _csv),
)
