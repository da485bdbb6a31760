"""Reading pairs and labels."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from retrieval.errors import DataError
from retrieval.pairs import checksum, class_names, read_pairs


def write(folder, lines, place="images", name="captions.jsonl"):
    (folder / place).mkdir(parents=True, exist_ok=True)
    for line in lines:
        if isinstance(line, dict) and "image" in line:
            Image.new("RGB", (2, 2)).save(folder / place / line["image"])
    file = folder / name
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return file


@pytest.mark.parametrize("place", ["images", ".", "captions"])
def test_pictures_are_found_in_each_of_the_three_places(tmp_path, place):
    file = write(tmp_path, [{"image": "a.png", "captions": ["one", "two"], "split": "test", "id": 7}], place)
    (record,) = read_pairs(file)
    assert record.image == tmp_path / place / "a.png"
    assert (record.texts, record.labels, record.split, record.columns) == (("one", "two"), (), "test", {"id": 7})


def test_one_text_one_label_or_lists(tmp_path):
    rows = [{"image": "a.png", "text": "x", "label": "cat"}, {"image": "b.png", "label": ["dog", "car"]}]
    first, second = read_pairs(write(tmp_path, rows))
    assert (first.texts, first.labels) == (("x",), ("cat",))
    assert (second.texts, second.labels) == ((), ("dog", "car"))
    assert class_names([first, second]) == ["car", "cat", "dog"]


def test_only_one_split(tmp_path):
    rows = [{"image": f"{split}.png", "captions": ["c"], "split": split} for split in ("train", "val", "test")]
    file = write(tmp_path, rows)
    assert [record.image.name for record in read_pairs(file, "val")] == ["val.png"]
    with pytest.raises(DataError, match="no rows of split 'dev'; its splits are: test, train, val"):
        read_pairs(file, "dev")


def test_missing_pictures_are_counted(tmp_path):
    rows = [{"image": f"{i}.png", "captions": ["c"]} for i in range(5)]
    file = write(tmp_path, rows)
    for i in (1, 2, 3, 4):
        (tmp_path / "images" / f"{i}.png").unlink()
    with pytest.raises(DataError, match=r"4 of the 5 pictures .* are missing: .*1\.png.*, …"):
        read_pairs(file)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1 is not JSON"),
        (["[1]"], "line 1: expected an object"),
        ([{"text": "no image"}], "line 1: expected an object"),
        ([""], "is empty"),
    ],
)
def test_wrong_lines_are_named(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        read_pairs(write(tmp_path, lines))


def test_missing_file_and_binary_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_pairs(tmp_path / "nothing.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is not UTF-8"):
        read_pairs(tmp_path / "binary.jsonl")


def test_checksum_ignores_order_and_place_and_notices_a_word(tmp_path):
    rows = [{"image": "a.png", "captions": ["one", "two"]}, {"image": "b.png", "captions": ["three"]}]
    here = read_pairs(write(tmp_path / "here", rows))
    there = read_pairs(write(tmp_path / "there", [rows[1], {**rows[0], "captions": ["two", "one"]}]))
    other = read_pairs(write(tmp_path / "other", [rows[0], {**rows[1], "captions": ["four"]}]))
    assert checksum(here) == checksum(there) != checksum(other)
