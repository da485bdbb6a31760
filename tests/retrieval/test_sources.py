"""Corpora that are no folder: tars, lists and sentences, what a run takes in, and what is found in them."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from indexes.errors import StoreNotFound
from indexes.store import Row, Store
from indexes.vectors import as_vectors
from retrieval.errors import DataError, UsageError
from retrieval.library import Library, Match, Term, find_store
from retrieval.report import results_page
from retrieval.sources import check_given, recognise
from tests.fakes import COLOURS, ColourEncoder
from tests.retrieval.test_library import counts, did, paint

ROOT = Path(__file__).parents[2]
NAMES = ("red", "green", "blue", "yellow", "white")


def painted(colour: str, size=(40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, tuple(255 * c for c in COLOURS[colour])).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(file: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file


def made(source: Path, **options) -> Library:
    return Library.create(source, encoder=ColourEncoder(), **options)


def again(source: Path) -> Library:
    return Library.open(source, encoder=ColourEncoder())


def found(library: Library, query: str, **options) -> list[str]:
    return [match.path for match in library.search(query, **options)]


def rows(library: Library) -> dict[str, Row]:
    ids = library.store.rows()["id"].to_pylist()
    return {row.path: row for row in map(library.store.row, ids)}


def touch(file: Path) -> None:
    """Another time of change, whatever the clock's steps are."""
    at = file.stat().st_mtime_ns + 1_000_000_000
    os.utime(file, ns=(at, at))


def assert_vectors(library: Library, colours: dict[str, str]) -> None:
    """Every row has the vector of its own picture, encoded anew."""
    encoder = ColourEncoder()
    images = [Image.open(io.BytesIO(painted(colours[path]))) for path in library.store.paths()]
    np.testing.assert_allclose(library.store.vectors(), encoder.encode_images(images), atol=1e-3)
    assert sorted(library.store.paths()) == sorted(colours)


# ---- tars ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    """Two tars of two and three pictures."""
    folder = tmp_path / "shards"
    write_tar(folder / "s-000.tar", {
        "0.png": painted("red"), "0.txt": b"a red thing\nred again", "0.json": b'{"price": 3, "width": 9}',
        "a/1.png": painted("green"),
    })  # fmt: skip
    write_tar(folder / "s-001.tar", {f"{c}.png": painted(c) for c in ("blue", "yellow", "white")})
    return folder


COLOUR_OF = {
    "s-000.tar/0.png": "red",
    "s-000.tar/a/1.png": "green",
    "s-001.tar/blue.png": "blue",
    "s-001.tar/yellow.png": "yellow",
    "s-001.tar/white.png": "white",
}


@pytest.mark.parametrize("kind", ["folder", "pattern", "one"])
def test_tars_are_indexed_and_found_again(shards, kind):
    source = {"folder": shards, "pattern": shards / "s-{000..001}.tar", "one": shards / "s-000.tar"}[kind]
    expected = {k: v for k, v in COLOUR_OF.items() if kind != "one" or k.startswith("s-000")}
    library = made(source)
    assert counts(library.index()) == did(added=len(expected), embedded=len(expected))
    assert_vectors(library, expected)
    assert counts(library.index()) == did(skipped=len(expected))
    reopened = again(source)
    assert (reopened.root, reopened.pending()) == (shards, 0)
    first = reopened.search("red", k=1)[0]
    assert (first.path, first.file) == ("s-000.tar/0.png", shards / "s-000.tar" / "0.png")
    assert first.picture.read_bytes() == painted("red")
    assert (first.caption, first.columns) == ("a red thing", {
        "captions": ["a red thing", "red again"], "price": 3, "width_": 9,
    })  # fmt: skip
    place = shards if kind == "folder" else shards / f"{source.name}"
    assert reopened.place == place
    assert reopened.store.path == (shards / ".diptych" if kind == "folder" else shards / f"{source.name}.diptych")


def test_an_unchanged_tar_is_not_even_opened(shards, monkeypatch):
    library = made(shards)
    library.index()
    monkeypatch.setattr("retrieval.sources.read_shard", lambda *_: pytest.fail("opened"))
    assert counts(library.index()) == did(skipped=5)
    touch(shards / "s-001.tar")
    opened = []
    from retrieval.pair_formats import read_shard

    monkeypatch.setattr("retrieval.sources.read_shard", lambda s, w: opened.append(s.tar.name) or read_shard(s, w))
    assert counts(library.index()) == did(changed=3, skipped=2)  # the bytes are the same: nothing is encoded
    assert opened == ["s-001.tar"]
    assert library.encoder.encoded == 5


