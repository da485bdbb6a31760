"""Lines of Flickr8k and Flickr30k: token files, Kaggle's results, and the lists of their splits."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from retrieval.errors import DataError
from retrieval.pair_formats.rows import PICTURE_FOLDERS, Row, Rows, decode, first_line, one_line, places

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


def is_tokens(_: Path, text: str) -> bool:
    """Whether a text begins as Flickr's token files do."""
    return _TOKEN.fullmatch(first_line(text)) is not None


def is_results(_: Path, text: str) -> bool:
    """Whether a text begins as Kaggle's results.csv of Flickr30k does."""
    return _RESULT_HEADER.fullmatch(first_line(text)) is not None


def read_tokens(file: Path, text: str) -> Rows:
    """Token files of Flickr8k and Flickr30k."""
    return _flickr(file, enumerate(text.split("\n"), 1), _TOKEN, "NAME#NUMBER, a tab and a caption")


def read_results(file: Path, text: str) -> Rows:
    """Kaggle's results.csv of Flickr30k."""
    lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if not _RESULT_HEADER.fullmatch(line))
    return _flickr(file, lines, _RESULT, "NAME| NUMBER| CAPTION")


def _flickr(file: Path, lines: Iterable[tuple[int, str]], form: re.Pattern[str], expected: str) -> Rows:
    splits = flickr_splits(file)
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
    return Rows(rows, places(file, *(f"../{name}" for name in PICTURE_FOLDERS)))


def flickr_splits(file: Path) -> dict[str, str]:
    """Picture name -> split, from the lists of names that come with Flickr8k, where they lie beside the file."""
    splits: dict[str, str] = {}
    for name, split in _SPLIT_FILES.items():
        names = file.with_name(name)
        if names.is_file():
            for line in decode(names, names.read_bytes()).splitlines():
                picture = line.strip()
                if splits.setdefault(picture, split) != split:
                    raise DataError(f"{names}: {one_line(picture)} is in split {splits[picture]!r} already")
    return splits
