"""Vectors of frozen towers: every picture and sentence is encoded once, and again never.

Towers that are not trained give the same features at every step, so training reads them from a cache. The towers
run as a bundle of their own, without projections, through the same encoder that search uses.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch import Tensor

from indexes.vectors import Vectors
from retrieval.encoders import Encoder
from retrieval.errors import DataError, ImageError
from retrieval.images import Preprocessing, os_reason, read_photo
from retrieval.pairs import Record
from retrieval.pipeline import map_ahead

Progress = Callable[[int, int], None]
Features = NDArray[np.float16]
_BATCH = 32


class FrozenTowers:
    """Towers that are not trained: what is kept of a picture or a sentence is its features."""

    def __init__(self, encoder: Encoder, views: Sequence[str], device: str) -> None:
        self.encoder, self.views, self.device = encoder, views, device

    def pictures(self, records: Sequence[Record], progress: Progress | None = None) -> list[Tensor]:
        """(N, F) features of the records' pictures, under each view."""
        return [self._tensor(image_features(self.encoder, records, view, progress)) for view in self.views]

    def sentences(self, texts: Sequence[str]) -> Tensor:
        """(M, G) features."""
        return self._tensor(text_features(self.encoder, texts))

    def image_features(self, pictures: Tensor) -> Tensor:
        """The same rows: they are features already."""
        return pictures

    def text_features(self, sentences: Tensor) -> Tensor:
        """The same rows: they are features already."""
        return sentences

    def _tensor(self, features: Features) -> Tensor:
        return torch.from_numpy(features).float().to(self.device)


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/diptych/features``: may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diptych" / "features"


def image_features(
    encoder: Encoder, records: Sequence[Record], view: str, progress: Progress | None = None
) -> Features:
    """(N, F) float16 unit rows of the records' pictures under a view: ``clean``, ``flip``, or ``crop`` and a number.

    Crops are drawn from the picture's name and the view's number, so that a run can be repeated.
    """
    contents = [_content(record.image) for record in records]
    names = [_name(record) for record in records]
    key = [view, *names] if view.startswith("crop") else [view]

    def prepare(record: Record) -> Image.Image | ImageError:
        try:
            return augment(read_photo(record.image).image, view, _name(record), encoder.preprocessing)
        except ImageError as error:
            return ImageError(f"{record.image}: {error}")

    def compute() -> Vectors:
        rows = np.empty((len(records), 0), np.float32)
        batch: list[Image.Image] = []
        done = 0
        for number, (_, picture) in enumerate(map_ahead(prepare, records), 1):
            if isinstance(picture, ImageError):
                raise DataError(f"a picture of the training data cannot be read: {picture}")
            batch.append(picture)
            if len(batch) == _BATCH or number == len(records):
                vectors = encoder.encode_images(batch)
                if not rows.shape[1]:
                    rows = np.empty((len(records), vectors.shape[1]), np.float32)
                rows[done:number] = vectors
                done, batch = number, []
                if progress:
                    progress(done, len(records))
        return rows

    return _cached(encoder, [*key, *contents], compute)


def _content(file: Path) -> bytes:
    try:
        return hashlib.sha256(file.read_bytes()).digest()
    except OSError as error:
        raise DataError(f"a picture of the training data cannot be read: {file}: {os_reason(error)}") from error


def text_features(encoder: Encoder, texts: Sequence[str]) -> Features:
    """(M, F) float16 unit rows of sentences."""
    return _cached(encoder, ["text", *texts], lambda: encoder.encode_texts(texts))


def _name(record: Record) -> str:
    """A picture's name with the two folders above it: the same wherever the data lie."""
    return "/".join(record.image.parts[-3:])


def augment(image: Image.Image, view: str, name: str, preprocessing: Preprocessing) -> Image.Image:
    """One view of a picture, at the model's size.

    A crop keeps 40 to 100 % of the area with the sides' ratio changed by up to 4:3 (after Inception's random resized
    crop), jitters brightness, contrast and colour by up to 30 %, and is mirrored half of the time.
    """
    if view == "clean":
        return preprocessing.fit(image)
    if view == "flip":
        return preprocessing.fit(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if not view.startswith("crop"):
        raise DataError(f"unknown view {view!r}: clean, flip, or crop and a number")
    rng = np.random.default_rng([zlib.crc32(name.encode()), int(view.removeprefix("crop"))])
    area, ratio = rng.uniform(0.4, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    wide, high = min(1, np.sqrt(area * ratio)), min(1, np.sqrt(area / ratio))
    left, top = rng.uniform(0, 1 - wide), rng.uniform(0, 1 - high)
    box = (left * image.width, top * image.height, (left + wide) * image.width, (top + high) * image.height)
    height, width = preprocessing.size
    image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(rng.uniform(0.7, 1.3))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def _cached(encoder: Encoder, key: Sequence[str | bytes], compute: Callable[[], Vectors]) -> Features:
    digest = hashlib.sha256(encoder.fingerprint.encode())
    for part in key:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    file = cache_folder() / f"{digest.hexdigest()}.npy"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        computed = compute().astype(np.float16)
        partial = file.with_suffix(f".{os.getpid()}.tmp")
        with partial.open("wb") as stream:
            np.save(stream, computed)
        partial.replace(file)
    features: Features = np.load(file)
    return features