def test_tars_that_change_come_and_go(shards):
    library = made(shards)
    library.index()
    white = painted("white", (41, 30))
    write_tar(shards / "s-000.tar", {"new.png": white, "0.png": painted("red"), "0.txt": b"other words"})
    touch(shards / "s-000.tar")
    write_tar(shards / "more" / "s-002.tar", {"0.png": painted("green")})
    (shards / "s-001.tar").unlink()
    report = library.index()
    # Red lies elsewhere in its tar and has other words; green went from one tar into another; three are gone.
    assert counts(report) == did(added=1, changed=1, renamed=1, deleted=3, embedded=1)
    assert_vectors(library, {"s-000.tar/new.png": "white", "s-000.tar/0.png": "red", "more/s-002.tar/0.png": "green"})
    row = rows(library)["s-000.tar/0.png"]
    assert (row.caption, set(row.columns)) == ("other words", {"offset"})
    assert library.search("red", k=1)[0].picture.read_bytes() == painted("red")
    assert rows(library)["more/s-002.tar/0.png"].columns["split"] == "more"
    assert counts(library.index()) == did(skipped=3)


def test_part_of_a_folder_of_tars(shards):
    write_tar(shards / "val" / "v.tar", {"0.png": painted("green")})
    library = made(shards)
    assert counts(library.index("val")) == did(added=1, embedded=1)
    assert counts(library.index()) == did(added=5, embedded=5, skipped=1)
    touch(shards / "s-000.tar")
    (shards / "s-001.tar").unlink()
    (shards / "val" / "v.tar").unlink()
    assert counts(library.index("val")) == did(deleted=1)
    assert found(library, "red", below="s-001.tar", k=9) != []
    assert counts(library.index()) == did(changed=2, deleted=3)
    assert found(library, "red", k=9) == ["s-000.tar/0.png", "s-000.tar/a/1.png"]


def test_broken_members_are_failures_and_the_rest_is_taken_in(tmp_path):
    tar = write_tar(tmp_path / "odd.tar", {
        "good.png": painted("red"), "cut.png": painted("red")[:40], "text.png": b"hello", "lonely.txt": b"no picture",
        "bad.png": painted("red"), "bad.json": b"{", "empty.png": b"", "./dot.png": painted("blue"),
    })  # fmt: skip
    library = made(tar)
    report = library.index()
    reasons = {failure.path: failure.reason for failure in report.failures}
    assert set(reasons) == {f"odd.tar/{name}" for name in ("cut.png", "text.png", "lonely", "bad", "empty.png")}
    assert reasons["odd.tar/lonely"] == "a sample without a picture"
    assert "is not JSON" in reasons["odd.tar/bad"]
    assert counts(report) == did(added=2, embedded=2)
    assert library.index().failures == report.failures
    assert library.encoder.encoded == 2
    write_tar(tar, {"cut.png": painted("green"), "good.png": painted("red")})
    touch(tar)
    report = library.index()
    assert (report.failures, sorted(library.store.paths())) == ((), ["odd.tar/cut.png", "odd.tar/good.png"])


def test_a_broken_tar_among_others(shards):
    whole = (shards / "s-001.tar").read_bytes()
    (shards / "s-001.tar").write_bytes(whole[:1500])
    library = made(shards)
    report = library.index()
    assert [(f.path, "damaged or cut short" in f.reason) for f in report.failures] == [("s-001.tar", True)]
    assert counts(report) == did(added=2, embedded=2)
    assert counts(library.index()) == did(skipped=2)
    assert library.index().failures == report.failures  # remembered, and not tried again
    (shards / "s-001.tar").write_bytes(whole)
    touch(shards / "s-001.tar")
    assert counts(library.index()) == did(added=3, embedded=3, skipped=2)
    assert library.index().failures == ()
    (shards / "s-001.tar").write_bytes(whole[:1000])  # what is known of it stays: it may be in the middle of a copy
    touch(shards / "s-001.tar")
    assert len(library.index().failures) == 1
    assert_vectors(library, COLOUR_OF)


