"""The vectors of an index as a source of known ones: for what trains and runs on embeddings that are already there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from indexes.store import MANIFEST, Store
from indexes.vectors import Vectors
from retrieval.embedding import Found, KnownVectors, picture_key, sentence_key
from retrieval.encoders import Encoder
from retrieval.library import find_store

_SHA256 = re.compile(r"[0-9a-f]{64}")


def open_store(path: Path) -> Store:
    """Open the index at a path, or that of the folder there. Raises what Store.open does."""
    path = path.expanduser().absolute()
    return Store.open(path if (path / MANIFEST).is_file() else find_store(path) or path)


class StoredVectors:
    """A :class:`KnownVectors` in front of another: what the index holds is neither decoded nor encoded.

    A picture is known by its content: a copy of it elsewhere is found too, and a file that has changed is not. The
    vectors are those stored, in float16. The index is only read.
    """

    def __init__(self, store: Store, encoder: Encoder, behind: KnownVectors | None = None) -> None:
        """Take the index as it is.

        Args:
            store: the index.
            encoder: whose vectors are wanted.
            behind: asked for what the index does not hold, and given what is encoded.

        Raises:
            ModelMismatch: the index holds vectors of another model.
        """
        store.check_model(encoder.fingerprint, encoder.name)
        self._store, self._behind = store, behind
        self._positions: dict[bytes, int] = {}
        self._texts = store.texts()
        fields = (column.to_pylist() for column in store.columns("hash", "caption").columns)
        for position, (content, caption) in enumerate(zip(*fields, strict=True)):
            if self._texts[position]:
                self._positions.setdefault(sentence_key(caption or ""), position)
            elif _SHA256.fullmatch(content):  # rows that were imported may have none
                self._positions.setdefault(picture_key(bytes.fromhex(content)), position)
        self._served: set[int] = set()

    @property
    def pictures(self) -> int:
        """How many different pictures were looked up and found in the index."""
        return sum(not self._texts[position] for position in self._served)

    def __contains__(self, key: object) -> bool:
        return key in self._positions or (self._behind is not None and key in self._behind)

    def refresh(self) -> None:
        """See what is behind the index now; of the index itself, the state it was taken in stays."""
        if self._behind is not None:
            self._behind.refresh()

    def get(self, keys: Sequence[bytes]) -> Found:
        """Look keys up in the index, and those that it does not hold behind it."""
        at = np.array([self._positions.get(key, -1) for key in keys], np.int64)
        known = at >= 0
        vectors = np.empty((len(keys), self._store.model.dim), np.float32)
        snapshot = self._store.snapshot
        vectors[known] = snapshot.stored(snapshot.live[at[known]])
        self._served.update(at[known].tolist())
        others = np.flatnonzero(~known)
        if self._behind is not None and len(others):
            found = self._behind.get([keys[i] for i in others.tolist()])
            others = others[found.known]
            if len(others):
                known[others], vectors[others] = True, found.vectors
        return Found(known, vectors[known])

    def put(self, keys: Sequence[bytes], vectors: Vectors) -> None:
        """Hand vectors on to what is behind."""
        if self._behind is not None:
            self._behind.put(keys, vectors)
