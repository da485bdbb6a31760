"""Linear models by scikit-learn, kept as arrays: logistic regression, the linear SVM, and ridge regression."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.svm import LinearSVC, LinearSVR

from retrieval.heads.imbalance import treated
from retrieval.heads.modalities import Inputs
from retrieval.heads.problem import Arrays, Fitted, Part, Problem, link
from retrieval.heads.scores import Outputs
from retrieval.heads.targets import Target

_STRENGTHS: Mapping[str, Sequence[float]] = {  # C, from strong regularisation to weak
    "logistic": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "svm": (1e-5, 1e-4, 1e-3, 1e-2),
}
_ITERATIONS = 1000
_SCALES = np.geomspace(0.05, 20, 61)  # of a margin, to be a probability


@dataclass(frozen=True)
class Linear:
    """All modalities side by side into one linear model; how strongly it is regularised is chosen on val."""

    kind: Literal["logistic", "svm"]
    stage: str
    about: str
    strengths: Sequence[float] = ()  # of C; none: those that suit the kind

    def fit(self, problem: Problem) -> FittedLinear:
        """Fit one for each strength, and take that which validates best; of equal ones the more regularised."""
        train = treated(problem)
        models = [_fit(self.kind, problem, train, strength) for strength in self.strengths or _STRENGTHS[self.kind]]
        if len(models) == 1:
            return models[0]
        return max(models, key=lambda model: problem.score(model.predict(problem.val.inputs)))  # the first of equals


@dataclass(frozen=True, eq=False)
class FittedLinear:
    """``scores = joined @ weights + bias``, times a scale, through the task's link."""

    target: Target
    weights: NDArray[np.float64]  # (W, C)
    bias: NDArray[np.float64]  # (C,)
    strength: float

    def predict(self, inputs: Inputs) -> Outputs:
        """See :class:`retrieval.heads.problem.Fitted`."""
        return link(self.target, inputs.joined().astype(np.float64) @ self.weights + self.bias)

    def attention(self, _: Inputs) -> None:
        """There is none."""
        return

    def arrays(self) -> Arrays:
        """See :class:`retrieval.heads.problem.Fitted`."""
        return {"weights": self.weights, "bias": self.bias}

    def settings(self) -> dict[str, Any]:
        """See :class:`retrieval.heads.problem.Fitted`."""
        return {"kind": "linear", "strength": self.strength}


def load_linear(target: Target, settings: Mapping[str, Any], arrays: Arrays) -> Fitted:
    """A fitted model from what it wrote; KeyError or ValueError where that is damaged."""
    weights, bias = arrays["weights"], arrays["bias"]
    if weights.ndim != 2 or bias.shape != (target.outputs,) or weights.shape[1] != target.outputs:
        raise ValueError("its arrays do not fit its labels")
    return FittedLinear(target, weights, bias, float(settings["strength"]))


def _fit(kind: str, problem: Problem, train: Part, strength: float) -> FittedLinear:
    target, rows = problem.target, train.inputs.joined()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # what has not converged is chosen only if it is better
        if target.task == "number":
            weights, bias = _regression(kind, problem, rows, (train.right - target.mean) / target.std, strength)
            return FittedLinear(target, weights, bias, strength)
        balanced = "balanced" if problem.treatment == "class-weights" else None
        if target.task == "labels":
            columns = [_binary(kind, rows, column, strength, balanced, problem.seed) for column in train.right.T > 0.5]
            weights = np.stack([column[0] for column in columns], axis=1)
            bias = np.array([column[1] for column in columns])
        else:
            weights, bias = _classes(kind, rows, train.right, target.outputs, strength, balanced, problem.seed)
    if kind == "svm":
        weights, bias = _as_probabilities(problem, weights, bias)
    return FittedLinear(target, weights, bias, strength)


def _estimator(kind: str, strength: float, balanced: str | None, seed: int) -> Any:
    if kind == "logistic":
        return LogisticRegression(C=strength, class_weight=balanced, max_iter=_ITERATIONS)
    return LinearSVC(C=strength, class_weight=balanced, random_state=seed, dual=False, max_iter=_ITERATIONS)


def _classes(
    kind: str, rows: NDArray[Any], right: NDArray[Any], classes: int, strength: float, balanced: str | None, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    weights = np.zeros((rows.shape[1], classes))
    bias = np.full(classes, -1e3)  # a class that lost all of its rows
    if len(present := np.unique(right)) < 2:
        bias[present] = 0
        return weights, bias
    model = _estimator(kind, strength, balanced, seed).fit(rows, right)
    if len(model.classes_) == 2:  # scikit-learn has one column for two classes
        half = np.asarray(model.coef_[0], np.float64) / (2 if kind == "logistic" else 1)
        offset = float(model.intercept_[0]) / (2 if kind == "logistic" else 1)
        weights[:, model.classes_] = np.stack([-half, half], axis=1)
        bias[model.classes_] = -offset, offset
    else:
        weights[:, model.classes_], bias[model.classes_] = model.coef_.T, model.intercept_
    return weights, bias


def _binary(
    kind: str, rows: NDArray[Any], right: NDArray[np.bool_], strength: float, balanced: str | None, seed: int
) -> tuple[NDArray[np.float64], float]:
    """One label: (W,) and its bias. Of one that all rows have, or none, that is all there is to know."""
    if right.all() or not right.any():
        return np.zeros(rows.shape[1]), 20.0 if right.all() else -20.0
    model = _estimator(kind, strength, balanced, seed).fit(rows, right)
    return np.asarray(model.coef_[0], np.float64), float(model.intercept_[0])


def _regression(
    kind: str, problem: Problem, rows: NDArray[Any], right: NDArray[np.float64], strength: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if kind == "logistic":
        model = Ridge(alpha=1 / strength).fit(rows, right)
    else:
        model = LinearSVR(C=strength, random_state=problem.seed, max_iter=_ITERATIONS).fit(rows, right)
    return np.asarray(model.coef_, np.float64)[:, None], np.atleast_1d(np.asarray(model.intercept_, np.float64))


def _as_probabilities(
    problem: Problem, weights: NDArray[np.float64], bias: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Margins scaled to be probabilities: the scale at which val is likeliest (Guo et al. 2017, arXiv:1706.04599)."""
    margins = problem.val.inputs.joined().astype(np.float64) @ weights + bias
    right = problem.val.right
    losses = []
    for scale in _SCALES:
        shares = np.clip(link(problem.target, scale * margins), 1e-9, 1)
        if problem.target.task == "class":
            losses.append(-np.log(shares[np.arange(len(right)), right]).mean())
        else:
            losses.append(-np.where(right > 0.5, np.log(shares), np.log(np.clip(1 - shares, 1e-9, 1))).mean())
    scale = float(_SCALES[int(np.argmin(losses))])
    return scale * weights, scale * bias
