"""Fit every fusion of modalities to labelled rows, choose on val, report on test; and use the chosen one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from retrieval.embedding import EmbeddingCache, KnownVectors, Progress, cache_name
from retrieval.encoders import Encoder
from retrieval.errors import DataError, MissingExtra, UsageError
from retrieval.heads import Modalities, Translator, check_fingerprint, filled
from retrieval.heads.graph import FittedGraph, unit_rows
from retrieval.heads.imbalance import check_installed, treated
from retrieval.heads.modalities import IMAGE, TEXT, Column, Inputs, Note, encode_examples
from retrieval.heads.model import ENCODER, FusionClassifier, contributions
from retrieval.heads.networks import FittedNetwork
from retrieval.heads.pixels import PixelCNN, read_pixels
from retrieval.heads.problem import TREATMENTS, Fitted, Part
from retrieval.heads.results import Classification, Effect, Explanation, Finetuning, ModelScores
from retrieval.heads.rounds import CNN_NAME, Round, Run, Table
from retrieval.heads.scores import HEADLINE, detail, score
from retrieval.heads.settings import ClassifySettings
from retrieval.heads.splits import RowNumbers, fold_rows, split_rows
from retrieval.heads.targets import Known, Target, labels_of
from retrieval.heads.variants import ALONE, FUSED
from retrieval.metrics import difference, evaluate_retrieval
from retrieval.onnx_encoder import OnnxEncoder
from retrieval.pair_formats import some
from retrieval.pairs import Example, read_examples
from retrieval.stored import StoredVectors, open_store

_STUDIED = "early-mlp"  # the network that the treatments of rare classes are compared on
_FEW = 10  # rows of a class: too few to say much of it


def fit(
    source: Path,
    encoder_of: Callable[[], Encoder],
    encoder_spec: str,
    settings: ClassifySettings,
    *,
    images: Path | None = None,
    index: Path | None = None,
    scratch: Path | None = None,
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
        index: of whose pictures the vectors are taken as they are stored; the others are encoded.
        scratch: a folder for fine-tuned towers, which the model refers to until it is saved.
        cached: read and keep vectors in the one cache.
        progress: called with (done, in all) of what takes long.
        note: told of what is left out, drawn or odd.

    Raises:
        DataError: of the data; see :func:`retrieval.pairs.read_examples`, and what they hold.
        ModelMismatch: the index holds vectors of another model.
        StoreError: there is no index, or it cannot be read.
    """
    began = time.process_time()
    settings.check()
    if settings.finetune and scratch is None:
        raise UsageError("fine-tuned towers need a folder until they are saved with the classifier: name a scratch")
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
    if settings.finetune and encoder is None:
        raise DataError("there are no towers to fine-tune: no row has a picture or a text")
    table = _encode(known, names, columns, encoder, settings, index, cached, progress, tell)
    rounds = [Round(table, target, names, part, settings, tell) for part in parts]
    runs = [one.run(settings.variants or tuple(FUSED), progress) for one in rounds]
    result, chosen = _summary(source, encoder, target, names, settings, rounds, runs, notes, tell)
    final, fitted = rounds[0], runs[0].fitted
    if settings.folds:  # the model to keep learns from all but what it is chosen by
        everything = np.concatenate([parts[0]["train"], parts[0]["test"]])
        final = Round(table, target, names, {**parts[0], "train": everything}, settings, tell)
        fitted = final.run((chosen,) if chosen in FUSED else (), None).fitted
    if settings.study and target.task == "class" and len(names) > 1 and not settings.folds:
        result = replace(result, effects=_study(rounds[0], tell))
    if (graph := runs[0].fitted.get("graph")) is not None and not settings.folds:
        result = replace(result, sharing=_sharing(rounds[0], table, graph))
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
    test = rounds[0].test
    if settings.finetune and scratch:
        result, model, test = _finetuned(model, result, rounds[0], runs[0], table, settings, scratch, cached, progress)
    if settings.explain:
        shown = model.fitted if not settings.folds else runs[0].fitted[chosen]  # with folds, it has seen these rows
        result = replace(result, explanation=_explained(test, target, shown, names))
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
    index: Path | None = None,
    cached: bool = True,
    explain: bool = False,
    fill: Sequence[Translator] = (),
    progress: Progress | None = None,
    note: Note | None = None,
) -> list[Prediction]:
    """Say what each row of a source is, in order; what it has in the target's column is not looked at.

    Args:
        model: the classifier.
        source: whatever :func:`retrieval.pairs.read_examples` reads.
        encoder_of: loads the encoder; not called by a model of columns alone.
        images: where the pictures are, if not beside the source.
        index: whose stored vectors are taken where it has them.
        cached: read and keep vectors in the one cache.
        explain: what each modality contributed.
        fill: make vectors of missing pictures or texts from what a row has.
        progress: called with (done, in all) of what takes long.
        note: told of what is left out or odd.

    Raises:
        DataError: the source cannot be read, or its columns are of other kinds.
        ModelMismatch: the encoder, or the index whose stored vectors are to be taken, is of another model than the
            classifier was fitted with.
    """
    examples = read_examples(source, images)
    encoder = None
    if model.fingerprint:
        encoder = encoder_of()
        model.check(encoder.fingerprint)
        for translator in fill:
            check_fingerprint("the generator", translator.fingerprint, encoder.fingerprint)
    cache = _known_vectors(encoder, index, cached)
    tables = encode_examples(
        examples, model.modalities, model.columns, encoder, cache=cache, progress=progress, note=note
    )
    if note:
        _tell_of_index(cache, note)
    has = model.inputs(tables).present
    inputs = model.inputs(filled(tables, fill))
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
            tuple(name for name, there in zip(model.modalities, has[row].tolist(), strict=True) if there),
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


