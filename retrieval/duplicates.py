"""Photos that are there more than once: the same file, the same picture again, another shot of the same scene."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from indexes.duplicates import Pairs, equal_hashes, members, near_pairs, star_groups, stored_block
from retrieval.errors import ImageError, UsageError
from retrieval.images import read_photo
from retrieval.pipeline import map_ahead

if TYPE_CHECKING:
    from retrieval.library import Library

Grade = Literal["same-file", "re-encoded", "similar"]
GRADES: tuple[Grade, ...] = get_args(Grade)  # from the finest to the coarsest
Progress = Callable[[int, int], None]

_SIDE = 32  # pixels of a thumbnail
_FLAT = 2.0  # grey levels: a picture that varies less shows nothing
_SHAPE = 0.02  # by how much the aspect ratio may change
_TWINS = 0.9999  # a cosine that rounding and lossless formats leave
_CHUNK = 4096  # pairs of thumbnails at a time: 32 MB


@dataclass(frozen=True)
class Thresholds:
    """From where on two pictures are duplicates: by the cosine of their vectors, and by what their pixels share.

    Calibrated for the built-in model by ``python -m benchmarks.duplicates``; docs/dedupe.md has what came of it.

    Attributes:
        candidates: cosine from which on pictures are opened and compared by their pixels.
        same_layout: correlation of the same picture again.
        similar: cosine of two shots of one scene, …
        layout: … whose greys correlate at least like this …
        colours: … and whose colours overlap at least like this; …
        either: … or one of the two is at least this.
        same_alone: cosine of the same picture again where the pixels cannot be had and the shapes are equal.
        similar_alone: cosine of two shots of one scene where the pixels cannot be had.

    """

    candidates: float = 0.80
    same_layout: float = 0.965
    similar: float = 0.90
    layout: float = 0.30
    colours: float = 0.70
    either: float = 0.90
    same_alone: float = 0.97
    similar_alone: float = 0.95

    def judge(self, cosines: NDArray[np.float32], pixels: Likeness, shapes: NDArray[np.bool_]) -> NDArray[np.int8]:
        """The grade of each of P pairs of different files: 1 re-encoded, 2 similar, 3 neither.

        Args:
            cosines: (P,) of the vectors.
            pixels: (P,) what the thumbnails share.
            shapes: (P,) whether width : height is the same.
        """
        blind = np.isnan(pixels.layout)
        again = np.where(
            blind,
            (cosines >= self.same_alone) & shapes,
            (cosines >= self.candidates) & (pixels.layout >= self.same_layout),
        )
        scene = (pixels.layout >= self.layout) & (pixels.colours >= self.colours)
        scene |= np.maximum(pixels.layout, pixels.colours) >= self.either
        alike = np.where(blind, cosines >= self.similar_alone, (cosines >= self.similar) & scene)
        return np.select([again, alike], [1, 2], 3).astype(np.int8)


@dataclass(frozen=True)
class Sketches:
    """What is kept of N pictures to compare them: two kilobytes each, of a thumbnail of 32 × 32 pixels.

    Attributes:
        greys: (N, 1024) uint8.
        colours: (N, 512) uint16, a histogram of 8 × 8 × 8 colours.

    """

    greys: NDArray[np.uint8]
    colours: NDArray[np.uint16]

    @classmethod
    def empty(cls, count: int) -> Sketches:
        """Room for so many pictures."""
        return cls(np.zeros((count, _SIDE * _SIDE), np.uint8), np.zeros((count, 512), np.uint16))

    def draw(self, i: int, image: Image.Image) -> None:
        """Take in a picture, RGB: both sides squashed, each pixel the mean of an area."""
        small = image.resize((_SIDE, _SIDE), Image.Resampling.BOX)
        self.greys[i] = np.asarray(small.convert("L")).ravel()
        red, green, blue = np.moveaxis(np.asarray(small).astype(np.int64) // 32, 2, 0)
        self.colours[i] = np.bincount((64 * red + 8 * green + blue).ravel(), minlength=512)

    def compare(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> Likeness:
        """What pairs of pictures share."""
        out = Likeness(np.empty(len(first), np.float32), np.empty(len(first), np.float32))
        for start in range(0, len(first), _CHUNK):
            part = slice(start, start + _CHUNK)
            out.layout[part] = _correlation(self.greys[first[part]], self.greys[second[part]])
            out.colours[part] = np.minimum(self.colours[first[part]], self.colours[second[part]]).sum(axis=1)
        out.colours[:] /= _SIDE * _SIDE
        return out


@dataclass(frozen=True)
class Likeness:
    """What the pixels of P pairs of pictures share; NaN where one of them cannot be read.

    Attributes:
        layout: (P,) float32, correlation of the greys: -1 to 1, blind to brightness and contrast. A picture without
            contrast correlates with nothing, and is like another such one.
        colours: (P,) float32, share of pixels whose colours the other has as well: histogram intersection (Swain and
            Ballard, IJCV 1991).

    """

    layout: NDArray[np.float32]
    colours: NDArray[np.float32]


@dataclass(frozen=True)
class Copy:
    """One member of a group."""

    path: str
    file: Path
    width: int | None
    height: int | None
    size: int  # bytes


@dataclass(frozen=True)
class DuplicateGroup:
    """Pictures that are duplicates of each other, the largest first: by pixels, then by bytes, then by path."""

    grade: Grade
    copies: tuple[Copy, ...]


@dataclass(frozen=True)
class Duplicates:
    """What was found: groups, finer grades first, then by the path of their first picture.

    Attributes:
        groups: of two pictures or more; no picture is in two of them.
        compared: how many pictures were compared.
        stale: how many were left out, since their files are gone or have changed since they were indexed.

    """

    groups: tuple[DuplicateGroup, ...]
    compared: int
    stale: int


def find_duplicates(
    library: Library,
    grade: Grade | None = None,
    *,
    below: str = "",
    thresholds: Thresholds | None = None,
    progress: Progress | None = None,
) -> Duplicates:
    """Group what is there more than once; see :meth:`retrieval.library.Library.duplicates`."""
    if grade is not None and grade not in GRADES:
        raise UsageError(f"there is no grade {grade!r}: {', '.join(GRADES)}")
    snapshot = library.store.snapshot
    pictures = np.flatnonzero(pc.equal(snapshot.rows["kind"], "image").to_numpy(zero_copy_only=False))
    if below:
        prefix = below + "/"
        pictures = pictures[[snapshot.paths[row].startswith(prefix) for row in pictures]]
    present = _present(library, pictures)
    files_here = bool(present.any())  # an imported index may have none at all
    rows = pictures[present] if files_here else pictures
    table = snapshot.rows.take(pa.array(rows))
    paths = [snapshot.paths[row] for row in rows]

    labels = {GRADES[0]: equal_hashes(table["hash"])}
    if grade != GRADES[0]:
        ask = thresholds or Thresholds()
        unique = np.flatnonzero(labels[GRADES[0]] == np.arange(len(rows)))
        lowest = ask.candidates if files_here else min(ask.similar_alone, ask.same_alone)
        pairs = near_pairs(stored_block(snapshot), rows[unique], lowest, progress=progress)
        pairs = Pairs(np.searchsorted(rows, pairs.first), np.searchsorted(rows, pairs.second), pairs.scores)
        pixels = _compared([library.root / path for path in paths] if files_here else [], pairs, progress)
        judged = ask.judge(pairs.scores, pixels, _same_shape(table, pairs))
        for place, name in enumerate(GRADES[1:], 1):
            labels[name] = _joined(labels[GRADES[place - 1]], pairs.take(judged <= place))
    return Duplicates(tuple(_groups(library, labels, grade, paths, table)), len(rows), len(pictures) - len(rows))


def _present(library: Library, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the file of each row is there, as it was when it was indexed."""
    table = library.store.rows().select(["size", "mtime_ns"]).take(pa.array(rows))
    expected = zip(table["size"].to_pylist(), table["mtime_ns"].to_pylist(), strict=True)
    root, paths = os.fspath(library.root), library.store.paths()

    def as_indexed(path: str, was: tuple[int, int]) -> bool:
        try:
            info = os.stat(f"{root}/{path}")  # noqa: PTH116 - a million of them: no Path objects
        except (OSError, ValueError):
            return False
        return (info.st_size, info.st_mtime_ns) == was

    return np.fromiter(
        (as_indexed(paths[row], was) for row, was in zip(rows, expected, strict=True)), np.bool_, len(rows)
    )


