"""The pictures of a training set as rows of bytes: in memory, or decoded whenever a batch asks for them.

Both give the same rows, so that a run ends with the same weights whichever its memory allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from indexes.runtime import thread_count
from retrieval.embedding import Progress, picture_bytes, try_all
from retrieval.errors import DataError, ImageError
from retrieval.pairs import Picture

Prepare: TypeAlias = Callable[[Picture, bytes], NDArray[np.uint8]]  # to (H, W, 3)


@dataclass(frozen=True, eq=False)
class Streamed:
    """N pictures that stay where they are: rows that are decoded as they are asked for, by threads."""

    pictures: Sequence[Picture]
    prepare: Prepare
    device: torch.device
    part: int  # rows decoded at a time where all of them are asked for

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, rows: NDArray[np.int64]) -> Tensor:
        """(B, H, W, 3) uint8, on the device. DataError if one cannot be read any more."""
        with decoders() as pool:
            return self.begin(rows, pool)()

    def begin(
        self, rows: NDArray[np.int64], pool: ThreadPoolExecutor, wanted: range | None = None
    ) -> Callable[[], Tensor]:
        """Have these rows decoded; what is returned waits for them.

        ``wanted``: places among them; the others, which nobody will look at, are zeros.
        """
        if wanted is None or len(wanted) == len(rows):
            decoded = pool.map(self._decode, rows.tolist())
            return lambda: self._stack(decoded)
        some = wanted or range(1)  # one in any case, for its shape
        decoded = pool.map(self._decode, rows[some.start : some.stop].tolist())

        def placed() -> Tensor:
            found = self._stack(decoded)
            whole = found.new_zeros((len(rows), *found.shape[1:]))
            whole[some.start : some.stop] = found
            return whole

        return placed

    def parts(self) -> Iterator[Tensor]:
        """All rows in order, ``part`` of them at a time, the next of them decoded meanwhile."""
        starts = range(0, len(self), self.part)
        with decoders() as pool:
            waiting = [self.begin(self._part(start), pool) for start in starts[:1]]
            for start in starts:
                waiting += [self.begin(self._part(start + self.part), pool)] if start != starts[-1] else []
                yield waiting.pop(0)()

    def _part(self, start: int) -> NDArray[np.int64]:
        return np.arange(start, min(start + self.part, len(self)))

    def _decode(self, row: int) -> NDArray[np.uint8]:
        picture = self.pictures[row]
        try:
            return self.prepare(picture, picture_bytes(picture))
        except ImageError as error:
            raise DataError(f"{picture} could be read when the run began, and not any more: {error}") from error

    def _stack(self, rows: Iterable[NDArray[np.uint8]]) -> Tensor:
        return torch.from_numpy(np.stack([*rows])).to(self.device)


PictureRows: TypeAlias = Tensor | Streamed


@contextmanager
def decoders() -> Iterator[ThreadPoolExecutor]:
    """Threads for decoding; what has not begun when the block is left is dropped."""
    pool = ThreadPoolExecutor(thread_count(), thread_name_prefix="decode")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def begin(
    pictures: PictureRows, rows: NDArray[np.int64], pool: ThreadPoolExecutor, wanted: range | None = None
) -> Callable[[], Tensor]:
    """Have these rows decoded if they have to be, or at least those wanted; what is returned gives them."""
    return pictures.begin(rows, pool, wanted) if isinstance(pictures, Streamed) else lambda: pictures[rows]


def parts(pictures: PictureRows) -> Iterator[Tensor]:
    """All rows, in portions that fit into memory."""
    if isinstance(pictures, Streamed):
        yield from pictures.parts()
    else:
        yield pictures


def read_rows(
    pictures: Sequence[Picture],
    prepare: Prepare,
    size: tuple[int, int],
    *,
    held: bool,
    device: torch.device,
    part: int,
    progress: Progress | None = None,
) -> tuple[PictureRows, dict[int, str]]:
    """The rows of the pictures that can be read; and of each of the others, by its place, which it is and why.

    Every picture is decoded once here, also where none is held: what is wrong is said before a run begins and not
    hours into it, and who meets whom in a batch does not depend on what fits into memory.
    """
    rows = torch.empty((len(pictures) if held else 0, *size, 3), dtype=torch.uint8)
    good: list[Picture] = []
    unreadable: dict[int, str] = {}
    for number, (picture, result) in enumerate(try_all(prepare, pictures)):
        if isinstance(result, ImageError):
            unreadable[number] = f"{picture}: {result}"
        else:
            if held:
                rows[len(good)] = torch.from_numpy(result)
            good.append(picture)
        if progress and (number + 1) % 64 == 0:
            progress(number + 1, len(pictures))
    if held:
        return rows[: len(good)].to(device), unreadable
    return Streamed(good, prepare, device, part), unreadable
