"""Rows in bulk, many deletions, and merging: what they hold, what they cost, and where they may be cut off."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime

import numpy as np
import pyarrow as pa
import pytest

from indexes import writer as module
from indexes.errors import ColumnError, StoreCorrupt, VectorError
from indexes.manifest import Manifest
from indexes.segments import ROW_SCHEMA, _regrouped, write_deleted
from indexes.snapshot import joined
from indexes.store import ModelRef, Row, Store
from tests.indexes.test_crash import Disk, interrupt
from tests.indexes.test_store import DIM, MODEL, ODD_NAMES, fill, row, state, unit, widened


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.create(tmp_path / "photos" / ".diptych", None, MODEL)


def columns(n: int, prefix: str = "") -> pa.Table:
    return pa.table({
        "path": [f"{prefix}{i}.jpg" for i in range(n)], "size": np.arange(n), "mtime_ns": np.arange(n),
        "hash": [f"{i:x}" for i in range(n)],
    })  # fmt: skip


def files(store: Store) -> set[str]:
    return {str(file.relative_to(store.path)) for file in store.path.rglob("*") if file.is_file()}


def assert_tidy(store: Store) -> None:
    """On the disk lies what the manifest names, and nothing else."""
    manifest = Manifest.read(store.path)
    named = {f"segments/{segment.file}" for segment in manifest.segments}
    named |= {manifest.deleted.file} if manifest.deleted else set()
    assert files(store) - {"failures.parquet", "vectors.faiss"} == named | {"manifest.json", "write.lock"}


# ---- many rows at once -----------------------------------------------------------------------------------------------


def test_many_rows_equal_as_many_single_ones(store, tmp_path):
    taken = datetime(1999, 12, 31, 23, 59, 59, 7)
    rows = [
        row(name, kind="text" if i % 2 else "image", width=i or None, taken_at=taken if i % 3 else None, caption=name)
        for i, name in enumerate(ODD_NAMES)
    ]
    vectors = unit(len(rows)) * np.arange(1, len(rows) + 1)[:, None]
    with store.write() as writer:
        ids = [writer.add(one, vector) for one, vector in zip(rows, vectors, strict=True)]
    many = Store.create(tmp_path / "many", tmp_path, MODEL)
    with many.write() as writer:
        assert writer.add_many(store.rows().drop_columns(["id"]), vectors).tolist() == ids
        assert len(Store.open(many.path)) == len(rows)  # committed, without leaving the block
    assert state(many)[:3] == state(store)[:3]
    assert [many.row(i) for i in ids] == [store.row(i) for i in ids]
    assert many.check() == []


def test_many_rows_between_others(store, monkeypatch):
    monkeypatch.setattr(module, "_SLAB", 7)
    with store.write() as writer:
        first = writer.add(row("first"), unit(1)[0])
        ids = writer.add_many(columns(20), unit(20))
        assert writer.add_many(columns(0), np.empty((0, DIM))).tolist() == []
        writer.remove(int(ids[3]))
        last = writer.replace(int(ids[4]), row("last"))
    assert (first, ids.tolist(), last) == (0, list(range(1, 21)), 21)
    assert store.paths() == ["first", *(f"{i}.jpg" for i in range(20) if i not in (3, 4)), "last"]
    expected = np.concatenate([unit(1), np.delete(unit(20), (3, 4), axis=0), unit(20)[4:5]])
    np.testing.assert_allclose(store.vectors(), widened(expected), atol=1e-7)
    assert store.check() == []


def test_columns_are_cast_and_completed(store, tmp_path):
    np.save(tmp_path / "vectors.npy", unit(3).astype(np.float64))
    given = pa.table({
        "hash": pa.array(["a", "b", "a"]).dictionary_encode(),
        "path": pa.array([b"x", b"y", "ä".encode()], pa.binary()),
        "size": pa.array([1, 2, 3], pa.uint8()),
        "mtime_ns": pa.chunked_array([[1], [2, 3]]),
        "taken_at": pa.array([datetime(2020, 1, 1), None, None], pa.timestamp("ns")),
        "width": pa.array([None, None, None], pa.null()),
    })  # fmt: skip
    with store.write() as writer:
        writer.add_many(given, np.load(tmp_path / "vectors.npy", mmap_mode="r"))
    assert store.rows().schema.equals(ROW_SCHEMA)
    assert [store.row(i) for i in range(3)] == [
        Row(path="x", size=1, mtime_ns=1, hash="a", taken_at=datetime(2020, 1, 1)),
        Row(path="y", size=2, mtime_ns=2, hash="b"),
        Row(path="ä", size=3, mtime_ns=3, hash="a"),
    ]


def test_extra_columns_of_many_rows_equal_those_of_single_ones(store, tmp_path):
    when = datetime(2024, 5, 1)
    values = [{"stars": 3, "by": "Ann"}, {}, {"tags": ["a", "b"], "at": when}, {"stars": 4.5, "ok": True}]
    with store.write() as writer:
        for i, extra in enumerate(values):
            writer.add(Row(path=f"{i}.jpg", size=i, mtime_ns=i, hash=f"{i:x}", columns=extra), unit(1, i)[0])
    many = Store.create(tmp_path / "many", tmp_path, MODEL)
    given = columns(4)
    for name in ("stars", "by", "tags", "at", "ok", "nothing"):
        given = given.append_column(name, pa.array([one.get(name) for one in values]))
    with many.write() as writer:
        writer.add_many(given, np.concatenate([unit(1, i) for i in range(4)]))
    assert many.rows().equals(store.rows())
    assert many.schema.names == [*ROW_SCHEMA.names, "stars", "by", "tags", "at", "ok"]
    for one in (store, many):
        assert [one.row(i).columns for i in range(4)] == [{**values[0], "stars": 3.0}, *values[1:]]
        with one.write() as writer:  # the next segment: other columns, other kinds
            writer.add(row("text", columns={"stars": "many", "by": "Bob"}), unit(1, 9)[0])
            kept = writer.replace(2, replace(one.row(2), path="moved"))
        assert one.row(0).columns == {"stars": "3", "by": "Ann"}  # as in `rows`
        assert one.row(kept).columns == values[2]
        assert one.check() == []
    assert many.rows().equals(store.rows())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"path": None}, "path must be there, and without nulls"),
        ({"path": pa.array(["a", None])}, "path must be there, and without nulls"),
        ({"kind": pa.array(["image", None])}, "kind must be there, and without nulls"),
        ({"id": pa.array([5, 6])}, "cannot be called 'id'"),
        ({"embedding": pa.array([5, 6])}, "cannot be called 'embedding'"),
        ({"": pa.array([5, 6])}, "a name is text, and not empty"),
        ({"size": pa.array(["x", "1"])}, "x"),
        ({"size": pa.array([1.5, 2])}, "truncated"),
        ({"size": pa.array([2**63, 1], pa.uint64())}, "not in range"),
        ({"hash": pa.array([[1], [2]])}, "hash cannot be made string"),
        ({"path": pa.array([b"\xff", b"a"])}, "UTF8"),
    ],
)
def test_refused_columns_leave_no_trace(store, change, said):
    given = dict(zip(columns(2).column_names, columns(2).columns, strict=True)) | change
    before = files(store)
    with store.write() as writer, pytest.raises((ValueError, TypeError, ColumnError), match=said):
        writer.add_many(pa.table({name: column for name, column in given.items() if column is not None}), unit(2))
    assert (len(store), store.snapshot.manifest.next_id, files(store) - {"write.lock"}) == (
        0,
        0,
        before - {"write.lock"},
    )


def test_refused_vectors_leave_no_trace(store, monkeypatch):
    monkeypatch.setattr(module, "_SLAB", 4)
    monkeypatch.setattr("indexes.segments._GROUP", 4)
    bad = unit(10)
    bad[9] = 0  # in the third slab: two are on the disk by then
    with store.write() as writer:
        kept = writer.add(row("kept"), unit(1)[0])
        for vectors, error, said in (
            (bad, VectorError, "zero.*: 9.jpg"),
            (unit(9), ValueError, "10 rows cannot have 9 vectors"),
            (np.ones((10, 3)), VectorError, "width 8"),
            (np.ones(10), VectorError, "width 8"),
        ):
            with pytest.raises(error, match=said):
                writer.add_many(columns(10), vectors)
        with pytest.raises(ValueError, match="twice"):
            writer.add_many(pa.table([[1], [1]], names=["size", "size"]), unit(1))
        after = writer.add(row("after"), unit(1)[0])
    assert (kept, after) == (0, 1)
    assert (store.paths(), store.check()) == (["kept", "after"], [])
    assert_tidy(store)


@pytest.mark.parametrize("before", [True, False])
def test_ctrl_c_at_every_step_of_a_bulk_load(tmp_path, before):
    """All of it or nothing, and no id twice."""
    outcomes = set()
    for at in range(1, 100):
        store = Store.create(tmp_path / f"{before}{at}", tmp_path, MODEL)
        with pytest.MonkeyPatch.context() as patch, store.write() as writer:
            writer.add(row("buffered"), unit(1)[0])
            disk = Disk(patch, interrupt, at, before)
            try:
                writer.add_many(columns(5), unit(5))
            except KeyboardInterrupt:
                outcomes.add("interrupted")
            patch.undo()
            writer.add(row("next"), unit(1)[0])
        names = Store.open(store.path).paths()
        assert names[0] == "buffered"
        assert names[-1] == "next"
        assert names[1:-1] in ([], columns(5)["path"].to_pylist())
        outcomes.add(len(names))
        assert store.check() == []
        if disk.calls < at:
            break
    assert at == 13  # two commits of two files, each fsync, rename, fsync of the folder
    assert outcomes == {"interrupted", 2, 7}


# ---- many deletions --------------------------------------------------------------------------------------------------


def test_many_deleted_ids_stand_in_a_file(store):
    with store.write() as writer:
        ids = writer.add_many(columns(6000), unit(6000)).tolist()
    gone = random.Random(0).sample(ids, 1400)
    with store.write() as writer:
        for i in gone[:1000]:
            writer.remove(i)
    assert (len(store.snapshot.manifest.tombstones), store.snapshot.manifest.deleted) == (1000, None)
    with store.write() as writer:
        for i in gone[1000:1300]:
            writer.remove(i)
    filed = store.snapshot.manifest.deleted
    assert (store.snapshot.manifest.tombstones, filed.rows) == ((), 1300)
    reader = Store.open(store.path)
    with store.write() as writer:
        for i in gone[1300:]:
            writer.remove(i)
        with pytest.raises(KeyError):
            writer.remove(gone[5])
    assert store.snapshot.manifest.tombstones == tuple(sorted(gone[1300:]))
    assert store.snapshot.manifest.deleted == filed  # few more: the file stays
    for one, left in ((store, gone), (reader, gone[:1300]), (Store.open(store.path), gone)):
        expected = sorted(set(ids) - set(left))
        assert one.snapshot.ids.tolist() == one.columns("id")["id"].to_pylist() == expected
        assert one.paths() == [f"{i}.jpg" for i in expected]
        assert one.check() == []
        assert len(one) == len(expected)
    np.testing.assert_allclose(store.vectors(), widened(np.delete(unit(6000), gone, axis=0)), atol=1e-7)
    assert len((store.path / "manifest.json").read_bytes()) < 3000
    assert (store.path / filed.file).stat().st_size < 4 * 1400
    assert_tidy(store)

    store.rebuild_index("Flat")  # merges everything
    assert (store.snapshot.manifest.tombstones, store.snapshot.manifest.deleted) == ((), None)
    assert store.paths() == [f"{i}.jpg" for i in sorted(set(ids) - set(gone))]
    assert_tidy(store)
    assert reader.paths() == [f"{i}.jpg" for i in sorted(set(ids) - set(gone[:1300]))]


@pytest.mark.parametrize("step", [1, 3, 40])
def test_random_deletions_and_merges_equal_a_set(store, monkeypatch, step):
    """Ids that wander from the manifest into the file, and out of both with their segments."""
    monkeypatch.setattr(module, "_TOMBSTONES", 12)
    monkeypatch.setattr(module, "_SEGMENTS", 3)
    chance = random.Random(step)
    model: set[int] = set()
    seen = set()
    for _ in range(60):
        with store.write() as writer:
            for _ in range(chance.choice([1, step])):
                model.add(writer.add(row("x"), unit(1)[0]))
            for i in chance.sample(sorted(model), chance.randrange(len(model)) // chance.choice([2, 9])):
                writer.remove(i)
                model.remove(i)
        manifest = store.snapshot.manifest
        assert store.snapshot.ids.tolist() == Store.open(store.path).snapshot.ids.tolist() == sorted(model)
        assert len(store) == len(model)
        assert len(manifest.tombstones) <= 12
        assert len(store.snapshot.dead) <= max(12, manifest.stored // 4)
        assert store.check() == []
        assert_tidy(store)
        seen.add((manifest.deleted is not None, bool(manifest.tombstones)))
    if step == 40:
        assert len(seen) == 4  # with and without a file, with and without others in the manifest


def test_removals_wait_for_the_clock_and_not_for_their_number(store, monkeypatch):
    """Every commit looks through all ids: one for each 100 removals would make many of them quadratic."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with store.write() as writer:
        ids = writer.add_many(columns(3000), unit(3000)).tolist()
        before = store.snapshot.manifest.generation
        for i in ids[:700]:
            writer.remove(i)
            writer.forgive(f"{i}.jpg")
        assert store.snapshot.manifest.generation == before
        now[0] += 2
        writer.remove(ids[700])
        assert len(Store.open(store.path)) == 2299
        for i in ids[701:800]:
            writer.remove(i)
    assert store.snapshot.manifest.generation == before + 2
    assert len(store) == 2200


