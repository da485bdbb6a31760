"""How good an encoder is on data with known answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from indexes.vectors import Vectors
from retrieval.encoders import Encoder
from retrieval.errors import DataError, ImageError
from retrieval.images import read_photo
from retrieval.metrics import evaluate_retrieval, top_k_accuracy
from retrieval.pairs import Record, checksum, class_names
from retrieval.pipeline import map_ahead

PROMPT = "a photo of a {name}."
BACKGROUND_LABELS = ("BACKGROUND_Google",)  # Caltech-101's heap of anything: not a class that a sentence could name
_BATCH = 64
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """What was measured, of which model on which data. ``metrics`` are shares between 0 and 1, and ranks from 1."""

    task: str
    model: str
    fingerprint: str
    images: int
    texts: int
    checksum: str
    metrics: dict[str, float]
    note: str = ""


def evaluate(
    encoder: Encoder, records: Sequence[Record], ks: Sequence[int] = (1, 5, 10), progress: Progress | None = None
) -> Evaluation:
    """hit@k and median rank both ways over pictures and their captions. DataError when there is no caption at all."""
    texts = [text for record in records for text in record.texts]
    if not texts:
        raise DataError("none of these pictures has a caption: for labels use --task classification")
    owner = np.array([row for row, record in enumerate(records) for _ in record.texts], np.int64)
    images = encode_files(encoder, [record.image for record in records], progress)
    metrics = evaluate_retrieval(images, encoder.encode_texts(texts), owner, ks)
    return Evaluation(
        "retrieval", encoder.name, encoder.fingerprint, len(records), len(texts), checksum(records), metrics
    )


def classify(
    encoder: Encoder, records: Sequence[Record], prompts: Sequence[str] = (PROMPT,), progress: Progress | None = None
) -> Evaluation:
    """Zero-shot top-1 and top-5: a picture's class is the one whose prompts, averaged, lie nearest.

    Underscores in class names are read as spaces. A picture with several labels is right with any of them.
    Background classes (``BACKGROUND_LABELS``) are left out, and the note says so.
    """
    kept = [record for record in records if record.labels and not set(record.labels) & set(BACKGROUND_LABELS)]
    if not kept:
        raise DataError("none of these pictures has a label: for captions use --task retrieval")
    names = class_names(kept)
    images = encode_files(encoder, [record.image for record in kept], progress)
    scores = images @ class_vectors(encoder, names, prompts).T  # (N, C)
    column = {name: i for i, name in enumerate(names)}
    right = np.zeros(scores.shape, bool)
    for row, record in enumerate(kept):
        right[row, [column[label] for label in record.labels]] = True
    metrics = {f"top{k}": top_k_accuracy(scores, right, k) for k in (1, 5)}
    left_out = len(records) - len(kept)
    note = f"{left_out} pictures without a nameable label left out ({', '.join(BACKGROUND_LABELS)})" if left_out else ""
    return Evaluation(
        "classification", encoder.name, encoder.fingerprint, len(kept), len(names), checksum(kept), metrics, note
    )


def class_vectors(encoder: Encoder, names: Sequence[str], prompts: Sequence[str] = (PROMPT,)) -> Vectors:
    """One unit row per class: the mean over its prompts (CLIP's prompt ensemble, arXiv:2103.00020, section 3.1.4)."""
    texts = [prompt.replace("{name}", name.replace("_", " ")) for name in names for prompt in prompts]
    vectors = encoder.encode_texts(texts).reshape(len(names), len(prompts), -1).mean(1)
    unit: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def encode_files(encoder: Encoder, paths: Sequence[Path], progress: Progress | None = None) -> Vectors:
    """Picture files -> (N, D) unit rows, in order. Every file must be readable: DataError counts those that are not."""

    def prepare(path: Path) -> Image.Image | ImageError:
        try:
            return encoder.preprocessing.fit(read_photo(path).image)
        except ImageError as error:
            return error

    rows = np.empty((len(paths), encoder.dim), np.float32)
    failures: list[str] = []
    done = 0
    batch: list[Image.Image] = []
    for path, image in map_ahead(prepare, paths):
        if isinstance(image, ImageError):
            failures.append(f"{path}: {image}")
            continue
        batch.append(image)
        if len(batch) == _BATCH:
            rows[done : done + _BATCH] = encoder.encode_images(batch)
            done += _BATCH
            batch = []
            if progress:
                progress(done, len(paths))
    if failures:
        raise DataError(f"{len(failures)} of {len(paths)} pictures cannot be read, the first: {failures[0]}")
    if batch:
        rows[done:] = encoder.encode_images(batch)
    if progress:
        progress(len(paths), len(paths))
    return rows
