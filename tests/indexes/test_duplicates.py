"""Equal hashes, near pairs and star groups, against the slow obvious way."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from indexes.duplicates import Pairs, equal_hashes, members, near_pairs, star_groups, stored_block
from indexes.errors import VectorError
from indexes.store import ModelRef, Row, Store
from indexes.vectors import as_vectors

DIM = 32


def clustered(rows: int, seed: int = 0, spread: float = 0.5) -> np.ndarray:
    """Unit rows around a tenth as many centres, as stored: neighbours have a cosine of about 0.8."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(1, rows // 10), DIM))
    noise = spread * rng.normal(size=(rows, DIM))
    return as_vectors(centres[rng.integers(0, len(centres), rows)] + noise).astype(np.float16)


def found(pairs: Pairs) -> dict[tuple[int, int], float]:
    keys = list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    assert len(set(keys)) == len(keys)
    assert all(first < second for first, second in keys)
    return dict(zip(keys, pairs.scores.tolist(), strict=True))


def brute_force(vectors: np.ndarray, rows, threshold: float) -> dict[tuple[int, int], float]:
    wide = vectors.astype(np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    out = {}
    for i in rows:
        for j in rows:
            if i < j and (cosine := wide[i] @ wide[j]) >= threshold:
                out[i, j] = cosine
    return out


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_pairs_equal_brute_force(dtype):
    vectors = clustered(300).astype(dtype)
    rows = np.flatnonzero(np.arange(300) % 7 != 3)  # the others are not compared
    expected = brute_force(vectors, rows.tolist(), 0.85)
    assert 50 < len(expected) < 1500
    got = found(near_pairs(lambda start, stop: vectors[start:stop], rows, 0.85))
    assert got == pytest.approx(expected, abs=1e-5)


def test_blocks_are_asked_for_in_order_and_only_where_something_is_wanted():
    vectors, asked = clustered(40_000), []

    def block(start, stop):
        asked.append((start, stop))
        return vectors[start:stop]

    rows = np.array([3, 9, 39_000])
    near_pairs(block, rows, 0.5)
    assert [(start, stop) for start, stop in asked if not any(start <= row < stop for row in rows)] == []
    assert asked == sorted(asked)
    assert sum(stop - start for start, stop in asked) < 20_000


def test_cells_find_what_brute_force_does():
    vectors = clustered(6000)
    expected = found(near_pairs(lambda start, stop: vectors[start:stop], np.arange(6000), 0.85))
    steps = []
    got = found(
        near_pairs(
            lambda start, stop: vectors[start:stop],
            np.arange(6000),
            0.85,
            exact=1000,
            progress=lambda done, total: steps.append((done, total)),
        )
    )
    assert len(steps) > 5  # cells, and not one of everything
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]
    assert set(got) <= set(expected)
    assert len(got) >= 0.99 * len(expected)


def test_cells_say_nothing(capfd):
    vectors = clustered(3000)
    near_pairs(lambda start, stop: vectors[start:stop], np.arange(3000), 0.9, exact=10)
    assert capfd.readouterr() == ("", "")


def test_equal_rows_cost_one_pair_each():
    vectors = clustered(200)
    vectors = np.concatenate([vectors, np.repeat(vectors[:1], 100_000, axis=0)])
    rows = np.arange(len(vectors))
    tracemalloc.start()
    pairs = near_pairs(lambda start, stop: vectors[start:stop], rows, 0.99, exact=50)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    twins = pairs.take(pairs.scores == 1)
    assert (twins.first == 0).all()
    assert twins.second.tolist() == rows[200:].tolist()
    assert peak < 100 * 2**20  # all their pairs would take 37 GB, a byte each 5 GB


