"""Every kind of file and folder that data come in, and what is wrong with those that cannot be read."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieval.errors import DataError
from retrieval.images import read_photo
from retrieval.pair_formats.tars import expand_braces
from retrieval.pairs import PictureBytes, Record, TarMember, checksum, read_pairs

# Names and sentences that tempt a reader to cut or to change them.
TINY = [
    (
        'a "quoted", name.jpg',
        ("One, two; three|four", '"Five" he said', "ends with \u2028 no line, and \t tab"),
        "train",
    ),
    ("zwei wörter.JPG", ("Ein Hund läuft 🐕", "Ein Hund läuft 🐕"), "train"),
    ("c'est.png", ("#1 is \\n it",), "val"),
    ("4.webp", ("  leading space",), "test"),
]


def touch(folder, names, data=None):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data or name.encode())


def text(file, *lines, end="\n"):
    file.write_text("".join(line + end for line in lines), "utf-8", newline="")
    return file


def table(file, header, rows, **form):
    with file.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, **form).writerows([header, *rows])
    return file


def tar(file, members, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", **options) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file


def failure(source, **options):
    with pytest.raises(DataError) as caught:
        read_pairs(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(source) in message
    return message


# One tiny data set in every form ------------------------------------------------------------------------------------


def as_jsonl(folder, data):
    lines = (json.dumps({"image": name, "captions": texts, "split": split}) for name, texts, split in data)
    return text(folder / "x.jsonl", *lines)


def as_json_list(folder, data):
    (folder / "x.json").write_text(
        json.dumps([{"image": name, "captions": texts, "split": split} for name, texts, split in data], indent=1)
    )
    return folder / "x.json"


def as_karpathy(folder, data):
    images = [
        {"filename": name, "split": split, "imgid": i, "sentences": [{"raw": t, "tokens": t.split()} for t in texts]}
        for i, (name, texts, split) in enumerate(data)
    ]
    (folder / "dataset_flickr8k.json").write_text(json.dumps({"images": images, "dataset": "flickr8k"}))
    return folder / "dataset_flickr8k.json"


def as_coco(folder, data):
    images = [{"id": 900 + i, "file_name": name, "split": split} for i, (name, _, split) in enumerate(data)]
    notes = [{"image_id": 900 + i, "caption": t} for i, (_, texts, _) in enumerate(data) for t in texts]
    (folder / "captions.json").write_text(json.dumps({"info": {}, "images": images, "annotations": notes[::-1]}))
    return folder / "captions.json"


def as_csv(folder, data, name="x.csv", header=("filepath", "title", "split"), **form):
    return table(folder / name, header, [(image, t, split) for image, texts, split in data for t in texts], **form)


def as_open_clip_tsv(folder, data):
    return as_csv(folder, data, "x.tsv", delimiter="\t")


def as_semicolons_of_a_spreadsheet(folder, data):
    file = as_csv(folder, data, "x.txt", ("Bild", "Image", "Caption"), delimiter=";")
    rows = [(i, name, t, split) for i, (name, texts, split) in enumerate(data) for t in texts]
    table(file, ("", "Image", "Caption", "SPLIT"), rows, delimiter=";", quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    return file


def as_bars(folder, data):
    return as_csv(folder, data, header=("path", "sentence", "split"), delimiter="|")


def split_files(folder, data):
    for part, split in (("train", "train"), ("dev", "val"), ("test", "test")):
        text(folder / f"Flickr_8k.{part}Images.txt", *(name for name, _, s in data if s == split))


def as_captions_txt(folder, data):
    split_files(folder, data)
    return table(folder / "captions.txt", ("image", "caption"), [(name, t) for name, texts, _ in data for t in texts])


def as_token_txt(folder, data):
    split_files(folder, data)
    lines = [f"{name}#{i}\t{t}" for name, texts, _ in data for i, t in enumerate(texts)]
    return text(folder / "Flickr8k.token.txt", *lines, end="\r\n")


def as_parquet(folder, data):
    names, texts, splits = zip(*data, strict=True)
    pq.write_table(pa.table({"image": names, "caption": texts, "split": splits}), folder / "x.parquet")
    return folder / "x.parquet"


def as_parquet_of_bytes(folder, data):
    pictures = [{"bytes": f"{name}!".encode(), "path": f"some/where/{name}"} for name, _, _ in data]
    _, texts, splits = zip(*data, strict=True)
    pq.write_table(pa.table({"image": pictures, "texts": texts, "split": splits}), folder / "x.parquet")
    return folder / "x.parquet"


def as_folder_of_tars(folder, data):
    for split in ("train", "val", "test"):
        members = []
        for name, texts, _ in (row for row in data if row[2] == split):
            members += [(name, b"picture"), (name.partition(".")[0] + ".txt", "\n".join(texts).encode())]
        tar(folder / "wds" / split / "0.tar", members)
        text(folder / "wds" / split / "nshards.txt", "1")
    text(folder / "wds" / "dataset_type.txt", "retrieval")
    return folder / "wds"


def as_folder(folder, data):
    for name, texts, split in data:
        touch(folder / "tree" / split, [name])
        (folder / "tree" / split / (name.rpartition(".")[0] + ".txt")).write_text("\n".join(texts), "utf-8", newline="")
    return folder / "tree"


FORMS = [
    as_jsonl,
    as_json_list,
    as_karpathy,
    as_coco,
    as_csv,
    as_open_clip_tsv,
    as_semicolons_of_a_spreadsheet,
    as_bars,
    as_captions_txt,
    as_token_txt,
    as_parquet,
    as_parquet_of_bytes,
    as_folder_of_tars,
    as_folder,
]


@pytest.mark.parametrize("write", FORMS)
def test_all_forms_of_the_same_data_are_the_same(tmp_path, write):
    touch(tmp_path / "images", [name for name, _, _ in TINY])
    expected = read_pairs(as_jsonl(tmp_path, TINY))
    assert [(r.image.name, r.texts, r.split) for r in expected] == TINY
    source = write(tmp_path, TINY)
    records = read_pairs(source)
    assert checksum(records) == checksum(expected)
    key = {"a": 0, "z": 1, "c": 2, "4": 3}  # folders and tars come in an order of their own
    records.sort(key=lambda record: key[record.image.name[0]])
    texts = [(r.image.name, sorted(r.texts), r.split) for r in records]
    assert texts == [(name, sorted(texts), split) for name, texts, split in TINY]
    assert {record.image.name for record in read_pairs(source, "val")} == {"c'est.png"}


@pytest.mark.parametrize("write", [form for form in FORMS if form not in (as_coco, as_folder, as_folder_of_tars)])
def test_order_of_captions(tmp_path, write):
    touch(tmp_path / "images", [name for name, _, _ in TINY])
    assert [record.texts for record in read_pairs(write(tmp_path, TINY))] == [texts for _, texts, _ in TINY]


# JSON -----------------------------------------------------------------------------------------------------------------


def test_karpathy_of_coco(tmp_path):
    images = [
        {"filepath": "train2014", "filename": "1.jpg", "split": "restval", "sentences": [{"raw": "x"}], "cocoid": 5},
        {"filepath": "val2014", "filename": "2.jpg", "split": "test", "sentences": [], "cocoid": 6},
    ]
    file = tmp_path / "json" / "dataset_coco.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"images": images, "dataset": "coco"}))
    touch(tmp_path, ["train2014/1.jpg", "val2014/2.jpg", "flat/1.jpg", "flat/2.jpg"])
    base = file.parent / ".."
    expected = [
        Record(base / "train2014" / "1.jpg", ("x",), (), "restval", {"cocoid": 5}),
        Record(base / "val2014" / "2.jpg", (), (), "test", {"cocoid": 6}),
    ]
    assert read_pairs(file) == expected
    flat = read_pairs(file, images=tmp_path / "flat")
    assert [record.image for record in flat] == [tmp_path / "flat" / "1.jpg", tmp_path / "flat" / "2.jpg"]


@pytest.mark.parametrize("place", ["val2014", "images/val2014", "images", "annotations/images", "annotations"])
def test_coco_is_found_in_its_usual_folders(tmp_path, place):
    file = tmp_path / "annotations" / "captions_val2014.json"
    file.parent.mkdir()
    images = [{"id": 7, "file_name": "COCO_val2014_000000000007.jpg", "height": 3}]
    file.write_text(json.dumps({"images": images, "annotations": [{"id": 1, "image_id": 7, "caption": "x"}]}))
    touch(tmp_path / place, ["COCO_val2014_000000000007.jpg"])
    (record,) = read_pairs(file, "val")
    assert record.image.resolve() == tmp_path / place / "COCO_val2014_000000000007.jpg"
    assert (record.texts, record.split, record.columns) == (("x",), "val", {"id": 7, "height": 3})


def test_coco_instances(tmp_path):
    document = {
        "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
        "categories": [{"id": 17, "name": "cat", "supercategory": "animal"}, {"id": 18, "name": "dog"}],
        "annotations": [{"image_id": 1, "category_id": c, "bbox": [0, 0, 1, 1]} for c in (18, 17, 18)],
    }
    (tmp_path / "instances.json").write_text(json.dumps(document))
    touch(tmp_path, ["1.jpg", "2.jpg"])
    assert read_pairs(tmp_path / "instances.json") == [
        Record(tmp_path / "1.jpg", (), ("dog", "cat"), None, {"id": 1}),
        Record(tmp_path / "2.jpg", (), (), None, {"id": 2}),
    ]


IMAGE = {"id": 1, "file_name": "1.jpg"}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            {
                "images": [IMAGE],
                "annotations": [{"image_id": 1, "caption": "x"}, *[{"image_id": i} for i in (5, 6, 6)]],
            },
            "3 annotations of FILE are of images that it does not list: ids 5, 6",
        ),
        ({"images": [{"id": 1}], "annotations": []}, 'FILE, images[0]: expected an object with "id" and "file_name"'),
        ({"images": [IMAGE, IMAGE], "annotations": []}, "1 of its images have the id of another one"),
        ({"images": [IMAGE], "annotations": [{"image_id": 1}]}, 'FILE, annotations[0]: expected "caption"'),
        (
            {"images": [IMAGE], "annotations": [{"image_id": 1, "category_id": [2]}]},
            'FILE, annotations[0]: expected "cap',
        ),
        ({"images": [IMAGE], "annotations": 5}, 'FILE: expected a list at "annotations"'),
        ({"images": [{"filename": "a.jpg"}]}, 'FILE, images[0]: expected an object with "filename" and "sentences"'),
        ({"images": [{"filename": "a.jpg", "sentences": ["x"]}]}, "FILE, images[0]: expected"),
        ({"images": []}, "FILE is empty: there is no picture in it"),
        ([], "FILE is empty: there is no picture in it"),
        ([{"image": "a.jpg"}, 5], "FILE, entry 2: expected an object"),
        ({"data": []}, 'expected an object with "image"'),
        ({"images": [IMAGE], "annotations": []}, "1 of the 1 pictures that FILE names are missing"),
    ],
)
def test_wrong_documents(tmp_path, document, message):
    file = tmp_path / "x.json"
    file.write_text(json.dumps(document))
    assert message.replace("FILE", str(file)) in failure(file)


@pytest.mark.parametrize("content", ['[{"image": "a.jpg"}', "[" * 100_000, '{"images": [}', "hello"])
def test_broken_json(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    assert "is not JSON" in failure(tmp_path / "x.json")
    (tmp_path / "x.jsonl").write_text(content)
    assert "line 1 is not JSON" in failure(tmp_path / "x.jsonl")


# Flickr ---------------------------------------------------------------------------------------------------------------


def test_flickr30k_of_kaggle_with_the_broken_line_that_it_has(tmp_path):
    touch(tmp_path / "flickr30k_images", ["1.jpg", "2199200615.jpg"])
    lines = ["image_name| comment_number| comment", '1.jpg| 0| "A man" , standing .', "1.jpg| 1| Two | bars"]
    file = text(tmp_path / "results.csv", *lines, "2199200615.jpg| 4   A dog runs across the grass .")
    assert read_pairs(file) == [
        Record(tmp_path / "flickr30k_images" / "1.jpg", ('"A man" , standing .', "Two | bars")),
        Record(tmp_path / "flickr30k_images" / "2199200615.jpg", ("A dog runs across the grass .",)),
    ]


def test_flickr30k_token(tmp_path):
    touch(tmp_path / "flickr30k-images", ["1.jpg"])
    file = text(tmp_path / "results_20130124.token", "1.jpg#0\tone", "1.jpg#1\ttwo")
    assert read_pairs(file) == [Record(tmp_path / "flickr30k-images" / "1.jpg", ("one", "two"))]


def test_flickr8k_as_its_two_archives_unpack(tmp_path):
    touch(tmp_path / "Flicker8k_Dataset", ["1.jpg", "2.jpg"])
    (tmp_path / "Flickr8k_text").mkdir()
    lines = ["1.jpg#0\tone", "2258277193_586949ec62.jpg.1#0\tpeople waiting for the subway", "2.jpg#0\ttwo"]
    file = text(tmp_path / "Flickr8k_text" / "Flickr8k.token.txt", *lines)
    text(file.with_name("Flickr_8k.devImages.txt"), "2.jpg")
    base = tmp_path / "Flickr8k_text" / ".." / "Flicker8k_Dataset"
    assert read_pairs(file) == [Record(base / "1.jpg", ("one",)), Record(base / "2.jpg", ("two",), (), "val")]
    text(file.with_name("Flickr_8k.testImages.txt"), "2.jpg")
    with pytest.raises(DataError, match=r"Flickr_8k.testImages.txt: 2.jpg is in split 'val' already"):
        read_pairs(file)


def test_a_line_that_is_none(tmp_path):
    assert "line 3: expected NAME#NUMBER" in failure(text(tmp_path / "a.token", "1.jpg#0\tone", "", "1.jpg two"))
    header = "image_name| comment_number| comment"
    assert "line 2: expected NAME| NUMBER" in failure(text(tmp_path / "results.csv", header, "1.jpg"))


# Tables ---------------------------------------------------------------------------------------------------------------


def test_columns_of_a_csv(tmp_path):
    touch(tmp_path, ["a.jpg", "b.jpg"])
    header = ["Image", "comment", "label", "year", "score", "code", "caption", "who", "empty", "odd"]
    rows = [
        ["a.jpg", "x", "cat", 1999, "0.5", "007", "one\nline, two", "ann", "", "nan"],
        ["a.jpg", "y", "cat", 1999, "1e3", "007", "three", "bo", "", "1"],
        ["b.jpg", "", "", "", "", "100", "", "", "", ""],
    ]
    assert read_pairs(table(tmp_path / "x.csv", header, rows)) == [
        Record(
            tmp_path / "a.jpg",
            ("one\nline, two", "three"),
            ("cat",),
            None,
            {"year": 1999, "code": "007", "empty": ""},
            {"comment": ("x", "y"), "score": (0.5, 1000.0), "who": ("ann", "bo"), "odd": ("nan", "1")},
        ),
        Record(
            tmp_path / "b.jpg",
            columns={"comment": "", "year": None, "score": None, "code": "100", "who": "", "empty": "", "odd": ""},
        ),
    ]


def test_blanks_behind_separators(tmp_path):
    touch(tmp_path, ["a.jpg"])
    file = text(tmp_path / "x.csv", "image, caption", 'a.jpg, "one, two"')
    assert read_pairs(file) == [Record(tmp_path / "a.jpg", ("one, two",))]


def test_a_csv_by_any_name(tmp_path):
    touch(tmp_path, ["a.jpg"])
    file = text(tmp_path / "list", "img,texts", "a.jpg,one")
    assert read_pairs(file) == [Record(tmp_path / "a.jpg", ("one",))]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["name,words", "a.jpg,one"],
            "no column that names pictures: its columns are name, words; understood are image,",
        ),
        (["image,caption"], "is empty: there is no picture in it"),
        (["image,caption", "a.jpg,one", ",two"], "line 3: no picture under 'image'"),
        (["image,caption", "a.jpg,one,two"], "line 2: 3 fields instead of 2: put what holds a separator into double"),
        (["image,caption", "a.jpg"], "line 2: 1 fields instead of 2"),
        (["image,caption", 'a.jpg,"one', "b.jpg,two"], "line 3 is not CSV: unexpected end of data; is a double quote"),
        (["image,caption", 'a.jpg,"one" two'], "line 2 is not CSV"),
        (["image,caption", "a.jpg," + "x" * 200_000], "line 2 is not CSV: field larger than field limit"),
        (["x" * 200_000], "line 1 is not CSV: field larger than field limit"),
        (["image,a,a", "1,2,3"], "two columns of one name: image, a, a"),
        (["image,caption", "a.jpg,one", "gone.jpg,x"], "1 of the 2 pictures that"),
        (
            ["url,caption", "http://x,one"],
            "lists addresses of pictures, not files: its columns are url, caption; read the",
        ),
        (["image,caption", '"two\nlines\u2029.jpg",x'], r"/two\nlines\u2029.jpg; if they lie elsewhere"),
        (['"image', '",caption', "a.jpg,one"], "line 2 is not CSV"),
        (["Dear diary,", "nothing happened"], "no column that names pictures: its columns are Dear diary, ;"),
    ],
)
def test_wrong_tables(tmp_path, lines, message):
    touch(tmp_path, ["a.jpg"])
    assert message in failure(text(tmp_path / "x.csv", *lines))


def test_parquet(tmp_path):
    touch(tmp_path, ["a.jpg", "b.jpg"])
    columns = {
        "file_name": ["a.jpg", "a.jpg", "b.jpg"],
        "text": [["one", "two"], ["three"], None],
        "label": pa.array([1, 1, 0]),
        "n": [1.5, 2.5, None],
        "same": ["s", "s", "t"],
    }
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    metadata = {"huggingface": json.dumps(features)}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), tmp_path / "x.parquet")
    assert read_pairs(tmp_path / "x.parquet") == [
        Record(tmp_path / "a.jpg", ("one", "two", "three"), ("dog",), None, {"same": "s"}, {"n": (1.5, 1.5, 2.5)}),
        Record(tmp_path / "b.jpg", (), ("cat",), None, {"n": None, "same": "t"}),
    ]


def test_pictures_inside_parquet(tmp_path):
    touch(tmp_path, ["c.jpg"])
    pictures = [{"bytes": b"A", "path": None}, {"bytes": b"B", "path": "x/b.jpg"}, {"bytes": None, "path": "c.jpg"}]
    pq.write_table(pa.table({"image": [*pictures, pictures[1]], "text": ["1", "2", "3", "4"]}), tmp_path / "x.parquet")
    assert read_pairs(tmp_path / "x.parquet") == [
        Record(PictureBytes("x-1", b"A"), ("1",)),
        Record(PictureBytes("b.jpg", b"B"), ("2", "4")),
        Record(tmp_path / "c.jpg", ("3",)),
    ]
    plain = pa.table({"filename": ["a.jpg", "b.jpg"], "img": [b"A", b"B"], "text": ["1", None]})
    pq.write_table(plain, tmp_path / "x.parquet")
    first, second = read_pairs(tmp_path / "x.parquet")
    assert first == Record(PictureBytes("a.jpg", b"A"), ("1",), (), None, {"filename": "a.jpg"})
    assert (str(second.image), repr(second.image)) == ("b.jpg", "PictureBytes(name='b.jpg')")
    assert second.image.read_bytes() == b"B"


def test_wrong_parquet(tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"url": ["http"], "caption": ["x"], "key": ["0"], "status": ["success"]}), file)
    message = failure(file)
    assert "lists addresses of pictures, not files: its columns are url, caption, key, status; read the .tar" in message
    pq.write_table(pa.table({"words": ["http"]}), file)
    assert "no column that names pictures: its columns are words; understood" in failure(file)
    pq.write_table(pa.table({"image": ["a.jpg", None]}), file)
    assert "row 2: expected a picture's path or its bytes, not None" in failure(file)
    pq.write_table(pa.table({"image": [{"bytes": b"", "path": None}]}), file)
    assert "row 1: expected a picture's path or its bytes" in failure(file)
    pq.write_table(pa.table({"image": pa.array([], pa.string())}), file)
    assert "is empty" in failure(file)
    pq.write_table(pa.table({"image": ["gone.jpg"]}), file)
    assert "1 of the 1 pictures" in failure(file)
    file.write_bytes(file.read_bytes()[:-20])
    assert "is damaged, or no Parquet file" in failure(file)
    words = pa.array([b"\xff"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"image": ["a.jpg"], "text": words}), file)
    assert "is damaged, or no Parquet file" in failure(file)


# Tars -----------------------------------------------------------------------------------------------------------------


def test_a_tar_is_read_in_place(tmp_path):
    long = "d/" * 60 + "n" * 120
    members = [
        ("0001.jpg", b"ONE"),
        ("0001.txt", "a\r\n\nb ü\n".encode()),
        ("x/0001.png", b"TWO"),
        ("x/0001.json", json.dumps({"caption": "c", "label": "cat", "width": 3, "split": "val"}).encode()),
        ("a.b.jpg", b"THREE"),
        ("0001.seg.png", b"mask"),
        (f"{long}.JPEG", b"FOUR"),
        (f"{long}.TXT", b"long"),
        ("__meta__.txt", b"notes"),
        ("._0001.jpg", b"of a Mac"),
        ("folder/README", b"no kind"),
    ]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = tar(tmp_path / "s.tar", members, format=form)
        with tarfile.open(file) as archive:
            at = {info.name: info.offset_data for info in archive}
        records = read_pairs(file)
        assert records == [
            Record(TarMember(file, "0001.jpg", at["0001.jpg"], 3), ("a", "b ü")),
            Record(TarMember(file, "0001.png", at["x/0001.png"], 3), ("c",), ("cat",), "val", {"width": 3}),
            Record(TarMember(file, "a.b.jpg", at["a.b.jpg"], 5)),
            Record(TarMember(file, "n" * 120 + ".JPEG", at[f"{long}.JPEG"], 4), ("long",)),
        ]
        assert [record.image.read_bytes() for record in records] == [b"ONE", b"TWO", b"THREE", b"FOUR"]
        assert str(records[0].image) == f"{tmp_path}/s.tar/0001.jpg"
    file.write_bytes(b"")
    with pytest.raises(OSError, match="the tar has become shorter"):
        records[0].image.read_bytes()


def test_links_in_a_tar_are_no_members(tmp_path):
    file = tmp_path / "x.tar"
    with tarfile.open(file, "w") as archive:
        for name, kind in (("a.jpg", tarfile.REGTYPE), ("b.jpg", tarfile.SYMTYPE), ("c.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            archive.addfile(info)
        sparse = tarfile.TarInfo("d.jpg")
        sparse.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": "0"}
        archive.addfile(sparse)
    assert [record.image.name for record in read_pairs(file)] == ["a.jpg"]


def test_img2dataset(tmp_path):
    """One caption in .txt and .json; the folder has a table and figures beside the tars."""
    for shard in range(2):
        told = {"caption": "two\nlines", "url": f"http://{shard}", "key": f"0000{shard}"}
        members = [(f"0000{shard}.jpg", b"x"), (f"0000{shard}.txt", b"two\nlines")]
        tar(tmp_path / f"0000{shard}.tar", [*members, (f"0000{shard}.json", json.dumps(told).encode())])
        text(tmp_path / f"0000{shard}_stats.json", "{}")
    columns = [{"url": f"http://{shard}", "key": f"0000{shard}"} for shard in range(2)]
    assert [(r.texts, r.split, r.columns) for r in read_pairs(tmp_path)] == [
        (("two\nlines",), None, c) for c in columns
    ]


def test_what_json_says_else_stays_a_column(tmp_path):
    file = tar(tmp_path / "x.tar", [("a.jpg", b"x"), ("a.txt", b"alt"), ("a.json", b'{"caption": "made by a model"}')])
    assert [(r.texts, r.columns) for r in read_pairs(file)] == [(("alt",), {"caption": "made by a model"})]


@pytest.mark.parametrize("classes", [None, ["cat", "dog"]])
def test_clip_benchmark_classification(tmp_path, classes):
    if classes:
        text(tmp_path / "classnames.txt", *classes)
    text(tmp_path / "zeroshot_classification_templates.txt", "a photo of a {c}.")
    for split, shards in (("train", 1), ("test", 11)):
        for n in range(shards):
            tar(tmp_path / split / f"{n}.tar", [(f"s{n}.webp", b"x"), (f"s{n}.cls", b"1" if n % 2 else b"0\n")])
        text(tmp_path / split / "nshards.txt", str(shards))
    zero, one = classes or ("0", "1")
    expected = [(f"s{n}.webp", (one if n % 2 else zero,), "test") for n in range(11)]  # shard 2 before shard 10
    assert [(r.image.name, r.labels, r.split) for r in read_pairs(tmp_path, "test")] == expected
    single = read_pairs(tmp_path / "test" / "1.tar")
    assert [(r.labels, r.split) for r in single] == [((one,), None)]


def test_a_shard_or_a_class_too_many(tmp_path):
    tar(tmp_path / "test" / "0.tar", [("a.jpg", b"x"), ("a.cls", b"2")])
    text(tmp_path / "classnames.txt", "cat", "dog")
    assert "sample a.cls: class 2 is none of the 2 classes" in failure(tmp_path)
    text(tmp_path / "test" / "nshards.txt", "3")
    assert "test holds 1 .tar files, but its nshards.txt says 3" in failure(tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.txt", b"x"), ("b.txt", b"x"), ("c.jpg", b"x")], "2 of the 3 samples of FILE have no picture: a, b"),
        ([("a.jpg", b"x"), ("a.png", b"x")], "FILE, sample a has 2 members of one kind: a.jpg, a.png"),
        ([("a.1.jpg", b"x"), ("a.2.jpg", b"x")], "a.1.jpg, a.2.jpg; a key ends at the first dot of a name"),
        ([("a.jpg", b"x"), ("a.txt", b"\xff")], "FILE, sample a.txt is not UTF-8 text (line 1)"),
        ([("a.jpg", b"x"), ("a.json", b"{")], "FILE, sample a.json is not JSON"),
        ([("a.jpg", b"x"), ("a.json", b"[]")], "FILE, sample a.json: expected an object"),
        ([], "FILE is empty: there is no picture in it"),
    ],
)
def test_wrong_tars(tmp_path, members, message):
    file = tar(tmp_path / "x.tar", members)
    assert message.replace("FILE", str(file)) in failure(file)


def test_damaged_tars(tmp_path):
    file = tar(tmp_path / "x.tar", [(f"{n}.jpg", b"x" * 5000) for n in range(3)])
    whole = file.read_bytes()
    assert len(read_pairs(file)) == 3
    for length in (0, 100, 700, 5000, 5632, 5632 + 100, 3 * 5632):  # nothing, in a header, in data, between members …
        file.write_bytes(whole[:length])
        assert "is damaged or cut short" in failure(file), length
    file.write_bytes(whole[:5632] + b"?" * 512 + whole[6144:])
    assert "is damaged or cut short: it has no end mark behind its 1 first samples" in failure(file)
    file.write_bytes(b"?" * 2048)
    assert "or no tar" in failure(file)


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar"])
def test_a_compressed_tar(tmp_path, name):
    file = tar(tmp_path / "x.tar", [("a.jpg", b"x")])
    (tmp_path / "folder" / "train").mkdir(parents=True)
    packed = tmp_path / "folder" / "train" / name
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert "is compressed: unpack it, or re-tar it without compression" in failure(packed)
    with pytest.raises(DataError, match=f"{name} is compressed"):
        read_pairs(tmp_path / "folder")


# Folders --------------------------------------------------------------------------------------------------------------


def test_a_folder_of_pictures_and_texts(tmp_path):
    touch(tmp_path, ["b.JPG", "validation/a.png", "other/deep/c.webp", "lonely.jpg", ".thumbs/d.jpg"])
    text(tmp_path / "b.TXT", "one", "", "two", end="\r\n")
    text(tmp_path / "README.txt", "what this is")
    text(tmp_path / ".thumbs" / "e.txt", "hidden")
    text(tmp_path / "validation" / "a.json", '{"text": ["three"], "labels": ["x"], "n": 1}')
    text(tmp_path / "other" / "deep" / "c.caption", "four")
    assert read_pairs(tmp_path) == [
        Record(tmp_path / "b.JPG", ("one", "two")),
        Record(tmp_path / "lonely.jpg"),
        Record(tmp_path / "other" / "deep" / "c.webp", ("four",)),
        Record(tmp_path / "validation" / "a.png", ("three",), ("x",), "val", {"n": 1}),
    ]


def test_texts_behind_a_link(tmp_path):
    touch(tmp_path / "elsewhere", ["a.jpg"])
    text(tmp_path / "elsewhere" / "a.txt", "one")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "dev").symlink_to(tmp_path / "elsewhere")
    assert [(r.texts, r.split) for r in read_pairs(tmp_path / "root")] == [(("one",), "val")]


def test_a_folder_per_class(tmp_path):
    touch(tmp_path, ["train/cat/1.jpg", "train/dog/young/2.jpg", "test/cat/1.jpg", "bird/3.jpg", "4.jpg"])
    assert read_pairs(tmp_path) == [
        Record(tmp_path / "4.jpg"),
        Record(tmp_path / "bird" / "3.jpg", (), ("bird",)),
        Record(tmp_path / "test" / "cat" / "1.jpg", (), ("cat",), "test"),
        Record(tmp_path / "train" / "cat" / "1.jpg", (), ("cat",), "train"),
        Record(tmp_path / "train" / "dog" / "young" / "2.jpg", (), ("dog",), "train"),
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "is empty: there is no picture in it"),
        (["a.jpg", "b.jpg"], "has 2 pictures and nothing that goes with them"),
        (["images/a.jpg", "pairs.jsonl"], "is a folder with pairs.jsonl in it: name that file itself"),
        (
            ["Images/a.jpg", "captions.txt"],
            "1 text files in ROOT have no picture of their name beside them: ROOT/captions",
        ),
        (["a.jpg", "a.txt", "b.txt", "x/c.txt", "x/d.json"], "3 text files in ROOT have no picture of their name"),
        (["a.jpg", "a.png", "a.txt"], "a.jpg and a.png share the text beside them"),
    ],
)
def test_wrong_folders(tmp_path, files, message):
    touch(tmp_path, files)
    assert message.replace("ROOT", str(tmp_path)) in failure(tmp_path)


# What is none of these ------------------------------------------------------------------------------------------------


def zipped(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.pkl", "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; read are JSONL, "),
        (b" \n\t\r\n", "is empty; read are"),
        (b"\xef\xbb\xbf", "is empty; read are"),
        (b"# Heading\n\nimage,caption\n", "is of an unknown kind; read are JSONL, JSON (a list of objects, Karpathy's"),
        (bytes(range(256)), "is of an unknown kind: binary data; read are"),
        (b"x" * 600 + b"\0", "holds NUL bytes: it is damaged, or no text"),
        ('image,caption\na.jpg,"ü"'.encode("latin-1"), "is not UTF-8 text (line 2): save it as UTF-8"),
        ("image,caption".encode("utf-16"), "is not UTF-8 text but UTF-16: save it as UTF-8"),
        (gzip.compress(b"{}"), "is compressed: unpack it"),
        (pickle.dumps({"image": 1}), "is a pickle, and no pickle is ever loaded"),
        (b"\xff\xd8\xff\xe0 JFIF", "is itself a picture: name the file that lists it, or the folder"),
    ],
)
def test_other_files(tmp_path, content, message):
    (tmp_path / "x.data").write_bytes(content)
    assert message in failure(tmp_path / "x.data")


def test_archives_and_places_that_are_not_there(tmp_path):
    zipped(tmp_path / "x.pt")
    assert "is a ZIP archive: unpack it (.pt and .npz files are such, too" in failure(tmp_path / "x.pt")
    assert "cannot be read: No such file or directory" in failure(tmp_path / "nothing")
    assert "cannot be read: Not a directory" in failure(tmp_path / "x.pt" / "y")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_read_once(tmp_path):
    touch(tmp_path, ["a.jpg"])
    read, write = os.pipe()
    os.write(write, json.dumps({"image": str(tmp_path / "a.jpg"), "text": "one"}).encode())
    os.close(write)
    assert read_pairs(Path(f"/dev/fd/{read}")) == [Record(tmp_path / "a.jpg", ("one",))]
    os.close(read)


# Real data ------------------------------------------------------------------------------------------------------------

REAL = [as_jsonl, as_karpathy, as_coco, as_captions_txt, as_token_txt, as_open_clip_tsv, as_parquet]


@pytest.mark.parametrize("write", REAL)
def test_flickr8k_in_every_form(tmp_path, shared_data, write):
    records = read_pairs(shared_data / "flickr8k" / "captions.jsonl", "test")
    assert len(records) == 1000
    (tmp_path / "Images").symlink_to(shared_data / "flickr8k" / "images")
    source = write(tmp_path, [(record.image.name, record.texts, record.split) for record in records])
    assert checksum(read_pairs(source, "test")) == checksum(records)


@pytest.mark.parametrize("write", [as_folder_of_tars, as_folder, as_parquet_of_bytes])
def test_twenty_real_pictures_in_every_container(tmp_path, shared_data, write):
    records = read_pairs(shared_data / "flickr8k" / "captions.jsonl", "test")[:20]
    source = write(tmp_path, [(record.image.name, record.texts, record.split) for record in records])
    assert checksum(read_pairs(source)) == checksum(records)


def test_real_pictures_come_out_of_a_tar_as_they_went_in(tmp_path, shared_data):
    records = read_pairs(shared_data / "flickr8k" / "captions.jsonl", "test")[:20]
    members = [(record.image.name, record.image.read_bytes()) for record in records]
    for record, inside in zip(records, read_pairs(tar(tmp_path / "x.tar", members)), strict=True):
        outside = read_photo(record.image).image
        assert read_photo(inside.image.read_bytes()).image.tobytes() == outside.tobytes()


def test_several_tars_in_braces(tmp_path):
    """As webdataset's users type them; the order is that of the pattern."""
    for split in ("b", "a"):
        for n in range(9, 12):
            tar(tmp_path / split / f"s-{n:03}.tar", [(f"{split}{n}.jpg", b"x"), (f"{split}{n}.txt", b"told")])
    for pattern, names in (
        ("a/s-{009..011}.tar", ["a9", "a10", "a11"]),
        ("a/s-0{11..9}.tar", None),  # s-09 is none of them
        ("a/s-{011..010}.tar", ["a11", "a10"]),
        ("{b,a}/s-01{0..1}.tar", ["b10", "b11", "a10", "a11"]),
    ):
        if names is None:
            assert "1 of the 3 files that" in failure(tmp_path / pattern)
            assert "are missing: " in failure(tmp_path / pattern)
        else:
            records = read_pairs(tmp_path / pattern)
            assert [record.image.name for record in records] == [f"{name}.jpg" for name in names]
            assert {record.texts for record in records} == {("told",)}
    assert expand_braces("{8..11}-{00..1}") == [f"{a}-{b}" for a in (8, 9, 10, 11) for b in ("00", "01")]
    assert "stands a range" in failure(tmp_path / "s-{x}.tar")
    assert "more than 100,000 files" in failure(tmp_path / "s-{0..100000}.tar")
    assert "more than 100,000 files" in failure(tmp_path / "s-{0..999}{0..999}.tar")
    text(tmp_path / "c1.jsonl", '{"image": "a.jpg"}')
    assert "no .tar: only those are read in braces" in failure(tmp_path / "c{1..1}.jsonl")
    named = tar(tmp_path / "{a,b}.tar", [("a.jpg", b"x")])  # a file may be called so
    assert len(read_pairs(named)) == 1
