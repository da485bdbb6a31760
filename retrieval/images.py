"""The one guarded door for pictures: from a file to an upright RGB picture, and from there to a model's input.

What comes through the door (by content, whatever the file is called): JPEG, PNG, WebP, GIF (first frame), BMP, TIFF
(first page), AVIF and HEIC. No other decoder is ever run on a user's files. How they are brought to 8-bit RGB:

    EXIF orientation   applied
    transparency       composited on white
    16-bit channels    the upper 8 bits; greyscale in 32 bits as said at `_grey`
    CMYK               Pillow's plain formula; ICC profiles are ignored, every picture is taken for sRGB
    damage             a truncated file is a failure, never a picture with a grey half

Decoders are called by their own classes and not through `Image.open`: nothing is registered or changed in a host
program, and the limit of pixels is the caller's instead of Pillow's global one. (A few decoders look at
`PIL.Image.MAX_IMAGE_PIXELS` all the same: TIFF, WebP and GIF end at twice its value, 179 megapixels unless the host
raises it, and TIFF warns above its value.) Everything here may be called from several threads at once.
"""

from __future__ import annotations

import importlib
import io
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile

from retrieval.errors import ImageError, ModelError

# Telephones reach 108 megapixels in one shot and medium-format cameras 102; 128 take 512 MB once decoded, and several
# threads decode at once. A PNG of a few kilobytes can claim a thousand times as much.
MAX_PIXELS = 128_000_000
MAX_BYTES = 2**30  # of a file that is read into memory whole; a larger one is no photo

# Lower-case. Browsers on Windows save JPEG as .jfif, Canon and Sony call HEIC .hif.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
    | {".avif", ".heic", ".heif", ".hif"}
)

_HEAD = 64  # bytes that tell a format; enough for the brands of an ISO media file

# How a file of the format begins, its name, and where its decoder is. The first match counts.
_DECODERS = tuple(
    (re.compile(start, re.DOTALL), name, module, decoder)
    for start, name, module, decoder in (
        (rb"\xff\xd8\xff", "JPEG", "PIL.JpegImagePlugin", "JpegImageFile"),
        (rb"\x89PNG\r\n\x1a\n", "PNG", "PIL.PngImagePlugin", "PngImageFile"),
        (rb"RIFF....WEBP", "WebP", "PIL.WebPImagePlugin", "WebPImageFile"),
        (rb"GIF8[79]a", "GIF", "PIL.GifImagePlugin", "GifImageFile"),
        (rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0", "BMP", "PIL.BmpImagePlugin", "BmpImageFile"),
        (rb"II[*+]\0|MM\0[*+]", "TIFF", "PIL.TiffImagePlugin", "TiffImageFile"),
        (rb"....ftyp(?:....)*?avi[fs]", "AVIF", "PIL.AvifImagePlugin", "AvifImageFile"),
        (rb"....ftyp(?:he[iv][cmsx]|mif1|msf1)", "HEIC", "pi_heif", "HeifImageFile"),
    )
)

# What people keep under the name of a picture, for the message alone.
_STRANGERS = tuple(
    (re.compile(start, re.DOTALL | re.IGNORECASE), name)
    for start, name in (
        (rb"\0+\Z", "it begins with nothing but zero bytes"),
        (rb"....ftyp|RIFF....AVI |\x1aE\xdf\xa3", "a video"),
        (rb"%PDF", "a PDF document"),
        (rb"PK\x03\x04", "a ZIP archive"),
        (rb"8BPS", "a Photoshop document"),
        (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL"),
        (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "JPEG 2000"),
        (rb"\s*(?:<!doctype html|<html)", "an HTML page"),
        (rb"\s*(?:<\?xml|<svg)", "an XML or SVG document"),
        (rb"version https://git-lfs", "a Git LFS pointer, the picture itself was never fetched"),
        (rb"(?:\xef\xbb\xbf)?[\t\n\r -~]+\Z", "plain text"),
    )
)

# EXIF orientation -> what turns the stored picture upright (EXIF 2.32, tag 0x0112; 1 and nonsense: nothing to do).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = tuple(_UPRIGHT[i] for i in (5, 6, 7, 8))


@dataclass(frozen=True)
class Photo:
    """A picture as it is looked at, and what its EXIF says of when and where."""

    image: Image.Image  # RGB, upright, detached from its file
    width: int  # pixels, upright
    height: int
    taken_at: datetime | None  # DateTimeOriginal: the camera's clock, no time zone
    latitude: float | None  # degrees, north and east positive; both are there or neither
    longitude: float | None


def read_photo(source: Path | bytes, max_pixels: int = MAX_PIXELS) -> Photo:
    """Decode a picture, once, from a file or from its bytes.

    Raises ImageError and nothing else, with the reason in plain words: empty, truncated, no image, more than
    `max_pixels` (read in the header, before anything is decoded), no permission, vanished.
    """
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), max_pixels)
    with _opened(source) as stream:
        return _decode(stream, max_pixels)


