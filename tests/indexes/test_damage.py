"""A byte that flipped, a file that is cut short or gone: found, named, said what is lost with it, and repaired."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest

from indexes import writer as module
from indexes.damage import lost
from indexes.errors import DiptychError, StoreCorrupt, StoreError, StoreLocked, StoreNotFound
from indexes.manifest import Manifest
from indexes.store import Failure, ModelRef, Row, SourceRef, Store

DIM = 8
MODEL = ModelRef("tiny", "ab" * 32, DIM)
GONE = set(range(3, 30, 3))


def vector(i: int):
    return np.random.default_rng(i).standard_normal(DIM)


def add(writer, i: int) -> None:
    row = Row(path=f"some/{i}.jpg", size=i, mtime_ns=i, hash=f"{i:064x}", caption=f"number {i}", columns={"n": i})
    assert writer.add(row, vector(i)) == i


@pytest.fixture
def store(tmp_path, monkeypatch) -> Store:
    """Every kind of file: two segments (rows 0 to 79, 80 to 109), deleted ids, failures, FAISS."""
    monkeypatch.setattr(module, "_TOMBSTONES", 5)
    store = Store.create(tmp_path / "index", tmp_path, MODEL)
    with store.write() as writer:
        for i in range(80):
            add(writer, i)
    store.rebuild_index("Flat")
    with store.write() as writer:
        for i in range(80, 110):
            add(writer, i)
        writer.commit()
        for i in GONE:
            writer.remove(i)
        for name in ("a", "b"):
            writer.fail(Failure(name, "no " + "0" * 64, datetime(2024, 1, 1, tzinfo=timezone.utc), 1, 2))
    assert (len(store), len(store.snapshot.segments), len(list(files(store)))) == (110 - len(GONE), 2, 6)
    assert store.check() == []
    return store


def files(store: Store):
    return sorted(file for file in store.path.rglob("*") if file.is_file() and file.name != "write.lock")


def segments(store: Store) -> list[Path]:
    return [store.path / "segments" / ref.file for ref in Manifest.read(store.path).segments]


def read_everything(path: Path) -> None:
    store = Store.open(path)
    store.rows(), store.paths(), store.failures(), store.texts(), store.search(np.eye(DIM)[:2], 5)


def complaint_of_a_reader(path: Path) -> str | None:
    try:
        read_everything(path)
    except DiptychError as error:
        return str(error)
    return None


def flips(content: bytes, count: int, seed: int = 0):
    """(position, content with that byte changed), positions spread over all of it."""
    chance = random.Random(seed)
    for at in sorted({chance.randrange(len(content)) for _ in range(count)} | {0, len(content) - 1}):
        yield at, content[:at] + bytes([content[at] ^ chance.randrange(1, 256)]) + content[at + 1 :]


def flipped_bytes_are_named(store: Store, count: int, seed: int = 0) -> None:
    for file in files(store):
        content = file.read_bytes()
        for at, damaged in flips(content, count, seed):
            file.write_bytes(damaged)
            assert any(f"{file} " in line for line in store.check()), at
            said = complaint_of_a_reader(store.path)  # or it noticed nothing: only --check looks at every byte
            assert said is None or (str(file) in said and "\n" not in said), at
        file.write_bytes(content)
    assert store.check() == []


def test_a_flipped_byte_anywhere_is_named(store):
    flipped_bytes_are_named(store, 25)


@pytest.mark.slow
def test_a_flipped_byte_at_each_of_many_places_is_named(store):
    for seed in range(4):
        flipped_bytes_are_named(store, 700, seed)


def test_every_byte_of_the_manifest_and_the_failures(store):
    """Neither is read with a checksum from elsewhere: they carry their own."""
    for file, read in ((store.path / "manifest.json", Store.open), (store.path / "failures.parquet", Store.failures)):
        content = file.read_bytes()
        for at in range(len(content)):
            for bits in (1, 32):  # another digit, a capital letter
                file.write_bytes(content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :])
                with pytest.raises(StoreError, match=re.escape(str(file))):
                    read(store if read is Store.failures else store.path)
        file.write_bytes(content)
    assert store.check() == []


def test_failures_of_a_release_that_knew_no_checksum(store):
    import pyarrow.parquet as pq

    file, before = store.path / "failures.parquet", store.failures()
    table = pq.read_table(file)
    pq.write_table(table, file)
    assert store.failures() == before
    assert store.check() == []


def test_a_damaged_footer_is_an_error_and_not_an_abort(store):
    """Arrow ends the process where it is asked for the name of a compression that does not exist."""
    file, content = segments(store)[0], segments(store)[0].read_bytes()
    code = """
