"""The index folder: what goes in comes out, whoever reads, and whatever is in the way."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest

from indexes import segments
from indexes.errors import ModelMismatch, StoreCorrupt, StoreError, StoreLocked, StoreNotFound, VectorError
from indexes.manifest import Manifest
from indexes.segments import unit_rows
from indexes.store import Failure, ModelRef, Row, SourceRef, Store
from indexes.vectors import as_vectors
from tests.indexes.test_vectors import assert_same, brute

DIM = 8
MODEL = ModelRef("tiny", "ab" * 32, DIM)
ODD_NAMES = [
    "plain.jpg",
    "with space & 'quotes'\".jpg",
    "new\nline\ttab.jpg",
    "smörgås/日本/🐈.png",
    "e\u0301 and \xe9",  # the same letter, two spellings: two files
    os.fsdecode(b"latin1-\xe9\xff.jpg"),
    os.fsdecode(b"half \xf0\x9f emoji"),
    "-rf",
    "",
]


def unit(n: int, seed: int = 0):
    return as_vectors(np.random.default_rng(seed).standard_normal((n, DIM)))


def row(path: str, **fields) -> Row:
    return Row(**{"path": path, "size": 1, "mtime_ns": 2, "hash": "00ff", **fields})


def failure(path: str, reason: str = "cannot be read", **fields) -> Failure:
    return Failure(
        **{"path": path, "reason": reason, "when": datetime(2024, 5, 1, tzinfo=timezone.utc), "size": 3, "mtime_ns": 4}
        | fields
    )


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.create(tmp_path / "photos" / ".diptych", None, MODEL)


def fill(store: Store, n: int, seed: int = 0) -> list[int]:
    with store.write() as writer:
        return [writer.add(row(f"{seed}/{i}"), vector) for i, vector in enumerate(unit(n, seed))]


def widened(halves) -> np.ndarray:
    """What a store gives back for vectors it was given: rounded to float16, then made unit again."""
    return as_vectors(np.asarray(halves, np.float32).astype(np.float16))


def state(store: Store) -> tuple:
    return store.rows().to_pylist(), store.paths(), store.vectors().tobytes(), sorted(map(repr, store.failures()))


# ---- round trips -----------------------------------------------------------------------------------------------------


def test_every_field_and_name_comes_back(store):
    full = row(
        "full.jpg", kind="text", size=2**40, mtime_ns=1_700_000_000_123_456_789, hash="9" * 64, width=65500, height=1,
        taken_at=datetime(1999, 12, 31, 23, 59, 59, 7), latitude=-33.9, longitude=151.2, caption="a dog 🐕",
    )  # fmt: skip
    rows = [full, *map(row, ODD_NAMES)]
    vectors = unit(len(rows))
    with store.write() as writer:
        ids = [writer.add(one, vector) for one, vector in zip(rows, vectors, strict=True)]
    for one in (store, Store.open(store.path)):
        assert [one.row(i) for i in ids] == rows
        assert one.paths() == [r.path for r in rows]
        assert one.rows()["id"].to_pylist() == ids == sorted(set(ids))
        assert one.rows().column_names == [
            "id", "kind", "path", "path_bytes", "size", "mtime_ns", "hash", "width", "height", "taken_at", "latitude",
            "longitude", "caption",
        ]  # fmt: skip
        assert len(one) == len(rows)
        assert one.check() == []
        # The float64 lengths of as_vectors and the float32 ones of the store may differ in the last bit.
        np.testing.assert_allclose(one.vectors(), widened(vectors), atol=1e-7)
        assert np.abs(np.linalg.norm(one.vectors().astype(float), axis=1) - 1).max() < 1e-6
    assert store.rows()["path"].to_pylist()[6] == "latin1-��.jpg"
    assert [b is not None for b in store.rows()["path_bytes"].to_pylist()].count(True) == 2


def test_segments_are_the_parquet_that_the_design_names(store):
    import pyarrow.parquet as pq

    fill(store, 3)
    (file,) = (store.path / "segments").iterdir()
    table = pq.read_table(file)
    assert str(table.schema.field("embedding").type) == f"fixed_size_list<element: halffloat not null>[{DIM}]"
    np.testing.assert_array_equal(table["embedding"].to_pylist(), unit(3).astype(np.float16))


def test_text_that_is_no_text_is_kept_readable(store):
    with store.write() as writer:
        i = writer.add(row("a", caption="half \ud83d pair"), unit(1)[0])
        writer.fail(failure(os.fsdecode(b"\xff"), reason=os.fsdecode(b"no \xff")))
    assert store.row(i).caption == "half ? pair"
    assert store.failures() == [failure(os.fsdecode(b"\xff"), reason="no ?")]


def test_vectors_of_any_length_are_scored_as_cosines(store):
    with store.write() as writer:
        writer.add(row("a"), [3] + [0] * (DIM - 1))
        writer.add(row("b"), np.array([1e-3, 1e-3] + [0] * (DIM - 2)))
    hits = store.search([[0.5] + [0] * (DIM - 1)], 5)
    np.testing.assert_array_equal(hits.rows, [[0, 1]])
    np.testing.assert_allclose(hits.scores, [[1, np.sqrt(0.5)]], atol=1e-7)


def test_failures_are_replaced_and_forgiven(store):
    early = failure("b", when=datetime(2024, 1, 1, 12, tzinfo=timezone(timedelta(hours=2))))
    with store.write() as writer:
        for name in ODD_NAMES:
            writer.fail(failure(name))
        writer.fail(failure("a", "first"))
        writer.fail(failure("a", "second"))
        writer.fail(early)
        writer.forgive("never failed")
    assert {f.path for f in store.failures()} == {*ODD_NAMES, "a", "b"}
    assert {f.path: f.reason for f in store.failures()}["a"] == "second"
    assert early in store.failures()  # equal moments are equal, whatever their zone
    with store.write() as writer:
        for name in ODD_NAMES:
            writer.forgive(name)
        writer.forgive("b")
    assert Store.open(store.path).failures() == [failure("a", "second")]
    assert json.loads((store.path / "manifest.json").read_text())["counts"] == {"rows": 0, "failures": 1}


# ---- create, open, move ----------------------------------------------------------------------------------------------


def test_the_store_moves_with_its_folder(store, tmp_path):
    fill(store, 3)
    assert store.root == tmp_path / "photos"
    assert str(tmp_path) not in (store.path / "manifest.json").read_text()
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    moved = Store.open(tmp_path / "elsewhere" / ".diptych")
    assert moved.root == tmp_path / "elsewhere"
    assert len(moved) == 3


@pytest.mark.parametrize("name", ["photos", os.fsdecode(b"photos \xff")])
def test_a_store_outside_its_root_knows_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store.create(Path(name, "index"), Path(name), MODEL)
    fill(store, 1)
    store.rebuild_index("Flat")
    monkeypatch.chdir("/")
    again = Store.open(tmp_path / name / "index")
    assert again.root == tmp_path / name
    assert again.snapshot.covered == 1


def test_a_store_knows_where_its_rows_come_from(store, tmp_path):
    assert (store.source, Store.open(store.path).source) == (None, None)
    name = os.fsdecode(b"list \xff.csv")
    source = SourceRef("list", name, images="../photos")
    one = Store.create(tmp_path / "one", tmp_path, MODEL, source)
    assert Store.open(one.path).source == source
    read = replace(source, files=((name, 3, 1_700_000_000_123_456_789), ("b", -1, -1)))
    with one.write() as writer:
        writer.add(row("a"), unit(1)[0])
        writer.note_source(read)
        assert (committed(one), Store.open(one.path).source) == (1, read)
        generation = one.snapshot.manifest.generation
        writer.note_source(read)
        assert one.snapshot.manifest.generation == generation  # nothing new, nothing written
        writer.add(row("b"), unit(1)[0])
    one.rebuild_index("Flat")
    assert (Store.open(one.path).source, len(one)) == (read, 2)
    file = one.path / "manifest.json"  # of a release that knew no sources
    fields = json.loads(file.read_text())
    del fields["source"], fields["checksum"]
    file.write_text(json.dumps(fields))
    assert Store.open(one.path).source is None


def test_what_is_not_there_and_what_is_already(store, tmp_path):
    with pytest.raises(StoreNotFound, match="make one with"):
        Store.open(tmp_path / "nothing")
    with pytest.raises(StoreError, match="already"):
        Store.create(store.path, None, MODEL)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot be written"):
        Store.create(tmp_path / "file" / "store", None, MODEL)
    with pytest.raises(StoreNotFound):
        Store.open(tmp_path / "file")


def test_another_model_is_refused(store):
    store.check_model(MODEL.fingerprint, "any name")
    with pytest.raises(ModelMismatch, match="made with tiny, not with big: use --model tiny"):
        store.check_model("cd" * 32, "big")
    with pytest.raises(ModelMismatch, match="made with tiny in another version"):
        store.check_model("cd" * 32, "tiny")


# ---- searching -------------------------------------------------------------------------------------------------------


def test_random_histories_equal_a_dictionary(tmp_path):
    """Adds, removes, renames, changes, merges and rebuilds in random order, against a dict and brute force."""
    for seed in range(4):
        chance = random.Random(seed)
        store = Store.create(tmp_path / str(seed), tmp_path, MODEL)
        reader = Store.open(store.path)
        model: dict[int, tuple[str, bytes]] = {}
        for step in range(12):
            with store.write() as writer:
                for i in range(chance.choice([0, 1, 5, 120])):
                    action, some = chance.random(), chance.choice(list(model)) if model else None
                    vector = unit(1, chance.randrange(8))[0]  # few of them: ties everywhere
                    half = vector.astype(np.float16).tobytes()
                    if some is None or action < 0.5:
                        model[writer.add(row(f"{step} {i}"), vector)] = (f"{step} {i}", half)
                    elif action < 0.7:
                        writer.remove(some)
                        del model[some]
                    elif action < 0.85:
                        model[writer.replace(some, row(f"renamed {i}"))] = (f"renamed {i}", model.pop(some)[1])
                    else:
                        del model[some]
                        model[writer.replace(some, row(f"changed {i}"), vector)] = (f"changed {i}", half)
                    if chance.random() < 0.05:
                        writer.commit()
            if chance.random() < 0.3:
                store.rebuild_index("Flat")
            reader.refresh()
            for one in (store, reader, Store.open(store.path)):
                assert dict(zip(one.rows()["id"].to_pylist(), one.paths(), strict=True)) == {
                    i: path for i, (path, _) in model.items()
                }
                queries, k = unit(3, chance.randrange(10)), chance.choice([1, 4, 500])
                allowed = None if chance.random() < 0.5 else np.random.default_rng(step).random(len(model)) < 0.5
                assert_same(one.search(queries, k, allowed), brute(one.vectors(), queries, k, allowed))
                assert one.check() == []
            stored = [store.snapshot.halves(i).tobytes() for i in range(len(store))]
            assert stored == [model[i][1] for i in sorted(model)]


@pytest.mark.parametrize("n", [0, 1, 2, 50])
@pytest.mark.parametrize("kind", [None, "Flat", "HNSW32", "SQ8", "IVF1,Flat"])
def test_every_size_with_and_without_a_faiss_file(store, n, kind):
    fill(store, n)
    if kind:
        try:
            store.rebuild_index(kind)
        except VectorError:
            assert kind == "IVF1,Flat"
            assert n < 39
        store = Store.open(store.path)
        assert store.snapshot.covered in (n, 0)
    queries = unit(4, seed=9)
    for k in (1, 7, 100):  # all rows fit what these kinds visit, so even the approximate ones find the best
        expected = brute(store.vectors(), queries, k)
        if kind != "SQ8":
            assert_same(store.search(queries, k), expected)
    none = np.zeros(n, bool)
    assert (store.search(queries, 3, none).rows == -1).all()
    assert store.search(queries, 3, none).rows.shape == (4, min(3, n))


@pytest.mark.parametrize("kind", ["Flat", "SQfp16", "HNSW32", "IVF4,Flat", "PQ4x4fs"])
def test_covered_newer_and_deleted_rows_are_merged(store, kind):
    ids = fill(store, 700)
    store.rebuild_index(kind)
    with store.write() as writer:
        for i in ids[::7]:
            writer.remove(i)
        for vector in unit(40, seed=0):  # the same vectors as the first rows
            last = writer.add(row("newer"), vector)
        writer.remove(last)
        writer.remove(writer.add(row("gone"), unit(1)[0]))
        writer.replace(ids[1], row("renamed"))
    store = Store.open(store.path)
    vectors, queries = store.vectors(), unit(5, seed=1)
    store = Store.open(store.path)  # without vectors in memory: hits are scored from single row groups
    assert store.snapshot.covered == 700 - 100 - 1
    assert len(store) == 700 - 100 + 39
    masks = [None] + [np.random.default_rng(2).random(len(store)) < share for share in (0.01, 0.5)]
    for mask in masks:
        hits = store.search(queries, 12, mask)
        best = brute(vectors, queries, 12, mask)
        assert ((hits.rows >= 0) == (best.rows >= 0)).all()  # never fewer than there are
        for rows, scores, query in zip(hits.rows, hits.scores, queries, strict=True):
            rows = rows[rows >= 0]
            true = np.float32((vectors[rows].astype(float) * query).sum(axis=1))
            np.testing.assert_array_equal(scores[: len(rows)], true)
            np.testing.assert_array_equal(rows, rows[np.lexsort((rows, -true))])
        if kind == "Flat":
            assert_same(hits, best)
        assert (hits.scores + 1).mean() >= 0.8 * (best.scores + 1).mean()


def test_a_few_vectors_are_read_without_the_rest(store, monkeypatch):
    monkeypatch.setattr("indexes.segments._GROUP", 7)
    fill(store, 300)
    store.rebuild_index("Flat")
    fill(store, 20, seed=1)
    with store.write() as writer:
        for i in range(0, 300, 11):
            writer.remove(i)
    store = Store.open(store.path)
    hits = store.search(unit(2, 5), 4)
    assert "vectors" not in vars(store.snapshot)
    halves = [store.snapshot.halves(i) for i in range(len(store))]
    np.testing.assert_allclose(store.vectors(), widened(halves), atol=1e-7)
    np.testing.assert_array_equal(halves, np.concatenate([
        np.delete(unit(300), range(0, 300, 11), axis=0), unit(20, seed=1)
    ]).astype(np.float16))  # fmt: skip
    assert_same(hits, brute(store.vectors(), unit(2, 5), 4))


def test_search_refuses_what_it_cannot_compare(store):
    fill(store, 3)
    with pytest.raises(VectorError, match="width 8"):
        store.search(np.ones((1, 5)), 1)
    with pytest.raises(VectorError, match="zero"):
        store.search(np.zeros((1, DIM)), 1)
    with pytest.raises(ValueError, match="3 booleans"):
        store.search(unit(1), 1, np.ones(2, bool))


@pytest.mark.parametrize("damage", ["delete", "truncate", "garbage", "empty", "other rows", "folder"])
def test_without_a_good_faiss_file_search_is_exact(store, damage, tmp_path):
    fill(store, 50)
    store.rebuild_index("Flat")
    file = store.path / "vectors.faiss"
    assert Store.open(store.path).snapshot.covered == 50
    content = file.read_bytes()
    file.unlink()
    if damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "garbage":
        file.write_bytes(b"x" * len(content))
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "folder":
        file.mkdir()
    elif damage == "other rows":
        other = Store.create(tmp_path / "other", tmp_path, MODEL)
        fill(other, 49)
        other.rebuild_index("Flat")
        shutil.copy(other.path / "vectors.faiss", file)
    again = Store.open(store.path)
    assert_same(again.search(unit(3, 5), 10), brute(again.vectors(), unit(3, 5), 10))
    assert again.snapshot.covered == 0
    if damage != "folder":
        again.rebuild_index()
        assert Store.open(store.path).snapshot.covered == 50


def test_a_reader_never_takes_a_new_faiss_file_for_the_old_one(store):
    """The same number of rows, other rows: only the manifest can tell."""
    ids = fill(store, 50)
    store.rebuild_index("Flat")
    reader = Store.open(store.path)  # has not read the FAISS file yet
    with store.write() as writer:
        writer.remove(ids[0])
        writer.add(row("new"), unit(1, 77)[0])
    store.rebuild_index()
    assert reader.snapshot.manifest.ann.rows == store.snapshot.manifest.ann.rows == 50
    assert_same(reader.search(unit(3, 5), 10), brute(reader.vectors(), unit(3, 5), 10))
    assert reader.snapshot.covered == 0


def test_a_failed_rebuild_changes_nothing(store):
    fill(store, 20)
    store.rebuild_index("Flat")
    before = (store.path / "manifest.json").read_bytes()
    for kind in ("IVF64,Flat", "Flatt"):
        with pytest.raises(VectorError, match=kind):
            store.rebuild_index(kind)
    assert (store.path / "manifest.json").read_bytes() == before
    assert Store.open(store.path).snapshot.covered == 20


def test_a_rebuild_killed_before_its_last_step(store, monkeypatch):
    fill(store, 20)
    store.rebuild_index("Flat")
    write = Manifest.write

    def killed(self, folder):
        if self.ann and self.ann.rows:
            raise KeyboardInterrupt
        write(self, folder)

    monkeypatch.setattr(Manifest, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        store.rebuild_index("SQ8")
    again = Store.open(store.path)
    assert again.snapshot.covered == 0  # the file is the new one, and nothing speaks of it yet
    assert again.check() == []
    assert_same(again.search(unit(3, 5), 10), brute(again.vectors(), unit(3, 5), 10))


def test_when_the_faiss_file_is_stale(store, monkeypatch):
    monkeypatch.setattr("indexes.store._STALE_ROWS", 50)
    fill(store, 300)
    assert not store.index_is_stale()  # nobody asked for one
    store.rebuild_index("SQ8")
    assert not store.index_is_stale()
    fill(store, 50, seed=1)
    assert not store.index_is_stale()
    fill(store, 1, seed=2)
    assert store.index_is_stale()
    store.rebuild_index()
    assert store.snapshot.manifest.ann.factory == "SQ8"
    assert not store.index_is_stale()
    (store.path / "vectors.faiss").unlink()
    assert store.index_is_stale()


# ---- writing ---------------------------------------------------------------------------------------------------------


def committed(store: Store) -> int:
    return len(Store.open(store.path))


def test_commits_by_itself_after_100_changes_or_2_seconds(store, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("indexes.writer.time.monotonic", lambda: now[0])
    with store.write() as writer:
        for i, vector in enumerate(unit(99)):
            writer.add(row(str(i)), vector)
        assert committed(store) == 0
        writer.add(row("99"), unit(1)[0])
        assert committed(store) == 100
        writer.add(row("100"), unit(1)[0])
        now[0] += 1.9
        writer.add(row("101"), unit(1)[0])
        assert committed(store) == 100
        now[0] += 0.1
        writer.add(row("102"), unit(1)[0])
        assert committed(store) == 103
        writer.remove(0)
        now[0] += 2
        assert committed(store) == 103
        writer.forgive("x")
        assert committed(store) == 102
        writer.add(row("103"), unit(1)[0])
        writer.commit()
        assert committed(store) == 103
        assert len(store) == 103
    generation = store.snapshot.manifest.generation
    with store.write() as writer:
        writer.commit()
    assert Manifest.read(store.path).generation == generation  # nothing to write, nothing written


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_leaving_by_an_exception_commits(store, error):
    def leave() -> None:
        with store.write() as writer:
            writer.add(row("a"), unit(1)[0])
            raise error

    with pytest.raises(error):
        leave()
    assert Store.open(store.path).paths() == ["a"]
    with store.write():  # the lock is free again
        pass


def test_replace_is_one_commit_and_keeps_the_bits(store, monkeypatch):
    vector = unit(1)[0]
    with store.write() as writer:
        first = writer.add(row("a"), vector)
    half = store.snapshot.halves(0).tobytes()
    states = []
    write = Manifest.write
    monkeypatch.setattr(
        Manifest, "write", lambda self, path: (write(self, path), states.append(Store.open(path).paths()))
    )
    for i in range(5):
        with store.write() as writer:
            second = writer.replace(first, row(f"renamed {i}", size=i))
            first = writer.replace(second, row(f"again {i}", size=i))  # of a row that is still buffered
    assert states == [[f"again {i}"] for i in range(5)]
    assert store.snapshot.halves(0).tobytes() == half == vector.astype(np.float16).tobytes()
    assert store.row(first) == row("again 4", size=4)


def test_refused_changes_leave_no_trace(store):
    with store.write() as writer:
        i = writer.add(row("a"), unit(1)[0])
        writer.commit()
        for vector, said in (
            (np.zeros(DIM), "zero.*: b$"),
            (np.full(DIM, np.nan), "NaN"),
            (np.ones(3), "width 8"),
            (1, "8"),
        ):
            with pytest.raises(VectorError, match=said):
                writer.add(row("b"), vector)
            with pytest.raises(VectorError, match=said):
                writer.replace(i, row("b"), vector)
        for wrong in (row("b", size="x"), row("b", taken_at="noon"), row("b", size=2**70), row(None)):
            with pytest.raises((ValueError, TypeError, OverflowError, AttributeError)):
                writer.add(wrong, unit(1)[0])
            with pytest.raises((ValueError, TypeError, OverflowError, AttributeError)):
                writer.replace(i, wrong)
        for unknown in (-1, i + 1, 10**9):
            with pytest.raises(KeyError):
                writer.remove(unknown)
            with pytest.raises(KeyError):
                writer.replace(unknown, row("b"))
        writer.remove(i)
        with pytest.raises(KeyError):
            writer.remove(i)
        with pytest.raises(KeyError):
            writer.replace(i, row("b"))
    with pytest.raises(KeyError):
        store.row(i)
    assert (len(store), store.paths(), store.check()) == (0, [], [])


def test_many_small_commits_stay_few_segments(store):
    rng = random.Random(0)
    n = 0
    for _ in range(80):
        with store.write() as writer:
            for _ in range(rng.choice([1, 1, 1, 30])):
                writer.add(row(str(n)), unit(1, n)[0])
                n += 1
        assert len(store.snapshot.segments) <= 17
    assert store.paths() == [str(i) for i in range(n)]
    np.testing.assert_allclose(store.vectors(), widened(np.concatenate([unit(1, i) for i in range(n)])), atol=1e-7)
    named = {segment.file for segment in store.snapshot.manifest.segments}
    assert {file.name for file in (store.path / "segments").iterdir()} == named
    assert store.check() == []


def test_small_commits_leave_what_the_faiss_file_covers(store):
    fill(store, 30)
    store.rebuild_index("Flat")
    for i in range(60):
        fill(store, 1, seed=i)
    assert store.snapshot.covered == 30
    assert len(store.snapshot.segments) <= 18
    assert_same(store.search(unit(3, 5), 40), brute(store.vectors(), unit(3, 5), 40))


def test_deleted_rows_are_swept_up_when_they_are_many(store, monkeypatch):
    monkeypatch.setattr("indexes.writer._TOMBSTONES", 20)
    ids = fill(store, 300)
    store.rebuild_index("Flat")
    with store.write() as writer:
        for i in ids[::3]:
            writer.remove(i)
    manifest = store.snapshot.manifest
    assert (manifest.rows, manifest.wanted.factory, manifest.ann) == (200, "Flat", None)
    assert len(manifest.tombstones) <= 75
    with store.write() as writer:
        for i in set(ids) - set(ids[::3]):
            writer.remove(i)
    assert (len(store), store.check(), store.rows().num_rows) == (0, [], 0)


# ---- several at once -------------------------------------------------------------------------------------------------


def test_readers_see_one_state_until_they_refresh(store):
    fill(store, 40)
    lazy, eager = Store.open(store.path), Store.open(store.path)
    before = state(eager)
    with store.write() as writer:
        for i in range(0, 40, 2):
            writer.remove(i)
    for i in range(40):  # merges segments, and deletes those that the readers have open
        fill(store, 1, seed=i)
    store.rebuild_index("Flat")
    assert state(eager) == before
    assert state(lazy)[:3] == before[:3]
    assert lazy.refresh()
    assert not lazy.refresh()
    assert state(lazy) == state(store)


def test_a_segment_deleted_between_manifest_and_opening(store, monkeypatch):
    fill(store, 5)
    old = Manifest.read(store.path)
    for i in range(20):
        fill(store, 1, seed=i)
    answers = [old, Manifest.read(store.path)]
    read = Manifest.read
    monkeypatch.setattr(Manifest, "read", lambda folder: answers.pop(0) if answers else read(folder))
    assert len(Store.open(store.path)) == 25


def test_a_store_made_anew_under_an_open_reader(store):
    fill(store, 5)
    shutil.rmtree(store.path)
    new = Store.create(store.path, None, MODEL)
    fill(new, 5, seed=1)
    store.refresh()
    np.testing.assert_array_equal(store.vectors(), new.vectors())
    assert store.paths() == new.paths()


def test_one_writer_at_a_time(store):
    with store.write(), pytest.raises(StoreLocked, match="another process is writing"), Store.open(store.path).write():
        pass
    code = """
