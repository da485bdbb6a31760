"""Late fusion: a model of each modality, and their outputs joined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from retrieval.heads.linear import FittedLinear, Linear
from retrieval.heads.modalities import Inputs
from retrieval.heads.problem import Arrays, Fitted, Part, Problem
from retrieval.heads.scores import Outputs
from retrieval.heads.splits import splits
from retrieval.heads.targets import Target

_FOLDS = 5  # of stacking: each row's first-level outputs come from models that have not seen it
_STRENGTHS = (0.03, 0.3, 3.0)  # of the model on top, which has few inputs
_FLOOR = 1e-4  # of a probability, before its logarithm

Rule = Literal["average", "vote", "stacking"]


@dataclass(frozen=True)
class Late:
    """Joins models of one modality each: the mean of their outputs, a vote, or a model on top (Wolpert 1992)."""

    rule: Rule
    stage: str
    about: str

    def fit(self, problem: Problem) -> FittedLate:
        """Join the models that are fitted already, ``problem.alone``."""
        models = {name: problem.alone[name] for name in problem.train.inputs.names}
        # What a row without anything is given: how often each answer is right among all rows.
        outputs = problem.target.outputs
        if problem.target.task == "class":
            prior = np.bincount(problem.train.right, minlength=outputs) / len(problem.train)
        else:
            prior = np.atleast_1d(np.asarray(problem.train.right, np.float64).mean(axis=0))
        if self.rule != "stacking":
            return FittedLate(problem.target, self.rule, models, prior)
        top = Linear("logistic", "late", "", _STRENGTHS).fit(_second_level(problem, models, prior))
        return FittedLate(problem.target, self.rule, models, prior, top)


@dataclass(frozen=True, eq=False)
class FittedLate:
    """The models, what joins them, and the share of each answer for a row that has nothing."""

    target: Target
    rule: Rule
    models: Mapping[str, Fitted]
    prior: NDArray[np.float64]  # (C,)
    top: Fitted | None = None

    def predict(self, inputs: Inputs) -> Outputs:
        """Each model has its say where its modality is there."""
        said = {name: model.predict(inputs.only(name)) for name, model in self.models.items()}
        if self.top is not None:
            return self.top.predict(_features(self.target, inputs, said, self.prior))
        outputs = np.stack([said[name] for name in inputs.names], axis=1)  # (N, M, C)
        if self.rule == "vote" and self.target.task != "number":
            outputs = _votes(self.target, outputs)
        shares = inputs.present / np.maximum(inputs.present.sum(axis=1, keepdims=True), 1)
        joined = (outputs * shares[..., None]).sum(axis=1)
        return np.where(inputs.present.any(axis=1, keepdims=True), joined, self.prior)

    def attention(self, _: Inputs) -> None:
        """There is none."""
        return

    def arrays(self) -> Arrays:
        """See :class:`retrieval.heads.problem.Fitted`."""
        parts = {str(i): model for i, model in enumerate(self.models.values())}
        if self.top:
            parts["top"] = self.top
        nested = {f"{name}/{key}": value for name, part in parts.items() for key, value in part.arrays().items()}
        return {"prior": self.prior, **nested}

    def settings(self) -> dict[str, Any]:
        """See :class:`retrieval.heads.problem.Fitted`."""
        return {
            "kind": "late",
            "rule": self.rule,
            "models": {name: model.settings() for name, model in self.models.items()},
            "top": self.top.settings() if self.top else None,
        }


def _votes(target: Target, outputs: Outputs) -> Outputs:
    """(N, M, C) -> the same with a vote for each answer, and a little of its share, which decides between equals."""
    if target.task == "class":
        votes = (outputs == outputs.max(axis=2, keepdims=True)).astype(np.float64)
        votes /= votes.sum(axis=2, keepdims=True)
    else:
        votes = (outputs > 0.5).astype(np.float64)
    mixed: Outputs = 0.9 * votes + 0.1 * outputs
    return mixed


def _features(target: Target, inputs: Inputs, said: Mapping[str, Outputs], prior: NDArray[np.float64]) -> Inputs:
    """What the model on top sees: logarithms of the odds, the prior's where a modality is missing; or the numbers."""
    values = []
    for i, name in enumerate(inputs.names):
        outputs = np.where(inputs.present[:, i : i + 1], said[name], prior)
        if target.task == "number":
            outputs = (outputs - target.mean) / target.std
        else:
            shares = np.clip(outputs, _FLOOR, 1 - _FLOOR)
            outputs = np.log(shares / (1 - shares))
        values.append(outputs.astype(np.float32))
    return Inputs(inputs.names, tuple(values), inputs.present)


def _second_level(problem: Problem, models: Mapping[str, Fitted], prior: NDArray[np.float64]) -> Problem:
    """The problem of the model on top: out-of-fold outputs of logistic regression, and what the models say of val."""
    train, val, target = problem.train, problem.val, problem.target
    said = {name: np.empty((len(train), target.outputs)) for name in models}
    strata = train.right.tolist() if target.task == "class" else [0] * len(train)
    for fold, (seen, unseen) in enumerate(splits(np.arange(len(train)), strata, min(_FOLDS, len(train)), problem.seed)):
        for name, model in models.items():
            part = replace(problem.only(name), train=train.take(seen).only(name), views=(), seed=problem.seed + fold)
            strength = model.strength if isinstance(model, FittedLinear) else 1e-3
            said[name][unseen] = _refit(part, strength).predict(train.inputs.take(unseen).only(name))
    of_val = {name: model.predict(val.inputs.only(name)) for name, model in models.items()}
    return replace(
        problem,
        train=Part(_features(target, train.inputs, said, prior), train.right),
        val=Part(_features(target, val.inputs, of_val, prior), val.right),
        views=(),
        treatment="class-weights" if problem.treatment != "none" else "none",
    )


def _refit(problem: Problem, strength: float) -> Fitted:
    return Linear("logistic", "alone", "", (strength,)).fit(problem)


def load_late(target: Target, settings: Mapping[str, Any], arrays: Arrays, load: Any) -> Fitted:
    """A fitted model from what it wrote; KeyError or ValueError where that is damaged."""

    def under(name: str) -> Arrays:
        return {key.removeprefix(f"{name}/"): value for key, value in arrays.items() if key.startswith(f"{name}/")}

    models = {name: load(target, part, under(str(i))) for i, (name, part) in enumerate(settings["models"].items())}
    top = load(target, settings["top"], under("top")) if settings["top"] else None
    return FittedLate(target, settings["rule"], models, arrays["prior"], top)