def read_header(path: Path) -> dict[str, Any]:
    """What :func:`read_photo` would tell of a picture beside its pixels, by the names of its fields, undecoded.

    Empty for what is no picture. A PNG that carries its EXIF behind the pixels is not waited for.
    """
    try:
        with _opened(path) as stream:
            name, picture = _open(stream)
            width, height = picture.size
            exif = _exif(picture)
            # TIFF and HEIC say the upright size already, and the same turn again in their EXIF.
            turned = name not in ("TIFF", "HEIC") and _orientation(exif) in _SIDEWAYS
            latitude, longitude = _place(exif)
    except ImageError:
        return {}
    size = {"width": height, "height": width} if turned else {"width": width, "height": height}
    return {**size, "taken_at": _taken_at(exif), "latitude": latitude, "longitude": longitude}


def read_file(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Read the bytes of a file that should be a picture, with the guard of :func:`read_photo`; raises ImageError."""
    with _opened(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > max_bytes:
            raise ImageError(f"{size / 2**20:,.0f} MB, more than the limit of {max_bytes // 2**20:,} MB")
        return stream.read()


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file, and nothing else; what the system refuses is an ImageError."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # not even opened: a pipe would block, a device may act on it
            raise ImageError("a folder, not a file" if stat.S_ISDIR(mode) else "not a regular file")
        with open(path, "rb", opener=_open_without_waiting) as stream:
            yield stream
    except OSError as error:
        raise ImageError(os_reason(error)) from error
    except ValueError as error:  # a NUL in the name
        raise ImageError(f"cannot be opened: {error}") from error


def os_reason(error: OSError) -> str:
    """Say what the operating system refused, in plain words and without the path."""
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return "vanished: there is no such file any more"
    return f"cannot be read: {error.strerror or error}"


def _open_without_waiting(path: str, flags: int) -> int:
    """Open for reading; a pipe that took the file's place a moment ago is not waited for."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _open(stream: IO[bytes]) -> tuple[str, ImageFile.ImageFile]:
    """The name of the format, and the picture with its header read. Raises ImageError."""
    head = stream.read(_HEAD)
    stream.seek(0)
    known = next((known for known in _DECODERS if known[0].match(head)), None)
    if known is None:
        raise ImageError(_stranger(head))
    _, name, module, decoder = known
    try:
        if name == "HEIC":
            _check_item_names(stream)
        return name, getattr(importlib.import_module(module), decoder)(stream)
    except ImageError:
        raise
    except Exception as error:  # decoders raise whatever they like
        raise ImageError(_reason(name, error)) from error


def _decode(stream: IO[bytes], max_pixels: int) -> Photo:
    name, picture = _open(stream)
    try:
        _check_pixels(picture.width * picture.height, max_pixels)
        picture.load()
        image = to_rgb(picture)
        exif = _exif(picture)  # after loading: a PNG may carry it at its end; TIFF and HEIC are turned by the decoder
        turn = _orientation(exif)
        if turn is not None:
            image = image.transpose(turn)
    except ImageError:
        raise
    except Exception as error:  # decoders raise whatever they like
        raise ImageError(_reason(name, error)) from error
    image.info.clear()  # it holds the EXIF still, and whoever looks there would turn the picture once more
    return Photo(image, *image.size, _taken_at(exif), *_place(exif))


def _check_pixels(pixels: int, limit: int) -> None:
    if pixels > limit:
        size = f"{math.ceil(pixels / 1e5) / 10:.1f}".removesuffix(".0")  # rounded up: never equal to the limit
        raise ImageError(f"{size} megapixels, the limit is {limit / 1e6:g}: raise it with --max-megapixels")


def _check_item_names(stream: IO[bytes]) -> None:
    """Refuse a HEIC file with an item type or name that is not UTF-8: pi-heif 1.4 takes the whole process down on it.

    They stand in the `infe` boxes of the file's `meta` box (ISO/IEC 14496-12, 8.11.6).
    """
    data = stream.read()
    stream.seek(0)
    at = size = 0
    kind = b""
    while kind != b"meta" and at + size + 8 <= len(data):
        at += size
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if size < 8:  # 1: the size follows in 64 bits; 0: the box reaches to the end
            size = max(8, int.from_bytes(data[at + 8 : at + 16], "big")) if size == 1 else len(data) - at
    for item in re.finditer(b"infe", data[at : at + size]):
        start = at + item.start() - 4
        end = start + int.from_bytes(data[start : start + 4], "big")
        data[start + 16 : max(end, start + 22)].decode()  # behind version, flags, id and protection


def _stranger(head: bytes) -> str:
    """Why a file that begins like this is not read."""
    if not head:
        return "empty: zero bytes"
    for start, name in _STRANGERS:
        if start.match(head):
            return f"not an image: {name}"
    return "not an image, or of a kind that is not read (JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF and HEIC are)"


_TRUNCATED = re.compile(
    r"truncat|not enough (?:image )?data|unexpected end|end of (?:file|data|image)|eof", re.IGNORECASE
)


def _reason(name: str, error: Exception) -> str:
    """Say in plain words what a decoder raised."""
    if isinstance(error, Image.DecompressionBombError):
        most = 2 * cast("int", Image.MAX_IMAGE_PIXELS) / 1e6
        return f"more than {most:.0f} megapixels, where Pillow's {name} decoder ends (PIL.Image.MAX_IMAGE_PIXELS)"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if isinstance(error, OSError) and error.errno is not None:
        return os_reason(error)
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, EOFError) or _TRUNCATED.search(text):
        return "truncated: the file ends before the picture does"
    return f"damaged or truncated {name}: {text}"