def _known_vectors(encoder: Encoder | None, index: Path | None, cached: bool) -> KnownVectors | None:
    """What need not be encoded: what the index holds, and behind it the one cache."""
    if encoder is None:
        return None
    cache = EmbeddingCache(cache_name(encoder), encoder.dim) if cached else None
    return StoredVectors(open_store(index), encoder, cache) if index else cache


def _tell_of_index(cache: KnownVectors | None, tell: Note) -> None:
    if isinstance(cache, StoredVectors):
        tell(f"the index has the vectors of {cache.pictures} of the pictures: nothing of them was decoded or encoded")


def _encode(
    examples: Sequence[Example],
    names: Sequence[str],
    columns: Sequence[Column],
    encoder: Encoder | None,
    settings: ClassifySettings,
    index: Path | None,
    cached: bool,
    progress: Progress | None,
    tell: Note,
) -> Table:
    cache = _known_vectors(encoder, index, cached)
    tables = encode_examples(examples, names, columns, encoder, cache=cache, progress=progress, note=tell)
    _tell_of_index(cache, tell)
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
    return Table(examples, tables, views, pixels)


# ---- what was shown --------------------------------------------------------------------------------------------------


def _summary(
    source: Path,
    encoder: Encoder | None,
    target: Target,
    names: tuple[str, ...],
    settings: ClassifySettings,
    rounds: Sequence[Round],
    runs: Sequence[Run],
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


def _finetuned(
    model: FusionClassifier,
    result: Classification,
    one: Round,
    run: Run,
    table: Table,
    settings: ClassifySettings,
    scratch: Path,
    cached: bool,
    progress: Progress | None,
) -> tuple[Classification, FusionClassifier, Part]:
    """Fine-tune a network with its towers, and keep whichever is better on val: it, or what was chosen so far.

    It is measured with its towers as they were written. With the model to keep come the rows of test as it sees them.
    """
    from retrieval.heads.finetuning import finetune

    began, frozen = time.process_time(), result.models[result.chosen]
    name, start = _network(settings, result, one, run)
    tuned_name = f"{name}-finetuned"

    def examples(rows: RowNumbers) -> list[Example]:
        return [table.examples[row] for row in rows]

    tuned = finetune(
        model.encoder,
        start,
        one.problem,
        model.scaling,
        examples(one.parts["train"]),
        examples(one.val_rows),
        scratch / ENCODER,
        name=tuned_name,
        blocks=settings.finetune,
        progress=progress,
    )
    encoder = OnnxEncoder(tuned.bundle)
    changed = replace(
        model,
        fingerprint=encoder.fingerprint,
        encoder=str(tuned.bundle.path),
        variant=tuned_name,
        fitted=tuned.fitted,
        own_encoder=True,
    )
    rows, count = np.concatenate([one.val_rows, one.parts["test"]]), len(one.val_rows)
    cache = _known_vectors(encoder, None, cached)
    inputs = changed.inputs(
        encode_examples(examples(rows), model.modalities, model.columns, encoder, cache=cache, progress=progress)
    )
    val, test = inputs.take(np.arange(count)), inputs.take(np.arange(count, len(rows)))
    outputs, target = tuned.fitted.predict(test), model.target
    blocks = f"the last {settings.finetune} blocks" if settings.finetune > 1 else "the last block"
    scored = ModelScores(
        name=tuned_name,
        modality="",
        stage="fine-tuned",
        about=f"{name}, its gradients sent on into {blocks} of each tower.",
        val=one.problem.score(tuned.fitted.predict(val)),
        test=score(target, one.test.right, outputs, settings.draws),
        details=detail(target, one.test.right, outputs),
        seconds=time.process_time() - began,
        parameters=tuned.parameters,
    )
    kept = scored.val > frozen.val
    by_name = {scores.name: scores for scores in (*result.baselines, *result.models.values())}
    less = {result.chosen: frozen, name: by_name[name]}
    result = replace(
        result,
        models={**result.models, tuned_name: scored},
        finetuning=Finetuning(
            tuned_name,
            name,
            result.chosen,
            settings.finetune,
            kept,
            scored.val,
            frozen.val,
            {of: difference(scored.test, scores.test) for of, scores in less.items()},
        ),
    )
    if not kept:
        return result, model, one.test
    alone = {of: difference(scored.test, result.models[of].test) for of in result.differences}
    return replace(result, chosen=tuned_name, differences=alone), changed, Part(test, one.test.right)


def _network(settings: ClassifySettings, result: Classification, one: Round, run: Run) -> tuple[str, FittedNetwork]:
    """The network to fine-tune: the one asked for, or chosen, or the best on val; a perceptron of a modality alone."""
    if len(one.names) == 1:
        return "mlp", cast("FittedNetwork", ALONE["mlp"].fit(one.problem))
    networks = {name: model for name, model in run.fitted.items() if isinstance(model, FittedNetwork) and name in FUSED}
    best = max(networks, key=lambda name: result.models[name].val)
    name = settings.start or (result.chosen if result.chosen in networks else best)
    return name, networks[name]


def _study(one: Round, tell: Note) -> list[Effect]:
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


def _sharing(one: Round, table: Table, graph: Fitted) -> dict[str, dict[str, float]]:
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


def _explained(test: Part, target: Target, fitted: Fitted, names: tuple[str, ...]) -> Explanation:
    inputs: Inputs = test.inputs
    if len(names) == 1:
        raise UsageError("with one modality alone there is nothing to leave out: --explain is for several")

    def measured(of: Inputs) -> float:
        return score(target, test.right, fitted.predict(of))[HEADLINE[target.task]]

    return Explanation(
        names,
        measured(inputs),
        tuple(measured(inputs.without(name)) for name in names),
        contributions(fitted, inputs, names),
        fitted.attention(inputs),
    )