import sys
from pathlib import Path
from indexes.errors import DiptychError
from tests.indexes.test_damage import read_everything
file = Path(sys.argv[1])
content = file.read_bytes()
footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
seen = 0
for at in range(footer, len(content), 3):
    file.write_bytes(content[:at] + bytes([content[at] ^ 48]) + content[at + 1:])
    try:
        read_everything(file.parents[1])
    except DiptychError:
        seen += 1
print(seen == len(range(footer, len(content), 3)))
"""
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    file.write_bytes(content)


def reading_damaged_columns(folder: Path, step: int) -> None:
    """A reader of a few rows gets what was written, or StoreCorrupt: never half a row, nor Arrow's or Python's errors.

    A single row, so that its values lie in the file as they are, not compressed.
    """
    store = Store.create(folder / "index", folder, MODEL)
    when = datetime(2020, 1, 1)
    row = Row(
        path="smörgås.jpg",
        size=1,
        mtime_ns=2,
        hash="f" * 64,
        taken_at=when,
        caption="häh",
        columns={"t": ["ä"], "w": when},
    )
    with store.write() as writer:
        writer.add(row, vector(0))
    (file,) = segments(store)
    content, noticed = file.read_bytes(), 0
    for at in range(0, len(content), step):
        for bits in (1, 128):
            file.write_bytes(content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :])
            for read in (
                lambda one: one.row(0),
                lambda one: one.rows().to_pylist(),
                lambda one: one.columns("id", "hash"),
            ):
                try:
                    read(Store.open(store.path))
                except StoreCorrupt:
                    noticed += 1
            assert any(file.name in line for line in store.check())
    assert noticed > len(content) // step


def test_damaged_columns_are_noticed_where_they_are_read(tmp_path):
    reading_damaged_columns(tmp_path, 9)


@pytest.mark.slow
def test_every_byte_of_damaged_columns(tmp_path):
    reading_damaged_columns(tmp_path, 1)


def test_a_flipped_byte_among_the_deleted_ids_brings_nothing_back(store):
    (file,) = store.path.glob("deleted-*")
    content = file.read_bytes()
    for at in range(len(content)):
        file.write_bytes(content[:at] + bytes([content[at] ^ 2]) + content[at + 1 :])
        with pytest.raises(StoreCorrupt, match=rf"{file.name} is damaged .*: delete the folder {store.path} and index"):
            Store.open(store.path)


@pytest.mark.parametrize("damage", ["truncate", "empty", "missing", "folder"])
def test_files_that_are_cut_short_or_gone(store, damage):
    for file in files(store):
        content = file.read_bytes()
        file.unlink()
        if damage == "truncate":
            file.write_bytes(content[: len(content) // 2])
        elif damage == "empty":
            file.write_bytes(b"")
        elif damage == "folder":
            file.mkdir()
        derived = file.name in ("vectors.faiss", "failures.parquet")
        wrong = store.check()
        if damage == "missing" and file.name == "manifest.json":
            assert wrong == [f"there is no index at {store.path}: make one with  diptych index FOLDER"]
        elif damage == "missing" and derived:
            assert wrong == []
        else:
            assert [line for line in wrong if str(file) in line] == wrong != []
        if file.name == "vectors.faiss":
            read_everything(store.path)  # exact, without it
        elif not (derived and damage == "missing"):
            with pytest.raises(StoreError) as error:
                read_everything(store.path)
            assert "\n" not in str(error.value)
        if damage == "folder":
            file.rmdir()
        file.write_bytes(content)
    assert store.check() == []


def test_the_faiss_file_is_built_again(store):
    file = store.path / "vectors.faiss"
    content = file.read_bytes()
    file.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    (said,) = store.check()
    assert said.startswith(f"{file} is damaged")
    assert said.endswith("the next  diptych index  builds it again")
    assert store.index_is_stale()
    store.rebuild_index()
    assert (store.check(), Store.open(store.path).snapshot.covered) == ([], 110 - len(GONE))


def test_what_is_lost_with_a_segment(store):
    first, second = segments(store)
    manifest = Manifest.read(store.path)
    content = second.read_bytes()
    begin = content.index(np.concatenate([vector(80) / np.linalg.norm(vector(80))]).astype(np.float16).tobytes())
    second.write_bytes(content[:begin] + b"\xff" + content[begin + 1 :])  # only a vector: paths can be read
    assert store.check() == [
        f"{second} is damaged: its content is not what was written; it held 30 rows (ids between 80 and 109): "
        "some/80.jpg, some/81.jpg, some/82.jpg and 27 more: take in again what is still there with  diptych "
        "index --repair"
    ]
    second.write_bytes(b"")
    assert lost(store.path, manifest, manifest.segments[1]) == (
        "30 rows (ids between 80 and 109), whose paths cannot be read"
    )
    first.unlink()  # ids are told from neighbours: none is whole any more
    assert lost(store.path, manifest, manifest.segments[0]) == (
        "71 rows (ids between 0 and 109), whose paths cannot be read"
    )
    with pytest.raises(StoreCorrupt, match=rf"{first.name} is missing with \d+ rows \(ids between 0 and 109\), whose"):
        Store.open(store.path)


def test_paths_as_far_as_they_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr("indexes.segments._GROUP", 10)
    store = Store.create(tmp_path / "index", tmp_path, MODEL)
    with store.write() as writer:
        for i in range(30):
            add(writer, i)
        writer.commit()
        writer.remove(11)
    import pyarrow.parquet as pq

    (file,) = segments(store)
    column = pq.read_metadata(file).row_group(0).column(2)
    content = file.read_bytes()
    at = column.data_page_offset
    file.write_bytes(content[:at] + b"\xff" * 8 + content[at + 8 :])
    (said,) = store.check()
    assert "it held 29 rows (ids between 0 and 29): some/10.jpg, some/12.jpg, some/13.jpg and 16 more" in said
    assert "; paths of 10 cannot be read" in said


@pytest.mark.parametrize("damage", ["bits", "missing"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_repair_gives_up_the_segment_and_nothing_else(store, which, damage):
    file = segments(store)[which]
    if damage == "missing":
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    done = Store.repair(store.path)
    assert done.segments == (file.name,)
    left = [i for i in range(110) if i not in GONE and (i >= 80) == (which == 0)]
    assert done.rows == 110 - len(GONE) - len(left)
    after = Store.open(store.path)
    assert after.check() == []
    assert after.rows()["id"].to_pylist() == left  # what was deleted stays so
    assert after.paths() == [f"some/{i}.jpg" for i in left]
    assert (after.snapshot.covered > 0) == (which == 1)  # a FAISS file over other rows counts no more
    assert [after.snapshot.halves(i).tobytes() for i in range(len(after))] == [
        (vector(i) / np.linalg.norm(vector(i))).astype(np.float16).tobytes() for i in left
    ]
    with after.write() as writer:
        add(writer, 110)  # ids are never used again
    assert Store.repair(store.path).segments == ()


def test_a_repair_reads_a_source_anew(store):
    with store.write() as writer:
        writer.note_source(SourceRef("tars", "a.tar", files=(("a.tar", 5, 6),)))
    segments(store)[0].unlink()
    Store.repair(store.path)
    assert Store.open(store.path).source == SourceRef("tars", "a.tar", files=(("a.tar", -1, 0),))


def test_a_repair_that_cannot_be(store, tmp_path):
    with pytest.raises(StoreNotFound):
        Store.repair(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    with store.write(), pytest.raises(StoreLocked):
        Store.repair(store.path)
    (deleted,) = store.path.glob("deleted-*")
    segments(store)[0].unlink()
    before, manifest = deleted.read_bytes(), (store.path / "manifest.json").read_bytes()
    deleted.write_bytes(before[:-1])
    with pytest.raises(StoreError, match=rf"{deleted.name} is damaged.*: delete the folder {store.path} and index"):
        Store.repair(store.path)
    assert (store.path / "manifest.json").read_bytes() == manifest
    deleted.unlink()
    with pytest.raises(StoreCorrupt, match=rf"{deleted.name} is missing: delete the folder"):
        Store.repair(store.path)
    deleted.write_bytes(before)
    assert len(Store.repair(store.path).segments) == 1


def test_a_merge_gives_no_damaged_segment_a_right_checksum(store, monkeypatch):
    monkeypatch.setattr(module, "_SEGMENTS", 1)
    file = segments(store)[1]
    content = file.read_bytes()
    half = (vector(85) / np.linalg.norm(vector(85))).astype(np.float16).tobytes()
    at = content.index(half)
    file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])  # still a vector
    writable = Store.open(store.path)

    def write() -> None:
        with writable.write() as writer:
            for i in range(110, 150):
                add(writer, i)

    with pytest.raises(StoreCorrupt, match=rf"{file.name} is damaged: .*index --repair"):
        write()
    with pytest.raises(StoreCorrupt, match=rf"{file.name} is damaged"):
        writable.rebuild_index()
    after = Store.open(store.path)
    assert len(after) == 150 - len(GONE)  # what was given is committed all the same
    assert [file.name in line for line in after.check()] == [True]
    Store.repair(store.path)
    assert Store.open(store.path).check() == []


def test_a_segment_cut_short_under_an_open_reader(store):
    """Mapped memory behind the end of a file kills the process that touches it."""
    code = """
