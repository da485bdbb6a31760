"""How each kind of file and folder says which sentences and labels belong to which picture.

One reader per kind. `read_rows` finds the right one by content (by name only where content cannot tell) and every
reader gives the same: rows, and the folders in which the pictures that they name may lie.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from retrieval.errors import DataError
from retrieval.pair_formats.documents import is_json, read_json
from retrieval.pair_formats.flickr import is_results, is_tokens, read_results, read_tokens
from retrieval.pair_formats.folders import read_photos, read_tree
from retrieval.pair_formats.rows import KINDS, Picture, PictureBytes, Row, Rows, TarMember, decode, one_line, some
from retrieval.pair_formats.tables import (
    is_csv,
    is_lines,
    is_parquet,
    is_paths,
    read_csv,
    read_lines,
    read_parquet,
    read_paths,
)
from retrieval.pair_formats.tars import (
    COMPRESSED,
    HEAD,
    UNPACK,
    Shard,
    holds_tars,
    is_pattern,
    is_tar,
    list_shards,
    read_shard,
    read_tar,
    read_tar_folder,
    read_tar_pattern,
)

__all__ = [
    "KINDS",
    "Picture",
    "PictureBytes",
    "Row",
    "Rows",
    "Shard",
    "TarMember",
    "is_pattern",
    "list_shards",
    "one_line",
    "read_rows",
    "read_shard",
    "some",
]


def read_rows(source: Path, captioned: bool = True, pictured: bool = True, bare: bool = False) -> Rows:
    """Read whatever pairs pictures with sentences or labels.

    Args:
        source: the file or folder.
        captioned: False: of a folder, every picture in it; of a file, names of pictures too, one a line.
        pictured: False: sentences without pictures are read too (a table, JSON or one a line); their image is "".
        bare: rows of tables and JSON that have neither are read too, if they have anything at all.

    Raises:
        DataError: it cannot be read, is of a kind that is not read, or something in it is wrong.
    """
    try:
        if source.is_dir():
            read_folder = next(read for fits, read in _FOLDERS if fits(source))
            return read_photos(source) if read_folder is read_tree and not captioned else read_folder(source)
        if is_pattern(source):
            return read_tar_pattern(source)
        with source.open("rb") as stream:  # once: a pipe cannot be read again
            head = stream.read(HEAD)
            for fits, read in _BINARY_BARE if bare else _BINARY if pictured else _BINARY_SENTENCES:
                if fits(source, head):
                    return read(source)
            _check_text(source, head)
            data = head + stream.read()
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}") from error
    text = decode(source, data)
    if "\0" in text:
        raise DataError(f"{source} holds NUL bytes: it is damaged, or no text; {KINDS}")
    if not text.strip():
        raise DataError(f"{source} is empty; {KINDS}")
    kinds = _TEXTS_BARE if bare else _TEXTS if pictured else _SENTENCES
    if is_paths(source, text) and not (captioned and pictured):
        return read_paths(source, text)
    reader = next((read for fits, read in kinds if fits(source, text)), None)
    if reader is None:
        raise DataError(f"{source} is of an unknown kind; {KINDS}")
    return reader(source, text)


# What is met under the name of data and never read: how it begins, and what to say.
_STRANGERS = {
    COMPRESSED: UNPACK,
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


# The first that fits reads it.
_FOLDERS: tuple[tuple[Callable[[Path], bool], Callable[[Path], Rows]], ...] = (
    (holds_tars, read_tar_folder),
    (Path.is_dir, read_tree),
)
_BINARY: tuple[tuple[Callable[[Path, bytes], bool], Callable[[Path], Rows]], ...] = (
    (is_parquet, read_parquet),
    (is_tar, read_tar),
)
_TEXTS: tuple[tuple[Callable[[Path, str], bool], Callable[[Path, str], Rows]], ...] = (
    (is_json, read_json),
    (is_tokens, read_tokens),
    (is_results, read_results),
    (is_csv, read_csv),
)
# The same where sentences may come without pictures.
_BINARY_SENTENCES: tuple[tuple[Callable[[Path, bytes], bool], Callable[[Path], Rows]], ...] = (
    (is_parquet, partial(read_parquet, pictured=False)),
    (is_tar, read_tar),
)
_SENTENCES: tuple[tuple[Callable[[Path, str], bool], Callable[[Path, str], Rows]], ...] = (
    (is_json, partial(read_json, pictured=False)),
    (is_tokens, read_tokens),
    (is_results, read_results),
    (is_lines, read_lines),
    (is_csv, partial(read_csv, pictured=False)),
)
# The same where a row may lack both.
_BINARY_BARE: tuple[tuple[Callable[[Path, bytes], bool], Callable[[Path], Rows]], ...] = (
    (is_parquet, partial(read_parquet, pictured=False, bare=True)),
    (is_tar, read_tar),
)
_TEXTS_BARE: tuple[tuple[Callable[[Path, str], bool], Callable[[Path, str], Rows]], ...] = (
    (is_json, partial(read_json, pictured=False, bare=True)),
    (is_tokens, read_tokens),
    (is_results, read_results),
    (is_csv, partial(read_csv, pictured=False, bare=True)),
)
