"""How good predictions are: scikit-learn's measures, and paired bootstrap intervals around them.

Every model meets the same draws of rows, so that the difference of two has an interval of its own: what is hard for
both cancels out (:func:`retrieval.metrics.difference`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn import metrics as sk

from retrieval.heads.results import ClassDetail, Curve, Details
from retrieval.heads.targets import Known, Target
from retrieval.metrics import Scores, bootstrap_weights
from retrieval.ranks import Values

Outputs = NDArray[np.float64]  # (N, C) probabilities, or (N, 1) numbers
DRAWS = 1000
_BINS = 10  # of confidence, in a calibration curve

HEADLINE: Mapping[str, str] = {"class": "macro_f1", "labels": "macro_f1", "number": "r2"}  # what models are chosen by


def decide(target: Target, outputs: Outputs) -> NDArray[Any]:
    """Outputs to answers: (N,) the likeliest class, (N, C) whether each label is there, (N,) the number."""
    if target.task == "class":
        best: NDArray[np.int64] = outputs.argmax(axis=1)
        return best
    return outputs > 0.5 if target.task == "labels" else outputs[:, 0]


def score(target: Target, right: Known, outputs: Outputs, draws: int = 0) -> Scores:
    """The measures that models are compared by, with as many bootstrap draws of the rows.

    Of classes and labels: ``macro_f1``, the mean over all that were learnt of their F1 (0 where that is undefined), and
    ``accuracy``, the share of rows that are right (with several labels: in all of them). A row of a class that was not
    learnt is wrong whatever is said of it. Of numbers: ``r2`` and ``mae``.

    Raises:
        ValueError: there is no row.
    """
    if not len(right):
        raise ValueError("there is no row to measure with")
    measure = _numbers if target.task == "number" else _classes
    of = measure(target, right, outputs)
    one = {name: float(value[0]) for name, value in of(np.ones((1, len(right)))).items()}
    drawn: dict[str, list[Values]] = {}
    for weights in bootstrap_weights(len(right), draws) if draws else ():
        for name, values in of(weights).items():
            drawn.setdefault(name, []).append(values)
    return Scores(one, np.arange(len(right)), {name: np.concatenate(values) for name, values in drawn.items()})


_Measure = Callable[[NDArray[np.float64]], dict[str, Values]]  # (B, N) weights of the rows -> (B,) each


def _classes(target: Target, right: Known, outputs: Outputs) -> _Measure:
    guess = decide(target, outputs)
    if target.task == "class":
        classes = np.arange(target.outputs)
        right, guess = right[:, None] == classes, guess[:, None] == classes
    right = right > 0.5
    both = (right & guess).astype(np.float64)  # (N, C)
    either = right.astype(np.float64) + guess  # right ones and guesses: F1 = 2 both / (right ones + guesses)
    exact = (right == guess).all(axis=1).astype(np.float64)

    def of(weights: NDArray[np.float64]) -> dict[str, Values]:
        all_of = weights @ either
        f1 = np.divide(2 * (weights @ both), all_of, out=np.zeros_like(all_of), where=all_of > 0)
        return {"macro_f1": f1.mean(axis=1), "accuracy": weights @ exact / weights.sum(axis=1)}

    return of


def _numbers(_: Target, right: Known, outputs: Outputs) -> _Measure:
    guess = outputs[:, 0]
    squared, absolute = (right - guess) ** 2, np.abs(right - guess)

    def of(weights: NDArray[np.float64]) -> dict[str, Values]:
        count = weights.sum(axis=1)
        spread = weights @ right**2 / count - (weights @ right / count) ** 2
        error = weights @ squared / count
        r2 = np.where(spread > 1e-12, 1 - error / np.maximum(spread, 1e-12), np.nan)
        return {"r2": r2, "mae": weights @ absolute / count}

    return of


# ---- in detail -------------------------------------------------------------------------------------------------------


def detail(target: Target, right: Known, outputs: Outputs) -> Details | None:
    """Measure in detail with scikit-learn. None where numbers are predicted.

    Rows of classes that were not learnt count as no class's, and so as wrong guesses.
    """
    if target.task == "number":
        return None
    guess = decide(target, outputs)
    if target.task == "class":
        classes = np.arange(target.outputs)
        table, guessed = right[:, None] == classes, guess[:, None] == classes
        confusion = np.zeros((target.outputs,) * 2, np.int64)
        known = right >= 0
        np.add.at(confusion, (right[known], guess[known]), 1)
        sure, hit = outputs.max(axis=1), guess == right
    else:
        table, guessed, confusion = right > 0.5, guess, None
        sure, hit = np.maximum(outputs, 1 - outputs).ravel(), (table == guess).ravel()
    averages: dict[str, float] = {}
    for average in ("macro", "micro", "weighted"):
        found = sk.precision_recall_fscore_support(table, guessed, average=average, zero_division=0)
        averages |= {f"{average}_{name}": float(value) for name, value in zip(_PARTS, found, strict=False)}
    per_class = sk.precision_recall_fscore_support(table, guessed, average=None, zero_division=0)
    classes_of = [
        _class_detail(name, table[:, i], outputs[:, i], *(float(part[i]) for part in per_class[:3]))
        for i, name in enumerate(target.names)
    ]
    areas = [one.roc_auc for one in classes_of if np.isfinite(one.roc_auc)]
    averages["macro_roc_auc"] = float(np.mean(areas)) if areas else float("nan")
    bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    used = np.unique(bins)
    counts = np.bincount(bins, minlength=_BINS)[used]
    confidence = np.array([sure[bins == one].mean() for one in used])
    accuracy = np.array([hit[bins == one].mean() for one in used])
    error = float((counts * np.abs(confidence - accuracy)).sum() / counts.sum())
    return Details(averages, classes_of, confusion, confidence, accuracy, counts, error)


_PARTS = ("precision", "recall", "f1")


def _class_detail(
    name: str, own: NDArray[np.bool_], shares: Values, precision: float, recall: float, f1: float
) -> ClassDetail:
    count, nan = int(own.sum()), float("nan")
    if not own.any() or own.all():  # no curve through one kind of rows
        return ClassDetail(name, count, precision, recall, f1, nan, nan, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ys, xs, _ = sk.precision_recall_curve(own, shares)
        area, mean = float(sk.roc_auc_score(own, shares)), float(sk.average_precision_score(own, shares))
    return ClassDetail(name, count, precision, recall, f1, area, mean, Curve(xs, ys))