# ---- the same picture again ------------------------------------------------------------------------------------------


def _compared(files: Sequence[Path], pairs: Pairs, progress: Progress | None) -> Likeness:
    """What each pair shares, by its files."""
    out = Likeness(*(np.full(len(pairs.first), np.nan, np.float32) for _ in range(2)))
    if not files:
        return out
    rows = np.unique([pairs.first, pairs.second])
    sketches, readable = Sketches.empty(len(rows)), np.zeros(len(rows), np.bool_)

    def read(i: int) -> None:
        with suppress(ImageError):  # its vector still says what it is like
            sketches.draw(i, read_photo(files[rows[i]]).image)
            readable[i] = True

    for i, _ in map_ahead(read, range(len(rows))):
        if progress and (i % 16 == 15 or i + 1 == len(rows)):
            progress(i + 1, len(rows))
    first, second = np.searchsorted(rows, pairs.first), np.searchsorted(rows, pairs.second)
    both = readable[first] & readable[second]
    shared = sketches.compare(first[both], second[both])
    out.layout[both], out.colours[both] = shared.layout, shared.colours
    return out


def _same_shape(table: pa.Table, pairs: Pairs) -> NDArray[np.bool_]:
    """Whether width : height is the same; not where it is not known."""
    width, height = (table[name].to_numpy().astype(np.float64) for name in ("width", "height"))
    with np.errstate(divide="ignore", invalid="ignore"):
        shapes = np.log(width / height)
        same: NDArray[np.bool_] = np.abs(shapes[pairs.first] - shapes[pairs.second]) < _SHAPE
    return same


