"""Greedy and beam search beside the slow, obvious ways: every caption that there can be."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from retrieval.heads.captioning.search import greedy, search

END, BANNED = 0, 1


class Toy:
    """Scores of the next piece by what was said before, drawn at random; the past is what was said."""

    def __init__(self, pieces: int, length: int, seed: int, width: int = 2) -> None:
        self.pieces = pieces
        self.table = np.random.default_rng(seed).normal(size=(width, length + 1, pieces, pieces)).astype(np.float32) * 2
        self.steps = 0

    def begin(self, vectors):
        past = np.zeros((1, len(vectors), 2), np.float32)
        past[0, :, 0] = vectors[:, 0]
        return self.scores(past, np.zeros(len(vectors), np.int64)), past

    def go_on(self, pieces, past):
        self.steps += 1
        past = past.copy()
        past[0, :, 1] += 1
        return self.scores(past, pieces), past

    def scores(self, past, pieces):
        return self.table[past[0, :, 0].astype(int), past[0, :, 1].astype(int), pieces]


def chances(toy, row, said):
    """The log-probabilities after what was said."""
    scores, past = toy.begin(np.full((1, 1), row, np.float32))
    for piece in said:
        scores, past = toy.go_on(np.array([piece]), past)
    wide = scores[0].astype(np.float64)
    return wide - np.log(np.exp(wide).sum())


def score(toy, row, said, length, penalty):
    """Log-probability of a caption and its end, by its length."""
    total = sum(chances(toy, row, said[:i])[piece] for i, piece in enumerate(said))
    if len(said) == length:
        return total / length**penalty
    return (total + chances(toy, row, said)[END]) / (len(said) + 1) ** penalty


def exhaustive(toy, row, length, penalty):
    """The best of all captions there are."""
    words = range(2, toy.pieces)
    every = (said for n in range(1, length + 1) for said in product(words, repeat=n))
    return list(max(every, key=lambda said: score(toy, row, said, length, penalty)))


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_finds_the_best_of_all(seed, penalty):
    toy, length = Toy(5, 4, seed), 4
    vectors = np.array([[0], [1], [0]], np.float32)
    found = search(toy, vectors, beams=3**4, length=length, end=END, banned=(BANNED,), penalty=penalty)
    assert found == [exhaustive(toy, int(row), length, penalty) for row in vectors[:, 0]]


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_each_row_of_a_batch_is_as_if_alone(beams):
    toy = Toy(6, 7, 11, width=9)
    vectors = np.arange(9, dtype=np.float32)[:, None]
    settings = {"beams": beams, "length": 7, "end": END, "banned": (BANNED,)}
    alone = [search(toy, vectors[i : i + 1], **settings)[0] for i in range(9)]
    assert search(toy, vectors, **settings) == alone
    assert len({len(said) for said in alone}) > 1  # some were done before others


def test_one_beam_is_greedy():
    toy, length = Toy(6, 6, 3, width=8), 6
    for row in range(8):
        said: list[int] = []
        while len(said) < length:
            likely = chances(toy, row, said)
            likely[[BANNED] if said else [BANNED, END]] = -np.inf
            if likely.argmax() == END:
                break
            said.append(int(likely.argmax()))
        vector = np.full((1, 1), row, np.float32)
        assert greedy(toy, vector, length=length, end=END, banned=(BANNED,)) == [said]
        assert search(toy, vector, beams=1, length=length, end=END, banned=(BANNED,)) == [said]


def test_wider_beams_are_never_worse_here_and_better_somewhere():
    """Not a law of beam search, but of these tables: it would fail if hypotheses were mixed up."""
    gains = []
    for seed in range(6):
        toy = Toy(6, 5, seed)
        values = []
        for beams in (1, 4, 4**5):
            said = search(toy, np.zeros((1, 1), np.float32), beams=beams, length=5, end=END, banned=(BANNED,))[0]
            values.append(score(toy, 0, said, 5, 1.0))
        assert values[0] <= values[2] + 1e-9
        assert values[1] <= values[2] + 1e-9
        gains.append(values[2] - values[0])
    assert max(gains) > 0.01


def test_it_ends_as_soon_as_nothing_can_become_better():
    toy = Toy(5, 50, 0)
    toy.table[:, 1:, :, END] += 50  # after the first piece the end is all but certain
    search(toy, np.zeros((1, 1), np.float32), beams=3, length=50, end=END, banned=(BANNED,))
    assert toy.steps == 1


def test_no_vectors_no_captions():
    for beams in (1, 3):
        none = np.empty((0, 1), np.float32)
        assert search(Toy(4, 3, 0), none, beams=beams, length=3, end=END) == []
