"""Data as people have them, a disk that is full, a loss that diverges: nothing bad passes silently, or costs a run.

What is left out is left out as if it had never been there: the weights are those of a run without it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from retrieval.bundle import Bundle  # noqa: E402
from retrieval.encoders import find_bundle  # noqa: E402
from retrieval.errors import DataError  # noqa: E402
from retrieval.onnx_encoder import OnnxEncoder  # noqa: E402
from retrieval.training import config as recipes  # noqa: E402
from retrieval.training import loop  # noqa: E402
from retrieval.training.reading import without_unreadable  # noqa: E402
from retrieval.training.run import CHECKPOINT, LOG, RunFolder  # noqa: E402
from tests.training.drawings import weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

DAMAGE = {
    "missing": (lambda file: file.unlink(), "missing: there is no such file"),
    "empty": (lambda file: file.write_bytes(b""), "empty: zero bytes"),
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:60]), "truncated: the file ends before the picture"),
    "corrupt": (lambda file: file.write_bytes(file.read_bytes()[:40] + b"\xff" * 99), "damaged or truncated PNG"),
    "page": (lambda file: file.write_bytes(b"<html>404</html>"), "not an image: an HTML page"),
}


@pytest.fixture(params=["frozen", "end-to-end", "streamed"])
def kind(request, world, quick, tmp_path):
    """A data folder of one's own with pairs.jsonl, and how it is trained on: three ways that read pictures."""
    data = tmp_path / "data"
    shutil.copytree(world.pairs.parent, data)
    config = replace(recipes.config_for([data / "pairs.jsonl"], "builtin"), epochs=2, learning_rate=1e-3, batch_size=20)
    if request.param != "frozen":
        toy = request.getfixturevalue("toy")
        gigabytes = 0.0 if request.param == "streamed" else 4.0
        config = replace(toy, sources=config.sources, vocabulary=None, epochs=1, captions=1, in_memory_gb=gigabytes)
    return SimpleNamespace(data=data, config=config)


def lines(data):
    return [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]


def write(file, objects):
    file.write_text("\n".join(map(json.dumps, objects)))
    return file


def train(config, output):
    """What was said, as lines; and the scores."""
    said: list[str] = []
    scores = loop.train(config, output, note=said.append)
    return said, scores


# ---- pictures and captions -------------------------------------------------------------------------------------------


def test_pictures_that_cannot_be_read_are_left_out_and_named(kind, tmp_path):
    """Of those learnt from, of the validation, and of the guard."""
    guard = write(
        tmp_path / "guard.jsonl", [{**line, "image": f"data/{line['image']}"} for line in lines(kind.data)[:6]]
    )
    every = lines(kind.data)
    train_bad = [line["image"] for line in every if line["split"] == "train"][4:9]  # of 40
    val_bad = [line["image"] for line in every if line["split"] == "val"][3:5]  # of 20
    for name, (damage, _) in zip(train_bad, DAMAGE.values(), strict=True):
        damage(kind.data / name)
    for name in val_bad:
        DAMAGE["empty"][0](kind.data / name)
    bad = {*train_bad, *val_bad}
    config = replace(kind.config, guard=recipes.guards([guard]), max_loss=1.0)
    said, scores = train(config, tmp_path / "run")

    left_out = [line for line in said if "left out" in line]
    first = ", ".join(
        f"{kind.data / name}: {reason}" for name, (_, reason) in list(zip(train_bad, DAMAGE.values(), strict=True))[:2]
    )
    assert left_out[0].startswith(f"pairs.jsonl: 5 of 40 pictures cannot be read and are left out: {first}, ")
    assert left_out[0].endswith(", …")
    assert left_out[1].startswith("validation: 2 of 20 pictures cannot be read and are left out: ")
    assert f"{kind.data / val_bad[1]}: empty: zero bytes" in left_out[1]
    assert ["guard.jsonl: 1 of 6 pictures" in line for line in left_out[2:]] == [True] * (every[5]["image"] in bad)
    assert Bundle.load(tmp_path / "run").training["data"][0]["unreadable"] == 5

    kept = [line for line in every if line["image"] not in bad]
    write(kind.data / "pairs.jsonl", kept)
    write(
        guard,
        [line for line in (json.loads(g) for g in guard.read_text().splitlines()) if line["image"][5:] not in bad],
    )
    said, expected = train(config, tmp_path / "clean")
    assert not any("left out" in line for line in said)
    assert weights(tmp_path / "run") == weights(tmp_path / "clean")
    assert scores == expected


