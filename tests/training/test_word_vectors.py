"""Word vectors from files, beside a slow reader of each format; and what is said of files that are damaged."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest

from retrieval.errors import DataError
from retrieval.training.word_vectors import read_word_vectors

RANDOM = np.random.default_rng(0)
WORDS = ["the", ",", "</s>", "New_York", "cat", "Zebra", "naïve", "猫", "dog", "cat", "zebra2", "left", "Dog", "right"]
ROWS = {place: RANDOM.standard_normal(5).astype(np.float32) for place in range(len(WORDS))}


def lines(end=""):
    return [" ".join([word, *map(str, ROWS[place].tolist())]) + end + "\n" for place, word in enumerate(WORDS)]


def glove(file):
    file.write_text("".join(lines()), "utf-8")


def word2vec_text(file):
    file.write_text(f"{len(WORDS)} 5\n" + "".join(lines(" ")), "utf-8")  # the original writes a space behind each


def word2vec_binary(file, end=b"\n"):
    rows = (word.encode() + b" " + struct.pack("<5f", *ROWS[place]) + end for place, word in enumerate(WORDS))
    file.write_bytes(f"{len(WORDS)} 5\n".encode() + b"".join(rows))


def binary_without_line_feeds(file):
    word2vec_binary(file, b"")


FORMATS = [glove, word2vec_text, word2vec_binary, binary_without_line_feeds]


@pytest.mark.parametrize("write", FORMATS)
def test_each_word_has_its_own_vector(tmp_path, write):
    write(tmp_path / "vectors")
    found = read_word_vectors(tmp_path / "vectors", {"cat", "dog", "zebra", "naïve", "猫", "unheard"})
    assert found.keys() == {"cat", "dog", "zebra", "naïve", "猫"}
    for word, place in (
        ("cat", 4),
        ("zebra", 5),
        ("naïve", 6),
        ("猫", 7),
        ("dog", 8),
    ):  # the first cat; Zebra stands in
        np.testing.assert_array_equal(found[word], ROWS[place], err_msg=word)
        assert found[word].dtype == np.float32


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("extra", [0, 1, 2, 3, 100])
def test_the_first_other_words_are_kept_too(tmp_path, write, extra):
    write(tmp_path / "vectors")
    found = read_word_vectors(tmp_path / "vectors", {"dog"}, extra)
    others = ["the", "cat", "naïve", "猫", "zebra2", "left", "right"]  # no punctuation, phrase, or capitals
    assert list(found) == sorted(["dog", *others[:extra]], key=WORDS.index)
    for word in found:
        np.testing.assert_array_equal(found[word], ROWS[WORDS.index(word)])


def test_a_binary_file_longer_than_what_is_read_at_a_time(tmp_path, monkeypatch):
    word2vec_binary(tmp_path / "vectors")
    whole = read_word_vectors(tmp_path / "vectors", set(), 100)
    for chunk in (1, 7, 50):
        monkeypatch.setattr("retrieval.training.word_vectors._CHUNK", chunk)
        again = read_word_vectors(tmp_path / "vectors", set(), 100)
        assert list(again) == list(whole)
        assert all((again[word] == whole[word]).all() for word in whole)


@pytest.mark.parametrize("binary", [False, True])
def test_memory_is_that_of_what_is_kept(tmp_path, binary):
    """20 MB of words of which two are wanted."""
    values, count = np.full(100, 0.25, "<f4"), 50_000 if binary else 20_000
    with (tmp_path / "vectors").open("wb") as file:
        file.write(b"%d 100\n" % count)
        row = values.tobytes() + b"\n" if binary else b"0.2500000 " * 100 + b"\n"
        for number in range(count):
            file.write(b"w%d " % number + row)
    tracemalloc.start()
    found = read_word_vectors(tmp_path / "vectors", {"w7", f"w{count - 1}"})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.keys() == {"w7", f"w{count - 1}"}
    assert all((vector == values).all() for vector in found.values())
    assert peak < 5e6


def test_a_phrase_with_spaces_is_no_word(tmp_path):
    """GloVe's largest file has some."""
    (tmp_path / "vectors").write_text("cat 1 2 3\n. . . 4 5 6\nat name@domain.com 7 8 9\ndog 3 2 1\n")
    found = read_word_vectors(tmp_path / "vectors", {"cat", "dog", "at"}, 10)
    assert {word: vector.tolist() for word, vector in found.items()} == {"cat": [1, 2, 3], "dog": [3, 2, 1]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty: there is no word vector in it"),
        (b"\n\n", "is empty"),
        (b"\x1f\x8b\x08\x00", "is compressed: unpack it first"),
        (b"PK\x03\x04 zip", "is compressed: unpack it first"),
        (b'{"image": "a.jpg", "captions": ["a cat"]}\n', "line 1: not all of it behind the word is numbers"),
        (b"a line of prose\n", "line 1: not all of it behind the word is numbers"),
        (b"word\n", "line 1: neither a word and its numbers nor two numbers"),
        (b"cat 1 2 3\ndog 1 2\n", "line 2: 2 numbers, not 3 as in the lines before it: .* or delete the line"),
        (b"cat 1 2 3\nbird 1 2 3\ndog 1 2 3 4 5\n", "line 3: 5 numbers, not 3"),
        (b"cat 1 2 3\ndog 1 x 3\n", "line 2: not all of it behind the word is numbers"),
        (b"cat 1 2 3\ndog 1 nan 3\n", "line 2: a number that is none"),
        (b"3 3\ncat 1 2 3\ndog 1 2 3\n", "ends after 2 of 3 words: it was cut off"),
        (b"3 3\ncat 1 2 3\ndog 1 2", "line 3: 2 numbers, not 3"),
        (b"2 0\ncat\n", "line 1: 2 words of 0 numbers"),
        (b"0 3\n", "line 1: 0 words of 3 numbers"),
        (b"2 99999999999\ncat 1 2\n", "line 1: 2 words of 99999999999 numbers"),
        (b"2 2\ncat " + struct.pack("<2f", 1, 2) + b"\ndog " + b"\0\0", "ends after 1 of 2 words"),
        (b"2 2\ncat " + struct.pack("<2f", 1, 2) + b"\n", "ends after 1 of 2 words"),
        (b"2 2\ncat " + struct.pack("<2f", 1, np.inf) + b"\n", "word 1: a number that is none"),
        (b"2 2\n" + b"\0" * 3_000_000, "word 1: a word without an end"),
        (b"2 2\n" + b"x" * 3_000_000, "line 2: 0 numbers, not 2"),
    ],
)
def test_what_is_said_of_damaged_files(tmp_path, content, words):
    (tmp_path / "vectors.txt").write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_word_vectors(tmp_path / "vectors.txt", {"cat", "dog"})
    assert str(tmp_path / "vectors.txt") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="none cannot be read: No such file"):
        read_word_vectors(tmp_path / "none", set())
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_word_vectors(tmp_path, set())
