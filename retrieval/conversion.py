"""A bundle in another precision, and what that costs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from indexes.vectors import Vectors
from retrieval import quantisation
from retrieval.bundle import IMAGE_FILE, TEXT_FILE, TOKENIZER_FILE, Bundle, new_folder
from retrieval.embedding import picture_bytes
from retrieval.errors import DataError, ModelError
from retrieval.evaluation import Evaluation, RetrievalDetails, Settings, evaluate
from retrieval.images import read_photo
from retrieval.onnx_encoder import OnnxEncoder
from retrieval.pairs import Record, checksum

_CALIBRATION = 64  # pictures; on the built-in model 32 and 256 give the same cosines within 0.0005
_MEASURED = 1000  # pictures, with their captions, that quantising is judged by
_KS = (1, 10)
_SEED = 0


def convert(bundle: Bundle, folder: Path, precision: Mapping[str, str], records: Sequence[Record] = ()) -> Bundle:
    """Write a bundle into a new folder in other precisions, whole or not at all.

    Args:
        bundle: the model, in fp32 or fp16.
        folder: where to; the new bundle is named like it.
        precision: fp32, fp16 or int8 of ``image`` and ``text``.
        records: captioned photos, for int8: 64 of them calibrate, up to 1,000 others measure. What that cost goes into
            ``training["int8"]``: cosines to the model as it was, and the change of hit@k with paired 95 % intervals.

    Raises:
        ModelError: the folder exists, or the bundle is in int8 already.
        DataError: int8 without photos or with too few, or one cannot be read.
        MissingExtra: the package that reads and writes graphs is not installed.
    """
    for tower, stored in bundle.precision.items():
        if stored == "int8" != precision[tower]:
            raise ModelError(f"{bundle.path}: its {tower} tower is in int8; export the model that it was made from")
        if stored == "int8":
            raise ModelError(f"{bundle.path}: its {tower} tower is in int8 already")
    kept, measured = _parts(records) if "int8" in precision.values() else ([], [])
    with new_folder(folder) as staging:
        shutil.copyfile(bundle.path / TOKENIZER_FILE, staging / TOKENIZER_FILE)
        onnx = quantisation.import_onnx("converting a model")
        for tower, file in (("image", IMAGE_FILE), ("text", TEXT_FILE)):
            model = quantisation.load_graph(bundle.path / file)
            quantisation.widen(model)
            if precision[tower] == "fp16":
                quantisation.store_as_fp16(model)
            elif precision[tower] == "int8" and tower == "text":
                model = quantisation.quantise_text(model)
            elif precision[tower] == "int8":
                model = quantisation.quantise_image(model, [_pixels(bundle, record) for record in kept])
            onnx.save(model, str(staging / file))
        made = replace(bundle, path=staging, name=folder.name, precision=dict(precision)).save()
        if measured:
            training = {**bundle.training, "int8": _cost(made, bundle, measured, checksum(records), len(kept))}
            made = replace(made, training=training).save()
    return replace(made, path=folder)


def _parts(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """What to calibrate on and what to measure on: no picture is in both, and either is spread over the whole."""
    order = [records[i] for i in np.random.default_rng(_SEED).permutation(len(records))]
    count = min(_CALIBRATION, len(order) // 2)
    if count < 8:
        raise DataError(
            f"int8 needs captioned photos to calibrate and to measure on, at least 16 (64 to 1,000 are better), "
            f"not {len(order)}: name them with --calibrate PAIRS"
        )
    return order[:count], order[count : count + _MEASURED]


def _pixels(bundle: Bundle, record: Record) -> Any:
    return bundle.preprocessing.pixels([read_photo(picture_bytes(record.image)).image])[0]


def _cost(made: Bundle, source: Bundle, records: Sequence[Record], data: str, calibrated_on: int) -> dict[str, Any]:
    settings = Settings(ks=_KS, bootstrap=1000, cached=False)
    new = OnnxEncoder(made, precision="auto" if made.precision["image"] == "int8" else "fp32")
    result = evaluate(new, records, settings, other=OnnxEncoder(source, precision="fp32"))
    comparison = result.comparison
    assert comparison is not None
    names = [f"{way}_hit@{k}" for way in ("t2i", "i2t") for k in _KS]
    return {
        "made_from": {"name": source.name, "fingerprint": source.fingerprint, "precision": dict(source.precision)},
        "data": data,
        "calibrated_on": calibrated_on,
        "measured_on": len(records),
        "cosine": {
            tower: {"mean": round(float(cosines.mean()), 5), "least": round(float(cosines.min()), 5)}
            for tower, cosines in _cosines(result, comparison.other).items()
        },
        "change": {name: round(comparison.differences[name], 5) for name in names},
        "intervals": {name: [round(end, 5) for end in comparison.intervals[name]] for name in names},
    }


def _cosines(one: Evaluation, other: Evaluation) -> dict[str, Vectors]:
    ours, theirs = one.details, other.details
    assert isinstance(ours, RetrievalDetails)
    assert isinstance(theirs, RetrievalDetails)
    return {
        "image": np.einsum("nd,nd->n", ours.image_vectors, theirs.image_vectors),
        "text": np.einsum("nd,nd->n", ours.text_vectors, theirs.text_vectors),
    }
