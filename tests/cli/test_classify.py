"""`diptych classify` as a user types it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.cli.commands import COMMAND, complaint, diptych, result
from tests.training.drawings import COLOURS, SHAPES, draw

pytest.importorskip("sklearn")
pytest.importorskip("torch")

QUICK = ("--variants", "early-logistic,late-average", "--bootstrap", "50", "--no-study", "--no-pixels")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Drawings whose label is their shape; the text names the shape too, in half of them."""
    folder, random, lines = tmp_path_factory.mktemp("drawings"), np.random.default_rng(0), []
    for i, (colour, shape) in enumerate((colour, shape) for colour in COLOURS for shape in tuple(SHAPES)[:2]):
        for split in ("train", "train", "val", "test"):
            name = f"{len(lines):02}.png"
            draw(colour, shape, random).save(folder / name)
            text = f"a {shape}" if i % 3 else "who knows"
            lines.append({"image": name, "text": text, "label": shape, "split": split})
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


@pytest.fixture(scope="module")
def classifier(rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "shapes"
    return out, diptych("classify", "fit", rows, "--out", out, "--json", *QUICK)


def test_fit_prints_every_model_and_the_chosen_one(classifier):
    out, run = classifier
    printed = result(run)
    assert list(printed)[:2] == ["models", "chosen"]
    assert list(printed["models"]) == ["image", "text", "early-logistic", "late-average"]
    for measures in printed["models"].values():
        assert list(measures) == ["macro_f1", "accuracy"]
        assert all(one["low"] <= one["value"] <= one["high"] for one in measures.values())
    assert printed["chosen"] in ("early-logistic", "late-average")
    assert sorted(file.name for file in out.iterdir()) == [
        "classifier.json",
        "classifier.npz",
        "report.html",
        "result.json",
    ]
    assert json.loads((out / "result.json").read_text()) == printed
    assert "Does fusion pay?" in (out / "report.html").read_text()
    assert run.stderr.splitlines()[-1] == f"wrote {out / 'report.html'}"


def test_predict_says_what_each_row_is(classifier, rows, tmp_path):
    out, _ = classifier
    answers = result(diptych("classify", "predict", out, rows, "--json", "--explain"))
    assert len(answers) == len(rows.read_text().splitlines())
    first = answers[0]
    assert first["label"] == max(first["probabilities"], key=first["probabilities"].get)
    assert list(first["contributions"]) == first["modalities"] == ["image", "text"]
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "odd.csv").write_text("image,text\na.png,\n,a circle\n")
    run = diptych("classify", "predict", out, tmp_path / "odd.csv")
    assert run.returncode == 0, run.stderr
    lines = [line.split("\t") for line in run.stdout.splitlines()]
    assert [line[2] for line in lines] == [str(tmp_path / "a.png"), "a circle"]
    assert lines[1][0] == "circle"


def test_an_index_gives_its_vectors(rows, tmp_path):
    shutil.copytree(rows.parent, tmp_path / "drawings")
    data, count = tmp_path / "drawings" / rows.name, len(rows.read_text().splitlines())
    assert result(diptych("index", data.parent, "--json"))["embedded"] == count
    options = ("--json", "--index", data.parent)
    told = f"the index has the vectors of {count} of the pictures: nothing of them was decoded or encoded"
    run = diptych("classify", "fit", data, "--out", tmp_path / "out", *options, *QUICK)
    assert list(result(run)["models"]) == ["image", "text", "early-logistic", "late-average"]
    assert told in run.stderr
    run = diptych("classify", "predict", tmp_path / "out", data, *options)
    assert len(result(run)) == count
    assert told in run.stderr
    assert "no index" in complaint(diptych("classify", "predict", tmp_path / "out", data, "--index", tmp_path / "no"))


def test_mistakes_are_one_line(classifier, rows, tmp_path):
    out, _ = classifier
    assert "exists already" in complaint(diptych("classify", "fit", rows, "--out", out))
    fit = ("classify", "fit", rows, "--out", tmp_path / "new")
    assert "there is no variant 'x'" in complaint(diptych(*fit, "--variants", "x"))
    assert "anything in the column 'mood'" in complaint(diptych(*fit, "--target", "mood"))
    assert "holds no classifier" in complaint(diptych("classify", "predict", tmp_path, rows))
    assert "cannot be read" in complaint(diptych("classify", "predict", out, tmp_path / "none.csv"))
    assert not (tmp_path / "new").exists()
    assert diptych(*fit, "--imbalance", "magic").returncode == 2


def test_without_scikit_learn_it_names_the_extra(rows, tmp_path):
    code = f"import sys; sys.modules['sklearn'] = None; {COMMAND}"
    run = subprocess.run(
        [sys.executable, "-c", code, "classify", "fit", rows, "--out", tmp_path / "new"], capture_output=True, text=True
    )
    line = "diptych: classify needs packages that are not installed: pip install 'diptych[heads]'"
    assert complaint(run) == line
