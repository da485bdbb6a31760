"""Photos that are there more than once, against the slow obvious way, and what must not be said of them."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from indexes.store import ModelRef, Row, Store
from retrieval.duplicates import GRADES, Sketches, Thresholds
from retrieval.encoders import load_encoder
from retrieval.errors import UsageError
from retrieval.images import read_photo
from retrieval.library import Library
from tests.fakes import ColourEncoder
from tests.odd_photos import real_photos


def pattern(seed: int, size=(128, 96)) -> Image.Image:
    """A blurred pattern around a middle grey: pictures that differ but have one mean colour, so one vector."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), np.uint8)
    pixels = np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC), np.float64)
    return Image.fromarray(np.clip(pixels - pixels.mean((0, 1)) + 128, 0, 255).astype(np.uint8))


def made(folder: Path, **options) -> Library:
    library = Library.create(folder, encoder=ColourEncoder(), **options)
    library.index()
    return library


def groups(found) -> list[tuple[str, list[str]]]:
    return [(group.grade, [copy.path for copy in group.copies]) for group in found.groups]


@pytest.fixture
def folder(tmp_path):
    """One picture four times, one that is like it, one that is not."""
    root = tmp_path / "photos"
    (root / "sub").mkdir(parents=True)
    pattern(1).save(root / "a.png")
    shutil.copyfile(root / "a.png", root / "sub" / "a copy.png")
    pattern(1).save(root / "a.jpg", quality=90)
    pattern(1).resize((64, 48)).save(root / "sub" / "small.png")
    pattern(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((256, 192), Image.Resampling.NEAREST).save(
        root / "b.png"
    )
    Image.new("RGB", (300, 200), (255, 0, 0)).save(root / "red.png")
    return root


RE_ENCODED = ["a.png", "sub/a copy.png", "a.jpg", "sub/small.png"]


def test_each_grade_holds_the_finer_ones(folder):
    library = made(folder)
    assert groups(library.duplicates("same-file")) == [("same-file", ["a.png", "sub/a copy.png"])]
    assert groups(library.duplicates("re-encoded")) == [("re-encoded", RE_ENCODED)]
    assert groups(library.duplicates("similar")) == [("similar", ["b.png", *RE_ENCODED])]
    assert groups(library.duplicates()) == [("similar", ["b.png", *RE_ENCODED])]
    assert library.duplicates().compared == 6


def test_without_a_grade_a_group_has_the_finest_that_holds_it_together(folder):
    (folder / "b.png").unlink()
    library = made(folder)
    assert groups(library.duplicates()) == [("re-encoded", RE_ENCODED)]
    for name in ("a.jpg", "sub/small.png"):
        (folder / name).unlink()
    library.index()
    assert groups(library.duplicates()) == [("same-file", ["a.png", "sub/a copy.png"])]
    (folder / "a.png").unlink()
    library.index()
    assert groups(library.duplicates()) == []


def test_several_groups_finer_grades_first(folder):
    shutil.copyfile(folder / "red.png", folder / "z.png")
    assert groups(made(folder).duplicates()) == [
        ("same-file", ["red.png", "z.png"]),
        ("similar", ["b.png", *RE_ENCODED]),
    ]


def test_the_largest_comes_first(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    pattern(1, (60, 40)).save(root / "a.png")
    pattern(1).save(root / "worse.jpg", quality=50)
    pattern(1).save(root / "better.jpg", quality=95)
    shutil.copyfile(root / "better.jpg", root / "as good.jpg")
    assert groups(made(root).duplicates()) == [("re-encoded", ["as good.jpg", "better.jpg", "worse.jpg", "a.png"])]


def test_only_one_folder(folder):
    assert groups(made(folder).duplicates(below="sub")) == [("re-encoded", ["sub/a copy.png", "sub/small.png"])]


def test_nothing_or_one_photo(tmp_path):
    (tmp_path / "photos").mkdir()
    library = made(tmp_path / "photos")
    for count in (0, 1):
        for grade in (None, *GRADES):
            found = library.duplicates(grade)
            assert (found.groups, found.compared, found.stale) == ((), count, 0)
        pattern(1).save(tmp_path / "photos" / "a.png")
        library.index()


def test_an_unknown_grade(folder):
    with pytest.raises(UsageError, match="same-file, re-encoded, similar"):
        made(folder).duplicates("alike")


def test_what_is_gone_or_changed_is_left_out(folder):
    """Else somebody deletes the copy that is left."""
    library = made(folder)
    (folder / "a.png").unlink()
    (folder / "sub" / "a copy.png").unlink()
    pattern(3).save(folder / "b.png")
    found = library.duplicates()
    assert groups(found) == [("re-encoded", ["a.jpg", "sub/small.png"])]
    assert (found.compared, found.stale) == (3, 3)
    library.index()
    assert library.duplicates().stale == 0


def test_deleted_rows_are_not_found_again(folder):
    library = made(folder)
    for name in RE_ENCODED[1:]:
        (folder / name).unlink()
    library.index()
    assert library.store.snapshot.manifest.tombstones
    assert groups(library.duplicates()) == [("similar", ["b.png", "a.png"])]


def test_texts_are_left_out(folder):
    library = made(folder)
    row = library.store.row(0)
    vector = library.store.vectors()[0]
    with library.store.write() as writer:
        writer.add(replace(row, kind="text", caption="a"), vector)
    assert library.duplicates().compared == 6
    assert groups(library.duplicates("same-file")) == [("same-file", ["a.png", "sub/a copy.png"])]


def test_without_files_vectors_and_shapes_decide(tmp_path):
    """As for what was imported: rows without a picture on this disk."""
    store = Store.create(tmp_path / "store", tmp_path, ModelRef("m", "f", 3))
    angles = {"a": 0.0, "again": 0.05, "other shape": 0.05, "similar": 0.34, "unlike": 1.0, "no size": 0.05}
    with store.write() as writer:
        for name, angle in angles.items():
            size = (None, None) if name == "no size" else (200, 200) if name == "other shape" else (300, 200)
            row = Row(path=name, size=1, mtime_ns=1, hash=name, width=size[0], height=size[1])
            writer.add(row, [np.cos(angle), np.sin(angle), 0])
    library = Library(Store.open(tmp_path / "store"))
    assert groups(library.duplicates("re-encoded")) == [("re-encoded", ["a", "again"])]
    assert groups(library.duplicates()) == [("similar", ["a", "again", "similar", "other shape", "no size"])]
    assert library.duplicates().stale == 0


def test_a_picture_that_cannot_be_opened_any_more(folder):
    (folder / "b.png").unlink()
    library = made(folder)
    for name in ("a.jpg", "sub/small.png"):  # the same size and time as before
        info = (folder / name).stat()
        (folder / name).write_bytes(b"\0" * info.st_size)
        os.utime(folder / name, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert groups(library.duplicates("re-encoded")) == [("re-encoded", RE_ENCODED)]  # by vector and shape


def test_blank_pictures_are_one_another(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    Image.new("RGB", (90, 60), (200, 200, 200)).save(root / "a.png")
    Image.new("RGB", (90, 60), (203, 203, 203)).save(root / "b.png")
    pattern(1).save(root / "c.png")
    assert groups(made(root).duplicates("re-encoded")) == [("re-encoded", ["a.png", "b.png"])]


def test_copies_of_a_picture_stay_together_whoever_takes_them(tmp_path):
    """Lossless copies have equal vectors and are paired with one of them only: a larger star must take them all."""
    root = tmp_path / "photos"
    root.mkdir()
    for kind in ("png", "bmp", "tiff", "gif"):
        pattern(1).quantize(64).save(root / f"a.{kind}")
    for quality in range(40, 90, 5):
        pattern(1).save(root / f"b{quality}.jpg", quality=quality)
    (group,) = made(root).duplicates("re-encoded").groups
    assert len(group.copies) == 14


# ---- pixels ----------------------------------------------------------------------------------------------------------


def sketched(images) -> Sketches:
    sketches = Sketches.empty(len(images))
    for i, image in enumerate(images):
        sketches.draw(i, image)
    return sketches


def test_layout_is_a_correlation_and_colours_are_an_intersection():
    images = [read_photo(photo).image for photo in real_photos()]
    first, second = np.triu_indices(len(images), 1)
    shared = sketched(images).compare(first, second)
    for i, j, layout, colours in zip(first, second, shared.layout, shared.colours, strict=True):
        expected = slow_likeness(images[i], images[j])
        assert (layout, colours) == pytest.approx(expected, abs=1e-4)


def slow_likeness(one: Image.Image, other: Image.Image) -> tuple[float, float]:
    small = [image.resize((32, 32), Image.Resampling.BOX) for image in (one, other)]
    greys = [np.asarray(image.convert("L"), np.float64).ravel() for image in small]
    counts = [
        Counter(tuple(value // 32 for value in pixel) for pixel in np.asarray(image).reshape(-1, 3)) for image in small
    ]
    return np.corrcoef(*greys)[0, 1], (counts[0] & counts[1]).total() / 1024


def test_flat_pictures():
    flat, lit = (Image.new("RGB", (9, 9), (grey,) * 3) for grey in (7, 250))
    shared = sketched([flat, lit, pattern(1)]).compare(np.array([0, 0, 1]), np.array([1, 2, 2]))
    assert shared.layout == pytest.approx([1, 0, 0], abs=1e-6)
    assert shared.colours[0] == 0


# ---- real photos -----------------------------------------------------------------------------------------------------


def slow_groups(library: Library, grade: str) -> set[frozenset[str]]:
    """Every pair by itself, nested stars by sets."""
    ask, paths, vectors = Thresholds(), library.store.paths(), library.store.vectors()
    hashes = library.store.rows()["hash"].to_pylist()
    images = [Image.open(library.root / path).convert("RGB") for path in paths]
    links = {name: set() for name in GRADES}
    for i in range(len(paths)):
        for j in range(i):
            cosine, (layout, colours) = vectors[i] @ vectors[j], slow_likeness(images[i], images[j])
            if hashes[i] == hashes[j]:
                links["same-file"].add((i, j))
            if cosine >= ask.candidates and layout >= ask.same_layout:
                links["re-encoded"].add((i, j))
            one_scene = layout >= ask.layout and colours >= ask.colours
            if cosine >= ask.similar and (one_scene or layout >= ask.either or colours >= ask.either):
                links["similar"].add((i, j))
    group = {i: frozenset([i]) for i in range(len(paths))}
    for name in GRADES[: GRADES.index(grade) + 1]:
        near = {one: {one} for one in group.values()}
        for i, j in links[name]:
            near[group[i]].add(group[j])
            near[group[j]].add(group[i])
        left = set(near)
        for centre in sorted(near, key=lambda one: (-len(near[one]), min(one))):
            if centre in left:
                star = near[centre] & left
                left -= star
                whole = frozenset().union(*star)
                group |= dict.fromkeys(whole, whole)
    return {frozenset(paths[i] for i in one) for one in group.values() if len(one) > 1}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    root = tmp_path_factory.mktemp("real") / "photos"
    root.mkdir()
    for number, photo in enumerate(real_photos()):
        shutil.copyfile(photo, root / photo.name)
        image = read_photo(photo).image
        if number % 5 == 0:
            shutil.copyfile(photo, root / f"copy of {photo.name}")
        if number % 2:
            image.save(root / f"{photo.stem}.q70.jpg", quality=70)
        if number % 3 == 0:
            image.resize((image.width // 2, image.height // 2)).save(root / f"{photo.stem}.half.webp")
        if number % 4 == 0:
            image.crop((30, 20, image.width, image.height)).save(root / f"{photo.stem}.crop.png")
    library = Library.create(root, encoder=load_encoder("builtin"))
    library.index()
    return library


@pytest.mark.parametrize("grade", GRADES)
def test_groups_equal_the_slow_way(real, grade):
    found = {frozenset(copy.path for copy in group.copies) for group in real.duplicates(grade).groups}
    assert found == slow_groups(real, grade)
    assert len(found) >= 4


def test_one_source_in_a_group(real):
    for group in real.duplicates("re-encoded").groups:
        assert len({copy.path.removeprefix("copy of ").split(".")[0] for copy in group.copies}) == 1
