"""What generators learn from: the vectors of pictures and of what is said of them, and the pictures themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from indexes.segments import exact_name
from indexes.vectors import Vectors
from retrieval.embedding import EmbeddingCache, Progress, cache_name, encode_pictures, encode_sentences
from retrieval.encoders import Encoder
from retrieval.errors import DataError
from retrieval.heads.modalities import IMAGE, TEXT
from retrieval.heads.splits import RowNumbers, split_rows
from retrieval.library import Library
from retrieval.pairs import Picture, read_pairs
from retrieval.probes import everyday_queries

Note = Callable[[str], None]
_FEWEST = 4  # pictures: fewer cannot be learnt from, chosen by and measured with


@dataclass(frozen=True, eq=False)
class Material:
    """N pictures and M sentences about them, in one shared space.

    Attributes:
        fingerprint: of the encoder.
        encoder: how it is loaded.
        images: (N, D) unit rows.
        texts: (M, D) unit rows; M may be 0.
        owner: (M,) the picture of each sentence.
        everyday: (Q, D) vectors of everyday queries: where sentences lie, if there are none about the pictures.
        pictures: N.
        sentences: M.
        parts: rows of the pictures by split: train, val, test.
    """

    fingerprint: str
    encoder: str
    images: Vectors
    texts: Vectors
    owner: NDArray[np.int64]
    everyday: Vectors
    pictures: Sequence[Picture]
    sentences: Sequence[str]
    parts: Mapping[str, RowNumbers]

    def spoken(self, part: str) -> RowNumbers:
        """The sentences about the pictures of a split."""
        return np.flatnonzero(np.isin(self.owner, self.parts[part]))

    def pairs(self, part: str) -> tuple[Vectors, Vectors]:
        """(P, D) pictures and (P, D) sentences of a split, row by row: a picture stands once for each sentence."""
        rows = self.spoken(part)
        return self.images[self.owner[rows]], self.texts[rows]

    def check_spoken(self, what: str) -> None:
        """Refuse pictures that nothing is said of: DataError."""
        if empty := [part for part in ("train", "val") if not len(self.spoken(part))]:
            raise DataError(
                f"{what} learns from pictures with sentences, and no picture of the split {empty[0]} has one: "
                "give a file of pairs, or an index of one"
            )


def material_of_pairs(
    source: Path,
    encoder: Encoder,
    spec: str,
    *,
    images: Path | None = None,
    cached: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
    note: Note = lambda _: None,
) -> Material:
    """Read whatever :func:`retrieval.pairs.read_pairs` reads; sentences may lack. Vectors come from the one cache.

    Raises:
        DataError: it cannot be read, pictures cannot, or they are too few.
    """
    records = read_pairs(source, images=images)
    cache = EmbeddingCache(cache_name(encoder), encoder.dim) if cached else None
    said = [(row, text) for row, record in enumerate(records) for text in record.texts if text.strip()]
    pictures = [record.image for record in records]
    sentences = [text for _, text in said]
    return Material(
        encoder.fingerprint,
        spec,
        encode_pictures(encoder, pictures, cache=cache, progress=progress),
        encode_sentences(encoder, sentences, cache=cache),
        np.array([row for row, _ in said], np.int64),
        encode_sentences(encoder, everyday_queries(), cache=cache),
        pictures,
        sentences,
        _parts([record.split for record in records], seed, note),
    )


def material_of_store(library: Library, *, seed: int = 0, note: Note = lambda _: None) -> Material:
    """The pictures of an index as they are stored: none is encoded again. Captions are, which is quick.

    A row that is a sentence about one of the pictures counts with its stored vector.

    Raises:
        DataError: too few pictures.
        ModelMismatch: the index's model is not at hand.
    """
    store = library.store
    rows = store.rows().to_pylist()
    spoken = store.texts()
    shown = np.flatnonzero(~spoken)
    source = library.source
    paths = [exact_name(row) for row in rows]
    number = {paths[row]: at for at, row in enumerate(shown.tolist())}
    captions = [
        (at, text)
        for at, row in enumerate(shown.tolist())
        for text in (rows[row].get("captions") or filter(None, [rows[row].get("caption")]))
        if text.strip()
    ]
    about = [row for row in np.flatnonzero(spoken).tolist() if paths[row] in number]
    encoder = library.encoder
    cache = EmbeddingCache(cache_name(encoder), encoder.dim)
    vectors = store.vectors()
    return Material(
        store.model.fingerprint,
        store.model.name,
        vectors[shown],
        np.concatenate([encode_sentences(encoder, [text for _, text in captions], cache=cache), vectors[about]]),
        np.array([*(at for at, _ in captions), *(number[paths[row]] for row in about)], np.int64),
        encode_sentences(encoder, everyday_queries(), cache=cache),
        [source.picture(paths[row], rows[row]) for row in shown.tolist()],
        [*(text for _, text in captions), *(str(rows[row]["caption"]) for row in about)],
        _parts([rows[row].get("split") for row in shown.tolist()], seed, note),
    )


def _parts(splits: Sequence[str | None], seed: int, note: Note) -> dict[str, RowNumbers]:
    if len(splits) < _FEWEST:
        raise DataError(f"{len(splits)} pictures are too few to learn from: at least {_FEWEST}, better thousands")
    return split_rows(splits, [""] * len(splits), seed, note)


# ---- centred ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Centring:
    """Where the vectors of each modality lie: (D,) means, by name.

    Pictures and sentences lie in two cones of the space, apart from each other (Liang et al. 2022, arXiv:2203.02053):
    less their own mean, both speak of content alone.
    """

    means: Mapping[str, NDArray[np.float32]]

    @classmethod
    def of(cls, tables: Mapping[str, Vectors]) -> Centring:
        """The means of the rows to learn from."""
        return cls({name: rows.mean(axis=0, dtype=np.float64).astype(np.float32) for name, rows in tables.items()})

    @classmethod
    def of_material(cls, material: Material) -> Centring:
        """Those of its train part; of everyday queries, where nothing is said of the pictures."""
        spoken = material.texts[material.spoken("train")]
        return cls.of(
            {IMAGE: material.images[material.parts["train"]], TEXT: spoken if len(spoken) else material.everyday}
        )

    def apply(self, vectors: Vectors, modality: str) -> NDArray[np.float32]:
        """(N, D) unit rows -> rows of mean 0, scaled so that their numbers are about 1."""
        out: NDArray[np.float32] = (vectors - self.means[modality]) * np.float32(np.sqrt(vectors.shape[1]))
        return out

    def undo(self, rows: NDArray[np.float32], modality: str) -> NDArray[np.float32]:
        """What :meth:`apply` was given; of rows that a network made, not of length 1."""
        out: NDArray[np.float32] = rows / np.float32(np.sqrt(rows.shape[1])) + self.means[modality]
        return out
