from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from retrieval import encoders, torch_encoder
from retrieval.encoders import load_encoder
from retrieval.errors import ModelError
from retrieval.onnx_encoder import OnnxEncoder
from retrieval.training.export import export_open_clip
from tests.retrieval.open_clip_models import TEXTS, TINY, save_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "model", TINY["causal"])


@pytest.fixture(scope="module")
def bundle(model):
    return export_open_clip(torch_encoder.load(f"local-dir:{model}", precision="fp32"), model.parent / "bundle").path


def in_hub_cache(home, repository, folder):
    """Lay a folder out as the hub's client does after a download."""
    cached = home / "hub" / f"models--{repository.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123abc")
    shutil.copytree(folder, cached / "snapshots" / "0123abc")


def run(code, **environment):
    """Run Python in a process of its own; the last line that it prints, without what was written to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_bundle_in_a_folder_or_in_the_hubs_cache_needs_no_torch(tmp_path, bundle):
    in_hub_cache(tmp_path, "org/name", bundle)
    code = f"""
import sys, numpy as np
from retrieval.encoders import load_encoder
for i, spec in enumerate(["{bundle}", "local-dir:{bundle}", "hf-hub:org/name"]):
    np.save("{tmp_path}/%d.npy" % i, load_encoder(spec).encode_texts(["a cat", "two dogs"]))
print({{"torch", "open_clip", "transformers"}} & set(sys.modules))
"""
    assert run(code, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1") == "set()"
    expected = OnnxEncoder(encoders.Bundle.load(bundle)).encode_texts(["a cat", "two dogs"])
    for i in range(3):
        np.testing.assert_array_equal(np.load(tmp_path / f"{i}.npy"), expected)


def test_a_model_of_open_clip_in_the_hubs_cache_is_loaded_offline(tmp_path, model, bundle):
    in_hub_cache(tmp_path, "org/open", model)
    in_hub_cache(tmp_path, "org/other", model)
    (tmp_path / "hub" / "models--org--other" / "snapshots" / "0123abc" / "model.json").write_text("{}")  # not ours
    in_hub_cache(tmp_path, "org/half", model)
    (tmp_path / "hub" / "models--org--half" / "snapshots" / "0123abc" / "open_clip_model.safetensors").unlink()
    in_hub_cache(tmp_path, "org/part", bundle)
    (tmp_path / "hub" / "models--org--part" / "snapshots" / "0123abc" / "text.onnx").unlink()
    code = """
from retrieval.encoders import load_encoder
for name in ("open", "other", "half", "part", "none"):
    try:
        print(load_encoder("hf-hub:org/" + name).fingerprint)
    except Exception as error:
        print(type(error).__name__, error)
"""
    lines = run(code, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1").splitlines()
    fingerprint = load_encoder(f"local-dir:{model}").fingerprint
    assert lines[:2] == [fingerprint, fingerprint]
    for name, line in (("half", lines[2]), ("none", lines[4])):
        assert line == (
            f"ModelError hf-hub:org/{name} is not in {tmp_path}/hub, and HF_HUB_OFFLINE forbids a download: unset it"
        )
    assert lines[3].startswith("ModelError")
    assert lines[3].endswith("is not a complete model: text.onnx missing")


def test_a_torchvision_for_another_torch_is_one_plain_line(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"  # what the real one does
    )
    code = """
from retrieval.encoders import load_encoder
try:
    load_encoder("ViT-B-32/openai")
except Exception as error:
    print(type(error).__name__, error)
"""
    line = run(code, PYTHONPATH=str(tmp_path))
    assert line.startswith(
        "ModelError torch and torchvision do not fit together (operator torchvision::nms does not exist)"
    )
    assert "pip install --force-reinstall torch torchvision" in line
    assert "\n" not in line


@pytest.mark.parametrize("package", ["torch", "open_clip"])
def test_a_missing_extra_is_named(tmp_path, package):
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('gone', name='{package}')")
    code = """
from retrieval.encoders import load_encoder
try:
    load_encoder("ViT-B-32/openai")
except Exception as error:
    print(type(error).__name__, error)
"""
    expected = "the model ViT-B-32/openai needs packages that are not installed: pip install 'diptych[torch]'"
    assert run(code, PYTHONPATH=str(tmp_path)) == f"MissingExtra {expected}"


def test_what_is_not_a_model_is_said_in_one_line(tmp_path, model, bundle, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    shutil.copytree(bundle, tmp_path / "data" / "diptych" / "models" / "mine")
    checkpoint = tmp_path / "weights.PT"
    checkpoint.touch()
    cases = {
        str(checkpoint): f"{checkpoint} is a bare checkpoint: .*--model ARCHITECTURE/{checkpoint} --preprocess openai",
        str(tmp_path / "no.safetensors"): f"{tmp_path}/no.safetensors does not exist",
        "no.safetensors": "no.safetensors does not exist",
        str(tmp_path / "nothing"): f"{tmp_path}/nothing does not exist",
        f"{tmp_path}//weights.PT": "is a bare checkpoint",
        str(tmp_path): f"{tmp_path} holds no model: a bundle has model.json, .*local-dir:{tmp_path}",
        f"local-dir:{tmp_path}/nothing": "nothing is not a folder",
        f"local-dir:{tmp_path}": f"{tmp_path} holds no model: neither a bundle nor an open_clip_config.json",
        "buildin": "no model is called 'buildin'; did you mean builtin?",
        "mime": "no model is called 'mime'; did you mean mine?",
        "ViT-B-32": "known here: builtin, mine. open_clip models are named ARCHITECTURE/PRETRAINED",
        "": "no model is called ''",
    }
    for spec, message in cases.items():
        with pytest.raises(ModelError, match=message) as error:
            load_encoder(spec)
        assert "\n" not in str(error.value)
    assert load_encoder("mine").fingerprint == encoders.Bundle.load(bundle).fingerprint


def test_options_that_a_bundle_does_not_have(bundle):
    with pytest.raises(ModelError, match="runs on the CPU: leave out --device cuda"):
        load_encoder(str(bundle), device="cuda")
    with pytest.raises(ModelError, match="says itself how to prepare pictures: leave out --preprocess"):
        load_encoder(str(bundle), preprocess="openai")
    assert load_encoder(str(bundle), device="auto").encode_texts(TEXTS).shape == (len(TEXTS), 24)
