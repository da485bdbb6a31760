"""What a classifier is fitted to, and what a fitted one is: shared by every kind of model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from retrieval.heads.modalities import Inputs
from retrieval.heads.scores import HEADLINE, Outputs, score
from retrieval.heads.targets import Known, Target

Treatment = Literal["none", "class-weights", "focal", "oversample", "undersample", "smote", "augment"]
TREATMENTS: tuple[Treatment, ...] = get_args(Treatment)
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Part:
    """Rows and what is right for them."""

    inputs: Inputs
    right: Known

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, rows: NDArray[Any]) -> Part:
        """Some of the rows."""
        return Part(self.inputs.take(rows), self.right[rows])

    def only(self, *names: str) -> Part:
        """Some of the modalities."""
        return replace(self, inputs=self.inputs.only(*names))


@dataclass(frozen=True, eq=False)
class Problem:
    """What to fit: rows to learn from, rows to choose by, and how.

    Attributes:
        target: what is predicted.
        train: rows to learn from.
        val: rows to choose by; none of a class that was not learnt.
        views: the same rows as ``train`` with other views of their pictures; may be empty.
        treatment: of classes that are rare.
        balance: of modalities of which one learns faster.
        seed: of every random number.
        device: of what is trained by gradients.
        alone: models of one modality each that are fitted already, for those that join them.
    """

    target: Target
    train: Part
    val: Part
    views: Sequence[Inputs] = ()
    treatment: Treatment = "class-weights"
    balance: str = "none"
    seed: int = 0
    device: str = "cpu"
    alone: Mapping[str, Fitted] = field(default_factory=dict)

    def only(self, *names: str) -> Problem:
        """The same with some of the modalities."""
        views = [view.only(*names) for view in self.views]
        return replace(self, train=self.train.only(*names), val=self.val.only(*names), views=views)

    def score(self, outputs: Outputs) -> float:
        """What models are chosen by, on the rows to choose by: higher is better."""
        return score(self.target, self.val.right, outputs)[HEADLINE[self.target.task]]


class Fitted(Protocol):
    """A fitted model of any kind."""

    def predict(self, inputs: Inputs) -> Outputs:
        """(N, C) probabilities, of each class or of each label; or (N, 1) numbers."""
        ...

    def attention(self, inputs: Inputs) -> NDArray[np.float64] | None:
        """(N, M) how much of each modality went into each answer, rows of sum 1; None where there is no such thing."""
        ...

    def arrays(self) -> Arrays:
        """All that was learnt."""
        ...

    def settings(self) -> dict[str, Any]:
        """In JSON, all else that is needed to build it anew."""
        ...


class Variant(Protocol):
    """A kind of model: data, from which :meth:`fit` makes a fitted one."""

    @property
    def stage(self) -> str:
        """Where modalities meet: alone, early, weighted, intermediate, graph or late."""
        ...

    @property
    def about(self) -> str:
        """One sentence, with its source."""
        ...

    def fit(self, problem: Problem) -> Fitted:
        """Fit one; the same for the same problem."""
        ...


def softmax(scores: NDArray[Any]) -> Outputs:
    """(N, C) -> rows of sum 1, in float64."""
    wide = np.asarray(scores, np.float64)
    shares = np.exp(wide - wide.max(axis=1, keepdims=True))
    out: Outputs = shares / shares.sum(axis=1, keepdims=True)
    return out


def sigmoid(scores: NDArray[Any]) -> Outputs:
    """Elementwise, in float64."""
    out: Outputs = 1 / (1 + np.exp(-np.clip(np.asarray(scores, np.float64), -500, 500)))
    return out


def link(target: Target, scores: NDArray[Any]) -> Outputs:
    """A model's scores (N, C) as outputs: probabilities, or numbers in their own unit."""
    if target.task == "class":
        return softmax(scores)
    if target.task == "labels":
        return sigmoid(scores)
    out: Outputs = np.asarray(scores, np.float64) * target.std + target.mean
    return out
