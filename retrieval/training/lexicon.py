"""Nouns of WordNet, for a text tower that is to know more words than its captions have.

A picture classifier knows a loggerhead; a sentence encoder that has read little takes a hawksbill for a hawk. WordNet
(Miller 1995, doi:10.1145/219717.219748) says what both are: a noun's definition, and where it stands in the tree of
kinds, hence the classes whose pictures it would best describe.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import DataError
from retrieval.pairs import Record

Key = TypeVar("Key")
Value = TypeVar("Value")

_THING = 1930  # "physical entity", the synset above everything that a picture can show
# WordNet's files of animals, artefacts, the body, food, natural objects, people, plants, states of matter, phenomena.
_SHOWN = frozenset({5, 6, 8, 13, 17, 18, 19, 20, 27})
_OF_PEOPLE = frozenset({8, 18})
_SENSES = 3  # of a word; the rarer ones are hardly ever meant
_TELLING = (
    2.0  # nats that a common kind has to say of a class: "device", above an eighth of ImageNet's, says too little
)
_HELD_OUT, _SEED = 500, 0  # nouns at most; always the same, or runs could not be compared
_SHARP = 0.02  # of relatedness: the next of kin get it nearly all


@dataclass(frozen=True)
class Synset:
    """A meaning: its names, what it is, and what kinds of things it belongs to."""

    names: tuple[str, ...]
    definition: str
    kinds: tuple[int, ...]  # the synsets right above
    file: int  # WordNet's lexicographer file


class WordNet:
    """The nouns of WordNet 3.0, whose synsets ImageNet's classes are."""

    def __init__(self, folder: Path) -> None:
        """Read ``data.noun`` and ``index.noun``, as Debian's package wordnet-base installs them.

        Raises:
            DataError: a file is missing or is not WordNet's.
        """
        self.synsets = dict(_rows(folder / "data.noun", _synset))
        self.senses: dict[tuple[str, int], tuple[int, bool]] = {}  # which sense of a word, and if it was met in texts
        for word, (synsets, met) in _rows(folder / "index.noun", _senses):
            self.senses |= {(word, synset): (rank, rank < met) for rank, synset in enumerate(synsets)}
        above = {kind for synset in self.synsets.values() for kind in synset.kinds}
        if not above <= self.synsets.keys():
            raise DataError(f"{folder / 'data.noun'} is not whole: it lacks {len(above - self.synsets.keys())} synsets")

    def above(self, synset: int) -> dict[int, int]:
        """What a synset is a kind of, itself among it, each with the fewest steps up to it."""
        steps, front, up = {synset: 0}, [synset], 0
        while front:
            front, up = [kind for one in front for kind in self.synsets[one].kinds if kind not in steps], up + 1
            steps |= dict.fromkeys(front, up)
        return steps

    def depth(self, synset: int) -> int:
        """How many synsets there are from the root down to this one, by the shortest way."""
        return 1 + min(steps for kind, steps in self.above(synset).items() if not self.synsets[kind].kinds)

    def rank(self, synset: int) -> tuple[int, bool]:
        """The best of its names' places among their senses, and whether any was met in WordNet's texts in this one."""
        found = [self.senses.get((name.lower(), synset), (_SENSES, False)) for name in self.synsets[synset].names]
        return min(rank for rank, _ in found), any(met for _, met in found)


def _rows(file: Path, read: Callable[[str], tuple[Key, Value]]) -> Iterator[tuple[Key, Value]]:
    try:
        with file.open(encoding="latin-1") as lines:
            for number, line in enumerate(lines, 1):
                if line.startswith("  "):  # the licence
                    continue
                try:
                    yield read(line)
                except (ValueError, IndexError) as error:
                    raise DataError(f"{file}, line {number}, is not WordNet's") from error
    except OSError as error:
        raise DataError(
            f"{file} cannot be read: {error.strerror}; Debian's package wordnet-base has it, in /usr/share/wordnet"
        ) from error


def _synset(line: str) -> tuple[int, Synset]:
    """A line of data.noun (WordNet's manual, wndb(5WN)): offset, file, n, names, pointers, gloss."""
    head, _, gloss = line.partition(" | ")
    fields = head.split(" ")
    count = int(fields[3], 16)
    pointers = fields[5 + 2 * count :]
    kinds = [int(to) for kind, to in zip(pointers[::4], pointers[1::4], strict=False) if kind in ("@", "@i")]
    names = tuple(name.replace("_", " ") for name in fields[4 : 4 + 2 * count : 2])
    definition = gloss.split('; "')[0].strip().rstrip(";")  # the rest are examples of use
    return int(fields[0]), Synset(names, definition, tuple(kinds), int(fields[1]))


def _senses(line: str) -> tuple[str, tuple[list[int], int]]:
    """A line of index.noun: word, …, how many senses, how many of them were met in texts, their synsets."""
    fields = line.split()
    count = int(fields[2])
    return fields[0].replace("_", " "), ([int(synset) for synset in fields[-count:]], int(fields[-count - 1]))


