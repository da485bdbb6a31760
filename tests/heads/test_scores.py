"""Measures beside scikit-learn's, and intervals beside a bootstrap written out."""

from __future__ import annotations

import numpy as np
import pytest

sk = pytest.importorskip("sklearn.metrics")

from retrieval.heads.scores import decide, detail, score  # noqa: E402
from retrieval.heads.targets import Target  # noqa: E402
from retrieval.metrics import bootstrap_weights, difference  # noqa: E402

CLASS = Target("label", "class", ("a", "b", "c"))
LABELS = Target("label", "labels", ("a", "b", "c"))
NUMBER = Target("n", "number", ("n",))


@pytest.fixture
def case():
    random = np.random.default_rng(0)
    right = random.integers(0, 3, 90)
    outputs = random.dirichlet([1, 1, 1], 90)
    outputs[np.arange(90), right] += random.random(90)
    return right, outputs / outputs.sum(1, keepdims=True)


def test_measures_of_classes_are_scikit_learn_s(case):
    right, outputs = case
    guess = outputs.argmax(1)
    found = score(CLASS, right, outputs)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(right, guess))
    assert found["macro_f1"] == pytest.approx(sk.f1_score(right, guess, average="macro"))
    details = detail(CLASS, right, outputs)
    assert details.averages["micro_f1"] == pytest.approx(sk.f1_score(right, guess, average="micro"))
    assert details.averages["macro_precision"] == pytest.approx(sk.precision_score(right, guess, average="macro"))
    assert details.averages["macro_roc_auc"] == pytest.approx(sk.roc_auc_score(right, outputs, multi_class="ovr"))
    np.testing.assert_array_equal(details.confusion, sk.confusion_matrix(right, guess))
    assert [one.f1 for one in details.classes] == pytest.approx(sk.f1_score(right, guess, average=None).tolist())
    assert [one.rows for one in details.classes] == np.bincount(right).tolist()


def test_measures_of_labels_and_numbers_are_scikit_learn_s():
    random = np.random.default_rng(1)
    right, outputs = (random.random((50, 3)) < 0.4).astype(np.float32), random.random((50, 3))
    found = score(LABELS, right, outputs)
    assert found["macro_f1"] == pytest.approx(sk.f1_score(right, outputs > 0.5, average="macro"))
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(right, outputs > 0.5))
    assert detail(LABELS, right, outputs).confusion is None
    numbers = random.normal(size=50)
    guess = numbers[:, None] + random.normal(size=(50, 1))
    found = score(NUMBER, numbers, guess)
    assert found["r2"] == pytest.approx(sk.r2_score(numbers, guess[:, 0]))
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(numbers, guess[:, 0]))
    assert detail(NUMBER, numbers, guess) is None


def test_intervals_are_those_of_rows_drawn_again(case):
    right, outputs = case
    found = score(CLASS, right, outputs, 40)
    slow = []
    for weights in np.concatenate(list(bootstrap_weights(len(right), 40))).astype(int):
        rows = np.repeat(np.arange(len(right)), weights)
        slow.append(sk.f1_score(right[rows], outputs[rows].argmax(1), average="macro", labels=[0, 1, 2]))
    np.testing.assert_allclose(found.drawn["macro_f1"], slow, atol=1e-12)
    assert found.intervals["macro_f1"] == pytest.approx(tuple(np.quantile(slow, (0.025, 0.975))))


def test_the_difference_of_two_is_paired(case):
    right, outputs = case
    worse = np.roll(outputs, 1, axis=0)
    one, other = score(CLASS, right, outputs, 200), score(CLASS, right, worse, 200)
    assert difference(one, one).intervals["macro_f1"] == (0, 0)
    low, high = difference(one, other).intervals["macro_f1"]
    assert 0 < low < one["macro_f1"] - other["macro_f1"] < high


def test_a_row_of_a_class_that_was_not_learnt_is_wrong():
    right, outputs = np.array([0, 1, -1]), np.array([[0.9, 0.1, 0], [0.2, 0.8, 0], [0.6, 0.3, 0.1]])
    found = score(CLASS, right, outputs)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)  # of c there is neither a row nor a guess
    details = detail(CLASS, right, outputs)
    assert details.confusion.sum() == 2
    assert details.classes[2].precision_recall is None
    assert np.isnan(details.classes[2].roc_auc)


def test_calibration_is_the_distance_of_sure_from_right():
    outputs = np.array([[0.95, 0.05, 0], [0.95, 0.05, 0], [0.55, 0.45, 0], [0.55, 0.45, 0]])
    details = detail(CLASS, np.array([0, 1, 0, 0]), outputs)
    np.testing.assert_allclose(details.confidence, [0.55, 0.95])
    np.testing.assert_allclose(details.accuracy, [1, 0.5])
    assert details.calibration_error == pytest.approx((0.45 + 0.45) / 2)


def test_answers():
    assert decide(CLASS, np.array([[0.1, 0.7, 0.2]])).tolist() == [1]
    assert CLASS.answer(np.array([0.1, 0.7, 0.2])) == "b"
    assert LABELS.answer(np.array([0.6, 0.4, 0.9])) == ["a", "c"]
    assert NUMBER.answer(np.array([2.5])) == 2.5


def test_no_rows_is_an_error_and_equal_numbers_have_no_r2():
    with pytest.raises(ValueError, match="no row"):
        score(CLASS, np.array([], int), np.empty((0, 3)))
    assert np.isnan(score(NUMBER, np.ones(4), np.ones((4, 1)))["r2"])
