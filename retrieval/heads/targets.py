"""What is predicted: a class, several labels, or a number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import DataError
from retrieval.pair_formats import some
from retrieval.pairs import Example

Task = Literal["class", "labels", "number"]
Known = NDArray[Any]  # (N,) int64 classes, -1 = one that was not learnt; (N, C) float32 labels; (N,) float64 numbers

TASKS: tuple[Task, ...] = get_args(Task)
LABEL = "label"
_MANY = 20  # different whole numbers: they count something, and are no names of classes
_SEPARATOR = ";"  # between several labels in a field of CSV


@dataclass(frozen=True)
class Target:
    """What is predicted, from which column. ``names``: of the classes or labels that were learnt, sorted."""

    column: str
    task: Task
    names: tuple[str, ...]
    mean: float = 0.0  # of the numbers to learn from, and
    std: float = 1.0

    @classmethod
    def of(cls, examples: Sequence[Example], column: str = LABEL, task: str = "auto") -> Target:
        """Find out what is predicted from the rows to learn from.

        ``auto``: several labels where any row has more than one; a number where all are such, and one is no whole
        number or there are more than twenty different ones; else a class.

        Raises:
            DataError: an unknown task, no labels, one class alone, or something that is no number where one is asked.
        """
        if task not in ("auto", *TASKS):
            raise DataError(f"the task must be auto, {', '.join(TASKS)}, not {task!r}")
        values = [labels_of(example, column) for example in examples]
        known = [labels for labels in values if labels]
        if not known:
            have = sorted({key for example in examples for key in example.columns})
            raise DataError(
                f"no row to learn from has anything in the column {column!r}; name another with --target"
                + (f" ({some(have)})" if have else "")
            )
        chosen: Task = _guess(known) if task == "auto" else cast("Task", task)
        if chosen == "number":
            numbers = np.array([_number(labels, column) for labels in known])
            return cls(column, "number", (column,), float(numbers.mean()), float(numbers.std()) or 1.0)
        if chosen == "class" and any(len(labels) > 1 for labels in known):
            raise DataError(f"some rows have several labels in {column!r}: predict them with --task labels")
        names = tuple(
            sorted({name for labels in known for name in (_several(labels) if chosen == "labels" else labels)})
        )
        if len(names) < 2 and chosen == "class":
            raise DataError(f"all rows to learn from are {names[0]!r}: there is nothing to tell apart")
        return cls(column, chosen, names)

    @property
    def outputs(self) -> int:
        """Numbers that a model gives for a row."""
        return len(self.names)

    def encode(self, examples: Sequence[Example]) -> Known:
        """What is right, in the form of the task. Labels that were not learnt are left out; a number must be one."""
        values = [labels_of(example, self.column) for example in examples]
        if self.task == "number":
            return np.array([_number(labels, self.column) for labels in values], np.float64)
        places = {name: i for i, name in enumerate(self.names)}
        if self.task == "class":
            return np.array([places.get(labels[0], -1) if labels else -1 for labels in values], np.int64)
        out = np.zeros((len(examples), len(self.names)), np.float32)
        for row, labels in enumerate(values):
            for name in _several(labels):
                if name in places:
                    out[row, places[name]] = 1
        return out

    def is_known(self, example: Example) -> bool:
        """Whether a row can be learnt from, or measured with: of several labels, none is an answer too."""
        return self.task == "labels" or bool(labels_of(example, self.column))

    def unseen(self, examples: Sequence[Example]) -> list[str]:
        """Labels that were not learnt."""
        if self.task == "number":
            return []
        found = {name for example in examples for name in self._names_of(example)}
        return sorted(found - set(self.names))

    def _names_of(self, example: Example) -> tuple[str, ...]:
        labels = labels_of(example, self.column)
        return _several(labels) if self.task == "labels" else labels

    def answer(self, outputs: NDArray[np.float64]) -> Any:
        """One row's outputs (C,) in words: a name, a list of names, or a number."""
        if self.task == "number":
            return float(outputs[0])
        if self.task == "class":
            return self.names[int(outputs.argmax())]
        return [name for name, share in zip(self.names, outputs.tolist(), strict=True) if share > 0.5]


def labels_of(example: Example, column: str) -> tuple[str, ...]:
    """What a row has in its labels, or in the column of that name; none where that is empty or NaN."""
    value: Any = example.columns.get(column)
    if value is None and column in (LABEL, "labels", "class"):
        value = example.labels
    values = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(str(item) for item in values if item not in (None, "") and item == item)  # NaN is none


def _several(labels: tuple[str, ...]) -> tuple[str, ...]:
    """Labels of a row; those in one field of a table stand between semicolons."""
    return tuple(dict.fromkeys(part.strip() for label in labels for part in label.split(_SEPARATOR) if part.strip()))


def _guess(known: Sequence[tuple[str, ...]]) -> Task:
    if any(len(labels) > 1 for labels in known):
        return "labels"
    try:
        numbers = {float(labels[0]) for labels in known}
    except ValueError:
        return "class"
    finite = all(map(math.isfinite, numbers))
    return "number" if finite and (len(numbers) > _MANY or any(value % 1 for value in numbers)) else "class"


def _number(labels: tuple[str, ...], column: str) -> float:
    try:
        (label,) = labels
        value = float(label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        said = ", ".join(labels) or "nothing"
        raise DataError(f"{said!r:.60} in the column {column!r} is no number: leave out --task, or that row")
    return value
