"""Any open_clip architecture learns through the same door, and its bundle searches as the torch model does."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import open_clip  # noqa: E402

from retrieval import torch_encoder  # noqa: E402
from retrieval.bundle import Bundle  # noqa: E402
from retrieval.encoders import export_bundle  # noqa: E402
from retrieval.errors import DataError, ModelError  # noqa: E402
from retrieval.evaluation import evaluate  # noqa: E402
from retrieval.onnx_encoder import OnnxEncoder  # noqa: E402
from retrieval.pairs import read_pairs  # noqa: E402
from retrieval.training import config as recipes  # noqa: E402
from retrieval.training import loop, models  # noqa: E402
from tests.retrieval.open_clip_models import TEXTS, TINY, photos, save_model  # noqa: E402
from tests.training.drawings import weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(world):
    start = recipes.config_for([world.pairs], "nothing yet")
    return replace(
        start,
        train="all",
        objective="infonce",
        epochs=2,
        batch_size=20,
        part=20,
        precision="fp32",
        image_tower_learning_rate=1e-3,
        text_tower_learning_rate=1e-3,
    )


@pytest.mark.parametrize("kind", ["causal", "causal-custom", "both-ways", "resnet"])
def test_a_run_is_a_bundle_that_searches_as_the_torch_model_does(config, tmp_path, kind, monkeypatch):
    folder = save_model(tmp_path / kind, TINY[kind])
    kept = {}
    write = loop._write_bundle

    def look(settings, start, *rest):
        kept["model"] = start.model
        return write(settings, start, *rest)

    monkeypatch.setattr(loop, "_write_bundle", look)
    settings = replace(config, model=f"local-dir:{folder}")
    loop.train(settings, tmp_path / "run")
    clip, start = kept["model"].clip.eval(), models.start_model(settings).model.clip
    changed = [not torch.equal(a, b) for a, b in zip(clip.parameters(), start.parameters(), strict=True)]
    assert np.mean(changed) > 0.8
    encoder = OnnxEncoder(Bundle.load(tmp_path / "run"))
    torch_model = torch_encoder.load(f"local-dir:{folder}", precision="fp32")
    torch_model.model.load_state_dict(clip.state_dict(), strict=False)
    for ours, theirs in (
        (encoder.encode_images(photos()), torch_model.encode_images(photos())),
        (encoder.encode_texts(TEXTS), torch_model.encode_texts(TEXTS)),
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_run_goes_on_from_a_run_and_from_an_exported_bundle(config, tmp_path):
    folder = save_model(tmp_path / "tiny", TINY["causal"])
    exported = export_bundle(f"local-dir:{folder}", tmp_path / "bundle")
    first = models.start_from_bundle(str(exported.path)).model.clip
    again = torch_encoder.load(f"local-dir:{folder}", precision="fp32").model
    for name, value in again.state_dict().items():
        torch.testing.assert_close(first.state_dict()[name], value, rtol=0, atol=1e-6, msg=name)
    loop.train(replace(config, model=str(exported.path)), tmp_path / "one")
    loop.train(replace(config, model=str(tmp_path / "one"), train="last-1"), tmp_path / "two")
    bundle = Bundle.load(tmp_path / "two")
    assert bundle.training["start"]["fingerprint"] == Bundle.load(tmp_path / "one").fingerprint
    assert bundle.source == exported.source


def test_from_random_weights(config, tmp_path, world):
    """A small pair learns the drawings; the same seed gives the same model."""
    described = {**TINY["causal"], "vision_cfg": {**TINY["causal"]["vision_cfg"], "image_size": 32}}
    (tmp_path / "diptych-tiny.json").write_text(json.dumps(described))
    open_clip.add_model_config(tmp_path / "diptych-tiny.json")
    settings = replace(config, model="scratch:diptych-tiny", epochs=60, learning_rate=3e-3)
    metrics = loop.train(settings, tmp_path / "run")
    assert metrics["val_t2i_hit@5"] >= metrics["before_val_t2i_hit@5"] + 0.2
    measured = evaluate(OnnxEncoder(Bundle.load(tmp_path / "run")), read_pairs(world.pairs, "val")).metrics
    assert measured["t2i_hit@5"] == pytest.approx(metrics["val_t2i_hit@5"], abs=0.06)
    loop.train(replace(settings, epochs=2), tmp_path / "a")
    loop.train(replace(settings, epochs=2), tmp_path / "b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


@pytest.mark.parametrize("what", ["heads", "lora", "image", "text"])
def test_parts_of_it(config, tmp_path, what):
    folder = save_model(tmp_path / "tiny", TINY["causal"])
    settings = replace(config, model=f"local-dir:{folder}", train=what, ema=0.5, objective="sigmoid")
    loop.train(settings, tmp_path / "run")
    start = models.start_model(settings).model.clip.state_dict()
    end = models.start_from_bundle(str(tmp_path / "run")).model.clip.state_dict()
    shared = [name for name in start if name in end and "logit" not in name and "attn_mask" not in name]
    changed = {name for name in shared if not torch.allclose(start[name], end[name], atol=1e-7)}
    sides = {"image" if name.startswith("visual") else "text" for name in changed}
    assert sides == {"heads": {"image", "text"}, "lora": {"image", "text"}, "image": {"image"}, "text": {"text"}}[what]
    if what == "heads":
        assert changed == {"visual.proj", "text_projection"}
    if what == "lora":
        assert all("attn" in name or "mlp" in name for name in changed)


def test_it_goes_on_after_a_kill(config, tmp_path, ended_after):
    folder = save_model(tmp_path / "tiny", TINY["resnet"])
    settings = replace(config, model=f"local-dir:{folder}", checkpoint_seconds=0.0)
    whole = loop.train(settings, tmp_path / "whole")
    ended_after(2)
    with pytest.raises(KeyboardInterrupt):
        loop.train(settings, tmp_path / "ended")
    assert loop.resume(tmp_path / "ended") == whole
    assert weights(tmp_path / "ended") == weights(tmp_path / "whole")


def test_what_cannot_be(config, tmp_path):
    with pytest.raises(ModelError, match="no architecture 'ViT-Z'"):
        loop.train(replace(config, model="scratch:ViT-Z"), tmp_path / "run")
    folder = save_model(tmp_path / "tiny", TINY["causal"])
    with pytest.raises(DataError, match="word_dropout"):
        loop.train(replace(config, model=f"local-dir:{folder}", word_dropout=0.1), tmp_path / "run")
    assert not (tmp_path / "run").exists()
