"""A disk that is really full: one plain line, nothing is lost, and writing goes on once there is room."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pytest

from indexes import writer as module
from indexes.errors import StoreError
from indexes.exchange import find_parts, import_parts
from indexes.export import export_clip_retrieval, export_npy
from indexes.store import ModelRef, Row, Store
from indexes.vectors import as_vectors
from tests.indexes.test_vectors import assert_same, brute
from tests.mounts import full, small_disk

DIM = 256
MODEL = ModelRef("tiny", "ab" * 32, DIM)


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk") as place:
        yield place


@pytest.fixture
def store(disk) -> Store:
    """300 rows: 150 kB of vectors."""
    store = Store.create(disk / "index", disk, MODEL)
    with store.write() as writer:
        writer.add_many(columns(300), vectors(0, 300))
    return store


def vectors(first: int, count: int):
    return np.stack([np.random.default_rng(i).standard_normal(DIM) for i in range(first, first + count)])


def columns(count: int) -> pa.Table:
    numbers = list(range(count))
    return pa.table(
        {"path": [f"{i}.jpg" for i in numbers], "size": numbers, "mtime_ns": numbers, "hash": ["0"] * count}
    )


def refused(place, act) -> None:
    with pytest.raises(StoreError, match=rf"{re.escape(str(place))} cannot be written \(No space left on device\).*$"):
        act()


def assert_whole(store: Store, count: int) -> None:
    for one in (store, Store.open(store.path)):
        assert len(one) == count
        assert one.rows()["id"].to_pylist() == list(range(count))
        stored = as_vectors(as_vectors(vectors(0, count)).astype(np.float16))
        np.testing.assert_allclose(one.vectors(), stored, atol=1e-7)
        queries = as_vectors(vectors(900, 2))
        assert_same(one.search(queries, 5), brute(one.vectors(), queries, 5))
    assert store.check() == []
    assert not list(store.path.rglob("*.tmp"))


def add_rows(store: Store, first: int, count: int) -> None:
    with store.write() as writer:
        for i, vector in enumerate(vectors(first, count), first):
            writer.add(Row(path=f"{i}.jpg", size=i, mtime_ns=i, hash="0"), vector)


@pytest.mark.parametrize("left", [0, 8192, 16384])
def test_adding(store, disk, left):
    with full(disk, left):
        refused(store.path, lambda: add_rows(store, 300, 50))
        assert_whole(store, 300)

        def add_many() -> None:
            with store.write() as writer:
                writer.add_many(columns(100), vectors(300, 100))

        refused(store.path, add_many)
        assert_whole(store, 300)
    add_rows(store, 300, 50)
    assert_whole(store, 350)


def test_merging(store, disk, monkeypatch):
    """There is room for what is new and none for a merge: that waits, and nobody has to hear of it."""
    monkeypatch.setattr(module, "_SEGMENTS", 2)
    add_rows(store, 300, 20)
    with full(disk, left=60_000):
        add_rows(store, 320, 60)
        assert len(store.snapshot.segments) == 3
        assert_whole(store, 380)
    add_rows(store, 380, 1)
    assert len(store.snapshot.segments) == 2
    assert_whole(store, 381)


def test_deleting_needs_little_room(store, disk):
    with full(disk, left=8192), store.write() as writer:
        for i in range(290, 300):
            writer.remove(i)
    assert_whole(store, 290)


@pytest.mark.parametrize("left", [0, 8192, 100_000, 260_000])
def test_rebuilding(store, disk, left):
    store.rebuild_index("Flat")
    add_rows(store, 300, 80)
    with full(disk, left):
        refused(store.path, lambda: store.rebuild_index("Flat"))
        assert_whole(store, 380)
    store.rebuild_index("Flat")
    assert Store.open(store.path).snapshot.covered == 380
    assert_whole(store, 380)


@pytest.mark.parametrize("left", [0, 8192, 100_000])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("export", [export_npy, export_clip_retrieval])
def test_exporting(store, disk, export, dtype, left):
    """Vectors are written through a map: where that met a full disk, the system would end the process."""
    target = disk / "out"
    with full(disk, left):
        refused(target, lambda: export(store, target, dtype))
        assert {each.name for each in disk.iterdir()} == {"index", "filler"}
        assert_whole(store, 300)
    export(store, target, dtype)
    assert_whole(store, 300)


@pytest.mark.parametrize("left", [0, 8192, 100_000])
def test_importing(store, disk, tmp_path, left):
    export_npy(store, tmp_path / "out")
    parts = find_parts(tmp_path / "out")
    target = disk / "again"
    with full(disk, left):
        refused(target, lambda: import_parts(parts, target, disk, MODEL))
        assert {each.name for each in disk.iterdir()} == {"index", "filler"}
    import_parts(parts, target, disk, MODEL)
    again = Store.open(target)
    np.testing.assert_array_equal(again.vectors(), store.vectors())
    assert again.check() == []
