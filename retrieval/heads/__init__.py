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
from indexes.vectors import Vectors

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

    fingerprint: str

    def generate(self, vectors: Vectors, seed: int = 0) -> NDArray[np.float32]:
        """(N, D) unit rows -> (N, D) unit rows, or (N, H, W, 3) pictures from 0 to 1. The same for the same seed."""
        ...


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
