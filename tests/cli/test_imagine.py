"""`diptych imagine` as a user types it, and what else takes a generator."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.cli.commands import COMMAND, complaint, diptych, result
from tests.training.drawings import COLOURS, SHAPES, draw

pytest.importorskip("sklearn")
pytest.importorskip("torch")

SMALL = ("--set", "side=16", "--set", "width=8", "--set", "steps=12", "--set", "batch=8")
QUICK = ("--set", "epochs=3", "--set", "hidden=32")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Drawings with a sentence each, and their index."""
    folder, random, lines = tmp_path_factory.mktemp("drawings"), np.random.default_rng(0), []
    for colour in COLOURS:
        for shape in SHAPES:
            name = f"{colour} {shape}.png"
            draw(colour, shape, random).save(folder / name)
            split = ("train", "train", "val", "test")[len(lines) % 4]
            lines.append({"image": name, "captions": [f"a {colour} {shape}"], "split": split})
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


@pytest.fixture(scope="module")
def index(pairs):
    store = pairs.parent / "store"
    result(diptych("index", pairs, "--index", store, "--json"))
    return store


@pytest.fixture(scope="module")
def made(index, tmp_path_factory):
    """A generator of each kind that is used below, fitted from the index: nothing is encoded again."""
    out = tmp_path_factory.mktemp("made")
    said = {}
    for kind, changes in (("gan", SMALL), ("joint", QUICK), ("vae", QUICK)):
        said[kind] = result(
            diptych("imagine", "fit", "--index", index, "--kind", kind, "--out", out / kind, *changes, "--json")
        )
    return out, said


def test_fit_writes_a_folder_and_says_what_it_did(made, index):
    out, said = made
    assert said["gan"]["kind"] == "gan"
    assert said["gan"]["settings"]["steps"] == said["gan"]["steps"] == 12
    assert said["gan"]["about"] == {"data": None, "index": str(index), "images": None, "model": None}
    assert said["joint"]["shares"].keys() == {"0.0", "0.25", "0.5", "0.75", "1.0"}
    assert sorted(file.name for file in (out / "vae").iterdir()) == ["generator.json", "weights.safetensors"]


def test_a_sentence_becomes_a_picture(made, tmp_path):
    out, _ = made
    picture = tmp_path / "x.png"
    run = diptych("imagine", "a red circle", "--out", picture, "-g", out / "gan")
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert "A small research head" in run.stderr
    assert Image.open(picture).size == (16, 16)
    several = ("a red circle", "a blue square", "--count", "3", "--scale", "2", "-g", out / "gan", "--json")
    said = result(diptych("imagine", "draw", *several, "--out", picture))
    assert [one["text"] for one in said["sentences"]] == ["a red circle", "a blue square"]
    assert [len(one["cosines"]) for one in said["sentences"]] == [3, 3]
    assert Image.open(picture).size == ((3 * 18 - 2) * 2, (2 * 18 - 2) * 2)
    first = picture.read_bytes()
    assert result(diptych("imagine", *several, "--out", picture)) == said  # the seed decides
    assert picture.read_bytes() == first
    result(diptych("imagine", *several, "--out", picture, "--seed", "7"))
    assert picture.read_bytes() != first


def test_evaluate_measures_every_kind(made, pairs, index, tmp_path):
    out, _ = made
    sheet = tmp_path / "samples.png"
    pictures = result(diptych("imagine", "evaluate", out / "gan", "--index", index, "--samples", sheet, "--json"))
    assert pictures["pictures"] == 5
    for name in ("frechet", "finds_hit@10", "distance", "coverage"):
        assert np.isfinite(pictures["made"][name])
        assert np.isfinite(pictures["real"][name])
    assert pictures["real"]["distance"] > 0
    assert Image.open(sheet).size == (10 * 18 - 2, 3 * 18 - 2)
    joint = result(diptych("imagine", "evaluate", out / "joint", pairs, "--json"))
    assert 0 <= joint["search"]["with"]["t2i_hit@1"] <= 1
    assert joint["text to image"].keys() == {"cosine before", "cosine after"}
    run = diptych("imagine", "evaluate", out / "vae", "--index", index, "--split", "val")
    lines = dict(line.split("\t") for line in run.stdout.splitlines())
    assert float(lines["rebuilt: kl"]) > 0


def test_a_run_that_was_cut_short_goes_on(pairs, tmp_path):
    from retrieval.heads.generation.gan import CHECKPOINT

    out = tmp_path / "gan"
    code = (
        "from retrieval.heads.generation import gan; played = gan.Game.play\n"
        "def play(game):\n"
        "    if game.step == 5: raise KeyboardInterrupt\n"
        f"    return played(game)\ngan.Game.play = play; {COMMAND}"
    )
    arguments = ("imagine", "fit", pairs, "--out", out, *SMALL)
    cut = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert cut.returncode == 130, cut.stderr
    assert (out / CHECKPOINT).exists()
    said = result(diptych("imagine", "fit", "--out", out, "--resume", "--set", "steps=8", "--json"))
    assert said["steps"] == 8
    assert not (out / CHECKPOINT).exists()
    assert "no training that could go on" in complaint(diptych("imagine", "fit", "--out", out, "--resume"))


