"""`diptych evaluate` as a person runs it: data in many forms, results in many forms, and the line of each mistake."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tarfile

import pytest

from retrieval.encoders import find_bundle
from tests.cli.commands import COMMAND, complaint, diptych, result
from tests.odd_photos import real_photos

CAPTIONS = {
    "chelsea.png": ("a cat", "animal"),
    "coffee.png": ("a cup of coffee", "thing"),
    "rocket.jpg": ("a rocket launching into the sky at night", "thing"),
    "motorcycle_left.png": ("a motorcycle", "thing"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four photos with a caption and a label each, three of them in the test split."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "images").mkdir()
    for photo in real_photos():
        if photo.name in CAPTIONS:
            shutil.copyfile(photo, folder / "images" / photo.name)
    rows = [
        {"image": name, "captions": [caption], "label": label, "split": "train" if "motor" in name else "test"}
        for name, (caption, label) in CAPTIONS.items()
    ]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with (folder / "pairs.csv").open("w", newline="") as stream:
        table = csv.writer(stream, delimiter="\t")
        table.writerow(("filepath", "title"))
        table.writerows((f"images/{name}", caption) for name, (caption, _) in CAPTIONS.items())
    return folder


def test_the_test_split_is_taken_and_said(data):
    run = diptych("evaluate", data / "captions.jsonl", "--json")
    fields = result(run)
    assert "evaluating the test split" in run.stderr
    assert (fields["split"], fields["images"], fields["texts"]) == ("test", 3, 3)
    assert fields["data"] == str(data / "captions.jsonl")
    assert fields["metrics"]["t2i_hit@1"] == 1.0
    assert set(fields["intervals"]) == set(fields["metrics"])
    everything = result(diptych("evaluate", data / "captions.jsonl", "--split", "all", "--json", "--bootstrap", "0"))
    assert (everything["split"], everything["images"], everything["intervals"]) == ("all", 4, {})
    as_csv = result(diptych("evaluate", data / "pairs.csv", "--json", "--bootstrap", "0"))
    assert as_csv["metrics"] == everything["metrics"]
    assert len(as_csv["checksum"]) == 64


def test_tsv_with_intervals(data):
    run = diptych("evaluate", data / "captions.jsonl", "-k", "1", "-k", "3", "--slice", "caption-length")
    assert run.returncode == 0, run.stderr
    rows = [line.split("\t") for line in run.stdout.splitlines()]
    assert rows[0] == ["t2i_hit@1", "1.0000", "1.0000", "1.0000"]
    names = [row[0] for row in rows]
    assert {"t2i_hit@3", "i2t_ndcg@3", "rsum", "caption-length=2:t2i_map", "caption-length=8:t2i_hit@1"} <= set(names)
    assert "t2i_hit@5" not in names
    assert "3 pictures, 3 captions (checksum " in run.stderr


def test_a_table_on_a_terminal(data):
    """Both directions side by side, in percent."""
    parent, child = pty.openpty()
    arguments = ["evaluate", data / "captions.jsonl", "--compare", "builtin", "--slice", "label", "--index", "SQ8"]
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        stdout=child,
        stderr=subprocess.PIPE,
        env={**os.environ, "COLUMNS": "160", "TERM": "xterm"},
    ) as process:
        os.close(child)
        text = b""
        while True:
            try:
                block = os.read(parent, 65536)
            except OSError:  # the other end was closed
                break
            if not block:
                break
            text += block
        assert process.wait() == 0, process.stderr.read()
    os.close(parent)
    lines = re.sub(r"\x1b\[[\d;]*m", "", text.decode()).splitlines()
    assert any("text to image" in line and "image to text" in line for line in lines)
    (hit,) = [line for line in lines if line.split()[:1] == ["hit@1"]]
    assert hit.split() == ["hit@1", *["100.0", "(100.0", "…", "100.0)"] * 2]
    assert any(line.split()[:3] == ["label=thing", "2", "2"] for line in lines)
    coded = [line.split() for line in lines if line.split()[:1] == ["SQ8"]]
    assert [line[1:5] for line in coded] == [["100.0"] * 4] * 2  # hit@1, 5 and 10, and of the ten nearest; both ways
    (change,) = [line for line in lines if line.split()[:1] == ["t2i_hit@1"]]
    assert change.split()[1:4] == ["100.0", "100.0", "+0.0"]


def test_classification_with_templates(data, tmp_path):
    (tmp_path / "templates.txt").write_text("a photo of an {}.\n\na picture of a {c}\n")
    fields = result(
        diptych(
            "evaluate", data / "captions.jsonl", "--task", "classification", "--templates", tmp_path / "templates.txt",
            "--split", "all", "--json",
        )
    )  # fmt: skip
    assert (fields["images"], fields["texts"]) == (4, 2)
    assert set(fields["metrics"]) == {"top1", "top5", "mean_per_class"}
    assert fields["metrics"]["top5"] == 1.0


def test_clip_benchmark_s_own_layout(data, tmp_path):
    """Tars per split, numbers for classes, their names and prompts beside them."""
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "nshards.txt").write_text("1")
    with tarfile.open(tmp_path / "test" / "0.tar", "w") as tar:
        for number, name in enumerate(("chelsea.png", "coffee.png")):
            tar.add(data / "images" / name, f"{number}.png")
            label = tarfile.TarInfo(f"{number}.cls")
            label.size = 1
            tar.addfile(label, io.BytesIO(str(number).encode()))
    (tmp_path / "classnames.txt").write_text("cat\ncup of coffee\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    run = diptych("evaluate", tmp_path, "--task", "classification", "--format", "clip-benchmark")
    assert result(run)["metrics"]["acc1"] == 1.0
    assert "zeroshot_classification_templates.txt" in run.stderr


def test_comparison(data, tmp_path):
    shutil.copytree(find_bundle("builtin"), tmp_path / "copy")
    run = diptych("evaluate", data / "captions.jsonl", "--compare", tmp_path / "copy", "--json")
    comparison = result(run)["comparison"]
    assert set(comparison["differences"].values()) == {0.0}
    assert set(map(tuple, comparison["intervals"].values())) == {(0.0, 0.0)}


def test_clip_benchmark_page_and_run(data, tmp_path):
    run = diptych(
        "evaluate", data / "captions.jsonl", "--format", "clip-benchmark",
        "--html", tmp_path / "page.html", "--runs", tmp_path / "best.run",
    )  # fmt: skip
    assert result(run) == {
        "dataset": data.name,
        "model": "diptych-builtin-3",
        "pretrained": "",
        "task": "zeroshot_retrieval",
        "metrics": {f"{way}_retrieval_recall@{k}": 1.0 for way in ("image", "text") for k in (1, 5, 10)},
        "language": "en",
    }
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "a rocket launching into the sky at night" in page
    lines = [line.split() for line in (tmp_path / "best.run").read_text().splitlines()]
    assert len(lines) == 3 * 3 + 3 * 3
    assert lines[0][:4] == ["t2i:chelsea.png#0", "Q0", "chelsea.png", "1"]
    assert len((tmp_path / "best.run.qrels").read_text().splitlines()) == 3 + 3
    assert "wrote" in run.stderr


def test_through_indexes(data, tmp_path):
    arguments = (
        "evaluate",
        data / "captions.jsonl",
        "--index",
        "auto",
        "--index",
        "Flat",
        "--html",
        tmp_path / "p.html",
    )
    run = diptych(*arguments)
    assert run.returncode == 0, run.stderr
    values = dict(line.split("\t")[:2] for line in run.stdout.splitlines())
    for kind in ("exact", "auto", "Flat"):
        for way in ("t2i", "i2t"):
            for name in (f"{way}_hit@1", f"{way}_ndcg@10"):
                assert values[f"index={kind}:{name}"] == values[name]
            assert values[f"index={kind}:{way}_recall_of_exact@10"] == "1.0000"
            assert float(values[f"index={kind}:{way}_queries_per_second"]) > 0
    assert values["index=exact:t2i_bytes"] == "0"
    assert int(values["index=Flat:t2i_bytes"]) > 3 * 4 * 256
    assert "auto, for 3 pictures: exact search" in run.stderr
    assert "auto, for 3 texts: exact search" in run.stderr
    assert "Through an index" in (tmp_path / "p.html").read_text("utf-8")
    fields = result(diptych(*arguments, "--json"))
    assert [(scores["direction"], scores["kind"]) for scores in fields["indexes"]] == [
        (way, kind) for way in ("t2i", "i2t") for kind in ("exact", "exact", "Flat")
    ]
    assert fields["indexes"][2]["metrics"]["t2i_hit@5"] == fields["metrics"]["t2i_hit@5"]


def test_the_second_time_no_picture_is_decoded(data, tmp_path):
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    first = result(diptych("evaluate", data / "captions.jsonl", "--json", env=env))
    assert result(diptych("evaluate", data / "captions.jsonl", "--json", env=env)) == first
    empty = tmp_path / "no-tower"
    shutil.copytree(find_bundle("builtin"), empty)
    (empty / "image.onnx").write_bytes(b"")  # the fingerprint stands in model.json; what is not needed is not opened
    again = result(diptych("evaluate", data / "captions.jsonl", "--json", "--model", empty, env=env))
    assert again["metrics"] == first["metrics"]
    anew = diptych("evaluate", data / "captions.jsonl", "--json", "--model", empty, "--no-cache", env=env)
    assert "image.onnx" in complaint_after_notes(anew)


def complaint_after_notes(run):
    run.stderr = "".join(
        line for line in run.stderr.splitlines(keepends=True) if not line.startswith("evaluating the test split")
    )
    return complaint(run)


def test_mistakes(data, tmp_path):
    pairs = data / "captions.jsonl"
    assert "no column 'weather'" in complaint_after_notes(diptych("evaluate", pairs, "--slice", "weather"))
    assert "its splits are: test, train" in complaint(diptych("evaluate", pairs, "--split", "val"))
    assert "no such folder of pictures" in complaint(diptych("evaluate", pairs, "--images", tmp_path / "none"))
    assert "cannot be read" in complaint(diptych("evaluate", pairs, "--templates", tmp_path / "none.txt"))
    assert "kind 'Flatt' on 3 vectors" in complaint_after_notes(diptych("evaluate", pairs, "--index", "Flatt"))
    few = complaint_after_notes(diptych("evaluate", pairs, "--index", "IVF4,Flat", "--split", "all"))
    assert "it needs at least 156 to be trained" in few
    for wrong in (
        ["--prompt", "a photo"],
        ["--task", "classification", "--index", "auto"],
        ["-k", "0"],
        ["--ties", "lucky"],
        ["--bootstrap", "-1"],
        ["--task", "classification", "--runs", "x"],
        ["--format", "xml"],
    ):
        run = diptych("evaluate", pairs, *wrong)
        assert (run.returncode, run.stdout, "Traceback" in run.stderr) == (2, "", False), run.stderr
    where = tmp_path / "no" / "such"
    assert "cannot be written" in complaint_after_notes(diptych("evaluate", pairs, "--html", where))
    assert "cannot be written" in complaint_after_notes(diptych("evaluate", pairs, "--runs", where))
    (data / "images" / "chelsea.png").rename(data / "images" / "gone.png")
    try:
        assert "1 of the 3 pictures" in complaint(diptych("evaluate", pairs))
    finally:
        (data / "images" / "gone.png").rename(data / "images" / "chelsea.png")
