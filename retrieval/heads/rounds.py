"""One split of the rows: every model of one modality, and every fusion, fitted on its train part."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from retrieval.embedding import Progress
from retrieval.errors import DataError
from retrieval.heads import Modalities
from retrieval.heads.modalities import IMAGE, Note, Scaling
from retrieval.heads.pixels import PixelCNN, Pixels
from retrieval.heads.problem import Fitted, Part, Problem, Variant
from retrieval.heads.scores import Outputs
from retrieval.heads.settings import ClassifySettings
from retrieval.heads.splits import RowNumbers
from retrieval.heads.targets import Target
from retrieval.heads.variants import ALONE, FUSED
from retrieval.pair_formats import some
from retrieval.pairs import Example

CNN_NAME = "cnn"


@dataclass(frozen=True, eq=False)
class Table:
    """Rows that are known, as numbers."""

    examples: Sequence[Example]
    modalities: Modalities
    views: Sequence[Modalities]
    pixels: Pixels | None

    def rows(self, rows: RowNumbers) -> Modalities:
        """The tables of some of the rows."""
        return {name: table[rows] for name, table in self.modalities.items()}


@dataclass(frozen=True, eq=False)
class Run:
    """The models of one split by (modality, variant), fused ones under ("", variant); and what they say of test."""

    fitted: Mapping[str, Fitted]  # the best of each modality, and the fused ones, by name
    val: dict[tuple[str, str], float]
    test: dict[tuple[str, str], Outputs]
    seconds: dict[tuple[str, str], float]
    parameters: dict[tuple[str, str], int]


class Round:
    """One split of the rows: to learn from, to choose by, to measure with."""

    def __init__(
        self,
        table: Table,
        target: Target,
        names: tuple[str, ...],
        parts: Mapping[str, RowNumbers],
        settings: ClassifySettings,
        tell: Note,
    ) -> None:
        self.names, self.parts = names, parts
        self.pixels = {} if table.pixels is None else {split: table.pixels[rows] for split, rows in parts.items()}
        self.val_rows = parts["val"]  # those of them that models are chosen by
        self.scaling = Scaling.of(table.rows(parts["train"]))
        right = {split: target.encode([table.examples[row] for row in rows]) for split, rows in parts.items()}
        part = {split: Part(self.scaling.apply(table.rows(rows)), right[split]) for split, rows in parts.items()}
        if target.task == "class":
            self._check_val(target, table, part["val"], tell)
            known = np.flatnonzero(part["val"].right >= 0)
            part["val"], self.val_rows = part["val"].take(known), self.val_rows[known]
            if self.pixels:
                self.pixels["val"] = self.pixels["val"][known]
        self.test: Part = part["test"]
        views = [
            self.scaling.apply({name: rows[parts["train"]] for name, rows in view.items()}) for view in table.views
        ]
        self.problem = Problem(
            target,
            part["train"],
            part["val"],
            views,
            settings.imbalance,
            settings.balance,
            settings.seed,
            settings.device,
        )

    def _check_val(self, target: Target, table: Table, val: Part, tell: Note) -> None:
        for split, what in (("val", "left out there"), ("test", "wrong whatever is said of them")):
            unseen = target.unseen([table.examples[row] for row in self.parts[split]])
            if unseen:
                tell(f"labels of {split} that are not in train ({some(unseen)}): their rows are {what}")
        if not (val.right >= 0).any():
            raise DataError("no row of val has a label that train has: there is nothing to choose by")

    def run(self, variants: Sequence[str], progress: Progress | None) -> Run:
        """Fit the models of each modality, and the fused ones."""
        run = Run({}, {}, {}, {}, {})
        alone: dict[str, Fitted] = {}
        fused = variants if len(self.names) > 1 else ()
        total, done = len(self.names) * len(ALONE) + len(fused), 0

        def fit_one(problem: Problem, key: tuple[str, str], variant: Variant) -> Fitted:
            nonlocal done
            began = time.process_time()
            model = variant.fit(problem)
            run.seconds[key] = time.process_time() - began
            names = problem.train.inputs.names
            run.val[key] = problem.score(model.predict(problem.val.inputs))
            run.test[key] = model.predict(self.test.inputs.only(*names))
            run.parameters[key] = sum(value.size for value in model.arrays().values())
            done += 1
            if progress:
                progress(done, total)
            return model

        for name in self.names:
            problem = self.problem.only(name)
            models = {variant: fit_one(problem, (name, variant), spec) for variant, spec in ALONE.items()}
            alone[name] = models[max(models, key=lambda variant: run.val[name, variant])]
        if self.pixels and fused:
            self._run_cnn(run)
        problem = replace(self.problem, alone=alone)
        joined = {variant: fit_one(problem, ("", variant), FUSED[variant]) for variant in fused}
        return replace(run, fitted={**alone, **joined})

    def _run_cnn(self, run: Run) -> None:
        key, began = (IMAGE, CNN_NAME), time.process_time()
        model = PixelCNN().fit(self.problem, self.pixels["train"], self.pixels["val"])
        run.seconds[key] = time.process_time() - began
        run.val[key] = self.problem.score(model.predict(self.pixels["val"]))
        run.test[key], run.parameters[key] = model.predict(self.pixels["test"]), model.parameters
