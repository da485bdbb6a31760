"""How good an encoder is on data with known answers: measures with intervals, slices, and against another encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from indexes.vectors import Vectors, exact_search
from retrieval.embedding import EmbeddingCache, Progress, cache_name, encode_pictures, encode_sentences
from retrieval.encoders import Encoder
from retrieval.errors import DataError, UsageError
from retrieval.index_evaluation import Direction, IndexScores, check_kinds, evaluate_indexes
from retrieval.metrics import (
    KS,
    ClassScores,
    Scores,
    difference,
    evaluate_classification,
    measure,
)
from retrieval.pairs import Record, checksum, class_names
from retrieval.probes import probes
from retrieval.ranks import Ranking, Rows, Ties, rank_pairs

PROMPT = "a photo of a {name}."
PLACEHOLDERS = ("{name}", "{c}", "{}")  # ours, CLIP_benchmark's, and the one that needs no name
BACKGROUND_LABELS = ("BACKGROUND_Google",)  # Caltech-101's heap of anything: not a class that a sentence could name
CAPTION_LENGTH, LABEL = "caption-length", "label"  # slices that need no column
_MOST_VALUES = 20  # slices of one column; the rarer values are left out
_BINS = 4  # slices of a column of many numbers


@dataclass(frozen=True)
class RetrievalDetails:
    """What retrieval was measured on, for reports: N pictures, M texts, and how they were ranked."""

    records: Sequence[Record]  # N
    texts: Sequence[str]  # M
    owner: Rows  # (M,) the (first) picture of each text
    image_rows: Rows  # (P,) with the next: which pictures and texts belong together
    text_rows: Rows  # (P,)
    image_vectors: Vectors  # (N, D)
    text_vectors: Vectors  # (M, D)
    ranking: Ranking


@dataclass(frozen=True)
class ClassificationDetails:
    """What classification was measured on, for reports: N pictures, C classes."""

    records: Sequence[Record]  # N
    names: Sequence[str]  # C
    scores: NDArray[np.float32]  # (N, C) cosines
    right: NDArray[np.bool_]  # (N, C)
    result: ClassScores


@dataclass(frozen=True)
class Slice:
    """The measures over part of the queries, which were ranked among everything."""

    name: str  # column=value
    images: int
    texts: int
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Comparison:
    """Another model on the same data, and this one's measures less that one's, with paired intervals."""

    other: Evaluation
    differences: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Evaluation:
    """What was measured, of which model on which data. ``metrics`` are shares between 0 and 1, and ranks from 1."""

    task: str  # retrieval or classification
    model: str
    fingerprint: str
    images: int
    texts: int  # captions, or classes
    checksum: str
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    details: RetrievalDetails | ClassificationDetails
    slices: tuple[Slice, ...] = ()
    comparison: Comparison | None = None
    indexes: tuple[IndexScores, ...] = ()  # of each direction: exact search first, then the kinds asked for
    ties: Ties = "pessimistic"
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """In plain values, without the details: ``metrics`` are numbers, ``intervals`` pairs under the same keys."""
        fields: dict[str, Any] = {
            "task": self.task,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "images": self.images,
            "texts": self.texts,
            "checksum": self.checksum,
            "ties": self.ties,
            "metrics": dict(self.metrics),
            "intervals": _lists(self.intervals),
        }
        if self.slices:
            fields["slices"] = {
                part.name: {
                    "images": part.images,
                    "texts": part.texts,
                    "metrics": dict(part.metrics),
                    "intervals": _lists(part.intervals),
                }
                for part in self.slices
            }
        if self.comparison:
            fields["comparison"] = {
                "model": self.comparison.other.model,
                "fingerprint": self.comparison.other.fingerprint,
                "metrics": dict(self.comparison.other.metrics),
                "differences": dict(self.comparison.differences),
                "intervals": _lists(self.comparison.intervals),
            }
        if self.indexes:
            fields["indexes"] = [scores.to_json() for scores in self.indexes]
        return {**fields, "note": self.note}


def _lists(intervals: Mapping[str, tuple[float, float]]) -> dict[str, list[float]]:
    return {name: list(ends) for name, ends in intervals.items()}


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    ks: Sequence[int] = ()  # empty: 1, 5, 10 for retrieval, 1 and 5 for classification
    bootstrap: int = 0  # draws for 95 % intervals; 1,000 cost a tenth of the ranking
    ties: Ties = "pessimistic"  # or a model that gives everything the same score looks perfect
    slices: Sequence[str] = ()  # columns, `label`, `caption-length`
    merge_captions: bool = False  # papers count equal captions of two pictures as two queries with one answer each
    prompts: Sequence[str] = (PROMPT,)  # of a class; their vectors are averaged
    indexes: Sequence[str] = ()  # FAISS factory strings, "exact" or "auto": measure retrieval through these too
    cached: bool = True  # vectors are kept below the cache directory by content and fingerprint


# ---- retrieval -------------------------------------------------------------------------------------------------------


def evaluate(
    encoder: Encoder,
    records: Sequence[Record],
    settings: Settings | None = None,
    *,
    other: Encoder | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Every measure of :func:`retrieval.metrics.evaluate_retrieval` over pictures and their captions.

    A picture without a caption stays in the gallery as a distractor.

    Args:
        encoder: the model.
        records: what :func:`retrieval.pairs.read_pairs` returns.
        settings: how to measure.
        other: a second model to compare with, on the same data and the same draws.
        progress: called with (pictures done, pictures).

    Raises:
        DataError: there is no caption at all, or pictures that cannot be read; UsageError: a slice that is none;
        VectorError: a kind of index that FAISS does not know or cannot train on so few.
    """
    settings = settings or Settings()
    texts, owner, image_rows, text_rows = _texts(records, settings.merge_captions)
    if not texts:
        raise DataError("none of these pictures has a caption: for labels use --task classification")
    check_kinds(settings.indexes, (len(records), len(texts)), encoder.dim)
    slices = list(_slices(records, texts, owner, settings.slices))

    def measured(model: Encoder) -> tuple[Evaluation, Scores]:
        vectors, problem = _encode(model, records, texts, settings.cached, progress)
        ranking = rank_pairs(*vectors, image_rows, text_rows, settings.ties)
        ks = settings.ks or KS
        scores = measure(ranking, ks, settings.bootstrap)
        parts = tuple(
            Slice(name, int(chosen.sum()), int(spoken.sum()), part.metrics, part.intervals)
            for name, chosen, spoken in slices
            for part in [measure(ranking.select(spoken, chosen), ks, settings.bootstrap)]
        )
        return Evaluation(
            task="retrieval",
            model=model.name,
            fingerprint=model.fingerprint,
            images=len(records),
            texts=len(texts),
            checksum=checksum(records),
            metrics=scores.metrics,
            intervals=scores.intervals,
            details=RetrievalDetails(records, texts, owner, image_rows, text_rows, *vectors, ranking),
            slices=parts,
            ties=settings.ties,
            note=problem,
        ), scores

    result = _compared(measured, encoder, other)
    if not settings.indexes:
        return result
    tune_on, ks = probes(encoder), settings.ks or KS
    found = [
        scores
        for direction in _directions(_retrieval(result))
        for scores in evaluate_indexes(settings.indexes, direction, tune_on, ks, settings.ties)
    ]
    return replace(result, indexes=tuple(found))


