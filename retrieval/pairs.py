"""The one reader of data: files that pair pictures with sentences or labels."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retrieval.errors import DataError

_TEXT_KEYS = ("captions", "caption", "texts", "text")
_LABEL_KEYS = ("labels", "label")
_SHOWN = 3


@dataclass(frozen=True)
class Record:
    """One picture with its sentences and labels; either may be empty. ``columns`` holds whatever else the line had."""

    image: Path
    texts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    split: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


def read_pairs(file: Path, split: str | None = None) -> list[Record]:
    """Read a JSONL file of ``{image, captions | text, label | labels, split}`` objects, one per line.

    Pictures are looked for in ``images/`` beside the file, relative to the file, or in a folder of the file's own
    name. A picture without a caption stays: it is a distractor in the gallery.

    Raises:
        DataError: the file or pictures are missing, a line is wrong, or nothing is left of the split.
    """
    try:
        lines = file.read_text("utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: a pairs file is JSONL, one object a line") from error
    objects = [_parse_line(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not objects:
        raise DataError(f"{file} is empty: a pairs file is JSONL, one object a line")
    base = _picture_folder(file, objects[0]["image"])
    records = [_record(base, fields) for fields in objects]
    if split is not None:
        kept = [record for record in records if record.split == split]
        if not kept:
            found = ", ".join(sorted({record.split or "(none)" for record in records}))
            raise DataError(f"{file} has no rows of split {split!r}; its splits are: {found}")
        records = kept
    missing = [record.image for record in records if not record.image.is_file()]
    if missing:
        names = ", ".join(str(path) for path in missing[:_SHOWN]) + (", …" if len(missing) > _SHOWN else "")
        raise DataError(f"{len(missing)} of the {len(records)} pictures that {file} names are missing: {names}")
    return records


def _parse_line(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise DataError(f"{file}, line {number} is not JSON: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("image"), str):
        raise DataError(f'{file}, line {number}: expected an object with "image", as {{"image": "a.jpg", …}}')
    return fields


def _picture_folder(file: Path, image: str) -> Path:
    places = (file.parent / "images", file.parent, file.parent / file.stem)
    return next((place for place in places if (place / image).is_file()), places[0])


def _record(base: Path, fields: dict[str, Any]) -> Record:
    rest = dict(fields)
    image, split = rest.pop("image"), rest.pop("split", None)
    split = None if split is None else str(split)
    return Record(base / image, _strings(rest, _TEXT_KEYS), _strings(rest, _LABEL_KEYS), split, rest)


def _strings(fields: dict[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
    """Take the first of the keys out of the fields: one string or a list of them."""
    for key in keys:
        if key in fields:
            value = fields.pop(key)
            values = value if isinstance(value, list) else [value]
            return tuple(str(item) for item in values if item is not None)
    return ()


def checksum(records: Sequence[Record]) -> str:
    """SHA-256, in hex, over the sorted (picture name, caption or label) pairs: equal when two people hold the same."""
    pairs = sorted(
        (r.image.name, text) for r in records for text in (*r.texts, *(f"\0{label}" for label in r.labels), "")
    )
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def class_names(records: Sequence[Record]) -> list[str]:
    """The labels that occur, sorted."""
    return sorted(Counter(label for record in records for label in record.labels))
