"""Where the rows of an index come from: a folder of pictures, or what `retrieval.sources` reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from retrieval.folder import ScannedFile
    from retrieval.indexing import Plan
    from retrieval.library import Library
    from retrieval.pairs import Picture

TARS, LIST, TEXTS = "tars", "list", "texts"  # kinds of `indexes.manifest.SourceRef`
OFFSET = "offset"  # column: where in its tar a picture begins, in bytes


class Source(Protocol):
    """Where the rows of an index come from."""

    def plan(self, library: Library, below: str) -> Plan:
        """Set what there is against the store. Raises UsageError, DataError."""

    def read(self, file: Any) -> bytes:
        """The content of something that a plan found: a ScannedFile, or an Item. Raises OSError."""

    def picture(self, path: str, fields: Mapping[str, Any]) -> Picture:
        """The picture of a stored row, by its path and the row's other fields; read when it is wanted."""


@dataclass(frozen=True)
class Folder:
    """The pictures in a folder: the source of an index that names no other."""

    root: Path

    def plan(self, library: Library, below: str) -> Plan:
        """See `retrieval.indexing.make_plan`."""
        from retrieval.indexing import make_plan

        return make_plan(library, below)

    def read(self, file: ScannedFile) -> bytes:
        """The content of a file. Raises OSError."""
        return (self.root / file.path).read_bytes()

    def picture(self, path: str, fields: Mapping[str, Any]) -> Picture:  # noqa: ARG002 - the path says it all
        """The file itself."""
        return self.root / path
