"""Measures against hand-worked cases and a slow, obvious oracle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.metrics import (
    evaluate_retrieval,
    hit_at_k,
    image_to_text_ranks,
    text_to_image_ranks,
    top_k_accuracy,
)


def unit(rows):
    rows = np.asarray(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_hand_worked_case():
    # Three pictures along the axes; text 0 and 1 belong to picture 0, text 2 to picture 1, none to picture 2.
    images = unit(np.eye(3))
    texts = unit([[3, 1, 2], [1, 3, 2], [2, 3, 1]])
    owner = np.array([0, 0, 1])
    assert text_to_image_ranks(images, texts, owner).tolist() == [1, 3, 1]
    # Picture 0's best text is text 0 (.80), above text 2 (.53). Picture 1: own text 2 (.80) ties with text 1 (.80).
    assert image_to_text_ranks(images, texts, owner).tolist() == [1, 2]
    result = evaluate_retrieval(images, texts, owner, ks=(1, 2))
    assert result == {
        "t2i_hit@1": pytest.approx(2 / 3),
        "t2i_hit@2": pytest.approx(2 / 3),
        "t2i_median_rank": 1.0,
        "i2t_hit@1": 0.5,
        "i2t_hit@2": 1.0,
        "i2t_median_rank": 1.5,
    }


def test_ties_count_against_the_retriever():
    images = unit([[1, 0], [1, 0], [0, 1]])  # picture 1 is a copy of picture 0
    texts = unit([[1, 0]])
    assert text_to_image_ranks(images, texts, np.array([0])).tolist() == [2]
    assert text_to_image_ranks(images, texts, np.array([1])).tolist() == [2]


def slow_ranks(images, texts, owner):
    scores = texts.astype(np.float64) @ images.T.astype(np.float64)
    t2i = [sorted(range(len(images)), key=lambda i: -scores[j, i]).index(owner[j]) + 1 for j in range(len(texts))]
    i2t = []
    for i in sorted(set(owner.tolist())):
        order = sorted(range(len(texts)), key=lambda j: -scores[j, i])
        first = next(j for j in order if owner[j] == i)
        i2t.append(1 + sum(owner[j] != i for j in order[: order.index(first)]))
    return t2i, i2t


@given(st.integers(0, 10_000))
def test_equal_to_the_slow_oracle(seed):
    random = np.random.default_rng(seed)
    images, texts = unit(random.normal(size=(7, 5))), unit(random.normal(size=(13, 5)))
    owner = random.integers(0, 7, 13)
    t2i, i2t = slow_ranks(images, texts, owner)
    assert text_to_image_ranks(images, texts, owner).tolist() == t2i
    assert image_to_text_ranks(images, texts, owner).tolist() == i2t


def test_tiles_change_nothing(monkeypatch):
    random = np.random.default_rng(1)
    images, texts, owner = (
        unit(random.normal(size=(50, 8))),
        unit(random.normal(size=(90, 8))),
        random.integers(0, 50, 90),
    )
    whole = evaluate_retrieval(images, texts, owner)
    monkeypatch.setattr("retrieval.metrics._TILE", 7)
    assert evaluate_retrieval(images, texts, owner) == whole


def test_hit_at_k_counts_ranks():
    ranks = np.array([1, 2, 2, 11])
    assert [hit_at_k(ranks, k) for k in (1, 2, 10, 11)] == [0.25, 0.75, 0.75, 1.0]


def test_top_k_accuracy_with_several_right_answers():
    scores = np.array([[0.9, 0.5, 0.1], [0.2, 0.3, 0.9], [0.5, 0.5, 0.1]], np.float32)
    right = np.array([[False, True, True], [True, True, False], [True, False, False]])
    # Row 0: the best right class is second. Row 1: second. Row 2: first, but tied with a wrong one, so second.
    assert top_k_accuracy(scores, right, 1) == 0.0
    assert top_k_accuracy(scores, right, 2) == 1.0
