"""What a decoder learns from, and how: a recipe in TOML, and the captions that it names in the order they are seen."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from indexes.vectors import Vectors
from retrieval.embedding import EmbeddingCache, Progress, cache_name, encode_pictures, encode_sentences
from retrieval.encoders import Encoder
from retrieval.errors import DataError
from retrieval.pairs import Picture, read_pairs, read_sentences
from retrieval.training.config import listed, read_settings, read_toml

Row = TypeVar("Row")
_POOL = 32  # batches among which captions are sorted by length: a third of the places would be padding otherwise
_NOT_LEARNT = ("name", "licence", "beams", "length_penalty", "checkpoint_seconds")


@dataclass(frozen=True)
class CaptionSource:
    """Captions to learn from."""

    path: str  # whatever `read_pairs` reads, or of captions alone `read_sentences`; relative to the data folder
    learn_from: str = "image"  # the vector that stands before a caption: its image's, or its own (text)
    split: str | None = None
    repeat: float = 1.0  # passes over it; 0.5: over half of it, drawn at random, and of the rest nothing is encoded
    until: float = 1.0  # share of the run after which it is seen no more: what comes last sets the style

    def __post_init__(self) -> None:
        if self.learn_from not in ("image", "text"):
            raise DataError(f"learn_from must be image or text, not {self.learn_from!r}")
        if not 0 < self.repeat < math.inf or not 0 < self.until <= 1:
            raise DataError("repeat must be above 0, and until above 0 and at most 1")


@dataclass(frozen=True)
class CaptionRecipe:
    """How a decoder is made; the reason stands beside each default."""

    sources: tuple[CaptionSource, ...]
    validation: str = ""  # pairs, whose val split says which weights are kept; empty: the last ones
    name: str = "diptych-captions"
    kind: str = "transformer"  # or consensus, which learns nothing: it keeps the captions
    licence: str = ""  # for the decoder's card
    width: int = 256
    layers: int = 4
    heads: int = 8
    prefix: int = 4
    length: int = 24  # pieces a caption has at most; longer ones are cut off
    pieces: int = 4000  # of words; all that 70,000 captions have more than a few times
    dropout: float = 0.1
    noise: float = 0.3  # length of what is added to a unit vector before it is made one again
    label_smoothing: float = 0.1
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 200  # steps
    ema: float = 0.998  # of the weights, which are what is validated and kept
    validate_every: int = 500  # steps
    checkpoint_seconds: float = 60  # what a kill may cost
    neighbours: int = 40  # of consensus: captions that are compared with each other
    beams: int = 3  # of transformers, as they are used
    length_penalty: float = 1.0  # power of the length by which a caption's log-probability is divided
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sources:
            raise DataError("there is nothing to learn from: name captions in at least one [[sources]]")
        if self.kind not in ("transformer", "consensus"):
            raise DataError(f"kind must be transformer or consensus, not {self.kind!r}")
        if min(self.batch, self.validate_every, self.neighbours, self.beams, self.pieces) < 1:
            raise DataError("batch, validate_every, neighbours, beams and pieces must be at least 1")
        if not (0 <= self.noise < math.inf and 0 <= self.label_smoothing < 1 and 0 <= self.dropout < 1):
            raise DataError("noise must be a number from 0 on, label_smoothing and dropout from 0 to below 1")
        if not (0 <= self.learning_rate < math.inf and 0 <= self.ema < 1):
            raise DataError("learning_rate must be a number from 0 on, and ema from 0 to below 1")

    def to_json(self) -> dict[str, Any]:
        """As a mapping."""
        return asdict(self)

    def digest(self) -> str:
        """Tells what is learnt by this recipe from what is by another, in a checkpoint."""
        learnt = {name: value for name, value in self.to_json().items() if name not in _NOT_LEARNT}
        return hashlib.sha256(json.dumps(learnt, sort_keys=True).encode()).hexdigest()


def load_recipe(file: Path) -> CaptionRecipe:
    """Read a recipe. DataError names an unknown or a missing setting."""
    tables = read_toml(file)
    sources = tuple(read_settings(file, CaptionSource, table) for table in listed(tables.pop("sources", [])))
    return read_settings(file, CaptionRecipe, tables, {"sources": sources})


@dataclass(frozen=True, eq=False)
class Captions:
    """N captions, each with the number of the vector that stands before it."""

    vectors: Vectors  # (V, D) unit rows
    vector_of: NDArray[np.int64]  # (N,)
    texts: Sequence[str]
    source_of: NDArray[np.int64]  # (N,) its number in the recipe

    def __len__(self) -> int:
        return len(self.texts)


def read_captions(
    recipe: CaptionRecipe, data: Path, encoder: Encoder, progress: Progress | None = None, cached: bool = True
) -> Captions:
    """Read all sources, and encode what has not been encoded yet; blank captions are left out.

    Raises:
        DataError: a source cannot be read, pictures are missing, or there is no caption.
    """
    cache = EmbeddingCache(cache_name(encoder), encoder.dim) if cached else None
    tables: list[Vectors] = []
    texts: list[str] = []
    vector_of: list[int] = []
    source_of: list[int] = []
    start = 0
    for number, source in enumerate(recipe.sources):
        if source.learn_from == "image":
            records = [one for one in read_pairs(data / source.path, source.split) if any(map(str.strip, one.texts))]
            records = _drawn(records, source, recipe.seed)
            pictures: list[Picture] = [record.image for record in records]
            tables.append(encode_pictures(encoder, pictures, cache=cache, progress=progress))
            found = [(row, text) for row, record in enumerate(records) for text in record.texts if text.strip()]
        else:
            sentences = [s for s in read_sentences(data / source.path) if source.split in (None, s.split)]
            found = list(enumerate(sentence.text for sentence in _drawn(sentences, source, recipe.seed)))
            tables.append(encode_sentences(encoder, [text for _, text in found], cache=cache))
        if not found:
            raise DataError(f"{data / source.path} has no captions to learn from")
        texts += [text for _, text in found]
        vector_of += [start + row for row, _ in found]
        source_of += [number] * len(found)
        start += len(tables[-1])
    return Captions(np.concatenate(tables), np.array(vector_of, np.int64), texts, np.array(source_of, np.int64))


def _drawn(rows: list[Row], source: CaptionSource, seed: int) -> list[Row]:
    """All rows, or of a source with less than one pass as many as that is, in their order."""
    if source.repeat >= 1:
        return rows
    kept = np.random.default_rng(seed).permutation(len(rows))[: math.ceil(source.repeat * len(rows))]
    return [rows[i] for i in np.sort(kept).tolist()]


def order(recipe: CaptionRecipe, captions: Captions, lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Batches of caption numbers for the whole run: each source's passes spread evenly over its share of the run.

    Captions of like length stand in one batch, those of a pool of some batches being sorted by it.
    """
    random = np.random.default_rng(recipe.seed)
    numbers, moments = [], []
    for number, source in enumerate(recipe.sources):
        own = np.flatnonzero(captions.source_of == number)
        passes = max(1.0, source.repeat)  # of fewer than one, what is left out is not among the captions
        for turn in range(math.ceil(passes)):
            moment = turn + random.random(len(own))
            numbers.append(own[moment < passes])
            moments.append(moment[moment < passes] / passes * source.until)
    whole = np.concatenate(numbers)[np.argsort(np.concatenate(moments), kind="stable")]
    batches = []
    for begin in range(0, len(whole), recipe.batch * _POOL):
        pool = whole[begin : begin + recipe.batch * _POOL]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        parts = [pool[i : i + recipe.batch] for i in range(0, len(pool), recipe.batch)]
        batches += [parts[i] for i in random.permutation(len(parts))]
    return batches
