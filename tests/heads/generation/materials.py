"""Small collections to generate from: what is hidden shows in pictures, in their vectors, and in sentences on them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sklearn")
torch = pytest.importorskip("torch")

from indexes.vectors import as_vectors  # noqa: E402
from retrieval.heads.generation.material import Material  # noqa: E402
from retrieval.pairs import PictureBytes  # noqa: E402

DIM, HIDDEN = 16, 3
FINGERPRINT = "f" * 64


def collection(pictures: int = 30, each: int = 2, noise: float = 0.02, seed: int = 0, same: bool = True) -> Material:
    """``each`` sentences of every picture; ``same``: what is learnt from is what is chosen by, and measured with.

    A picture is one colour: what is hidden of it, from 0 to 255. Its vector and those of its sentences are that colour
    turned in two ways, each with a mean of its own (the gap between the modalities).
    """
    random = np.random.default_rng(seed)
    hidden = random.uniform(-1, 1, (pictures, HIDDEN))
    turn, mean = random.normal(size=(2, HIDDEN, DIM)), random.normal(size=(2, DIM))
    owner = np.repeat(np.arange(pictures), each)

    def seen(way, rows):
        return as_vectors(rows @ turn[way] + mean[way] + noise * random.normal(size=(len(rows), DIM)))

    rows = np.arange(pictures)
    thirds = dict(zip(("train", "val", "test"), np.array_split(rows, 3), strict=True))
    return Material(
        FINGERPRINT,
        "builtin",
        seen(0, hidden),
        seen(1, hidden[owner]),
        owner,
        as_vectors(random.normal(size=(5, DIM)) + mean[1]),
        [PictureBytes(f"{i}.png", png(colour)) for i, colour in enumerate((hidden + 1) / 2)],
        [f"picture {i}" for i in owner],
        dict.fromkeys(thirds, rows) if same else thirds,
    )


def png(colour) -> bytes:
    """One colour, from 0 to 1."""
    data = io.BytesIO()
    Image.fromarray(np.rint(np.broadcast_to(np.asarray(colour) * 255, (8, 8, 3))).astype(np.uint8)).save(data, "PNG")
    return data.getvalue()


def colours(material: Material) -> np.ndarray:
    """(N, 3) of the pictures, from 0 to 1."""
    return np.array([np.asarray(Image.open(io.BytesIO(one.read_bytes())))[0, 0] / 255 for one in material.pictures])
