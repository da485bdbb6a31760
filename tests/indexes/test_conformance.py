"""Every kind of index behind a store keeps the same promises, by value, against a slow and obvious search."""

from __future__ import annotations

import numpy as np
import pytest

from indexes import choice
from indexes.errors import VectorError
from indexes.segments import Row
from indexes.store import ModelRef, Store, Wanted
from indexes.vectors import as_vectors
from tests.indexes.test_vectors import assert_same, brute

DIM = 32
KINDS = [
    "exact",
    "Flat",
    "SQfp16",
    "SQ8",
    "SQ4",
    "RaBitQ",
    "RaBitQfs",
    "PQ16x4fs",
    "HNSW16",
    "HNSW16,SQ8",
    "IVF8,Flat",
    "IVF8,SQ8",
    "IVF8,RaBitQfs",
    "IVF8,PQ16x4fs",
    "PCA16,SQ8",
    "PCAR16,PQ8x4fs",
    "PCAR16,IVF8,PQ8x4fs",
    "PQ16x4fs,RFlat",
    "RaBitQfs,Refine(SQfp16)",
]


def clustered(n, seed=0):
    """Points around a few means, as pictures of a few subjects are."""
    random = np.random.default_rng(seed)
    means = np.random.default_rng(99).standard_normal((12, DIM))
    return as_vectors(means[random.integers(0, 12, n)] + 0.4 * random.standard_normal((n, DIM)))


def fill(store, vectors):
    with store.write() as writer:
        for vector in vectors:
            writer.add(Row(path="x.jpg", size=1, mtime_ns=1, hash="h"), vector)


@pytest.fixture
def store(tmp_path):
    return Store.create(tmp_path / ".diptych", None, ModelRef("fake", "f" * 64, DIM))


def check(store, queries, k, allowed=None, exact=True):
    """Scores are the cosines of the stored rows, best first, lower rows first where equal; as many as there can be."""
    vectors = store.vectors()
    hits, best = store.search(queries, k, allowed), brute(vectors, queries, k, allowed)
    if exact:
        assert_same(hits, best)
        return
    assert hits.rows.shape == best.rows.shape
    np.testing.assert_array_equal(hits.rows >= 0, best.rows >= 0)
    for rows, scores, query in zip(hits.rows, hits.scores, queries, strict=True):
        rows = rows[rows >= 0]
        true = np.float32((vectors[rows].astype(float) * query).sum(axis=1))
        np.testing.assert_array_equal(scores[: len(rows)], np.minimum(true, 1))
        np.testing.assert_array_equal(rows, rows[np.lexsort((rows, -true))])
        assert len(set(rows)) == len(rows)
        assert allowed is None or allowed[rows].all()
    found = np.isin(
        hits.rows + 10_000 * np.arange(len(queries))[:, None], best.rows + 10_000 * np.arange(len(queries))[:, None]
    )
    assert found.mean() > 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_that_looks_at_enough_is_exact(store, kind):
    """Asked for all of the truth, it takes as many candidates and lists as that needs."""
    vectors, queries = clustered(1200), clustered(40, seed=1)
    vectors[700:720] = vectors[3]  # the same picture many times: rank k falls into a tie
    fill(store, vectors)
    store.rebuild_index(Wanted(kind, recall=1.0), {"text": np.concatenate([queries, vectors[3:4]])})
    if kind == "exact":
        assert store.ann is None
    else:
        assert store.ann.factory == kind
        assert store.ann.measured.recall == {"text": 1.0, "image": 1.0}
        assert store.snapshot.covered == 1200
    store = Store.open(store.path)
    for k in (1, 10):
        check(store, queries, k)
    check(store, vectors[3:4], 10)  # a tie of 21
    assert store.search(vectors[3:4], 10).rows[0].tolist() == [3, *range(700, 709)]


@pytest.mark.parametrize("kind", KINDS)
def test_filters_deletes_and_newer_rows(store, kind):
    fill(store, clustered(1200))
    store.rebuild_index(kind)
    with store.write() as writer:
        for row_id in range(0, 1200, 7):
            writer.remove(row_id)
        for vector in clustered(1200)[:30]:
            writer.add(Row(path="new.jpg", size=1, mtime_ns=1, hash="h"), vector)
    store = Store.open(store.path)
    queries = clustered(12, seed=1)
    assert kind == "exact" or store.snapshot.covered == 1200 - 172
    exact = kind in ("exact", "Flat")
    check(store, queries, 10, exact=exact)
    for share in (0.0, 0.002, 0.02, 0.3, 0.9):
        allowed = np.random.default_rng(3).random(len(store)) < share
        check(store, queries, 10, allowed, exact=exact or share < 0.05)  # few enough to be compared one by one
    gone = set(range(0, 1200, 7))
    ids = store.rows()["id"].to_numpy()
    assert not gone & set(ids[store.search(queries, 50).rows].ravel().tolist())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, 1, 3])
def test_hardly_any_rows(store, kind, n):
    fill(store, clustered(n))
    try:
        store.rebuild_index(kind)
    except VectorError:  # kinds with something to train, on too little
        assert n
        assert any(word in kind for word in ("IVF", "PQ", "PCA"))
    store = Store.open(store.path)
    check(store, clustered(4, seed=1), 10)
    check(store, clustered(4, seed=1), 10, np.zeros(n, bool))