def test_no_tar_can_be_read_or_is_there(shards, tmp_path):
    bad = tmp_path / "bad.tar"
    bad.write_bytes(b"no tar at all")
    with pytest.raises(DataError, match=r"bad\.tar: is damaged"):
        made(bad).index()
    library = made(shards)
    library.index()
    shards.rename(tmp_path / "away")
    shards.mkdir()
    shutil.move(tmp_path / "away" / ".diptych", shards / ".diptych")
    with pytest.raises(UsageError, match="is a drive not mounted"):
        again(shards).index()
    pattern = tmp_path / "away" / "s-{000..002}.tar"
    with pytest.raises(DataError, match="1 of the 3 files"):
        made(pattern).index()


def test_a_killed_run_over_tars_goes_on(tmp_path):
    """`kill -9` at several moments: what was committed stays and is not encoded again, nothing is there twice."""
    expected = {}
    for number in range(4):
        members = {}
        for i in range(30):
            colour = NAMES[(number + i) % 5]
            members[f"{i:03}.png"] = painted(colour, (20 + i, 20 + number))
            expected[f"{number}.tar/{i:03}.png"] = colour
        write_tar(tmp_path / "set" / f"{number}.tar", members)
    code = f"""
import time
from pathlib import Path
from indexes import writer
from retrieval import indexing
from retrieval.library import Library, find_store
from tests.fakes import ColourEncoder
writer._BUFFERED, indexing._BATCH = 10, 4
class Slow(ColourEncoder):
    def encode_images(self, images):
        time.sleep(0.006 * len(images))
        return super().encode_images(images)
folder = Path({str(tmp_path / "set")!r})
library = (Library.open if find_store(folder) else Library.create)(folder, encoder=Slow())
print("go", flush=True)
library.index()
"""
    known = 0
    for seconds in (0.15, 0.3, 0.2):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
        assert child.stdout.readline() == b"go\n"
        time.sleep(seconds)
        child.send_signal(signal.SIGKILL)
        child.stdout.close()
        child.wait()
        store = Store.open(tmp_path / "set" / ".diptych")
        assert store.check() == []
        assert len(store) >= known
        assert len(set(store.paths())) == len(store)
        known = len(store)
    library = again(tmp_path / "set")
    assert counts(library.index()) == did(added=120 - known, embedded=120 - known, skipped=known)
    assert_vectors(library, expected)


def test_rows_of_a_tar_that_a_killed_run_left_and_that_is_gone(shards):
    made(shards).index()
    members = {f"{i:02}.png": painted("red", (9 + i, 9)) for i in range(20)}
    write_tar(shards / "s-002.tar", members)

    class Once(ColourEncoder):
        def encode_images(self, images):
            if self.encoded:
                raise KeyboardInterrupt
            return super().encode_images(images)

    with pytest.raises(KeyboardInterrupt):
        Library.open(shards, encoder=Once()).index()
    assert len(Store.open(shards / ".diptych")) == 5 + 16
    (shards / "s-002.tar").unlink()
    assert counts(again(shards).index()) == did(deleted=16, skipped=5)


def test_a_page_shows_pictures_inside_a_tar(shards):
    library = made(shards)
    library.index()
    page = results_page([("red", library.search("red", k=5))])
    assert (page.count("data:image/jpeg"), page.count("href=")) == (5, 0)
    (shards / "s-001.tar").unlink()
    page = results_page([("red", library.search("red", k=5))])
    assert (page.count("data:image/jpeg"), page.count("(unreadable)")) == (2, 3)


def test_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    tar = write_tar(tmp_path / f"{name}.tar", {f"{name}.png": painted("red"), "a\nb.png": painted("blue")})
    library = made(tar)
    assert counts(library.index()) == did(added=2, embedded=2)
    assert set(library.store.paths()) == {f"{name}.tar/{name}.png", f"{name}.tar/a\nb.png"}
    library = again(tar)
    assert library.search("red", k=1)[0].picture.read_bytes() == painted("red")
    assert counts(library.index()) == did(skipped=2)


