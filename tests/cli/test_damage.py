"""A damaged index, one of a newer release and one that may only be read, as the command meets them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from indexes.store import Store
from retrieval.library import Library
from tests.cli.commands import complaint, diptych, result
from tests.fakes import ColourEncoder
from tests.mounts import make_read_only, small_disk


def paint(folder: Path, numbers: range) -> Path:
    folder.mkdir(exist_ok=True)
    for i in numbers:
        pixels = np.random.default_rng(i).integers(0, 256, (5, 5, 3), np.uint8)
        Image.fromarray(pixels).resize((40, 40)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """Two segments, of 5 and of 4 pictures, and a file that is no picture."""
    folder = paint(tmp_path_factory.mktemp("damage") / "photos", range(5))
    assert diptych("index", folder).returncode == 0
    paint(folder, range(5, 9))
    (folder / "broken.png").write_bytes(b"no picture")
    assert diptych("index", folder).returncode == 3
    return folder


@pytest.fixture
def photos(indexed, tmp_path):
    return Path(shutil.copytree(indexed, tmp_path / "photos"))


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def segments(photos: Path) -> list[Path]:
    return sorted((photos / ".diptych" / "segments").iterdir())


READING = [("search", "noise", "-n"), ("info",), ("info", "--check"), ("dedupe",), ("export", "-o", "out")]


@pytest.mark.parametrize("arguments", [*READING, ("index",), ("index", "--repair"), ("search", "noise")])
def test_an_index_of_a_newer_release(photos, arguments):
    manifest = photos / ".diptych" / "manifest.json"
    manifest.write_text(json.dumps({"format": 99, "segments": "kept somewhere else"}))
    before = {file: file.read_bytes() for file in (photos / ".diptych").rglob("*") if file.is_file()}
    said = complaint(diptych(*arguments, cwd=photos))
    assert said == f"diptych: {manifest} has format 99, and this release reads up to 2: upgrade diptych"
    assert {file: file.read_bytes() for file in (photos / ".diptych").rglob("*") if file.is_file()} == before
    assert not (photos / "out").exists()


def test_everything_that_is_wrong_is_told_and_repaired(photos):
    first, second = segments(photos)
    failures = photos / ".diptych" / "failures.parquet"
    for file in (first, second, failures):
        flip(file, file.stat().st_size // 2)
    checked = diptych("info", "--check", cwd=photos)
    assert (checked.returncode, "Traceback" in checked.stderr) == (1, False)
    lines = checked.stderr.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"damaged: {first} is damaged: its content is not what was written; it held 5 rows (ids")
    assert "diptych index --repair" in lines[0]
    assert lines[1].startswith(f"damaged: {second} is damaged: its content is not what was written; it held 4 rows")
    assert lines[2].startswith(f"damaged: {failures} is damaged")
    assert lines[2].endswith("delete it, it only names files that could not be read")
    assert len(result(diptych("info", "--check", "--json", cwd=photos), code=1)["problems"]) == 3
    failures.unlink()
    run = diptych("index", "--repair", "--json", cwd=photos)
    report = result(run, code=3)
    assert (report["added"], report["skipped"]) == (9, 0)
    place = photos / ".diptych"
    assert f"gave up 9 rows of {place} in damaged files: {first.name}, {second.name}" in run.stderr
    assert result(diptych("info", "--check", "--json", cwd=photos))["problems"] == []
    assert len(diptych("search", "noise", "-f", "-t", "99", cwd=photos).stdout.splitlines()) == 9


def test_a_check_without_the_model_at_hand(photos):
    library = Library.create(photos, index=photos.parent / "other", encoder=ColourEncoder())
    library.index()
    for problems in ([], [r"segments/\d+\.parquet is damaged"]):
        lines = diptych("info", photos, "--index", photos.parent / "other", "--check").stderr.splitlines()
        expected = [*problems, "its model cannot be checked: no model is called 'colours'"]
        assert len(lines) == len(expected)
        for line, words in zip(lines, expected, strict=True):
            assert re.search(words, line)
        flip(next((photos.parent / "other" / "segments").iterdir()), 50)


@pytest.mark.parametrize("damage", ["missing", "footer", "empty"])
def test_a_segment_that_cannot_be_read(photos, damage):
    second = segments(photos)[1]
    if damage == "missing":
        second.unlink()
    elif damage == "empty":
        second.write_bytes(b"")
    else:
        flip(second, second.stat().st_size - 100)
    for arguments in (("search", "noise", "-n"), ("dedupe",), ("export", "-o", "out"), ("index",)):
        said = complaint(diptych(*arguments, cwd=photos))
        assert said.startswith(f"diptych: {second} is ")
        assert said.endswith("take in again what is still there with  diptych index --repair")
    checked = diptych("info", "--check", cwd=photos)
    assert checked.returncode == 1
    assert re.search(r" 4 rows \(ids between 5 and 8\), whose paths cannot be read", checked.stderr)
    (photos / "06.png").unlink()  # gone for good: what is not there cannot be taken in
    run = diptych("index", "--repair", "--json", cwd=photos)
    assert (result(run, code=3)["added"], result(run, code=3)["skipped"]) == (3, 5)
    assert "gave up 4 rows" in run.stderr
    assert Store.open(photos / ".diptych").check() == []


def test_a_repair_of_what_is_whole_or_not_there(photos, tmp_path):
    run = diptych("index", "--repair", cwd=photos)
    assert (run.returncode, f"nothing of {photos / '.diptych'} has to be given up" in run.stderr) == (3, True)
    folder = paint(tmp_path / "new", range(1))
    assert result(diptych("index", folder, "--repair", "--json"))["added"] == 1


def test_a_read_only_index_is_used_without_writing(indexed, tmp_path):
    """The real thing, also for root: the file system itself is read-only."""
    with small_disk(tmp_path / "disk") as disk:
        folder = Path(shutil.copytree(indexed, disk / "photos"))
        assert (
            diptych("index", folder, "--index-kind", "Flat").returncode == 3
        )  # mtimes of folders are new, rows are not
        make_read_only(disk)
        found = diptych("search", "noise", "-f", "-t", "99", cwd=folder)
        assert (found.returncode, len(found.stdout.splitlines()), found.stderr) == (0, 9, "")
        assert result(diptych("info", "--json", "--check", cwd=folder))["problems"] == []
        assert diptych("info", cwd=folder).returncode == 0
        assert result(diptych("dedupe", "--json", cwd=folder)) is not None
        assert diptych("export", "-o", tmp_path / "out", cwd=folder).returncode == 0
        assert len(np.load(tmp_path / "out" / "vectors.npy")) == 9
        for arguments in (("index",), ("index", "--repair"), ("index", "--index-kind", "exact")):
            said = complaint(diptych(*arguments, cwd=folder))
            assert f"{folder / '.diptych'} cannot be written (Read-only file system)" in said
        assert "Read-only file system" in complaint(diptych("export", "-o", disk / "out", cwd=folder))


def test_a_read_only_index_of_photos_that_changed(indexed, tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        folder, store = paint(tmp_path / "photos", range(5)), disk / "store"
        assert diptych("index", folder, "--index", store).returncode == 0
        make_read_only(disk)
        paint(folder, range(5, 7))
        found = diptych("search", "noise", "-f", "-t", "99", "--index", store)
        assert (found.returncode, len(found.stdout.splitlines())) == (0, 5), found.stderr
        (said,) = found.stderr.splitlines()
        assert said.startswith("searching the index as it is: ")
        assert "Read-only file system" in said
