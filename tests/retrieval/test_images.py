"""The door for pictures: values against pictures made by hand, damage of every kind, and open_clip's own transform."""

import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import warnings
import zlib
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from retrieval.errors import ImageError, ModelError
from retrieval.images import IMAGE_SUFFIXES, MAX_PIXELS, Preprocessing, read_header, read_photo
from retrieval.preprocessing import to_rgb
from tests.odd_photos import TINY_HEIC, encode, exif, make_odd_folder, picture, png16, real_photos


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    return make_odd_folder(tmp_path_factory.mktemp("odd") / "folder")


def pixels(source, **options):
    return np.asarray(read_photo(source, **options).image)


def blocks(colours):
    """A picture of 16×16 blocks, so that even a lossy format keeps the colours in their middle."""
    return Image.fromarray(np.kron(np.asarray(colours, np.uint8), np.ones((16, 16, 1), np.uint8)))


def middles(image):
    return np.asarray(image).astype(int)[8::16, 8::16]


# --- What is read ---


def test_every_readable_oddity_has_its_size_and_its_colour(odd):
    wrong = {}
    for name, expected in odd.good.items():
        photo = read_photo(odd.path / name)
        colour = np.asarray(photo.image, np.float64).mean(axis=(0, 1))
        if photo.image.size != expected.size or np.abs(colour - expected.colour).max() > 3:
            wrong[name] = (photo.image.size, expected.size, colour, expected.colour)
        assert (photo.image.mode, photo.width, photo.height) == ("RGB", *photo.image.size), name
    assert not wrong
    assert {Path(name).suffix.lower() for name in odd.good} <= IMAGE_SUFFIXES
    assert len({(odd.path / name).read_bytes() for name in odd.good}) == len(odd.good)  # what the helper promises


def test_every_unreadable_oddity_has_its_reason(odd):
    for name, reason in odd.bad.items():
        with pytest.raises(ImageError) as raised:
            read_photo(odd.path / name)
        assert reason in str(raised.value), name
        assert str(odd.path) not in str(raised.value)


def beside_pixels(photo) -> dict:
    return {name: getattr(photo, name) for name in ("width", "height", "taken_at", "latitude", "longitude")}


def test_the_header_says_what_the_whole_picture_does(odd, tmp_path):
    for path in odd.good:
        assert read_header(odd.path / path) == beside_pixels(read_photo(odd.path / path)), path
    for photo in (*real_photos(), TINY_HEIC):
        assert read_header(photo) == beside_pixels(read_photo(photo)), photo
    for path in odd.bad:  # a header may be whole where the rest is not
        assert read_header(odd.path / path).keys() in (set(), beside_pixels(read_photo(TINY_HEIC)).keys())
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
        for orientation in range(1, 9):
            file = tmp_path / f"{orientation}.{kind}"
            file.write_bytes(encode(picture(1), kind, exif=exif(orientation)))
            assert read_header(file) == beside_pixels(read_photo(file)), file
    assert read_header(tmp_path / "gone.jpg") == read_header(tmp_path) == {}


def test_real_photos_equal_a_plain_pillow_read():
    for path in real_photos():
        with Image.open(path) as image:
            expected = np.asarray(image.convert("RGB"))
        assert np.array_equal(pixels(path), expected), path.name
        assert np.array_equal(pixels(path.read_bytes()), expected), path.name


