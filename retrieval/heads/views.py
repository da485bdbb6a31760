"""Other views of training photos, each embedded once: flipped, rotated, cropped and coloured."""

from __future__ import annotations

import zlib

import numpy as np
from PIL import Image

from retrieval.embedding import View
from retrieval.images import Preprocessing
from retrieval.pairs import Picture
from retrieval.training.features import augment

_TILT = 15.0  # degrees, either way


def augmented_view(number: int, preprocessing: Preprocessing) -> View:
    """The n-th view of each picture: the same for the same name and number.

    It is rotated by up to 15 degrees, without the empty corners, then cropped, coloured and mirrored as
    :func:`retrieval.training.features.augment` has it.
    """

    def name(picture: Picture) -> str:
        return f"turned {number}\0{picture.name}"

    def draw(image: Image.Image, picture: Picture) -> Image.Image:
        key = zlib.crc32(picture.name.encode("utf-8", "surrogatepass"))
        angle = float(np.random.default_rng([key, number, 1]).uniform(-_TILT, _TILT))
        return augment(turned(image, angle), f"crop{number}", picture.name, preprocessing)

    return View(name, draw)


def turned(image: Image.Image, angle: float) -> Image.Image:
    """Rotate by so many degrees, and keep the largest upright part of the same proportions without empty corners."""
    turn = np.radians(abs(angle))
    width, height = image.size
    # A rectangle scaled by so much about the centre has its corners inside the turned one.
    scale = min(
        width / (width * np.cos(turn) + height * np.sin(turn)), height / (width * np.sin(turn) + height * np.cos(turn))
    )
    w, h = max(1.0, width * scale), max(1.0, height * scale)
    box = (round((width - w) / 2), round((height - h) / 2), round((width + w) / 2), round((height + h) / 2))
    return image.rotate(angle, Image.Resampling.BICUBIC).crop(box)
