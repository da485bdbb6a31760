"""Reading pairs and labels."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from retrieval.errors import DataError
from retrieval.pairs import Record, checksum, class_names, read_pairs, read_sentences, select_split


def write(folder, lines, place="images", name="captions.jsonl"):
    (folder / place).mkdir(parents=True, exist_ok=True)
    for line in lines:
        if isinstance(line, dict) and isinstance(line.get("image"), str):
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

    (tmp_path / "images" / "train.png").unlink()  # nobody asks for those of other splits
    assert [record.image.name for record in read_pairs(file, prefer="test")] == ["test.png"]
    assert [record.image.name for record in read_pairs(file, "val", prefer="test")] == ["val.png"]
    with pytest.raises(DataError, match="1 of the 3 pictures"):
        read_pairs(file, prefer="dev")


def test_select_split():
    one, two = Record(Path("a.png"), split="train"), Record(Path("b.png"))
    assert select_split([one, two], "train", Path("x.csv")) == [one]
    with pytest.raises(DataError, match=r"^x.csv has no rows of split 'val'; its splits are: \(none\), train$"):
        select_split([one, two], "val", Path("x.csv"))


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
        (["[1]"], "entry 1: expected an object"),
        (["[1]", "[2]"], "line 1: expected an object"),
        ([{"image": "a.png"}, "{"], "line 2 is not JSON"),
        ([{"image": 5}], "line 1: expected an object"),
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


def test_checksum_stays_what_models_have_on_record():
    """The rule, written down once more: sorted (name, caption | NUL + label | nothing) pairs as JSON."""
    records = [Record(Path("x/b.jpg"), ("two", "é"), ("cat",), "test", {"id": 1}), Record(Path("y/a.jpg"))]
    pairs = [["a.jpg", ""], ["b.jpg", ""], ["b.jpg", "\0cat"], ["b.jpg", "two"], ["b.jpg", "é"]]
    assert checksum(records) == hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("flickr8k/captions.jsonl", "3111546c009e9bad75416518b0a455ce001731cee3b41f17420e9c8889dfa90d"),
        ("tweets/captions.jsonl", "d6c721a5696e5a0bada9a20851ae5a0b453ca395f4013c6aeb2231ad846bdaf7"),
        ("labelled/voc_subset.jsonl", "5ea93d3a787fa757fe8aafcbb277e2e598040f4423c2cc42d7a8e79cde47371a"),
    ],
)
def test_checksum_of_the_shared_data(shared_data, file, expected):
    assert checksum(read_pairs(shared_data / file)) == expected


def test_rows_of_one_picture_are_one_record(tmp_path):
    rows = [
        {"image": "a.png", "captions": ["one", "two"], "label": "x", "source": "web", "author": "ann", "split": "val"},
        {"image": "b.png", "split": "val"},
        {
            "image": "./a.png",
            "text": "one",
            "labels": ["y", "x"],
            "source": "web",
            "author": "bo",
            "n": 1,
            "split": "val",
        },
    ]
    a, b = read_pairs(write(tmp_path, rows))
    assert a == Record(
        tmp_path / "images" / "a.png",
        ("one", "two", "one"),
        ("x", "y"),
        "val",
        {"source": "web"},
        {"author": ("ann", "ann", "bo"), "n": (None, None, 1)},
    )
    assert b == Record(tmp_path / "images" / "b.png", split="val")


def test_columns_keep_the_first_value_where_a_row_has_no_text(tmp_path):
    rows = [{"image": "a.png", "label": "x", "n": 1}, {"image": "a.png", "text": "one", "n": 2, "m": 3}]
    (record,) = read_pairs(write(tmp_path, rows))
    assert record == Record(tmp_path / "images" / "a.png", ("one",), ("x",), None, {"n": 1, "m": 3})


@pytest.mark.parametrize("other", ["test", None])
def test_a_picture_in_two_splits_is_a_picture_in_each(tmp_path, other):
    rows = [{"image": "a.png", "text": "x", "split": "val"}, {"image": "a.png", "text": "y", "split": other}]
    file = write(tmp_path, rows)
    assert [record.texts for record in read_pairs(file, "val")] == [("x",)]
    assert [(record.texts, record.split) for record in read_pairs(file)] == [(("x",), "val"), (("y",), other)]


@pytest.mark.parametrize("place", ["Images", "Flicker8k_Dataset", "flickr30k-images"])
def test_pictures_are_found_where_others_keep_them(tmp_path, place):
    (record,) = read_pairs(write(tmp_path, [{"image": "a.png"}], place))
    assert record.image == tmp_path / place / "a.png"


def test_the_folder_that_was_named_wins(tmp_path):
    file = write(tmp_path, [{"image": "a.png"}])
    write(tmp_path, [{"image": "a.png"}], "elsewhere")
    (record,) = read_pairs(file, images=tmp_path / "elsewhere")
    assert record.image == tmp_path / "elsewhere" / "a.png"
    (tmp_path / "elsewhere" / "a.png").unlink()
    with pytest.raises(DataError, match=r"1 of the 1 pictures .*elsewhere.a\.png; if they lie elsewhere"):
        read_pairs(file, images=tmp_path / "elsewhere")
    with pytest.raises(DataError, match="nothing: there is no such folder"):
        read_pairs(file, images=tmp_path / "nothing")


def test_a_later_picture_tells_the_place_if_the_first_is_missing(tmp_path):
    file = write(tmp_path, [{"image": "a.png"}, {"image": "b.png"}], "Images")
    (tmp_path / "Images" / "a.png").unlink()
    with pytest.raises(DataError, match=r"1 of the 2 pictures .*Images.a\.png"):
        read_pairs(file)


def test_absolute_paths_and_paths_upwards(tmp_path):
    write(tmp_path, [{"image": "a.png"}, {"image": "b.png"}], "elsewhere")
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "x.jsonl"
    rows = [{"image": str(tmp_path / "elsewhere" / "a.png")}, {"image": "../elsewhere/b.png"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert [record.image.resolve() for record in read_pairs(file)] == [
        tmp_path / "elsewhere" / f"{n}.png" for n in "ab"
    ]


def test_many_pictures_are_checked_by_listing_their_folders(tmp_path):
    names = [f"{part}/{i}.png" for part in ("many", "few") for i in range(40 if part == "many" else 3)]
    (tmp_path / "images" / "many").mkdir(parents=True)
    (tmp_path / "images" / "few").mkdir()
    file = write(tmp_path, [{"image": name} for name in names])
    assert len(read_pairs(file)) == 43
    for gone in (names[7], names[41]):
        (tmp_path / "images" / gone).unlink()
    (tmp_path / "images" / names[8]).unlink()
    (tmp_path / "images" / names[8]).mkdir()  # a folder is no picture
    with pytest.raises(DataError, match=r"3 of the 43 .*many.7\.png, .*many.8\.png, .*few.1\.png;"):
        read_pairs(file)


@pytest.mark.parametrize("name", ["x" * 5000, "nul\0.png", "\ud800.png"])
def test_impossible_names_are_missing_pictures(tmp_path, name):
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({"image": name}))
    with pytest.raises(DataError, match="1 of the 1 pictures"):
        read_pairs(file)


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path):
    file = write(tmp_path, [{"image": "a.png"}])
    file.write_text('\ufeff{"image": "a.png", "text": "one\u2028two\x85three"}\r\n\r\n', "utf-8")
    assert read_pairs(file)[0].texts == ("one\u2028two\x85three",)


@pytest.mark.parametrize(
    ("name", "text", "sentences"),
    [
        ("a.txt", "one, two\n\n three \r\n", ["one, two", "three"]),
        ("plain", '"quoted"\nan image of a text\n', ['"quoted"', "an image of a text"]),
        ("a.txt", "text\na dog, running\n", ["a dog, running"]),
        ("a.csv", "id,sentence\n1,one\n2,\n3,three\n", ["one", "three"]),
        ("a.tsv", 'comment\tx\n"one ""1"""\t2\n', ['one "1"']),
        ("a.jsonl", '{"text": "one"}\n{"captions": ["two", " "], "image": "b.png"}\n', ["one", "two"]),
        ("a.json", '[{"caption": "one"}]', ["one"]),
        ("a.token", "b.png#0\tone\nb.png#1\ttwo\n", ["one", "two"]),
        ("a.json", '{"images": [{"filename": "b.png", "sentences": [{"raw": "one"}]}]}', ["one"]),
    ],
)
def test_sentences_with_and_without_pictures(tmp_path, name, text, sentences):
    file = tmp_path / name
    file.write_bytes(text.encode())
    read = read_sentences(file)
    assert [one.text.strip() for one in read] == sentences
    assert {one.image and one.image.name for one in read} <= {None, "b.png"}
    assert any(one.image for one in read) == ("b.png" in text)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "id,price\n1,2\n", "no column that names pictures"),
        ("a.jsonl", '{"words": "one"}', 'expected an object with "image"'),
        ("a.jsonl", '{"image": "b.png"}', "has no sentences: none of its 1 rows has one"),
        ("a.txt", "b.png\nc.jpg\n", "has no sentences"),
        ("a.txt", " \n", "is empty"),
        ("a.txt", "one\0", "binary data"),
    ],
)
def test_what_has_no_sentences(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=said):
        read_sentences(tmp_path / name)


def test_names_of_pictures_one_a_line(tmp_path):
    """Only where pictures alone are wanted: they say nothing of any."""
    for name in ("a.png", "b c.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    file = tmp_path / "files.txt"
    file.write_text("a.png\n\nb c.png\n")
    assert read_pairs(file, captioned=False) == [Record(tmp_path / "a.png"), Record(tmp_path / "b c.png")]
    with pytest.raises(DataError, match="no column that names pictures"):
        read_pairs(file)
    file.write_text("a.png\na cat\n")
    with pytest.raises(DataError, match="no column that names pictures"):
        read_pairs(file, captioned=False)


def test_a_column_without_a_name_is_kept(tmp_path):
    """It was taken for the labels where there are none."""
    pq.write_table(pa.table({"image": ["a.png"], "": ["x"]}), tmp_path / "t.parquet")
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    (record,) = read_pairs(tmp_path / "t.parquet")
    assert (record.labels, record.columns) == ((), {"": "x"})
