"""Webdataset: one tar, several in brace notation, or a folder of them."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from retrieval.errors import DataError
from retrieval.images import IMAGE_SUFFIXES
from retrieval.pair_formats.rows import (
    NOTE_KINDS,
    SPLIT_FOLDERS,
    Row,
    Rows,
    TarMember,
    decode,
    noted_row,
    one_line,
    some,
)

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_SHARDS = 100_000  # of one pattern; more is a slip of the keyboard

HEAD = 512  # bytes that tell a binary format: one block of a tar

COMPRESSED = re.compile(rb"\x1f\x8b|BZh[1-9]|\xfd7zXZ|\x28\xb5\x2f\xfd")
UNPACK = "is compressed: unpack it, or re-tar it without compression (its pictures already are)"

_PICTURE_KINDS = {suffix[1:] for suffix in IMAGE_SUFFIXES}


def is_tar(file: Path, head: bytes) -> bool:
    """Whether a file is an uncompressed tar, by its first bytes or by its name."""
    return head[257:262] == b"ustar" or (file.suffix.lower() == ".tar" and not COMPRESSED.match(head))


def read_tar(file: Path) -> Rows:
    """One shard; the names of its classes may lie beside it or one folder up."""
    return Rows(read_shard(Shard(file, None, _class_list(file.parent))))


def read_tar_folder(folder: Path) -> Rows:
    """Shards, here or in one folder per split: webdataset's, img2dataset's, and the layout of CLIP_benchmark."""
    return Rows([row for shard in folder_shards(folder) for row in read_shard(shard)])


@dataclass(frozen=True)
class Shard:
    """One tar of a set, and what is known of all pictures in it."""

    tar: Path
    split: str | None
    classes: Sequence[str]  # names by number


def list_shards(source: Path) -> list[Shard]:
    """The tars that a file, a pattern in braces or a folder stands for. Raises DataError, OSError; nothing is read."""
    if source.is_dir():
        return folder_shards(source)
    tars = _expanded(source) if is_pattern(source) else [source]
    return [Shard(tar, None, _class_list(tar.parent)) for tar in tars]


def folder_shards(folder: Path) -> list[Shard]:
    """The tars in a folder and in those directly in it, whose names are splits then. Raises DataError, OSError."""
    classes = _class_list(folder)
    found = []
    for place, tars in _shards(folder):
        count = place / "nshards.txt"
        if count.is_file() and (promised := decode(count, count.read_bytes()).strip()) != str(len(tars)):
            raise DataError(f"{place} holds {len(tars)} .tar files, but its nshards.txt says {one_line(promised)}")
        split = None if place == folder else SPLIT_FOLDERS.get(place.name, place.name)
        found += [Shard(tar, split, classes) for tar in tars]
    return found


def is_pattern(source: Path) -> bool:
    """Whether a name that is nobody's stands for several, as ``shards-{000..009}.tar`` does in webdataset."""
    return _BRACES.search(str(source)) is not None and not source.exists()


def read_tar_pattern(source: Path) -> Rows:
    """All shards that a pattern stands for."""
    shards = _expanded(source)
    other = [shard for shard in shards if not _begins_as_tar(shard)]
    if other:
        raise DataError(f"{source} stands for {some(other)}, no .tar: only those are read in braces")
    return Rows([row for shard in shards for row in read_tar(shard).rows])


def _expanded(source: Path) -> list[Path]:
    shards = [Path(name) for name in expand_braces(str(source))]
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        counted = f"{len(missing)} of the {len(shards)} files that {source} stands for"
        raise DataError(f"{counted} are missing: {some(missing)}")
    return shards


def _begins_as_tar(file: Path) -> bool:
    with file.open("rb") as stream:
        return is_tar(file, stream.read(HEAD))


def expand_braces(name: str) -> list[str]:
    """The names that a shell makes of ``{000..009}`` and ``{train,val}``: every choice, the last changing fastest.

    Raises:
        DataError: braces with neither a range nor a list in them, or a pattern of very many names.
    """
    parts = _BRACES.split(name)  # what is between braces, and what is in them, in turn
    names = [""]
    for number, part in enumerate(parts):
        choices = _choices(name, part) if number % 2 else [part]
        if len(names) * len(choices) > _MOST_SHARDS:
            raise DataError(f"{name} stands for more than {_MOST_SHARDS:,} files")
        names = [begun + choice for begun in names for choice in choices]
    return names


def _choices(name: str, inside: str) -> list[str]:
    bounds = _RANGE.fullmatch(inside)
    if bounds is None:
        if "," not in inside:
            raise DataError(f"{name}: between braces stands a range as {{000..009}}, or a list as {{train,val}}")
        return inside.split(",")
    first, last = bounds.groups()
    padded = any(len(bound) > 1 and bound.startswith("0") for bound in (first, last))
    width = max(len(first), len(last)) if padded else 0
    low, high = int(first), int(last)
    if abs(high - low) >= _MOST_SHARDS:
        raise DataError(f"{name} stands for more than {_MOST_SHARDS:,} files")
    numbers = range(low, high + 1) if low <= high else range(low, high - 1, -1)
    return [str(value).zfill(width) for value in numbers]


def holds_tars(folder: Path) -> bool:
    """Whether there are tars in a folder, or in those directly in it."""
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
            return decode(file, file.read_bytes()).splitlines()
    return []


def read_shard(shard: Shard, faults: dict[str, str] | None = None) -> list[Row]:
    """The samples of one shard: members whose names agree up to the first dot of the base name, as in webdataset.

    With ``faults``, what is wrong with a sample is put there under its key, and the others are read all the same.

    Raises:
        DataError: the tar cannot be read; or, without ``faults``, a sample has no picture, or notes that are wrong.
        OSError: it cannot be opened.
    """
    tar = shard.tar
    rows, lost = [], []
    with tar.open("rb") as stream:
        for key, fields in _samples(tar, stream).items():
            try:
                row = _sample_row(shard, stream, key, fields)
            except DataError as error:
                if faults is None:
                    raise
                faults[key] = str(error)
                continue
            if row is not None:
                rows.append(row)
            elif faults is None:
                lost.append(key)
            else:
                faults[key] = "a sample without a picture"
    if lost:
        raise DataError(f"{len(lost)} of the {len(lost) + len(rows)} samples of {tar} have no picture: {some(lost)}")
    return rows


def _sample_row(shard: Shard, stream: IO[bytes], key: str, fields: Mapping[str, TarMember]) -> Row | None:
    """One sample; None if it has no picture."""
    where = f"{shard.tar}, sample {one_line(key)}"
    image = _member(where, fields, _PICTURE_KINDS)
    if image is None:
        return None
    notes = {}
    for kind in NOTE_KINDS:
        member = _member(where, fields, {kind})
        if member is not None:
            stream.seek(member.offset)
            notes[kind] = stream.read(member.size)
    return noted_row(where, image, shard.split, notes, shard.classes)


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
                member = TarMember(tar, base, info.offset_data, info.size, f"{folder}/{base}" if folder else base)
                samples.setdefault(f"{folder}/{stem}" if folder else stem, {})[kind.lower()] = member
            stream.seek(archive.offset)
            end = stream.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        stream.seek(0)
        if COMPRESSED.match(stream.read(HEAD)):
            raise DataError(f"{tar} {UNPACK}") from error
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
