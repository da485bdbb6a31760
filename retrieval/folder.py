"""Walk a folder of pictures: which files are there, how large, changed when. Nothing is opened."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

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
class _Folder:
    path: str  # as ScannedFile.path; "" is the root
    real: Path  # absolute, links resolved
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
            waiting.extend(reversed(walk.children(item)))


class _Walk:
    def __init__(self, root: Path, on_error: Callable[[str, str], None] | None) -> None:
        self.root, self.on_error = root, on_error
        self.real_root = Path(os.path.realpath(root))
        self.followed: set[Path] = set()  # real paths, and not inode numbers, which some network drives make up

    def enter(self, below: str) -> _Folder | None:
        """Find the folder to begin with; None if a walk from the root would not come there."""
        try:
            os.scandir(self.real_root).close()
        except OSError as error:
            self.refused("", error)
        folder = _Folder("", self.real_root)
        for name in below.split("/"):
            if name in ("", "."):
                continue
            place = folder.real / name
            try:
                inner = self.folder(folder, name, place.is_symlink()) if place.is_dir() else None
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

    def children(self, folder: _Folder) -> list[ScannedFile | _Folder]:
        """List what is to be visited in a folder, sorted by name."""
        try:
            with os.scandir(folder.real) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            self.refused(folder.path, error)
            return []
        children: list[ScannedFile | _Folder] = []
        for entry in entries:
            if _left_out(entry.name):
                continue
            try:
                child = (
                    self.folder(folder, entry.name, entry.is_symlink()) if entry.is_dir() else self.file(folder, entry)
                )
            except OSError as error:
                self.refused(_join(folder, entry.name), error)
                continue
            if child:
                children.append(child)
        return children

    def folder(self, parent: _Folder, name: str, is_link: bool) -> _Folder | None:
        real = parent.real / name
        if is_link:
            real = Path(os.path.realpath(real))
            if self.met_anyway(real) or self.real_root.is_relative_to(real):
                return None
        return _Folder(_join(parent, name), real, parent.linked or is_link)

    def file(self, parent: _Folder, entry: os.DirEntry[str]) -> ScannedFile | None:
        if not _is_picture(entry.name):
            return None
        info = entry.stat()
        if not stat.S_ISREG(info.st_mode):
            return None
        if entry.is_symlink():
            real = Path(os.path.realpath(entry))
            if _is_picture(real.name) and self.met_anyway(real):
                return None
        return ScannedFile(_join(parent, entry.name), info.st_size, info.st_mtime_ns)

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
