"""Fit every fusion of modalities to labelled rows, choose on val, report on test; and use the chosen one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.embedding import EmbeddingCache, Progress
from retrieval.encoders import Encoder
from retrieval.errors import DataError, MissingExtra, UsageError
from retrieval.heads import Modalities
from retrieval.heads.graph import FittedGraph, unit_rows
from retrieval.heads.imbalance import check_installed, treated
from retrieval.heads.modalities import IMAGE, TEXT, Column, Inputs, Scaling, encode_examples
from retrieval.heads.model import FusionClassifier, contributions
from retrieval.heads.pixels import PixelCNN, Pixels, read_pixels
from retrieval.heads.problem import TREATMENTS, Fitted, Part, Problem, Treatment, Variant
from retrieval.heads.results import Classification, Effect, Explanation, ModelScores
from retrieval.heads.scores import DRAWS, HEADLINE, Outputs, detail, score
from retrieval.heads.splits import RowNumbers, fold_rows, split_rows
from retrieval.heads.targets import LABEL, Known, Target, labels_of
from retrieval.heads.variants import ALONE, FUSED
from retrieval.metrics import difference, evaluate_retrieval
from retrieval.pair_formats import some
from retrieval.pairs import Example, read_examples

Note = Callable[[str], None]
BALANCES = ("none", "ogm-ge")
_STUDIED = "early-mlp"  # the network that the treatments of rare classes are compared on
CNN_NAME = "cnn"
_FEW = 10  # rows of a class: too few to say much of it


@dataclass(frozen=True)
class ClassifySettings:
    """What to fit.

    Attributes:
        target: the column to predict.
        task: class, labels, number, or auto.
        columns: further modalities.
        variants: names of :data:`retrieval.heads.variants.FUSED`; empty: all of them.
        imbalance: the treatment of rare classes.
        balance: of modalities: none, or ogm-ge.
        study: compare all treatments on one network.
        folds: of cross-validation; 0: the split given.
        pixels: measure a small CNN on the pixels beside the models of the image's vector.
        views: further views of each picture to learn from (flipped, rotated, cropped, coloured), embedded once.
        explain: what each modality contributed on test.
        draws: of the bootstrap.
        seed: of every random number.
        device: of what is trained by gradients.
    """

    target: str = LABEL
    task: str = "auto"
    columns: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    imbalance: Treatment = "class-weights"
    balance: str = "none"
    study: bool = True
    folds: int = 0
    pixels: bool = True
    views: int = 0
    explain: bool = False
    draws: int = DRAWS
    seed: int = 0
    device: str = "cpu"

    def check(self) -> None:
        """Refuse what is not known, before anything is read: DataError."""
        for names, known, what in (
            (self.variants, FUSED, "variant"),
            ((self.imbalance,), TREATMENTS, "treatment of imbalance"),
            ((self.balance,), BALANCES, "balance of modalities"),
        ):
            if unknown := [name for name in names if name not in known]:
                raise DataError(f"there is no {what} {unknown[0]!r}: there are {', '.join(known)}")
        if self.folds == 1 or self.folds < 0:
            raise DataError("cross-validation needs at least 2 folds; 0 is the split given")
        if reserved := [name for name in self.columns if name in (IMAGE, TEXT, self.target, *FUSED)]:
            raise DataError(
                f"{reserved[0]!r} cannot be a further column: it is what is predicted, or the name of something else"
            )
        if len(set(self.columns)) < len(self.columns):
            raise DataError("a column is named twice")
        if self.imbalance == "augment" and not self.views:
            raise DataError("augmented views are made with --views: how many of each picture")


@dataclass(frozen=True, eq=False)
class _Table:
    """Rows that are known, as numbers."""

    examples: Sequence[Example]
    modalities: Modalities
    views: Sequence[Modalities]
    pixels: Pixels | None

    def rows(self, rows: RowNumbers) -> Modalities:
        return {name: table[rows] for name, table in self.modalities.items()}


def fit(
    source: Path,
    encoder_of: Callable[[], Encoder],
    encoder_spec: str,
    settings: ClassifySettings,
    *,
    images: Path | None = None,
    cached: bool = True,
    progress: Progress | None = None,
    note: Note | None = None,
) -> tuple[Classification, FusionClassifier]:
    """Fit all variants and the models of one modality each; give what was shown, and the chosen model.

    Args:
        source: whatever :func:`retrieval.pairs.read_examples` reads.
        encoder_of: loads the encoder; not called where there are neither pictures nor texts.
        encoder_spec: what it is loaded by, for the model to remember.
        settings: what to fit.
        images: where the pictures are, if not beside the source.
        cached: read and keep vectors in the one cache.
        progress: called with (done, in all) of what takes long.
        note: told of what is left out, drawn or odd.

    Raises:
        DataError: of the data; see :func:`retrieval.pairs.read_examples`, and what they hold.
    """
    began = time.process_time()
    settings.check()
    check_installed(settings.imbalance)
    notes: list[str] = []

    def tell(line: str) -> None:
        notes.append(line)
        if note:
            note(line)

    examples = read_examples(source, images)
    target = Target.of(_of_train(examples), settings.target, settings.task)
    known = [example for example in examples if target.is_known(example)]
    if len(known) < len(examples):
        tell(f"{len(examples) - len(known)} rows have nothing in {settings.target!r} and are left out")
    strata = [labels_of(example, settings.target) if target.task == "class" else "" for example in known]
    parts = (
        fold_rows(strata, settings.folds, settings.seed)
        if settings.folds
        else [split_rows([example.split for example in known], strata, settings.seed, tell)]
    )
    learnt = [known[row] for row in parts[0]["train"]]
    if settings.folds:
        target = Target.of(known, settings.target, target.task)
    else:
        target = Target.of(learnt, settings.target, target.task)
    columns = [Column.of(name, known if settings.folds else learnt) for name in settings.columns]
    names = _modalities(known, settings.columns)
    encoder = encoder_of() if {IMAGE, TEXT} & set(names) else None
    table = _encode(known, names, columns, encoder, settings, cached, progress, tell)
    rounds = [_Round(table, target, names, part, settings, tell) for part in parts]
    runs = [one.run(settings.variants or tuple(FUSED), progress) for one in rounds]
    result, chosen = _summary(source, encoder, target, names, settings, rounds, runs, notes, tell)
    final, fitted = rounds[0], runs[0].fitted
    if settings.folds:  # the model to keep learns from all but what it is chosen by
        everything = np.concatenate([parts[0]["train"], parts[0]["test"]])
        final = _Round(table, target, names, {**parts[0], "train": everything}, settings, tell)
        fitted = final.run((chosen,) if chosen in FUSED else (), None).fitted
    if settings.study and target.task == "class" and len(names) > 1 and not settings.folds:
        result = replace(result, effects=_study(rounds[0], tell))
    if (graph := runs[0].fitted.get("graph")) is not None and not settings.folds:
        result = replace(result, sharing=_sharing(rounds[0], table, graph))
    if settings.explain:
        result = replace(result, explanation=_explained(rounds[0], runs[0].fitted[chosen], names))
    model = FusionClassifier(
        encoder.fingerprint if encoder else "",
        encoder_spec if encoder else "",
        chosen,
        target,
        names,
        tuple(columns),
        final.scaling,
        fitted[chosen],
    )
    return replace(result, seconds=time.process_time() - began, notes=tuple(notes)), model


@dataclass(frozen=True)
class Prediction:
    """What is said of one row.

    Attributes:
        answer: a name, a list of names, or a number.
        outputs: the probability of each label; of a number, itself.
        contributions: of each modality, see :func:`retrieval.heads.model.contributions`; None if not asked for.
        attention: likewise, where the model has any.
        has: the modalities that the row has.
    """

    image: str | None
    text: str
    answer: Any
    outputs: Mapping[str, float]
    has: tuple[str, ...]
    contributions: Mapping[str, float] | None = None
    attention: Mapping[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """In plain values."""
        fields: dict[str, Any] = {"image": self.image, "text": self.text, "label": self.answer}
        if not isinstance(self.answer, float):
            fields["probabilities"] = dict(self.outputs)
        fields["modalities"] = list(self.has)
        if self.contributions is not None:
            fields["contributions"] = dict(self.contributions)
        if self.attention is not None:
            fields["attention"] = dict(self.attention)
        return fields


def predict(
    model: FusionClassifier,
    source: Path,
    encoder_of: Callable[[], Encoder],
    *,
    images: Path | None = None,
    cached: bool = True,
    explain: bool = False,
    progress: Progress | None = None,
    note: Note | None = None,
) -> list[Prediction]:
    """Say what each row of a source is, in order; what it has in the target's column is not looked at.

    Raises:
        DataError: the source cannot be read, or its columns are of other kinds.
        ModelMismatch: the encoder is another one than the model was fitted with.
    """
    examples = read_examples(source, images)
    encoder = None
    if model.fingerprint:
        encoder = encoder_of()
        model.check(encoder.fingerprint)
    cache = EmbeddingCache(encoder.fingerprint, encoder.dim) if encoder and cached else None
    tables = encode_examples(
        examples, model.modalities, model.columns, encoder, cache=cache, progress=progress, note=note
    )
    inputs = model.inputs(tables)
    outputs = model.fitted.predict(inputs)
    nothing = int((~inputs.present.any(axis=1)).sum())
    if nothing and note:
        note(f"{nothing} rows have nothing of {', '.join(model.modalities)}: what is said of them is a guess")
    changes = contributions(model.fitted, inputs, model.modalities) if explain else None
    looked = model.fitted.attention(inputs) if explain else None
    return [
        Prediction(
            str(example.image) if example.image is not None else None,
            example.text,
            model.target.answer(outputs[row]),
            dict(zip(model.target.names, outputs[row].tolist(), strict=True)),
            tuple(name for name, there in zip(model.modalities, inputs.present[row].tolist(), strict=True) if there),
            None if changes is None else dict(zip(model.modalities, changes[row].tolist(), strict=True)),
            None if looked is None else dict(zip(model.modalities, looked[row].tolist(), strict=True)),
        )
        for row, example in enumerate(examples)
    ]


# ---- the rows --------------------------------------------------------------------------------------------------------


def _of_train(examples: Sequence[Example]) -> Sequence[Example]:
    """The rows of the split train; all of them, where there is none."""
    return [example for example in examples if (example.split or "").lower() == "train"] or examples


def _modalities(examples: Sequence[Example], columns: Sequence[str]) -> tuple[str, ...]:
    names = [
        *([IMAGE] if any(example.image is not None for example in examples) else ()),
        *([TEXT] if any(example.text.strip() for example in examples) else ()),
        *columns,
    ]
    if not names:
        raise DataError("there is nothing to learn from: no row has a picture or a text, and no --columns are named")
    return tuple(names)


def _encode(
    examples: Sequence[Example],
    names: Sequence[str],
    columns: Sequence[Column],
    encoder: Encoder | None,
    settings: ClassifySettings,
    cached: bool,
    progress: Progress | None,
    tell: Note,
) -> _Table:
    cache = EmbeddingCache(encoder.fingerprint, encoder.dim) if encoder and cached else None
    tables = encode_examples(examples, names, columns, encoder, cache=cache, progress=progress, note=tell)
    empty = np.all([np.isnan(table).any(axis=1) for table in tables.values()], axis=0)
    if empty.any():
        tell(f"{int(empty.sum())} rows have nothing of {', '.join(names)}: they can only be guessed")
    views: list[Modalities] = []
    if settings.views and IMAGE in names and encoder:
        from retrieval.heads.views import augmented_view

        for number in range(settings.views):
            view = augmented_view(number, encoder.preprocessing)
            seen = encode_examples(examples, [IMAGE], (), encoder, cache=cache, progress=progress, view=view)
            views.append({**tables, IMAGE: seen[IMAGE]})
    pixels = read_pixels(examples, progress) if settings.pixels and IMAGE in names and len(names) > 1 else None
    return _Table(examples, tables, views, pixels)


# ---- one split -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Run:
    """The models of one split by (modality, variant), fused ones under ("", variant); and what they say of test."""

    fitted: Mapping[str, Fitted]  # the best of each modality, and the fused ones, by name
    val: dict[tuple[str, str], float]
    test: dict[tuple[str, str], Outputs]
    seconds: dict[tuple[str, str], float]
    parameters: dict[tuple[str, str], int]


class _Round:
    """One split of the rows: to learn from, to choose by, to measure with."""

    def __init__(
        self,
        table: _Table,
        target: Target,
        names: tuple[str, ...],
        parts: Mapping[str, RowNumbers],
        settings: ClassifySettings,
        tell: Note,
    ) -> None:
        self.names, self.parts = names, parts
        self.pixels = {} if table.pixels is None else {split: table.pixels[rows] for split, rows in parts.items()}
        self.scaling = Scaling.of(table.rows(parts["train"]))
        right = {split: target.encode([table.examples[row] for row in rows]) for split, rows in parts.items()}
        part = {split: Part(self.scaling.apply(table.rows(rows)), right[split]) for split, rows in parts.items()}
        if target.task == "class":
            self._check_val(target, table, part["val"], tell)
            known = np.flatnonzero(part["val"].right >= 0)
            part["val"] = part["val"].take(known)
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

    def _check_val(self, target: Target, table: _Table, val: Part, tell: Note) -> None:
        for split, what in (("val", "left out there"), ("test", "wrong whatever is said of them")):
            unseen = target.unseen([table.examples[row] for row in self.parts[split]])
            if unseen:
                tell(f"labels of {split} that are not in train ({some(unseen)}): their rows are {what}")
        if not (val.right >= 0).any():
            raise DataError("no row of val has a label that train has: there is nothing to choose by")

    def run(self, variants: Sequence[str], progress: Progress | None) -> _Run:
        """Fit the models of each modality, and the fused ones."""
        run = _Run({}, {}, {}, {}, {})
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

    def _run_cnn(self, run: _Run) -> None:
        key, began = (IMAGE, CNN_NAME), time.process_time()
        model = PixelCNN().fit(self.problem, self.pixels["train"], self.pixels["val"])
        run.seconds[key] = time.process_time() - began
        run.val[key] = self.problem.score(model.predict(self.pixels["val"]))
        run.test[key], run.parameters[key] = model.predict(self.pixels["test"]), model.parameters


def _summary(
    source: Path,
    encoder: Encoder | None,
    target: Target,
    names: tuple[str, ...],
    settings: ClassifySettings,
    rounds: Sequence[_Round],
    runs: Sequence[_Run],
    notes: Sequence[str],
    tell: Note,
) -> tuple[Classification, str]:
    """All rounds together: val scores are their mean, and what is said of test is put end to end."""
    right: Known = np.concatenate([one.test.right for one in rounds])
    if target.task == "class":
        counts = {name: int((right == i).sum()) for i, name in enumerate(target.names)}
        if few := [name for name, count in counts.items() if count < _FEW]:
            tell(f"fewer than {_FEW} rows of test are of {some(few)}: figures for them mean little")
    scored = {}
    for key in runs[0].val:
        outputs = np.concatenate([run.test[key] for run in runs])
        spec = PixelCNN() if key == (IMAGE, CNN_NAME) else (ALONE if key[0] else FUSED)[key[1]]
        scored[key] = ModelScores(
            name=key[1],
            modality=key[0],
            stage=spec.stage,
            about=spec.about,
            val=float(np.mean([run.val[key] for run in runs])),
            test=score(target, right, outputs, settings.draws),
            details=detail(target, right, outputs),
            seconds=sum(run.seconds[key] for run in runs),
            parameters=runs[0].parameters[key],
        )
    alone = {name: max((s for k, s in scored.items() if k[0] == name), key=lambda one: one.val) for name in names}
    fused = {key[1]: one for key, one in scored.items() if not key[0]}
    chosen = max(fused, key=lambda name: fused[name].val) if fused else names[0]
    best = fused.get(chosen, alone[names[0]])
    result = Classification(
        data=source.name,
        encoder=encoder.name if encoder else "",
        fingerprint=encoder.fingerprint if encoder else "",
        target=target,
        modalities=names,
        rows={split: len(rows) for split, rows in rounds[0].parts.items()},
        headline=HEADLINE[target.task],
        baselines=[one for key, one in scored.items() if key[0]],
        models={**alone, **fused},
        chosen=chosen,
        differences={name: difference(best.test, one.test) for name, one in alone.items()} if fused else {},
        folds=settings.folds,
        notes=tuple(notes),
    )
    return result, chosen


def _study(one: _Round, tell: Note) -> list[Effect]:
    """The same network under every treatment that there is material for."""
    effects = []
    for treatment in TREATMENTS:
        if treatment == "augment" and not one.problem.views:
            continue
        try:
            check_installed(treatment)
        except MissingExtra as error:
            tell(f"not compared with the other treatments: {error}")
            continue
        problem = replace(one.problem, treatment=treatment)
        model = FUSED[_STUDIED].fit(problem)
        details = detail(problem.target, one.test.right, model.predict(one.test.inputs))
        assert details is not None  # classes have them
        effects.append(
            Effect(
                treatment,
                len(treated(problem)),
                problem.score(model.predict(problem.val.inputs)),
                details.averages["macro_f1"],
                tuple(of.f1 for of in details.classes),
            )
        )
    return effects


def _sharing(one: _Round, table: _Table, graph: Fitted) -> dict[str, dict[str, float]]:
    """hit@k between pictures and texts of test: of the stored vectors, and of the graph's outputs for them."""
    assert isinstance(graph, FittedGraph)  # by its name
    raw = table.rows(one.parts["test"])
    if not {IMAGE, TEXT} <= set(one.names):
        return {}
    at = [one.names.index(name) for name in (IMAGE, TEXT)]
    both = np.flatnonzero(one.test.inputs.present[:, at].all(axis=1))
    if not len(both):
        return {}
    outputs = graph.outputs(one.test.inputs)
    measured = {}
    for when, (images, texts) in (("before", (raw[IMAGE], raw[TEXT])), ("after", [outputs[i] for i in at])):
        scores = evaluate_retrieval(unit_rows(images[both]), unit_rows(texts[both]), np.arange(len(both)))
        measured[when] = {name: value for name, value in scores.items() if "hit@" in name}
    return measured


def _explained(one: _Round, fitted: Fitted, names: tuple[str, ...]) -> Explanation:
    inputs: Inputs = one.test.inputs
    if len(names) == 1:
        raise UsageError("with one modality alone there is nothing to leave out: --explain is for several")
    headline, target = HEADLINE[one.problem.target.task], one.problem.target

    def measured(of: Inputs) -> float:
        return score(target, one.test.right, fitted.predict(of))[headline]

    return Explanation(
        names,
        measured(inputs),
        tuple(measured(inputs.without(name)) for name in names),
        contributions(fitted, inputs, names),
        fitted.attention(inputs),
    )
