"""`diptych caption` as a user types it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from indexes.store import Store
from tests.cli.commands import complaint, diptych, result
from tests.training.drawings import COLOURS, SHAPES, draw

RECIPE = """
name = "drawings"
validation = "pairs.jsonl"
width = 32
layers = 2
heads = 2
prefix = 2
pieces = 80
dropout = 0.0
noise = 0.1
label_smoothing = 0.0
batch = 8
learning_rate = 1e-2
warmup = 10
ema = 0.9
validate_every = 100
[[sources]]
path = "pairs.jsonl"
split = "train"
repeat = 60
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Drawings, each with two sentences that name its colour and shape."""
    folder, random, lines = tmp_path_factory.mktemp("drawings"), np.random.default_rng(0), []
    (folder / "images").mkdir()
    for colour in list(COLOURS)[:3]:
        for shape in list(SHAPES)[:2]:
            for split in ("train", "train", "val", "test"):
                name = f"{len(lines):02}.png"
                draw(colour, shape, random).save(folder / "images" / name)
                texts = [f"a {colour} {shape} on paper", f"there is a {colour} {shape} here"]
                lines.append({"image": name, "captions": texts, "split": split})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def decoder(data, tmp_path_factory):
    pytest.importorskip("torch")
    pytest.importorskip("sacrebleu")
    out = tmp_path_factory.mktemp("out") / "decoder"
    run = diptych(
        *("caption", "fit", "--config", data / "recipe.toml", "--data", data, "--out", out, "--threads", "1", "--json"),
        *("--checkpoint", out.parent / "run.safetensors"),
    )
    return out, result(run)


def test_fit_writes_a_decoder(decoder, data):
    out, printed = decoder
    assert printed["decoder"] == str(out)
    assert printed["training"]["captions"] == 24
    assert sorted(file.name for file in out.iterdir()) == ["decoder.json", "decoder.onnx", "tokenizer.json"]
    again = ("caption", "fit", "--config", data / "recipe.toml", "--data", data, "--out", out)
    assert "exists already" in complaint(diptych(*again))


def test_evaluate_on_the_test_split(decoder, data, tmp_path):
    page = tmp_path / "samples.html"
    run = diptych("caption", "evaluate", data / "pairs.jsonl", "--decoder", decoder[0], "--json", "--html", page)
    printed = result(run)
    assert (printed["pictures"], printed["kind"], printed["beams"]) == (6, "transformer", 3)
    assert set(printed["metrics"]) >= {*(f"bleu_{n}" for n in (1, 2, 3, 4)), "rouge_l", "cider_d", "self_hit@10"}
    assert printed["metrics"]["bleu_1"] > 0.5
    text = page.read_text()
    assert text.count("data:image/jpeg;base64") == 6
    assert all(head in text for head in ("BLEU-4", "self hit@10", "beside it its CIDEr-D"))
    assert "on paper" in text


def test_photos_are_captioned_with_what_ships(data, tmp_path):
    photos = [data / "images" / "00.png", data / "images" / "05.png"]
    run = diptych("caption", *photos, "--json")
    printed = result(run)
    assert [list(one) for one in printed] == [["path", "caption"]] * 2
    assert [one["path"] for one in printed] == list(map(str, photos))
    assert all(len(one["caption"].split()) > 2 for one in printed)
    assert result(diptych("caption", "--json", "--beam", "1", photos[0]))[0]["caption"]
    alone = diptych("caption", "photos", photos[0])
    assert alone.stdout == printed[0]["caption"] + "\n"
    two = diptych("caption", *photos).stdout.splitlines()
    assert two == [f"{one['path']}\t{one['caption']}" for one in printed]


def test_what_cannot_be_read_does_not_stop_the_rest(data, tmp_path):
    (tmp_path / "bad.jpg").write_text("no picture")
    run = diptych("caption", tmp_path / "bad.jpg", data / "images" / "00.png", tmp_path / "none.jpg", "--json")
    assert len(result(run, 1)) == 1
    lines = run.stderr.strip().splitlines()
    assert len(lines) == 2
    assert "bad.jpg" in lines[0]
    assert "none.jpg" in lines[1]


def test_an_index_gets_a_column_that_search_can_use(data, decoder, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(data / "images", folder)
    assert diptych("index", folder).returncode == 0
    before = Store.open(folder / ".diptych")
    vectors = dict(zip(before.paths(), before.vectors(), strict=True))
    printed = result(diptych("caption", "store", folder, "--decoder", decoder[0], "--json"))
    assert printed == {"captioned": 24, "kept": 0}
    store = Store.open(folder / ".diptych")
    captions = dict(zip(store.paths(), store.columns("caption")["caption"].to_pylist(), strict=True))
    photos = [folder / name for name in sorted(captions)]
    alone = result(diptych("caption", *photos, "--decoder", decoder[0], "--json"))
    same = [captions[photo.name] == one["caption"] for photo, one in zip(photos, alone, strict=True)]
    assert np.mean(same) > 0.9  # stored vectors are rounded to half precision
    assert all(np.array_equal(vectors[p], v) for p, v in zip(store.paths(), store.vectors(), strict=True))
    word = captions["00.png"].split()[1]
    right = {path for path, said in captions.items() if word in said.split()}
    for condition in (("--words", word), ("--where", f"'{word}' in caption")):
        found = result(diptych("search", "a drawing", "--folder", folder, "-t", "99", *condition, "--json"))
        assert {hit["path"].split("/")[-1] for hit in found} == right
    assert result(diptych("caption", "store", folder, "--decoder", decoder[0], "--json")) == {
        "captioned": 0,
        "kept": 24,
    }
    again = diptych("caption", "store", folder, "--again", "--json")  # by the decoder that ships
    assert result(again) == {"captioned": 24, "kept": 0}
    assert result(diptych("index", folder, "--json"))["changed"] == 0  # the photos are what they were
    assert None not in Store.open(folder / ".diptych").columns("caption")["caption"].to_pylist()


def test_mistakes_are_one_line(data, decoder, tmp_path):
    photo = data / "images" / "00.png"
    assert "holds no decoder" in complaint(diptych("caption", photo, "--decoder", tmp_path))
    other = tmp_path / "other"
    shutil.copytree(decoder[0], other)
    fields = json.loads((other / "decoder.json").read_text())
    (other / "decoder.json").write_text(json.dumps({**fields, "fingerprint": "0" * 64}))
    assert "another model" in complaint(diptych("caption", photo, "--decoder", other))
    (tmp_path / "bare.jsonl").write_text(json.dumps({"image": str(photo), "captions": []}))
    assert "no picture has a caption" in complaint(diptych("caption", "evaluate", tmp_path / "bare.jsonl"))
    assert diptych("caption", photo, "--beam", "0").returncode == 2


def test_help_names_the_commands():
    text = diptych("caption", "--help").stdout
    assert all(name in text for name in ("photos", "store", "fit", "evaluate"))


def test_captions_need_no_torch(data):
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['diptych', 'caption', sys.argv[1]]; "
        "from cli.main import run; run()"
    )
    run = subprocess.run([sys.executable, "-c", code, data / "images" / "00.png"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


def test_a_picture_without_colour(tmp_path):
    Image.new("L", (40, 30), 128).save(tmp_path / "grey.png")
    assert result(diptych("caption", tmp_path / "grey.png", "--json"))[0]["caption"]