# Row and column of the stored picture that are seen at row y, column x (EXIF 2.32, orientation).
STORED = {
    1: lambda y, x, h, w: (y, x),
    2: lambda y, x, h, w: (y, w - 1 - x),
    3: lambda y, x, h, w: (h - 1 - y, w - 1 - x),
    4: lambda y, x, h, w: (h - 1 - y, x),
    5: lambda y, x, h, w: (x, y),
    6: lambda y, x, h, w: (h - 1 - x, y),
    7: lambda y, x, h, w: (h - 1 - x, w - 1 - y),
    8: lambda y, x, h, w: (x, w - 1 - y),
}
SIX = [[[250, 0, 0], [0, 250, 0], [0, 0, 250]], [[250, 250, 0], [0, 250, 250], [10, 10, 10]]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(kind, orientation):
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}, "AVIF": {"quality": 95}}
    photo = read_photo(encode(blocks(SIX), kind, exif=exif(orientation), **options.get(kind, {})))
    height, width = (2, 3) if orientation < 5 else (3, 2)
    seen = [[SIX[i][j] for i, j in (STORED[orientation](y, x, 2, 3) for x in range(width))] for y in range(height)]
    assert (photo.width, photo.height) == (16 * width, 16 * height)
    assert np.abs(middles(photo.image) - seen).max() <= 12
    assert photo.image.getexif().get(0x0112) is None  # or a host's exif_transpose would turn it again


def test_heic_is_turned_once():
    photo = read_photo(TINY_HEIC)
    coffee = next(path for path in real_photos() if path.name == "coffee.png")
    upright = Image.open(coffee).convert("RGB").resize((96, 64)).transpose(Image.Transpose.ROTATE_270)
    assert photo.image.size == (64, 96)
    assert np.abs(np.asarray(photo.image).astype(int) - np.asarray(upright)).mean() < 6
    assert photo.taken_at == datetime(2021, 7, 4, 9, 30, 15)


def test_nonsense_orientation_changes_nothing():
    for value in (0, 9, 255):
        assert np.array_equal(pixels(encode(blocks(SIX), "PNG", exif=exif(value))), np.asarray(blocks(SIX)))


RAMP = np.arange(0, 65536, 256 + 1, dtype=np.uint16).reshape(16, 16)  # 0, 257, … 65535: the 256 levels of 8 bits
LEVELS = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png16(RAMP), LEVELS),
        (encode(Image.fromarray(RAMP), "TIFF"), LEVELS),
        (encode(Image.fromarray(RAMP), "TIFF", compression="tiff_deflate"), LEVELS),
        (encode(Image.frombytes("I;16B", (16, 16), RAMP.astype(">u2").tobytes()), "TIFF"), LEVELS),
        (encode(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), LEVELS),
        (encode(Image.fromarray(LEVELS.astype(np.int32)), "TIFF"), LEVELS),
        (encode(Image.fromarray(RAMP.astype(np.int32) * 30000 - 10**9), "TIFF"), LEVELS),
        (encode(Image.fromarray((LEVELS / 255).astype(np.float32)), "TIFF"), LEVELS),
        (encode(Image.fromarray(LEVELS.astype(np.float32)), "TIFF"), LEVELS),
        (encode(Image.fromarray((LEVELS * 1000.0 - 5000).astype(np.float32)), "TIFF"), LEVELS),
        (encode(Image.fromarray(np.full((2, 2), -7, np.int32)), "TIFF"), np.zeros((2, 2))),
        (encode(Image.fromarray(np.array([[np.nan, 0.5], [np.inf, 1]], np.float32)), "TIFF"), [[0, 128], [0, 255]]),
    ],
    ids=str,
)
def test_deep_greyscale_is_scaled_and_not_clipped(content, expected):
    assert np.array_equal(pixels(content), np.stack([expected] * 3, axis=-1))


def test_deep_colour_keeps_the_upper_bits():
    colours = np.array([[[0, 257, 65535], [32768, 512, 65279]]], np.uint16)
    assert pixels(png16(colours)).tolist() == [[[0, 1, 255], [128, 2, 254]]]


def test_cmyk_inks():
    inks = (
        blocks(np.zeros((1, 5, 3))).size,
        [(255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0)],
    )
    image = Image.new("CMYK", inks[0])
    for i, ink in enumerate(inks[1]):
        image.paste(ink, (16 * i, 0, 16 * i + 16, 16))
    expected = np.array([[[0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0], [255, 255, 255]]])
    assert np.array_equal(middles(read_photo(encode(image, "TIFF")).image), expected)
    inverted = encode(image, "JPEG", quality=100)  # as Photoshop writes it: an Adobe marker, and every ink inverted
    assert b"Adobe" in inverted
    assert np.abs(middles(read_photo(inverted).image) - expected).max() <= 2