def to_rgb(image: Image.Image) -> Image.Image:
    """Copy a Pillow image of any mode as 8-bit RGB: transparency on white, deep greyscale scaled and not clipped."""
    if image.mode.startswith(("I", "F")):
        image = _grey(image)
    elif image.has_transparency_data:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")  # Pillow has no direct way
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
    values = np.asarray(image)
    if values.dtype.itemsize == 2:
        return Image.fromarray((values >> 8).astype(np.uint8))
    finite = np.isfinite(values)
    values = np.where(finite, values, values.min(where=finite, initial=0)).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if low >= 0:
        low, high = 0.0, next((white for white in (1.0, 255.0, 65535.0) if high <= white), high)
    return Image.fromarray(np.rint((values - low) / ((high - low) or 1.0) * 255).astype(np.uint8))


# EXIF is a courtesy: broken or nonsense, it does not cost the picture. Pillow may raise anything there.


def _exif(picture: ImageFile.ImageFile) -> Image.Exif:
    with suppress(Exception):
        return picture.getexif()
    return Image.Exif()


def _orientation(exif: Image.Exif) -> Image.Transpose | None:
    with suppress(Exception):
        return _UPRIGHT.get(exif.get(ExifTags.Base.Orientation, 1))
    return None


def _taken_at(exif: Image.Exif) -> datetime | None:
    with suppress(Exception):
        written = str(exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal])
        return datetime.strptime(written.strip("\0 "), "%Y:%m:%d %H:%M:%S")
    return None


def _place(exif: Image.Exif) -> tuple[float, float] | tuple[None, None]:
    """(latitude, longitude) in degrees."""
    with suppress(Exception):
        gps, tag = exif.get_ifd(ExifTags.IFD.GPSInfo), ExifTags.GPS
        latitude = _degrees(gps[tag.GPSLatitude], gps[tag.GPSLatitudeRef] == "S")
        longitude = _degrees(gps[tag.GPSLongitude], gps[tag.GPSLongitudeRef] == "W")
        if abs(latitude) <= 90 and abs(longitude) <= 180:  # false for NaN, which stands for 0/0
            return latitude, longitude
    return None, None


def _degrees(parts: Sequence[float], negative: bool) -> float:
    degrees, minutes, seconds = (float(part) for part in parts)
    total = degrees + minutes / 60 + seconds / 3600
    return -total if negative else total


ResizeMode = Literal["squash", "shortest", "longest"]
Interpolation = Literal["bicubic", "bilinear", "nearest"]

_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}
_MAX_SIDE = 8192  # pixels; no model comes near
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
        (height, width), resampling = self.size, _RESAMPLING[self.interpolation]
        if self.resize_mode == "squash":
            return image.resize((width, height), resampling)
        if self.resize_mode == "longest":
            image = image.resize(_scaled(image, max(image.height / height, image.width / width)), resampling)
            canvas = Image.new("RGB", (width, height), (self.fill,) * 3)
            canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
            return canvas
        if height == width:  # torchvision's Resize to the shorter side, which cuts what the other one does not round
            short = min(image.size)
            scaled = (int(width * image.width / short), int(height * image.height / short))
        else:  # here open_clip takes another class, and forgets to hand the interpolation to it
            scaled = _scaled(image, min(image.height / height, image.width / width))
            resampling = Image.Resampling.BICUBIC
        return _resize_and_crop(image, scaled, (width, height), resampling)

    def pixels(self, images: Sequence[Image.Image]) -> NDArray[np.uint8]:
        """Fit pictures and stack them: (B, H, W, 3), what a model's image graph takes."""
        batch = np.empty((len(images), *self.size, 3), np.uint8)
        for row, image in zip(batch, images, strict=True):
            row[:] = np.asarray(self.fit(image))
        return batch


def _scaled(image: Image.Image, ratio: float) -> tuple[int, int]:
    """(width, height) of a picture made smaller by a ratio, at least one pixel each way."""
    return max(1, round(image.width / ratio)), max(1, round(image.height / ratio))


def _resize_and_crop(
    image: Image.Image, scaled: tuple[int, int], size: tuple[int, int], resampling: Image.Resampling
) -> Image.Image:
    """Resize to `scaled` and cut the centre of `size` out of that; both (width, height)."""
    left, top = (round((whole - part) / 2) for whole, part in zip(scaled, size, strict=True))
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