def test_rows_with_very_many_near_ones_keep_the_nearest():
    rng = np.random.default_rng(0)
    vectors = as_vectors(np.ones(DIM) + 0.05 * rng.normal(size=(2000, DIM)))
    pairs = near_pairs(lambda start, stop: vectors[start:stop], np.arange(2000), 0.9)
    got = found(pairs)
    wide = vectors.astype(np.float64)
    cosines = wide @ wide.T
    np.fill_diagonal(cosines, -1)
    assert (cosines > 0.9).sum() == 2000 * 1999  # all of them
    nearest = np.argsort(-cosines, axis=1)[:, :250]
    assert {(min(i, j), max(i, j)) for i in range(2000) for j in nearest[i].tolist()} <= set(got)
    assert len(got) <= 2000 * 256


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_rows_have_no_pairs(count):
    vectors = clustered(5)
    assert found(near_pairs(lambda start, stop: vectors[start:stop], np.arange(count), 0.1)) == {}


def test_a_zero_vector_is_refused():
    vectors = clustered(5)
    vectors[2] = 0
    with pytest.raises(VectorError, match="zero"):
        near_pairs(lambda start, stop: vectors[start:stop], np.arange(5), 0.5)


def test_equal_hashes():
    hashes = pa.chunked_array([["b", "a", "b"], ["", "c", "", "a"]])
    assert equal_hashes(hashes).tolist() == [0, 1, 0, 3, 4, 5, 1]
    assert equal_hashes(pa.chunked_array([], pa.string())).tolist() == []


# ---- groups ----------------------------------------------------------------------------------------------------------


def slow_stars(labels, links):
    """Greedy, with sets."""
    neighbours = {}
    for first, second in links:
        a, b = labels[first], labels[second]
        if a != b:
            neighbours.setdefault(a, set()).add(b)
            neighbours.setdefault(b, set()).add(a)
    joined, left = {}, set(neighbours)
    for centre in sorted(neighbours, key=lambda group: (-len(neighbours[group]), group)):
        if centre in left:
            taken = ({centre} | neighbours[centre]) & left
            left -= taken
            joined |= dict.fromkeys(taken, centre)
    return [joined.get(label, label) for label in labels]


def test_stars_equal_the_slow_way():
    rng = np.random.default_rng(0)
    for links in (0, 1, 30, 200, 2000):
        first, second = rng.integers(0, 100, (2, links))
        labels = equal_hashes(pa.chunked_array([[str(i) for i in rng.integers(0, 60, 100)]]))
        got = star_groups(labels, first, second)
        assert got.tolist() == slow_stars(labels.tolist(), list(zip(first, second, strict=True)))
        for before in members(labels):  # joined as a whole
            assert len(set(got[before])) == 1


def test_a_chain_does_not_become_one_group():
    chain = np.arange(1000)
    groups = list(members(star_groups(chain, chain[:-1], chain[1:])))
    assert max(map(len, groups)) == 3
    assert min(map(len, groups)) >= 2
    for group in groups:  # each member is linked with the middle one
        assert group.max() - group.min() < 3


def test_a_hub_takes_all_it_is_linked_with():
    others = np.arange(1, 100_001)
    labels = star_groups(np.arange(100_001), np.zeros_like(others), others)
    assert (labels == 0).all()


def test_members_leave_out_what_stands_alone():
    assert [group.tolist() for group in members(np.array([0, 1, 0, 3, 1, 0]))] == [[0, 2, 5], [1, 4]]
    assert list(members(np.empty(0, np.int64))) == []


# ---- a store ---------------------------------------------------------------------------------------------------------


def test_vectors_of_a_store_by_position(tmp_path):
    store = Store.create(tmp_path / "store", None, ModelRef("m", "f", DIM))
    vectors = clustered(500)
    row = Row(path="", size=1, mtime_ns=1, hash="")
    with store.write() as writer:
        ids = [writer.add(replace(row, path=f"{i}.jpg"), vector) for i, vector in enumerate(vectors)]
        writer.commit()
        for i in range(0, 500, 3):
            writer.remove(ids[i])
    kept = np.flatnonzero(np.arange(500) % 3)
    block = stored_block(store.snapshot)
    np.testing.assert_array_equal(block(0, len(kept)), vectors[kept])
    np.testing.assert_array_equal(block(90, 210), vectors[kept][90:210])
    assert block(5, 5).shape == (0, DIM)
