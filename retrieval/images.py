"""The one guarded door for pictures: from a file to an upright RGB picture, and from there to a model's input.

What comes through the door (by content, whatever the file is called): JPEG, PNG, WebP, GIF (first frame), BMP, TIFF
(first page), AVIF and HEIC. No other decoder is ever run on a user's files. How they are brought to 8-bit RGB:

    EXIF orientation   applied
    transparency       composited on white
    16-bit channels    the upper 8 bits; greyscale in 32 bits as said at `_grey`
    CMYK               Pillow's plain formula; ICC profiles are ignored, every picture is taken for sRGB
    damage             a truncated file is a failure, never a picture with a grey half

What a model is to see comes out at the model's size (`read_photo` with a `Preprocessing`), and large JPEG files are
scaled by their decoder on the way. That is the one way from a file to a vector: of one model, all pictures take it.

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from PIL import ExifTags, Image, ImageFile

from retrieval.errors import ImageError
from retrieval.preprocessing import Box, to_rgb
from retrieval.preprocessing import Preprocessing as Preprocessing  # the same door

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
# Where the first column, and the first row, of the stored picture come to lie on the other side.
_TO_THE_RIGHT, _TO_THE_BOTTOM = (tuple(_UPRIGHT[i] for i in turns) for turns in ((2, 3, 6, 7), (3, 4, 7, 8)))
_KEPT = 2  # times the model's size are left of a JPEG that its decoder scales: docs/performance.md has the drift


@dataclass(frozen=True)
class Photo:
    """A picture as it is looked at, and what its EXIF says of when and where."""

    image: Image.Image  # RGB, upright, detached from its file
    width: int  # pixels, upright, of the picture in the file
    height: int
    taken_at: datetime | None  # DateTimeOriginal: the camera's clock, no time zone
    latitude: float | None  # degrees, north and east positive; both are there or neither
    longitude: float | None


def read_photo(source: Path | bytes, max_pixels: int = MAX_PIXELS, preprocessing: Preprocessing | None = None) -> Photo:
    """Decode a picture, once, from a file or from its bytes.

    With `preprocessing` its image is what a model takes, like `preprocessing.fit` of the whole picture but for the
    rounding of a faster way there: vectors of the two have a cosine of at least 0.998, tested on real photos.

    Raises ImageError and nothing else, with the reason in plain words: empty, truncated, no image, more than
    `max_pixels` (read in the header, before anything is decoded), no permission, missing.
    """
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), max_pixels, preprocessing)
    with _opened(source) as stream:
        return _decode(stream, max_pixels, preprocessing)


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
        return "missing: there is no such file"
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


def _decode(stream: IO[bytes], max_pixels: int, preprocessing: Preprocessing | None) -> Photo:
    name, picture = _open(stream)
    try:
        stored = picture.size
        _check_pixels(stored[0] * stored[1], max_pixels)
        part = _reduce(picture, preprocessing) if preprocessing and name == "JPEG" else None
        picture.load()
        exif = _exif(picture)  # after loading: a PNG may carry it at its end; TIFF and HEIC are turned by the decoder
        turn = _orientation(exif)
        plain = picture.mode == "RGB" and not picture.has_transparency_data
        image = picture if plain and preprocessing else to_rgb(picture)  # what is resized need not be copied first
        if turn is not None:
            image = image.transpose(turn)
        size = image.size
        if preprocessing and part:
            size = stored if turn not in _SIDEWAYS else (stored[1], stored[0])
            image = preprocessing.fit_part(image, size, _turned(part, image.size, turn))
        elif preprocessing:
            image = preprocessing.fit_part(image, size, (0, 0, *size))
    except ImageError:
        raise
    except Exception as error:  # decoders raise whatever they like
        raise ImageError(_reason(name, error)) from error
    image.info.clear()  # it holds the EXIF still, and whoever looks there would turn the picture once more
    return Photo(image, *size, _taken_at(exif), *_place(exif))


def _reduce(picture: ImageFile.ImageFile, preprocessing: Preprocessing) -> tuple[float, float] | None:
    """Have a JPEG decoded at 1/2, 1/4 or 1/8 (libjpeg scales inside its DCT) if that leaves enough for a model.

    Returns the size of the picture in pixels of what will be decoded: the last column and row may be there in part.
    """
    sideways = _orientation(_exif(picture)) in _SIDEWAYS
    (width, height), resampling = preprocessing.scaled(*(picture.size[::-1] if sideways else picture.size))
    if resampling == Image.Resampling.NEAREST:
        return None
    needed = (_KEPT * height, _KEPT * width) if sideways else (_KEPT * width, _KEPT * height)
    drafted = picture.draft(None, needed)
    return drafted[1][2:] if drafted else None


def _turned(part: tuple[float, float], size: tuple[int, int], turn: Image.Transpose | None) -> Box:
    """Where in an upright image of a size the picture lies that filled `part` of it from the upper left as stored."""
    width, height = reversed(part) if turn in _SIDEWAYS else part
    left = size[0] - width if turn in _TO_THE_RIGHT else 0.0
    top = size[1] - height if turn in _TO_THE_BOTTOM else 0.0
    return left, top, left + width, top + height


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
