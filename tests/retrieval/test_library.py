"""One folder kept searchable: what an index run takes in, against what lies in the folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
from PIL import Image

from indexes import filters
from indexes.errors import FilterError, ModelMismatch, StoreNotFound, VectorError
from retrieval.errors import ImageError, UsageError
from retrieval.library import Library, Term, find_store
from tests.fakes import COLOURS, ColourEncoder
from tests.odd_photos import make_odd_folder


def paint(path: Path, colour: str, size=(40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, tuple(255 * c for c in COLOURS[colour])).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    for colour in ("red", "green", "blue"):
        paint(root / f"{colour}.png", colour)
    paint(root / "holiday" / "yellow.png", "yellow")
    return root


@pytest.fixture
def library(folder):
    library = Library.create(folder, encoder=ColourEncoder())
    library.index()
    return library


def counts(report):
    return {k: getattr(report, k) for k in ("added", "changed", "renamed", "deleted", "embedded", "skipped")}


def did(**changes):
    return dict.fromkeys(("added", "changed", "renamed", "deleted", "embedded", "skipped"), 0) | changes


def found(library, query, **options):
    return [match.path for match in library.search(query, **options)]


def test_first_run_and_second_run(folder):
    library = Library.create(folder, encoder=ColourEncoder())
    assert counts(library.index()) == did(added=4, embedded=4)
    assert counts(library.index()) == did(skipped=4)
    assert library.encoder.encoded == 4
    assert library.pending() == 0


def test_a_few_new_pictures_are_taken_in_at_once_and_many_are_counted(library, folder, monkeypatch):
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 90, 0)).save(folder / f"new{i}.png")
    monkeypatch.setattr("retrieval.library.QUICK_FILES", 2)
    assert (library.catch_up(), len(library.store)) == (3, 4)
    monkeypatch.setattr("retrieval.library.QUICK_FILES", 3)
    assert (library.catch_up(), len(library.store)) == (0, 7)
    Image.new("RGB", (8, 8), (9, 90, 0)).save(folder / "another.png")
    monkeypatch.setattr("retrieval.library.QUICK_SCAN", 6)
    assert library.too_large_to_scan
    assert (library.catch_up(), len(library.store)) == (0, 7)


def test_search_equals_brute_force(library, folder):
    encoder = ColourEncoder()
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    vectors = encoder.encode_images([Image.open(folder / file) for file in files])
    for query in ("red", "green", "red blue", "yellow"):
        scores = vectors @ encoder.encode_texts([query])[0]
        expected = [files[i] for i in np.argsort(-scores, kind="stable")]
        matches = library.search(query, k=4)
        assert matches[0].path == expected[0]
        assert sorted(match.path for match in matches) == sorted(expected)
        assert [match.score for match in matches] == pytest.approx(sorted(scores.tolist(), reverse=True), abs=2e-3)
    best = library.search("yellow", k=1)[0]
    assert (best.file, best.width, best.height) == (folder / "holiday" / "yellow.png", 40, 30)


def test_more_asked_for_than_there_is(library):
    assert len(library.search("red", k=1000)) == 4


def test_threshold_and_below(library):
    assert found(library, "red", below="holiday") == ["holiday/yellow.png"]
    assert found(library, "red", threshold=0.9) == ["red.png"]
    assert found(library, "red", threshold=0.9, below="holiday") == []


@pytest.fixture
def dated(tmp_path):
    """Twelve pictures of one colour in two folders, taken one a month, of several shapes."""
    root = tmp_path / "dated"
    for month in range(1, 13):
        path = root / ("first" if month < 7 else "second") / f"{month:02d}.{'jpg' if month % 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9003] = f"2021:{month:02d}:15 12:00:00"
        Image.new("RGB", (10 * month, 60), (255, month, 0)).save(path, exif=exif.tobytes())
        os.utime(path, (0, datetime(2000 + month, 1, 1, 12).timestamp()))
    library = Library.create(root, encoder=ColourEncoder())
    library.index()
    return library


@pytest.mark.parametrize(
    ("where", "months"),
    [
        (pc.field("width") > 100, [11, 12]),
        (filters.taken("2021-03..2021-05"), [3, 4, 5]),
        (filters.modified("..2002"), [1, 2]),
        (pc.field("mtime") >= datetime(2012, 1, 1), [12]),
        (filters.orientation("square"), [6]),
        (filters.glob("first/*.png") | (pc.field("orientation") == "square"), [2, 4, 6]),
        ("type == 'jpg' and folder == 'second'", [7, 9, 11]),
        ("taken_at > '2021-10'", [11, 12]),
        (pc.field("width") < 0, []),
    ],
)
def test_filters(dated, where, months):
    for k in (1, 3, 100):
        matches = dated.search("red", k=k, where=where)
        assert matches.qualified == len(months)
        assert len(matches) == min(k, len(months))
        assert {int(Path(match.path).stem) for match in matches} <= set(months)
        assert [match.score for match in matches] == sorted((match.score for match in matches), reverse=True)
    everything = {match.path: (match.score, match.id, match.taken_at) for match in dated.search("red", k=12)}
    assert {match.path: (match.score, match.id, match.taken_at) for match in matches}.items() <= everything.items()


def test_filters_join_with_folder_threshold_and_what_changes(dated):
    wide = pc.field("width") >= 50
    assert sorted(found(dated, "red", below="first", where=wide)) == ["first/05.jpg", "first/06.png"]
    assert dated.search("red", below="first").qualified == 6
    assert dated.search("red", k=3).qualified == 12
    high = dated.search("red", where=wide, threshold=1.1)
    assert (high, high.qualified) == ([], 8)
    assert (dated.search("red", k=0, where=wide), dated.search("red", k=0, where=wide).qualified) == ([], 8)
    (dated.root / "first" / "05.jpg").unlink()
    paint(dated.root / "first" / "new.png", "red", size=(70, 7))
    dated.index()
    assert sorted(found(dated, "red", below="first", where=wide)) == ["first/06.png", "first/new.png"]
    ids = [match.id for match in dated.search("red", k=4)]
    assert {match.id for match in dated.search("red", k=100, where=filters.ids(ids))} == set(ids)


def test_filters_that_cannot_be_applied_say_so_before_the_model_is_loaded(folder):
    library = Library.create(folder, encoder=ColourEncoder())
    for wrong, message in (
        (pc.field("widht") > 3, "no column 'widht'"),
        ("width > 'x'", "width holds"),
        (3, "not int"),
    ):
        with pytest.raises(FilterError, match=message):
            library.search("red", where=wrong)
    empty = library.search("red", where="width > 3")
    assert (empty, empty.qualified) == ([], 0)


def test_a_vector_finds_what_its_sentence_finds(library):
    vector = library.query_vector([Term("red")])
    assert library.search(3 * vector.astype(np.float64), k=4) == library.search("red", k=4)
    assert library.search(-vector, k=4)[0].score == library.search([Term("red", weight=-1)], k=1)[0].score
    for wrong in (vector[:2], vector[None], 0 * vector, vector * np.nan):
        with pytest.raises(VectorError):
            library.search(wrong)


def test_a_search_reads_no_more_of_the_rows_than_it_needs(dated):
    fresh = Library.open(dated.root, encoder=ColourEncoder())
    fresh.search("red", where="width > 20")
    assert not {"rows", "paths"} & set(fresh.store.snapshot.__dict__)
    assert "hash" not in fresh.store.snapshot._columns


def test_the_query_is_the_normalised_weighted_sum(library, folder):
    encoder = ColourEncoder()
    terms = [Term.parse("2:red"), Term(image=folder / "blue.png"), Term.parse("0.5:green", sign=-1)]
    red, green = encoder.encode_texts(["red", "green"])
    blue = encoder.encode_images([Image.open(folder / "blue.png")])[0]
    total = 2 * red + blue - 0.5 * green
    assert library.query_vector(terms) == pytest.approx(total / np.linalg.norm(total), abs=1e-6)


@pytest.mark.parametrize(
    ("typed", "text", "weight"),
    [("2:a dog", "a dog", 2), (".5:x", "x", 0.5), ("1.5: x", "x", 1.5), ("at 10:30", "at 10:30", 1), ("a:b", "a:b", 1)],
)
def test_weights_as_rclip_writes_them(typed, text, weight):
    assert Term.parse(typed) == Term(text=text, weight=weight)


def test_queries_without_an_answer(library, tmp_path):
    for empty in ("", "  ", "2: "):
        with pytest.raises(UsageError, match="query is empty"):
            library.search(empty)
    with pytest.raises(UsageError, match="cancel each other out"):
        library.search([Term("red"), Term("red", weight=-1)])
    (tmp_path / "notes.jpg").write_text("no picture")
    with pytest.raises(ImageError, match=r"notes\.jpg cannot be searched with: not an image"):
        library.search([Term(image=tmp_path / "notes.jpg")])


def test_changed_touched_renamed_deleted(library, folder):
    paint(folder / "red.png", "white")  # another content
    os.utime(folder / "green.png", ns=(1, 1))  # another time, the same content
    (folder / "blue.png").rename(folder / "holiday" / "sea.png")
    (folder / "holiday" / "yellow.png").unlink()
    assert counts(library.index()) == did(changed=2, renamed=1, deleted=1, embedded=1)
    assert found(library, "white", k=1) == ["red.png"]
    assert found(library, "blue", k=1) == ["holiday/sea.png"]
    assert sorted(library.store.paths()) == ["green.png", "holiday/sea.png", "red.png"]
    assert counts(library.index()) == did(skipped=3)


def test_renamed_over_another_and_copies_of_a_renamed_one(library, folder):
    shutil.copyfile(folder / "blue.png", folder / "copy1.png")
    shutil.copyfile(folder / "blue.png", folder / "copy2.png")
    (folder / "blue.png").unlink()
    (folder / "red.png").replace(folder / "green.png")
    report = library.index()
    # One copy takes the stored vector over; the other has to be looked at. red.png has taken green.png's place.
    assert counts(report) == did(added=1, renamed=2, embedded=1, skipped=1)
    assert found(library, "red", k=1) == ["green.png"]
    assert sorted(found(library, "blue", k=2)) == ["copy1.png", "copy2.png"]
    assert sorted(library.store.paths()) == ["copy1.png", "copy2.png", "green.png", "holiday/yellow.png"]


def test_a_file_that_turns_bad_and_good_again(library, folder):
    good = (folder / "red.png").read_bytes()
    (folder / "red.png").write_bytes(good[:40])
    report = library.index()
    assert [(f.path, "truncated" in f.reason) for f in report.failures] == [("red.png", True)]
    assert "red.png" not in library.store.paths()
    assert library.index().failures == report.failures  # still there, not tried again
    (folder / "red.png").write_bytes(good)
    report = library.index()
    assert (report.added, report.failures) == (1, ())
    assert found(library, "red", k=1) == ["red.png"]


def test_a_bad_file_that_is_deleted_is_forgotten(library, folder):
    (folder / "bad.jpg").write_text("no picture")
    assert len(library.index().failures) == 1
    (folder / "bad.jpg").unlink()
    assert library.index().failures == ()


def test_only_part_of_the_folder(library, folder):
    paint(folder / "white.png", "white")
    paint(folder / "holiday" / "white.png", "white")
    (folder / "red.png").unlink()
    assert counts(library.index("holiday")) == did(added=1, embedded=1, skipped=1)
    assert "red.png" in library.store.paths()
    assert counts(library.index()) == did(added=1, deleted=1, embedded=1, skipped=4)


def test_an_unmounted_drive_costs_nothing(folder, tmp_path):
    library = Library.create(folder, index=tmp_path / "elsewhere", encoder=ColourEncoder())
    library.index()
    folder.rename(tmp_path / "away")
    with pytest.raises(UsageError, match="is a drive not mounted"):
        library.index()
    folder.mkdir()
    with pytest.raises(UsageError, match="holds no picture any more, but its index knows 4"):
        library.index()
    assert len(library.store) == 4
    assert found(library, "red", k=1) == ["red.png"]


def test_an_emptied_folder_is_believed_when_the_index_lies_in_it(library, folder):
    for path in folder.rglob("*.png"):
        path.unlink()
    assert counts(library.index("holiday")) == did(deleted=1)
    assert counts(library.index()) == did(deleted=3)
    assert library.search("red") == []


def test_an_encoder_of_ones_own_is_remembered_by_its_name(library):
    assert (library.store.model.name, library.store.model.fingerprint) == ("colours", "colours-1")


def test_the_index_moves_with_the_photos(library, folder, tmp_path):
    folder.rename(tmp_path / "moved")
    moved = Library.open(tmp_path / "moved" / "holiday", encoder=ColourEncoder())
    assert moved.root == tmp_path / "moved"
    assert moved.below(tmp_path / "moved" / "holiday") == "holiday"
    assert counts(moved.index()) == did(skipped=4)
    assert moved.search("red", k=1)[0].file == tmp_path / "moved" / "red.png"


def test_no_index_no_folder_another_model(library, folder, tmp_path):
    with pytest.raises(StoreNotFound, match="make one with  diptych index"):
        Library.open(tmp_path)
    with pytest.raises(UsageError, match="there is no folder"):
        Library.create(tmp_path / "nowhere", encoder=ColourEncoder())
    other = ColourEncoder()
    other.fingerprint, other.name = "colours-2", "other"
    with pytest.raises(ModelMismatch):
        Library.open(folder, encoder=other)


def test_every_odd_photo(tmp_path):
    odd = make_odd_folder(tmp_path / "odd")
    library = Library.create(odd.path, encoder=ColourEncoder())
    report = library.index()
    assert sorted(library.store.paths()) == sorted(odd.good)
    assert report.added == report.embedded == len(odd.good)
    assert {failure.path for failure in report.failures} == set(odd.bad)
    for failure in report.failures:
        assert odd.bad[failure.path] in failure.reason, failure
    again = library.index()
    assert counts(again) == did(skipped=len(odd.good))
    assert again.failures == report.failures
    for path, expected in odd.good.items():
        row = library.store.rows().slice(library.store.paths().index(path), 1).to_pylist()[0]
        assert (row["width"], row["height"]) == expected.size


def test_the_pixel_limit_can_be_raised(tmp_path):
    paint(tmp_path / "large.png", "red", (200, 100))
    library = Library.create(tmp_path, encoder=ColourEncoder())
    assert "0.1 megapixels, the limit is 0.01" in library.index(max_pixels=10_000).failures[0].reason


def test_a_vanishing_file_is_no_failure(folder, monkeypatch):
    library = Library.create(folder, encoder=ColourEncoder())
    read = Path.read_bytes

    def vanish(path):
        if path.name == "green.png":
            path.unlink(missing_ok=True)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", vanish)
    report = library.index()
    assert (counts(report), report.failures) == (did(added=3, embedded=3), ())


def test_an_interrupt_keeps_what_was_embedded(tmp_path):
    class Interrupted(ColourEncoder):
        def encode_images(self, images):
            if self.encoded >= 32:
                raise KeyboardInterrupt
            return super().encode_images(images)

    for i in range(60):
        paint(tmp_path / f"{i:02}.png", "red", (8 + i, 8))
    library = Library.create(tmp_path, encoder=Interrupted())
    with pytest.raises(KeyboardInterrupt):
        library.index()
    kept = Library.open(tmp_path, encoder=ColourEncoder())
    assert len(kept.store) == 32
    assert counts(kept.index()) == did(added=28, embedded=28, skipped=32)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root, to become somebody who may not write")
def test_a_read_only_folder_gets_its_index_elsewhere(folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    data.chmod(0o777)
    for path in (tmp_path, tmp_path.parent, tmp_path.parents[1]):
        path.chmod(0o755)
    paint(tmp_path / "warm" / "red.png", "red")
    code = (
        "import os\nfrom pathlib import Path\n"
        "from retrieval.library import Library\nfrom tests.fakes import ColourEncoder\n"
        # Everything is imported before the user is changed: the new one may not even read the interpreter's files.
        f"warm = Library.create(Path({str(tmp_path / 'warm')!r}), encoder=ColourEncoder())\n"
        "warm.index(); warm.search('red')\n"
        "os.setgid(65534); os.setuid(65534)\n"
        f"library = Library.create(Path({str(folder)!r}), encoder=ColourEncoder()); report = library.index()\n"
        f"again = Library.open(Path({str(folder)!r}) / 'holiday', encoder=ColourEncoder())\n"
        "print(report.added, again.root, again.search('red', k=1)[0].path)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_DATA_HOME": str(data), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert run.stdout.split("\n")[0] == f"4 {folder} red.png", run.stderr
    assert not (folder / ".diptych").exists()


def test_the_nearest_index_above_is_found(library, folder):
    assert find_store(folder / "holiday") == folder / ".diptych"
