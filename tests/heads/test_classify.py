"""Fitting and using classifiers as a whole, on drawings with an encoder of colours; and what odd data come to."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from indexes.errors import ModelMismatch
from retrieval.errors import DataError, MissingExtra, ModelError, UsageError
from retrieval.heads import imbalance
from retrieval.heads.classify import fit, predict
from retrieval.heads.modalities import Column
from retrieval.heads.model import ARRAYS, SETTINGS, FusionClassifier
from retrieval.heads.settings import ClassifySettings
from retrieval.pairs import read_examples
from retrieval.report.classification import classification_page
from tests.fakes import COLOURS, ColourEncoder
from tests.heads.problems import torch  # skips without scikit-learn and torch

assert torch
_NAMES = ("red", "green", "blue", "yellow")
QUICK = ClassifySettings(variants=("early-logistic", "late-average"), draws=50, study=False, pixels=False)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def drawn(folder, count=60, seed=0, **changes):
    """Rows whose label is warm or cold by colour of the picture and word of the text: red and yellow are warm."""
    (folder / "images").mkdir(exist_ok=True)
    random = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        colour = _NAMES[i % 4]
        shade = np.clip(np.array(COLOURS[colour]) * 200 + random.integers(0, 50, 3), 0, 255)
        Image.new("RGB", (8, 8), tuple(shade.tolist())).save(folder / "images" / f"{i}.png")
        label = "warm" if colour in ("red", "yellow") else "cold"
        split = ("train", "train", "train", "val", "test")[i // 4 % 5]
        rows.append({"image": f"{i}.png", "text": f"something {colour}", "label": label, "split": split})
    for row in rows:
        row.update({key: value(row) if callable(value) else value for key, value in changes.items()})
    return rows


def written(folder, rows, name="rows.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def fitted(file, settings=QUICK, encoder=None, **options):
    notes = []
    encoder = encoder or ColourEncoder()
    result, model = fit(file, lambda: encoder, "colours", settings, note=notes.append, **options)
    return result, model, notes


def test_from_rows_to_answers(tmp_path):
    pytest.importorskip("imblearn")
    encoder = ColourEncoder()
    file = written(tmp_path, drawn(tmp_path))
    result, model, notes = fitted(file, replace(QUICK, explain=True, study=True), encoder)
    assert notes == ["fewer than 10 rows of test are of cold, warm: figures for them mean little"]
    assert list(result.models) == ["image", "text", "early-logistic", "late-average"]
    assert result.rows == {"train": 36, "val": 12, "test": 12}
    plain = json.loads(json.dumps(result.to_json()))
    assert list(plain)[:2] == ["models", "chosen"]
    assert plain["chosen"] == "early-logistic"  # the first of equals
    assert plain["models"]["early-logistic"] == {
        "macro_f1": {"value": 1, "low": 1, "high": 1},
        "accuracy": {"value": 1, "low": 1, "high": 1},
    }
    assert encoder.encoded == 60
    _, _, _ = fitted(file, QUICK, encoder)
    assert encoder.encoded == 60  # nothing is encoded twice
    assert {effect.treatment for effect in result.effects} >= {"none", "focal", "smote"}
    assert result.explanation.contribution.shape == (12, 2)
    page = classification_page(result)
    assert page == classification_page(result)
    assert all(word in page for word in ("early-logistic", "macro-F1", "Rare classes", "Calibration", "warm"))

    model.save(tmp_path / "model", {"report.html": page.encode()})
    again = FusionClassifier.load(tmp_path / "model")
    asked = written(
        tmp_path,
        [
            {"image": "1.png", "text": "something green", "label": "never seen"},
            {"image": "0.png"},
            {"text": "a thing of red"},
            {"image": None, "text": ""},
        ],
        "asked.jsonl",
    )
    notes.clear()
    answers = predict(again, asked, lambda: encoder, explain=True, note=notes.append)
    assert [one.answer for one in answers[:3]] == ["cold", "warm", "warm"]
    assert [one.has for one in answers] == [("image", "text"), ("image",), ("text",), ()]
    assert notes == ["1 rows have nothing of image, text: what is said of them is a guess"]
    assert answers[1].contributions["text"] == 0 < answers[1].contributions["image"]
    first = answers[0].to_json()
    assert sum(first["probabilities"].values()) == pytest.approx(1)
    assert answers == predict(model, asked, lambda: encoder, explain=True)
    assert predict(again, asked, lambda: encoder, cached=False)[0].outputs == pytest.approx(answers[0].outputs)


def test_it_refuses_vectors_of_another_model(tmp_path):
    file = written(tmp_path, drawn(tmp_path))
    _, model, _ = fitted(file)
    other = ColourEncoder()
    other.fingerprint = "colours-2"
    with pytest.raises(ModelMismatch, match="trained on vectors of another model"):
        predict(model, file, lambda: other)


def test_further_columns_of_every_kind(tmp_path):
    """The picture and the text say nothing; a number, a category and a vector together do."""
    random = np.random.default_rng(0)
    rows = drawn(tmp_path, 240)
    for i, row in enumerate(rows):
        warm = bool(random.random() < 0.4)
        row |= {
            "label": "warm" if warm else "cold",
            "degrees": float(random.normal(20 if warm else 5)),
            "season": random.choice(["June", "July"] if warm else ["May", "July"]),
            "sensor": (random.normal(size=4) + 3 * warm).tolist(),
            "split": ("train", "val", "test")[i % 3],
        }
    rows[0]["degrees"], rows[3]["season"], rows[6]["sensor"] = float("nan"), None, None
    rows[9].pop("sensor")
    names = ("degrees", "season", "sensor")
    result, model, _ = fitted(written(tmp_path, rows), replace(QUICK, columns=names))
    assert result.modalities == ("image", "text", *names)
    assert [column.kind for column in model.columns] == ["number", "category", "vector"]
    assert result.models["early-logistic"].test["accuracy"] > 0.9
    assert result.models["image"].test["accuracy"] < 0.8
    model.save(tmp_path / "model")
    again = FusionClassifier.load(tmp_path / "model")
    asked = [
        {"image": "0.png", "text": "x red", "degrees": 22, "season": "December", "sensor": [3, 3, 3, 3]},
        {"degrees": 3.5},
    ]
    answers = predict(again, written(tmp_path, asked, "asked.jsonl"), ColourEncoder)
    assert [one.has for one in answers] == [("image", "text", "degrees", "sensor"), ("degrees",)]  # no such season
    assert [one.answer for one in answers] == ["warm", "cold"]


def test_columns_alone_need_no_encoder(tmp_path):
    rows = [{"id": i, "x": i % 7 - 3 + 0.5, "label": "up" if i % 7 > 3 else "down"} for i in range(70)]
    result, model, notes = fit_without_encoder(written(tmp_path, rows), replace(QUICK, columns=("x",)))
    assert result.chosen == "x"
    assert result.verdict == "there is one modality alone: nothing was fused"
    assert "no row is of the split test: 10 are drawn from train" in notes
    assert model.fingerprint == model.encoder == ""
    assert [one.answer for one in predict(model, written(tmp_path, rows), None)][:7] == ["down"] * 4 + ["up"] * 3


def fit_without_encoder(file, settings):
    notes = []
    return *fit(file, None, "", settings, note=notes.append), notes


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_with_gaps(tmp_path, kind):
    rows = drawn(tmp_path)
    rows[1]["image"] = rows[2]["text"] = rows[3]["label"] = rows[4]["image"] = rows[4]["text"] = ""
    if kind == "csv":
        with (tmp_path / "rows.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [{key: value or None for key, value in row.items()} for row in rows]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    examples = read_examples(tmp_path / f"rows.{kind}")
    assert len(examples) == 60
    assert [example.image is None for example in examples[:6]] == [False, True, False, False, True, False]
    assert [example.text == "" for example in examples[:6]] == [False, False, True, False, True, False]
    result, _, notes = fitted(tmp_path / f"rows.{kind}")
    assert "1 rows have nothing in 'label' and are left out" in notes
    assert "1 rows have nothing of image, text: they can only be guessed" in notes
    assert result.rows["train"] == 35
    assert result.models[result.chosen].test["accuracy"] == 1


def test_several_labels(tmp_path):
    file = written(tmp_path, drawn(tmp_path, label=lambda row: [*row["text"].split()[1:], "a thing"]))
    result, model, _ = fitted(file)
    assert result.target.task == "labels"
    assert result.target.names == ("a thing", "blue", "green", "red", "yellow")
    assert result.models[result.chosen].test["macro_f1"] == 1
    assert predict(model, file, ColourEncoder)[0].answer == ["a thing", "red"]
    rows = drawn(tmp_path, label=lambda row: row["text"].split()[1] + "; a thing")
    settings = replace(QUICK, task="labels")
    assert fitted(written(tmp_path, rows), settings)[0].target.names == result.target.names
    assert classification_page(result)


def test_a_number(tmp_path):
    random = np.random.default_rng(0)
    rows = drawn(tmp_path, stars=lambda row: _NAMES.index(row["text"].split()[1]) + 0.1 * float(random.random()))
    result, model, _ = fitted(written(tmp_path, rows), replace(QUICK, target="stars", explain=True))
    assert result.target.task == "number"
    assert list(result.to_json()["models"]["image"]) == ["r2", "mae"]
    assert result.models[result.chosen].test["r2"] > 0.9
    answer = predict(model, written(tmp_path, rows), ColourEncoder)[1]
    assert answer.answer == pytest.approx(1, abs=0.5)
    assert "probabilities" not in answer.to_json()
    assert "R²" in classification_page(result)
    for broken in ("many", float("inf")):
        with pytest.raises(DataError, match="is no number"):
            fitted(
                written(tmp_path, [*rows, {**rows[0], "stars": broken}]), replace(QUICK, target="stars", task="number")
            )


def test_cross_validation_uses_every_row_once(tmp_path):
    rows = [{key: value for key, value in row.items() if key != "split"} for row in drawn(tmp_path, 40)]
    result, model, _ = fitted(written(tmp_path, rows), replace(QUICK, folds=4))
    assert result.folds == 4
    assert sum(one.rows for one in result.models["image"].details.classes) == 40
    assert result.models[result.chosen].test["accuracy"] == 1
    assert predict(model, written(tmp_path, rows), ColourEncoder)[0].answer == "warm"
    with pytest.raises(DataError, match="3 rows with a label are too few for 4 folds"):
        fitted(written(tmp_path, rows[:3]), replace(QUICK, folds=4))


def test_labels_of_val_and_test_that_train_does_not_have(tmp_path):
    rows = drawn(tmp_path, label=lambda row: "hot" if row["split"] != "train" and row["image"] < "2" else row["label"])
    result, _, notes = fitted(written(tmp_path, rows))
    assert "labels of val that are not in train (hot): their rows are left out there" in notes
    assert "labels of test that are not in train (hot): their rows are wrong whatever is said of them" in notes
    assert result.target.names == ("cold", "warm")
    assert result.models[result.chosen].test["accuracy"] < 1


@pytest.mark.parametrize(
    ("changes", "settings", "told"),
    [
        ({"label": "warm"}, {}, "all rows to learn from are 'warm': there is nothing to tell apart"),
        ({"label": None}, {}, "no row to learn from has anything in the column 'label'; name another with --target"),
        ({}, {"target": "mood"}, "nothing in the column 'mood'|anything in the column 'mood'"),
        ({"split": "test"}, {}, "no row with a label is of the split train"),
        ({"label": lambda row: row["label"] if row["split"] == "train" else "hot"}, {}, "nothing to choose by"),
        ({}, {"columns": ("height",)}, "no row to learn from has a value in the column 'height'"),
        ({"x": "a lot"}, {"columns": ("x", "x")}, "named twice"),
        ({}, {"columns": ("image",)}, "cannot be a further column"),
        ({}, {"variants": ("gmus",)}, "there is no variant 'gmus': there are early-logistic, early-mlp"),
        ({}, {"task": "classes"}, "the task must be auto, class, labels, number, not 'classes'"),
        ({}, {"folds": 1}, "at least 2 folds"),
        ({}, {"imbalance": "augment"}, "made with --views"),
        ({}, {"draws": 0}, "at least one draw"),
        ({"label": ["a", "b"]}, {"task": "class"}, "predict them with --task labels"),
        ({"x": lambda row: [1, 2] if row["image"] < "2" else [1]}, {"columns": ("x",)}, "different widths: 1, 2"),
        ({"x": lambda row: float("inf") if row["image"] == "3.png" else 1.5}, {"columns": ("x",)}, "expected a number"),
        ({"x": lambda row: row["image"]}, {"columns": ("x",)}, None),
        ({"image": None, "text": " "}, {}, "no row has a picture or a text"),
        ({"image": "gone.png"}, {}, "60 of the 60 pictures that .* names are missing"),
    ],
)
def test_what_cannot_be_fitted_is_told_in_a_line(tmp_path, changes, settings, told):
    file = written(tmp_path, drawn(tmp_path, **changes))
    if told is None:
        fitted(file, replace(QUICK, **settings))
        return
    with pytest.raises(DataError, match=told) as raised:
        fitted(file, replace(QUICK, **settings))
    assert "\n" not in str(raised.value)


def test_a_column_that_is_a_name_and_not_a_category(tmp_path):
    file = written(tmp_path, drawn(tmp_path, 300, owner=lambda row: f"owner of {row['image']}"))
    with pytest.raises(DataError, match="'owner' has 300 different values, at most 200 make a category"):
        Column.of("owner", read_examples(file))


def test_a_picture_that_cannot_be_read_is_as_if_it_were_not_there(tmp_path):
    rows = drawn(tmp_path)
    (tmp_path / "images" / "5.png").write_bytes(b"no picture")
    result, _, notes = fitted(written(tmp_path, rows))
    assert any("1 of 60 pictures cannot be read" in note and "as if they had none" in note for note in notes)
    assert result.rows["train"] == 36


def test_a_damaged_classifier_is_refused(tmp_path):
    _, model, _ = fitted(written(tmp_path, drawn(tmp_path)))
    model.save(tmp_path / "model")
    with pytest.raises(UsageError, match="exists already"):
        model.save(tmp_path / "model")
    with pytest.raises(ModelError, match="holds no classifier"):
        FusionClassifier.load(tmp_path)
    whole = (tmp_path / "model" / ARRAYS).read_bytes()
    for broken in (b"", whole[: len(whole) // 2], b"\x80\x04pickle"):
        (tmp_path / "model" / ARRAYS).write_bytes(broken)
        with pytest.raises(ModelError, match="cannot be read as a classifier"):
            FusionClassifier.load(tmp_path / "model")
    (tmp_path / "model" / ARRAYS).write_bytes(whole)
    settings = json.loads((tmp_path / "model" / SETTINGS).read_text())
    for change in ({"model": {"kind": "oracle"}}, {"target": {}}, {"modalities": ["smell"]}, {"format": 2}):
        (tmp_path / "model" / SETTINGS).write_text(json.dumps({**settings, **change}))
        with pytest.raises(ModelError, match=r"cannot be read as a classifier|reads up to"):
            FusionClassifier.load(tmp_path / "model")
    assert not list(tmp_path.glob(".*.part"))


def test_no_array_of_objects_is_ever_loaded(tmp_path):
    _, model, _ = fitted(written(tmp_path, drawn(tmp_path)))
    model.save(tmp_path / "model")
    with (tmp_path / "model" / ARRAYS).open("wb") as stream:
        np.savez(stream, **{"mean/0": np.array([{"a": 1}], object)})
    with pytest.raises(ModelError, match="cannot be read as a classifier: Object arrays cannot be loaded"):
        FusionClassifier.load(tmp_path / "model")


def test_tables_of_other_sizes_are_refused(tmp_path):
    _, model, _ = fitted(written(tmp_path, drawn(tmp_path)))
    outputs = model.predict({"image": np.eye(3, dtype=np.float32)})  # no text at all
    assert outputs.shape == (3, 2)
    with pytest.raises(ModelError, match=r"'image' must be a table of \(3, 3\), not \(3, 4\)"):
        model.predict({"image": np.ones((3, 4), np.float32)})
    with pytest.raises(ModelError, match="'text'"):
        model.predict({"image": np.ones((3, 3), np.float32), "text": np.ones((2, 3), np.float32)})


def test_augmented_views_are_embedded_once_and_learnt_from(tmp_path):
    pytest.importorskip("imblearn")
    encoder = ColourEncoder()
    file = written(tmp_path, drawn(tmp_path, 60, label=lambda row: "warm" if "red" in row["text"] else "cold"))
    settings = replace(QUICK, imbalance="augment", views=2, study=True)
    result, _, _ = fitted(file, settings, encoder)
    assert encoder.encoded == 180
    fitted(file, settings, encoder)
    assert encoder.encoded == 180
    rows = {effect.treatment: effect.rows for effect in result.effects}
    assert rows["augment"] > rows["none"] == 36


def test_without_imbalanced_learn_the_rest_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(imbalance, "find_spec", lambda name: None)
    file = written(tmp_path, drawn(tmp_path))
    result, _, notes = fitted(file, replace(QUICK, study=True))
    assert [effect.treatment for effect in result.effects] == ["none", "class-weights", "focal"]
    assert any("smote needs packages that are not installed: pip install 'diptych[heads]'" in note for note in notes)
    with pytest.raises(MissingExtra):
        fitted(file, replace(QUICK, imbalance="smote"))


def test_a_cnn_on_the_pixels_is_measured_beside_the_vectors(tmp_path):
    rows = drawn(tmp_path)
    rows[0].pop("image")
    result, model, _ = fitted(written(tmp_path, rows), replace(QUICK, pixels=True))
    (cnn,) = [one for one in result.baselines if one.name == "cnn"]
    assert cnn.modality == "image"
    assert cnn.test["accuracy"] > 0.9  # the colour is all there is to see
    assert cnn.parameters > 100_000
    assert "image: cnn" in classification_page(result)
    assert "cnn" not in json.dumps(model.fitted.settings())


def test_turned_pictures_have_no_empty_corners():
    from retrieval.heads.views import turned

    for size in ((90, 60), (60, 90), (50, 50), (120, 40)):
        for angle in (-15, 3, 15):
            out = np.asarray(turned(Image.new("RGB", size, (200, 100, 50)), angle))
            assert out[1:-1, 1:-1].min() > 30, (size, angle)
            assert out.shape[0] / out.shape[1] == pytest.approx(size[1] / size[0], rel=0.2)
            assert out.size > 0.2 * size[0] * size[1] * 3
