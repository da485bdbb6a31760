"""`kill -9` at any moment of an index run: the index opens, what it holds is right, and the next run completes it."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from indexes.errors import StoreNotFound
from indexes.store import Store, Wanted
from indexes.vectors import as_vectors
from retrieval.encoders import load_encoder
from retrieval.images import read_photo
from retrieval.library import Library
from tests.fakes import ColourEncoder
from tests.indexes.test_vectors import assert_same, brute
from tests.odd_photos import real_photos

ROOT = Path(__file__).parents[2]
COMMAND = "from cli.main import run; run()"
# The real run with a model of a few microseconds; batches and segments are small, so that a kill meets many commits.
QUICK = """
import sys, time
from pathlib import Path
from indexes import writer
from retrieval import indexing
from retrieval.library import Library
from tests.fakes import ColourEncoder
writer._BUFFERED, indexing._BATCH = 10, 4

class Slow(ColourEncoder):
    def encode_images(self, images):
        time.sleep(0.004 * len(images))
        return super().encode_images(images)

folder = Path(sys.argv[1])
opened = Library.open if (folder / ".diptych").is_dir() else Library.create
library = opened(folder, encoder=Slow())
print("go", flush=True)
library.index()
"""

# The same over folders that change, with thresholds so small that it merges, moves deleted ids to their file and builds
# a FAISS index all the time.
BUSY = (
    QUICK.replace(
        "from indexes import writer\n", "from indexes import store, writer\nfrom indexes.store import Wanted\n"
    )
    .replace("_BATCH = 10, 4\n", "_BATCH = 10, 4\nwriter._TOMBSTONES, writer._SEGMENTS, store._STALE_ROWS = 5, 2, 10\n")
    .replace("library.index()", "library.index(wanted=Wanted(sys.argv[2]))")
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """150 small pictures cut from real photos, no two alike, two of them damaged; in two folders."""
    folder = tmp_path_factory.mktemp("kill") / "photos"
    (folder / "more").mkdir(parents=True)
    chance = random.Random(0)
    for number, photo in enumerate(real_photos()[:15]):
        picture = Image.open(photo).convert("RGB")
        for i in range(10):
            x, y = chance.randrange(picture.width - 90), chance.randrange(picture.height - 90)
            place = folder / "more" if i % 2 else folder
            picture.crop((x, y, x + 60 + number, y + 60 + i)).save(place / f"{number:02}-{i}.png")
    for name in ("03-3.png", "07-7.png"):
        file = folder / "more" / name
        file.write_bytes(file.read_bytes()[:100])
    return folder


def kill_after(seconds: float, code: str, *arguments: object, wait_for: bytes = b"") -> bool:
    """Start a process, and kill it so many seconds after its first line; whether it was still at work."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT,
    )  # fmt: skip
    if wait_for:
        assert process.stdout.readline() == wait_for
    time.sleep(seconds)  # any moment is a good one
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    return process.wait() == -signal.SIGKILL


def prepared(file, encoder):
    return read_photo(file, preprocessing=encoder.preprocessing).image


def expected_vectors(folder, encoder):
    """Path -> the vector that an index run stores, for every picture that can be read; encoded anew, one by one."""
    files = sorted(file for file in folder.rglob("*.png") if file.stat().st_size > 100)
    vectors = np.concatenate([encoder.encode_images([prepared(file, encoder)]) for file in files])
    return dict(zip((file.relative_to(folder).as_posix() for file in files), vectors, strict=True))


def assert_sound(folder, expected, tolerance):
    """The store opens, every checksum is right, no row is there twice, and each has its own picture's vector."""
    try:
        store = Store.open(folder / ".diptych")
    except StoreNotFound:
        assert not (folder / ".diptych" / "manifest.json").exists()  # killed before there was an index
        return 0
    assert store.check() == []
    paths = store.paths()
    assert len(set(paths)) == len(paths)
    if paths:
        halves = as_vectors(np.array([expected[path] for path in paths]).astype(np.float16))
        np.testing.assert_allclose(store.vectors(), halves, atol=tolerance)
    assert {failure.path for failure in store.failures()} <= {"more/03-3.png", "more/07-7.png"}
    return len(paths)


def assert_complete(folder, whole, report, known):
    """The next run took in exactly what was missing, and the index answers as one made in one go."""
    assert (report.added, report.skipped, report.changed, report.deleted) == (148 - known, known, 0, 0)
    assert [failure.path for failure in report.failures] == ["more/03-3.png", "more/07-7.png"]
    library = Library.open(folder, encoder=whole.encoder)
    for query in ("red", "green", "blue white"):
        answers = [
            sorted((-match.score, match.path) for match in each.search(query, k=1000)) for each in (library, whole)
        ]
        assert [path for _, path in answers[0]] == [path for _, path in answers[1]]
        assert [score for score, _ in answers[0]] == pytest.approx([score for score, _ in answers[1]], abs=1e-3)
    assert not list((folder / ".diptych").rglob("*.tmp"))