def test_transparency_is_white():
    rgba = Image.new("RGBA", (3, 1))
    for x, colour in enumerate([(10, 20, 30, 255), (10, 20, 30, 0), (0, 100, 200, 51)]):
        rgba.putpixel((x, 0), colour)
    expected = [[[10, 20, 30], [255, 255, 255], [204, 224, 244]]]  # the last: a fifth of itself, four of white
    assert pixels(encode(rgba, "PNG")).tolist() == expected
    assert pixels(encode(rgba, "TIFF")).tolist() == expected
    grey = Image.new("LA", (2, 1))
    grey.putpixel((0, 0), (100, 51))
    grey.putpixel((1, 0), (100, 255))
    assert pixels(encode(grey, "PNG")).tolist() == [[[224] * 3, [100] * 3]]
    palette = Image.new("P", (3, 1))
    palette.putpalette([9, 8, 7, 200, 100, 0, 1, 2, 3])
    palette.putdata([0, 1, 2])
    assert pixels(encode(palette, "PNG")).tolist() == [[[9, 8, 7], [200, 100, 0], [1, 2, 3]]]
    for kind in ("PNG", "GIF"):
        shown = pixels(encode(palette, kind, transparency=1)).tolist()
        assert shown == [[[9, 8, 7], [255, 255, 255], [1, 2, 3]]], kind
    by_entry = encode(palette, "PNG", transparency=bytes([255, 51, 0]))
    assert pixels(by_entry).tolist() == [[[9, 8, 7], [244, 224, 204], [255, 255, 255]]]
    keyed = encode(Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)), "PNG", transparency=(4, 5, 6))
    assert pixels(keyed).tolist() == [[[1, 2, 3], [255, 255, 255]]]
    premultiplied = Image.frombytes("RGBa", (1, 1), bytes([0, 20, 40, 51]))  # what some TIFF files decode to
    assert to_rgb(premultiplied).getpixel((0, 0)) == (204, 224, 244)
    assert to_rgb(Image.frombytes("La", (1, 1), bytes([20, 51]))).getpixel((0, 0)) == (224, 224, 224)


def test_the_first_of_several_pictures_is_read():
    first, second = picture(0), picture(0).transpose(Image.Transpose.ROTATE_180)
    for kind, options in {"MPO": {"quality": 95}, "TIFF": {}, "WEBP": {"lossless": True}, "PNG": {}}.items():
        content = encode(first.copy(), kind, save_all=True, append_images=[second.copy()], **options)
        assert np.abs(pixels(content).astype(int) - np.asarray(first)).mean() < 6, kind


# --- When and where ---


def tagged(taken_at="2019:12:31 23:59:58", latitude=("N", (48.0, 51.0, 29.5)), longitude=("E", (2.0, 17.0, 40.2))):
    tags = Image.Exif()
    tags.get_ifd(0x8769)[36867] = taken_at
    tags.get_ifd(0x8825).update(dict(enumerate([*latitude, *longitude], start=1)))
    return tags.tobytes()


def facts(content):
    photo = read_photo(content)
    return photo.taken_at, photo.latitude, photo.longitude


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_date_and_place(kind):
    content = encode(picture(1), kind, exif=tagged())
    for each in [content, packed(content)] if kind == "TIFF" else [content]:
        taken_at, latitude, longitude = facts(each)
        assert taken_at == datetime(2019, 12, 31, 23, 59, 58)
        assert latitude == pytest.approx(48 + 51 / 60 + 29.5 / 3600)
        assert longitude == pytest.approx(2 + 17 / 60 + 40.2 / 3600)


