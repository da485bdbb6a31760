"""How a decoder learns: one network for pairs and for text alone, on embeddings that are computed once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from indexes.vectors import Vectors
from retrieval.embedding import Progress
from retrieval.errors import DataError
from retrieval.heads.captioning.network import CaptionNet, NetworkSettings
from retrieval.heads.captioning.recipe import CaptionRecipe, Captions, order
from retrieval.heads.captioning.words import END, Words
from retrieval.training.averaging import WeightAverage
from retrieval.training.fit import FitConfig, adamw, fit, plain_groups
from retrieval.training.run import load_optimizer, optimizer_tensors, read_state, write_state

_NO_PIECE = -100  # what cross entropy leaves out
_SCORED = 256  # captions at a time
Note = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Pieces:
    """Captions as pieces: (N, length) padded with :data:`END`, and how many each has (N,)."""

    ids: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @classmethod
    def of(cls, words: Words, texts: Sequence[str], length: int) -> Pieces:
        """Cut into pieces; what is longer is cut off, and then has no end to be learnt."""
        ids = np.full((len(texts), length), END, np.int64)
        lengths = np.zeros(len(texts), np.int64)
        for row, found in enumerate(words.encode(texts)):
            lengths[row] = len(found)
            ids[row, : min(length, len(found))] = found[:length]
        return cls(ids, lengths)

    def batch(self, rows: NDArray[np.int64], device: str) -> tuple[Tensor, Tensor]:
        """What the network sees of some captions (B, T), and what it should say of it (B, T + 1)."""
        length = self.ids.shape[1]
        longest = min(length, int(self.lengths[rows].max(initial=1)))
        ids = torch.from_numpy(self.ids[rows, :longest])
        ends = torch.from_numpy(self.lengths[rows])[:, None]
        after = torch.cat([ids, torch.full((len(rows), 1), END)], 1)
        place = torch.arange(longest + 1)[None, :]
        unknown = (place > ends) | (place >= length)  # after the end, and what would be too long to be said
        return ids.to(device), after.masked_fill(unknown, _NO_PIECE).to(device)


@dataclass(frozen=True, eq=False)
class Validation:
    """Captions that say which weights are kept, and what is measured on them beside."""

    captions: Captions
    measure: Callable[[CaptionNet], Mapping[str, float]] = field(default=lambda _: {})


@dataclass(frozen=True, eq=False)
class Learnt:
    """What training gives: the weights that were kept, and how it went."""

    network: CaptionNet
    step: int  # after which they were
    log: Sequence[Mapping[str, float]]  # of each validation


def learn(
    recipe: CaptionRecipe,
    captions: Captions,
    words: Words,
    *,
    validation: Validation | None = None,
    checkpoint: Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    note: Note = lambda _: None,
) -> Learnt:
    """Train the network; kept are the averaged weights with the lowest cross entropy on val, or the last.

    The same for the same recipe, captions and device, however often it was ended and gone on with.

    Args:
        recipe: what and how.
        captions: to learn from.
        words: the pieces.
        validation: captions to choose by.
        checkpoint: a file to go on from if it is there, written on the way, and left when all is done.
        device: of the network.
        progress: called with (steps done, steps in all).
        note: told each validation.

    Raises:
        DataError: nothing to learn from, the checkpoint is damaged, or of another recipe, or the loss diverges.
    """
    run = _Run(recipe, captions, words, device)
    if checkpoint is not None and checkpoint.exists():
        run.restore(checkpoint)
    begun, saved = run.step, time.monotonic()
    config = FitConfig(
        run.network,
        run.optimizer,
        len(run.batches),
        warmup=recipe.warmup,
        begun=begun,
        clip=1.0,
        average=run.average,
    )
    rows = None if validation is None else Pieces.of(words, validation.captions.texts, recipe.length)
    for number, loss in fit(run.loss, run.rows(), config):
        run.step = number
        run.seen += loss
        measured = number % recipe.validate_every == 0 or number == len(run.batches)
        if measured:
            run.validate(validation, rows)
            note(", ".join(f"{name} {value:.4g}" for name, value in run.log[-1].items()))
        if checkpoint is not None and (measured or time.monotonic() - saved > recipe.checkpoint_seconds):
            run.save(checkpoint)
            saved = time.monotonic()
        if progress:
            progress(number, len(run.batches))
    run.network.load_state_dict(run.kept)
    return Learnt(run.network.eval().cpu(), run.kept_step, run.log)


class _Run:
    """All that changes while it learns."""

    def __init__(self, recipe: CaptionRecipe, captions: Captions, words: Words, device: str) -> None:
        if not len(captions):
            raise DataError("there are no captions to learn from")
        self.recipe, self.captions, self.device = recipe, captions, device
        self.pieces = Pieces.of(words, captions.texts, recipe.length)
        self.batches = order(recipe, captions, self.pieces.lengths)
        self.vectors = torch.from_numpy(captions.vectors)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.network = CaptionNet(network_settings(recipe, captions.vectors.shape[1], words.size)).to(device)
        self.average = WeightAverage(self.network, recipe.ema)
        self.optimizer = adamw(plain_groups(self.network, recipe.learning_rate, recipe.weight_decay))
        self.step, self.seen = 0, 0.0
        self.best, self.kept_step = math.inf, 0
        self.kept: dict[str, Tensor] = {}
        self.log: list[dict[str, float]] = []

    def rows(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """What is left of the batches, each with its number."""
        yield from enumerate(self.batches[self.step :], self.step)

    def loss(self, batch: tuple[int, NDArray[np.int64]]) -> Tensor:
        """Cross entropy of a batch behind noisy vectors (CapDec: Nukrai et al. 2022, arXiv:2211.00575)."""
        number, rows = batch
        recipe = self.recipe
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed * 1_000_003 + number)  # of its own: a run that goes on draws the same
            vectors = self.vectors[self.captions.vector_of[rows]]
            if recipe.noise:
                vectors = noisy(vectors, recipe.noise)
            ids, after = self.pieces.batch(rows, self.device)
            scores = self.network.begin(vectors.to(self.device), ids)
            return cross_entropy(scores, after, recipe.label_smoothing)

    def validate(self, validation: Validation | None, rows: Pieces | None) -> None:
        """Measure the averaged weights, and keep them if none were better."""
        since = self.log[-1]["step"] if self.log else 0
        line = {"step": float(self.step), "loss": self.seen / (self.step - since)}
        self.seen = 0.0
        self.network.eval()
        with torch.inference_mode(), self.average.applied(self.network):
            value = -float(self.step)  # without any to choose by, the last are the best
            if validation is not None and rows is not None:
                value = line["val_loss"] = mean_loss(self.network, validation.captions, rows, self.device)
                line |= validation.measure(self.network)
            if value < self.best:
                self.best, self.kept_step = value, self.step
                self.kept = {name: weight.detach().clone() for name, weight in self.network.state_dict().items()}
        self.log.append(line)

    def save(self, file: Path) -> None:
        """Write all of it. DataError when the disk is full."""
        best = None if math.isinf(self.best) else self.best
        state: dict[str, Any] = {
            "recipe": self.recipe.digest(),
            "step": self.step,
            "seen": self.seen,
            "best": best,
            "kept_step": self.kept_step,
            "log": self.log,
        }
        groups = {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "kept": self.kept,
        }
        tensors = {f"{group}/{name}": value for group, named in groups.items() for name, value in named.items()}
        try:
            write_state(file, state, {**tensors, **optimizer_tensors(self.optimizer)})
        except OSError as error:
            raise DataError(f"{file} cannot be written: {error.strerror or error}") from error

    def restore(self, file: Path) -> None:
        """Be as when it was written. DataError when it is damaged, or of another recipe."""
        state, tensors = read_state(file)

        def named(group: str) -> dict[str, Tensor]:
            return {
                key.removeprefix(f"{group}/"): value for key, value in tensors.items() if key.startswith(f"{group}/")
            }

        if state.get("recipe") != self.recipe.digest():
            raise DataError(f"{file} is of another recipe: name another --checkpoint, or delete it to begin anew")
        try:
            self.network.load_state_dict(named("network"))
            self.average.load_state_dict(named("average"))
            load_optimizer(self.optimizer, tensors)
            self.kept = {name: value.to(self.device) for name, value in named("kept").items()}
            self.step, self.seen, self.kept_step = int(state["step"]), float(state["seen"]), int(state["kept_step"])
            self.best = math.inf if state["best"] is None else float(state["best"])
            self.log = list(state["log"])
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            raise DataError(f"{file} does not fit the recipe and its data: delete it to begin anew") from error


def network_settings(recipe: CaptionRecipe, dim: int, pieces: int) -> NetworkSettings:
    """The network of a recipe."""
    return NetworkSettings(
        dim, pieces, recipe.width, recipe.layers, recipe.heads, recipe.prefix, recipe.length, recipe.dropout
    )


def noisy(vectors: Tensor, length: float) -> Tensor:
    """Unit rows (B, D) with Gaussian noise of that expected length added, as unit rows again.

    The cosine between a row and what it becomes is about 1 / sqrt(1 + length²).
    """
    return F.normalize(vectors + torch.randn_like(vectors) * (length / vectors.shape[1] ** 0.5), dim=1)


def cross_entropy(scores: Tensor, after: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean over the pieces that are known: (B, T + 1, pieces) and (B, T + 1) -> a scalar."""
    return F.cross_entropy(scores.flatten(0, 1), after.flatten(), ignore_index=_NO_PIECE, label_smoothing=smoothing)


def mean_loss(network: CaptionNet, captions: Captions, pieces: Pieces, device: str) -> float:
    """Cross entropy a piece (nats) over captions, without noise or smoothing."""
    total, known = 0.0, 0
    for begin in range(0, len(captions), _SCORED):
        rows = np.arange(begin, min(begin + _SCORED, len(captions)))
        ids, after = pieces.batch(rows, device)
        vectors = torch.from_numpy(captions.vectors[captions.vector_of[rows]]).to(device)
        count = int((after != _NO_PIECE).sum())
        total += float(cross_entropy(network.begin(vectors, ids), after)) * count
        known += count
    return total / max(1, known)


def first_captions(vectors: Vectors, texts: Sequence[Sequence[str]]) -> Captions:
    """The first caption of each picture, for validation: (N, D) and the captions of each."""
    rows = [row for row, own in enumerate(texts) if any(map(str.strip, own))]
    chosen = [next(text for text in texts[row] if text.strip()) for row in rows]
    return Captions(vectors, np.array(rows, np.int64), chosen, np.zeros(len(rows), np.int64))
