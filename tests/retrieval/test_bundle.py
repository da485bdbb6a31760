"""A folder that is a model: what its fingerprint covers, what is refused, and copies that are whole or not there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from retrieval.bundle import FILES, Bundle, is_bundle
from retrieval.encoders import find_bundle
from retrieval.errors import ModelError
from retrieval.images import Preprocessing

PREPROCESSING = Preprocessing((8, 10), (0.5, 0.4, 0.3), (0.2, 0.2, 0.25), "squash", "bicubic")


def make(folder: Path, **changes) -> Bundle:
    """A bundle with a few hundred random bytes in the place of each graph."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in ("image.onnx", "text.onnx", "tokenizer.json"):
        (folder / name).write_bytes(random.bytes(300))
    fields = {"name": "tiny", "dim": 4, "preprocessing": PREPROCESSING, "context_length": 7, "score_scale": 12.5}
    return Bundle(path=folder, **{**fields, **changes}).save()


@pytest.fixture
def bundle(tmp_path):
    return make(tmp_path / "tiny")


def edit(bundle: Bundle, **changes) -> None:
    file = bundle.path / "model.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_what_is_saved_is_loaded(tmp_path):
    made = make(
        tmp_path / "m",
        precision={"image": "fp16", "text": "fp32"},
        licence="free – for all",
        source={"image_tower": "x"},
        training={"data": [{"pairs": "p.jsonl", "pictures": 3}], "scores": {"t2i_hit@1": 0.5}},
    )
    assert made.fingerprint == made.compute_fingerprint()
    assert Bundle.load(tmp_path / "m") == made


def test_two_with_the_same_content_have_the_same_fingerprint(bundle, tmp_path):
    assert make(tmp_path / "again").fingerprint == bundle.fingerprint
    assert len(bundle.fingerprint) == 64


@pytest.mark.parametrize(
    "changes",
    [
        {"licence": "another"},
        {"training": {"scores": {"t2i_hit@1": 1.0}, "command": "diptych train"}},
        {"name": "another"},
        {"source": {"library": "somewhere"}},
        {"score_scale": 99.0},
    ],
)
def test_what_decides_no_vector_changes_nothing(bundle, changes):
    edit(bundle, **changes)
    assert Bundle.load(bundle.path).compute_fingerprint() == bundle.fingerprint
    assert Bundle.load(bundle.path).save().fingerprint == bundle.fingerprint


def test_a_file_or_folder_beside_the_model_changes_nothing(bundle):
    (bundle.path / "decoder.onnx").write_bytes(b"captions")
    (bundle.path / "log.jsonl").write_text("{}\n")
    (bundle.path / "heads").mkdir()
    (bundle.path / "heads" / "image.onnx").write_bytes(b"of another")
    assert Bundle.load(bundle.path).compute_fingerprint() == bundle.fingerprint


@pytest.mark.parametrize("name", ["image.onnx", "text.onnx", "tokenizer.json"])
@pytest.mark.parametrize("at", [0, 150, -1])
def test_one_bit_of_graph_or_tokenizer_changes_it(bundle, name, at):
    flip(bundle.path / name, at)
    assert bundle.compute_fingerprint() != bundle.fingerprint


def test_the_two_graphs_cannot_change_places(bundle):
    image, text = bundle.path / "image.onnx", bundle.path / "text.onnx"
    pictures, sentences = image.read_bytes(), text.read_bytes()
    image.write_bytes(sentences)
    text.write_bytes(pictures)
    assert bundle.compute_fingerprint() != bundle.fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"size": (10, 8)},
        {"mean": (0.5, 0.4, 0.31)},
        {"std": (0.2, 0.21, 0.25)},
        {"resize_mode": "shortest"},
        {"interpolation": "bilinear"},
        {"fill": 1},
    ],
)
def test_every_preprocessing_field_changes_it(bundle, changes):
    changed = replace(bundle, preprocessing=replace(PREPROCESSING, **changes))
    assert changed.compute_fingerprint() != bundle.fingerprint
    edit(bundle, preprocessing=changed.preprocessing.to_json())
    assert Bundle.load(bundle.path).compute_fingerprint() == changed.compute_fingerprint()


def test_the_built_in_model_has_the_fingerprint_it_claims():
    builtin = Bundle.load(find_bundle("builtin"))
    assert builtin.compute_fingerprint() == builtin.fingerprint
    assert sum((builtin.path / name).stat().st_size for name in FILES) <= 60e6


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        Bundle.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(bundle, name):
    (bundle.path / name).unlink()
    message = refused(bundle.path)
    assert f"{name} missing" in message
    assert not any(other in message for other in FILES if other != name)


