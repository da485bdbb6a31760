"""Folders: pictures with notes beside them, or one sub-folder per class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from retrieval.errors import DataError, UsageError
from retrieval.folder import scan
from retrieval.pair_formats.rows import KINDS, NOTE_KINDS, SPLIT_FOLDERS, Row, Rows, noted_row, one_line, some

_LISTS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".token")
_NO_NOTES = ("readme", "license", "licence", "notice")


def read_tree(folder: Path) -> Rows:
    """`a.jpg` with `a.txt`, or a folder per class as torchvision's ImageFolder takes it; splits above either."""
    pictures = _scanned(folder)
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
        rows.append(noted_row(one_line(folder / stem), folder / path, split, read, ()))
    lost = [str(file) for stem in notes.keys() - owners.keys() for file in notes[stem].values()]
    if lost:
        raise DataError(
            f"{len(lost)} text files in {folder} have no picture of their name beside them: {some(sorted(lost))}; "
            "if one of them lists the pictures, name that file itself"
        )
    return Rows(rows)


def read_photos(folder: Path) -> Rows:
    """Every picture in a folder, whatever lies beside it; splits above them, as for :func:`read_tree`."""
    return Rows([Row(folder / path, (), (), _split_and_rest(path)[0], {}) for path in _scanned(folder)])


def _scanned(folder: Path) -> list[str]:
    try:
        return [file.path for file in scan(folder)]
    except UsageError as error:
        raise DataError(str(error)) from error


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
            if kind.lower() in NOTE_KINDS and stem and stem[0] != "." and stem.lower() not in _NO_NOTES:
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
    split = SPLIT_FOLDERS.get(first.lower()) if rest else None
    return split, rest if split else path
