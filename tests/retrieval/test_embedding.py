"""The embedding cache: what it gives back, what it survives, and what is not encoded twice."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from indexes.vectors import as_vectors
from retrieval import embedding
from retrieval.embedding import EmbeddingCache, View, cache_folder, encode_pictures, encode_sentences
from retrieval.errors import DataError, ImageError
from retrieval.images import read_photo
from tests.fakes import ColourEncoder

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "diptych" / "embeddings"


@pytest.fixture
def cache():
    return EmbeddingCache("colours-1", 3)


class Listening(ColourEncoder):
    """Takes down what it is asked."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def encode_texts(self, texts):
        self.texts.append(list(texts))
        return super().encode_texts(texts)


class Bytes:
    """A picture that is no file."""

    def __init__(self, name, data):
        self.name, self.data = name, data

    def __str__(self):
        return f"archive.tar:{self.name}"

    def read_bytes(self):
        if isinstance(self.data, Exception):
            raise self.data
        return self.data


def paint(folder, count, seed=0):
    folder.mkdir(exist_ok=True)
    colours = np.random.default_rng(seed).integers(0, 256, (count, 4, 5, 3), dtype=np.uint8)
    paths = [folder / f"{i:04}.png" for i in range(count)]
    for path, pixels in zip(paths, colours, strict=True):
        Image.fromarray(pixels).save(path)
    return paths


def keys_of(count, seed=0):
    return [hashlib.sha256(f"{seed} {i}".encode()).digest() for i in range(count)]


def unit(count, dim, seed=0):
    return as_vectors(np.random.default_rng(seed).standard_normal((count, dim)))


def uncached(paths):
    encoder = ColourEncoder()
    images = [read_photo(path, preprocessing=encoder.preprocessing).image for path in paths]
    return np.concatenate([encoder.encode_images([image]) for image in images])


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


# ---- nothing is encoded twice ----------------------------------------------------------------------------------------


def test_a_second_time_costs_nothing_and_gives_the_same_bits(tmp_path, cache):
    paths = paint(tmp_path / "p", 150)
    plain, first, second = ColourEncoder(), ColourEncoder(), ColourEncoder()
    expected = encode_pictures(plain, paths)
    np.testing.assert_array_equal(expected, uncached(paths))
    assert encode_pictures(first, paths, cache=cache).tobytes() == expected.tobytes()
    again = encode_pictures(second, paths, cache=EmbeddingCache("colours-1", 3))
    assert (again.tobytes(), again.dtype, again.flags.c_contiguous) == (expected.tobytes(), np.float32, True)
    assert (plain.encoded, first.encoded, second.encoded) == (150, 150, 0)
    some = [paths[i] for i in (140, 3, 77, 3)]
    np.testing.assert_array_equal(encode_pictures(second, some, cache=cache), expected[[140, 3, 77, 3]])
    assert second.encoded == 0


def test_sentences_too(cache):
    texts = ["red", "green blue", "red", "red red yellow", "half \ud83d a character blue"]
    plain, first, second = Listening(), Listening(), Listening()
    expected = ColourEncoder().encode_texts(texts)
    np.testing.assert_array_equal(encode_sentences(plain, texts), expected)
    np.testing.assert_array_equal(encode_sentences(first, texts, cache=cache), expected)
    np.testing.assert_array_equal(encode_sentences(second, texts, cache=EmbeddingCache("colours-1")), expected)
    assert plain.texts == first.texts == [["red", "green blue", "red red yellow", "half \ud83d a character blue"]]
    assert second.texts == []
    more = ["white", "red red yellow", "blue", "white"]
    np.testing.assert_array_equal(encode_sentences(second, more, cache=cache), ColourEncoder().encode_texts(more))
    assert second.texts == [["white", "blue"]]  # one call for all that is missing


def test_sentences_go_in_portions_that_are_kept(cache, monkeypatch):
    monkeypatch.setattr(embedding, "_SENTENCES", 2)
    monkeypatch.setattr(embedding, "_KEPT_SECONDS", 0)

    class Failing(Listening):
        def encode_texts(self, texts):
            if "white" in texts:
                raise MemoryError
            return super().encode_texts(texts)

    texts = ["red", "green", "blue", "yellow", "white"]
    with pytest.raises(MemoryError):
        encode_sentences(Failing(), texts, cache=cache)
    encoder = Listening()
    np.testing.assert_array_equal(encode_sentences(encoder, texts, cache=cache), ColourEncoder().encode_texts(texts))
    assert encoder.texts == [["white"]]


