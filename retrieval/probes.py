"""Queries as people type them, on which the recall of an index is measured."""

from __future__ import annotations

import importlib.resources

from indexes.vectors import Vectors
from retrieval.encoders import Encoder

TEXT = "text"  # the kind of query that is a sentence


def everyday_queries() -> list[str]:
    """300 searches of one's own photos, written for this project: captions of no data set.

    Captions describe what is in a picture; these are short, name places and occasions, and are spelt as people type.
    """
    return importlib.resources.files("retrieval").joinpath("everyday_queries.txt").read_text("utf-8").splitlines()


def probes(encoder: Encoder) -> dict[str, Vectors]:
    """Encode the everyday queries with a store's own model, for ``Store.rebuild_index``: ``{"text": (300, D)}``."""
    return {TEXT: encoder.encode_texts(everyday_queries())}
