"""Near-duplicates: how well `dedupe` tells them on real photos, and how fast it is on a million vectors.

    .venv/bin/python -m benchmarks.duplicates DATA             # the grades: precision and recall by transformation
    .venv/bin/python -m benchmarks.duplicates --rows 1000000   # time, memory, and recall of planted pairs

DATA is the data folder of the recipe builtin.toml. The thresholds of `retrieval.duplicates.Thresholds` were chosen on
one collection and are reported on another:

    calibration   40 original files of Flickr8k, 120 photos of VOC's subset and 120 of ImageNet's sample, transformed in
                  every way below, among 18,587 others of these and of COCO
    reported      40 other originals and 120 photos of tweets, among 6,980 others of tweets, Caltech-101 and COCO

Pairs of different files that are linked were looked at (near_duplicates.txt): some are one picture or one scene.
"""

from __future__ import annotations

import argparse
import io
import math
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from benchmarks.table import machine, write_section
from indexes.duplicates import near_pairs, star_groups
from indexes.vectors import as_vectors
from retrieval.duplicates import Sketches, Thresholds
from retrieval.embedding import EmbeddingCache, encode_pictures
from retrieval.encoders import load_encoder
from retrieval.images import read_photo
from retrieval.pairs import PictureBytes
from retrieval.pipeline import map_ahead

Transformation = Callable[[Image.Image], bytes]
FULL, SMALL, COCO = 40, 120, 8000

# Pairs of different files that were looked at, and show the same picture or the same scene: all others count as wrong.
LOOKED_AT = Path(__file__).parent / "near_duplicates.txt"
SAME = {frozenset(line.split()[1:]): line.split()[0] for line in LOOKED_AT.read_text("utf-8").splitlines()}


def encoded(image: Image.Image, kind: str = "JPEG", **options: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **(options or ({"quality": 90} if kind == "JPEG" else {})))
    return stream.getvalue()


def scaled(image: Image.Image, share: float) -> Image.Image:
    size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
    return image.resize(size, Image.Resampling.LANCZOS)


def cropped(image: Image.Image, share: float, left: float = 0.5) -> Image.Image:
    """Less of each side; `left` is how much of that goes at the left and at the top."""
    x, y = image.width * share, image.height * share
    box = (x * left, y * left, image.width - x * (1 - left), image.height - y * (1 - left))
    return image.crop(tuple(map(round, box)))  # type: ignore[arg-type]


