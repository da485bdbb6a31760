"""Kills, full disks, Ctrl-C and read-only folders: the last commit always stands."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest

from indexes.errors import StoreError
from indexes.manifest import Manifest
from indexes.store import Failure, ModelRef, Row, Store
from indexes.vectors import as_vectors

DIM = 8
MODEL = ModelRef("tiny", "ab" * 32, DIM)

# Row number i has the id i and the vector of seed i: what is in the store can be computed again.
WRITER = """
import sys
from pathlib import Path
import numpy as np
from indexes.store import Row, Store
store = Store.open(Path(sys.argv[1]))
with store.write() as writer:
    i = store.snapshot.manifest.next_id
    print("go", flush=True)
    while True:
        writer.add(Row(path=f"{i}.jpg", size=i, mtime_ns=i, hash=f"{i:x}"), np.random.default_rng(i).standard_normal(8))
        i += 1
        if i % 7 == 0:
            writer.commit()
            print(i, flush=True)
"""


def expected_vectors(n: int):
    return as_vectors(as_vectors([np.random.default_rng(i).standard_normal(DIM) for i in range(n)]).astype(np.float16))


def row(i: int) -> Row:
    return Row(path=f"{i}.jpg", size=i, mtime_ns=i, hash=f"{i:x}")


def add(writer, i: int) -> None:
    writer.add(row(i), np.random.default_rng(i).standard_normal(DIM))


def assert_whole(store: Store, at_least: int) -> None:
    """Rows 0 to n, none twice, none missing, each with its own vector."""
    n = len(store)
    assert n >= at_least
    assert store.rows()["id"].to_pylist() == list(range(n))
    assert store.paths() == [f"{i}.jpg" for i in range(n)]
    assert store.rows()["hash"].to_pylist() == [f"{i:x}" for i in range(n)]
    if n:
        np.testing.assert_allclose(store.vectors(), expected_vectors(n), atol=1e-7)
    assert store.check() == []


def test_kill_9_at_20_random_moments(tmp_path):
    store = Store.create(tmp_path / "index", tmp_path, MODEL)
    chance = random.Random(4)
    n = 0
    for _ in range(20):
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(store.path)], stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"go\n"
        time.sleep(chance.uniform(0, 0.15))  # any moment is a good one
        child.send_signal(signal.SIGKILL)
        said = child.stdout.read().decode().split("\n")
        child.wait()
        told = [int(line) for line in said[:-1]]
        after = Store.open(store.path)
        assert_whole(after, at_least=max([n, *told]))  # what it called committed is there
        n = len(after)
    assert n > 20
    with store.write() as writer:  # the next writer goes on, and cleans up
        add(writer, n)
    assert_whole(Store.open(store.path), at_least=n + 1)
    named = {segment.file for segment in store.snapshot.manifest.segments}
    assert {file.name for file in (store.path / "segments").iterdir()} == named
    assert not list(store.path.glob("*.tmp"))


def test_leftovers_are_cleaned_and_nothing_else(tmp_path):
    store = Store.create(tmp_path / "index", tmp_path, MODEL)
    with store.write() as writer:
        add(writer, 0)
    (kept,) = (file.name for file in (store.path / "segments").iterdir())
    leftovers = ["segments/00000099.parquet", "segments/00000099.parquet.tmp", "manifest.json.tmp",
                 "failures.parquet.tmp", "vectors.faiss.tmp"]  # fmt: skip
    foreign = ["notes.tmp", "segments/mine.parquet", "segments/1.tmp", "photo.jpg"]
    for name in leftovers + foreign:
        (store.path / name).write_text("x")
    assert_whole(Store.open(store.path), 1)
    with store.write():
        pass
    left = {str(file.relative_to(store.path)) for file in store.path.rglob("*") if file.is_file()}
    assert left == {*foreign, f"segments/{kept}", "manifest.json", "write.lock"}


class Disk:
    """Counts the calls that make a commit durable, and lets something happen before or after one of them."""

    def __init__(self, monkeypatch, happen, at: int, before: bool) -> None:
        self.calls = 0
        for owner, name in ((os, "fsync"), (Path, "replace")):
            real = getattr(owner, name)

            def watched(*args, real=real):
                self.calls += 1
                now = self.calls
                if now == at and before:
                    happen()
                result = real(*args)
                if now == at and not before:
                    happen()
                return result

            monkeypatch.setattr(owner, name, watched)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("before", [True, False])
def test_ctrl_c_at_every_step_of_a_commit(tmp_path, before):
    """Whichever call it hits: leaving the block commits the rest, and nothing twice."""
    for at in range(1, 100):
        store = Store.create(tmp_path / f"{before}{at}", tmp_path, MODEL)
        with pytest.MonkeyPatch.context() as patch:
            try:
                with store.write() as writer:
                    add(writer, 0)
                    writer.commit()
                    add(writer, 1)
                    gone = writer.add(row(2), np.ones(DIM))
                    writer.commit()
                    disk = Disk(patch, interrupt, at, before)
                    writer.remove(gone)
                    kept = writer.replace(1, row(1))
                    writer.commit()
                    patch.undo()
                    done = True
            except KeyboardInterrupt:
                done = False
        for one in (store, Store.open(store.path)):
            assert one.rows()["id"].to_pylist() == [0, kept]
            assert one.paths() == ["0.jpg", "1.jpg"]
            assert one.check() == []
        if done and disk.calls < at:
            break
    assert at == 7  # two files, each fsync, rename, fsync of the folder: six steps were interrupted


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_full_disk_at_every_step(tmp_path, monkeypatch, code):
    def full():
        raise OSError(code, os.strerror(code))

    for at in range(1, 6):  # the sixth, the fsync after the swap, is too late to lose anything
        store = Store.create(tmp_path / str(at), tmp_path, MODEL)
        with store.write() as writer:
            add(writer, 0)

        def write_on_a_full_disk(store=store, at=at):
            with monkeypatch.context() as patch, store.write() as writer:
                add(writer, 1)
                Disk(patch, full, at, before=True)
                writer.commit()

        said = rf"^the index at \S+ cannot be written \({os.strerror(code)}\).*$"  # one line: "." is no newline
        with pytest.raises(StoreError, match=said):
            write_on_a_full_disk()
        for one in (store, Store.open(store.path)):
            assert_whole(one, 1)
            assert len(one) == 1
        assert not list(store.path.rglob("*.tmp"))


def test_a_kill_between_failures_and_manifest_does_no_harm(tmp_path, monkeypatch):
    store = Store.create(tmp_path / "index", tmp_path, MODEL)
    failure = Failure("bad.jpg", "empty", datetime(2024, 1, 1, tzinfo=timezone.utc), 0, 1)

    def killed(self, folder):
        raise SystemExit

    def write() -> None:
        with store.write() as writer:
            writer.fail(failure)
            add(writer, 0)

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", killed)
        with pytest.raises(SystemExit):
            write()
    assert store.failures() == [failure]
    assert (len(store), store.check()) == (0, [])
    write()
    assert (store.failures(), store.snapshot.manifest.failures) == ([failure], 1)
    assert_whole(store, 1)


def test_writing_goes_on_when_there_is_room_again(tmp_path, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "full")

    store = Store.create(tmp_path / "index", tmp_path, MODEL)
    with store.write() as writer:
        add(writer, 0)
        with monkeypatch.context() as patch:
            Disk(patch, full, 1, before=True)
            with pytest.raises(StoreError):
                writer.commit()
        add(writer, 1)
    assert_whole(Store.open(store.path), 2)


def test_a_limit_on_file_size_is_one_plain_line(tmp_path):
    """The real thing: the system refuses the segment in the middle of a write."""
    pytest.importorskip("resource")
    store = Store.create(tmp_path / "index", tmp_path, ModelRef("wide", "ab" * 32, 2048))
    code = """