import sys
from pathlib import Path
from indexes.store import Store
with Store.open(Path(sys.argv[1])).write() as writer:
    print("locked", flush=True)
    sys.stdin.readline()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(store.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout.readline() == b"locked\n"
    with pytest.raises(StoreLocked), store.write():
        pass
    assert len(store.search(unit(1), 3).rows) == 1  # readers need no lock
    child.stdin.close()  # it ends on its own while we wait
    with store.write(wait=30) as writer:
        writer.add(row("after"), unit(1)[0])
    assert child.wait() == 0
    assert store.paths() == ["after"]


# ---- damage ----------------------------------------------------------------------------------------------------------


def edited(**changes):
    """As releases wrote it that knew no checksum: other values are noticed by what they say."""

    def edit(text):
        fields = {**json.loads(text), **changes}
        del fields["checksum"]
        return json.dumps(fields)

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "null",
        lambda text: "\0" * len(text),
        lambda text: "[" * 100_000,
        edited(unknown=1),
        edited(format="1"),
        edited(format=0),
        edited(next_id="x"),
        edited(next_id=None),
        edited(segments=[{"file": "../../x.parquet", "rows": 3, "sha256": ""}]),
        edited(segments=[{"file": "00000001.parquet", "rows": -3, "sha256": ""}]),
        edited(segments=[1]),
        edited(segments=None),
        edited(tombstones=[0, 1, 2, 3, 4]),
        edited(tombstones=["a"]),
        edited(root=3),
        edited(model={"name": "tiny"}),
        edited(model={"name": "tiny", "fingerprint": "", "dim": "8"}),
        edited(ann={"factory": "Flat", "segments": 1, "rows": 99, "sha256": ""}),
        edited(source=[]),
        edited(source={"kind": "list", "path": "a", "images": 3, "files": []}),
        edited(source={"kind": "list", "path": "a", "images": None, "files": [["a", 1]]}),
        edited(source={"kind": "list"}),
    ],
)
def test_damaged_manifest(store, edit):
    fill(store, 3)
    file = store.path / "manifest.json"
    file.write_text(edit(file.read_text()))
    with pytest.raises(
        StoreCorrupt, match=r"manifest\.json is damaged \(.*\): delete the folder .* and index again"
    ) as e:
        Store.open(store.path)
    assert "\n" not in str(e.value)


