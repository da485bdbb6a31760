"""Classifiers on the vectors of an index: nothing that it holds is decoded or encoded again."""

from __future__ import annotations

import json

import numpy as np
import pytest

from indexes.errors import ModelMismatch, StoreNotFound
from retrieval import embedding
from retrieval.embedding import EmbeddingCache, encode_pictures, encode_sentences
from retrieval.heads.classify import fit, predict
from retrieval.library import STORE_NAME, Library
from retrieval.stored import StoredVectors, open_store
from tests.fakes import ColourEncoder
from tests.heads.problems import torch  # skips without scikit-learn and torch
from tests.heads.test_classify import QUICK, drawn, written

assert torch


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def world(tmp_path):
    """Rows, and an index of their pictures."""
    file = written(tmp_path, drawn(tmp_path))
    library = Library.create(tmp_path / "images", encoder=ColourEncoder())
    library.index()
    return file, library.store.path


@pytest.fixture
def decoded(monkeypatch):
    """Counts the pictures that are decoded to be encoded."""
    seen, read = [], embedding.read_photo
    monkeypatch.setattr(embedding, "read_photo", lambda data, **more: seen.append(1) or read(data, **more))
    return seen


def fitted(file, encoder, **options):
    notes = []
    return *fit(file, lambda: encoder, "colours", QUICK, note=notes.append, **options), notes


@pytest.mark.parametrize("cached", [True, False])
def test_fit_and_predict_take_what_is_stored(world, decoded, cached):
    file, store = world
    plain = fitted(file, ColourEncoder(), cached=False)[1]
    assert len(decoded) == 60
    decoded.clear()
    encoder = ColourEncoder()
    result, model, notes = fitted(file, encoder, index=store, cached=cached)
    assert encoder.encoded == len(decoded) == 0
    assert "the index has the vectors of 60 of the pictures: nothing of them was decoded or encoded" in notes
    assert result.models[result.chosen].test["accuracy"] == 1
    stored = predict(model, file, lambda: encoder, index=store, cached=cached)
    assert encoder.encoded == len(decoded) == 0
    for ours, theirs in zip(stored, predict(plain, file, ColourEncoder, cached=False), strict=True):
        assert ours.answer == theirs.answer
        assert ours.outputs == pytest.approx(theirs.outputs, abs=2e-3)  # float16


def test_what_the_index_does_not_hold_is_encoded(world, decoded, tmp_path):
    file, store = world
    (tmp_path / "images" / "1.png").write_bytes((tmp_path / "images" / "0.png").read_bytes())  # a copy of another
    (tmp_path / "images" / "2.png").write_bytes((tmp_path / "images" / "2.png").read_bytes() + b"\0")  # changed
    encoder = ColourEncoder()
    _, _, notes = fitted(file, encoder, index=store)
    assert encoder.encoded == len(decoded) == 1
    assert any(note.startswith("the index has the vectors of 58 of the pictures") for note in notes)
    fitted(file, encoder, index=store)
    assert encoder.encoded == len(decoded) == 1  # it is in the cache now


def test_the_index_and_the_cache_together_are_the_encoder(world, tmp_path):
    _, store = world
    pictures = [tmp_path / "images" / f"{i}.png" for i in (5, 3, 5, 0)]
    other = tmp_path / "other.png"
    other.write_bytes(pictures[0].read_bytes() + b"\0")
    encoder = ColourEncoder()
    known = StoredVectors(open_store(store), encoder, EmbeddingCache(encoder.fingerprint, encoder.dim))
    rows = encode_pictures(encoder, [*pictures, other], cache=known)
    assert encoder.encoded == 1
    np.testing.assert_allclose(rows, encode_pictures(encoder, [*pictures, other]), atol=1e-3)
    halves = rows[:4].astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(rows[:4], halves / np.linalg.norm(halves, axis=1, keepdims=True), atol=1e-6)
    assert known.pictures == 3


def test_sentences_of_an_index_are_known_too(tmp_path):
    (tmp_path / "said.txt").write_text("something red\nsomething blue\n")
    library = Library.create(tmp_path / "said.txt", encoder=ColourEncoder(), texts=True)
    library.index()
    encoder = ColourEncoder()
    asked, encode = [], encoder.encode_texts
    encoder.encode_texts = lambda texts: asked.extend(texts) or encode(texts)
    known = StoredVectors(library.store, encoder)
    rows = encode_sentences(encoder, ["something red", "green", "something blue"], cache=known)
    assert asked == ["green"]
    np.testing.assert_allclose(rows, np.eye(3)[[0, 1, 2]], atol=1e-3)
    assert known.pictures == 0


def test_vectors_of_another_model_are_refused(world):
    file, store = world
    other = ColourEncoder()
    other.name, other.fingerprint = "colours of old", "colours-0"
    with pytest.raises(ModelMismatch, match="was made with colours"):
        fitted(file, other, index=store)
    model = fitted(file, ColourEncoder())[1]
    with pytest.raises(ModelMismatch):
        predict(model, file, lambda: other, index=store)


def test_a_folder_names_its_index(world, tmp_path):
    file, store = world
    assert store.name == STORE_NAME
    assert open_store(tmp_path / "images").path == store
    with pytest.raises(StoreNotFound):
        fitted(file, ColourEncoder(), index=tmp_path / "nowhere")


def test_rows_without_pictures_need_none(world, tmp_path):
    _, store = world
    rows = [{"text": f"something {colour}", "label": colour} for colour in ("red", "blue") * 20]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, _, notes = fitted(tmp_path / "texts.jsonl", ColourEncoder(), index=store)
    assert any(note.startswith("the index has the vectors of 0 of the pictures") for note in notes)
