"""What a run has to do: the comparison by columns against one by dictionaries, and what a re-run does not touch."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from indexes.store import Failure, ModelRef, Row, Store
from retrieval import folder as folder_module
from retrieval import indexing
from retrieval.folder import ScannedFile, scan
from retrieval.indexing import Plan, make_plan
from retrieval.library import Library
from tests.fakes import ColourEncoder
from tests.retrieval.test_library import counts, did, paint

NOW = datetime(2024, 5, 1, tzinfo=timezone.utc)
NAMES = ["a.jpg", "b.JPG", "ä.png", os.fsdecode(b"\xe9.jpg"), "a b.jpg", "a.jpg.webp"]
FOLDERS = ["", "a", "a/b", "ab", "closed", "closed/in", os.fsdecode(b"d\xff"), "z.jpg"]


def obvious_plan(library: Library, below: str) -> Plan:
    """The same, one file and one row at a time."""
    plan = Plan()
    rows = library.store.rows()
    columns = (rows[name].to_pylist() for name in ("id", "size", "mtime_ns", "hash", "kind"))
    every = zip(library.store.paths(), zip(*columns, strict=True), strict=True)
    stored = {path: row for path, row in every if row[4] == "image"}
    failed = {failure.path: failure for failure in library.store.failures()}
    refused: list[str] = []
    seen = set()
    for file in scan(library.root, below, on_error=lambda path, _: refused.append(path)):
        seen.add(file.path)
        row = stored.get(file.path)
        if row and row[1:3] == (file.size, file.mtime_ns):
            plan.unchanged += 1
            continue
        if row:
            plan.known[file.path] = (row[0], row[3])
        elif file.path in failed:
            then = failed[file.path]
            if (then.size, then.mtime_ns) == (file.size, file.mtime_ns):
                continue
        plan.todo.append(file)

    def gone(path: str) -> bool:
        hidden = any(path == place or path.startswith(place + "/") for place in refused)
        return path not in seen and not hidden and (not below or path.startswith(below + "/"))

    plan.missing = {path: (row[0], row[3]) for path, row in stored.items() if gone(path)}
    plan.forgotten = [path for path in failed if gone(path)]
    plan.unreadable = [Failure(path, "no permission to read it", NOW, 0, 0) for path in refused]
    return plan


def comparable(plan: Plan) -> Plan:
    return replace(plan, unreadable=[replace(failure, when=NOW) for failure in plan.unreadable])


def random_library(root: Path, chance: random.Random, empty: bool) -> Library:
    """Files, rows and failures that agree here and there."""

    kinds = chance.choice([["image"], ["image", "image", "text"]])  # a text beside its picture, or without one

    def what() -> dict[str, int]:
        return {"size": chance.randrange(3), "mtime_ns": chance.randrange(3)}

    for folder in FOLDERS:
        (root / folder).mkdir(parents=True)
    paths = [f"{folder}/{name}".lstrip("/") for folder in FOLDERS for name in NAMES]
    for path in chance.sample(paths, int(0.6 * len(paths))):
        (root / path).write_bytes(bytes(what()["size"]))
        os.utime(root / path, ns=(0, what()["mtime_ns"]))
    store = Store.create(root / ".diptych", None, ModelRef("colours", "colours-1", 3))
    with store.write() as writer:
        known = [] if empty else chance.choices(paths, k=len(paths))  # some twice
        ids = [
            writer.add(Row(path=path, kind=chance.choice(kinds), hash=f"{chance.randrange(9)}", **what()), [1, 0, 0])
            for path in known
        ]
        for path in chance.sample(paths, len(paths) // 3):
            writer.fail(Failure(path, "bad", NOW, **what()))
        for row_id in chance.sample(ids, len(ids) // 5):
            writer.remove(row_id)
    return Library(store)


def test_a_plan_equals_one_made_with_dictionaries(tmp_path, monkeypatch):
    listing = os.scandir

    def refusing(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return listing(path)

    monkeypatch.setattr(folder_module.os, "scandir", refusing)
    touched = Plan(todo=[], unchanged=0)
    for seed in range(30):
        library = random_library(tmp_path / str(seed), random.Random(seed), empty=seed == 0)
        for below in ("", "a", "closed", "closed/in", os.fsdecode(b"d\xff")):
            expected = obvious_plan(library, below)
            fresh = Library(Store.open(library.store.path))  # with and without the rows in memory
            for one in (library, fresh):
                assert comparable(make_plan(one, below)) == expected, (seed, below)
            touched.todo += expected.todo
            touched.unchanged += expected.unchanged
            touched.missing |= expected.missing
            touched.known |= expected.known
            touched.forgotten += expected.forgotten
            touched.unreadable += expected.unreadable
    assert touched.unchanged
    assert all((touched.todo, touched.known, touched.missing, touched.forgotten, touched.unreadable))  # all was tried


def test_an_unchanged_folder_is_read_no_further_than_its_names(tmp_path, monkeypatch):
    """No file is opened, no object made for a file or a row, and the columns that are not compared are not read."""
    for i in range(5):
        paint(tmp_path / f"{i}.png", "red", (8 + i, 8))
    paint(tmp_path / "new.png", "blue")
    library = Library.create(tmp_path, encoder=ColourEncoder())
    library.index()
    (tmp_path / "new.png").unlink()
    library.index()  # a deleted row is still in a segment
    library = Library.open(tmp_path, encoder=ColourEncoder())
    read = []
    columns = Store.columns

    def forbidden(*_, **__):
        raise AssertionError("this costs time for every file")

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "ScannedFile", forbidden)
        for name in ("rows", "paths", "row", "vectors"):
            patch.setattr(Store, name, forbidden)
        patch.setattr(indexing.Run, "_read", forbidden)
        patch.setattr(Store, "columns", lambda self, *names: read.append(names) or columns(self, *names))
        assert counts(library.index()) == did(skipped=5)
        assert library.pending() == 0
        assert read == [("id", "path", "path_bytes", "size", "mtime_ns")] * 2
    paint(tmp_path / "0.png", "green")
    (tmp_path / "1.png").unlink()
    assert library.pending() == 2


def test_columns_of_files_become_files_in_the_order_of_a_walk(tmp_path):
    for path in ("b.jpg", "a/z.jpg", "a.jpg", "a/b/c.jpg", "a b/1.jpg"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"xy")
        os.utime(tmp_path / path, ns=(0, 5))
    columns = folder_module.scan_columns(tmp_path)
    assert columns.paths.type == pa.large_binary()
    paths = ["a/b/c.jpg", "a/z.jpg", "a b/1.jpg", "a.jpg", "b.jpg"]
    assert columns.take(np.arange(5)) == [ScannedFile(path, 2, 5) for path in paths]
    some = np.array([i for i, path in enumerate(columns.paths.to_pylist()) if path.startswith(b"a")])
    assert [file.path for file in columns.take(some[::-1])] == paths[:4]
    assert columns.take(np.array([], dtype=np.int64)) == []


def test_many_renamed_files_take_their_rows_along(tmp_path, monkeypatch):
    """More than one commit of them, over merges and a file of deleted ids."""
    monkeypatch.setattr("indexes.writer._SEGMENTS", 3)
    monkeypatch.setattr("indexes.writer._TOMBSTONES", 150)
    for i in range(450):
        paint(tmp_path / "old" / f"{i:03}.png", "red", (8 + i % 30, 8 + i // 30))
    library = Library.create(tmp_path, encoder=ColourEncoder())
    library.index()
    sizes = {Path(row["path"]).name: row for row in library.store.rows().to_pylist()}
    (tmp_path / "old").rename(tmp_path / "new")
    for i in range(0, 450, 9):
        (tmp_path / "new" / f"{i:03}.png").unlink()
    assert counts(library.index()) == did(renamed=400, deleted=50)
    assert library.store.check() == []
    assert sorted(library.store.paths()) == [f"new/{i:03}.png" for i in range(450) if i % 9]
    for row in library.store.rows().to_pylist():
        before = sizes[Path(row["path"]).name]
        assert (row["hash"], row["width"], row["height"]) == (before["hash"], before["width"], before["height"])


@pytest.mark.parametrize("below", ["", "holiday"])
def test_a_name_that_only_begins_like_the_folder_is_another(tmp_path, below):
    for name in ("holiday/1.png", "holiday2/2.png", "holiday.png"):
        paint(tmp_path / name, "red")
    library = Library.create(tmp_path, encoder=ColourEncoder())
    library.index()
    for name in ("holiday/1.png", "holiday2/2.png", "holiday.png"):
        (tmp_path / name).unlink()
    assert set(make_plan(library, below).missing) == (
        {"holiday/1.png"} if below else {"holiday/1.png", "holiday2/2.png", "holiday.png"}
    )
