"""What every reader gives, and what several of them share."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from retrieval.errors import DataError

KINDS = (
    "read are JSONL, JSON (a list of objects, Karpathy's, COCO's), CSV and TSV with a line of column names, "
    "captions.txt and .token files of Flickr8k and Flickr30k, Parquet, webdataset .tar, a folder of .tar, "
    "a folder of a.jpg with a.txt, and a folder with one sub-folder per class"
)

# Names of keys and columns, the first that is there counts. JSON keeps to the few that it always had for sentences and
# labels, so that a column "title" stays a column; tables come from anywhere (open_clip's are filepath and title).
IMAGE_NAMES = ("image", "filepath", "file_name", "filename", "image_path", "image_name", "path", "img")
TEXT_KEYS = ("captions", "caption", "texts", "text")
TEXT_NAMES = (*TEXT_KEYS, "title", "sentence", "comment")
LABEL_KEYS = ("labels", "label")
LABEL_NAMES = (*LABEL_KEYS, "class")

SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "dev": "val", "test": "test"}
PICTURE_FOLDERS = (
    "Images",
    "Flicker8k_Dataset",  # so is it spelt in the archive
    "Flickr8k_Dataset",
    "flickr30k_images",
    "flickr30k-images",
)
NOTE_KINDS = ("txt", "caption", "json", "cls")
_SHOWN = 3

_FIRST_LINE = re.compile(r"[\r\n]*([^\r\n]*)")


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
    path: str = field(default="", compare=False)  # the name with the folders inside the tar

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


def one_line(name: object) -> str:
    """A name as a message shows it: with its line breaks and the like escaped."""
    text = str(name)
    return text if text.isprintable() else repr(text)[1:-1]


def some(names: Sequence[object]) -> str:
    """The first few of the names, for a message."""
    return ", ".join(map(one_line, names[:_SHOWN])) + (", …" if len(names) > _SHOWN else "")


def decode(where: Path | str, data: bytes) -> str:
    """Bytes as UTF-8 text, without a byte order mark. DataError, naming where they are from, if they are none."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{where} is not UTF-8 text (line {line}): save it as UTF-8") from error


def first_line(text: str) -> str:
    """The first line that is not empty, without its end."""
    match = _FIRST_LINE.match(text)
    return match[1] if match else ""


def places(file: Path, *more: str) -> tuple[Path, ...]:
    """The folders in which the pictures that a file names may lie, the likeliest first."""
    return tuple(file.parent / name for name in ("images", ".", file.stem, *PICTURE_FOLDERS, *more))


def strings(value: object) -> tuple[str, ...]:
    """One value or a list of them, as strings; nulls are none."""
    if isinstance(value, str):  # nearly always
        return (value,)
    values = value if isinstance(value, list) else [value]
    return tuple(str(item) for item in values if item is not None)


def take(fields: dict[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
    """Take the first of the keys out of the fields."""
    for key in keys:
        if key in fields:
            return strings(fields.pop(key))
    return ()


def take_split(fields: dict[str, Any]) -> str | None:
    """Take the split out of the fields."""
    split = fields.pop("split", None)
    return None if split is None else str(split)


def class_name(where: Path | str, value: Any, classes: Sequence[str]) -> str | None:
    """The name of a class given by its number, or by its name. DataError if the number is none of the classes."""
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


def noted_row(where: str, image: Picture, split: str | None, notes: Mapping[str, bytes], classes: Sequence[str]) -> Row:
    """A picture and what lies beside it: captions one a line, a JSON object, a class or its number."""
    texts = {kind: decode(f"{where}.{kind}", data) for kind, data in notes.items()}
    rest: dict[str, Any] = {}
    if "json" in texts:
        try:
            rest = json.loads(texts["json"])
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}.json is not JSON: {error}") from error
        if not isinstance(rest, dict):
            raise DataError(f"{where}.json: expected an object")
    captions = _lines(texts.get("txt", texts.get("caption", "")))
    told = take(others := dict(rest), TEXT_KEYS)
    if not captions or captions == _lines("\n".join(told)):  # what says something else than the text stays a column
        captions, rest = told, others
    labels = take(rest, LABEL_KEYS)
    if "cls" in texts and (label := class_name(f"{where}.cls", texts["cls"].strip(), classes)):
        labels = tuple(dict.fromkeys((label, *labels)))
    return Row(image, captions, labels, take_split(rest) or split, rest)


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line for line in text.replace("\r\n", "\n").split("\n") if line.strip())