def _directions(details: RetrievalDetails) -> Iterator[Direction]:
    """Pictures searched with the texts, and texts with the pictures."""
    for way, gallery, asked, ranks, queries, answers in (
        (
            "t2i",
            details.image_vectors,
            details.text_vectors,
            details.ranking.t2i,
            details.text_rows,
            details.image_rows,
        ),
        (
            "i2t",
            details.text_vectors,
            details.image_vectors,
            details.ranking.i2t,
            details.image_rows,
            details.text_rows,
        ),
    ):
        yield Direction(way, gallery, asked[ranks.queries], ranks, answers[np.argsort(queries, kind="stable")])


def _texts(records: Sequence[Record], merge: bool) -> tuple[list[str], Rows, Rows, Rows]:
    """The texts, the first owner of each, and the pairs: rows of pictures and of texts."""
    image_rows = np.repeat(np.arange(len(records)), [len(record.texts) for record in records])
    spoken = [text for record in records for text in record.texts]
    if not merge:
        return spoken, image_rows, image_rows, np.arange(len(spoken))
    number = {text: i for i, text in enumerate(dict.fromkeys(spoken))}
    pairs = np.unique([[number[text] for text in spoken], image_rows], axis=1)  # by text, then by picture
    first = np.unique(pairs[0], return_index=True)[1]
    return list(number), pairs[1][first], pairs[1], pairs[0]


