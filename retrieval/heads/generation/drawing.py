"""Generators in use: pictures of sentences, sheets of them, and the odd ones of an index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from indexes.vectors import Vectors, as_vectors
from retrieval.encoders import Encoder
from retrieval.errors import DataError, ModelError, UsageError
from retrieval.heads import check_fingerprint
from retrieval.heads.generation.autoencoder import Autoencoder
from retrieval.heads.generation.gan import PictureGenerator
from retrieval.heads.generation.material import Material
from retrieval.heads.generation.storage import Stored
from retrieval.heads.modalities import IMAGE
from retrieval.heads.pixels import Pixels, read_squares
from retrieval.library import Library

_GAP = 2  # pixels between the pictures of a sheet
_SHOWN, _EACH = 16, 4  # sentences of a sheet of samples, and pictures made of each


@dataclass(frozen=True, eq=False)
class Drawn:
    """What was made of T sentences: (T, K, S, S, 3) pictures, and the cosine of each to its sentence (T, K)."""

    pixels: Pixels
    cosines: NDArray[np.float32]

    @property
    def side(self) -> int:
        """S."""
        return int(self.pixels.shape[2])


def as_pixels(pictures: NDArray[np.float32]) -> Pixels:
    """(N, S, S, 3) from 0 to 1 -> bytes."""
    pixels: Pixels = np.rint(pictures.clip(0, 1) * 255).astype(np.uint8)
    return pixels


def picture_vectors(encoder: Encoder, pixels: Pixels) -> Vectors:
    """Pictures in memory (N, S, S, 3) -> (N, D) unit rows of the image tower."""
    chunks = [pixels[i : i + 64] for i in range(0, len(pixels), 64)]
    return as_vectors(
        np.concatenate([encoder.encode_images([Image.fromarray(one) for one in part]) for part in chunks])
    )


def draw(generator: Stored, texts: Sequence[str], encoder: Encoder, *, count: int = 1, seed: int = 0) -> Drawn:
    """Make ``count`` pictures of each sentence; the same for the same seed.

    Raises:
        UsageError: a sentence is empty.
        ModelError: the generator makes no pictures. ModelMismatch: it is another model's.
    """
    if not isinstance(generator, PictureGenerator):
        raise ModelError(f"this generator makes {generator.target} vectors, and no pictures: fit one of the kind gan")
    if not texts or not all(text.strip() for text in texts):
        raise UsageError("the sentence is empty: say what the picture is to show")
    check_fingerprint("the generator", generator.fingerprint, encoder.fingerprint)
    vectors = encoder.encode_texts(list(texts))
    pixels = as_pixels(generator.generate(np.repeat(vectors, count, axis=0), seed))
    cosines = (picture_vectors(encoder, pixels) * np.repeat(vectors, count, axis=0)).sum(axis=1)
    return Drawn(pixels.reshape(len(texts), count, *pixels.shape[1:]), cosines.reshape(len(texts), count))


def sheet(pixels: Pixels) -> Image.Image:
    """(T, K, S, S, 3) -> T rows of K pictures on white."""
    rows, columns, side = pixels.shape[:3]
    step = side + _GAP
    canvas = np.full((rows * step - _GAP, columns * step - _GAP, 3), 255, np.uint8)
    for row in range(rows):
        for column in range(columns):
            top, left = row * step, column * step
            canvas[top : top + side, left : left + side] = pixels[row, column]
    return Image.fromarray(canvas)


def write(drawn: Drawn, out: Path, scale: int = 1) -> None:
    """Write what was made as one picture. UsageError where that is not possible."""
    _save(sheet(drawn.pixels), out, scale)


def write_samples(generator: Stored, material: Material, part: str, out: Path, seed: int = 0) -> None:
    """Write a sheet: of the first sentences of a part the real picture, and some that were made of each.

    Raises:
        ModelError: the generator makes no pictures. DataError: the part has no sentences.
    """
    if not isinstance(generator, PictureGenerator):
        raise ModelError(f"this generator makes {generator.target} vectors, and no pictures: there are no samples")
    spoken = material.spoken(part)
    _, first = np.unique(material.owner[spoken], return_index=True)
    rows = spoken[first][:_SHOWN]
    if not len(rows):
        raise DataError(f"nothing is said of the pictures of the split {part}: there is nothing to make pictures of")
    made = as_pixels(generator.generate(np.repeat(material.texts[rows], _EACH, axis=0), seed))
    side = made.shape[1]
    real, _ = read_squares([material.pictures[row] for row in material.owner[rows].tolist()], side)
    both = np.concatenate([real[:, None], made.reshape(len(rows), _EACH, *made.shape[1:])], axis=1)
    half = -(-len(rows) // 2)  # two columns of sentences
    both = np.concatenate([both, np.full((2 * half - len(rows), *both.shape[1:]), 255, np.uint8)])
    _save(sheet(np.concatenate([both[:half], both[half:]], axis=1)), out)


def _save(image: Image.Image, out: Path, scale: int = 1) -> None:
    if scale > 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    try:
        image.save(out)
    except (OSError, ValueError) as error:  # a suffix that Pillow does not know is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{out} cannot be written as a picture: {reason}") from error


def oddest(generator: Stored, library: Library, count: int) -> list[tuple[Path, float]]:
    """The pictures of an index that are least like what an autoencoder has learnt from, from their stored vectors.

    Raises:
        ModelError: the generator is no autoencoder over pictures. ModelMismatch: it is another model's.
    """
    if not isinstance(generator, Autoencoder) or IMAGE not in generator.modalities:
        raise ModelError("this generator knows no odd pictures: fit one of the kind vae")
    store = library.store
    check_fingerprint("the generator", generator.fingerprint, store.model.fingerprint)
    shown = np.flatnonzero(~store.texts())
    if not len(shown):
        return []
    oddness = generator.oddness({IMAGE: store.vectors()[shown]})
    order = np.argsort(-oddness, kind="stable")[:count]
    paths = store.paths()
    return [(library.root / paths[shown[at]], float(oddness[at])) for at in order.tolist()]
