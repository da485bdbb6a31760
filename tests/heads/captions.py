"""A tiny world to describe: a vector for each colour and each place, and a sentence for each pair of them."""

from __future__ import annotations

import numpy as np

from indexes.vectors import as_vectors
from retrieval.heads.captioning.recipe import CaptionRecipe, Captions, CaptionSource

DIM = 16
COLOURS, PLACES = ("red", "blue", "green"), ("the grass", "the wet sand")
SENTENCES = [f"a {colour} dog runs on {place}" for colour in COLOURS for place in PLACES]


def vectors():
    """(6, 16): the sum of a colour's and a place's, for each of `SENTENCES`."""
    table = np.random.default_rng(0).normal(size=(5, DIM))
    return as_vectors([table[i] + table[3 + j] for i in range(3) for j in range(2)])


def captions():
    count = len(SENTENCES)
    return Captions(vectors(), np.arange(count), SENTENCES, np.zeros(count, np.int64))


def recipe(**changes):
    """One that learns them by heart within seconds."""
    settings = {
        "width": 32, "layers": 2, "heads": 2, "prefix": 2, "length": 12, "pieces": 60, "dropout": 0.0, "noise": 0.05,
        "label_smoothing": 0.0, "batch": 6, "learning_rate": 1e-2, "warmup": 10, "ema": 0.9, "validate_every": 20,
    }  # fmt: skip
    return CaptionRecipe((CaptionSource("a.jsonl", repeat=100),), **{**settings, **changes})