def test_nothing_at_all(cache):
    for kept in (None, cache):
        assert encode_pictures(ColourEncoder(), [], cache=kept).shape == (0, 3)
        assert encode_sentences(ColourEncoder(), [], cache=kept).shape == (0, 3)
    cache.put([], np.empty((0, 3), np.float32))
    assert cache.get([]).known.shape == (0,)
    assert not cache.folder.exists()


def test_another_model_has_vectors_of_its_own(tmp_path, home):
    paths = paint(tmp_path / "p", 3)

    class Inverse(ColourEncoder):
        fingerprint = "inverse-1"

        def encode_images(self, images):
            return super().encode_images([image.point(lambda value: 255 - value) for image in images])

    one, other = ColourEncoder(), Inverse()
    for _ in range(2):
        a, b = (encode_pictures(e, paths, cache=EmbeddingCache(e.fingerprint, e.dim)) for e in (one, other))
        assert not np.isclose(a, b).all(1).any()
    assert (one.encoded, other.encoded) == (3, 3)
    assert sorted(path.name for path in home.iterdir()) == ["colours-1", "inverse-1"]


def test_the_content_counts_and_not_the_name(tmp_path, cache):
    paths = paint(tmp_path / "p", 4)
    encoder = ColourEncoder()
    first = encode_pictures(encoder, paths, cache=cache)
    Image.new("RGB", (3, 3), "red").save(paths[1])
    shutil.move(paths[2], tmp_path / "elsewhere.jpg")
    now = [paths[0], paths[1], tmp_path / "elsewhere.jpg", Bytes("in/an/archive.png", paths[3].read_bytes())]
    changed = encode_pictures(encoder, now, cache=cache)
    assert encoder.encoded == 5
    np.testing.assert_array_equal(changed[[0, 2, 3]], first[[0, 2, 3]])
    np.testing.assert_allclose(changed[1], as_vectors([[256, 1, 1]])[0], atol=1e-6)


@pytest.mark.parametrize("kept", [True, False])
def test_equal_pictures_are_encoded_once(tmp_path, cache, kept):
    paths = paint(tmp_path / "p", 70)
    shutil.copy(paths[5], tmp_path / "copy.png")
    asked = [*paths, tmp_path / "copy.png", *paths[::-1], paths[0]]
    encoder, told = ColourEncoder(), []
    vectors = encode_pictures(encoder, asked, cache=cache if kept else None, progress=lambda *now: told.append(now))
    np.testing.assert_array_equal(vectors, uncached(asked))
    assert encoder.encoded == 70
    assert told == sorted(told)
    assert told[-1] == (142, 142)


