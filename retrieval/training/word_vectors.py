"""Word vectors from files: word2vec's text and binary formats (Mikolov et al. 2013, arXiv:1301.3781) and GloVe's text.

word2vec's begin with a line of two numbers, how many words and how many numbers each; GloVe's (Pennington et al. 2014)
is word2vec's text without it. Such files hold millions of words in gigabytes: they are read in a stream, and only what
is asked for is kept.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import DataError

_MOST_WIDTH = 10_000  # numbers a word; the widest in use have 1,024
_LONGEST_LINE = 1 << 20  # bytes: 10,000 numbers of 100 digits; what is longer is no line
_CHUNK = 1 << 20  # bytes of a binary file read at a time
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # what is in no text, and in any few floats

Vector = NDArray[np.float32]
_Entry = tuple[str, str, Callable[[], Vector]]  # where it stands, the word, and its vector if it is wanted


def read_word_vectors(
    file: Path, wanted: Collection[str], extra: int = 0, is_word: Callable[[str], bool] = str.isalnum
) -> dict[str, Vector]:
    """Read the vectors of some words, and of the first others.

    A word in capitals (word2vec's news have them) stands in for one in lower case that the file lacks.

    Args:
        file: in any of the three formats, which is told from its beginning.
        wanted: words in lower case.
        extra: how many words to keep beside; files have the most frequent first.
        is_word: what of the others is a word: not punctuation, not a phrase.

    Returns:
        (W,) float32 of each word found, all of one width; of a word that stands in the file twice, the first.

    Raises:
        DataError: the file cannot be read, is compressed, holds nothing, or is damaged: where, and what to do.
    """
    found: dict[str, Vector] = {}
    stand_ins: dict[str, Vector] = {}
    try:
        with file.open("rb") as stream:
            for place, word, vector in _entries(file, stream):
                if word in found:
                    continue
                lower = word.lower()
                if word in wanted:
                    found[word] = _finite(file, place, vector())
                elif lower in wanted:
                    if lower not in stand_ins:
                        stand_ins[lower] = _finite(file, place, vector())
                elif extra and word == lower and is_word(word):
                    found[word] = _finite(file, place, vector())
                    extra -= 1
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    return {**found, **{word: vector for word, vector in stand_ins.items() if word not in found}}


def _entries(file: Path, stream: IO[bytes]) -> Iterator[_Entry]:
    first = stream.readline(_LONGEST_LINE)
    if first.startswith((b"\x1f\x8b", b"PK\x03\x04")):
        raise DataError(f"{file} is compressed: unpack it first")
    header = re.fullmatch(rb"(\d{1,18}) (\d{1,18})\s*", first)
    if header is None:
        stream.seek(0)
        yield from _text(file, stream, len(first.split()) - 1, 0, 1)
        return
    count, width = int(header[1]), int(header[2])
    if not 1 <= width <= _MOST_WIDTH or not count:
        raise DataError(f"{file}, line 1: {count} words of {width} numbers: that is no file of word vectors")
    start = stream.tell()
    binary = not _is_text(stream.read(4096))
    stream.seek(start)
    yield from (_binary(file, stream, width, count) if binary else _text(file, stream, width, count, 2))


def _text(file: Path, stream: IO[bytes], width: int, count: int, number: int) -> Iterator[_Entry]:
    """Lines of a word and its numbers, the first of them line ``number``; at least ``count`` of them."""
    read = 0
    for number, line in enumerate(iter(lambda: stream.readline(_LONGEST_LINE), b""), number):  # noqa: B020 - from there
        if not line.strip():
            continue
        place, line = f"line {number}", line.strip(b" \r\n")
        numbers = line.count(b" ")
        if number == 1 and not 2 <= numbers <= _MOST_WIDTH:
            raise DataError(
                f"{file}, line 1: neither a word and its numbers nor two numbers: give word vectors as word2vec's text "
                "or binary file, or as GloVe's text"
            )
        if numbers > width and not _is_number(line.rsplit(b" ", width + 1)[-width - 1]):
            read += 1  # a phrase with spaces, of which GloVe's largest has some
            continue
        if numbers != width:
            raise DataError(
                f"{file}, {place}: {numbers} numbers, not {width} as in the lines before it: the file is damaged; "
                "fetch it again, or delete the line"
            )
        word, _, values = line.partition(b" ")
        vector = partial(_numbers, file, place, values)
        if not read:  # whether it is such a file at all
            vector()
        yield place, word.decode("utf-8", "replace"), vector
        read += 1
    if read < max(count, 1):
        raise _cut(file, read, count)


def _numbers(file: Path, place: str, values: bytes) -> Vector:
    try:
        return np.array(values.split(b" "), np.float32)
    except ValueError as error:
        raise DataError(
            f"{file}, {place}: not all of it behind the word is numbers: the file is damaged; fetch it again, or "
            "delete the line"
        ) from error


def _floats(data: bytes) -> Vector:
    return np.frombuffer(data, "<f4").astype(np.float32)


def _binary(file: Path, stream: IO[bytes], width: int, count: int) -> Iterator[_Entry]:
    """``count`` times a word, a space, and ``width`` little-endian floats; perhaps a line feed behind each."""
    size, buffer, at = 4 * width, b"", 0
    for read in range(count):
        while (space := buffer.find(b" ", at)) < 0 or len(buffer) <= space + size:
            more = stream.read(_CHUNK)
            if space < 0 and len(buffer) - at > _LONGEST_LINE:
                raise DataError(f"{file}, word {read + 1}: a word without an end: the file is damaged; fetch it again")
            if not more:
                raise _cut(file, read, count)
            buffer, at = buffer[at:] + more, 0
        word = buffer[at:space].lstrip(b"\n").decode("utf-8", "replace")
        yield f"word {read + 1}", word, partial(_floats, buffer[space + 1 : space + 1 + size])
        at = space + 1 + size


def _finite(file: Path, place: str, vector: Vector) -> Vector:
    if not np.isfinite(vector).all():
        raise DataError(f"{file}, {place}: a number that is none: the file is damaged; fetch it again")
    return vector


def _is_text(beginning: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(beginning)  # which may end within a character
    except UnicodeDecodeError:
        return False
    return not _CONTROL.search(beginning)


def _is_number(text: bytes) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _cut(file: Path, read: int, count: int) -> DataError:
    if not read and not count:
        return DataError(f"{file} is empty: there is no word vector in it")
    return DataError(f"{file} ends after {read} of {count} words: it was cut off; fetch it again")