def _correlation(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Of the rows of two tables (P, n), as described at :class:`Likeness`; (P,)."""
    x, y = (rows - rows.mean(axis=1, keepdims=True, dtype=np.float32) for rows in (a, b))
    spreads = [np.maximum(np.sqrt(np.mean(rows * rows, axis=1)), _FLAT) for rows in (x, y)]
    both_flat = (spreads[0] == _FLAT) & (spreads[1] == _FLAT)
    out: NDArray[np.float32] = np.where(both_flat, 1, np.mean(x * y, axis=1) / (spreads[0] * spreads[1]))
    return out


# ---- groups ----------------------------------------------------------------------------------------------------------


def _joined(labels: NDArray[np.int64], pairs: Pairs) -> NDArray[np.int64]:
    """Groups that are linked by pairs; first by those that are all but equal, so that twins are never torn apart."""
    for some in (pairs.take(pairs.scores >= _TWINS), pairs):
        labels = star_groups(labels, some.first, some.second)
    return labels


def _groups(
    library: Library, labels: dict[Grade, NDArray[np.int64]], grade: Grade | None, paths: list[str], table: pa.Table
) -> list[DuplicateGroup]:
    found: list[tuple[int, str, DuplicateGroup]] = []
    for rows in members(labels[grade or GRADES[-1]]):
        together = (name for name in GRADES if (labels[name][rows] == labels[name][rows[0]]).all())
        own = grade if grade is not None else next(together)
        fields = table.select(["width", "height", "size"]).take(pa.array(rows)).to_pylist()
        copies = [
            Copy(path=paths[row], file=library.root / paths[row], **known)
            for row, known in zip(rows, fields, strict=True)
        ]
        copies.sort(key=lambda copy: (-(copy.width or 0) * (copy.height or 0), -copy.size, copy.path))
        found.append((GRADES.index(own), copies[0].path, DuplicateGroup(own, tuple(copies))))
    return [group for *_, group in sorted(found, key=lambda item: item[:2])]