def test_views_are_kept_apart(tmp_path, cache):
    paths = paint(tmp_path / "p", 3)
    encoder = ColourEncoder()
    dark = View(lambda picture: "dark", lambda image, picture: image.point(lambda value: value // 4))
    by_name = View(
        lambda picture: f"named {picture.name}",
        lambda image, picture: Image.new("RGB", (4, 4), "red" if picture.name == "0000.png" else "blue"),
    )
    results = {}
    for _ in range(2):
        for name, view in (("whole", None), ("dark", dark), ("named", by_name)):
            now = encode_pictures(encoder, paths, cache=cache, view=view)
            np.testing.assert_array_equal(now, results.setdefault(name, now))
    assert encoder.encoded == 9
    assert not np.isclose(results["whole"], results["dark"], atol=1e-4).all(1).any()
    np.testing.assert_allclose(results["named"], as_vectors([[256, 1, 1], [1, 1, 256], [1, 1, 256]]), atol=1e-6)
    whole = [path.rename(path.with_name("x" + path.name)) for path in paths]
    for view, calls in ((dark, 9), (by_name, 12)):
        encode_pictures(encoder, whole, cache=cache, view=view)
        assert encoder.encoded == calls


def test_a_picture_and_a_sentence_never_share_a_key(cache):
    """A file whose bytes spell out a cached sentence is still no picture."""
    encode_sentences(ColourEncoder(), ["red"], cache=cache)
    with pytest.raises(DataError, match=r"1 of 1 pictures cannot be read, the first: archive\.tar:a: not an image"):
        encode_pictures(ColourEncoder(), [Bytes("a", b"text\0red")], cache=cache)


def test_progress_counts_pictures_and_cached_ones_at_once(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(embedding, "_BATCH", 4)
    paths = paint(tmp_path / "p", 14)
    encode_pictures(ColourEncoder(), paths[:6], cache=cache)
    told = []
    encode_pictures(ColourEncoder(), paths, cache=cache, progress=lambda done, total: told.append((done, total)))
    assert told == [(4, 14), (6, 14), (10, 14), (14, 14)]  # 6 known; 6..9 encoded when the 10th is read; the rest


# ---- unreadable pictures ---------------------------------------------------------------------------------------------


def test_every_picture_is_tried_and_the_first_failure_named(tmp_path, cache):
    paths = paint(tmp_path / "p", 6)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    paths[4].write_text("a poem")
    shutil.copy(paths[4], tmp_path / "again.png")
    asked = [
        *paths[:2], tmp_path / "pipe.png", paths[2], tmp_path / "folder.png", tmp_path / "gone.png", *paths[3:],
        tmp_path / "again.png", Path("/dev/zero"), Path("a\0b"), Bytes("member.png", PermissionError(13, "no")),
        Bytes("other.png", ImageError("is not in the archive")),
    ]  # fmt: skip
    first = f"the first: {tmp_path / 'pipe.png'}: not a regular file"
    for kept in (None, cache):
        start = time.monotonic()
        with pytest.raises(DataError) as caught:
            encode_pictures(ColourEncoder(), asked, cache=kept)
        assert str(caught.value) == f"9 of 14 pictures cannot be read, {first}"
        assert time.monotonic() - start < 20
    for bad, reason in (
        (tmp_path / "folder.png", "a folder, not a file"),
        (tmp_path / "gone.png", "missing: there is no such file"),
        (paths[4], "not an image: plain text"),
        (asked[-2], "no permission to read it"),
        (asked[-1], "is not in the archive"),
    ):
        with pytest.raises(DataError) as caught:
            encode_pictures(ColourEncoder(), [paths[0], bad], cache=cache)
        assert str(caught.value) == f"1 of 2 pictures cannot be read, the first: {bad}: {reason}"


def test_a_file_that_is_far_too_large_is_not_read(tmp_path):
    with (tmp_path / "huge.tif").open("wb") as stream:
        stream.truncate(2**40)  # takes no room on the disk
    with pytest.raises(DataError, match=r"huge\.tif: 1,048,576 MB, more than the limit of 1,024 MB"):
        encode_pictures(ColourEncoder(), [tmp_path / "huge.tif"])


def test_what_was_encoded_before_a_failure_is_kept(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(embedding, "_BATCH", 4)
    paths = paint(tmp_path / "p", 10)
    good = paths[9].read_bytes()
    paths[9].write_bytes(good[:40])
    with pytest.raises(
        DataError, match=r"1 of 10 pictures cannot be read, the first: .*0009\.png: damaged or truncated"
    ):
        encode_pictures(ColourEncoder(), paths, cache=cache)
    paths[9].write_bytes(good)
    encoder = ColourEncoder()
    np.testing.assert_array_equal(encode_pictures(encoder, paths, cache=cache), uncached(paths))
    assert encoder.encoded == 2


# ---- interrupted and at once -----------------------------------------------------------------------------------------

SLOW = """
import sys, time
from pathlib import Path
from retrieval import embedding
from tests.fakes import ColourEncoder
embedding._BATCH, embedding._KEPT_EVERY, embedding._MANY = 4, 8, 5

class Slow(ColourEncoder):
    def encode_images(self, images):
        time.sleep(float(sys.argv[2]) * len(images))
        return super().encode_images(images)

encoder = Slow()
paths = sorted(Path(sys.argv[1]).iterdir())
print("go", flush=True)
vectors = embedding.encode_pictures(encoder, paths, cache=embedding.EmbeddingCache("colours-1", 3))
print(encoder.encoded, vectors.tobytes().hex(), flush=True)
"""


def start(folder, seconds=0.004):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(folder), str(seconds)], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout.readline() == b"go\n"
    return process


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    paths = paint(tmp_path / "p", 200)
    keys = [embedding.picture_key(hashlib.sha256(path.read_bytes()).digest()) for path in paths]
    cache, done = EmbeddingCache("colours-1", 3), [0]
    for seconds in (0, 0.013, 0.05):
        process = start(tmp_path / "p", 0.01)
        while cache.get(keys).known.sum() == done[-1]:
            time.sleep(0.005)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
        done.append(int(cache.get(keys).known.sum()))
    assert done == sorted(done)
    assert 24 <= done[-1] < 200
    encoder = ColourEncoder()
    assert encode_pictures(encoder, paths, cache=cache).tobytes() == uncached(paths).tobytes()
    assert encoder.encoded == 200 - done[-1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_exception_loses_nothing_that_was_finished(tmp_path, cache, monkeypatch, error):
    monkeypatch.setattr(embedding, "_BATCH", 4)
    paths = paint(tmp_path / "p", 30)

    class Stopping(ColourEncoder):
        def encode_images(self, images):
            if self.encoded == 20:
                raise error
            return super().encode_images(images)

    with pytest.raises(error):
        encode_pictures(Stopping(), paths, cache=cache)
    assert len(files(cache.folder)) == 1  # on the way out
    encoder = ColourEncoder()
    encode_pictures(encoder, paths, cache=cache)
    assert encoder.encoded == 10


def test_long_work_is_kept_every_few_seconds(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(embedding, "_BATCH", 2)
    now = [0.0]
    monkeypatch.setattr(embedding.time, "monotonic", lambda: now[0])
    kept = []

    class Watched(ColourEncoder):
        def encode_images(self, images):
            now[0] += 1.2
            kept.append(len(files(cache.folder)))
            return super().encode_images(images)

    encode_pictures(Watched(), paint(tmp_path / "p", 14), cache=cache)
    assert kept == [0, 0, 0, 1, 1, 1, 2]  # after 3.6 seconds


def test_two_processes_at_once(tmp_path):
    """Both write and merge; both get the right vectors, and afterwards everything is there."""
    paths = paint(tmp_path / "p", 200)
    processes = [start(tmp_path / "p") for _ in range(2)]
    for process in processes:
        _, vectors = process.communicate(timeout=60)[0].split()
        assert process.returncode == 0
        assert bytes.fromhex(vectors.decode()) == uncached(paths).tobytes()
    encoder = ColourEncoder()
    encode_pictures(encoder, paths, cache=EmbeddingCache("colours-1", 3))
    assert encoder.encoded == 0


def test_readers_beside_a_writer_that_merges_all_the_time(tmp_path, cache):
    """What a writer said is kept is found at every moment since, whatever it merges."""
    code = """
import sys
from pathlib import Path
from retrieval import embedding
from tests.retrieval.test_embedding import keys_of, unit
embedding._MANY = 3
cache, keys, vectors = embedding.EmbeddingCache("colours-1", 3), keys_of(400), unit(400, 3)
for i in range(0, 400, 2):
    cache.put(keys[i : i + 2], vectors[i : i + 2])
    print(i + 2, flush=True)
assert cache.problem is None
"""
    keys, vectors = keys_of(400), unit(400, 3)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as process:
        looks = 0
        for line in process.stdout:
            kept = int(line)
            found = cache.get(keys)
            assert found.known[:kept].all()
            np.testing.assert_array_equal(found.vectors, vectors[found.known])
            looks += 1
    assert (process.returncode, looks) == (0, 200)
    assert len(files(cache.folder)) <= 20


# ---- what lies in the folder -----------------------------------------------------------------------------------------


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def other_table(path, dim=3, **changes):
    """A file that others could have written."""
    embeddings = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(2 * dim, np.float32)), dim)
    columns = {"key": pa.array(keys_of(2), pa.binary(32)), "embedding": embeddings, **changes}
    pq.write_table(pa.table({name: column for name, column in columns.items() if column is not None}), path)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(os.urandom(5000)),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a key flipped": lambda path: flip(path, path.read_bytes().index(keys_of(1)[0]) + 7),
    "a vector flipped": lambda path: flip(path, path.read_bytes().index(unit(1, 3).tobytes()) + 1),
    "no vectors": lambda path: other_table(path, embedding=None),
    "other vectors": lambda path: other_table(path, embedding=pa.array(["one", "two"])),
    "other keys": lambda path: other_table(path, key=pa.array([b"short", b"k"])),
    "no keys": lambda path: other_table(path, key=pa.array([None, None], pa.binary(32))),
    "no rows": lambda path: pq.write_table(embedding._schema(3).empty_table(), path),
    "wide": lambda path: other_table(path, dim=4),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_passed_over_and_its_vectors_are_kept_anew(cache, damage):
    keys, vectors = keys_of(4), unit(4, 3)
    cache.put(keys[:2], vectors[:2])
    (bad,) = files(cache.folder)
    cache.put(keys[2:], vectors[2:])
    damage(bad)
    for fresh in (cache, EmbeddingCache("colours-1", 3)):
        found = fresh.get(keys)
        assert found.known.tolist() == [False, False, True, True]
        np.testing.assert_array_equal(found.vectors, vectors[2:])
    cache.put(keys[:2], vectors[:2])
    for fresh in (cache, EmbeddingCache("colours-1", 3)):
        np.testing.assert_array_equal(fresh.get(keys).vectors, vectors)
    assert bad.exists()  # it may be somebody's
    assert cache.problem is None


def test_pictures_whose_vectors_are_damaged_are_encoded_again(tmp_path, cache):
    """The keys can still be read, so that it shows only when the vectors are fetched."""
    paths = paint(tmp_path / "p", 6)
    expected = encode_pictures(ColourEncoder(), paths[:4], cache=cache)
    (bad,) = files(cache.folder)
    encode_pictures(ColourEncoder(), paths[4:], cache=cache)
    flip(bad, bad.read_bytes().index(expected.tobytes()) + 20)
    asked = [paths[5], *paths, paths[2]]
    for encoded in (4, 0):
        encoder = ColourEncoder()
        vectors = encode_pictures(encoder, asked, cache=EmbeddingCache("colours-1", 3))
        assert vectors.tobytes() == uncached(asked).tobytes()
        assert encoder.encoded == encoded


def test_foreign_files_are_left_alone(cache, monkeypatch):
    monkeypatch.setattr(embedding, "_MANY", 2)
    cache.folder.mkdir(parents=True)
    mine, old, new = cache.folder / "notes.parquet", *(cache.folder / f"{c * 32}.parquet.tmp" for c in "ab")
    for file in (mine, old, new):
        file.write_text("x")
    os.utime(old, (0, 0))
    for i in range(5):
        cache.put(keys_of(5)[i : i + 1], unit(5, 3)[i : i + 1])
    assert mine.exists()
    assert new.exists()  # another process may be writing it
    assert not old.exists()
    np.testing.assert_array_equal(cache.get(keys_of(5)).vectors, unit(5, 3))


def test_a_cache_that_cannot_be_written(tmp_path, home):
    paths = paint(tmp_path / "p", 5)
    home.parent.parent.mkdir()
    home.parent.write_text("a file where the folder should be")
    for _ in range(2):
        cache, encoder = EmbeddingCache("colours-1", 3), ColourEncoder()
        np.testing.assert_array_equal(encode_pictures(encoder, paths, cache=cache), uncached(paths))
        assert encoder.encoded == 5
        assert str(cache.folder) in cache.problem


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk(cache, monkeypatch):
    monkeypatch.setattr(embedding, "replacing", lambda target: Path("/dev/full").open("wb"))  # noqa: SIM115
    np.testing.assert_array_equal(
        encode_sentences(ColourEncoder(), ["red", "blue"], cache=cache), ColourEncoder().encode_texts(["red", "blue"])
    )
    assert "No space left on device" in cache.problem


def test_it_lies_where_xdg_says(tmp_path, home, monkeypatch):
    assert cache_folder() == home
    assert EmbeddingCache("abc").folder == home / "abc"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert cache_folder() == tmp_path / "me" / ".cache" / "diptych" / "embeddings"
    assert EmbeddingCache("abc", folder=tmp_path).folder == tmp_path / "abc"


@pytest.mark.parametrize("fingerprint", ["../../elsewhere", "", "a/b", "/root", ".hidden", "x" * 500, "é", "a\n"])
def test_a_fingerprint_never_leads_out_of_the_folder(home, fingerprint):
    cache = EmbeddingCache(fingerprint, 3)
    assert cache.folder.parent == home
    assert len(cache.folder.name) == 64
    cache.put(keys_of(1), unit(1, 3))
    assert cache.get(keys_of(1)).known.all()


# ---- many ------------------------------------------------------------------------------------------------------------


def test_merging_keeps_every_key_and_few_files(cache, monkeypatch):
    monkeypatch.setattr(embedding, "_GROUP", 7)
    monkeypatch.setattr(embedding, "_MANY", 6)
    keys, vectors = keys_of(600), unit(600, 3)
    other = EmbeddingCache("colours-1", 5)  # of another width, in the same folder
    other.put(keys[:9], unit(9, 5))
    sizes = np.random.default_rng(0).integers(1, 9, 200).tolist()
    end = 0
    for size in sizes:
        start, end = end, min(end + size, 600)
        cache.put(keys[max(0, start - 2) : end], vectors[max(0, start - 2) : end])  # some of them twice
        assert len(files(cache.folder)) <= 6 + 1 + 1
    assert end == 600
    for fresh in (cache, EmbeddingCache("colours-1", 3)):
        found = fresh.get(keys)
        assert found.known.all()
        assert found.vectors.tobytes() == vectors.tobytes()
    np.testing.assert_array_equal(other.get(keys).vectors, unit(9, 5))
    assert other.get(keys).known.tolist() == [True] * 9 + [False] * 591


def test_a_damaged_file_is_not_merged_away(cache, monkeypatch):
    monkeypatch.setattr(embedding, "_MANY", 4)
    keys, vectors = keys_of(12), unit(12, 3)
    for i in range(4):
        cache.put(keys[i : i + 1], vectors[i : i + 1])
    bad = next(file for file in files(cache.folder) if vectors[2].tobytes() in file.read_bytes())
    flip(bad, bad.read_bytes().index(vectors[2].tobytes()))
    for i in range(4, 12):
        cache.put(keys[i : i + 1], vectors[i : i + 1])
    assert bad.exists()
    assert EmbeddingCache("colours-1", 3).get(keys).known.tolist() == [i != 2 for i in range(12)]


@pytest.mark.parametrize("parts", [1, 4])
def test_50000_keys_against_a_dictionary(cache, parts, monkeypatch):
    """Some keys share their first 8 bytes; some are all zeros at their end, or altogether."""
    random = np.random.default_rng(parts)
    table = random.integers(0, 256, (60_000, 32), dtype=np.uint8)
    table[1000:1100, :8] = table[0, :8]
    table[2000:2300, 10:] = 0
    table[3000] = 0
    keys = [row.tobytes() for row in table]
    vectors = unit(60_000, 4)
    stored = random.permutation(60_000)[:50_000]
    for part in np.array_split(stored, parts):
        cache.put([keys[i] for i in part], vectors[part]) if parts > 1 else None
    cache = EmbeddingCache("colours-1", 4)
    if parts == 1:
        cache.put([keys[i] for i in stored], vectors[stored])
    oracle = {keys[i]: vectors[i] for i in stored}
    asked = random.permutation(60_000)[:50_000]
    cache.refresh()
    start = time.monotonic()
    found = cache.get([keys[i] for i in asked])
    assert time.monotonic() - start < 2  # 0.05 s
    assert found.known.tolist() == [keys[i] in oracle for i in asked]
    np.testing.assert_array_equal(found.vectors, [oracle[keys[i]] for i in asked if keys[i] in oracle])
    assert all((key in cache) == (key in oracle) for key in keys[990:1110] + keys[2990:3010])
    assert "no key" not in cache