@dataclass(frozen=True)
class Nouns:
    """What a text tower is taught: N nouns, and how they stand to K classes of pictures."""

    names: Sequence[tuple[str, ...]]  # N, of each at least one
    definitions: Sequence[str]  # N
    chance: NDArray[np.float64]  # (N,) to be drawn
    related: NDArray[np.float16]  # (N, K) from 0 to 1
    placed: NDArray[np.bool_]  # (N,) whether its relations tell where it belongs
    kind_of: NDArray[np.bool_]  # (N, K) a picture of the class is one of the noun
    unsaid: NDArray[np.bool_]  # (N,) no caption has the word, so that no picture of a caption is one of it
    held_out: NDArray[np.int64]  # some that are never drawn, to see what is made of words that were not taught

    def kin_found(self, best: NDArray[np.int64]) -> float:
        """The share of the held-out nouns that found a picture of their next of kin. ``best``: (H,) its class."""
        close = self.related[self.held_out].astype(np.float32)
        return float((close[np.arange(len(best)), best] >= close.max(1) - _SHARP).mean())

    def target(self, nouns: NDArray[np.int64], classes: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n, k) of nouns and the classes of k pictures: how much of a noun's attention each picture should have."""
        close = self.related[nouns][:, classes].astype(np.float32)
        weight = np.exp((close - close.max(1, keepdims=True)) / _SHARP)
        share: NDArray[np.float32] = weight / weight.sum(1, keepdims=True)
        return share


def nouns_for(wordnet: WordNet, classes: Sequence[int], said: Collection[str]) -> Nouns:
    """The nouns that pictures can show, and that people use or whose kind is among the classes.

    Relatedness is Wu and Palmer's (1994, doi:10.3115/981732.981751): the depth of the closest common kind against that
    of both. What a common kind tells is its information content (Resnik 1995, arXiv:cmp-lg/9511007), over the classes.

    Args:
        wordnet: all nouns.
        classes: K synsets, in the order of the pictures' classes.
        said: the words of the captions, lower case.

    Raises:
        DataError: a class is none of these synsets, or there is no such noun.
    """
    if not wordnet.synsets.keys() >= {*classes}:
        raise DataError("the pictures' classes are no synsets of this WordNet: ImageNet's are of version 3.0")
    above = [wordnet.above(synset) for synset in classes]
    members = Counter(kind for kinds in above for kind in kinds)
    depth = {kind: wordnet.depth(kind) for kind in members}
    below: dict[int, list[tuple[int, int]]] = {}  # of a kind, the classes and how far down they are
    for number, kinds in enumerate(above):
        for kind, steps in kinds.items():
            below.setdefault(kind, []).append((number, steps))
    names, definitions, chance, related, placed, kind_of, unsaid = [], [], [], [], [], [], []
    for number, synset in wordnet.synsets.items():
        rank, met = wordnet.rank(number)
        spoken = _spoken(wordnet, number, synset)
        if synset.file not in _SHOWN or rank >= _SENSES or not spoken:
            continue
        up = wordnet.above(number)
        common = up.keys() & members.keys()
        tells = max((math.log(len(classes) / members[kind]) for kind in common), default=0.0) >= _TELLING
        if _THING not in up or not (met or tells):
            continue
        close = np.zeros(len(classes), np.float32)
        for kind in common:
            twice = 2 * depth[kind]
            for row, down in below[kind]:
                close[row] = max(close[row], twice / (twice + up[kind] + down))
        names.append(spoken)
        definitions.append(synset.definition)
        chance.append((2.0 if met else 1.0) / (1 + rank))
        related.append(close.astype(np.float16))
        placed.append(tells)
        kind_of.append([number in kinds for kinds in above])
        unsaid.append(synset.file not in _OF_PEOPLE and not any(_is_said(name, said) for name in synset.names))
    if not names:
        raise DataError("there is no noun in this WordNet that a picture could show")
    odds = np.array(chance)
    # Those of which something is known, and which are no class themselves.
    fit = np.flatnonzero(np.array(placed) & (np.array(related).max(1) < 1))
    held_out = np.sort(np.random.default_rng(_SEED).permutation(fit)[: min(_HELD_OUT, len(fit) // 5)])
    odds[held_out] = 0
    return Nouns(
        names,
        definitions,
        odds / odds.sum(),
        np.array(related),
        np.array(placed, np.bool_),
        np.array(kind_of, np.bool_),
        np.array(unsaid, np.bool_),
        held_out,
    )


def words_of(text: str) -> list[str]:
    """The words of a caption, lower case."""
    return re.findall(r"[a-z]+", text.lower())


def synsets_of(records: Sequence[Record]) -> list[int]:
    """The synset of each labelled picture, by its name as ImageNet gives it: ``n02084071_dog.jpg``. DataError."""
    found = []
    for record in records:
        name = record.image.name
        numbers = re.match(r"n(\d{8})(?!\d)", name)
        if numbers is None:
            raise DataError(f"a lexicon needs each class's synset, and {name!r} does not begin with one: n02084071_…")
        found.append(int(numbers[1]))
    return found


def _spoken(wordnet: WordNet, number: int, synset: Synset) -> tuple[str, ...]:
    """The names that are words and no proper names (the taxa of plants and animals), in a sense that is meant."""
    meant = [name for name in synset.names if wordnet.senses.get((name.lower(), number), (_SENSES, False))[0] < _SENSES]
    return tuple(name for name in meant if name == name.lower())


def _is_said(name: str, said: Collection[str]) -> bool:
    """Whether captions have the noun, be it one of the word that carries it: a "baby buggy" is a buggy."""
    word = name.lower().split()[-1]
    return word in said or word.removesuffix("s") in said
