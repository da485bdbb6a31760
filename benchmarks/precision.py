"""What fewer bits cost and save: size, processor time, cosines and scores of a model in fp32, fp16 and int8.

    .venv/bin/python -m benchmarks.precision DATA MODEL      # MODEL: a bundle in fp16 or fp32

The shipped bundle is int8, made from the one that `builtin-finetuned.toml` trains (diptych-builtin-2). Changes are to
fp32, paired: 95 % intervals from 1,000 draws of the same images.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.table import machine, write_section
from retrieval.bundle import MODEL_FILE, Bundle
from retrieval.encoders import export_bundle
from retrieval.evaluation import Evaluation, Settings, classify, evaluate
from retrieval.images import read_photo
from retrieval.onnx_encoder import OnnxEncoder
from retrieval.pairs import read_pairs
from retrieval.sessions import has_openvino

PRECISIONS = ("fp32", "fp16", "fp16/int8", "int8")  # pictures/texts
PHOTOS, ROUNDS = 16, 7
SETTINGS = Settings(bootstrap=1000)
COLD = """
import resource, sys
from pathlib import Path
from retrieval.bundle import Bundle
from retrieval.onnx_encoder import OnnxEncoder
import onnxruntime, tokenizers
seconds = lambda: sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
before = seconds()
OnnxEncoder(Bundle.load(Path(sys.argv[1])), 1).encode_texts(["two dogs playing in the snow"])
print(seconds() - before)
"""


def image_times(encoders: list[OnnxEncoder], data: Path) -> list[float]:
    """CPU milliseconds a picture, one thread, interleaved, medians."""
    paths = [record.image for record in read_pairs(data / "flickr8k/captions.jsonl", "val")[:PHOTOS]]
    photos = [encoders[0].preprocessing.fit(read_photo(path).image) for path in paths]
    taken: list[list[float]] = [[] for _ in encoders]
    for _ in range(ROUNDS):
        for times, encoder in zip(taken, encoders, strict=True):
            begin = time.process_time()
            encoder.encode_images(photos)
            times.append((time.process_time() - begin) / PHOTOS * 1000)
    return [float(np.median(times[1:])) for times in taken]


def first_query(folder: Path) -> float:
    """CPU milliseconds of a new process to open the text tower and encode one sentence, after the imports."""
    command = [sys.executable, "-c", COLD, str(folder)]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(ROUNDS)]
    return float(np.median([float(run) for run in runs])) * 1000


def changes(result: Evaluation, names: tuple[str, ...]) -> str:
    """Each measure and its change to fp32."""
    if result.comparison is None:
        return " / ".join(f"{100 * result.metrics[name]:.1f}" for name in names)
    cells = []
    for name in names:
        low, high = (100 * end for end in result.comparison.intervals[name])
        change = 100 * result.comparison.differences[name]
        cells.append(f"{100 * result.metrics[name]:.1f} ({change:+.1f} [{low:+.1f}, {high:+.1f}])")
    return " / ".join(cells)


def scores(encoder: OnnxEncoder, exact: OnnxEncoder | None, data: Path) -> list[str]:
    """hit@1 / hit@10 on Flickr8k test and COCO val, zero-shot top-1 on Caltech-101 and VOC."""
    cells = []
    for file, split in (("flickr8k/captions.jsonl", "test"), ("coco/captions.jsonl", "val")):
        result = evaluate(encoder, read_pairs(data / file, split), SETTINGS, other=exact)
        cells += [changes(result, (f"{way}_hit@1", f"{way}_hit@10")) for way in ("t2i", "i2t")]
    for name in ("caltech101", "voc_subset"):
        result = classify(encoder, read_pairs(data / f"labelled/{name}.jsonl"), SETTINGS, other=exact)
        cells.append(changes(result, ("top1",)))
    return cells


def main(data: Path, model: str) -> None:
    calibrate = read_pairs(data / "flickr8k/captions.jsonl", "val")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        places = {name: Path(scratch) / name.replace("/", "-") for name in PRECISIONS}
        bundles = [export_bundle(model, place, name, calibrate=calibrate) for name, place in places.items()]
        encoders = [OnnxEncoder(Bundle.load(bundle.path), 1) for bundle in bundles]
        exact = encoders[0]
        for name, bundle, encoder, milliseconds in zip(
            PRECISIONS, bundles, encoders, image_times(encoders, data), strict=True
        ):
            size = sum(file.stat().st_size for file in bundle.path.iterdir() if file.name != MODEL_FILE)
            cosines = bundle.training.get("int8", {}).get("cosine", {})
            told = " / ".join(f"{cosine['mean']:.4f}" for cosine in cosines.values()) or "1"
            costs = [f"{size / 1e6:.1f}", f"{milliseconds:.1f}", f"{first_query(bundle.path):.0f}", told]
            rows.append((name, *costs, *scores(encoder, None if encoder is exact else exact, data)))
    runtime = "OpenVINO for pictures where it is faster, else ONNX Runtime" if has_openvino() else "ONNX Runtime"
    write_section(
        "Precision of the stored weights",
        f"`python -m benchmarks.precision DATA MODEL` on {machine()}, one thread, {runtime}: CPU ms a picture; "
        "CPU ms of opening the text tower and one query in a new process; mean cosines (pictures / texts); "
        "hit@1 / hit@10 and zero-shot top-1 in percent, with the change to fp32 and its paired 95 % interval.",
        (
            "weights",
            "MB",
            "picture",
            "query",
            "cosine",
            "Flickr8k t2i",
            "Flickr8k i2t",
            "COCO t2i",
            "COCO i2t",
            "Caltech-101",
            "VOC",
        ),
        rows,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
