"""A folder of pictures as people have them: every format, depth, name and kind of damage, and what becomes of each.

Made from photos that scikit-image and scikit-learn ship inside their packages. `python -m tests.odd_photos FOLDER`
makes one to look at.
"""

from __future__ import annotations

import io
import os
import struct
import sys
import zlib
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

TINY_HEIC = Path(__file__).parent / "data" / "tiny.heic"

_SKIMAGE = (
    "astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png coffee.png coins.png grass.png "
    "gravel.png hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png page.png retina.jpg rocket.jpg text.png"
)
_SKLEARN = "china.jpg flower.jpg"


def real_photos() -> list[Path]:
    """The 20 photos that lie inside scikit-image and scikit-learn; neither package is imported."""
    places = [("skimage", "data", _SKIMAGE), ("sklearn", "datasets/images", _SKLEARN)]
    return [_package(name) / folder / file for name, folder, files in places for file in files.split()]


def _package(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None, f"{name} is not installed: pip install -e '.[dev]'"
    assert spec.origin is not None
    return Path(spec.origin).parent


@dataclass(frozen=True)
class Expected:
    size: tuple[int, int]  # width, height, upright
    colour: tuple[float, float, float]  # mean of R, G, B over the picture, to within 3


@dataclass(frozen=True)
class OddFolder:
    path: Path
    good: dict[str, Expected] = field(default_factory=dict)  # path relative to the folder -> what is read
    bad: dict[str, str] = field(default_factory=dict)  # -> a part of the reason it is not read
    skipped: list[str] = field(default_factory=list)  # never looked into: no scan yields these


def make_odd_folder(path: Path) -> OddFolder:
    """Fill a new folder. No two readable files have the same bytes."""
    odd = OddFolder(path)
    path.mkdir(parents=True)
    _formats(odd)
    _depths(odd)
    _transparency(odd)
    _orientations(odd)
    _names(odd)
    _damaged(odd)
    _left_out(odd)
    _links(odd)
    return odd


def picture(number: int) -> Image.Image:
    """A small RGB picture, another one for every number."""
    photo = _thumbnail(number % 20)
    left = number // 20
    return photo.crop((left, left, left + 90 + number % 7, left + 60 + number % 5))


@lru_cache
def _thumbnail(index: int) -> Image.Image:
    with Image.open(real_photos()[index]) as photo:
        return photo.convert("RGB").resize((108, 76))


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png16(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, (H, W, 3) or (H, W): Pillow writes none in colour."""
    height, width = values.shape[:2]
    rows = values.astype(">u2").tobytes()
    stride = len(rows) // height
    scanlines = b"".join(b"\0" + rows[i : i + stride] for i in range(0, len(rows), stride))
    return png(
        struct.pack(">IIBBBBB", width, height, 16, 2 if values.ndim == 3 else 0, 0, 0, 0), zlib.compress(scanlines)
    )


def png(header: bytes, data: bytes) -> bytes:
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def _keep(odd: OddFolder, name: str, content: bytes, shown: Image.Image | np.ndarray) -> None:
    """Write a readable file that shows a picture, (H, W) or (H, W, 3)."""
    pixels = np.asarray(shown, dtype=np.float64)
    pixels = pixels if pixels.ndim == 3 else np.stack([pixels] * 3, axis=-1)
    red, green, blue = pixels.mean(axis=(0, 1))
    _write(odd.path / name, content)
    odd.good[name] = Expected((pixels.shape[1], pixels.shape[0]), (red, green, blue))


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _formats(odd: OddFolder) -> None:
    p = [picture(i) for i in range(20)]
    high = {"quality": 95}
    _keep(odd, "formats/baseline.jpg", encode(p[0], "JPEG", **high), p[0])
    _keep(odd, "formats/progressive.jpeg", encode(p[1], "JPEG", progressive=True, **high), p[1])
    _keep(odd, "formats/colour.png", encode(p[2], "PNG"), p[2])
    _keep(odd, "formats/lossy.webp", encode(p[3], "WEBP", **high), p[3])
    _keep(odd, "formats/lossless.webp", encode(p[4], "WEBP", lossless=True), p[4])
    _keep(odd, "formats/still.gif", encode(p[5], "GIF"), p[5].quantize(256).convert("RGB"))
    moving = {"save_all": True, "append_images": [p[7].resize(p[6].size)], "duration": 100}
    _keep(odd, "formats/animated.gif", encode(p[6], "GIF", **moving), p[6].quantize(256).convert("RGB"))
    moving = {"save_all": True, "append_images": [p[7].resize(p[8].size)], "lossless": True}
    _keep(odd, "formats/animated.webp", encode(p[8], "WEBP", **moving), p[8])
    _keep(odd, "formats/plain.bmp", encode(p[9], "BMP"), p[9])
    _keep(odd, "formats/plain.tif", encode(p[10], "TIFF"), p[10])
    _keep(odd, "formats/packed.tiff", encode(p[11], "TIFF", compression="tiff_lzw"), p[11])
    _keep(odd, "formats/pages.tif", encode(p[12], "TIFF", save_all=True, append_images=[p[13]]), p[12])
    _keep(odd, "formats/photo.avif", encode(p[14], "AVIF", quality=90), p[14])
    _keep(odd, "formats/grey.jpg", encode(p[15].convert("L"), "JPEG", **high), p[15].convert("L"))
    _keep(odd, "formats/a png.jpg", encode(p[16], "PNG"), p[16])
    _keep(odd, "formats/a jpeg.heic", encode(p[17], "JPEG", **high), p[17])
    _keep(odd, "formats/an avif.png", encode(p[18], "AVIF", quality=90), p[18])
    # coffee.png with a quarter turn, as data/README.md says; this package cannot write HEIC.
    coffee = _thumbnail(6).resize((96, 64)).transpose(Image.Transpose.ROTATE_270)
    _keep(odd, "formats/iphone.heic", TINY_HEIC.read_bytes(), coffee)


def _depths(odd: OddFolder) -> None:
    p = [picture(i) for i in range(20, 28)]
    grey = [np.asarray(each.convert("L")) for each in p]
    _keep(odd, "depths/grey16.png", png16(grey[0] * np.uint16(257)), grey[0])
    _keep(odd, "depths/colour16.png", png16(np.asarray(p[1]) * np.uint16(257)), p[1])
    _keep(odd, "depths/grey16.tif", encode(Image.fromarray(grey[2] * np.uint16(257)), "TIFF"), grey[2])
    _keep(odd, "depths/integers.tif", encode(Image.fromarray(grey[3] * np.int32(257)), "TIFF"), grey[3])
    _keep(odd, "depths/float.tif", encode(Image.fromarray(np.float32(grey[4] / 255)), "TIFF"), grey[4])
    bits = p[5].convert("1")
    _keep(odd, "depths/one bit.png", encode(bits, "PNG"), bits.convert("L"))
    cyan, magenta, yellow = (255 - np.asarray(p[6])).transpose(2, 0, 1)
    cmyk = Image.merge("CMYK", [Image.fromarray(ink) for ink in (cyan, magenta, yellow, 0 * cyan)])
    _keep(odd, "depths/cmyk.jpg", encode(cmyk, "JPEG", quality=95), p[6])
    _keep(odd, "depths/cmyk.tif", encode(cmyk, "TIFF"), p[6])


def _transparency(odd: OddFolder) -> None:
    p = [picture(i) for i in range(30, 34)]

    def on_white(image: Image.Image) -> tuple[Image.Image, np.ndarray]:
        """An opaque left half and a right half of a quarter's opacity; the mask, and how that looks on white."""
        alpha = np.full(image.size[::-1], 255, np.uint8)
        alpha[:, image.width // 2 :] = 64
        share = alpha[..., None] / 255
        return Image.fromarray(alpha), np.asarray(image) * share + 255 * (1 - share)

    mask, shown = on_white(p[0])
    p[0].putalpha(mask)
    _keep(odd, "transparency/rgba.png", encode(p[0], "PNG"), shown)
    mask, shown = on_white(p[1])
    p[1].putalpha(mask)
    _keep(odd, "transparency/rgba.webp", encode(p[1], "WEBP", lossless=True), shown)
    grey = p[2].convert("L")
    mask, shown = on_white(grey.convert("RGB"))
    grey.putalpha(mask)
    _keep(odd, "transparency/la.png", encode(grey, "PNG"), shown)
    palette = p[3].quantize(16)
    shown = np.where((np.asarray(palette) == 3)[..., None], 255, np.asarray(palette.convert("RGB")))
    _keep(odd, "transparency/palette.png", encode(palette, "PNG", transparency=3), shown)
    _keep(odd, "transparency/palette.gif", encode(palette, "GIF", transparency=3), shown)


def _orientations(odd: OddFolder) -> None:
    for orientation in range(1, 9):
        stored = picture(40 + orientation)
        upright = stored if orientation < 5 else stored.transpose(Image.Transpose.TRANSPOSE)
        content = encode(stored, "JPEG", quality=95, exif=exif(orientation))
        _keep(odd, f"orientation/{orientation}.jpg", content, upright)


def _names(odd: OddFolder) -> None:
    names = [
        "UPPER CASE.JPG",
        "Mixed.JpEg",
        " leading and trailing .jpg",
        'it\'s "quoted".jpg',
        "new\nline.jpg",
        "tab\tand \x1b[31mescape.jpg",
        "back\\slash.jpg",
        "-rf.jpg",
        "100%20#?*[a]&.jpg",
        "日本 ñandú 🐈.jpg",
        "two.dots.png.jpg",
        "x" * 250 + ".jpg",
        os.fsdecode(b"latin caf\xe9.jpg"),
        "folder.jpg/inside.jpg",
        "/".join(["deep"] * 40) + "/end.jpg",
    ]
    for number, name in enumerate(names, start=60):
        try:
            _keep(odd, f"names/{name}", encode(picture(number), "JPEG", quality=95), picture(number))
        except OSError:  # a file system that has no such names, as that of a Mac
            continue


def _damaged(odd: OddFolder) -> None:
    def bad(name: str, content: bytes, reason: str) -> None:
        _write(odd.path / "bad" / name, content)
        odd.bad[f"bad/{name}"] = reason

    kinds = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "avif": "AVIF"}
    whole = {suffix: encode(picture(80), kind) for suffix, kind in kinds.items()} | {"heic": TINY_HEIC.read_bytes()}
    for suffix, content in whole.items():
        bad(f"half.{suffix}", content[: len(content) // 2], "truncated")
    bad("start only.jpg", whole["jpg"][:20], "truncated")
    bad("empty.jpg", b"", "empty")
    bad("text.jpg", b"Dear diary, this is no picture.\n" * 9, "plain text")
    bad("page.jpg", b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>", "an HTML page")
    bad("paper.png", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF document")
    bad("film.jpg", b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(99), "a video")
    bad("zeros.jpg", bytes(5000), "zero bytes")
    bad("noise.jpg", np.random.default_rng(0).bytes(5000), "not an image")
    bad("noise in the middle.png", whole["png"][:3000] + b"noise" * 9 + whole["png"][3045:], "damaged or")
    # 2,500 megapixels in some kilobytes: the header tells, nothing may be decoded to find out.
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    bad("bomb.png", png(header, zlib.compress(bytes(1_000_000))), "2500 megapixels, the limit is 128")


def _left_out(odd: OddFolder) -> None:
    content = encode(picture(90), "JPEG")
    names = [".hidden.jpg", "._apple.jpg", ".thumbnails/a.jpg", "@eaDir/a.jpg/SYNOPHOTO_THUMB_XL.jpg", "__MACOSX/a.jpg"]
    for name in [*names, "notes.txt", "film.mp4", "drawing.svg", "no suffix", "raw.psd"]:
        _write(odd.path / "left out" / name, content)
        odd.skipped.append(f"left out/{name}")
    if hasattr(os, "mkfifo"):
        os.mkfifo(odd.path / "left out" / "pipe.jpg")
        odd.skipped.append("left out/pipe.jpg")


def _links(odd: OddFolder) -> None:
    """Links to hidden places count (git-annex keeps pictures so); those to nowhere or back into the folder do not."""
    first, second = picture(91), picture(92)
    _keep(odd, "links/picture.jpg", encode(first, "JPEG", quality=95), first)
    _keep(odd, "links/album/picture.jpg", encode(second, "JPEG", quality=95), second)
    hidden = odd.path / ".elsewhere"
    hidden.mkdir()
    for name in ("picture.jpg", "album"):
        (odd.path / "links" / name).rename(hidden / name)
    for name, target in {
        "picture.jpg": "../.elsewhere/picture.jpg",
        "album": "../.elsewhere/album",
        "up": "..",
        "here": ".",
        "formats": "../formats",
        "same.jpg": "../formats/baseline.jpg",
        "gone.jpg": "no such file.jpg",
        "myself.jpg": "myself.jpg",
    }.items():
        (odd.path / "links" / name).symlink_to(target)
        if f"links/{name}" not in odd.good and name != "album":
            odd.skipped.append(f"links/{name}")


if __name__ == "__main__":
    make_odd_folder(Path(sys.argv[1]))