def test_where_nothing_can_be_written_the_index_lies_in_the_data_directory(shards, pictures, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(pictures / "data"))
    monkeypatch.setattr("retrieval.library.os.access", lambda *_: False)
    file = write_jsonl(pictures / "l.jsonl", [{"image": "images/red.png"}])
    for source in (shards, shards / "s-000.tar", file):
        library = made(source)
        assert library.store.path.is_relative_to(pictures / "data" / "diptych" / "indexes")
        added = library.index().added
        assert counts(again(source).index()) == did(skipped=added)
    assert len(list((pictures / "data" / "diptych" / "indexes").iterdir())) == 3
    assert find_store(shards / "s-001.tar") is None


def test_photos_in_the_folder_win_over_tars(shards):
    paint(shards / "sub" / "photo.png", "red")
    assert recognise(shards) is None
    assert counts(made(shards).index()) == did(added=1, embedded=1)


# ---- lists -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    for colour in NAMES:
        paint(tmp_path / "images" / f"{colour}.png", colour)
    return tmp_path


def write_jsonl(file: Path, objects: list[dict]) -> Path:
    file.write_text("".join(json.dumps(one) + "\n" for one in objects))
    touch(file)
    return file


def test_a_csv_with_columns(pictures):
    file = pictures / "list.csv"
    file.write_text(
        "filepath,title,price,id,label,note\n"
        'images/red.png,"red, really",1.5,7,warm,\nimages/blue.png,,2,8,cold,x\nimages/green.png,,,9,,\n'
    )
    library = made(file)
    assert counts(library.index()) == did(added=3, embedded=3)
    assert library.store.path == pictures / "list.csv.diptych"
    assert {path: (row.caption, row.columns) for path, row in rows(library).items()} == {
        "images/red.png": ("red, really", {"price": 1.5, "id_": 7, "labels": ["warm"]}),
        "images/blue.png": (None, {"price": 2.0, "id_": 8, "labels": ["cold"], "note": "x"}),
        "images/green.png": (None, {"id_": 9}),
    }
    best = again(file).search("red", k=1)[0]
    assert (best.path, best.file, best.columns["price"]) == ("images/red.png", pictures / "images" / "red.png", 1.5)
    assert best.picture.read_bytes() == best.file.read_bytes()
    assert find_store(pictures / "images") is None  # the list's index is not the folder's


@pytest.mark.parametrize("form", ["tsv", "parquet", "jsonl", "json", "txt"])
def test_the_same_list_in_other_forms(pictures, form):
    names = [f"images/{colour}.png" for colour in NAMES]
    file = pictures / f"list.{form}"
    if form == "tsv":
        file.write_text("image\tn\n" + "".join(f"{name}\t{i}\n" for i, name in enumerate(names)))
    elif form == "parquet":
        pq.write_table(pa.table({"image": names, "n": range(5)}), file)
    elif form == "jsonl":
        write_jsonl(file, [{"image": name, "n": i} for i, name in enumerate(names)])
    elif form == "json":
        file.write_text(json.dumps([{"image": name, "n": i} for i, name in enumerate(names)]))
    else:
        file.write_text("\n".join(names) + "\n\n")
    library = made(file)
    assert counts(library.index()) == did(added=5, embedded=5)
    expected = {name: {} if form == "txt" else {"n": i} for i, name in enumerate(names)}
    assert {path: row.columns for path, row in rows(library).items()} == expected
    assert counts(again(file).index()) == did(skipped=5)


def test_a_list_of_addresses_anywhere_else_than_in_the_first_line(pictures):
    with pytest.raises(DataError, match="lists addresses, not files: 1 of its 2 pictures"):
        made(write_jsonl(pictures / "l.jsonl", [{"image": "images/red.png"}, {"image": "https://a.b/c.jpg"}]))
    with pytest.raises(DataError, match="lists addresses of pictures, not files"):
        made(write_jsonl(pictures / "u.jsonl", [{"url": "https://a.b/c.jpg", "caption": "words"}]))
    library = made(write_jsonl(pictures / "m.jsonl", [{"image": "images/red.png"}]))
    library.index()
    write_jsonl(pictures / "m.jsonl", [{"image": "s3://bucket/c.jpg"}])
    with pytest.raises(DataError, match="lists addresses"):
        library.index()
    for address in ("https://a.b/c.tar", "s3://x/{0..9}.tar", "pipe:cat x"):
        with pytest.raises(UsageError, match="is an address"):
            check_given(Path(address))
    assert not list(pictures.glob("[lu].jsonl.diptych"))


