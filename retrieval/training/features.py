"""Vectors of frozen towers: every picture and sentence is encoded once, and again never.

Towers that are not trained give the same features at every step, so training reads them from the one cache of
:mod:`retrieval.embedding`. The towers run as a bundle of their own, without projections, through the same encoder that
search uses.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch import Tensor

from retrieval.embedding import (
    EmbeddingCache,
    Progress,
    UnreadablePictures,
    View,
    cache_name,
    encode_pictures,
    encode_sentences,
)
from retrieval.encoders import Encoder
from retrieval.errors import DataError
from retrieval.images import Preprocessing
from retrieval.pairs import Picture, Record
from retrieval.training.streaming import PictureRows

if TYPE_CHECKING:
    from retrieval.training.data import Towers

Features = NDArray[np.float16]


class FrozenTowers:
    """Towers that are not trained: what is kept of a picture or a sentence is its features."""

    def __init__(self, encoder: Encoder, views: Sequence[str], device: str) -> None:
        self.encoder, self.views, self.device = encoder, views, device

    def pictures(
        self, records: Sequence[Record], progress: Progress | None = None
    ) -> tuple[list[PictureRows], Mapping[int, str]]:
        """(N, F) features of the pictures that can be read, under each view; and the others, by their place."""

        def views(of: Sequence[Record]) -> list[PictureRows]:
            return [self._tensor(image_features(self.encoder, of, view, progress)) for view in self.views]

        try:
            return views(records), {}
        except UnreadablePictures as error:  # all have been tried
            return views([record for row, record in enumerate(records) if row not in error.reasons]), error.reasons

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


class OneFrozen:
    """A tower that learns beside one that does not (LiT, Zhai et al. 2022, arXiv:2111.07991): each side as its own."""

    def __init__(self, images: Towers, texts: Towers) -> None:
        self.pictures, self.image_features = images.pictures, images.image_features
        self.sentences, self.text_features = texts.sentences, texts.text_features


def image_features(
    encoder: Encoder, records: Sequence[Record], view: str, progress: Progress | None = None
) -> Features:
    """(N, F) float16 unit rows of the records' pictures under a view: ``clean``, ``flip``, or ``crop`` and a number.

    Crops are drawn from the picture's name and the view's number, so that a run can be repeated.
    """
    pictures = [record.image for record in records]
    cache = EmbeddingCache(cache_name(encoder), encoder.dim)
    drawn = None if view == "clean" else _view(view, encoder.preprocessing)  # clean: what is kept for everyone
    return encode_pictures(encoder, pictures, cache=cache, progress=progress, view=drawn).astype(np.float16)


def text_features(encoder: Encoder, texts: Sequence[str]) -> Features:
    """(M, G) float16 unit rows of sentences; towers without projections make them of another width than pictures."""
    return encode_sentences(encoder, texts, cache=EmbeddingCache(cache_name(encoder))).astype(np.float16)


def _view(view: str, preprocessing: Preprocessing) -> View:
    def name(picture: Picture) -> str:
        return f"{view}\0{_name(picture)}" if view.startswith("crop") else view

    def draw(image: Image.Image, picture: Picture) -> Image.Image:
        return augment(image, view, _name(picture), preprocessing)

    return View(name, draw)


def _name(picture: Picture) -> str:
    """A picture's name with the two folders above it: the same wherever the data lie."""
    return "/".join(picture.parts[-3:]) if isinstance(picture, Path) else picture.name


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
    rng = np.random.default_rng([zlib.crc32(name.encode("utf-8", "surrogatepass")), int(view.removeprefix("crop"))])
    area, ratio = rng.uniform(0.4, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    wide, high = min(1, np.sqrt(area * ratio)), min(1, np.sqrt(area / ratio))
    left, top = rng.uniform(0, 1 - wide), rng.uniform(0, 1 - high)
    box = (left * image.width, top * image.height, (left + wide) * image.width, (top + high) * image.height)
    height, width = preprocessing.size
    image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(rng.uniform(0.7, 1.3))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image