def test_joined_ids():
    chance = np.random.default_rng(0)
    for n in (0, 1, 2, 50):
        ids = chance.permutation(60)[:50]
        one, other = np.sort(ids[:n]), np.sort(ids[n:])
        assert joined(one, other).tolist() == joined(other, one).tolist() == sorted(ids.tolist())


@pytest.mark.parametrize("damage", ["delete", "truncate", "garbage", "fewer", "bits", "name"])
def test_a_damaged_file_of_deleted_ids(store, monkeypatch, damage):
    monkeypatch.setattr(module, "_TOMBSTONES", 3)
    ids = fill(store, 50)
    with store.write() as writer:
        for i in ids[:10]:
            writer.remove(i)
    file = store.path / store.snapshot.manifest.deleted.file
    content = file.read_bytes()
    if damage == "delete":
        file.unlink()
    elif damage == "fewer":
        write_deleted(file, np.arange(9))
    elif damage == "bits":
        middle = len(content) - 200  # a comment of Arrow's: it can be read all the same
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        assert any(file.name in line for line in store.check())
        return
    elif damage == "name":
        manifest = store.path / "manifest.json"
        manifest.write_text(manifest.read_text().replace(file.name, "../../secret.parquet"))
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "truncate" else b"x" * len(content))
    said = "manifest.json" if damage == "name" else re.escape(file.name)
    with pytest.raises(StoreCorrupt, match=rf"{said} is .*: delete the folder {store.path} and index again"):
        Store.open(store.path)


