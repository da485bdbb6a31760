"""The one reader of data: files and folders that pair pictures with sentences or labels, all read into `Record`."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from retrieval.errors import DataError
from retrieval.pair_formats import (
    KINDS,
    Picture,
    PictureBytes,
    Row,
    Rows,
    TarMember,
    one_line,
    read_rows,
    some,
)

__all__ = [
    "Example",
    "Picture",
    "PictureBytes",
    "Record",
    "Sentence",
    "TarMember",
    "checksum",
    "class_names",
    "read_examples",
    "read_pairs",
    "read_sentences",
    "select_split",
]

_PROBED = 8  # pictures that are looked for, to find out where all of them lie
_LISTED = 16  # from so many pictures in one folder on, listing it is cheaper than asking for each


@dataclass(frozen=True)
class Record:
    """One picture with its sentences and labels; either may be empty."""

    image: Picture  # a Path, a TarMember or PictureBytes
    texts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    split: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)  # whatever else is known of the picture
    text_columns: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # and of each text, in their order


@dataclass(frozen=True)
class Sentence:
    """One sentence, and the picture that it is about if it names one."""

    text: str
    image: Picture | None = None
    labels: tuple[str, ...] = ()
    split: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)  # whatever else is known


@dataclass(frozen=True)
class Example:
    """One row as it stands: what there is of picture, text and labels, and whatever else it says."""

    image: Picture | None = None
    text: str = ""  # several sentences of a row are one text
    labels: tuple[str, ...] = ()
    split: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


def read_pairs(
    source: Path,
    split: str | None = None,
    *,
    prefer: str | None = None,
    images: Path | None = None,
    may_lack: float = 0.0,
    captioned: bool = True,
) -> list[Record]:
    """Read a file or a folder that pairs pictures with sentences or labels. Its kind is told by its content.

    - JSONL and JSON lists of ``{image, captions | text, label | labels, split}``; other keys become columns
    - Karpathy's JSON of Flickr8k, Flickr30k and COCO; ``restval`` stays a split of its own
    - COCO's JSON of captions or instances; the split is told by the file's name (``captions_val2014.json``)
    - ``captions.txt``, ``Flickr8k.token.txt``, ``results.csv``, ``results_20130124.token``; the split from Flickr8k's
      lists (``Flickr_8k.devImages.txt``: val) where they lie beside the file
    - CSV and TSV with a line of column names, separated by tab, comma, semicolon or bar, and Parquet. Pictures: image,
      filepath, file_name, filename, image_path, image_name, path or img; captions: captions, caption, texts, text,
      title, sentence or comment; labels, label or class; split. Of several, the first in this order; every other
      column is kept. In CSV a column is read as numbers if each of its cells is one or empty (007 is none). A Parquet
      column may hold lists, and the pictures themselves, as bytes or as ``{bytes, path}``
    - webdataset tars: one, several as ``shards-{000..009}.tar``, a folder of them, or one sub-folder per split.
      ``KEY.jpg`` (or another picture) with ``KEY.txt`` (captions, one a line), ``KEY.json``, ``KEY.cls`` (an index into
      ``classnames.txt``)
    - a folder of ``a.jpg`` with ``a.txt``, ``a.caption`` or ``a.json``; or, without any of these, one sub-folder per
      class. Above either, train, val, validation, dev and test are splits (validation and dev: val)

    Pictures named by a relative path are looked for in ``images`` alone if it is given, else in ``images/`` beside the
    file, relative to the file, in a folder of the file's own name, and where Flickr and COCO keep them. The first
    pictures that are found decide for the whole file. A picture without a caption stays: it is a distractor.

    Rows that name the same picture in the same split are one picture: its texts and labels in the order of the rows (a
    repeated text counts again, a repeated label does not). A column on which they agree, or that some row without a
    text has, keeps its first value in ``columns``; any other has one value for each text, in ``text_columns`` (None
    where its row says nothing).

    Args:
        source: the file or folder.
        split: only this split; None for all of them.
        prefer: only this split where there is one and none was asked for.
        images: the folder that the pictures lie in.
        may_lack: the share of the pictures that may be missing; they are among the records all the same.
        captioned: False: only the pictures are wanted. A folder may then hold nothing else, and all in it are taken;
            and a file may hold nothing but their names, one a line.

    Raises:
        DataError: the source cannot be read or is of no known kind, something in it is wrong, pictures are missing (in
            the split that was asked for), or nothing is left of the split.
    """
    found = read_rows(source, captioned)
    if not found.rows:
        raise DataError(f"{source} is empty: there is no picture in it; {KINDS}")
    if images is not None and not images.is_dir():
        raise DataError(f"{images}: there is no such folder of pictures")
    if split is None and any(row.split == prefer for row in found.rows):
        split = prefer
    records = _merge(found, *_picture_folder(found, split, images))
    if split is not None:
        records = select_split(records, split, source)
    missing = _missing([str(record.image) for record in records if isinstance(record.image, Path)])
    if len(missing) > may_lack * len(records):
        raise DataError(
            f"{len(missing)} of the {len(records)} pictures that {source} names are missing: {some(missing)}; "
            "if they lie elsewhere, name their folder with --images"
        )
    return records


def read_sentences(source: Path, images: Path | None = None) -> list[Sentence]:
    """Read the sentences of whatever `read_pairs` reads, and of what names no pictures.

    That is JSON, CSV, TSV or Parquet with the keys or columns of sentences that `read_pairs` knows, and plain text: one
    sentence a line. Blank sentences are left out. Whether pictures that are named are there is not asked.

    Raises:
        DataError: the source cannot be read, something in it is wrong, or it has no sentences.
    """
    found = read_rows(source, pictured=False)
    if images is not None and not images.is_dir():
        raise DataError(f"{images}: there is no such folder of pictures")
    picture = _finder(found, images)
    sentences = [
        Sentence(text, picture(row.image), row.labels, row.split, row.columns)
        for row in found.rows
        for text in row.texts
        if text.strip()
    ]
    if not sentences:
        raise DataError(f"{source} has no sentences: none of its {len(found.rows)} rows has one")
    return sentences


def read_examples(source: Path, images: Path | None = None) -> list[Example]:
    """Read the rows of whatever `read_pairs` reads, one by one: two that name one picture stay two.

    A row may lack its picture, its text or both (null, or an empty field), and a table needs no column of either.

    Raises:
        DataError: the source cannot be read, something in it is wrong, has no rows, or pictures that it names are
            missing.
    """
    found = read_rows(source, pictured=False, bare=True)
    if not found.rows:
        raise DataError(f"{source} is empty: there is no row in it; {KINDS}")
    if images is not None and not images.is_dir():
        raise DataError(f"{images}: there is no such folder of pictures")
    picture = _finder(found, images)
    examples = [
        Example(picture(row.image), " ".join(filter(str.strip, row.texts)), row.labels, row.split, row.columns)
        for row in found.rows
    ]
    named = [str(example.image) for example in examples if isinstance(example.image, Path)]
    if missing := _missing(named):
        raise DataError(
            f"{len(missing)} of the {len(named)} pictures that {source} names are missing: {some(missing)}; "
            "if they lie elsewhere, name their folder with --images"
        )
    return examples


def _finder(found: Rows, images: Path | None) -> Callable[[str | Picture], Picture | None]:
    """What tells where the picture of a row is; None of a row without one."""
    named = Rows([row for row in found.rows if row.image], found.places, found.droppable)
    base, drop = _picture_folder(named, None, images)

    def picture(image: str | Picture) -> Picture | None:
        if not isinstance(image, str):
            return image
        return base / (Path(image).name if drop else image) if image else None

    return picture


def select_split(records: Sequence[Record], split: str, source: Path) -> list[Record]:
    """The records of one split. DataError, naming the source and its splits, if there are none."""
    kept = [record for record in records if record.split == split]
    if not kept:
        found = ", ".join(map(one_line, sorted({record.split or "(none)" for record in records})))
        raise DataError(f"{source} has no rows of split {split!r}; its splits are: {found}")
    return kept


def _picture_folder(found: Rows, split: str | None, images: Path | None) -> tuple[Path, bool]:
    """Where the pictures of the split lie, and whether they lie there without the folders of their names."""
    places = (images,) if images else found.places or (Path(),)
    wanted = (row.image for row in found.rows if split in (None, row.split))
    names = (name for name, _ in groupby(wanted) if isinstance(name, str) and not Path(name).is_absolute())
    for name in islice(names, _PROBED):
        for place in places:
            if _is_file(place / name):
                return place, False
            if found.droppable and _is_file(place / Path(name).name):
                return place, True
    return places[0], False


def _merge(found: Rows, base: Path, drop_folders: bool) -> list[Record]:
    """One record per picture, in the order of their first rows."""
    pictures: dict[str, Picture] = {}
    groups: dict[tuple[object, str | None], tuple[Picture, list[Row]]] = {}
    for row in found.rows:
        image: Picture | None = row.image if not isinstance(row.image, str) else pictures.get(row.image)
        if image is None:
            name = str(row.image)
            image = pictures[name] = base / (Path(name).name if drop_folders else name)
        key = str(image) if isinstance(image, Path) else image  # which is hashed faster
        groups.setdefault((key, row.split), (image, []))[1].append(row)
    return [Record(image, *rows[0][1:]) if len(rows) == 1 else _merged(image, rows) for image, rows in groups.values()]


def _merged(image: Picture, rows: Sequence[Row]) -> Record:
    columns: dict[str, Any] = {}
    text_columns: dict[str, tuple[Any, ...]] = {}
    every_row_has_a_text = all(row.texts for row in rows)
    for name in dict.fromkeys(name for row in rows for name in row.columns):
        values = [row.columns.get(name) for row in rows]
        if every_row_has_a_text and any(value != values[0] for value in values):
            text_columns[name] = tuple(value for row, value in zip(rows, values, strict=True) for _ in row.texts)
        else:
            columns[name] = next(row.columns[name] for row in rows if name in row.columns)
    texts = tuple(text for row in rows for text in row.texts)
    labels = tuple(dict.fromkeys(label for row in rows for label in row.labels))
    return Record(image, texts, labels, rows[0].split, columns, text_columns)


def _missing(files: Sequence[str]) -> list[str]:
    """Those that are no files, in order. Folders that many of them share are listed instead of asked."""
    names: defaultdict[str, set[str]] = defaultdict(set)
    for file in files:
        folder, _, name = file.rpartition(os.sep)
        names[folder].add(name)
    there: dict[str, set[str]] = {}
    for folder, wanted in names.items():
        there[folder] = set()
        if len(wanted) >= _LISTED and Path(folder).is_dir():
            with os.scandir(folder) as entries:
                there[folder] = {entry.name for entry in entries if entry.name in wanted and entry.is_file()}
    split = ((file, *file.rpartition(os.sep)) for file in files)
    return [file for file, folder, _, name in split if name not in there[folder] and not _is_file(file)]


def _is_file(path: Path | str) -> bool:
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises where a name is too long, or a folder is closed


def checksum(records: Sequence[Record]) -> str:
    """SHA-256, in hex, over the sorted (picture name, caption or label) pairs: equal when two people hold the same."""
    pairs = sorted(
        (r.image.name, text) for r in records for text in (*r.texts, *(f"\0{label}" for label in r.labels), "")
    )
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def class_names(records: Sequence[Record]) -> list[str]:
    """The labels that occur, sorted."""
    return sorted(Counter(label for record in records for label in record.labels))
