"""Which FAISS index is built, as a person asks for it and is told of it."""

from __future__ import annotations

import shutil

import pytest

from retrieval.library import Library, Wanted
from tests.cli.commands import complaint, diptych, result
from tests.fakes import ColourEncoder
from tests.odd_photos import real_photos


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds") / "photos"
    folder.mkdir()
    for photo in real_photos():
        shutil.copyfile(photo, folder / photo.name)
    result(diptych("index", folder, "--json"))
    return folder


@pytest.fixture
def photos(indexed, tmp_path):
    return shutil.copytree(indexed, tmp_path / "photos")


def test_a_kind_is_built_measured_shown_and_kept(photos):
    """With the built-in model: the everyday sentences are encoded, nothing else is."""
    assert result(diptych("info", photos, "--json"))["search"] == {"kind": "exact"}
    before = result(diptych("search", "a cat", "-C", photos, "--json"))
    report = result(diptych("index", photos, "--index-kind", "HNSW8,SQ8", "--target-recall", "0.9", "--json"))
    assert (report["embedded"], report["skipped"]) == (0, 20)
    search = result(diptych("info", photos, "--json"))["search"]
    assert (search["kind"], search["rows"], search["queries"]) == ("HNSW8,SQ8", 20, {"text": 300, "image": 20})
    assert search["recall"]["text"] >= 0.9
    assert search["bytes"] == (photos / ".diptych" / "vectors.faiss").stat().st_size
    line = next(line for line in diptych("info", photos).stdout.splitlines() if line.startswith("search\t"))
    assert line.startswith("search\tHNSW8,SQ8, 20 rows, 0.0 MB, recall@10 1.000 for text queries, ")
    assert result(diptych("search", "a cat", "-C", photos, "--json")) == before
    (photos / "cat.png").write_bytes((photos / "chelsea.png").read_bytes())
    result(diptych("index", photos, "--json"))
    assert result(diptych("info", photos, "--json"))["search"] == search  # one more photo rebuilds nothing …
    found = result(diptych("search", "a cat", "-C", photos, "-t", "2", "--json"))
    assert {match["path"] for match in found} == {
        str(photos / "cat.png"),
        str(photos / "chelsea.png"),
    }  # … and is found
    result(diptych("index", photos, "--index-kind", "exact", "--json"))
    assert result(diptych("info", photos, "--json"))["search"] == {"kind": "exact"}


@pytest.mark.parametrize(
    ("options", "code", "line"),
    [
        (["--index-kind", "Flatt"], 1, "FAISS cannot build an index of kind 'Flatt' on 20 vectors: "),
        (["--index-kind", "IVF64,Flat"], 1, "'IVF64,Flat' on 20 vectors: it needs at least 2,496 to be trained"),
        (["--max-index-memory", "plenty"], 2, "'plenty' is no size: write 500M or 4G"),
        (["--target-recall", "95"], 2, "--target-recall"),
    ],
)
def test_mistakes(photos, options, code, line):
    run = diptych("index", photos, *options)
    assert run.returncode == code
    assert line in run.stderr
    assert "Traceback" not in run.stderr
    if code == 1:
        assert line in complaint(run)
    assert result(diptych("info", photos, "--json"))["search"] == {"kind": "exact"}


def test_a_library_chooses_when_it_has_grown(tmp_path, monkeypatch):
    monkeypatch.setattr("indexes.choice._EXACT_ROWS", 10)
    monkeypatch.setattr("indexes.store._STALE_ROWS", 5)
    for photo in real_photos():
        shutil.copyfile(photo, tmp_path / photo.name)
    library = Library.create(tmp_path, encoder=ColourEncoder())
    library.index()
    assert library.store.ann.factory == "RaBitQfs"
    assert library.store.ann.measured.queries == {"image": 20}  # this model knows hardly a word of the sentences
    for photo in real_photos()[5:]:
        (tmp_path / photo.name).unlink()
    library.index(wanted=Wanted(recall=0.8))
    assert library.store.ann is None  # few are left
    assert library.store.wanted.recall == 0.8


def test_an_index_run_builds_a_damaged_file_anew(tmp_path):
    for photo in real_photos():
        shutil.copyfile(photo, tmp_path / photo.name)
    library = Library.create(tmp_path, encoder=ColourEncoder())
    library.index()
    library.store.rebuild_index("HNSW8")
    (tmp_path / ".diptych" / "vectors.faiss").write_bytes(b"damaged")
    assert library.store.index_is_stale()
    library.index()
    assert library.store.check() == []
    assert library.store.ann.factory == "HNSW8"