def packed(tiff):
    """Compress the one strip of a TIFF, which Pillow then decodes by another way (it cannot write such a file)."""
    entries = {}
    directory = struct.unpack_from("<L", tiff, 4)[0]
    for at in range(directory + 2, directory + 2 + 12 * struct.unpack_from("<H", tiff, directory)[0], 12):
        entries[struct.unpack_from("<H", tiff, at)[0]] = at
    start, length = (struct.unpack_from("<L", tiff, entries[tag] + 8)[0] for tag in (273, 279))
    strip = zlib.compress(tiff[start : start + length])
    content = bytearray(tiff + strip)
    for tag, value in {259: 8, 273: len(tiff), 279: len(strip)}.items():  # compression: deflate; where; how long
        struct.pack_into("<HHLL", content, entries[tag], tag, 4, 1, value)
    return bytes(content)


def test_south_and_west_are_negative():
    content = encode(
        picture(1), "JPEG", exif=tagged(latitude=("S", (33.0, 30.0, 0.0)), longitude=("W", (70.0, 0.0, 36.0)))
    )
    assert facts(content)[1:] == pytest.approx((-33.5, -70.01))


@pytest.mark.parametrize(
    "tags",
    [
        tagged("0000:00:00 00:00:00", ("N", (7.0, 7.0, 7.0))).replace(struct.pack("<2L", 7, 1), bytes(8)),  # 0/0
        tagged("    :  :     :  :  ", ("N", (91.0, 0.0, 0.0))),
        tagged("yesterday", longitude=("E", (180.0, 1.0, 0.0))),
        tagged("", longitude=("E", (1.0,))),
        tagged()[:40],
        b"Exif\0\0" + bytes(50),
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"no exif at all",
    ],
)
def test_nonsense_in_the_exif_costs_the_facts_and_not_the_picture(tags):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert facts(encode(picture(1), "JPEG", exif=tags)) == (None, None, None)


# --- The limit of pixels ---


