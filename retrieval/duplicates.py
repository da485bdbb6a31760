"""Photos that are there more than once: the same file, the same picture again, another shot of the same scene."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
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

_SIDE = 32  # pixels of the thumbnails that are compared
_FLAT = 2.0  # grey levels: a picture that varies less shows nothing
_SHAPE = 0.02  # by how much the aspect ratio may change
_TWINS = 0.9999  # a cosine that rounding and lossless formats leave
_CHUNK = 4096  # pairs of thumbnails at a time: 32 MB


@dataclass(frozen=True)
class Thresholds:
    """From where on two pictures are duplicates, by the cosine of their vectors and the correlation of their pixels.

    Calibrated for the built-in model by ``python -m benchmarks.duplicates``; docs/dedupe.md has what came of it.

    Attributes:
        candidates: cosine from which on pictures are opened and their pixels compared.
        same_pixels: correlation of the same picture again.
        similar: cosine of two shots of one scene …
        layout: … whose pixels correlate at least like this.
        similar_alone: cosine that is enough without a look at the pixels.
        same_alone: the same for the same picture again, where the pixels cannot be had and the shapes are equal.

    """

    candidates: float = 0.80
    same_pixels: float = 0.965
    similar: float = 0.90
    layout: float = 0.40
    similar_alone: float = 0.94
    same_alone: float = 0.97

    def judge(
        self, cosines: NDArray[np.float32], pixels: NDArray[np.float32], shapes: NDArray[np.bool_]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which of P pairs are (re-encoded, similar); every re-encoded one is similar.

        Args:
            cosines: (P,) of the vectors.
            pixels: (P,) correlations of the thumbnails; NaN where there are none.
            shapes: (P,) whether width : height is the same.
        """
        again = np.where(np.isnan(pixels), (cosines >= self.same_alone) & shapes, pixels >= self.same_pixels)
        again &= cosines >= self.candidates
        alike = (cosines >= self.similar_alone) | ((cosines >= self.similar) & (pixels >= self.layout))
        return again, again | alike


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
        ask, first = thresholds or Thresholds(), labels[GRADES[0]]
        unique = np.flatnonzero(first == np.arange(len(rows)))
        lowest = ask.candidates if files_here else min(ask.similar_alone, ask.same_alone)
        pairs = near_pairs(stored_block(snapshot), rows[unique], lowest, progress=progress)
        pairs = Pairs(np.searchsorted(rows, pairs.first), np.searchsorted(rows, pairs.second), pairs.scores)
        pixels = _compared([library.root / path for path in paths] if files_here else [], pairs, progress)
        again, alike = ask.judge(pairs.scores, pixels, _same_shape(table, pairs))
        labels[GRADES[1]] = _joined(first, pairs.take(again))
        labels[GRADES[2]] = _joined(labels[GRADES[1]], pairs.take(alike))
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


def _compared(files: Sequence[Path], pairs: Pairs, progress: Progress | None) -> NDArray[np.float32]:
    """The likeness of each pair, by its files; NaN where one of them cannot be read."""
    out = np.full(len(pairs.first), np.nan, np.float32)
    if not files:
        return out
    rows = np.unique([pairs.first, pairs.second])
    small = np.zeros((len(rows), _SIDE * _SIDE), np.uint8)
    readable = np.zeros(len(rows), np.bool_)

    def read(row: int) -> NDArray[np.uint8] | None:
        try:
            return thumbnail(read_photo(files[row]).image)
        except ImageError:  # its vector still says what it is like
            return None

    for i, (_, made) in enumerate(map_ahead(read, rows.tolist())):
        if made is not None:
            small[i], readable[i] = made, True
        if progress and (i % 16 == 15 or i + 1 == len(rows)):
            progress(i + 1, len(rows))
    first, second = np.searchsorted(rows, pairs.first), np.searchsorted(rows, pairs.second)
    both = readable[first] & readable[second]
    out[both] = likeness(small, first[both], second[both])
    return out


def _same_shape(table: pa.Table, pairs: Pairs) -> NDArray[np.bool_]:
    """Whether width : height is the same; not where it is not known."""
    width, height = (table[name].to_numpy().astype(np.float64) for name in ("width", "height"))
    with np.errstate(divide="ignore", invalid="ignore"):
        shapes = np.log(width / height)
        same: NDArray[np.bool_] = np.abs(shapes[pairs.first] - shapes[pairs.second]) < _SHAPE
    return same


def thumbnail(image: Image.Image) -> NDArray[np.uint8]:
    """A picture as 32 × 32 greys, (1024,): both sides squashed, each grey the mean of an area."""
    return np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), np.uint8).ravel()


def likeness(thumbnails: NDArray[np.uint8], first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float32]:
    """How alike two pictures are, for pairs of thumbnails: the correlation of their greys, (P,).

    Blind to brightness and contrast. A picture without contrast correlates with nothing, and is like another such one.
    """
    out = np.empty(len(first), np.float32)
    for start in range(0, len(first), _CHUNK):
        part = slice(start, start + _CHUNK)
        a, b = (thumbnails[side[part]].astype(np.float32) for side in (first, second))
        a -= a.mean(axis=1, keepdims=True)
        b -= b.mean(axis=1, keepdims=True)
        lengths = [np.maximum(np.sqrt(np.mean(x * x, axis=1)), _FLAT) for x in (a, b)]
        both_flat = (lengths[0] == _FLAT) & (lengths[1] == _FLAT)
        out[part] = np.where(both_flat, 1, np.mean(a * b, axis=1) / (lengths[0] * lengths[1]))
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