import os, sys
from pathlib import Path
import numpy as np
from indexes.errors import StoreCorrupt
from indexes.store import Store
store = Store.open(Path(sys.argv[1]))
hits = store.search(np.eye(8)[:1], 3, np.arange(len(store)) < 40)
file = store.path / "segments" / store.snapshot.manifest.segments[0].file
os.truncate(file, 1000)
for read in (lambda: store.search(np.eye(8)[:1], 3, np.arange(len(store)) < 40), store.vectors,
             lambda: store.snapshot.halves(0)):
    try:
        read()
    except StoreCorrupt as error:
        print("its size has changed" in str(error))
"""
    done = subprocess.run([sys.executable, "-c", code, str(store.path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n" * 3), done.stderr


def test_check_while_a_writer_merges(store, monkeypatch):
    """A segment that is gone by then is not missing: the next state is checked instead."""
    old, read = Manifest.read(store.path), Manifest.read
    shutil.copytree(store.path, store.path.with_name("copy"))
    store.rebuild_index("Flat")
    answers = [old]
    monkeypatch.setattr(Manifest, "read", lambda folder: answers.pop() if answers else read(folder))
    assert store.check() == []
    assert not answers
    assert json.loads((store.path.with_name("copy") / "manifest.json").read_text())["generation"] == old.generation


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux lists them")
def test_small_files_are_read_without_threads_of_arrow(tmp_path):
    """One that lets go of the file's bytes as Python ends aborts the process, once in thirty times."""
    code = """
import os, sys
from datetime import datetime, timezone
from pathlib import Path
import numpy as np
from indexes.segments import Failure, read_deleted, read_failures, write_deleted, write_failures
folder = Path(sys.argv[1])
write_failures(folder / "failures", [Failure("a.jpg", "damaged", datetime.now(timezone.utc), 1, 1)])
deleted = write_deleted(folder / "deleted", np.arange(3))
before = len(os.listdir("/proc/self/task"))
assert len(read_failures(folder / "failures")) == 1
assert len(read_deleted(folder / deleted.file, deleted)) == 3
print(len(os.listdir("/proc/self/task")) - before)
"""
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "0\n"), run.stderr
