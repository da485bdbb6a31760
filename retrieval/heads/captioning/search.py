"""From scores of the next piece to captions: greedy and beam search, for any model that goes on from a past."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from indexes.vectors import Vectors

Past = NDArray[np.float32]  # (layers, B, …): the rows of a batch are its second axis


class Stepper(Protocol):
    """A model that says what comes next."""

    def begin(self, vectors: Vectors) -> tuple[NDArray[np.float32], Past]:
        """(B, D) unit rows -> scores of each first piece (B, V), and the past."""
        ...

    def go_on(self, pieces: NDArray[np.int64], past: Past) -> tuple[NDArray[np.float32], Past]:
        """The piece that came next in each row (B,), and the past -> as :meth:`begin`."""
        ...


def search(
    stepper: Stepper,
    vectors: Vectors,
    *,
    beams: int,
    length: int,
    end: int,
    banned: Sequence[int] = (),
    penalty: float = 1.0,
) -> list[list[int]]:
    """The likeliest caption that a beam search finds for each vector; with one beam :func:`greedy`.

    A caption's score is its log-probability, that of its end included, divided by its number of pieces, the end
    counted, to the power of ``penalty`` (1: the mean; 0: short ones win). One that has ``length`` pieces ends there,
    and its end costs nothing. Captions that have ended take up no beam, and a picture is done when nothing that is
    still open could become better: what is found is the best of all captions if there are beams for all of them.

    Args:
        stepper: the model.
        vectors: (B, D) unit rows.
        beams: open captions kept for each vector.
        length: pieces at most, the end not counted.
        end: the piece that ends a caption; none begins with it.
        banned: pieces that are never said.
        penalty: see above; 0 at least.

    Returns:
        Pieces of each, without the end; of equal ones the first found.
    """
    if beams == 1:
        return greedy(stepper, vectors, length=length, end=end, banned=banned)
    count = len(vectors)
    said: list[list[int]] = [[] for _ in range(count)]
    best = np.full(count, -np.inf)
    if not count:
        return said
    scores, past = stepper.begin(vectors)
    open_rows = np.arange(count)  # the vectors that are not done
    total = np.zeros((count, 1))  # (B, W) log-probabilities of what is open
    paths = np.zeros((count, 1, 0), np.int64)  # (B, W, pieces so far)
    for step in range(length):
        batch, width = total.shape
        chances = _log_softmax(scores).reshape(batch, width, -1)
        ended = total + chances[:, :, end]
        chances[:, :, [end, *banned]] = -np.inf
        if step:
            _keep(best, said, open_rows, ended / (step + 1) ** penalty, paths)
        whole = (total[:, :, None] + chances).reshape(batch, -1)  # (B, W V)
        kept = min(beams, width * (chances.shape[2] - 1 - len(banned)))
        chosen = _largest(whole, kept)  # (B, K)
        beam, piece = np.divmod(chosen, chances.shape[2])
        total = np.take_along_axis(whole, chosen, 1)
        paths = np.concatenate([np.take_along_axis(paths, beam[:, :, None], 1), piece[:, :, None]], 2)
        if step + 1 == length:
            _keep(best, said, open_rows, total / length**penalty, paths)
            break
        going = total.max(1) / length**penalty > best[open_rows]  # what is open only loses, divided by this at most
        if not going.any():
            break
        rows = (np.arange(batch)[:, None] * width + beam)[going].ravel()
        open_rows, total, paths = open_rows[going], total[going], paths[going]
        scores, past = stepper.go_on(paths[:, :, -1].ravel(), past[:, rows])
    return said


def greedy(stepper: Stepper, vectors: Vectors, *, length: int, end: int, banned: Sequence[int] = ()) -> list[list[int]]:
    """The likeliest piece each time, until that is the end; arguments as of :func:`search`."""
    said: list[list[int]] = [[] for _ in range(len(vectors))]
    if not said:
        return said
    scores, past = stepper.begin(vectors)
    open_rows = np.arange(len(vectors))
    for step in range(length):
        scores = scores.copy()
        scores[:, [*banned, *([] if step else [end])]] = -np.inf
        pieces = scores.argmax(1)
        going = pieces != end
        open_rows, pieces = open_rows[going], pieces[going]
        for row, piece in zip(open_rows.tolist(), pieces.tolist(), strict=True):
            said[row].append(piece)
        if not len(open_rows) or step + 1 == length:
            break
        scores, past = stepper.go_on(pieces, past[:, going])
    return said


def _keep(
    best: NDArray[np.float64],
    said: list[list[int]],
    rows: NDArray[np.int64],
    scores: NDArray[np.float64],
    paths: NDArray[np.int64],
) -> None:
    """Take the best of what has ended (B, W) where it is better than what has ended before."""
    first = scores.argmax(1)
    value = scores[np.arange(len(rows)), first]
    for i in np.flatnonzero(value > best[rows]).tolist():
        best[rows[i]] = value[i]
        said[rows[i]] = paths[i, first[i]].tolist()


def _largest(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Where the largest of each row are, falling; of equal ones the first."""
    chosen = np.argpartition(-values, count - 1, axis=1)[:, :count] if count < values.shape[1] else None
    if chosen is None:
        return np.argsort(-values, axis=1, kind="stable")[:, :count]
    chosen.sort(axis=1)
    order = np.argsort(-np.take_along_axis(values, chosen, 1), axis=1, kind="stable")
    return np.take_along_axis(chosen, order, 1)


def _log_softmax(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = scores.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    out: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return out
