"""Walk a folder of pictures: which files are there, how large, changed when. Nothing is opened."""

from __future__ import annotations

import errno
import os
import stat
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from indexes.segments import ESCAPE
from retrieval.errors import UsageError
from retrieval.images import IMAGE_SUFFIXES, os_reason

# What disk stations (Synology) and archives made on a Mac leave beside the pictures, under the same suffixes.
_CLUTTER = {"@eaDir", "__MACOSX"}
_SUFFIXES = tuple(IMAGE_SUFFIXES)


@dataclass(frozen=True)
class ScannedFile:
    """A picture by its name; whether it can be read is not known yet."""

    path: str  # relative to the root, "/" between its parts; bytes that are not UTF-8 as surrogate escapes
    size: int  # bytes
    mtime_ns: int


@dataclass(frozen=True)
class ScannedFiles:
    """Pictures as columns, one entry a file, in no particular order."""

    paths: pa.LargeBinaryArray  # as `indexes.segments.exact_names`: ScannedFile.path as bytes
    sizes: NDArray[np.int64]
    mtimes_ns: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.sizes)

    def take(self, which: NDArray[np.int64]) -> list[ScannedFile]:
        """Some of them as objects, in the order in which `scan` comes to them."""
        paths = [path.decode("utf-8", ESCAPE) for path in self.paths.take(pa.array(which)).to_pylist()]
        files = map(ScannedFile, paths, self.sizes[which].tolist(), self.mtimes_ns[which].tolist())
        return sorted(files, key=lambda file: file.path.split("/"))


@dataclass(frozen=True)
class _Folder:
    path: str  # as ScannedFile.path; "" is the root
    real: str  # absolute, links resolved
    linked: bool = False  # reached through a link, its own or one above


def scan(root: Path, below: str = "", on_error: Callable[[str, str], None] | None = None) -> Iterator[ScannedFile]:
    """Yield the pictures of a folder: depth first, each folder's entries in the order of their names.

    A picture is a regular file with one of `IMAGE_SUFFIXES`, upper or lower case. Names that begin with a dot, `@eaDir`
    and `__MACOSX` are left out with all that lies in them. `below`, a folder's path relative to the root, restricts the
    walk to that folder; the paths stay relative to the root. If it is not there, nothing is yielded.

    Links to files and folders are followed, yet a walk always ends, and a picture keeps its real path: a link to what
    the walk meets anyway is left out, and so is a link to a folder that holds the root. Of several links to one folder
    elsewhere, the first on the way is followed (with `below` it may be another). A file elsewhere, or in a place that
    is left out, is found under every link to it.

    What the system refuses to list or to look at goes to `on_error(path, reason)`, and the walk goes on: what lies
    there is unknown, not gone. Without `on_error` that is a UsageError; so is a root that cannot be listed, always.
    Links that lead nowhere and files that vanish meanwhile are left out.
    """
    walk = _Walk(root, on_error)
    start = walk.enter(below)
    waiting: list[ScannedFile | _Folder] = [start] if start else []  # a stack, not recursion: trees may be deep
    while waiting:
        item = waiting.pop()
        if isinstance(item, ScannedFile):
            yield item
        elif walk.is_new(item):
            folders, names, sizes, mtimes_ns = walk.look_into(item)
            files = map(ScannedFile, (_join(item, name) for name in names), sizes, mtimes_ns)
            waiting += sorted([*folders, *files], key=lambda child: child.path, reverse=True)


def scan_columns(root: Path, below: str = "", on_error: Callable[[str, str], None] | None = None) -> ScannedFiles:
    """Find what `scan` finds, as columns, and no Python object is kept for a file: about 3 microseconds each."""
    walk = _Walk(root, on_error)
    start = walk.enter(below)
    waiting = [start] if start else []
    paths: list[bytes] = []  # those of a folder in one piece, each ended by a zero, which no name holds
    sizes, mtimes_ns = array("q"), array("q")
    while waiting:
        folder = waiting.pop()
        if not walk.is_new(folder):
            continue
        folders, names, *numbers = walk.look_into(folder)
        waiting += sorted(folders, key=lambda child: child.path, reverse=True)
        if names:
            before = f"{folder.path}/" if folder.path else ""
            paths.append(f"{before}{f'{chr(0)}{before}'.join(names)}\0".encode("utf-8", ESCAPE))
            sizes.extend(numbers[0])
            mtimes_ns.extend(numbers[1])
    return ScannedFiles(_split(b"".join(paths)), np.array(sizes, np.int64), np.array(mtimes_ns, np.int64))


