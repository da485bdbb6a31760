"""export and import as a person types them, with the built-in model on real photos."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.commands import complaint, diptych, result
from tests.odd_photos import real_photos


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exchange") / "photos"
    folder.mkdir()
    for photo in real_photos()[3:9]:
        picture = Image.open(photo).convert("RGB")
        picture.thumbnail((300, 300))
        picture.save(folder / f"{photo.stem}.jpg")
    assert diptych("index", folder).returncode == 0
    return folder


@pytest.fixture
def photos(shipped, tmp_path):
    return Path(shutil.copytree(shipped, tmp_path / "photos"))


@pytest.mark.parametrize("layout", ["npy", "clip-retrieval"])
def test_out_and_in_again_finds_the_same_and_encodes_nothing(photos, tmp_path, layout):
    before = result(diptych("search", "a cat", "--json", cwd=photos))
    out = result(diptych("export", photos, "-o", tmp_path / "out", "--format", layout, "--json"))
    assert (out["output"], out["images"], out["texts"]) == (str(tmp_path / "out"), 6, 0)
    assert out["model"]["name"] == "builtin"
    shutil.rmtree(photos / ".diptych")
    report = result(diptych("import", tmp_path / "out", "--root", photos, "--json"))
    assert {key: report[key] for key in ("index", "folder", "images", "missing", "changed", "agreement")} == {
        "index": str(photos / ".diptych"), "folder": str(photos), "images": 6, "missing": 0, "changed": 0,
        "agreement": None,
    }  # fmt: skip
    again = result(diptych("index", photos, "--json"))
    assert (again["skipped"], again["embedded"]) == (6, 0)
    assert result(diptych("search", "a cat", "--json", cwd=photos)) == before


def test_vectors_of_encode_with_a_list(photos, tmp_path):
    names = sorted(file.name for file in photos.glob("*.jpg"))
    assert diptych("encode", *names, "-o", tmp_path / "v.npy", cwd=photos).returncode == 0
    (tmp_path / "rows.csv").write_text("image,code\n" + "".join(f"{name},00{i}\n" for i, name in enumerate(names)))
    arguments = (
        "import",
        tmp_path / "v.npy",
        "--metadata",
        tmp_path / "rows.csv",
        "-C",
        photos,
        "--index",
        tmp_path / "b",
    )
    assert "name the model that made the vectors with --model" in complaint(diptych(*arguments))
    run = diptych(*arguments, "--model", "builtin")
    assert (run.returncode, run.stdout) == (0, "")
    assert run.stderr == f"imported 6 pictures into {tmp_path / 'b'}\n"
    found = result(diptych("search", "a cup of coffee", "--index", tmp_path / "b", "--json", cwd=photos))
    assert Path(found[0]["path"]).name == "coffee.jpg"


def test_remarks_say_what_follows(photos, tmp_path):
    assert (
        diptych("export", photos, "-o", tmp_path / "out").stderr == f"wrote {tmp_path / 'out'}: 6 vectors of pictures\n"
    )
    (photos / "cell.jpg").unlink()
    (photos / "chelsea.jpg").write_bytes(b"another")
    lines = diptych("import", tmp_path / "out", "-C", photos, "--index", tmp_path / "b").stderr.splitlines()
    assert lines[0] == f"imported 6 pictures into {tmp_path / 'b'}"
    assert lines[1].startswith("1 of them are not below")
    assert lines[2].startswith("1 of them have changed since")


def test_mistakes_are_one_plain_line(photos, tmp_path):
    np.save(tmp_path / "v.npy", np.random.default_rng(0).standard_normal((6, 512)))
    (tmp_path / "rows.csv").write_text("path\n" + "".join(f"{file.name}\n" for file in sorted(photos.glob("*.jpg"))))
    given = ("import", tmp_path / "v.npy", "--metadata", tmp_path / "rows.csv", "-C", photos, "--index", tmp_path / "b")
    assert "builtin did not make the vectors" in complaint(diptych(*given, "--model", "builtin"))
    assert "no model is called 'bultin'; did you mean builtin?" in complaint(diptych(*given, "--model", "bultin"))
    assert not (tmp_path / "b").exists()
    here = ("import", tmp_path / "v.npy", "--metadata", tmp_path / "rows.csv", "-C", photos)
    assert "there is something at" in complaint(diptych(*here, "--model", "builtin"))
    assert "there is no index" in complaint(
        diptych("export", tmp_path, "--index", tmp_path / "no", "-o", tmp_path / "o")
    )
    assert "exists and is not empty" in complaint(diptych("export", photos, "-o", photos))
    assert diptych("export", photos).returncode == 2
    assert (
        "only for --format clip-retrieval" in diptych("export", photos, "-o", tmp_path / "o", "--kind", "text").stderr
    )
    told = complaint(
        diptych("export", photos, "-o", tmp_path / "o", "--format", "clip-retrieval", "--faiss", "IVF2,Flat")
    )
    assert "needs training" in told
    assert not (tmp_path / "o").exists()
