"""BLEU, ROUGE-L and CIDEr-D beside what COCO's caption evaluation says of the same captions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from retrieval.errors import DataError
from retrieval.heads.captioning.scores import bleu, cider_d, rouge_l
from retrieval.heads.captioning.words import plain

RECORD = json.loads((Path(__file__).parents[1] / "data" / "caption_metrics.json").read_text("utf-8"))


@pytest.mark.parametrize("name", RECORD["cases"])
def test_equal_to_what_pycocoevalcap_said(name):
    case = RECORD["cases"][name]
    pytest.importorskip("sacrebleu")
    ours = bleu(case["said"], case["references"])
    assert list(ours) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4"]
    assert [*ours.values()] == pytest.approx(case["bleu"], abs=1e-9)
    assert rouge_l(case["said"], case["references"]) == pytest.approx(case["rouge_l_each"], abs=1e-12)
    assert cider_d(case["said"], case["references"]) == pytest.approx(case["cider_d_each"], abs=1e-12)


def test_what_is_not_compared():
    assert plain("  A man's T-shirt, (red)_ &  2 DOGS … naïve!\n") == "a man's t shirt red 2 dogs naïve"
    assert plain(" .-_!") == ""
    noisy = ["A dog, running!"], [["a dog running", "A DOG - RUNS."]]
    clean = ["a dog running"], [["a dog running", "a dog runs"]]
    assert rouge_l(*noisy) == rouge_l(*clean) == [1.0]


def test_by_hand():
    """Two words in order of three said and of four wanted: P = 2/3, R = 1/2."""
    share, found = 2 / 3, 1 / 2
    expected = (1 + 1.2**2) * share * found / (found + 1.2**2 * share)
    assert rouge_l(["a b x"], [["a y b z"]])[0] == pytest.approx(expected)
    pytest.importorskip("sacrebleu")
    assert bleu(["a b c d", "e f"], [["a b c d"], ["e g"]])["bleu_1"] == pytest.approx(5 / 6)
    one = [["x y z w"], ["p q r s"]]  # each as rare as can be: of its own reference only
    assert cider_d(["x y z w", "q"], one)[0] == pytest.approx(10)


def test_a_caption_without_a_word_scores_nothing():
    assert rouge_l(["", "!"], [["a"], ["a b"]]).tolist() == [0, 0]
    assert cider_d(["", "a b"], [["a"], ["b c"]])[0] == 0
    assert np.isfinite(cider_d(["", ""], [["a"], ["a"]])).all()
    pytest.importorskip("sacrebleu")
    assert bleu(["", ""], [["a"], ["b"]])["bleu_4"] == 0


@pytest.mark.parametrize("measure", [bleu, rouge_l, cider_d])
def test_nothing_to_compare_with(measure):
    pytest.importorskip("sacrebleu")
    with pytest.raises(DataError, match="0 captions cannot be compared"):
        measure([], [])
    with pytest.raises(DataError, match="1 captions cannot be compared with references of 2"):
        measure(["a"], [["a"], ["b"]])
    with pytest.raises(DataError, match="1 of 2 captions have no reference"):
        measure(["a", "b"], [["a"], [" ", "…"]])