def test_the_odd_ones_of_an_index(made, index, tmp_path):
    out, _ = made
    found = result(diptych("imagine", "odd", out / "vae", "--index", index, "-t", "3", "--json"))
    assert [one["oddness"] for one in found] == sorted((one["oddness"] for one in found), reverse=True)
    assert len(found) == 3
    run = diptych("imagine", "odd", out / "vae", "--index", index, "-t", "3")
    assert [line.split("\t")[1] for line in run.stdout.splitlines()] == [one["path"] for one in found]
    assert "knows no odd pictures" in complaint(diptych("imagine", "odd", out / "gan", "--index", index))


def test_search_takes_a_prior(made, index):
    out, _ = made
    folder = out / "joint" / "generator.json"
    fields = json.loads(folder.read_text())
    plain = result(diptych("search", "-n", "a red circle", "--index", index, "--json"))
    shares = {}
    for share in (0.0, 1.0):
        folder.write_text(json.dumps({**fields, "share": share}))
        shares[share] = result(
            diptych("search", "-n", "a red circle", "--index", index, "--prior", out / "joint", "--json")
        )
    folder.write_text(json.dumps(fields))
    assert shares[0.0] == plain
    assert [one["score"] for one in shares[1.0]] != [one["score"] for one in plain]
    assert "translates nothing from text to image" in complaint(
        diptych("search", "-n", "x", "--index", index, "--prior", out / "vae")
    )


def test_classify_predict_fills_in_what_is_missing(made, pairs, tmp_path):
    out, _ = made
    rows = [{**line, "label": line["image"].split()[0]} for line in map(json.loads, pairs.read_text().splitlines())]
    file = pairs.with_name("rows.jsonl")
    file.write_text("\n".join(map(json.dumps, rows)))
    quick = ("--variants", "early-logistic", "--bootstrap", "10", "--no-study", "--no-pixels")
    result(diptych("classify", "fit", file, "--out", tmp_path / "c", "--json", *quick))
    lacking = pairs.with_name("lacking.jsonl")
    lacking.write_text(json.dumps({"image": None, "text": "a red circle"}) + "\n")
    answers = [
        result(diptych("classify", "predict", tmp_path / "c", lacking, "--json", *more))[0]
        for more in ((), ("--fill", out / "joint"))
    ]
    assert [answer["modalities"] for answer in answers] == [["text"], ["text"]]
    assert answers[0]["probabilities"] != answers[1]["probabilities"]


def test_mistakes_are_one_line(made, pairs, index, tmp_path):
    out, _ = made
    draw_it = ("imagine", "a cat", "--out", tmp_path / "x.png")
    assert "holds no generator" in complaint(diptych(*draw_it, "-g", tmp_path))
    assert "makes image vectors, and no pictures" in complaint(diptych(*draw_it, "-g", out / "vae"))
    assert "the sentence is empty" in complaint(diptych("imagine", " ", "-o", tmp_path / "x.png", "-g", out / "gan"))
    assert "cannot be written as a picture" in complaint(
        diptych("imagine", "a cat", "-o", tmp_path / "x.doc", "-g", out / "gan")
    )
    fit = ("imagine", "fit", pairs, "--out", tmp_path / "new")
    assert "exists already" in complaint(diptych("imagine", "fit", pairs, "--out", out / "gan"))
    assert "no kind of generator 'x'" in complaint(diptych(*fit, "--kind", "x"))
    assert "did you mean steps" in complaint(diptych(*fit, "--set", "step=3"))
    assert "no index" in complaint(diptych("imagine", "fit", "--out", tmp_path / "new", cwd=tmp_path))
    assert diptych(*fit, "--set", "steps").returncode == 2
    assert diptych("imagine", "a cat").returncode == 2  # no --out
    assert not (tmp_path / "new").exists()


def test_another_model_s_vectors_are_refused(made, index, tmp_path):
    out, _ = made
    other = tmp_path / "other"
    other.mkdir()
    for file in (out / "joint").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    fields = json.loads((other / "generator.json").read_text())
    (other / "generator.json").write_text(json.dumps({**fields, "fingerprint": "0" * 64}))
    for arguments in (
        ("search", "-n", "a cat", "--index", index, "--prior", other),
        ("imagine", "evaluate", other, "--index", index),
        ("imagine", "odd", other, "--index", index),
    ):
        assert "trained on vectors of another model (000000000000" in complaint(diptych(*arguments))


@pytest.mark.parametrize("arguments", [("imagine", "fit", "x.jsonl"), ("search", "x", "-n", "--prior", "p")])
def test_without_torch_it_names_the_extra(arguments, index, tmp_path):
    code = f"import sys; sys.modules['torch'] = None; {COMMAND}"
    more = ("--index", str(index)) if arguments[0] == "search" else ()
    run = subprocess.run([sys.executable, "-c", code, *arguments, *more], capture_output=True, text=True, cwd=tmp_path)
    assert complaint(run).endswith("needs packages that are not installed: pip install 'diptych[heads]'")