def _encode(
    encoder: Encoder, records: Sequence[Record], texts: Sequence[str], cached: bool, progress: Progress | None
) -> tuple[tuple[Vectors, Vectors], str]:
    """Vectors of pictures and texts; and a remark, if they could not be kept for the next time."""
    cache = EmbeddingCache(cache_name(encoder), encoder.dim) if cached else None
    pictures = [record.image for record in records]
    vectors = (
        encode_pictures(encoder, pictures, cache=cache, progress=progress),
        encode_sentences(encoder, texts, cache=cache),
    )
    return vectors, (cache.problem or "") if cache else ""


def _compared(
    measured: Callable[[Encoder], tuple[Evaluation, Scores]], encoder: Encoder, other: Encoder | None
) -> Evaluation:
    result, scores = measured(encoder)
    if other is None:
        return result
    theirs, other_scores = measured(other)
    less = difference(scores, other_scores)
    return replace(result, comparison=Comparison(theirs, less.metrics, less.intervals))


# ---- slices ----------------------------------------------------------------------------------------------------------


def _slices(
    records: Sequence[Record], texts: Sequence[str], owner: Rows, columns: Sequence[str]
) -> Iterator[tuple[str, NDArray[np.bool_], NDArray[np.bool_]]]:
    """(name, which pictures are asked with, which texts) for each value of each column.

    What a column says of pictures holds for their texts too; what it says of texts says nothing of pictures.
    """
    nobody = np.zeros(len(records), np.bool_)
    for column in columns:
        of_texts = _text_values(records, texts, column)
        if of_texts is not None:
            for value, chosen in _groups(of_texts):
                yield f"{column}={value}", nobody, chosen
            continue
        for value, chosen in _groups(_picture_values(records, column)):
            yield f"{column}={value}", chosen, chosen[owner]


def _text_values(records: Sequence[Record], texts: Sequence[str], column: str) -> list[list[Any]] | None:
    if column == CAPTION_LENGTH:
        return [[len(text.split())] for text in texts]
    if not any(column in record.text_columns for record in records):
        return None
    values = [record.text_columns.get(column, [None] * len(record.texts)) for record in records]
    flat = [[value] for of_record in values for value in of_record]
    if len(flat) != len(texts):
        raise UsageError(f"{column} differs between captions: it cannot be sliced by when equal captions are merged")
    return flat


def _picture_values(records: Sequence[Record], column: str) -> list[list[Any]]:
    if column == LABEL:
        return [list(record.labels) for record in records]
    if not any(column in record.columns for record in records):
        known = dict.fromkeys(name for record in records for name in (*record.columns, *record.text_columns))
        raise UsageError(
            f"there is no column {column!r} to slice by: known are {', '.join([CAPTION_LENGTH, LABEL, *known])}"
        )
    values = [record.columns.get(column) for record in records]
    return [list(value) if isinstance(value, (list, tuple)) else [value] for value in values]


