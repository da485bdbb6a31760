"""Training the built-in model further on drawings, as a user does it, and the one plain line of every mistake."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from cli.main import main as run_command  # noqa: E402
from retrieval.bundle import Bundle  # noqa: E402
from retrieval.encoders import find_bundle  # noqa: E402
from retrieval.errors import DataError, UsageError  # noqa: E402
from retrieval.evaluation import evaluate  # noqa: E402
from retrieval.onnx_encoder import OnnxEncoder  # noqa: E402
from retrieval.pairs import checksum, read_pairs  # noqa: E402
from retrieval.training import config as recipes  # noqa: E402
from retrieval.training import features, loop  # noqa: E402
from retrieval.training.data import Pairs, Sampler  # noqa: E402
from retrieval.training.pictures import TrainedTowers  # noqa: E402
from tests.training.drawings import COLOURS, weights  # noqa: E402


@pytest.fixture(scope="module")
def trained(world):
    """`diptych train` in a process of its own."""
    output = world.root / "run"
    code = "from cli.main import run; run()"
    arguments = ["train", world.pairs, "-o", output, "--epochs", "30", "--lr", "1e-3", "--json"]
    process = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return SimpleNamespace(output=output, printed=json.loads(process.stdout), said=process.stderr)


@pytest.fixture
def train(world, quick, tmp_path):
    def train(name, **changes):
        settings = {"epochs": 3, "learning_rate": 1e-3, **changes}
        config = recipes.with_changes(recipes.config_for([world.pairs], settings.pop("model", "builtin")), settings)
        return tmp_path / name, loop.train(config, tmp_path / name)

    return train


# ---- what a user gets ------------------------------------------------------------------------------------------------


def test_it_learns_what_the_drawings_show(trained):
    metrics = trained.printed["metrics"]
    before, after = metrics["before_val_t2i_hit@1"], metrics["val_t2i_hit@1"]
    assert after == 1.0 or after >= before + 0.3
    assert metrics["val_i2t_hit@1"] >= metrics["before_val_i2t_hit@1"]


def test_the_numbers_are_those_of_the_bundle_that_was_written(world, trained):
    """Computed again through ONNX, with the weights as stored (int8, fp16), from the files, by `evaluate`."""
    records = read_pairs(world.pairs, "val")
    for model, prefix in ((find_bundle("builtin"), "before_val_"), (trained.output, "val_")):
        again = evaluate(OnnxEncoder(Bundle.load(model)), records).metrics
        told = {key: value for key, value in again.items() if prefix + key in trained.printed["metrics"]}
        assert {"t2i_hit@1", "i2t_hit@10", "t2i_median_rank"} <= set(told)
        for key, value in told.items():
            # A near tie may fall either way: one or two of 20, or three where activations are rounded to int8.
            tolerance = 2 if key.endswith("rank") else 0.16
            assert trained.printed["metrics"][prefix + key] == pytest.approx(value, abs=tolerance), key


def test_the_run_folder_is_a_bundle_with_its_record(world, trained):
    bundle = Bundle.load(trained.output)
    assert bundle.fingerprint == bundle.compute_fingerprint() != Bundle.load(find_bundle("builtin")).fingerprint
    assert bundle.training["data"] == [
        {
            "pairs": str(world.pairs),
            "split": "train",
            "pictures": 40,
            "checksum": checksum(read_pairs(world.pairs, "train")),
        }
    ]
    assert bundle.training["scores"]["val_t2i_hit@1"] == round(trained.printed["metrics"]["val_t2i_hit@1"], 4)
    assert (bundle.training["settings"]["epochs"], bundle.training["settings"]["seed"]) == (30, 0)
    config = json.loads((trained.output / "config.json").read_text())
    assert (config["model"], config["learning_rate"]) == ("builtin", 1e-3)
    log = [json.loads(line) for line in (trained.output / "log.jsonl").read_text().splitlines()]
    assert (log[0]["step"], log[-1]["step"]) == (0, 30)  # 40 pictures are one batch: a step an epoch
    assert log[0]["val_t2i_hit@1"] == trained.printed["metrics"]["before_val_t2i_hit@1"]
    assert 0 < log[-2]["loss"] < 3
    assert trained.printed["model"] == str(trained.output)


def test_search_with_the_run(world, trained, tmp_path, monkeypatch, capfd):
    """Index the drawings with the run, and find each by its words, from anywhere."""
    photos = tmp_path / "photos"
    shutil.copytree(world.pairs.parent, photos, ignore=shutil.ignore_patterns("*.jsonl"))
    monkeypatch.chdir(trained.output.parent)
    command("index", photos, "--model", trained.output.name)
    monkeypatch.chdir(photos)
    capfd.readouterr()
    for colour, shape in (("red", "circle"), ("black", "cross"), ("yellow", "triangle")):
        command("search", f"a {colour} {shape}", "-n", "-t", "3", "-f")
        found = {Path(line).name for line in capfd.readouterr().out.splitlines()}
        right = {line["image"] for line in world.captions if line["captions"] == [f"a {colour} {shape}"]}
        assert len(found & right) >= 2, (colour, shape)


# ---- repeatable, and continued ---------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(train):
    first, scores = train("first")
    second, again = train("second")
    assert weights(first) == weights(second)
    assert scores == again
    assert Bundle.load(first).fingerprint == Bundle.load(second).fingerprint
    other, _ = train("other", seed=1)
    assert [a == b for a, b in zip(weights(first), weights(other), strict=True)] == [False, False, True]


def test_a_run_continues_from_a_run_and_encodes_nothing_anew(world, trained, tmp_path, monkeypatch):
    """It begins where the other ended; its frozen towers are the same, so that every feature is in the cache."""
    encoded = []
    for name in ("encode_images", "encode_texts"):
        monkeypatch.setattr(OnnxEncoder, name, lambda self, items: encoded.append(len(items)))
    config = recipes.with_changes(recipes.config_for([world.pairs], str(trained.output)), {"epochs": 1})
    metrics = loop.train(config, tmp_path / "further")
    assert encoded == []
    # What was written is fp16 of what was measured then: one of 20 may fall otherwise.
    assert metrics["before_val_t2i_hit@1"] == pytest.approx(trained.printed["metrics"]["val_t2i_hit@1"], abs=0.05)
    start, end = Bundle.load(trained.output), Bundle.load(tmp_path / "further")
    assert start.fingerprint != end.fingerprint  # even a single step learns something
    assert end.score_scale == pytest.approx(start.score_scale, rel=0.05)


def test_a_changed_picture_is_encoded_anew_and_no_other(world, frozen, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(world.pairs.parent, tmp_path / "drawings")
    records = read_pairs(tmp_path / "drawings" / "pairs.jsonl")[:4]
    counted = []
    real = OnnxEncoder.encode_images
    monkeypatch.setattr(
        OnnxEncoder, "encode_images", lambda self, items: counted.append(len(items)) or real(self, items)
    )
    first = features.image_features(frozen, records, "clean")
    again = features.image_features(frozen, records, "clean")
    assert counted == [4]
    np.testing.assert_array_equal(first, again)
    Image.new("RGB", (50, 50), "orange").save(records[1].image)
    changed = features.image_features(frozen, records, "clean")
    assert counted == [4, 1]
    assert [np.array_equal(a, b) for a, b in zip(first, changed, strict=True)] == [True, False, True, True]
    views = {view: features.image_features(frozen, records, view) for view in ("flip", "crop1", "crop2")}
    assert counted == [4, 1, 4, 4, 4]  # each view is kept on its own
    place = tmp_path / "moved" / tmp_path.name  # a crop's name goes two folders up
    shutil.move(tmp_path / "drawings", place / "drawings")  # the same data in another place is the same
    moved = read_pairs(place / "drawings" / "pairs.jsonl")[:4]
    for view, expected in {"clean": changed, **views}.items():
        np.testing.assert_array_equal(features.image_features(frozen, moved, view), expected)
    assert counted == [4, 1, 4, 4, 4]
    renamed = replace(moved[0], image=moved[0].image.rename(moved[0].image.with_name("other.png")))
    features.image_features(frozen, [renamed], "flip")
    assert counted == [4, 1, 4, 4, 4]
    features.image_features(frozen, [renamed], "crop1")  # crops are drawn from the name
    assert counted == [4, 1, 4, 4, 4, 1]


def test_sentences_of_towers_that_have_another_width(world, frozen, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    texts = ["a red circle", "a blue cross", "a red circle"]
    first = features.text_features(frozen, texts)
    assert first.shape == (3, 384)
    monkeypatch.setattr(OnnxEncoder, "encode_texts", None)
    np.testing.assert_array_equal(features.text_features(frozen, texts), first)


def test_a_failure_in_the_middle_is_counted(world, frozen, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    broken = tmp_path / "broken.png"
    broken.write_bytes((world.pairs.parent / "00.png").read_bytes()[:50])
    good = read_pairs(world.pairs)[:2]
    records = [good[0], replace(good[0], image=broken), replace(good[0], image=tmp_path), good[1]]
    trained = SimpleNamespace(preprocessing=frozen.preprocessing, device=torch.device("cpu"), room=1e9, part=1)
    message = r"2 of 4 pictures cannot be read, the first: .*broken\.png: truncated"
    with pytest.raises(DataError, match=message):
        features.image_features(frozen, records, "clean")
    (kept,), frozen_reasons = features.FrozenTowers(frozen, ["clean"], "cpu").pictures(records)
    np.testing.assert_array_equal(kept, features.image_features(frozen, good, "clean"))
    (rows,), reasons = TrainedTowers.pictures(trained, records)
    assert reasons == frozen_reasons
    assert [*reasons] == [1, 2]
    np.testing.assert_array_equal(rows, frozen.preprocessing.pixels([Image.open(record.image) for record in good]))


# ---- which rows meet in a batch --------------------------------------------------------------------------------------


def planned(sizes_and_repeats, **settings):
    """The batches of a run over sources of so many pictures, each picture with two sentences."""
    sources = [
        Pairs([torch.full((n, 1280), float(i))], torch.zeros(2 * n, 384), np.arange(0, 2 * n + 1, 2), repeat, None)
        for i, (n, repeat) in enumerate(sizes_and_repeats)
    ]
    config = recipes.with_changes(recipes.config_for([Path("x")], "builtin"), settings)
    return sources, Sampler(config, SimpleNamespace(sources=sources, vocabulary=None))


def test_every_batch_has_one_source_and_an_epoch_repeats_as_asked():
    sources, run = planned([(30, 3), (100, 1)], epochs=2, batch_size=20)
    seen = {id(source): np.zeros(len(source.views[0]), int) for source in sources}
    for source, rows in run.plan:
        assert 10 <= len(rows) <= 20
        assert len(np.unique(rows)) == len(rows)
        seen[id(source)][rows] += 1
    # 30 are a batch of 20 and one of 10; 100 are five whole ones: every picture is met repeat × epochs times.
    assert seen[id(sources[0])].tolist() == [6] * 30
    assert seen[id(sources[1])].tolist() == [2] * 100
    assert len(run) == len(run.plan) == 2 * (3 * 2 + 5)
    order = [source is sources[1] for source, _ in run.plan]
    assert order[:11] != sorted(order[:11])  # they take turns


def test_a_part_of_an_epoch_and_what_is_left_over():
    _, run = planned([(100, 1)], epochs=0.25, batch_size=20)
    assert [len(rows) for _, rows in run.plan] == [20]  # 25 pictures; a batch of 5 has too few negatives
    _, run = planned([(7, 1)], epochs=1.5, batch_size=20)
    assert sorted(len(rows) for _, rows in run.plan) == [4, 7]


def test_a_picture_meets_only_its_own_sentences():
    (source,), run = planned([(10, 1)], epochs=1)
    rows = np.array([7, 0, 3])
    drawn = np.array([run._drawn(source, rows) for _ in range(40)])
    for column, row in zip(drawn.T, rows, strict=True):
        assert set(column) == {2 * row, 2 * row + 1}


def test_hard_batches_hold_every_picture_once_and_neighbours_together(world, frozen, quick, tmp_path, monkeypatch):
    """Drawings of one colour, or of one shape, are what the model takes for each other."""
    plans = []
    plan = Sampler._plan
    monkeypatch.setattr(Sampler, "_plan", lambda sampler: plans.append(plan(sampler)) or plans[-1])
    for group in (1, 5):
        config = recipes.with_changes(
            recipes.config_for([world.pairs], "builtin"),
            {"epochs": 4, "batch_size": 10, "hard_group": group, "learning_rate": 1e-3},
        )
        loop.train(config, tmp_path / f"group{group}")
    encoder = OnnxEncoder(Bundle.load(find_bundle("builtin")))
    records = read_pairs(world.pairs, "train")
    texts = encoder.encode_texts([record.texts[0] for record in records])

    def alike(batches):
        """The mean cosine of the captions that meet."""
        return np.mean([(texts[rows] @ texts[rows].T)[~np.eye(len(rows), dtype=bool)].mean() for _, rows in batches])

    by_chance, hard = plans
    seen = np.bincount(np.concatenate([rows for _, rows in hard]), minlength=40)
    assert seen.tolist() == [4] * 40
    assert {len(rows) for _, rows in hard} == {10}
    assert alike(hard) > alike(by_chance) + 0.02
    assert [rows.tolist() for _, rows in hard[:4]] != [rows.tolist() for _, rows in hard[4:8]]  # epochs differ


# ---- recipes ---------------------------------------------------------------------------------------------------------

RECIPE = """
name = "drawings"
model = "builtin"
licence = "mine"
epochs = 2
batch_size = 20
views = ["clean", "crop1"]
[[sources]]
pairs = "pairs.jsonl"
split = "train"
repeat = 2
[vocabulary]
pairs = "labels.jsonl"
templates = ["a {name}", "the {name} here"]
pictures = 3
class_rows = 0
[[tests]]
pairs = "pairs.jsonl"
split = "val"
[[tests]]
pairs = "labels.jsonl"
task = "classification"
"""


def test_a_recipe_from_end_to_end(world, quick, tmp_path, capfd):
    data = shutil.copytree(world.pairs.parent, tmp_path / "data")
    labels = [{"image": f"{i:02}.png", "label": f"{COLOURS[i // 12]}_thing"} for i in range(0, 60, 12)]
    (data / "labels.jsonl").write_text("\n".join(map(json.dumps, labels)))
    (tmp_path / "recipe.toml").write_text(RECIPE)
    command(
        "train", "--config", tmp_path / "recipe.toml", "--data", data, "-o", tmp_path / "out", "--seed", "5", "--json"
    )
    metrics = json.loads(capfd.readouterr().out)["metrics"]
    bundle = Bundle.load(tmp_path / "out")
    assert {"pairs_t2i_hit@1", "labels_top1"} < set(metrics)
    assert metrics["pairs_t2i_hit@1"] == pytest.approx(
        evaluate(OnnxEncoder(bundle), read_pairs(data / "pairs.jsonl", "val")).metrics["t2i_hit@1"]
    )
    assert (bundle.name, bundle.licence, bundle.training["settings"]["seed"]) == ("drawings", "mine", 5)
    assert [entry["pairs"] for entry in bundle.training["data"]] == ["pairs.jsonl", "labels.jsonl"]
    assert str(tmp_path) not in (tmp_path / "out" / "model.json").read_text()  # where the data lay is nobody's business


def test_the_built_in_model_s_recipe_can_be_read():
    config = recipes.load_config(Path(loop.__file__).parent / "recipes" / "builtin.toml", Path("somewhere"))
    assert config.data == "somewhere"
    assert not config.model  # from the towers' own packages
    trained_on = {config.vocabulary.pairs, *((source.pairs, source.split) for source in config.sources)}
    assert not any("caltech" in str(item) or "voc" in str(item) for item in trained_on)
    assert all(source.split == "train" for source in config.sources)  # the tests are other pictures


# ---- mistakes --------------------------------------------------------------------------------------------------------


def command(*arguments) -> int:
    """The command in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["diptych", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            run_command()
    return int(leaving.value.code or 0)


@pytest.fixture
def complaint(quick, capfd):
    def complaint(*arguments, code=1):
        assert command("train", *arguments) == code
        printed = capfd.readouterr()
        assert printed.out == ""
        lines = [line for line in printed.err.splitlines() if not line.startswith("reading the data")]
        assert len(lines) == 1, printed.err
        assert "Traceback" not in printed.err
        return lines[0]

    return complaint


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("epoch = 3", "unknown setting 'epoch'; did you mean epochs?"),
        ("xyzzy = 3", "unknown setting 'xyzzy'; known are sources, data, name"),
        ("epochs = 'ten'", "epochs cannot be 'ten'"),
        ("epochs = 0", "epochs must be more than 0"),
        ("epochs = nan", "epochs must be more than 0"),
        ("learning_rate = nan", "learning_rate a number from 0 on"),
        ("learning_rate = 1e38", "learning rates must be numbers from 0 to 1e+30"),
        ("text_tower_learning_rate = -1", "learning rates must be numbers from 0 to 1e+30"),
        ("batch_size = 1", "batch_size at least 2"),
        ("batch_size = 2.5", "batch_size cannot be 2.5"),
        ("views = 'clean'", "views cannot be 'clean'"),
        ("image_tower = 'resnet'", "image_tower must be one of efficientnet-lite2"),
        ("precision = 'int3'", "precision must be one of fp32, fp16"),
        ("[[sources]]\nsplit = 'train'", "missing 1 required positional argument: 'pairs'"),
        ("[[sources]]\npairs = 'p.jsonl'\ntimes = 3", "unknown setting 'times'"),
        ("sources = 3", "expected a table with pairs, split, repeat, validate, weight, balance, balance_power, not 3"),
        ("[[sources]]\npairs = 'p.jsonl'\nweight = 0.3\nrepeat = 2", "weight and repeat both say how often"),
        ("[[sources]]\npairs = 'p.jsonl'\nweight = 1.3", "weight and balance_power from 0 to 1"),
        ("[[sources]]\npairs = 'p.jsonl'\nbalance_power = 0.5", "balance_power is of a balance: name its column"),
        (
            "[[sources]]\npairs = 'p.jsonl'\nweight = 1.0\n[[sources]]\npairs = 'q.jsonl'",
            "the weights leave no batch to the sources without one",
        ),
        ("hard_group = 4\n[[sources]]\npairs = 'p.jsonl'\nbalance = 'label'", "leave one of them out"),
        ("mine_every = 2", "mine_every must be at least 0, and is of hard groups"),
        ("in_memory_gb = -1", "in_memory_gb must be a number from 0 on"),
        ("[vocabulary]\ntemplates = ['{name}']", "missing 1 required positional argument: 'pairs'"),
        ("epochs = ", "is not TOML"),
        ("", "there is nothing to learn from"),
    ],
)
def test_a_recipe_that_is_wrong(complaint, tmp_path, recipe, words):
    file = tmp_path / "r.toml"
    if recipe and "sources" not in recipe:
        recipe = recipe + "\n[[sources]]\npairs = 'p.jsonl'\n"
    file.write_text(recipe)
    line = complaint("--config", file, "-o", tmp_path / "out")
    assert str(file) in line
    assert words in line
    assert not (tmp_path / "out").exists()