@pytest.mark.parametrize("kind", KINDS)
def test_more_than_there_are(store, kind):
    fill(store, clustered(700))
    store.rebuild_index(kind)
    check(Store.open(store.path), clustered(3, seed=1), 10_000)


def test_without_memory_for_the_vectors(store, monkeypatch):
    """What is too large to be held widened is compared a block at a time."""
    fill(store, clustered(500))
    with store.write() as writer:
        for row_id in range(0, 500, 9):
            writer.remove(row_id)
    truth = Store.open(store.path)
    expected = [brute(truth.vectors(), clustered(5, seed=1), k, mask) for k, mask in cases(len(truth))]
    monkeypatch.setattr("indexes.snapshot._HELD", 1000)
    monkeypatch.setattr("indexes.snapshot._BLOCK", 64)
    blockwise = Store.open(store.path)
    for (k, mask), best in zip(cases(len(truth)), expected, strict=True):
        assert_same(blockwise.search(clustered(5, seed=1), k, mask), best)
    assert "vectors" not in vars(blockwise.snapshot)


def cases(n):
    return [(k, mask) for k in (1, 7, 2000) for mask in (None, np.random.default_rng(3).random(n) < 0.4)]


# ---- the choice ------------------------------------------------------------------------------------------------------


def test_kinds_by_size_and_memory():
    assert choice.kinds(5_000, 512, Wanted()) == []
    codes = ["PCAR256,PQ128x4fs", "RaBitQfs"]
    assert choice.kinds(100_000, 512, Wanted()) == [*codes, "SQfp16"]
    lists = ["PCAR256,IVF4096,PQ128x4fs", "PCAR256,PQ128x4fs", "IVF4096,RaBitQfs", "RaBitQfs"]
    assert choice.kinds(1_000_000, 512, Wanted()) == [*lists, "SQfp16"]
    assert choice.kinds(1_000_000, 512, Wanted(memory=1 << 30)) == [*lists, "SQfp16"]
    assert choice.kinds(1_000_000, 512, Wanted(memory=100 << 20)) == lists
    assert choice.kinds(1_000_000, 512, Wanted(memory=50 << 20)) == ["PCAR256,PQ64x4fs", "PCAR256,PQ32x4fs"]
    assert choice.kinds(1_000_000, 512, Wanted(memory=1 << 20)) == []
    assert choice.kinds(100_000, 7, Wanted()) == ["RaBitQfs", "SQfp16"]


def test_a_store_that_grows_chooses_for_itself(store, monkeypatch):
    monkeypatch.setattr("indexes.choice._EXACT_ROWS", 1100)
    fill(store, clustered(900))
    assert not store.index_is_stale()
    fill(store, clustered(400, seed=5))
    assert store.index_is_stale()
    queries = clustered(60, seed=7)
    store.rebuild_index(probes={"text": queries})
    assert not store.index_is_stale()
    ann = Store.open(store.path).ann
    assert (ann.factory, ann.rows, ann.measured.queries) == ("PCAR16,PQ8x4fs", 1300, {"text": 60, "image": 300})
    assert ann.measured.bytes == (store.path / "vectors.faiss").stat().st_size < 1300 * 2 * DIM
    # The recall that is written down is the one a search has: counted here the slow way.
    best = brute(store.vectors(), queries, 10)
    hits = store.search(queries, 10)
    share = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(hits.rows, best.rows, strict=True)])
    assert ann.measured.recall["text"] == pytest.approx(share)
    assert 0.95 <= min(ann.measured.recall.values()) <= 1


def test_vectors_that_codes_cannot_tell_apart_get_a_kind_that_misses_nothing(store, monkeypatch):
    """All of them near one direction, and few candidates."""
    monkeypatch.setattr("indexes.choice._EXACT_ROWS", 1000)
    monkeypatch.setattr("indexes.choice._REFINE", (1, 2))
    random = np.random.default_rng(0)
    fill(store, as_vectors(np.ones(DIM) + 0.3 * random.standard_normal((1500, DIM))))
    store.rebuild_index(Wanted(recall=0.99), {"text": clustered(50, seed=1)})
    assert store.ann.factory == "SQfp16"
    assert min(store.ann.measured.recall.values()) > 0.99


def test_what_is_asked_for_is_remembered(store):
    fill(store, clustered(400))
    store.rebuild_index(Wanted("SQ8", recall=0.9))
    store = Store.open(store.path)
    assert (store.wanted, store.ann.factory) == (Wanted("SQ8", recall=0.9), "SQ8")
    (store.path / "vectors.faiss").unlink()
    assert store.index_is_stale()
    store.rebuild_index()
    assert store.ann.factory == "SQ8"
    store.rebuild_index("exact")
    assert store.ann is None
    assert not (store.path / "vectors.faiss").exists()
    assert not store.index_is_stale()


def test_a_damaged_faiss_file_is_named_left_aside_and_built_anew(store):
    fill(store, clustered(400))
    store.rebuild_index("HNSW16")
    file = store.path / "vectors.faiss"
    whole = file.read_bytes()
    queries = clustered(5, seed=1)
    for place in range(0, len(whole), len(whole) // 40):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        opened = Store.open(store.path)
        assert any("vectors.faiss is damaged" in line for line in opened.check())
        check(opened, queries, 5)  # FAISS never sees it
        assert opened.snapshot.covered == 0
        assert opened.index_is_stale()
    store.rebuild_index()
    assert Store.open(store.path).check() == []
    assert Store.open(store.path).snapshot.covered == 400