def _groups(values: Sequence[Sequence[Any]]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Rows by value, where each has any number of them: numbers in quarters where there are many, else the commonest.

    Rows without a value (None, empty) are in no group.
    """
    flat = [(row, value) for row, of_row in enumerate(values) for value in of_row if value not in (None, "")]
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for _, value in flat)
    if numbers and len({value for _, value in flat}) > _BINS:
        given = np.array([value for _, value in flat])
        edges = np.unique(np.quantile(given, np.linspace(0, 1, _BINS + 1), method="lower"))
        bins = np.clip(np.searchsorted(edges[1:], given), 0, len(edges) - 2)
        members = [
            (f"{given[bins == i].min():g}-{given[bins == i].max():g}", np.flatnonzero(bins == i))
            for i in range(len(edges) - 1)
        ]
        groups = [(name, [flat[i][0] for i in inside]) for name, inside in members if len(inside)]
    else:
        by_value: dict[str, list[int]] = {}
        for row, value in sorted(flat, key=lambda pair: pair[1]) if numbers else flat:
            by_value.setdefault(str(value), []).append(row)
        groups = list(by_value.items())
        if not numbers:
            groups = sorted(groups, key=lambda group: -len(group[1]))[:_MOST_VALUES]
    for name, rows in groups:
        chosen = np.zeros(len(values), np.bool_)
        chosen[rows] = True
        yield name, chosen


# ---- classification --------------------------------------------------------------------------------------------------


def classify(
    encoder: Encoder,
    records: Sequence[Record],
    settings: Settings | None = None,
    *,
    other: Encoder | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Zero-shot classification: a picture's class is the one whose prompts, averaged, lie nearest.

    Underscores in class names are read as spaces. A picture with several labels is right with any of them. Background
    classes (``BACKGROUND_LABELS``) are left out, and the note says so. The measures are those of
    :func:`retrieval.metrics.evaluate_classification`; arguments and errors as in :func:`evaluate`.
    """
    settings = settings or Settings()
    kept, names, right = labelled(records)
    left_out = len(records) - len(kept)
    note = f"{left_out} pictures without a nameable label left out ({', '.join(BACKGROUND_LABELS)})" if left_out else ""
    slices = [(name, of) for name, of, _ in _slices(kept, [], np.empty(0, np.int64), settings.slices) if of.any()]
    ks = settings.ks or (1, 5)

    def measured(model: Encoder) -> tuple[Evaluation, Scores]:
        texts = prompts_of(names, settings.prompts)
        (images, prompts), problem = _encode(model, kept, texts, settings.cached, progress)
        cosines = images @ mean_vectors(prompts, len(names)).T  # (N, C)
        scores = evaluate_classification(cosines, right, ks, settings.bootstrap)
        parts = tuple(
            Slice(name, int(of.sum()), len(names), part.metrics, part.intervals)
            for name, of in slices
            for part in [evaluate_classification(cosines[of], right[of], ks, settings.bootstrap)]
        )
        return Evaluation(
            task="classification",
            model=model.name,
            fingerprint=model.fingerprint,
            images=len(kept),
            texts=len(names),
            checksum=checksum(kept),
            metrics=scores.metrics,
            intervals=scores.intervals,
            details=ClassificationDetails(kept, names, cosines, right, scores),
            slices=parts,
            note="; ".join(filter(None, (note, problem))),
        ), scores

    return _compared(measured, encoder, other)


def labelled(records: Sequence[Record]) -> tuple[list[Record], list[str], NDArray[np.bool_]]:
    """The N records that have a nameable label, the C names, and which are right (N, C). DataError without any."""
    kept = [record for record in records if record.labels and not set(record.labels) & set(BACKGROUND_LABELS)]
    if not kept:
        raise DataError("none of these pictures has a label: for captions use --task retrieval")
    names = class_names(kept)
    column = {name: i for i, name in enumerate(names)}
    right = np.zeros((len(kept), len(names)), np.bool_)
    for row, record in enumerate(kept):
        right[row, [column[label] for label in record.labels]] = True
    return kept, names, right


def prompts_of(names: Sequence[str], prompts: Sequence[str] = (PROMPT,)) -> list[str]:
    """Every prompt of the first class, then of the second, …: (C * T,). Placeholders: ``{name}``, ``{c}`` or ``{}``."""
    return [_filled(prompt, name.replace("_", " ")) for name in names for prompt in prompts]


def _filled(prompt: str, name: str) -> str:
    for placeholder in PLACEHOLDERS:
        prompt = prompt.replace(placeholder, name)
    return prompt


def mean_vectors(vectors: Vectors, count: int) -> Vectors:
    """(C * T, D) -> (C, D) unit rows: the mean over each class's prompts (arXiv:2103.00020, section 3.1.4)."""
    mean = vectors.reshape(count, -1, vectors.shape[1]).mean(1)
    unit: Vectors = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return unit


def class_vectors(encoder: Encoder, names: Sequence[str], prompts: Sequence[str] = (PROMPT,)) -> Vectors:
    """One unit row per class: the mean over its prompts."""
    return mean_vectors(encoder.encode_texts(prompts_of(names, prompts)), len(names))


# ---- other people's formats ------------------------------------------------------------------------------------------


def dataset_name(source: Path) -> str:
    """What data are called: by their file, or by its folder where the file has a name like any other."""
    source = source.absolute()
    return source.parent.name if source.stem == "captions" else source.stem


def clip_benchmark_result(result: Evaluation, dataset: str, language: str = "en") -> dict[str, Any]:
    """The result as CLIP_benchmark writes it; its image_retrieval_recall@k is t2i_hit@k.

    What it measures with pictures of several labels is mean_average_precision alone.
    """
    model, _, pretrained = result.model.partition("/")
    found = result.metrics
    if result.task == "retrieval":
        ks = [name.partition("@")[2] for name in found if name.startswith("t2i_hit@")]
        metrics = {f"image_retrieval_recall@{k}": found[f"t2i_hit@{k}"] for k in ks}
        metrics |= {f"text_retrieval_recall@{k}": found[f"i2t_hit@{k}"] for k in ks}
    elif "map" in found:
        metrics = {"mean_average_precision": found["map"]}
    else:
        few = result.texts < 5  # classes: then it has no top-5
        metrics = {
            "acc1": found["top1"],
            "acc5": float("nan") if few else found["top5"],
            "mean_per_class_recall": found["mean_per_class"],
        }
    return {
        "dataset": dataset,
        "model": model,
        "pretrained": pretrained,
        "task": f"zeroshot_{result.task}",
        "metrics": metrics,
        "language": language,
    }


def trec_run(result: Evaluation, depth: int = 100) -> Iterator[str]:
    """Lines of TREC's run format, ``query Q0 document rank score tag``: the best of each query, both directions.

    Pictures are called by their names, texts by their picture's name and number; ``t2i:`` or ``i2t:`` stands before a
    query. :func:`trec_qrels` names the right ones.
    """
    details = _retrieval(result)
    images, texts = _identifiers(details)
    tag = quote(result.model, safe="")
    for way, queries, asked, documents, found in (
        ("t2i", details.ranking.t2i.queries, details.text_vectors, images, details.image_vectors),
        ("i2t", details.ranking.i2t.queries, details.image_vectors, texts, details.text_vectors),
    ):
        names = texts if way == "t2i" else images
        hits = exact_search(found, asked[queries], depth)
        for query, rows, scores in zip(queries.tolist(), hits.rows.tolist(), hits.scores.tolist(), strict=True):
            for rank, (row, score) in enumerate(zip(rows, scores, strict=True), 1):
                yield f"{way}:{names[query]} Q0 {documents[row]} {rank} {score:.9g} {tag}"


def trec_qrels(result: Evaluation) -> Iterator[str]:
    """Lines of TREC's relevance judgements, ``query 0 document 1``, for :func:`trec_run`."""
    details = _retrieval(result)
    images, texts = _identifiers(details)
    pairs = list(zip(details.image_rows.tolist(), details.text_rows.tolist(), strict=True))
    yield from (f"t2i:{texts[text]} 0 {images[image]} 1" for image, text in pairs)
    yield from (f"i2t:{images[image]} 0 {texts[text]} 1" for image, text in pairs)


def _retrieval(result: Evaluation) -> RetrievalDetails:
    if not isinstance(result.details, RetrievalDetails):
        raise UsageError("a run lists what was retrieved: it is for --task retrieval")
    return result.details


def _identifiers(details: RetrievalDetails) -> tuple[list[str], list[str]]:
    """Names of pictures and texts without white space, each of them different from all others."""
    names = [quote(record.image.name, safe="") for record in details.records]
    if len(set(names)) < len(names):
        names = [f"{row}-{name}" for row, name in enumerate(names)]
    count: dict[int, int] = {}
    texts = []
    for image in details.owner.tolist():
        count[image] = count.get(image, -1) + 1
        texts.append(f"{names[image]}#{count[image]}")
    return names, texts


def write_lines(lines: Iterator[str], file: Path) -> None:
    """Write text lines; UsageError when the file cannot be written."""
    try:
        with file.open("w", encoding="utf-8") as stream:
            stream.writelines(line + "\n" for line in lines)
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}") from error