def test_an_index_of_format_1_is_read_and_carried_on(store):
    ids = fill(store, 30)
    with store.write() as writer:
        writer.remove(ids[3])
    file = store.path / "manifest.json"
    fields = json.loads(file.read_text())
    assert fields["format"] == 2
    del fields["deleted"], fields["checksum"]
    file.write_text(json.dumps({**fields, "format": 1}))
    old = Store.open(store.path)
    assert len(old) == 29
    with old.write() as writer:
        writer.remove(ids[4])
    assert Store.open(store.path).snapshot.ids.tolist() == [i for i in ids if i not in (3, 4)]
    assert json.loads(file.read_text())["format"] == 2


# ---- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 60])
def test_a_row_is_rewritten_once_for_each_doubling_at_most(store, monkeypatch, most):
    written: dict[int, int] = {}
    write = module.write_segment

    def counting(file, tables, dim, extra):
        def counted():
            for table in tables:
                for i in table["id"].to_pylist():
                    written[i] = written.get(i, 0) + 1
                yield table

        return write(file, counted(), dim, extra)

    monkeypatch.setattr(module, "write_segment", counting)
    chance = random.Random(most)
    for n in range(120):
        with store.write() as writer:
            rows = chance.randrange(most) + 1
            writer.add_many(columns(rows, f"{n}/"), unit(rows, n))
    total = len(store)
    assert len(written) == total
    doublings = math.ceil(math.log2(total))
    assert max(written.values()) <= 1 + doublings  # the first time is no rewriting
    assert sum(written.values()) <= total * (1 + doublings / 2)
    counts = [segment.rows for segment in store.snapshot.manifest.segments]
    assert len(counts) <= module._SEGMENTS
    assert store.check() == []