@pytest.mark.parametrize("how", ["missing", "truncated"])
@pytest.mark.parametrize("count", [21, 40])
def test_more_than_half_of_the_pictures_is_an_error(kind, tmp_path, how, count):
    every = [line["image"] for line in lines(kind.data) if line["split"] == "train"]
    for name in every[:count]:
        DAMAGE[how][0](kind.data / name)
    if how == "missing":  # which counts all splits, before anything is read
        message = rf"(40|21) of (the 60|40) pictures .*(are missing|cannot be read, the first: .*{every[0]}: missing)"
    else:
        message = rf"pairs.jsonl: {count} of 40 pictures cannot be read, the first: .*{every[0]}: truncated"
    with pytest.raises(DataError, match=message):
        loop.train(kind.config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_half_of_them_is_not():
    records = ["a", "b", "c", "d"]
    said: list[str] = []
    assert without_unreadable(records, {0: "a: why", 3: "d: why"}, "x", said.append) == ["b", "c"]
    assert said == ["x: 2 of 4 pictures cannot be read and are left out: a: why, d: why"]
    with pytest.raises(DataError, match="x: 3 of 4 pictures cannot be read, the first: a: why"):
        without_unreadable(records, {0: "a: why", 1: "b: why", 3: "d: why"}, "x", None)


def test_captions_without_words_are_left_out_and_counted(kind, tmp_path):
    every = lines(kind.data)
    told = [
        {**line, "captions": [" ", *line["captions"], ""] if number % 7 == 0 else line["captions"]}
        for number, line in enumerate(every)
    ]
    told[1]["captions"] = ["\t\u3000"]  # nothing else is said of it: no picture to learn from
    write(kind.data / "pairs.jsonl", told)
    said, scores = train(kind.config, tmp_path / "run")
    assert f"pairs.jsonl: {2 * 9 + 1} empty captions are left out" in said
    write(kind.data / "pairs.jsonl", [every[0], *every[2:]])
    _, expected = train(kind.config, tmp_path / "clean")
    assert weights(tmp_path / "run") == weights(tmp_path / "clean")
    assert scores == expected
    write(kind.data / "pairs.jsonl", [{**line, "captions": [f"{line['captions'][0]} \ud83d"]} for line in every])
    loop.train(kind.config, tmp_path / "half")  # half a character, as broken exports have it, is no end
    write(kind.data / "pairs.jsonl", [{**line, "captions": [""]} for line in every])
    with pytest.raises(DataError, match="has no two captioned pictures"):
        loop.train(kind.config, tmp_path / "none")


def test_pictures_that_are_all_the_same(kind, tmp_path):
    """Features without variance, from which nothing can be learnt, and yet no number is lost."""
    for line in lines(kind.data):
        Image.new("RGB", (96, 96), "grey").save(kind.data / line["image"])
    train(replace(kind.config, model="" if kind.config.train == "all" else "builtin"), tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    assert all(np.isfinite([*line.values()]).all() for line in log)
    encoder = OnnxEncoder(Bundle.load(tmp_path / "run"))
    vectors = encoder.encode_images([Image.new("RGB", (96, 96), "grey"), Image.new("RGB", (96, 96), "red")])
    assert np.isfinite(vectors).all()
    assert np.isfinite(encoder.encode_texts(["a red circle"])).all()


def test_new_heads_on_features_without_variance(world, quick, tmp_path, monkeypatch):
    """Where the features' spread is measured to divide by it."""
    for line in world.captions:
        Image.new("RGB", (96, 96), "grey").save(tmp_path / line["image"])
    pairs = write(tmp_path / "pairs.jsonl", [{**line, "captions": ["the same"]} for line in world.captions])
    config = replace(recipes.config_for([pairs], ""), epochs=2, batch_size=20)
    loop.train(config, tmp_path / "run")
    encoder = OnnxEncoder(Bundle.load(tmp_path / "run"))
    assert np.isfinite(encoder.encode_images([Image.new("RGB", (96, 96), "grey")])).all()
    assert np.isfinite(encoder.encode_texts(["the same"])).all()


def test_words_of_a_vocabulary(toy, tmp_path):
    """Pictures without a label have no name; class rows that would name other pictures are refused."""
    names = tmp_path / "names.jsonl"
    rows = [json.loads(line) for line in names.read_text().splitlines()]
    write(names, [*rows, {"image": "white-right.png"}])
    loop.train(replace(toy, epochs=1), tmp_path / "run")
    assert Bundle.load(tmp_path / "run").training["data"][1]["pictures"] == 4
    with pytest.raises(
        DataError, match=r"1 of 5 pictures of names.jsonl have no label or cannot be read: .*class_rows"
    ):
        loop.train(replace(toy, vocabulary=replace(toy.vocabulary, class_rows=2)), tmp_path / "rows")
    write(names, [{"image": "white-right.png"}])
    with pytest.raises(DataError, match=r"names.jsonl has no labels to take words from"):
        loop.train(toy, tmp_path / "none")


def test_a_test_that_cannot_be_is_said_before_the_training(toy, tmp_path):
    with pytest.raises(DataError, match=r"later\.jsonl cannot be read"):
        loop.train(replace(toy, tests=(recipes.Test("later.jsonl"),)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("side", "count"), [("images", 1), ("texts", 2)])  # two pictures have the same caption
def test_a_teacher_that_says_no_number(world, quick, tmp_path, monkeypatch, side, count):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = replace(recipes.config_for([world.pairs], "builtin"), epochs=1, teacher="builtin")
    name = Bundle.load(find_bundle("builtin")).name
    encode = getattr(OnnxEncoder, f"encode_{side}")
    spoils = []

    def spoilt(encoder, items):
        vectors = encode(encoder, items).copy()
        if encoder.name == name and not spoils:
            vectors[2, 5] = np.nan
            spoils.append(items)
        return vectors

    monkeypatch.setattr(OnnxEncoder, f"encode_{side}", spoilt)
    with pytest.raises(DataError, match=rf"{count} of 40 vectors of the teacher {name} are no numbers, the first"):
        loop.train(config, tmp_path / "run")


# ---- a loss that diverges --------------------------------------------------------------------------------------------


def test_what_diverges_never_takes_the_place_of_a_good_checkpoint(toy, tmp_path, monkeypatch):
    """The weights are lost after the third step, which nothing measures, since there is nothing to validate on."""
    config = replace(
        toy, sources=(recipes.Source("toy.jsonl", "train", validate=False),), epochs=20, checkpoint_seconds=0.0
    )
    step = torch.optim.AdamW.step
    steps = []

    def diverge(optimizer, *arguments):
        result = step(optimizer, *arguments)
        steps.append(1)
        if len(steps) == 3:
            with torch.no_grad():
                optimizer.param_groups[1]["params"][0].fill_(torch.inf)
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", diverge)
    with pytest.raises(DataError, match=r"the loss is no number any more at step 3: try a lower --lr"):
        loop.train(config, tmp_path / "run")
    checkpoint = RunFolder.open(tmp_path / "run").load()
    assert checkpoint.step == 2
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint.tensors.values())
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    loop.resume(tmp_path / "run")
    loop.train(config, tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_the_last_step_is_looked_at_too(toy, tmp_path):
    """No step comes after it whose loss would show it: no model is written."""
    config = replace(
        toy,
        sources=(recipes.Source("toy.jsonl", "train", validate=False),),
        epochs=1,
        learning_rate=1e30,
        image_tower_learning_rate=1e30,
    )
    with pytest.raises(DataError, match=r"the loss is no number any more at step 1"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- other data than before, and a full disk -------------------------------------------------------------------------


def test_a_run_goes_on_with_the_data_that_it_began_with(kind, tmp_path, ended_after):
    ended_after(1)
    with pytest.raises(KeyboardInterrupt):
        loop.train(replace(kind.config, checkpoint_seconds=0.0), tmp_path / "run")
    bad = next(line["image"] for line in lines(kind.data) if line["split"] == "train")
    good = (kind.data / bad).read_bytes()
    DAMAGE["empty"][0](kind.data / bad)
    with pytest.raises(DataError, match="pictures or captions are others than when it began"):
        loop.resume(tmp_path / "run")
    (kind.data / bad).write_bytes(good)
    loop.resume(tmp_path / "run")


FULL = """
import resource
from retrieval.training.run import RunFolder
save = RunFolder.save
def save_and_fill(folder, step, *rest):
    save(folder, step, *rest)
    if step == {step}:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
RunFolder.save = save_and_fill
from cli.main import run
run()
"""


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files as POSIX does")
@pytest.mark.parametrize(
    ("what", "step", "limit"),
    [("log", 2, 64), ("checkpoint", 2, 1_000_000), ("bundle", 5, 30_000_000), ("description", 5, 64)],
)
def test_a_full_disk(world, quick, tmp_path, what, step, limit):
    """The system refuses every byte beyond a limit, from a moment on: while each file is written that a run writes."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'model = "builtin"\nepochs = 5\nlearning_rate = 1e-3\ncheckpoint_seconds = 0.0\nname = "x"\n'
        f'[[sources]]\npairs = "{world.pairs}"\nsplit = "train"\n'
    )
    command = ["train", "--config", str(recipe), "-o", str(tmp_path / "run")]
    full = [sys.executable, "-c", FULL.format(step=step, limit=limit), *command]
    process = subprocess.run(full, capture_output=True, text=True)
    assert process.returncode == 1, process.stderr
    assert process.stdout == ""
    assert "Traceback" not in process.stderr
    said = [line for line in process.stderr.splitlines() if line.startswith("diptych: ")]
    assert said == [process.stderr.splitlines()[-1]]
    run = tmp_path / "run"
    assert said[0] == (
        f"diptych: {run} cannot be written (File too large): make room, then go on with  diptych train --resume {run}"
    )
    assert (run / CHECKPOINT).exists()
    loop.resume(run)
    loop.train(recipes.load_config(recipe), tmp_path / "whole")
    assert weights(run) == weights(tmp_path / "whole")
    assert (run / LOG).read_text() == (tmp_path / "whole" / LOG).read_text()
