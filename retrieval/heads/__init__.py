"""Heads on the shared space: what classifies, describes or imagines from vectors that are already stored.

Three interfaces, and each head is one implementation of one of them. A head holds the ``fingerprint`` of the model
whose vectors it learnt from, and refuses those of any other: :func:`check_fingerprint`.

Heads are arrays and JSON on disk, never pickles. Those trained by gradients share the loop of
:mod:`retrieval.training.fit`; scikit-learn's models and a GAN's two players have their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from indexes.errors import ModelMismatch
from indexes.vectors import Vectors, as_vectors

Rows = NDArray[np.float32]  # (N, width), rows of NaN where a row has nothing of a modality
Modalities = Mapping[str, Rows]  # by name: image, text, and whatever columns were named; all of one length N


class Classifier(Protocol):
    """Modalities of each row -> what it is. ``fingerprint`` is the model's whose vectors image and text are."""

    fingerprint: str

    def predict(self, modalities: Modalities) -> NDArray[np.float64]:
        """(N, C): probabilities of each class, of each label on its own, or (N, 1): the number itself."""
        ...


class Decoder(Protocol):
    """Picture vectors -> sentences."""

    fingerprint: str

    def decode(self, images: Vectors) -> Sequence[str]:
        """(N, D) unit rows -> one sentence for each."""
        ...


class Generator(Protocol):
    """Vectors of one modality -> vectors of another, or pictures."""

    @property
    def fingerprint(self) -> str:
        """Of the model whose vectors it takes."""
        ...

    def generate(self, vectors: Vectors, seed: int = 0) -> NDArray[np.float32]:
        """(N, D) unit rows -> (N, D) unit rows, or (N, H, W, 3) pictures from 0 to 1. The same for the same seed."""
        ...


class Translator(Generator, Protocol):
    """A generator from pictures to sentences, or the other way round."""

    @property
    def source(self) -> str:
        """The modality that it is given: image or text."""
        ...

    @property
    def target(self) -> str:
        """The one that it gives."""
        ...

    @property
    def share(self) -> float:
        """How much of what it gives belongs into a query, from 0 to 1."""
        ...


def filled(modalities: Modalities, translators: Sequence[Translator]) -> dict[str, Rows]:
    """The same tables, with vectors in place of missing ones where a translator can make them of what a row has.

    Args:
        modalities: tables by name, NaN where a row has nothing.
        translators: tried in order; a row is filled once, and never from what was filled in.
    """
    tables = {name: np.array(table) for name, table in modalities.items()}
    for translator in translators:
        given, wanted = modalities.get(translator.source), tables.get(translator.target)
        if given is None or wanted is None:
            continue
        lacking = np.isnan(wanted).any(axis=1) & ~np.isnan(given).any(axis=1)
        if lacking.any():
            wanted[lacking] = translator.generate(np.ascontiguousarray(given[lacking]))
    return tables


def blended(translator: Translator, vectors: Vectors, share: float | None = None) -> Vectors:
    """Queries with so much of what they translate to, the translator's own share if none is given: (N, D) unit rows."""
    share = translator.share if share is None else share
    if not share:
        return as_vectors(vectors)
    return as_vectors((1 - share) * vectors + share * translator.generate(vectors))


def check_fingerprint(what: str, head: str, other: str) -> None:
    """Refuse a model that a head was not trained on; raises ModelMismatch.

    Args:
        what: the head, for the message.
        head: the fingerprint that it holds.
        other: the fingerprint of the model, or of the index, at hand.
    """
    if head != other:
        raise ModelMismatch(
            f"{what} was trained on vectors of another model ({head[:12]}…, not {other[:12]}…): "
            "use that model, or train it anew on this one's"
        )