def test_merged_segments_have_whole_row_groups(monkeypatch):
    monkeypatch.setattr("indexes.segments._GROUP", 8)
    for counts in ([3] * 20, [8, 1, 8, 1], [30, 2, 0, 7], [0], [], [0, 5]):
        starts = np.cumsum([0, *counts])
        tables = [pa.table({"i": np.arange(a, b)}) for a, b in itertools.pairwise(starts)]
        out = list(_regrouped(tables))
        assert [i for table in out for i in table["i"].to_pylist()] == list(range(sum(counts)))
        assert all(len(table) % 8 == 0 and len(table) for table in out[:-1])


def test_no_room_for_a_merge_is_found_out_once(store, monkeypatch):
    """Each try would rewrite a large part of the store, until the disk is full."""
    monkeypatch.setattr(module, "_SEGMENTS", 2)
    tries = []
    merge = module.Writer._merge

    def full(self, first):
        tries.append(first)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.Writer, "_merge", full)
        with store.write() as writer:
            for i in range(6):
                writer.add(row(f"{i}"), unit(1, i)[0])
                writer.commit()
    assert len(tries) == 1
    assert store.paths() == [str(i) for i in range(6)]
    assert module.Writer._merge is merge
    with store.write() as writer:  # the next one tries again
        writer.add(row("6"), unit(1, 6)[0])
    assert len(store.snapshot.segments) <= 2
    assert store.paths() == [str(i) for i in range(7)]


