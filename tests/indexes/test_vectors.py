"""Exact search and the FAISS kinds, by value against a slow, obvious search."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexes.errors import StoreCorrupt, VectorError
from indexes.vectors import Hits, VectorIndex, as_vectors, exact_search

DIM = 16
KINDS = ("Flat", "SQfp16", "SQ8", "HNSW32", "IVF4,Flat", "PQ4x4fs", "SQ8,RFlat", "PCA8,IVF4,Flat")


def unit(n: int, seed: int = 0, dim: int = DIM):
    return as_vectors(np.random.default_rng(seed).standard_normal((n, dim)))


def brute(vectors, queries, k, allowed=None) -> Hits:
    """Every score, summed in float64; sorted by falling float32 score, then by row."""
    columns = min(k, len(vectors))
    rows = np.full((len(queries), columns), -1)
    scores = np.full((len(queries), columns), -1, dtype=np.float32)
    for i, query in enumerate(queries):
        cosines = np.clip(np.float32((vectors.astype(np.float64) * query.astype(np.float64)).sum(axis=1)), -1, 1)
        found = [(-cosine, row) for row, cosine in enumerate(cosines) if allowed is None or allowed[row]]
        for column, (score, row) in enumerate(sorted(found)[:columns]):
            rows[i, column], scores[i, column] = row, -score
    return Hits(rows, scores)


def assert_same(hits: Hits, expected: Hits) -> None:
    np.testing.assert_array_equal(hits.rows, expected.rows)
    np.testing.assert_array_equal(hits.scores, expected.scores)
    assert (hits.rows.dtype, hits.scores.dtype) == (np.int64, np.float32)


# ---- as_vectors ------------------------------------------------------------------------------------------------------


def test_rows_become_unit_contiguous_float32():
    given_rows = np.array([[3, 0, 0], [4, 0, 7]]).T  # (3, 2) integers, Fortran order
    out = as_vectors(given_rows[[0, 2]])
    np.testing.assert_allclose(out, [[0.6, 0.8], [0, 1]], atol=1e-7)
    assert out.dtype == np.float32
    assert out.flags.c_contiguous


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1, 1e19, 1e37])
def test_length_is_one_whatever_the_scale(scale):
    out = as_vectors(unit(50, dim=700) * np.float32(scale))
    assert np.abs(np.linalg.norm(out.astype(np.float64), axis=1) - 1).max() < 1e-6


@pytest.mark.parametrize("dim", [1, 8, 512, 4096])
def test_unit_rows_stay_bit_for_bit(dim):
    rows = unit(300, dim=dim)
    np.testing.assert_array_equal(as_vectors(rows), rows)


def test_given_array_is_not_changed():
    rows = np.full((2, 3), 2, dtype=np.float32)
    as_vectors(rows)
    assert (rows == 2).all()


@pytest.mark.parametrize("bad", [0, np.nan, np.inf, -np.inf, 1e300])
def test_bad_rows_are_refused_by_name(bad):
    rows = np.ones((6000, 2))
    rows[[1, 4100, 4200, 5999]] = bad, 0
    with pytest.raises(VectorError, match=r"^4 of 6000 vectors are zero, NaN or infinite: n1, n4100, n4200, …$"):
        as_vectors(rows, [f"n{i}" for i in range(6000)])
    with pytest.raises(VectorError, match=r"1 of 2 .* row 1$"):
        as_vectors(rows[:2])


@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(VectorError, match="table"):
        as_vectors(np.ones(shape))


def test_no_rows_are_fine():
    assert as_vectors(np.empty((0, 5))).shape == (0, 5)


# ---- exact search and Flat, by value ---------------------------------------------------------------------------------


def exact(vectors, queries, k, allowed=None):
    return exact_search(vectors, queries, k, allowed)


def flat(vectors, queries, k, allowed=None):
    return VectorIndex.build(vectors, "Flat").search(queries, k, allowed)


@pytest.fixture(params=[exact, flat], ids=["numpy", "Flat"])
def search(request):
    return request.param


@pytest.mark.parametrize("n", [0, 1, 2, 17, 300])
@pytest.mark.parametrize("k", [1, 5, 1000])
def test_equals_brute_force(search, n, k):
    vectors, queries = unit(n), unit(7, seed=1)
    assert_same(search(vectors, queries, k), brute(vectors, queries, k))


@pytest.mark.parametrize("share", [0, 0.02, 0.5, 1])
def test_allowed_rows_only(search, share):
    vectors, queries = unit(200), unit(5, seed=1)
    allowed = np.random.default_rng(3).random(200) < share
    assert_same(search(vectors, queries, 10, allowed), brute(vectors, queries, 10, allowed))


@pytest.mark.parametrize("n", [40, 700])
def test_ties_lower_row_first_across_rank_k(search, n):
    """Few distinct vectors, many copies: rank k always falls into a tie."""
    distinct = unit(5, dim=67)
    vectors = distinct[np.random.default_rng(2).integers(0, 5, n)]
    for queries in (distinct[:1], distinct, np.repeat(distinct, 60, axis=0)):  # one, some, enough for BLAS
        assert_same(search(vectors, queries, 7), brute(vectors, queries, 7))


def test_all_rows_equal(search):
    vectors = np.repeat(unit(1), 500, axis=0)
    hits = search(vectors, unit(3, seed=1), 4)
    np.testing.assert_array_equal(hits.rows, [[0, 1, 2, 3]] * 3)


def test_no_cosine_is_above_one(search):
    vectors = unit(400, dim=3)  # unit to float32's rounding: many are a little too long
    assert (np.square(vectors.astype(float)).sum(axis=1).max() - 1) > 6e-8
    hits = search(vectors, vectors, 1)
    assert hits.scores.max() == 1
    assert_same(hits, brute(vectors, vectors, 1))


def test_no_queries(search):
    assert search(unit(10), unit(0), 3).rows.shape == (0, 3)


def test_many_queries_are_searched_in_batches(search, monkeypatch):
    monkeypatch.setattr("indexes.vectors._SCORES", 250)  # two queries at a time
    vectors, queries = unit(100), unit(9, seed=1)
    assert_same(search(vectors, queries, 3), brute(vectors, queries, 3))


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_equals_brute_force_on_coarse_vectors(data):
    """Vectors of few values: ties everywhere, in every size and mask."""
    n, dim = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 4))
    numbers = np.array(data.draw(st.lists(st.integers(-1, 1), min_size=n * dim, max_size=n * dim))).reshape(n, dim)
    numbers[~numbers.any(axis=1), 0] = 1
    vectors, k = as_vectors(numbers), data.draw(st.integers(1, n + 2))
    allowed = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    expected = brute(vectors, vectors[:3], k, allowed)
    assert_same(exact(vectors, vectors[:3], k, allowed), expected)
    assert_same(flat(vectors, vectors[:3], k, allowed), expected)


# ---- every kind: one conformance test --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_the_contract(kind, tmp_path):
    vectors, queries = unit(900), unit(6, seed=1)
    vectors[500:510] = vectors[0]
    index = VectorIndex.build(vectors, kind)
    assert (len(index), index.dim, index.factory) == (900, DIM, kind)
    allowed = np.random.default_rng(3).random(900) < 0.3

    index.save(tmp_path / "index.faiss")
    loaded = VectorIndex.load(tmp_path / "index.faiss")
    assert (len(loaded), loaded.dim, loaded.factory) == (900, DIM, kind)

    for mask in (None, allowed):
        hits = index.search(queries, 20, mask)
        assert_same(loaded.search(queries, 20, mask), hits)
        assert hits.rows.shape == hits.scores.shape == (6, 20)
        truth = queries @ vectors.T
        for rows, scores, cosines in zip(hits.rows, hits.scores, truth, strict=True):
            found = rows >= 0
            assert found[0]
            assert (np.diff(found.astype(int)) <= 0).all()  # -1 only at the end
            assert (scores[~found] == -1).all()
            assert len(set(rows[found])) == found.sum()
            assert mask is None or mask[rows[found]].all()
            assert (np.diff(scores) <= 0).all()
            assert np.abs(scores[found] - cosines[rows[found]]).max() < (0.7 if "PQ" in kind or "PCA" in kind else 0.02)
        # What it finds is near the best there is: chance would reach a mean of about 0.
        best = brute(vectors, queries, 20, mask)
        found_truth = np.take_along_axis(truth, hits.rows, axis=1)[hits.rows >= 0]
        assert found_truth.mean() > 0.7 * best.scores.mean()
        if kind == "Flat":
            assert_same(hits, best)

    empty = VectorIndex.build(unit(0), kind)
    empty.save(tmp_path / "empty.faiss")
    for none in (empty, VectorIndex.load(tmp_path / "empty.faiss")):
        assert len(none) == 0
        assert none.search(queries, 3).rows.shape == (6, 0)
        assert none.search(queries, 3, np.zeros(0, bool)).rows.shape == (6, 0)


def test_a_filter_visits_as_many_lists_as_without():
    vectors, queries = unit(400), unit(6, seed=1)
    index = VectorIndex.build(vectors, "IVF8,Flat")
    index.set_effort(8)  # all of them: exact, up to FAISS's rounding
    allowed = np.random.default_rng(3).random(400) < 0.3
    for mask in (None, allowed):
        np.testing.assert_array_equal(index.search(queries, 9, mask).rows, brute(vectors, queries, 9, mask).rows)


def test_unknown_kind_and_too_few_rows_to_train():
    with pytest.raises(VectorError, match="kind 'Flatt' on 3 vectors: "):
        VectorIndex.build(unit(3), "Flatt")
    with pytest.raises(VectorError, match=r"kind 'IVF64,Flat' on 2,495 vectors: it needs at least 2,496"):
        VectorIndex.build(unit(2495), "IVF64,Flat")
    for kind in ("PCA8,PQ4", "OPQ4,PQ4x4fs", "PQ4,RFlat"):
        with pytest.raises(VectorError, match="on 900 vectors: it needs at least 9,984"):
            VectorIndex.build(unit(900), kind)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("BFlat", "could not parse index string BFlat"),
        ("IDMap,Flat", "add does not make sense with"),
    ],
)
def test_what_faiss_says_comes_without_its_source_code(kind, reason):
    with pytest.raises(VectorError) as caught:
        VectorIndex.build(unit(900), kind)
    said = str(caught.value)
    assert reason in said
    assert "Error" not in said
    assert "::" not in said


def test_a_kind_that_memory_does_not_hold(monkeypatch):
    """FAISS says so of IVF1000000000,Flat; here without asking the machine for 50 GB."""

    def full(*_):
        raise MemoryError("std::bad_alloc")

    monkeypatch.setattr("faiss.index_factory", full)
    with pytest.raises(VectorError, match="on 900 vectors: there is not enough memory"):
        VectorIndex.check("IVF1000000000,Flat", DIM, 900)


@pytest.mark.parametrize(("kind", "rows"), [("Flatt", 3), ("IVF64,Flat", 2495), ("PQ4,RFlat", 900), ("PQ5x4fs", 900)])
def test_what_cannot_be_built_is_known_before_there_are_vectors(kind, rows):
    with pytest.raises(VectorError) as built:
        VectorIndex.build(unit(rows), kind)
    with pytest.raises(VectorError) as checked:
        VectorIndex.check(kind, DIM, rows)
    assert str(checked.value) == str(built.value)
    VectorIndex.check("IVF64,Flat", DIM, 2496)


@pytest.mark.parametrize("kind", KINDS)
def test_size_is_that_of_the_file(kind, tmp_path):
    index = VectorIndex.build(unit(900), kind)
    index.save(tmp_path / "index.faiss")
    assert index.size == (tmp_path / "index.faiss").stat().st_size


def test_training_says_nothing_on_stderr(capfd):
    """FAISS remarks there on few rows, from C++, and runs a k-means for each part of a product quantiser."""
    for kind in ("IVF64,Flat", "PQ8x4fs", "IVF8,PQ4x4fs", "RaBitQfs", "PCA8,SQ8", "IVF16,RaBitQfs"):
        VectorIndex.build(unit(2496), kind)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["plain.faiss", "spaced name.faiss", os.fsdecode(b"not-utf8-\xff.faiss")])
def test_save_and_load_under_any_name(name, tmp_path):
    vectors = unit(20)
    VectorIndex.build(vectors).save(tmp_path / name)
    assert list(tmp_path.iterdir()) == [tmp_path / name]
    assert_same(VectorIndex.load(tmp_path / name).search(vectors, 3), brute(vectors, vectors, 3))


def test_damaged_file_is_refused(tmp_path):
    file = tmp_path / "index.faiss"
    VectorIndex.build(unit(20)).save(file)
    whole = file.read_bytes()
    for content in (b"", b"x", whole[:10], whole[:200], whole[:-30], whole[:-1] + b"\xff", whole[100:], b"z" * 5000):
        file.write_bytes(content)
        with pytest.raises(StoreCorrupt, match=r"index\.faiss .*delete it"):
            VectorIndex.load(file)
    with pytest.raises(FileNotFoundError):
        VectorIndex.load(tmp_path / "missing")


def test_mistakes_of_a_program_are_refused(search):
    vectors = unit(5)
    with pytest.raises(ValueError, match="k must be at least 1"):
        search(vectors, vectors, 0)
    for wrong in (np.ones(4, bool), np.ones(5, int)):
        with pytest.raises(ValueError, match="5 booleans"):
            search(vectors, vectors, 1, wrong)
    with pytest.raises(VectorError, match="width 16"):
        VectorIndex.build(vectors).search(unit(1, dim=8), 1)


def test_principal_axes_keep_products_and_not_those_about_the_mean():
    random = np.random.default_rng(0)
    mean = random.standard_normal(16)
    rows = as_vectors(mean + random.standard_normal((900, 16)) * random.uniform(0.1, 2, (900, 1)))
    queries = as_vectors(random.standard_normal((20, 16)))
    found, best = VectorIndex.build(rows, "PCAR16,Flat").search(queries, 10), brute(rows, queries, 10)
    assert (found.rows == best.rows).mean() > 0.99  # but for rounding
    np.testing.assert_allclose(found.scores, best.scores, atol=1e-5)
