"""What fitting a classifier has shown, as plain values: for the command, and for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.heads.targets import Target
from retrieval.metrics import Scores
from retrieval.ranks import Values

_MEASURES = {"macro_f1": "macro-F1", "r2": "R²"}  # as people write them


@dataclass(frozen=True, eq=False)
class Curve:
    """Points of a curve, both from 0 to 1."""

    xs: Values
    ys: Values


@dataclass(frozen=True, eq=False)
class ClassDetail:
    """One class or label: its rows, and how they and the guesses at it agree."""

    name: str
    rows: int
    precision: float
    recall: float
    f1: float
    roc_auc: float  # NaN where all rows or none are of it
    average_precision: float
    precision_recall: Curve | None


@dataclass(frozen=True, eq=False)
class Details:
    """Everything else that is known of one model's predictions of classes or labels.

    Attributes:
        averages: precision, recall and F1, macro, micro and weighted; ROC-AUC, macro (one against the rest).
        classes: in the order of the target's names.
        confusion: (C, C) rows by right class; None with several labels.
        confidence: (B,) of bins, the mean probability of the answers in each, and
        accuracy: (B,) how many of them are right; together the reliability diagram.
        counts: (B,) answers in each bin.
        calibration_error: the mean of their distance, weighted by the answers (ECE, Guo et al. 2017, arXiv:1706.04599).
    """

    averages: Mapping[str, float]
    classes: Sequence[ClassDetail]
    confusion: NDArray[np.int64] | None
    confidence: Values
    accuracy: Values
    counts: NDArray[np.int64]
    calibration_error: float


@dataclass(frozen=True, eq=False)
class ModelScores:
    """One model: what it is, how well it validated, and how it does on the rows that nothing was chosen by.

    Attributes:
        name: of the variant.
        modality: of a model of one modality alone; empty of a fused one.
        stage: where modalities meet.
        about: one sentence.
        val: what it was chosen by.
        test: the measures, with paired draws.
        details: everything else; None of numbers.
        seconds: of processor time to fit it.
        parameters: numbers that were learnt.
    """

    name: str
    modality: str
    stage: str
    about: str
    val: float
    test: Scores
    details: Details | None
    seconds: float
    parameters: int


@dataclass(frozen=True)
class Effect:
    """What a treatment of rare classes does to one network: F1 of each class on test, and macro-F1 on val and test."""

    treatment: str
    rows: int  # to learn from
    val: float
    test: float
    per_class: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Explanation:
    """What each modality has to do with the answers on test.

    Attributes:
        names: of M modalities.
        left_out: macro-F1 (or r²) without each of them, at the chosen model.
        contribution: (N, M) by how much the probability of each row's answer falls without it.
        attention: (N, M) of the chosen model, where it has any.
    """

    names: tuple[str, ...]
    whole: float
    left_out: tuple[float, ...]
    contribution: NDArray[np.float64]
    attention: NDArray[np.float64] | None


@dataclass(frozen=True, eq=False)
class Finetuning:
    """What it has shown to send the gradients on into the towers.

    Attributes:
        name: of the fine-tuned model, and
        start: of the frozen network that it began as.
        frozen: the frozen model that was chosen on val.
        blocks: of each tower that learnt.
        kept: whether it is better on val than ``frozen``; else it was thrown away.
        val: its score on val, and
        frozen_val: that of ``frozen``.
        differences: on test, its measures less those of ``frozen`` and of ``start``, with paired intervals.
    """

    name: str
    start: str
    frozen: str
    blocks: int
    kept: bool
    val: float
    frozen_val: float
    differences: Mapping[str, Scores]

    def verdict(self, headline: str) -> str:
        """Which one is kept and why, in a sentence."""
        measure, less = _MEASURES[headline], self.differences[self.frozen]
        low, high = less.intervals[headline]
        first = f"{self.name} is kept" if self.kept else f"{self.frozen} is kept, with the towers as they were"
        return (
            f"{first}: {measure} on val {self.val:.3f} fine-tuned, {self.frozen_val:.3f} frozen; on test fine-tuning "
            f"makes {less[headline]:+.3f} ({low:+.3f} to {high:+.3f})"
        )


@dataclass(frozen=True, eq=False)
class Classification:
    """All that a fit has shown.

    Attributes:
        data: what it was fitted to.
        encoder: the model's name, and
        fingerprint: of it; both empty without pictures and texts.
        target: what is predicted.
        modalities: by name, in order.
        rows: numbers of rows, by split.
        headline: the measure that models are chosen by.
        baselines: every model of one modality.
        models: the best one of each modality, by its name, and every fused one, by the variant's.
        chosen: the fused one that was best on val (or the only modality); among them the fine-tuned one.
        differences: the chosen one's measures less those of each modality's best, with paired intervals.
        finetuning: of the towers; None where it was not asked for.
        effects: of the treatments of rare classes.
        explanation: of the chosen one.
        sharing: further measures of models that have them (hit@k of a graph's outputs, before and after).
        folds: of cross-validation; 0: the split given.
        notes: what a reader should know.
        seconds: of processor time.
    """

    data: str
    encoder: str
    fingerprint: str
    target: Target
    modalities: tuple[str, ...]
    rows: Mapping[str, int]
    headline: str
    baselines: Sequence[ModelScores]
    models: Mapping[str, ModelScores]
    chosen: str
    differences: Mapping[str, Scores]
    finetuning: Finetuning | None = None
    effects: Sequence[Effect] = ()
    explanation: Explanation | None = None
    sharing: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    folds: int = 0
    notes: Sequence[str] = ()
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """Whether fusion pays, in a sentence, by the paired intervals."""
        if not self.differences:
            return "there is one modality alone: nothing was fused"
        beaten = [name for name, scores in self.differences.items() if scores.intervals[self.headline][0] > 0]
        others = [name for name in self.differences if name not in beaten]
        measure = _MEASURES[self.headline]
        if not others:
            return f"{self.chosen} beats {_and(beaten)} alone on test {measure}, outside the paired 95 % interval"
        first = (
            f"{self.chosen} beats {_and(beaten)} alone outside the paired 95 % interval, but not"
            if beaten
            else (f"{self.chosen} does not beat")
        )
        signs = ", ".join(
            f"{name}: {scores[self.headline]:+.3f} ({ends[0]:+.3f} to {ends[1]:+.3f})"
            for name, scores in self.differences.items()
            if name in others
            for ends in [scores.intervals[self.headline]]
        )
        return (
            f"{first} {_and(others)}{' alone outside the interval' if not beaten else ''} on test {measure} ({signs})"
        )

    def to_json(self) -> dict[str, Any]:
        """In plain values: ``models`` and ``chosen`` first, then what is told beside them."""
        return {
            "models": {name: plain(scores.test) for name, scores in self.models.items()},
            "chosen": self.chosen,
            "differences": {name: plain(scores) for name, scores in self.differences.items()},
            "verdict": self.verdict,
            "finetuning": self._finetuning_json(),
            "task": self.target.task,
            "labels": list(self.target.names),
            "modalities": list(self.modalities),
            "rows": dict(self.rows),
            "folds": self.folds,
            "details": {
                name: {
                    "variant": one.name,
                    "stage": one.stage,
                    f"val_{self.headline}": one.val,
                    "seconds": round(one.seconds, 2),
                    "parameters": one.parameters,
                }
                for name, one in self.models.items()
            },
            "baselines": [{"modality": one.modality, "variant": one.name, **plain(one.test)} for one in self.baselines],
            "effects": [
                {
                    "treatment": effect.treatment,
                    "rows": effect.rows,
                    "val": effect.val,
                    "test": effect.test,
                    "f1": dict(zip(self.target.names, effect.per_class, strict=True)),
                }
                for effect in self.effects
            ],
            "sharing": {name: dict(values) for name, values in self.sharing.items()},
            "notes": list(self.notes),
        }

    def _finetuning_json(self) -> dict[str, Any] | None:
        found = self.finetuning
        if found is None:
            return None
        return {
            "name": found.name,
            "start": found.start,
            "frozen": found.frozen,
            "blocks": found.blocks,
            "kept": found.kept,
            "differences": {name: plain(scores) for name, scores in found.differences.items()},
            "verdict": found.verdict(self.headline),
        }


def plain(scores: Scores) -> dict[str, dict[str, float | None]]:
    """``{measure: {value, low, high}}``; without draws both ends are null, and so is what is no number."""
    out: dict[str, dict[str, float | None]] = {}
    for name, value in scores.items():
        numbers = (value, *scores.intervals.get(name, (np.nan, np.nan)))
        known = (round(float(number), 6) if np.isfinite(number) else None for number in numbers)
        out[name] = dict(zip(("value", "low", "high"), known, strict=True))
    return out


def _and(names: Sequence[str]) -> str:
    return " and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}"