def test_relative_absolute_odd_and_missing_paths(pictures, tmp_path_factory):
    far = paint(tmp_path_factory.mktemp("far") / "x.png", "white")
    folder = pictures / "lists"
    folder.mkdir()
    file = write_jsonl(folder / "l.jsonl", [
        {"image": "../images/red.png"}, {"image": str(pictures / "images" / "blue.png")}, {"image": str(far)},
        {"image": "../images/./sub/../green.png"}, {"image": "../images/gone.png"}, {"image": "../images"},
    ])  # fmt: skip
    (pictures / "images" / "sub").mkdir()
    library = made(file)
    report = library.index()
    assert sorted(library.store.paths()) == sorted(
        ["../images/red.png", "../images/blue.png", str(far), "../images/green.png"]
    )
    assert {f.path for f in report.failures} == {"../images/gone.png", "../images"}
    assert report.failures[0].reason == "l.jsonl names it, but there is no such file"
    generation = library.store.snapshot.manifest.generation
    assert counts(library.index()) == did(skipped=4)
    assert library.store.snapshot.manifest.generation == generation  # a missing picture is not a change each time
    assert all(match.file.is_file() for match in library.search("red", k=9))
    paint(pictures / "images" / "gone.png", "yellow")
    assert counts(library.index()) == did(added=1, embedded=1, skipped=4)
    far.unlink()
    assert counts(library.index()) == did(deleted=1, skipped=4)
    assert {f.path for f in library.store.failures()} == {str(far), "../images"}


def test_metadata_that_changed_is_taken_over_without_encoding(pictures):
    file = write_jsonl(pictures / "l.jsonl", [
        {"image": "images/red.png", "n": 1, "caption": "old"}, {"image": "images/blue.png", "n": 2},
        {"image": "images/green.png", "tags": ["a", "b"], "f": float("nan")},
    ])  # fmt: skip
    library = made(file)
    library.index()
    touch(file)
    assert counts(library.index()) == did(skipped=3)
    write_jsonl(file, [
        {"image": "images/red.png", "n": "one", "caption": "new"}, {"image": "images/blue.png", "n": 2},
        {"image": "images/green.png", "tags": ["a", "b"]},
    ])  # fmt: skip
    vectors = library.store.vectors().copy()
    assert library.pending() == 1
    assert counts(library.index()) == did(changed=1, skipped=2)
    assert library.encoder.encoded == 3
    assert rows(library)["images/red.png"].columns == {"n": "one"}
    assert rows(library)["images/red.png"].caption == "new"
    assert sorted(map(tuple, library.store.vectors())) == sorted(map(tuple, vectors))
    touch(file)
    assert counts(library.index()) == did(skipped=3)  # 2 beside "one" is read as text, and still no change


def test_the_same_picture_listed_twice_is_one(pictures):
    file = write_jsonl(pictures / "l.jsonl", [
        {"image": "images/red.png", "caption": "first", "n": 1, "label": "a", "split": "train"},
        {"image": "images/./red.png", "caption": "second", "n": 2, "label": "b", "split": "test", "m": 3},
        {"image": "images/red.png", "caption": "first", "n": 3, "split": "train"},
    ])  # fmt: skip
    library = made(file)
    assert counts(library.index()) == did(added=1, embedded=1)
    row = rows(library)["images/red.png"]
    assert row.caption == "first"
    assert row.columns == {
        "captions": ["first", "second"], "labels": ["a", "b"], "split": "train", "n": ["1", "3"], "m": 3,
    }  # fmt: skip


def test_values_of_every_kind_become_columns(pictures):
    table = pa.table({
        "image": ["images/red.png"], "when": [datetime(2024, 1, 2)], "many": [[1, 2]], "of": [{"a": None}],
        "raw": pa.array([b"x"]), "big": pa.array([2**64 - 1], pa.uint64()), "yes": [True], "id": ["7"], "id_": [8],
        "": ["nameless"], "captions": [["one", "two"]],
    })  # fmt: skip
    pq.write_table(table, pictures / "t.parquet")
    library = made(pictures / "t.parquet")
    library.index()
    (row,) = rows(library).values()
    assert row.columns == {
        "captions": ["one", "two"], "when": datetime(2024, 1, 2), "many": "[1, 2]", "of": '{"a": null}',
        "big": str(2**64 - 1), "yes": True, "id_": "7", "id__": 8, "_": "nameless",
    }  # fmt: skip


