"""Peak memory of an index run, by the number of photos: it must not grow with the folder.

.venv/bin/python -m benchmarks.memory DATA    # a folder that holds flickr8k/originals
"""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.table import machine, write_section

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

RUNS = (  # encoder, photos, width and height of each
    ("built-in", 1_000, (640, 480)),
    ("built-in", 100, (4000, 3000)),
    ("light", 1_000, (640, 480)),
    ("light", 20_000, (64, 48)),
    ("light", 100_000, (64, 48)),
)
BAR = 1200  # MB
REAL = 64  # photos that the light encoder gives to the model
LIMIT = 1_000  # photos of which the pixels differ; the others are these again under other bytes


class LightEncoder:
    """The built-in model and all the memory it takes, for sentences and the first photos; then random vectors."""

    name = fingerprint = "light"
    dim, score_scale = 512, 1.0

    def __init__(self) -> None:
        import numpy

        from retrieval.encoders import load_encoder

        self.model = load_encoder()
        self.preprocessing = self.model.preprocessing
        self._random, self._left = numpy.random.default_rng(0), REAL

    def encode_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        from indexes.vectors import as_vectors

        if self._left > 0:
            self._left -= len(images)
            return self.model.encode_images(images)
        self.preprocessing.pixels(images)
        return as_vectors(self._random.normal(size=(len(images), self.dim)).astype("float32"))

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        return self.model.encode_texts(texts)


def make_photos(data: Path, folder: Path, count: int, size: tuple[int, int]) -> None:
    """So many JPEG files, no two with the same bytes: a comment segment (COM) tells those with equal pixels apart."""
    from PIL import Image

    originals = sorted((data / "flickr8k" / "originals").glob("*.jpg"))
    contents = []
    for path in originals[: min(count, LIMIT)]:
        stream = io.BytesIO()
        with Image.open(path) as image:
            image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        contents.append(stream.getvalue())
    for i in range(count):
        if i % 1000 == 0:
            (folder / f"{i // 1000:03}").mkdir(parents=True)
        content, comment = contents[i % len(contents)], f"{i:08}".encode()
        whole = content[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + content[2:]
        (folder / f"{i // 1000:03}" / f"{i:06}.jpg").write_bytes(whole)


def peak() -> float:
    """The most that this process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def run(encoder: str, folder: Path) -> None:
    """In a process of its own: index a folder, and print what that took."""
    from retrieval.encoders import load_encoder
    from retrieval.library import Library

    library = Library.create(folder, encoder=LightEncoder() if encoder == "light" else load_encoder())
    written: list[float] = []
    build = library.build_stale_index
    library.build_stale_index = lambda: (written.append(peak()), build())  # type: ignore[method-assign]
    started = time.monotonic()
    report = library.index()
    seconds = time.monotonic() - started
    assert report.embedded == report.added
    print(json.dumps({"photos": report.added, "peak": peak(), "written": written[0], "seconds": seconds}))


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[1] == "--run":
        run(sys.argv[2], Path(sys.argv[3]))
        return
    if len(sys.argv) != 2:
        sys.exit("say where the data are: python -m benchmarks.memory DATA")
    rows, met = [], True
    for encoder, count, size in RUNS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "photos"
            make_photos(Path(sys.argv[1]), folder, count, size)
            command = [sys.executable, "-m", "benchmarks.memory", "--run", encoder, str(folder)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout)
            assert found["photos"] == count
            rows.append(
                (encoder, f"{count:,}", f"{size[0]} x {size[1]}", f"{found['peak']:.0f} ({found['written']:.0f})")
            )
            met &= found["peak"] <= BAR
            print(*rows[-1], f"{found['seconds']:.0f} s", flush=True)
    write_section(
        "Memory of an index run",
        f"`python -m benchmarks.memory DATA` on {machine()}: peak resident memory of `Library.index()` in a process of "
        f"its own, FAISS index included where one is built (bar {BAR:,} MB: {'met' if met else 'MISSED'}). Light: the "
        f"built-in model for sentences and the first {REAL} photos, so that it takes all of its memory, then random "
        "vectors. In brackets: until the last row is written, before a FAISS index.",
        ("encoder", "photos", "size", "peak MB"),
        rows,
    )


if __name__ == "__main__":
    main()