def indexed_in_one_go(photos, encoder):
    folder = Path(shutil.copytree(photos, photos.parent / f"whole-{encoder.dim}"))
    library = Library.create(folder, encoder=encoder)
    assert library.index().added == 148
    return library


def test_17_kills_of_a_quick_run(photos, tmp_path):
    encoder = ColourEncoder()
    expected, whole = expected_vectors(photos, encoder), indexed_in_one_go(photos, encoder)
    chance = random.Random(4)
    kills, at_work, known = 0, 0, 0
    seen = []
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    while kills < 17:
        at_work += kill_after(chance.uniform(0, 0.35), QUICK, folder, wait_for=b"go\n")
        kills += 1
        now = assert_sound(folder, expected, 1e-3)
        assert now >= known  # what was committed stays
        known = now
        seen.append(known)
        if known == 148 or kills == 17:
            report = Library.open(folder, encoder=encoder).index()
            assert_complete(folder, whole, report, known)
            shutil.rmtree(folder / ".diptych")
            known = 0
    assert at_work >= 12
    assert any(0 < count < 148 for count in seen)  # kills that met half a run


def kills_over_a_changing_folder(photos, tmp_path, kills):
    """Pictures come, go and move between the runs; each run is killed, and wants another FAISS index than the last."""
    encoder, chance = ColourEncoder(), random.Random(kills)
    folder, aside = tmp_path / "photos", tmp_path / "aside"
    folder.mkdir()
    aside.mkdir()
    for i, file in enumerate(sorted(photos.rglob("*.png"))):
        if file.stat().st_size > 100:
            shutil.copyfile(file, (folder if i % 2 else aside) / f"{i:03}.png")
    known: set[str] = set()  # committed, and still in the folder
    buried: set[str] = set()  # not in the folder, nor in the index any more
    at_work = 0
    while at_work < kills:  # runs that were done before do not count
        at_work += kill_after(
            chance.uniform(0, 0.25), BUSY, folder, chance.choice(["Flat", "SQ8", "exact"]), wait_for=b"go\n"
        )
        there = {file.name for file in folder.glob("*.png")}
        if (folder / ".diptych" / "manifest.json").exists():
            store = Store.open(folder / ".diptych")
            assert store.check() == []
            paths = store.paths()
            assert len(set(paths)) == len(paths)
            assert known <= set(paths)  # nothing finished is lost
            assert not buried & set(paths)  # nothing deleted comes back
            places = [folder / name if name in there else aside / name for name in paths]
            if paths:
                vectors = np.concatenate([encoder.encode_images([prepared(place, encoder)]) for place in places])
                np.testing.assert_allclose(store.vectors(), as_vectors(vectors.astype(np.float16)), atol=1e-3)
            queries = as_vectors(np.random.default_rng(0).standard_normal((2, 3)))
            if store.ann is None or store.ann.factory == "Flat":
                assert_same(store.search(queries, 9), brute(store.vectors(), queries, 9))
            known = set(paths) & there
            buried = {name for name in (file.name for file in aside.glob("*.png")) if name not in paths}
        for name in chance.sample(sorted(there), min(len(there), 9)):
            (folder / name).rename(aside / name)
            known.discard(name)
        outside = sorted(file.name for file in aside.glob("*.png"))
        for name in chance.sample(outside, min(len(outside), 9)):
            (aside / name).rename(folder / name)
            buried.discard(name)
    library = Library.open(folder, encoder=encoder)
    library.index(wanted=Wanted("exact"))
    assert sorted(library.store.paths()) == sorted(file.name for file in folder.glob("*.png"))
    assert (library.store.check(), list((folder / ".diptych").rglob("*.tmp"))) == ([], [])


def test_6_kills_over_a_changing_folder(photos, tmp_path):
    kills_over_a_changing_folder(photos, tmp_path, 6)


@pytest.mark.slow
def test_100_kills_over_a_changing_folder(photos, tmp_path):
    kills_over_a_changing_folder(photos, tmp_path, 100)


def test_3_kills_of_the_command(photos, tmp_path):
    encoder = load_encoder("builtin")
    few = tmp_path / "few"
    few.mkdir()
    for file in sorted(photos.glob("*.png"))[:40]:
        shutil.copyfile(file, few / file.name)
    expected = expected_vectors(few, encoder)
    chance, known = random.Random(7), 0
    for _ in range(3):
        kill_after(chance.uniform(0.6, 2.2), COMMAND, "index", few)
        now = assert_sound(few, expected, 2e-3)
        assert now >= known
        known = now
    run = subprocess.run(
        [sys.executable, "-c", COMMAND, "index", str(few), "--json"], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert (report["added"], report["skipped"], report["failures"]) == (40 - known, known, [])
    assert assert_sound(few, expected, 2e-3) == 40