def test_renamed_changed_and_no_longer_listed(pictures):
    file = write_jsonl(pictures / "l.jsonl", [{"image": f"images/{colour}.png"} for colour in NAMES])
    library = made(file)
    library.index()
    (pictures / "images" / "red.png").rename(pictures / "rot.png")
    paint(pictures / "images" / "blue.png", "white", (50, 50))
    (pictures / "images" / "green.png").write_bytes(b"no picture any more")
    listed = ["rot.png", "images/blue.png", "images/green.png", "images/yellow.png"]
    write_jsonl(file, [{"image": str(pictures / name), "n": 1} for name in listed])
    report = library.index()
    assert counts(report) == did(changed=2, renamed=1, deleted=1, embedded=1)
    assert [f.path for f in report.failures] == ["images/green.png"]
    assert_vectors(library, {"rot.png": "red", "images/blue.png": "white", "images/yellow.png": "yellow"})
    assert rows(library)["rot.png"].columns == {"n": 1}


def test_pictures_inside_parquet(pictures):
    images = [{"bytes": painted(c), "path": f"{n}.png"} for c, n in (("red", "a"), ("blue", "a"), ("green", "b"))]
    file = pictures / "hf.parquet"
    pq.write_table(pa.table({"image": images, "label": ["r", "b", "g"]}), file)
    library = made(file)
    assert counts(library.index()) == did(added=3, embedded=3)
    assert_vectors(library, {"hf.parquet/a.png": "red", "hf.parquet/a.png#2": "blue", "hf.parquet/b.png": "green"})
    best = again(file).search("blue", k=1)[0]
    assert (best.picture.name, best.picture.read_bytes()) == ("a.png#2", painted("blue"))
    assert results_page([("blue", [best])]).count("data:image/jpeg") == 1
    assert counts(again(file).index()) == did(skipped=3)


def test_the_pictures_may_lie_elsewhere(pictures):
    file = write_jsonl(pictures / "l.jsonl", [{"image": "red.png"}, {"image": "blue.png"}])
    (pictures / "images").rename(pictures / "photos")
    with pytest.raises(UsageError, match=r"none of the 2 pictures .* --images"):
        made(file).index()
    library = again(file)
    library.check_source(file, images=pictures / "photos")
    assert counts(library.index()) == did(added=2, embedded=2)
    assert sorted(library.store.paths()) == ["photos/blue.png", "photos/red.png"]
    (pictures / "photos").rename(pictures / "moved")
    with pytest.raises(DataError, match="there is no such folder of pictures"):
        library.index()
    assert len(library.store) == 2
    library.check_source(file, images=pictures / "moved")
    assert counts(library.index()) == did(renamed=2)
    assert counts(again(file).index()) == did(skipped=2)


def test_another_source_than_the_index_was_made_from(pictures, tmp_path):
    one = write_jsonl(pictures / "one.jsonl", [{"image": "images/red.png"}])
    two = write_jsonl(pictures / "two.jsonl", [{"image": "images/red.png"}])
    library = made(one, index=pictures / "index")
    library.check_source(one)
    for given, options in ((two, {}), (one, {"texts": True})):
        with pytest.raises(UsageError, match=r"was made from the pictures of .*one\.jsonl"):
            library.check_source(given, **options)
    library.check_source(pictures)  # the folder that a command is started in says nothing
    assert Library.open(index=pictures / "index", encoder=ColourEncoder()).place == one


def test_the_index_of_a_list_moves_with_it(pictures):
    inner = pictures / "all"
    inner.mkdir()
    (pictures / "images").rename(inner / "images")
    made(write_jsonl(inner / "l.jsonl", [{"image": "images/red.png"}])).index()
    inner.rename(pictures / "moved")
    library = again(pictures / "moved" / "l.jsonl")
    assert counts(library.index()) == did(skipped=1)
    assert library.search("red", k=1)[0].file == pictures / "moved" / "images" / "red.png"


def test_a_list_that_is_gone_or_damaged_changes_nothing(pictures):
    file = write_jsonl(pictures / "l.jsonl", [{"image": "images/red.png"}])
    library = made(file)
    library.index()
    file.write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        library.index()
    file.unlink()
    with pytest.raises(UsageError, match="is a drive not mounted"):
        library.index()
    assert found(library, "red") == ["images/red.png"]
    other = pictures / "other.csv"
    other.write_text("image\nimages/red.png\n")
    with pytest.raises(StoreNotFound, match=r"no index for .*other\.csv: make one"):
        again(other)