def test_data_that_are_wrong(complaint, world, tmp_path):
    out = tmp_path / "out"
    assert f"{tmp_path / 'no.jsonl'} cannot be read" in complaint(tmp_path / "no.jsonl", "-o", out)
    assert "no.toml cannot be read" in complaint("--config", tmp_path / "no.toml", "-o", out)
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"image": str(world.pairs.parent / "00.png"), "captions": ["a drawing"]}))
    assert "no two captioned pictures" in complaint(one, "-o", out)
    assert not out.exists()


def test_a_picture_that_cannot_be_read_is_named(complaint, world, tmp_path):
    data = shutil.copytree(world.pairs.parent, tmp_path / "data")
    for line in world.captions:
        if line["split"] == "train" and not line["image"].startswith("0"):  # 33 of 40
            (data / line["image"]).write_bytes((data / line["image"]).read_bytes()[:60])
    line = complaint(data / "pairs.jsonl", "-o", tmp_path / "out")
    assert "33 of 40 pictures cannot be read" in line
    assert f"{data / '10.png'}: truncated" in line
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_there_or_cannot_be(complaint, world, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "file").write_text("mine")
    assert "run exists already: choose another --output" in complaint(world.pairs, "-o", tmp_path / "run")
    assert "exists already" in complaint(world.pairs, "-o", tmp_path / "file")
    assert "cannot be made" in complaint(world.pairs, "-o", tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "mine"
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root, to become somebody who may not write")
def test_an_output_that_may_not_be_written_is_refused_before_the_training(world, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match="cannot be made"):
        loop.train(recipes.config_for([world.pairs], "builtin"), tmp_path / "out")


def test_models_that_cannot_be_trained(complaint, world, tmp_path):
    out = tmp_path / "out"
    other = tmp_path / "other"
    other.mkdir()
    for name in ("image.onnx", "text.onnx", "tokenizer.json"):
        (other / name).write_bytes(b"x")
    preprocessing = Bundle.load(find_bundle("builtin")).preprocessing
    for library, words in (("open_clip", "does not name its architecture"), ("keras", "are neither open_clip's nor")):
        Bundle(other, "other", 4, preprocessing, 77, 1.0, source={"library": library}).save()
        assert words in complaint(world.pairs, "--model", other, "-o", out)
    assert "no weights 'magic' for RN50" in complaint(world.pairs, "--model", "RN50/magic", "-o", out)
    assert "no architecture 'RN5'" in complaint(world.pairs, "--model", "scratch:RN5", "-o", out)
    assert "no model is called 'bulitin'" in complaint(world.pairs, "--model", "bulitin", "-o", out)
    assert not out.exists()


def test_a_learning_rate_that_is_far_too_high_is_said(train, tmp_path):
    with pytest.raises(DataError, match=r"the loss is no number any more at step \d: try a lower --lr"):
        train("diverged", learning_rate=1e30)
    assert not (tmp_path / "diverged").exists()
