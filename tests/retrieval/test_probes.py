"""The everyday queries: how many there are, and that they are nobody else's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from retrieval.probes import everyday_queries, probes
from tests.fakes import ColourEncoder

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"


def plain(text: str) -> str:
    """Words alone, in lower case."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def test_three_hundred_different_lines():
    queries = everyday_queries()
    assert len(queries) == 300
    assert len({plain(query) for query in queries}) == 300
    assert all(query == query.strip() != "" for query in queries)


@pytest.mark.skipif(not DATA.exists(), reason="needs the shared data")
def test_none_is_a_caption_of_a_data_set():
    captions = set()
    for file in [*DATA.glob("*.jsonl"), *DATA.glob("*/captions.jsonl")]:
        for line in file.read_text("utf-8").splitlines():
            row = json.loads(line)
            captions |= {plain(text) for text in [*row.get("captions", []), row.get("text", "")]}
    assert len(captions) > 100_000
    assert not captions & {plain(query) for query in everyday_queries()}


def test_they_are_encoded_by_the_model_in_hand():
    class Longest(ColourEncoder):
        def encode_texts(self, texts):
            return np.array([[len(text), 0, 0] for text in texts], np.float32)

    (name,) = found = probes(Longest())
    assert name == "text"
    assert found["text"][:, 0].tolist() == [len(query) for query in everyday_queries()]