def test_the_limit_is_checked_in_the_header(monkeypatch):
    content = {kind: encode(picture(2), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")}
    content["HEIC"] = TINY_HEIC.read_bytes()
    for kind, data in content.items():
        size = read_photo(data).image.size
        assert read_photo(data, max_pixels=size[0] * size[1]).image.size == size, kind

    def load(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    for data in content.values():
        with pytest.raises(ImageError, match=r"^0\.1 megapixels, the limit is 0\.001: raise it with --max-megapixels$"):
            read_photo(data, max_pixels=1000)


def test_just_above_the_limit_does_not_read_as_the_limit():
    with pytest.raises(ImageError, match=r"^1\.1 megapixels, the limit is 1:"):
        read_photo(encode(Image.new("1", (1001, 1000)), "PNG"), max_pixels=1_000_000)


def test_pillows_own_limit_neither_warns_nor_rules(monkeypatch):
    size = picture(3).size
    contents = {kind: encode(picture(3), kind) for kind in ("JPEG", "PNG", "BMP", "AVIF", "TIFF", "WEBP")}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("JPEG", "PNG", "BMP", "AVIF"):
            assert read_photo(contents[kind]).image.size == size
    for kind in ("TIFF", "WEBP"):  # their decoders ask for it all the same
        with pytest.raises(ImageError, match=r"where Pillow's (TIFF|WebP) decoder ends"):
            read_photo(contents[kind])


# --- What is not read ---


def test_truncation_is_a_failure_or_costs_nothing(odd):
    """Cut anywhere, a file is refused, or else (only something behind the picture is lost) it is read in full."""
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in odd.good:
            if name.startswith("names/") or "link" in name:
                continue
            content = (odd.path / name).read_bytes()
            whole = pixels(content)
            for cut in [*range(0, len(content), max(1, len(content) // 12)), len(content) - 20, len(content) - 3]:
                try:
                    assert np.array_equal(pixels(content[:cut]), whole), (name, cut)
                except ImageError:
                    refused += 1
    assert refused > 400


def test_damage_raises_nothing_but_image_errors(odd):
    chance = random.Random(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in odd.good:
            if not name.startswith(("formats/", "depths/")):
                continue
            content = (odd.path / name).read_bytes()
            for _ in range(60):
                damaged = bytearray(content)
                for _ in range(chance.choice([1, 2, 5, 20])):  # most of it near the beginning, where the structure is
                    damaged[int(len(damaged) * chance.random() ** 3)] = chance.randrange(256)
                with suppress(ImageError):
                    read_photo(bytes(damaged), max_pixels=2_000_000)


def test_heic_with_an_item_type_that_is_not_utf8():
    content = TINY_HEIC.read_bytes()
    at = content.index(b"Exif")
    with pytest.raises(ImageError, match="HEIC"):  # pi-heif would end the process
        read_photo(content[:at] + b"\xe9xif" + content[at + 4 :])


@pytest.mark.parametrize("size", [0, 1, 7, 2**31])
def test_heic_with_a_box_of_nonsensical_size_comes_to_an_end(size):
    content = TINY_HEIC.read_bytes()
    end = content.index(b"meta") - 4
    with suppress(ImageError):
        read_photo(content[:end] + struct.pack(">L", size) + b"free" + bytes(20) + content[end:])


@pytest.mark.parametrize("kind", ["EPS", "PPM", "ICO", "PCX", "TGA", "SGI", "JPEG2000", "PDF"])
def test_no_other_decoder_is_run(kind, tmp_path):
    (tmp_path / "picture.jpg").write_bytes(encode(picture(4), kind))
    with pytest.raises(ImageError, match=r"^not an image"):
        read_photo(tmp_path / "picture.jpg")


def test_files_that_cannot_be_opened(tmp_path):
    def reason(path):
        with pytest.raises(ImageError) as raised:
            read_photo(path)
        return str(raised.value)

    assert reason(tmp_path / "gone.jpg") == "missing: there is no such file"
    assert reason(tmp_path) == "a folder, not a file"
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    assert "symbolic links" in reason(tmp_path / "loop.jpg")
    assert "too long" in reason(tmp_path / ("x" * 300))
    assert "null" in reason(tmp_path / "a\0b.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert reason(tmp_path / "pipe.jpg") == "not a regular file"
    assert reason(Path(os.devnull)) == "not a regular file"


def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jpg")
    file = Path(__file__).stat()
    monkeypatch.setattr(Path, "stat", lambda *_, **__: file)
    with pytest.raises(ImageError):
        read_photo(tmp_path / "pipe.jpg")


def test_no_permission(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(encode(picture(5), "JPEG"))
    (tmp_path / "secret.jpg").chmod(0)
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(ImageError, match=r"^no permission to read it$"):
            read_photo(tmp_path / "secret.jpg")
    finally:
        os.seteuid(me)


def test_memory_and_decoder_bugs(monkeypatch):
    for error, reason in [
        (MemoryError(), "not enough memory"),
        (RecursionError("maximum recursion depth"), "damaged or truncated JPEG: maximum recursion depth"),
        (OSError(5, "Input/output error"), "cannot be read: Input/output error"),
        (AssertionError(), "damaged or truncated JPEG: AssertionError"),
    ]:
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(ImageError, match=reason):
            read_photo(encode(picture(6), "JPEG"))


# --- Cost and threads ---


def test_a_jpeg_is_decoded_once(monkeypatch):
    started = []
    decoder = Image._getdecoder
    monkeypatch.setattr(Image, "_getdecoder", lambda *args: (started.append(args[1]), decoder(*args))[1])
    photo = read_photo(encode(picture(7), "JPEG", exif=exif(6)))
    Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3, "shortest", "bicubic").pixels([photo.image])
    assert started == ["jpeg"]


def test_threads_read_alike_and_leave_the_host_alone(odd):
    """In a fresh process, where the decoders are still to be imported."""
    program = """
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from PIL import Image
from retrieval.images import read_photo
before = dict(Image.OPEN), Image.MAX_IMAGE_PIXELS
names = sys.argv[1:]
read = lambda name: sha256(read_photo(Path(name)).image.tobytes()).hexdigest()
with ThreadPoolExecutor(8) as pool:
    print(*pool.map(read, names * 3))
assert "HEIF" not in Image.OPEN and Image.MAX_IMAGE_PIXELS == before[1]
"""
    names = [str(odd.path / name) for name in odd.good if name.startswith(("formats/", "depths/"))]
    done = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True, check=True)
    serial = [hashlib.sha256(read_photo(Path(name)).image.tobytes()).hexdigest() for name in names]
    assert done.stdout.split() == serial * 3


def test_heic_support_is_loaded_with_the_first_heic():
    program = """
import sys
from pathlib import Path
from retrieval.images import read_photo
read_photo(Path(sys.argv[1]))
assert "pi_heif" not in sys.modules
read_photo(Path(sys.argv[2]))
assert "pi_heif" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, str(real_photos()[-1]), str(TINY_HEIC)], check=True)


# --- Preprocessing ---

SIZES = [(1, 1), (1, 7), (224, 224), (225, 223), (640, 427), (333, 500), (97, 1001), (1013, 61), (224, 448), (30, 20)]


def described(size=(224, 224), resize_mode="shortest", interpolation="bicubic", fill=0):
    return Preprocessing(size, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), resize_mode, interpolation, fill)


@pytest.mark.parametrize("resize_mode", ["squash", "shortest", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(224, 224), (192, 256), (33, 33)])
def test_fit_is_open_clips_transform_bit_for_bit(resize_mode, interpolation, size):
    pytest.importorskip("torch")
    transform = pytest.importorskip("open_clip.transform").image_transform
    theirs = transform(
        size, False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=resize_mode, interpolation=interpolation, fill_color=114
    )
    ours = described(size, resize_mode, interpolation, fill=114)
    photos = [Image.open(path).convert("RGB") for path in real_photos()[-2:]]
    photos += [photos[i % 2].resize(shape) for i, shape in enumerate(SIZES)]
    if resize_mode == "longest":  # open_clip scales a thread to nothing, and fails
        photos = [photo for photo in photos if max(photo.size) < 14 * min(photo.size)]
    expected = np.stack([np.rint(theirs(photo).numpy() * 255).astype(np.uint8).transpose(1, 2, 0) for photo in photos])
    got = ours.pixels(photos)
    assert got.dtype == np.uint8
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("resize_mode", ["squash", "shortest", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
def test_fit_leaves_what_it_fitted(resize_mode, interpolation):
    for size in [(224, 224), (192, 256), (256, 128)]:
        preprocessing = described(size, resize_mode, interpolation, fill=9)
        for shape in SIZES:
            once = preprocessing.fit(picture(1).resize(shape))
            assert once.size == (size[1], size[0])
            assert once.mode == "RGB"
            assert np.array_equal(np.asarray(preprocessing.fit(once)), np.asarray(once))


def test_longest_pads_with_the_fill():
    fitted = np.asarray(described((10, 10), "longest", fill=77).fit(Image.new("RGB", (40, 20), (200, 0, 0))))
    assert (fitted[[0, 1, 7, 8, 9]] == 77).all()
    assert (fitted[2:7] == (200, 0, 0)).all()


def test_nearest_takes_pixels_as_they_are():
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    fitted = np.asarray(described((2, 2), "squash", "nearest").fit(image))
    assert np.array_equal(fitted, np.asarray(image)[1::2, 1::2])


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 2)])
def test_a_thread_costs_no_gigabytes(shape):
    along = np.linspace(0, 250, max(shape)).astype(np.uint8)
    colours = np.stack([along, 250 - along, along // 2], axis=-1)
    thread = Image.fromarray(
        np.broadcast_to(colours[:, None] if shape[1] > shape[0] else colours, (*shape[::-1], 3)).copy()
    )
    fitted = np.asarray(described((64, 64)).fit(thread)).astype(int)
    assert np.abs(fitted - [125, 125, 62]).max() <= 1  # the middle, which is as good as one colour
    assert described((64, 64), "longest").fit(thread).size == (64, 64)


def test_a_long_picture_is_scaled_like_a_short_one():
    """Both ways of cutting the centre agree but for rounding."""
    wide = Image.open(real_photos()[-2]).convert("RGB").resize((900, 90))
    usual = np.asarray(described((64, 64)).fit(wide)).astype(int)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retrieval.preprocessing._MAX_SCALED", 0)
        boxed = np.asarray(described((64, 64)).fit(wide)).astype(int)
    assert np.abs(usual - boxed).max() <= 1


def test_fit_takes_any_mode():
    grey = Image.fromarray(RAMP)
    assert np.array_equal(described((16, 16)).pixels([grey])[0, ..., 0], LEVELS)


def test_pixels_stack_in_order():
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    stacked = described((8, 6)).pixels([Image.new("RGB", (20, 30), colour) for colour in colours])
    assert stacked.shape == (3, 8, 6, 3)
    assert [tuple(each[4, 3]) for each in stacked] == colours
    assert described((8, 6)).pixels([]).shape == (0, 8, 6, 3)


def test_json_there_and_back():
    for preprocessing in (described(), described((192, 256), "longest", "bilinear", 114)):
        assert Preprocessing.from_json(json.loads(json.dumps(preprocessing.to_json()))) == preprocessing
    assert described().to_json() == {
        "size": [224, 224],
        "mean": [0.48, 0.46, 0.41],
        "std": [0.27, 0.26, 0.28],
        "resize_mode": "shortest",
        "interpolation": "bicubic",
        "fill": 0,
    }
    whole = Preprocessing((8, 8), (0, 0, 0), (1, 1, 1), "squash", "nearest")
    assert json.dumps(whole.to_json()) == json.dumps(Preprocessing.from_json(whole.to_json()).to_json())
    without = {name: value for name, value in described().to_json().items() if name != "fill"}
    assert Preprocessing.from_json(without) == described()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"size": [0, 224]}, "size"),
        ({"size": [224]}, "size"),
        ({"size": 224}, "size"),
        ({"size": [224.0, 224]}, "size"),
        ({"size": [True, 224]}, "size"),
        ({"size": [10**9, 224]}, "size"),
        ({"mean": [0.5, 0.5]}, "mean"),
        ({"mean": [0.5, 0.5, "0.5"]}, "mean"),
        ({"mean": [0.5, 0.5, float("nan")]}, "mean"),
        ({"std": [0.5, 0.5, 0]}, "std"),
        ({"std": None}, "std"),
        ({"resize_mode": "stretch"}, "resize_mode"),
        ({"resize_mode": ["squash"]}, "resize_mode"),
        ({"interpolation": "random"}, "interpolation"),
        ({"interpolation": {}}, "interpolation"),
        ({"fill": 256}, "fill"),
        ({"fill": None}, "fill"),
        ({"colour": "RGB"}, "colour"),
        ({1: 2}, "1"),
    ],
)
def test_nonsense_is_refused_by_name(change, names):
    with pytest.raises(ModelError, match=names):
        Preprocessing.from_json(described().to_json() | change)
    for missing in ("size", "mean", "std", "resize_mode", "interpolation"):
        with pytest.raises(ModelError, match=missing):
            Preprocessing.from_json({k: v for k, v in described().to_json().items() if k != missing})
    for nonsense in (None, [], "squash"):
        with pytest.raises(ModelError):
            Preprocessing.from_json(nonsense)


def test_the_default_limit_is_the_stated_one():
    assert MAX_PIXELS == 128_000_000