@pytest.mark.parametrize("before", [True, False])
def test_ctrl_c_at_every_step_of_deleting_and_merging(tmp_path, monkeypatch, before):
    monkeypatch.setattr(module, "_TOMBSTONES", 2)
    monkeypatch.setattr(module, "_SEGMENTS", 3)
    template = Store.create(tmp_path / "template", tmp_path, MODEL)
    with template.write() as writer:
        writer.add_many(columns(40), unit(40))
        for _ in range(2):
            writer.add(row("x"), unit(1)[0])
            writer.commit()
        for i in range(4):
            writer.remove(i)
    assert template.snapshot.manifest.deleted.rows == 4
    steps = 0
    for at in range(1, 100):
        path = tmp_path / f"{before}{at}"
        shutil.copytree(template.path, path)
        store = Store.open(path)
        with pytest.MonkeyPatch.context() as patch:
            try:
                with store.write() as writer:
                    disk = Disk(patch, interrupt, at, before)
                    writer.remove(5)
                    writer.remove(40)
                    writer.remove(41)
                    for i in range(6, 20):
                        writer.remove(i)
                    writer.add(row("y"), unit(1)[0])
                    writer.commit()  # a file of deleted ids, a segment, a manifest; then all are merged
                    patch.undo()
            except KeyboardInterrupt:
                steps += 1
                patch.undo()
        for one in (store, Store.open(path)):
            assert one.snapshot.ids.tolist() == [4, *range(20, 40), 42]
            assert one.check() == []
        with store.write():  # what was left behind is gone
            pass
        assert_tidy(store)
        if disk.calls < at:
            break
    assert steps == 15  # five files, each fsync, rename, fsync of the folder