import resource, sys
from pathlib import Path
import numpy as np
from indexes.errors import StoreError
from indexes.store import Row, Store
store = Store.open(Path(sys.argv[1]))
try:
    with store.write() as writer:
        for i in range(5):
            writer.add(Row(path=str(i), size=i, mtime_ns=i, hash="0"), np.ones(2048))
        writer.commit()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        for i in range(5, 1000):
            writer.add(Row(path=str(i), size=i, mtime_ns=i, hash="0"), np.ones(2048))
except StoreError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(store.path)], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert f"the index at {store.path} cannot be written (File too large)" in done.stdout
    assert done.stderr == ""
    after = Store.open(store.path)
    assert after.paths() == [str(i) for i in range(5)]
    assert after.check() == []
    assert not list(store.path.rglob("*.tmp"))


def test_a_read_only_store_is_read_without_writing():
    """As another user: root may write everywhere."""
    if not hasattr(os, "setuid"):
        pytest.skip("no user ids on this system")
    code = """
import filelock, os, secrets, sys  # two of them are imported late: the other user may not be able to read the packages
from pathlib import Path
import numpy as np
from indexes.errors import StoreError
from indexes.store import ModelRef, Row, Store
folder = Path(sys.argv[1])
def read():
    store = Store.open(folder / "index")
    hits = store.search(np.eye(8)[:1], 3)
    print(len(store), hits.rows.tolist(), store.snapshot.covered, store.failures(), store.check(), store.refresh())
    return store
store = read()  # imports what is imported late: the other user may not be able to read the packages
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    store = read()
for write in (
    lambda: store.write().__enter__(),
    lambda: store.rebuild_index(),
    lambda: Store.create(folder / "other", None, ModelRef("m", "f", 8)),
):
    try:
        write()
    except StoreError as error:
        print(error)
"""
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    try:
        store = Store.create(folder / "index", None, MODEL)
        with store.write() as writer:
            for i in range(3):
                writer.add(row(i), np.eye(DIM)[i])
        store.rebuild_index("Flat")
        before = sorted(map(str, folder.rglob("*")))
        for place in (folder, *folder.rglob("*")):
            place.chmod(0o555 if place.is_dir() else 0o444)
        done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
        assert done.stderr == ""
        lines = done.stdout.splitlines()
        assert set(lines[:-3]) == {"3 [[0, 1, 2]] 3 [] [] False"}
        for line in lines[-3:]:
            assert "cannot be written (Permission denied)" in line
        assert sorted(map(str, folder.rglob("*"))) == before
    finally:
        for place in (folder, *folder.rglob("*")):
            place.chmod(0o755)
        shutil.rmtree(folder)


def test_an_unreadable_manifest_is_one_plain_line(tmp_path, monkeypatch):
    store = Store.create(tmp_path / "index", tmp_path, MODEL)

    def denied(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(StoreError, match=r"manifest\.json cannot be read: Permission denied"):
        Manifest.read(store.path)
