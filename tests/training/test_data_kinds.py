"""Everything that `diptych evaluate` reads can be learnt from, and what is the same is learnt the same."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

torch = pytest.importorskip("torch")

from retrieval.bundle import Bundle  # noqa: E402
from retrieval.pairs import read_pairs  # noqa: E402
from retrieval.training import config as recipes  # noqa: E402
from retrieval.training import loop  # noqa: E402
from retrieval.training.data import Data, Sampler  # noqa: E402
from retrieval.training.pictures import TrainedTowers  # noqa: E402
from tests.training.drawings import weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def as_jsonl(folder, records):
    rows = [{"image": str(record.image), "captions": record.texts} for record in records]
    return written(folder / "pairs.jsonl", "\n".join(map(json.dumps, rows)))


def as_csv(folder, records):
    stream = io.StringIO()
    csv.writer(stream).writerows([("filepath", "title"), *((r.image, text) for r in records for text in r.texts)])
    return written(folder / "pairs.csv", stream.getvalue())


def as_parquet(folder, records):
    table = {"image": [r.image.read_bytes() for r in records], "captions": [list(r.texts) for r in records]}
    pq.write_table(pa.table(table), folder / "pairs.parquet")
    return folder / "pairs.parquet"


def as_karpathy(folder, records):
    images = [
        {"filename": str(r.image), "sentences": [{"raw": text} for text in r.texts], "split": "train"} for r in records
    ]
    return written(folder / "dataset_toy.json", json.dumps({"images": images, "dataset": "toy"}))


def as_coco(folder, records):
    images = [{"id": row, "file_name": str(r.image)} for row, r in enumerate(records)]
    annotations = [{"image_id": row, "caption": text} for row, r in enumerate(records) for text in r.texts]
    name = "captions_train2017.json"
    return written(folder / name, json.dumps({"images": images, "annotations": annotations}))


def as_flickr(folder, records):
    lines = [f"{r.image}#{number}\t{text}" for r in records for number, text in enumerate(r.texts)]
    return written(folder / "toy.token.txt", "\n".join(lines))


def as_tar(folder, records):
    with tarfile.open(folder / "toy.tar", "w") as tar:
        for record in records:
            for kind, content in (("png", record.image.read_bytes()), ("txt", "\n".join(record.texts).encode())):
                member = tarfile.TarInfo(f"{record.image.stem}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder / "toy.tar"


def as_folder(folder, records):
    (folder / "beside").mkdir()
    for record in records:
        (folder / "beside" / record.image.name).write_bytes(record.image.read_bytes())
        written(folder / "beside" / f"{record.image.stem}.txt", "\n".join(record.texts))
    return folder / "beside"


def written(file: Path, text: str) -> Path:
    file.write_text(text, "utf-8")
    return file


@pytest.fixture
def records(toy):
    """Of the toy's training split, in the order of their names."""
    return sorted(read_pairs(Path(toy.data) / "toy.jsonl", "train"), key=lambda record: str(record.image))


@pytest.fixture
def two_steps(toy):
    return replace(toy, vocabulary=None, epochs=2)


@pytest.mark.parametrize(
    "write", [as_csv, as_parquet, as_karpathy, as_coco, as_flickr, as_tar, as_folder], ids=lambda write: write.__name__
)
def test_two_steps_from_each_kind(two_steps, records, tmp_path, write):
    for name, form in (("jsonl", as_jsonl), ("other", write)):
        (tmp_path / name).mkdir()
        config = replace(two_steps, sources=(recipes.Source(str(form(tmp_path / name, records))),))
        loop.train(config, tmp_path / f"run-{name}")
    assert weights(tmp_path / "run-other") == weights(tmp_path / "run-jsonl")
    trained = [Bundle.load(tmp_path / f"run-{name}").training["data"][0]["pictures"] for name in ("jsonl", "other")]
    assert trained == [8, 8]


@pytest.fixture
def classes(tmp_path, records):
    """A folder per class, above them the splits."""
    folder = tmp_path / "classes"
    for record in records:
        colour, side = record.image.stem.split("-")
        for split in ("train", "val"):
            place = folder / split / f"{colour}_square"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{side}.png").write_bytes(record.image.read_bytes())
    return folder


def test_a_folder_of_classes_is_learnt_by_prompts(two_steps, classes, tmp_path):
    """Prompts made of the labels; pictures of one class are no negatives; validation is zero-shot classification."""
    config = replace(two_steps, sources=(recipes.Source(str(classes)),))
    scores = loop.train(config, tmp_path / "run")
    assert set(scores) == {"before_val_classes_top1", "val_classes_top1"}
    start = loop.start_model(config)
    towers = TrainedTowers(start.model, start.preprocessing, start.tokenizer_json, 64, "cpu", 8, 0.0)
    data = Data(config, towers, None)
    (batch,) = Sampler(replace(config, epochs=1, captions=1), data).batches(0)
    colours = [row // 2 for row in range(8)]  # two of each in the order of the names
    plan = Sampler(replace(config, epochs=1), data).plan[0][1]
    assert batch.owner.tolist() == [colours[row] for row in plan.tolist()]
    prompts = [f"a photo of a {colour} square." for colour in ("blue", "green", "red", "white")]
    expected = towers.sentences([prompts[colours[row]] for row in plan.tolist()])
    np.testing.assert_array_equal(batch.sentences.numpy(), expected.numpy())
    assert data.val is None
    assert data.named[0].right.shape == (8, 4)


def test_captions_are_preferred_to_labels(two_steps, records, tmp_path):
    """A label beside captions is a column to balance by, and no sentence."""
    rows = [{"image": str(record.image), "captions": record.texts, "label": "thing"} for record in records]
    labelled = written(tmp_path / "labelled.jsonl", "\n".join(map(json.dumps, rows)))
    (tmp_path / "plain").mkdir()
    plain = as_jsonl(tmp_path / "plain", records)
    for name, pairs in (("labelled", labelled), ("plain", plain)):
        loop.train(replace(two_steps, sources=(recipes.Source(str(pairs)),)), tmp_path / f"run-{name}")
    assert weights(tmp_path / "run-labelled") == weights(tmp_path / "run-plain")
