"""How a decoded picture becomes what a model takes: 8-bit RGB, resized, cropped and padded."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import ModelError

if TYPE_CHECKING:
    from PIL import Image  # imported where there is a picture: a text search has none

ResizeMode = Literal["squash", "shortest", "longest"]
Interpolation = Literal["bicubic", "bilinear", "nearest"]

_MAX_SIDE = 8192  # pixels; no model comes near
Box = tuple[float, float, float, float]  # left, top, right, bottom
_MAX_SCALED = 16_000_000  # pixels of a picture scaled but not cropped yet: one side 300 times the other, at 224


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes a model's input: `open_clip.transform.image_transform` (3.3.0) without torch.

    On RGB pictures the pixels are open_clip's, bit for bit. Normalisation, (pixel / 255 - mean) / std, happens inside
    the model's graph; its two fields stand here because they belong to the same description. Nonsense is a ModelError.
    """

    size: tuple[int, int]  # height, width, in pixels
    mean: tuple[float, float, float]  # R, G, B on the scale 0 to 1
    std: tuple[float, float, float]
    resize_mode: ResizeMode  # squash both sides | shortest: fill, then crop the centre | longest: fit in, then pad
    interpolation: Interpolation
    fill: int = 0  # 0 to 255, the grey of what "longest" pads

    def __post_init__(self) -> None:
        if not _numbers(self.size, 2, int) or not all(1 <= side <= _MAX_SIDE for side in self.size):
            raise _nonsense("size", self.size, f"a height and a width, 1 to {_MAX_SIDE} pixels")
        if not _numbers(self.mean, 3, int, float):
            raise _nonsense("mean", self.mean, "three numbers")
        if not _numbers(self.std, 3, int, float) or not all(value > 0 for value in self.std):
            raise _nonsense("std", self.std, "three numbers above 0")
        if self.resize_mode not in get_args(ResizeMode):
            raise _nonsense("resize_mode", self.resize_mode, f"one of {', '.join(get_args(ResizeMode))}")
        if self.interpolation not in get_args(Interpolation):
            raise _nonsense("interpolation", self.interpolation, f"one of {', '.join(get_args(Interpolation))}")
        if not _numbers((self.fill,), 1, int) or not 0 <= self.fill <= 255:
            raise _nonsense("fill", self.fill, "a grey from 0 to 255")

    @classmethod
    def from_json(cls, described: object) -> Preprocessing:
        """Read what `to_json` wrote; `fill` may be missing, nothing may be unknown. Raises ModelError."""
        if not isinstance(described, Mapping):
            raise ModelError(f"preprocessing must be an object with named fields, not {described!r}")
        known = {field.name for field in fields(cls)}
        unknown, missing = set(described) - known, known - {"fill"} - set(described)
        if unknown or missing:
            raise ModelError(f"preprocessing has {'unknown' if unknown else 'no'} {sorted(unknown or missing)}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in described.items()}
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Describe it in plain lists, strings and numbers: equal descriptions give equal JSON."""
        numbers = {"mean": [float(value) for value in self.mean], "std": [float(value) for value in self.std]}
        return {**asdict(self), "size": list(self.size), **numbers}

    def fit(self, image: Image.Image) -> Image.Image:
        """Resize, crop and pad to an RGB image of exactly `size`. What has been fitted stays as it is."""
        image = image if image.mode == "RGB" else to_rgb(image)
        (height, width) = self.size
        if image.size == (width, height):
            return image
        scaled, resampling = self.scaled(*image.size)
        if self.resize_mode == "shortest":
            return _resize_and_crop(image, scaled, (width, height), resampling)
        return self._padded(image.resize(scaled, resampling))

    def fit_part(self, image: Image.Image, whole: tuple[int, int], box: Box) -> Image.Image:
        """Like `fit`, of a picture (width, height) that stands reduced in a part of an RGB image; always a new image.

        Sizes and offsets are those of the whole picture. Pixels are like those of `fit` but for rounding where nothing
        has been reduced.
        """
        (height, width) = self.size
        scaled, resampling = self.scaled(*whole)
        if self.resize_mode != "shortest":
            return self._padded(_resized(image, scaled, resampling, box))
        if resampling.name == "NEAREST":  # which a box would send to a pixel beside
            return _resize_and_crop(image, scaled, (width, height), resampling)
        across, down = (box[2] - box[0]) / scaled[0], (box[3] - box[1]) / scaled[1]
        left, top = _offsets(scaled, (width, height))
        cut = (left * across, top * down, (left + width) * across, (top + height) * down)
        return _resized(
            image, (width, height), resampling, (box[0] + cut[0], box[1] + cut[1], box[0] + cut[2], box[1] + cut[3])
        )

    def scaled(self, width: int, height: int) -> tuple[tuple[int, int], Image.Resampling]:
        """What a picture is resized to, (width, height), before it is cropped or padded, and how."""
        resampling = _resampling(self.interpolation)
        across, down = width / self.size[1], height / self.size[0]
        if self.resize_mode == "squash":
            return (self.size[1], self.size[0]), resampling
        if self.resize_mode == "longest":
            return _over(width, height, max(across, down)), resampling
        if self.size[0] == self.size[1]:  # torchvision's Resize to the shorter side, which cuts what others round
            short = min(width, height)
            return (int(self.size[1] * width / short), int(self.size[0] * height / short)), resampling
        # Here open_clip takes another class, and forgets to hand the interpolation to it.
        return _over(width, height, min(across, down)), _resampling("bicubic")

    def _padded(self, image: Image.Image) -> Image.Image:
        """In the middle of a grey canvas, if it does not fill it."""
        (height, width) = self.size
        if image.size == (width, height):
            return image
        from PIL import Image

        canvas = Image.new("RGB", (width, height), (self.fill,) * 3)
        canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        return canvas

    def pixels(self, images: Sequence[Image.Image]) -> NDArray[np.uint8]:
        """Fit pictures and stack them: (B, H, W, 3), what a model's image graph takes."""
        batch = np.empty((len(images), *self.size, 3), np.uint8)
        for row, image in zip(batch, images, strict=True):
            row[:] = np.asarray(self.fit(image))
        return batch


def _over(width: int, height: int, ratio: float) -> tuple[int, int]:
    """(width, height) of a picture made smaller by a ratio, at least one pixel each way."""
    return max(1, round(width / ratio)), max(1, round(height / ratio))


def _offsets(scaled: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(left, top) of the centre of `size` in `scaled`; both (width, height)."""
    return round((scaled[0] - size[0]) / 2), round((scaled[1] - size[1]) / 2)


_this_thread = threading.local()


def _resizer() -> Any:
    """This thread's resizer with vector instructions, where there is a wheel of it: an eighth of Pillow's time.

    It is Pillow's algorithm with its two passes in the other order: one value in six differs, by its rounding.
    """
    if not hasattr(_this_thread, "resizer"):
        _this_thread.resizer = None
        with suppress(ImportError):
            from cykooz_resizer import Resizer

            _this_thread.resizer = Resizer()
    return _this_thread.resizer


_FILTERS = {"BICUBIC": "catmull_rom", "BILINEAR": "bilinear"}  # their names, by Pillow's


def _resampling(interpolation: Interpolation) -> Image.Resampling:
    from PIL import Image

    return Image.Resampling[interpolation.upper()]


def _resized(image: Image.Image, size: tuple[int, int], resampling: Image.Resampling, box: Box) -> Image.Image:
    """Resize a part of an image, antialiased; what lies beside the part counts where the filter reaches there."""
    box = (max(0.0, box[0]), max(0.0, box[1]), min(image.width, box[2]), min(image.height, box[3]))  # rounding
    resizer = _resizer()
    if resizer is None or resampling.name not in _FILTERS:
        return image.resize(size, resampling, box)
    import cykooz_resizer as fast
    from PIL import Image

    options = fast.ResizeOptions(
        fast.ResizeAlg.convolution(fast.FilterType[_FILTERS[resampling.name]]),
        use_alpha=False,
        crop_box=fast.CropBox(box[0], box[1], box[2] - box[0], box[3] - box[1]),
    )
    resized = Image.new("RGB", size)
    resizer.resize_pil(image, resized, options)
    return resized


def _resize_and_crop(
    image: Image.Image, scaled: tuple[int, int], size: tuple[int, int], resampling: Image.Resampling
) -> Image.Image:
    """Resize to `scaled` and cut the centre of `size` out of that; both (width, height)."""
    left, top = _offsets(scaled, size)
    box = (left, top, left + size[0], top + size[1])
    if scaled[0] * scaled[1] <= _MAX_SCALED:
        return image.resize(scaled, resampling).crop(box)
    # A picture like a thread would grow to gigabytes on the way: scale the part that stays, alike but for rounding.
    across, down = image.width / scaled[0], image.height / scaled[1]
    return image.resize(size, resampling, box=(box[0] * across, box[1] * down, box[2] * across, box[3] * down))


def _numbers(values: object, count: int, *kinds: type) -> bool:
    """Whether it is a tuple of that many finite numbers, each exactly of one of the kinds (True is no int here)."""
    return (
        isinstance(values, tuple)
        and len(values) == count
        and all(type(value) in kinds and math.isfinite(value) for value in values)
    )


def _nonsense(field: str, value: object, expected: str) -> ModelError:
    return ModelError(f"preprocessing: {field} must be {expected}, not {value!r}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Copy a Pillow image of any mode as 8-bit RGB: transparency on white, deep greyscale scaled and not clipped."""
    if image.mode.startswith(("I", "F")):
        image = _grey(image)
    elif image.has_transparency_data:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")  # Pillow has no direct way
        from PIL import Image

        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(rgba, mask=rgba)
        return rgb
    return image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """Bring greyscale of 16 or 32 bits to 8.

    16 bits: the upper 8, as Pillow does for colour. 32 bits, integer or float, do not say what white is: it is the
    first of 1, 255 and 65535 that no pixel exceeds, or else the picture's own range is stretched. NaN and infinity
    become black.
    """
    from PIL import Image

    values = np.asarray(image)
    if values.dtype.itemsize == 2:
        return Image.fromarray((values >> 8).astype(np.uint8))
    finite = np.isfinite(values)
    values = np.where(finite, values, values.min(where=finite, initial=0)).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if low >= 0:
        low, high = 0.0, next((white for white in (1.0, 255.0, 65535.0) if high <= white), high)
    return Image.fromarray(np.rint((values - low) / ((high - low) or 1.0) * 255).astype(np.uint8))