# ---- sentences -------------------------------------------------------------------------------------------------------


def test_sentences_are_found_with_a_picture(pictures):
    file = pictures / "captions.txt"
    file.write_text("a red car\n\n  the blue sea \na red car\nyellow and green\n")
    library = made(file)
    assert counts(library.index()) == did(added=3, embedded=3)
    match = library.search([Term(image=pictures / "images" / "blue.png")], k=1)[0]
    assert (match.kind, match.caption, match.path, match.file) == ("text", "the blue sea", "", file)
    assert [m.caption for m in again(file).search("red", k=1)] == ["a red car"]
    assert library.counts() == {"pictures": 0, "texts": 3}
    assert counts(library.index()) == did(skipped=3)
    file.write_text("a red car\na white wall\n")
    touch(file)
    assert counts(library.index()) == did(added=1, deleted=2, embedded=1, skipped=1)
    assert "a white wall" in results_page([("white", library.search("white", k=1))])


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet", "json"])
def test_tables_of_sentences_with_columns(tmp_path, form):
    file = tmp_path / f"texts.{form}"
    objects = [{"text": "a red car", "source": "x"}, {"text": "the blue sea, calm", "source": "y"}]
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(objects), file)
    elif form == "json":
        file.write_text(json.dumps(objects))
    elif form == "jsonl":
        write_jsonl(file, objects)
    else:
        lines = [["text", "source"], *map(dict.values, objects)]
        mark = "," if form == "csv" else "\t"
        file.write_text("".join(mark.join(f'"{value}"' for value in line) + "\n" for line in lines))
    library = made(file)
    assert counts(library.index()) == did(added=2, embedded=2)
    match = library.search("blue", k=1)[0]
    assert (match.caption, match.columns) == ("the blue sea, calm", {"source": "y"})
    assert counts(library.index()) == did(skipped=2)


def test_sentences_that_name_their_pictures(pictures):
    file = write_jsonl(pictures / "pairs.jsonl", [
        {"image": "images/red.png", "captions": ["something red", "red paint"], "n": 1},
        {"image": "images/gone.png", "captions": ["red paint", " "]},
    ])  # fmt: skip
    library = made(file, texts=True)
    assert counts(library.index()) == did(added=3, embedded=3)
    hits = library.search([Term(image=pictures / "images" / "red.png")], k=5)
    assert {(hit.caption, hit.path) for hit in hits} == {
        ("something red", "images/red.png"), ("red paint", "images/red.png"), ("red paint", "images/gone.png"),
    }  # fmt: skip
    assert library.index().failures == ()
    write_jsonl(file, [
        {"image": "images/red.png", "captions": ["something red", "red paint"], "n": 2},
        {"image": "images/blue.png", "captions": ["red paint"]},
    ])  # fmt: skip
    # A sentence that went to another picture is not encoded again.
    assert counts(library.index()) == did(changed=2, renamed=1)
    assert library.encoder.encoded == 1  # the query
    assert {row.columns.get("n") for row in rows(library).values()} == {2, None}


def test_sentences_of_tars(shards):
    library = made(shards / "s-000.tar", texts=True)
    assert counts(library.index()) == did(added=2, embedded=2)
    assert {match.path for match in library.search("red", k=5)} == {"s-000.tar/0.png"}
    assert counts(library.index()) == did(skipped=2)


def test_pictures_and_sentences_in_one_index(tmp_path):
    """As an import makes it: a query finds pictures unless sentences are asked for."""
    library = made(paint(tmp_path / "p" / "a.png", "red").parent)
    library.index()
    with library.store.write() as writer:
        writer.add(Row(path="a.png", kind="text", size=3, mtime_ns=0, hash="0", caption="red"), [1, 0, 0])
    assert [match.kind for match in library.search("red", k=5)] == ["image"]
    assert [match.kind for match in library.search("red", k=5, below="")] == ["image"]
    (text,) = library.search("red", k=5, kind="text")
    assert (text.caption, text.path, text.kind) == ("red", "a.png", "text")
    assert library.counts() == {"pictures": 1, "texts": 1}
    with pytest.raises(ValueError, match="image or text"):
        library.search("red", kind="texts")


