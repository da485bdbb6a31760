"""What an index run costs beside the model: decoding the slow way and the quick one, and everything from file to store.

.venv/bin/python -m benchmarks.pipeline DATA    # a folder that holds flickr8k/originals
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from benchmarks.table import machine, write_section
from indexes.vectors import Vectors
from retrieval import preprocessing
from retrieval.encoders import Encoder, load_encoder
from retrieval.images import read_photo
from retrieval.library import Library

ROUNDS = 5
KINDS = {"0.3 MP": (640, 480, 200), "12 MP": (4000, 3000, 24)}  # width, height, photos


class FreeEncoder:
    """The built-in model's preprocessing, and no model: what is left of a run is everything else."""

    name = fingerprint = "free"
    dim, score_scale = 512, 1.0

    def __init__(self, like: Encoder) -> None:
        self.preprocessing = like.preprocessing

    def encode_images(self, images: Sequence[Image.Image]) -> Vectors:
        self.preprocessing.pixels(images)
        return np.ones((len(images), self.dim), np.float32) / np.float32(self.dim**0.5)

    def encode_texts(self, texts: Sequence[str]) -> Vectors:
        return np.ones((len(texts), self.dim), np.float32) / np.float32(self.dim**0.5)


def make_photos(data: Path, folder: Path, width: int, height: int, count: int) -> list[Path]:
    """Real photos brought to a size; those that come around again are cropped a little, so that no two are alike."""
    originals = sorted((data / "flickr8k" / "originals").glob("*.jpg"))
    folder.mkdir()
    files = []
    for i in range(count):
        with Image.open(originals[i % len(originals)]) as image:
            left = i // len(originals)
            part = image.convert("RGB").crop((left, left, image.width, image.height))
        size = (width, height) if part.width >= part.height else (height, width)
        files.append(folder / f"{i:04}.jpg")
        part.resize(size, Image.Resampling.BICUBIC).save(files[-1], quality=90)
    return files


def cpu_ms(work: Callable[[], object], count: int) -> float:
    """CPU milliseconds of each of so many, all threads together."""
    before = time.process_time()
    work()
    return 1000 * (time.process_time() - before) / count


def interleaved(sides: dict[str, Callable[[], float]]) -> dict[str, float]:
    """The median of some rounds of each side, in turn."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, side in sides.items():
            found[name].append(side())
    return {name: statistics.median(values) for name, values in found.items()}


def measure(files: list[Path], encoder: Encoder) -> dict[str, float]:
    """One thread everywhere. CPU milliseconds a photo, but for the drift: cosines of quick and slow vectors."""
    contents, count = [file.read_bytes() for file in files], len(files)
    fit = encoder.preprocessing

    def slow() -> list[Image.Image]:
        return [fit.fit(read_photo(content).image) for content in contents]

    def quick() -> list[Image.Image]:
        return [read_photo(content, preprocessing=fit).image for content in contents]

    def with_pillow() -> list[Image.Image]:
        with mock.patch.object(preprocessing, "_resizer", return_value=None):
            return quick()

    def run() -> None:
        with tempfile.TemporaryDirectory() as scratch:
            store = Path(scratch) / "index"
            report = Library.create(files[0].parent, index=store, encoder=FreeEncoder(encoder)).index()
            assert report.embedded == count

    ready = quick()
    vectors = encoder.encode_images(ready)
    found = interleaved(
        {
            "slow": lambda: cpu_ms(slow, count),
            "with Pillow": lambda: cpu_ms(with_pillow, count),
            "quick": lambda: cpu_ms(quick, count),
            "all but the model": lambda: cpu_ms(run, count),
            "model": lambda: cpu_ms(lambda: encoder.encode_images(ready[:64]), min(64, count)),
        }
    )
    cosines = (vectors * encoder.encode_images(slow())).sum(axis=1)
    return {**found, "least": float(cosines.min()), "mean": float(cosines.mean())}


def end_to_end(files: list[Path]) -> tuple[float, float]:
    """Images/s of an index run, and of the model alone on prepared pictures; all threads."""
    encoder = load_encoder()
    ready = [read_photo(file, preprocessing=encoder.preprocessing).image for file in files]
    encoder.encode_images(ready[:16])

    def seconds(work: Callable[[], object]) -> float:
        before = time.perf_counter()
        work()
        return time.perf_counter() - before

    def run() -> float:
        with tempfile.TemporaryDirectory() as scratch:
            library = Library.create(files[0].parent, index=Path(scratch) / "index", encoder=encoder)
            return seconds(library.index)

    found = interleaved({"run": run, "model": lambda: seconds(lambda: encoder.encode_images(ready))})
    return len(files) / found["run"], len(files) / found["model"]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("say where the data are: python -m benchmarks.pipeline DATA")
    threads = os.environ.get("OMP_NUM_THREADS")
    rows, speeds = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for kind, (width, height, count) in KINDS.items():
            files = make_photos(Path(sys.argv[1]), Path(scratch) / kind, width, height, count)
            os.environ["OMP_NUM_THREADS"] = "1"
            found = measure(files, load_encoder(threads=1))
            share = found["model"] / (found["model"] + found["all but the model"])
            numbers = [found[name] for name in ("slow", "with Pillow", "quick", "all but the model", "model")]
            drift = f"{found['least']:.4f} / {found['mean']:.4f}"
            rows.append((kind, *(f"{number:.2f}" for number in numbers), f"{share:.2f}", drift))
            os.environ.pop("OMP_NUM_THREADS")
            if threads:
                os.environ["OMP_NUM_THREADS"] = threads
            speeds.append((kind, *end_to_end(files)))
    said = "; ".join(f"{kind} {run:.0f} of {model:.0f} ({run / model:.2f})" for kind, run, model in speeds)
    write_section(
        "Decoding and the pipeline",
        f"`python -m benchmarks.pipeline DATA` on {machine()}: CPU milliseconds a photo on one thread, medians of "
        f"{ROUNDS} interleaved rounds, built-in model. Slow: decoded in full and resized by Pillow. Quick: as an index "
        "run does it. All but the model: a run from files to store with an encoder that does nothing. Share: of a "
        "run's CPU that is the model. Cosine: least and mean, of vectors made the quick way and the slow one.\n\n"
        f"Images/s of a run with all threads, of the model alone on prepared pictures: {said}.",
        ("photos", "slow", "quick, Pillow's resize", "quick", "all but the model", "model", "share", "cosine"),
        rows,
    )


if __name__ == "__main__":
    main()
