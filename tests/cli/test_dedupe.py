"""`diptych dedupe` as a person runs it, on real photos: what it groups, how it prints, that it touches nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.commands import complaint, diptych, result
from tests.odd_photos import real_photos


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder: when it was changed, and its content."""
    return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """The shipped photos, some of them again; tests that change something copy the folder."""
    folder = tmp_path_factory.mktemp("twice") / "photos"
    (folder / "old").mkdir(parents=True)
    for photo in real_photos():
        shutil.copyfile(photo, folder / photo.name)
    shutil.copyfile(folder / "chelsea.png", folder / "old" / "cat.png")
    coffee = Image.open(folder / "coffee.png").convert("RGB")
    shutil.copyfile(folder / "coffee.png", folder / "old" / "coffee.png")
    coffee.save(folder / "old" / "coffee.jpg", quality=80)
    rocket = Image.open(folder / "rocket.jpg")
    rocket.resize((rocket.width // 2, rocket.height // 2)).save(folder / "old" / "rocket.webp")
    astronaut = Image.open(folder / "astronaut.png").convert("RGB")
    astronaut.crop((24, 24, *astronaut.size)).save(folder / "old" / "astronaut.png")
    assert result(diptych("index", folder, "--json"))["added"] == 25
    return folder


@pytest.fixture
def photos(indexed, tmp_path):
    return Path(shutil.copytree(indexed, tmp_path / "photos"))


def paths(folder: Path, *names: str) -> list[str]:
    return [str(folder / name) for name in names]


def test_groups_as_json_and_nothing_is_touched(indexed):
    before = state(indexed)
    run = diptych("dedupe", indexed, "--json")
    assert result(run) == [
        {"grade": "same-file", "paths": paths(indexed, "chelsea.png", "old/cat.png")},
        {"grade": "re-encoded", "paths": paths(indexed, "coffee.png", "old/coffee.png", "old/coffee.jpg")},
        {"grade": "re-encoded", "paths": paths(indexed, "rocket.jpg", "old/rocket.webp")},
        {"grade": "similar", "paths": paths(indexed, "astronaut.png", "old/astronaut.png")},
    ]
    assert run.stderr == "pictures compared: 25; groups: 1 same-file, 2 re-encoded, 1 similar\n"
    assert state(indexed) == before


@pytest.mark.parametrize(
    ("grade", "sizes"), [("same-file", [2, 2]), ("re-encoded", [2, 3, 2]), ("similar", [2, 2, 3, 2])]
)
def test_one_grade_holds_the_finer_ones(indexed, grade, sizes):
    found = result(diptych("dedupe", indexed, "--grade", grade, "--json"))
    assert {group["grade"] for group in found} == {grade}
    assert [len(group["paths"]) for group in found] == sizes


def test_lines_on_a_pipe(indexed):
    run = diptych("dedupe", indexed, "--grade", "same-file")
    assert run.returncode == 0
    assert run.stdout.splitlines() == [
        f"{number}\tsame-file\t{path}"
        for number, pair in enumerate((("chelsea.png", "old/cat.png"), ("coffee.png", "old/coffee.png")), 1)
        for path in paths(indexed, *pair)
    ]


def test_a_sub_folder_alone(indexed):
    (group,) = result(diptych("dedupe", indexed / "old", "--json"))
    assert group == {"grade": "re-encoded", "paths": paths(indexed, "old/coffee.png", "old/coffee.jpg")}
    assert result(diptych("dedupe", "--json", cwd=indexed / "old")) == [group]


def test_a_page(indexed, tmp_path):
    page = tmp_path / "page.html"
    run = diptych("dedupe", indexed, "--html", page)
    assert (run.returncode, run.stdout) == (0, "")
    text = page.read_text("utf-8")
    assert text.count("data:image/jpeg;base64,") == 9
    assert text.index("Same file") < text.index("chelsea.png") < text.index("Similar shots") < text.index("astronaut")
    assert "2 pictures in 1 group<" in text


def test_no_duplicates(photos):
    shutil.rmtree(photos / "old")
    assert diptych("index", photos).returncode == 0
    run = diptych("dedupe", photos, "--threads", "1")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "pictures compared: 20; groups: none\n")
    assert result(diptych("dedupe", photos, "--json")) == []


def test_files_that_are_gone_are_left_out_and_named(photos):
    (photos / "chelsea.png").unlink()
    run = diptych("dedupe", photos, "--grade", "same-file", "--json")
    assert [group["paths"] for group in result(run)] == [paths(photos, "coffee.png", "old/coffee.png")]
    assert "left out, changed or gone since the last run: 1" in run.stderr
    assert f"diptych index {photos}" in run.stderr


def test_an_index_elsewhere_and_one_of_nothing(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    assert diptych("index", tmp_path / "empty", "--index", tmp_path / "store").returncode == 0
    assert result(diptych("dedupe", "--index", tmp_path / "store", "--json")) == []


@pytest.mark.skipif(os.name == "nt", reason="names are UTF-16 there")
def test_a_name_that_is_not_utf8(photos):
    odd = os.fsencode(photos) + b"/caf\xe9\t.png"
    shutil.copyfile(os.fsencode(photos / "chelsea.png"), odd)
    assert diptych("index", photos).returncode == 0
    run = diptych("dedupe", photos, "--grade", "same-file", text=False, errors=None)
    assert odd.replace(b"\t", b"\\t") in run.stdout
    listed = json.loads(diptych("dedupe", photos, "--json").stdout)
    assert os.fsdecode(odd) in listed[0]["paths"]
    assert diptych("dedupe", photos, "--html", photos / "page.html").returncode == 0


def test_mistakes(tmp_path):
    assert "no index" in complaint(diptych("dedupe", tmp_path))
    assert diptych("dedupe", tmp_path, "--grade", "alike").returncode == 2


def test_transformed_flickr_photos(shared_data, tmp_path):
    """Every promise of docs/dedupe.md once: each photo is found again, and nothing else."""
    folder = tmp_path / "photos"
    folder.mkdir()
    originals = sorted((shared_data / "flickr8k" / "originals").iterdir())[::8]
    for photo in originals:
        shutil.copyfile(photo, folder / photo.name)
        image = Image.open(photo).convert("RGB")
        image.save(folder / f"{photo.stem}.q40.jpg", quality=40)
        image.resize((image.width // 2, image.height // 2)).save(folder / f"{photo.stem}.half.png")
        image.point(lambda value: value * 0.8).save(folder / f"{photo.stem}.dark.webp")
        image.crop((0, 0, round(0.95 * image.width), round(0.95 * image.height))).save(
            folder / f"{photo.stem}.crop.jpg"
        )
    assert diptych("index", folder).returncode == 0
    for grade, kinds in (
        ("re-encoded", {"jpg", "q40", "half", "dark"}),
        ("similar", {"jpg", "q40", "half", "dark", "crop"}),
    ):
        found = result(diptych("dedupe", folder, "--grade", grade, "--json"))
        assert len(found) == len(originals)
        for group in found:
            names = [Path(path).name.split(".") for path in group["paths"]]
            assert len({name[0] for name in names}) == 1
            assert {name[1] for name in names} - {"crop"} == kinds - {"crop"}
            assert grade != "similar" or len(names) == 5