def marked(image: Image.Image, height: int, centred: bool) -> Image.Image:
    """Half-transparent words, in the lower right corner or across the middle."""
    words, size = "© photo.example", max(8, image.height // height)
    font = ImageFont.load_default(size)
    layer = Image.new("RGBA", image.size)
    drawing = ImageDraw.Draw(layer)
    width = drawing.textlength(words, font=font)
    corner = (image.width - width - 6, image.height - size - 8)
    place = ((image.width - width) / 2, (image.height - size) / 2) if centred else corner
    drawing.text(place, words, font=font, fill=(255, 255, 255, 150))
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def brighter(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


TRANSFORMATIONS: dict[str, Transformation] = {
    **{f"JPEG, quality {q}": lambda image, q=q: encoded(image, quality=q) for q in (95, 75, 50, 30, 10)},  # type: ignore[misc]
    **{
        f"resized to {share:.0%}": lambda image, share=share: encoded(scaled(image, share))  # type: ignore[misc]
        for share in (1.5, 0.75, 0.5, 0.25)
    },
    "resized to 50%, quality 60": lambda image: encoded(scaled(image, 0.5), quality=60),
    "PNG": lambda image: encoded(image, "PNG"),
    "WebP, quality 80": lambda image: encoded(image, "WEBP", quality=80),
    "AVIF, quality 60": lambda image: encoded(image, "AVIF", quality=60),
    "GIF, 256 colours": lambda image: encoded(image, "GIF"),
    "watermark in a corner": lambda image: encoded(marked(image, 14, False)),
    "watermark across the middle": lambda image: encoded(marked(image, 7, True)),
    **{
        f"brightness {factor:.0%}": lambda image, factor=factor: encoded(brighter(image, factor))  # type: ignore[misc]
        for factor in (0.8, 1.2, 0.6, 1.4)
    },
    "contrast 130%": lambda image: encoded(ImageEnhance.Contrast(image).enhance(1.3)),
    "greyscale": lambda image: encoded(image.convert("L").convert("RGB")),
    "cropped by 5%, centre": lambda image: encoded(cropped(image, 0.05)),
    "cropped by 5%, one corner": lambda image: encoded(cropped(image, 0.05, left=1)),
    "cropped by 10%, centre": lambda image: encoded(cropped(image, 0.10)),
    "cropped by 20%, centre": lambda image: encoded(cropped(image, 0.20)),
    "turned by 2°, cropped": lambda image: encoded(cropped(image.rotate(2, Image.Resampling.BICUBIC), 0.08)),
    "mirrored": lambda image: encoded(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
}


def wilson(hits: int, of: int) -> str:
    """A share in percent with its 95 % interval (Wilson, 1927)."""
    if not of:
        return "–"
    share, z = hits / of, 1.96
    centre = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return f"{100 * share:.1f} ({100 * max(0.0, centre - half):.1f}-{100 * min(1.0, centre + half):.1f})"


class Photos:
    """Pictures with their vectors, thumbnails, and the photo that each is made of."""

    def __init__(self, sources: list[Path], others: list[Path]) -> None:
        self.photo: list[int] = []  # its number
        self.kind: list[str] = []  # name of the transformation; "" for a photo as it is
        self.names = ["/".join(path.parts[-3:]) for path in sources + others]  # FLICKR8K/images/NAME
        self.sources = len(sources)
        pictures: list[Path | PictureBytes] = []
        for number, path in enumerate(sources + others):
            pictures.append(path)
            self.photo.append(number)
            self.kind.append("")
            if number < len(sources):
                image = read_photo(path).image
                for name, transform in TRANSFORMATIONS.items():
                    pictures.append(PictureBytes(f"{path.stem} {name}", transform(image)))
                    self.photo.append(number)
                    self.kind.append(name)
        encoder = load_encoder("builtin")
        cache = EmbeddingCache(encoder.fingerprint, encoder.dim)
        self.vectors = as_vectors(encode_pictures(encoder, pictures, cache=cache).astype(np.float16))

        self.sketches = Sketches.empty(len(pictures))

        def sketch(i: int) -> None:
            picture = pictures[i]
            self.sketches.draw(i, read_photo(picture if isinstance(picture, Path) else picture.data).image)

        for _ in map_ahead(sketch, range(len(pictures))):
            pass


def collections(data: Path) -> dict[str, tuple[list[Path], list[Path]]]:
    """(photos to transform, other photos) for each collection."""
    originals = sorted((data / "flickr8k/originals").iterdir())
    known = {path.stem for path in originals}
    flickr = [path for path in sorted((data / "flickr8k/images").iterdir()) if path.stem not in known]
    coco = sorted((data / "coco/images").iterdir())
    voc, imagenet, caltech = (
        sorted((data / "labelled" / name).rglob("*.avif"))
        for name in ("voc_subset", "imagenet_sample1000", "caltech101")
    )
    tweets = sorted((data / "tweets/images").iterdir())
    for photos in (voc, imagenet, tweets):
        random.Random(0).shuffle(photos)
    return {
        "calibration": (
            originals[:FULL] + voc[:SMALL] + imagenet[:SMALL],
            flickr + voc[SMALL:] + imagenet[SMALL:] + coco[:COCO],
        ),
        "reported": (originals[FULL:] + tweets[:SMALL], tweets[SMALL:] + caltech + coco[COCO : COCO + COCO // 5]),
    }


def links(photos: Photos) -> dict[str, NDArray[np.int64]]:
    """Pairs (2, P) of pictures that each grade links."""
    ask, rows = Thresholds(), np.arange(len(photos.vectors))
    pairs = near_pairs(lambda start, stop: photos.vectors[start:stop], rows, ask.candidates, exact=len(rows))
    cells = near_pairs(lambda start, stop: photos.vectors[start:stop], rows, ask.candidates, exact=0)
    kept = np.isin(pairs.first * len(rows) + pairs.second, cells.first * len(rows) + cells.second)
    print(f"cells find {wilson(int(kept.sum()), len(kept))} % of the {len(kept)} pairs that brute force finds")
    both = np.stack([pairs.first, pairs.second])
    judged = ask.judge(
        pairs.scores, photos.sketches.compare(pairs.first, pairs.second), np.ones(len(both[0]), np.bool_)
    )
    plain = both[:, (np.array(photos.kind)[both] == "").all(axis=0)]
    print(f"{np.unique(plain).size} of {len(photos.names)} photos have a candidate among the others")
    return {"re-encoded": both[:, judged == 1], "similar": both[:, judged <= 2]}


def is_right(photos: Photos, grade: str, first: int, second: int) -> bool:
    """Whether a link is true: of one photo, or of two that were looked at."""
    names = frozenset(photos.names[photos.photo[row]] for row in (first, second))
    return len(names) == 1 or SAME.get(names) in {"re-encoded": ("picture",), "similar": ("picture", "scene")}[grade]


def grades(data: Path) -> None:
    for which, (sources, others) in collections(data).items():
        photos = Photos(sources, others)
        found = links(photos)
        kind, photo = np.array(photos.kind), np.array(photos.photo)
        rows = []
        for name in TRANSFORMATIONS:
            cells = [name]
            for grade, (first, second) in found.items():
                copies = ((kind[first] == name) & (kind[second] == "")) | ((kind[first] == "") & (kind[second] == name))
                of_one = int(np.count_nonzero(photo[first[copies]] == photo[second[copies]]))
                right = sum(is_right(photos, grade, *pair) for pair in zip(first[copies], second[copies], strict=True))
                cells += [wilson(of_one, len(sources)), wilson(right, int(np.count_nonzero(copies)))]
            rows.append(cells)
        cells = ["different photos, no copies"]
        for grade, (first, second) in found.items():
            plain = np.flatnonzero((kind[first] == "") & (kind[second] == ""))
            right = [is_right(photos, grade, first[i], second[i]) for i in plain]
            cells += ["", f"{wilson(sum(right), len(right))} of {len(right)} pairs"]
            for i, true in zip(plain, right, strict=True):
                print(grade, true, sorted(photos.names[photo[row]] for row in (first[i], second[i])))
        rows.append(cells)
        columns = ("transformation", *(f"{grade}: {what}, %" for grade in found for what in ("recall", "precision")))
        if which == "reported":
            write_section("Near-duplicates: the grades", described(sources, others), columns, rows)
        else:
            print("\n".join(" | ".join(row) for row in rows))


def described(sources: list[Path], others: list[Path]) -> str:
    return (
        f"`python -m benchmarks.duplicates DATA`: {len(sources)} photos, each transformed in every way, among "
        f"{len(others):,} others; the thresholds were chosen on another collection (40 Flickr8k originals of this one "
        "were seen then). Recall: photos that are linked with their copy. Precision: links between a copy and a photo "
        "that are true: of one photo, or of two that were looked at and show one scene; in the last line links between "
        "photos. With 95 % intervals."
    )


# ---- a million vectors -----------------------------------------------------------------------------------------------


def planted(rows: int, dim: int, file: Path) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Write clustered vectors, (rows, dim) float16: in their second half copies of some in the first, and blank ones.

    Where each copy is from, where it is, and its cosine. 50 rows to a cluster, with cosines of about 0.67 inside it and
    0.4 between clusters, as a model that spreads photos badly would have; a tenth of the rows are equal.
    """
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(max(1, rows // 50), dim)) + 0.8 * rng.normal(size=dim)
    centres = as_vectors(centres)
    out = np.lib.format.open_memmap(file, "w+", np.float16, (rows, dim))
    for start in range(0, rows, 16_384):
        count = min(16_384, rows - start)
        noise = rng.normal(size=(count, dim)).astype(np.float32) * np.float32(0.7 / math.sqrt(dim))
        out[start : start + count] = as_vectors(centres[rng.integers(0, len(centres), count)] + noise)
    half, copies = rows // 2, rows // 20
    source, place = rng.choice(half, copies, replace=False), half + rng.choice(half, copies, replace=False)
    cosine = rng.uniform(0.8, 0.999, copies).astype(np.float32)
    for part in np.array_split(np.arange(copies), max(1, copies // 8192)):
        unit = as_vectors(out[source[part]])
        away = rng.normal(size=unit.shape).astype(np.float32)
        away = as_vectors(away - (away * unit).sum(axis=1, keepdims=True) * unit)
        near = cosine[part, None]
        out[place[part]] = near * unit + np.sqrt(1 - near * near) * away
    rest = np.setdiff1d(np.arange(rows), np.concatenate([source, place]))
    out[rng.choice(rest, rows // 10, replace=False)] = out[rest[0]]
    out.flush()
    cosine = (as_vectors(out[source]) * as_vectors(out[place])).sum(axis=1)
    return source, place, cosine


def peak_megabytes() -> float:
    """VmHWM; a process starts with its own."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def scale(rows: int, dim: int = 512) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vectors.npy"
        source, place, cosine = planted(rows, dim, file)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        with file.open("rb") as stream:
            offset = file.stat().st_size - 2 * rows * dim

            def block(start: int, stop: int) -> NDArray[np.float16]:
                stream.seek(offset + 2 * start * dim)
                return np.fromfile(stream, np.float16, (stop - start) * dim).reshape(-1, dim)

            start, cpu = time.perf_counter(), time.process_time()
            pairs = near_pairs(block, np.arange(rows), Thresholds().candidates)
            labels = star_groups(np.arange(rows), pairs.first, pairs.second)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    hit = np.isin(source * rows + place, pairs.first * rows + pairs.second)
    cells = [f"{rows:,} × {dim}", f"{seconds:.0f}", f"{cpu:.0f}", f"{peak_megabytes():,.0f}"]
    columns = ["vectors", "s", "CPU s", "peak MB"]
    for low, high in ((0.8, 0.85), (0.85, 0.9), (0.9, 0.95), (0.95, 1)):
        those = (cosine >= low) & (cosine < high)
        columns.append(f"found, {low} to {high}, %")
        cells.append(wilson(int(hit[those].sum()), int(those.sum())))
    blank = int(np.bincount(labels).max())
    text = (
        f"`python -m benchmarks.duplicates --rows {rows}` on {machine()}: clustered vectors, {rows // 20:,} copies of "
        f"some of them at random cosines, {rows // 10:,} that are equal (the largest group has {blank:,}); pairs from "
        f"{Thresholds().candidates} on. Copies found, by their cosine, with 95 % intervals."
    )
    write_section("Near-duplicates: scale", text, columns, [cells])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--rows", type=int, default=0)
    options = parser.parse_args()
    if options.data:
        grades(options.data)
    if options.rows:
        scale(options.rows)


if __name__ == "__main__":
    main()
