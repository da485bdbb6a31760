"""What the built-in model is promised to do, measured on data it was not trained on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from retrieval.bundle import Bundle
from retrieval.encoders import find_bundle

ROOT = Path(__file__).parents[1]


def diptych(*arguments):
    command = [sys.executable, "-c", "from cli.main import run; run()", *map(str, arguments), "--json"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize(
    ("file", "options", "floors", "pictures", "texts"),
    [
        ("flickr8k/captions.jsonl", ["--split", "test"], {"t2i_hit@10": 0.60, "i2t_hit@10": 0.66}, 1000, 5000),
        ("coco/captions.jsonl", ["--split", "val"], {"t2i_hit@10": 0.63}, 1000, 1000),
        ("labelled/caltech101.jsonl", ["--task", "classification"], {"top1": 0.47}, 1418, 101),
    ],
)
def test_floors(shared_data, file, options, floors, pictures, texts):
    result = diptych("evaluate", shared_data / file, *options)
    assert (result["images"], result["texts"]) == (pictures, texts)
    for name, floor in floors.items():
        assert result["metrics"][name] >= floor
    recorded = Bundle.load(find_bundle("builtin")).training["scores"]
    prefix = {"flickr8k": "flickr8k", "coco": "coco", "labelled": "caltech101"}[file.split("/")[0]]
    known = [name for name in result["metrics"] if f"{prefix}_{name}" in recorded]
    assert len(known) >= 2
    for name in known:  # other processors round differently in the last bits
        tolerance = 1.0 if name.endswith("rank") else 0.01
        assert recorded[f"{prefix}_{name}"] == pytest.approx(result["metrics"][name], abs=tolerance)


def test_the_readme_states_the_recorded_scores():
    scores = Bundle.load(find_bundle("builtin")).training["scores"]
    readme = (ROOT / "README.md").read_text("utf-8")
    for prefix in ("flickr8k_t2i", "flickr8k_i2t", "coco_t2i", "coco_i2t"):
        row = " | ".join(f"{100 * scores[f'{prefix}_hit@{k}']:.1f}" for k in (1, 5, 10))
        assert row in readme
    assert f"{100 * scores['caltech101_top1']:.1f}" in readme


def test_the_bundle_is_whole_small_and_says_how_it_was_made():
    bundle = Bundle.load(find_bundle("builtin"))
    assert bundle.compute_fingerprint() == bundle.fingerprint
    assert sum(file.stat().st_size for file in bundle.path.iterdir()) <= 60_000_000
    recipe = bundle.training["command"].split()[3]
    assert bundle.training["command"].startswith(f"diptych train --config {recipe} --data DATA")
    text = (ROOT / "retrieval" / "training" / "recipes" / recipe).read_text("utf-8")
    assert f'name = "{bundle.training["int8"]["made_from"]["name"]}"\n' in text
    assert {"settings", "data", "software", "scores"} <= set(bundle.training)
    assert all(len(data["checksum"]) == 64 for data in bundle.training["data"])
    assert bundle.licence


def test_eighty_original_photos(shared_data, tmp_path):
    folder = shutil.copytree(shared_data / "flickr8k" / "originals", tmp_path / "photos")
    first = diptych("index", folder)
    assert (first["added"], first["embedded"], first["failures"]) == (80, 80, [])
    again = diptych("index", folder)
    assert (again["skipped"], again["embedded"], again["added"], again["changed"]) == (80, 0, 0, 0)
