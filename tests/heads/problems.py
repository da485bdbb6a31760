"""Small problems for classifiers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

pytest.importorskip("sklearn")
torch = pytest.importorskip("torch")

from retrieval.heads.modalities import Scaling  # noqa: E402
from retrieval.heads.problem import Part, Problem  # noqa: E402
from retrieval.heads.targets import Target  # noqa: E402
from retrieval.heads.variants import ALONE  # noqa: E402

TARGETS = {
    "class": Target("label", "class", ("bird", "cat", "dog")),
    "labels": Target("label", "labels", ("indoors", "night", "wet")),
    "number": Target("stars", "number", ("stars",), 2.5, 1.5),
}
WIDTHS = {"image": 40, "text": 30, "pulse": 1}


@dataclass(frozen=True)
class World:
    """Rows of three modalities: what is right shows in image and text, half in each, and not in the pulse."""

    problem: Problem
    test: Part
    tables: dict
    scaling: Scaling


def world(task: str, rows: int = 24, noise: float = 0.3, seed: int = 0, same: bool = True) -> World:
    """``same``: what is learnt from is what is chosen by, and measured with."""
    random = np.random.default_rng(seed)
    target = TARGETS[task]
    hidden = random.normal(size=(3, rows, 4))
    if task == "class":
        right = np.arange(rows) % 3
        hidden[..., :3] += 3 * np.eye(3)[right]
    elif task == "labels":
        right = (random.random((rows, 3)) < 0.4).astype(np.float32)
        right[0], right[1] = 0, 1
        hidden[..., :3] += 4 * right
    else:
        right = random.normal(target.mean, target.std, rows)
        hidden[..., 0] = right
    # Each table shows what is hidden through directions of its own.
    tables = {
        name: (hidden[i] @ random.normal(size=(4, width)) + noise * random.normal(size=(rows, width))).astype(
            np.float32
        )
        for i, (name, width) in enumerate(WIDTHS.items())
    }
    tables["pulse"] = random.normal(size=(rows, 1)).astype(np.float32)
    scaling = Scaling.of(tables)
    whole = Part(scaling.apply(tables), right)
    half = np.arange(rows) < rows // 2
    train, val, test = (whole,) * 3 if same else (whole.take(half), whole.take(~half), whole.take(~half))
    return World(Problem(target, train, val), test, tables, scaling)


def with_alone(problem: Problem) -> Problem:
    """The same with a model of each modality."""
    names = problem.train.inputs.names
    return replace(problem, alone={name: ALONE["logistic"].fit(problem.only(name)) for name in names})