def test_no_folder_and_an_empty_one(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert ", ".join(FILES) in refused(folder)
        assert not is_bundle(folder)


def test_a_newer_format_says_upgrade(bundle):
    edit(bundle, format=2)
    assert "has format 2, this release reads up to 1: upgrade diptych" in refused(bundle.path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"model"', "{}", '{"format": 1}', '{"format": "1"}', "\xff", "[" * 99_999]
)
def test_nonsense_in_the_place_of_the_description(bundle, text):
    (bundle.path / "model.json").write_bytes(text.encode("latin-1"))
    refused(bundle.path)


@pytest.mark.parametrize(
    "changes",
    [
        {"dim": "many"},
        {"dim": 0},
        {"dim": None},
        {"context_length": []},
        {"context_length": -1},
        {"score_scale": {}},
        {"preprocessing": None},
        {"preprocessing": {"size": [8, 8]}},
        {"preprocessing": {**PREPROCESSING.to_json(), "resize_mode": "stretch"}},
        {"precision": 16},
        {"source": "towers"},
        {"training": ["a", "b"]},
        {"format": None},
    ],
)
def test_a_field_of_the_wrong_kind(bundle, changes):
    edit(bundle, **changes)
    refused(bundle.path)


@pytest.mark.parametrize(
    "field", ["format", "name", "dim", "preprocessing", "context_length", "score_scale", "fingerprint"]
)
def test_a_missing_field_is_named(bundle, field):
    fields = json.loads((bundle.path / "model.json").read_text())
    del fields[field]
    (bundle.path / "model.json").write_text(json.dumps(fields))
    assert field in refused(bundle.path)


# ---- copies ----------------------------------------------------------------------------------------------------------


def test_a_copy_is_the_model_and_nothing_beside_it(bundle, tmp_path):
    (bundle.path / "notes.txt").write_text("mine")
    copy = bundle.copy_to(tmp_path / "models" / "deep" / "copy")
    assert copy == replace(bundle, path=tmp_path / "models" / "deep" / "copy") == Bundle.load(copy.path)
    assert sorted(file.name for file in copy.path.iterdir()) == sorted(FILES)
    assert all((copy.path / name).read_bytes() == (bundle.path / name).read_bytes() for name in FILES)
    assert copy.path.stat().st_mode == bundle.path.stat().st_mode  # as any folder that is made, not a private one
    assert [file.name for file in copy.path.parent.iterdir()] == ["copy"]


def test_an_existing_folder_or_file_is_never_touched(bundle, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("folder", "file"):
        with pytest.raises(ModelError, match="exists already"):
            bundle.copy_to(tmp_path / name)
    assert list((tmp_path / "folder").iterdir()) == []
    assert (tmp_path / "file").read_text() == "mine"


def test_a_copy_that_fails_half_way_leaves_nothing(bundle, tmp_path, monkeypatch):
    real = shutil.copyfile

    def full(source, target):
        if Path(source).name == "text.onnx":
            raise OSError(28, "No space left on device")
        return real(source, target)

    monkeypatch.setattr(shutil, "copyfile", full)
    place = tmp_path / "models"
    with pytest.raises(ModelError, match=r"copy cannot be written: No space left on device"):
        bundle.copy_to(place / "copy")
    assert list(place.iterdir()) == []


def test_an_interrupted_copy_leaves_nothing(bundle, tmp_path, monkeypatch):
    def stop(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", stop)
    with pytest.raises(KeyboardInterrupt):
        bundle.copy_to(tmp_path / "models" / "copy")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_place_that_cannot_hold_a_copy(bundle, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelError, match=r"copy cannot be written: File exists"):
        bundle.copy_to(tmp_path / "file" / "copy")


def test_two_copies_at_once_are_no_mixture(bundle, tmp_path, monkeypatch):
    """Another process is faster: its copy stands, ours is refused and cleaned away."""
    target = tmp_path / "models" / "copy"
    real = Path.rename

    def late(self, to):
        monkeypatch.setattr(Path, "rename", real)
        bundle.copy_to(target)
        return self.rename(to)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(ModelError, match="cannot be written"):
        bundle.copy_to(target)
    assert list(target.parent.iterdir()) == [target]
    assert Bundle.load(target).compute_fingerprint() == bundle.fingerprint