# Adds row after row, and removes a third of them three rows later: what is there follows from the last id.
KILLED = """
import sys
from pathlib import Path
import numpy as np
from indexes import writer as module
from indexes.store import Row, Store
module._TOMBSTONES, module._SEGMENTS = 9, 4
store = Store.open(Path(sys.argv[1]))
with store.write() as writer:
    i = store.snapshot.manifest.next_id
    print("go", flush=True)
    while True:
        writer.add(Row(path=f"{i}.jpg", size=i, mtime_ns=i, hash="0"), np.random.default_rng(i).standard_normal(8))
        if i % 3 == 2:
            writer.remove(i - 2)
        i += 1
        if i % 6 == 0:
            writer.commit()
            print(i, flush=True)
"""


def test_kill_9_between_deletions_and_merges(tmp_path):
    store = Store.create(tmp_path / "index", tmp_path, MODEL)
    chance = random.Random(1)
    known = 0
    for _ in range(12):
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(store.path)], stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"go\n"
        time.sleep(chance.uniform(0, 0.3))  # any moment is a good one
        child.send_signal(signal.SIGKILL)
        told = [int(line) for line in child.stdout.read().decode().split("\n")[:-1]]
        child.wait()
        after = Store.open(store.path)
        n = after.snapshot.manifest.next_id
        assert n >= max([known, *told])
        known = n
        left = [i for i in range(n) if i % 3 != 0]
        assert after.snapshot.ids.tolist() == left
        assert after.check() == []
        if left:
            vectors = [np.random.default_rng(i).standard_normal(DIM) for i in left]
            np.testing.assert_allclose(
                after.vectors(), widened(vectors / np.linalg.norm(vectors, axis=1)[:, None]), atol=1e-3
            )
    assert known > 100
    with store.write():
        pass
    assert_tidy(store)


MERGE = """
import re, sys
from pathlib import Path
import numpy as np
from indexes import writer as module
from indexes import segments as groups
from indexes.store import Row, Store
groups._GROUP = 128
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
store = Store.open(Path(sys.argv[1]))
with store.write() as writer:  # imports and allocates
    writer.add(Row(path="x", size=0, mtime_ns=0, hash="0"), np.ones(1024))
segments, before = len(store.snapshot.segments), peak()
module._SEGMENTS = 1
with store.write() as writer:
    writer.add(Row(path="x", size=0, mtime_ns=0, hash="0"), np.ones(1024))
print(segments, len(store.snapshot.segments), peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux to tell the peak of memory")
def test_a_merge_holds_a_few_row_groups_and_not_the_store(tmp_path, monkeypatch):
    monkeypatch.setattr("indexes.segments._GROUP", 128)  # 256 kB
    store = Store.create(tmp_path / "index", tmp_path, ModelRef("wide", "ab" * 32, 1024))
    with store.write() as writer:
        for part in range(4):
            vectors = np.random.default_rng(part).standard_normal((20_000 + part, 1024), dtype=np.float32)
            writer.add_many(columns(len(vectors)), vectors)
            writer.remove(part)
    stored = sum(file.stat().st_size for file in (store.path / "segments").iterdir()) / 2**20
    assert stored > 155
    done = subprocess.run([sys.executable, "-c", MERGE, str(store.path)], capture_output=True, text=True, check=True)
    segments, merged, grown = done.stdout.split()
    assert (int(segments), int(merged)) == (5, 1)
    assert float(grown) < stored / 2, f"{grown} MB for a merge of {stored:.0f} MB"