def _split(joined: bytes) -> pa.LargeBinaryArray:
    """Cut at the zero behind each part, without an object for any."""
    given = np.frombuffer(joined, np.uint8)
    ends = np.flatnonzero(given == 0)
    offsets = np.append(0, ends - np.arange(len(ends)))  # once the zeros are out
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(ends), [None, pa.py_buffer(offsets), pa.py_buffer(given[given != 0].tobytes())]
    )


class _Walk:
    def __init__(self, root: Path, on_error: Callable[[str, str], None] | None) -> None:
        self.root, self.on_error = root, on_error
        self.real_root = Path(os.path.realpath(root))
        self.followed: set[str] = set()  # real paths, and not inode numbers, which some network drives make up

    def enter(self, below: str) -> _Folder | None:
        """Find the folder to begin with; None if a walk from the root would not come there."""
        try:
            os.scandir(self.real_root).close()
        except OSError as error:
            self.refused("", error)
        folder = _Folder("", str(self.real_root))
        for name in below.split("/"):
            if name in ("", "."):
                continue
            place = Path(folder.real, name)
            try:
                inner = self.folder(folder, name, str(place), place.is_symlink()) if place.is_dir() else None
            except OSError as error:
                self.refused(_join(folder, name), error)
                return None
            if inner is None or _left_out(name) or not self.is_new(folder):
                return None
            folder = inner
        return folder

    def is_new(self, folder: _Folder) -> bool:
        """Whether no link has led here before; from now on one has. A folder reached without links is always new."""
        if folder.real in self.followed:
            return False
        if folder.linked:
            self.followed.add(folder.real)
        return True

    def look_into(self, folder: _Folder) -> tuple[list[_Folder], list[str], list[int], list[int]]:
        """The folders to visit in a folder, and its pictures' names, sizes and times; in no particular order."""
        folders: list[_Folder] = []
        names: list[str] = []
        sizes: list[int] = []
        mtimes_ns: list[int] = []
        try:
            with os.scandir(folder.real) as listing:
                entries = list(listing)
        except OSError as error:
            self.refused(folder.path, error)
            entries = []
        for entry in entries:  # some microseconds for each file, most of them in stat(): no function calls in between
            name = entry.name
            if name.startswith(".") or name in _CLUTTER:
                continue
            try:
                if entry.is_dir():
                    inner = self.folder(folder, name, entry.path, entry.is_symlink())
                    if inner:
                        folders.append(inner)
                elif name.lower().endswith(_SUFFIXES):
                    info = entry.stat()
                    if stat.S_ISREG(info.st_mode) and not (entry.is_symlink() and self.met_as_file(entry)):
                        names.append(name)
                        sizes.append(info.st_size)
                        mtimes_ns.append(info.st_mtime_ns)
            except OSError as error:
                self.refused(_join(folder, name), error)
        return folders, names, sizes, mtimes_ns

    def folder(self, parent: _Folder, name: str, real: str, is_link: bool) -> _Folder | None:
        if is_link:
            real = os.path.realpath(real)
            place = Path(real)
            if self.met_anyway(place) or self.real_root.is_relative_to(place):
                return None
        return _Folder(_join(parent, name), real, parent.linked or is_link)

    def met_as_file(self, link: os.DirEntry[str]) -> bool:
        """Whether the walk comes to what a link to a file leads to without it."""
        real = Path(os.path.realpath(link))
        return _is_picture(real.name) and self.met_anyway(real)

    def met_anyway(self, real: Path) -> bool:
        """Whether the walk comes to a place without following a link: in the root, by no name that is left out."""
        return real.is_relative_to(self.real_root) and not any(map(_left_out, real.relative_to(self.real_root).parts))

    def refused(self, path: str, error: OSError) -> None:
        if not path:
            raise UsageError(f"{self.root}: {_root_reason(error)}") from error
        if isinstance(error, (FileNotFoundError, NotADirectoryError)) or error.errno == errno.ELOOP:
            return  # vanished meanwhile, or a link to nowhere
        if self.on_error is None:
            raise UsageError(f"{self.root / path}: {os_reason(error)}") from error
        self.on_error(path, os_reason(error))


def _join(folder: _Folder, name: str) -> str:
    return f"{folder.path}/{name}" if folder.path else name


def _left_out(name: str) -> bool:
    return name.startswith(".") or name in _CLUTTER


def _is_picture(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES)


def _root_reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such folder"
    return "this is no folder" if isinstance(error, NotADirectoryError) else os_reason(error)