def test_kinds_equal_brute_force(tmp_path):
    rng = np.random.default_rng(0)
    library = made(paint(tmp_path / "p" / "a.png", "red").parent)
    vectors = as_vectors(rng.standard_normal((60, 3)))
    kinds = rng.choice(["image", "text"], 60).tolist()
    with library.store.write() as writer:
        for i, (kind, vector) in enumerate(zip(kinds, vectors, strict=True)):
            writer.add(Row(path=f"{i % 3}/{i}", kind=kind, size=1, mtime_ns=1, hash="0", caption=str(i)), vector)
    stored = library.store.vectors()
    for query in ("red", "blue green"):
        scores = stored @ library.encoder.encode_texts([query])[0]
        for kind in ("image", "text"):
            for below in ("", "1"):
                may = [i for i in range(60) if kinds[i] == kind and (kind == "text" or not below or i % 3 == 1)]
                best = sorted(may, key=lambda i: -scores[i])[:7]
                assert found(library, query, k=7, kind=kind, below=below) == [f"{i % 3}/{i}" for i in best]


# ---- what is what ----------------------------------------------------------------------------------------------------


def test_what_a_name_stands_for(shards, pictures):
    (pictures / "empty").mkdir()
    kinds = {
        shards: "tars", shards / "s-000.tar": "tars", shards / "s-{000..001}.tar": "tars", pictures / "images": None,
        pictures / "empty": None,
        write_jsonl(pictures / "a.jsonl", [{"image": "x.png"}]): "list",
        write_jsonl(pictures / "b.jsonl", [{"text": "x"}]): "texts",
        write_jsonl(pictures / "c.jsonl", [{"image": "x.png"}, {"text": "x"}]): "list",
    }  # fmt: skip
    for source, kind in kinds.items():
        corpus = recognise(source)
        assert (corpus and corpus.source.kind) == kind, source
    assert recognise(pictures / "c.jsonl", texts=True).source.kind == "texts"
    for part in ("train", "val"):
        for number in (0, 1):
            write_tar(pictures / part / f"s-{number}.tar", {"0.png": painted("red")})
    braces = pictures / "{train,val}" / "s-{0..1}.tar"
    corpus = recognise(braces)
    assert (corpus.root, corpus.source.path) == (pictures, "{train,val}/s-{0..1}.tar")
    assert corpus.store == pictures / "{train,val}-s-{0..1}.tar.diptych"
    library = made(braces)
    assert counts(library.index()) == did(added=4, embedded=4)
    assert "val/s-1.tar/0.png" in library.store.paths()
    assert counts(again(braces).index()) == did(skipped=4)


def test_options_that_do_not_fit(shards, pictures):
    for source, options, said in (
        (pictures / "images", {"texts": True}, "--texts goes with a file or with tars"),
        (pictures / "images", {"images": pictures}, "--images goes with a file or with tars"),
        (shards, {"images": pictures}, "holds its own"),
    ):
        with pytest.raises(UsageError, match=said):
            recognise(source, **options)
    with pytest.raises(DataError, match="there is no such folder of pictures"):
        recognise(write_jsonl(pictures / "l.jsonl", [{"image": "red.png"}]), images=pictures / "nowhere")
    with pytest.raises(UsageError, match="not a folder, nor a regular file"):
        recognise(Path(os.devnull))
    with pytest.raises(DataError, match="is itself a picture"):
        recognise(pictures / "images" / "red.png")
    with pytest.raises(DataError, match="has no sentences"):
        made(write_jsonl(pictures / "no.jsonl", [{"image": "images/red.png"}]), texts=True).index()


def test_a_list_with_a_line_that_names_no_picture(pictures):
    file = write_jsonl(pictures / "c.jsonl", [{"image": "images/red.png"}, {"text": "x"}])
    with pytest.raises(DataError, match='line 2: expected an object with "image"'):
        made(file).index()


def test_a_match_is_the_same_wherever_its_picture_is_read_from():
    plain = Match("a", 0.5, Path("a"), None, None, None, 0)
    assert plain == Match("a", 0.5, Path("a"), None, None, None, 0, picture=Path("b"))
    assert len({plain, Match("a", 0.5, Path("a"), None, None, None, 0, columns={"n": 1})}) == 2