def test_manifest_of_a_newer_release(store):
    file = store.path / "manifest.json"
    file.write_text(json.dumps({"format": 3, "anything": "else"}))
    with pytest.raises(StoreError, match="format 3, and this release reads up to 2: upgrade diptych"):
        Store.open(store.path)


@pytest.mark.parametrize("damage", ["delete", "truncate", "cut", "garbage", "empty", "swap", "bits"])
def test_damaged_segment(store, damage, tmp_path):
    fill(store, 30)
    (file,) = (store.path / "segments").iterdir()
    content = file.read_bytes()
    new = {
        "truncate": content[: len(content) // 2], "cut": content[:-1], "garbage": b"x" * len(content), "empty": b"",
    }  # fmt: skip
    if damage == "delete":
        file.unlink()
    elif damage == "swap":
        other = Store.create(tmp_path / "other", tmp_path, replace(MODEL, dim=9))
        with other.write() as writer:
            for i in range(30):
                writer.add(row(str(i)), np.ones(9))
        shutil.copy(next((other.path / "segments").iterdir()), file)
    elif damage == "bits":
        position = content.index(unit(30).astype(np.float16).tobytes())
        file.write_bytes(content[:position] + b"\xff" * 16 + content[position + 16 :])
    else:
        file.write_bytes(new[damage])
    with pytest.raises(
        StoreCorrupt, match=rf"{file.name} is .*take in again what is still there with  diptych index --repair$"
    ) as caught:
        Store.open(store.path).search(unit(1), 3)
    assert "\n" not in str(caught.value)
    wrong = store.check()
    assert len(wrong) >= 1
    assert str(file) in wrong[0]


def test_check_finds_one_changed_bit_anywhere(store):
    fill(store, 30)
    store.rebuild_index("Flat")
    (segment,) = (store.path / "segments").iterdir()
    for file in (segment, store.path / "vectors.faiss"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        assert any(str(file) in line for line in Store.open(store.path).check())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        assert Store.open(store.path).check() == []


def test_damaged_failures(store):
    with store.write() as writer:
        writer.fail(failure("a"))
    file = store.path / "failures.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(StoreCorrupt, match=r"failures\.parquet is damaged"):
        store.failures()
    assert any("failures.parquet" in line for line in store.check())
    file.unlink()
    assert store.failures() == []


def test_halves_are_widened_as_numpy_does_it():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    assert np.array_equal(segments.widened(finite).view(np.uint32), finite.astype(np.float32).view(np.uint32))
    assert (np.abs(segments.widened(every[~np.isfinite(every)])) >= 65_536).all()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 0])
def test_a_stored_vector_that_is_none_is_damage(wrong):
    halves = unit(5).astype(np.float16)
    assert unit_rows(halves, Path("some.parquet")) == pytest.approx(unit(5), abs=1e-3)
    halves[3, :] = 0
    halves[3, 2] = wrong
    with pytest.raises(StoreCorrupt, match=r"some\.parquet"):
        unit_rows(halves, Path("some.parquet"))
