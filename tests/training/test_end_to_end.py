"""Towers in training: a few steps on drawn pictures, on a CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from retrieval.bundle import Bundle
from retrieval.onnx_encoder import OnnxEncoder
from retrieval.pairs import read_pairs
from retrieval.training import loop
from retrieval.training import models as starts
from retrieval.training.config import TrainConfig
from retrieval.training.pictures import TrainedTowers, augment, hide_words

pytestmark = pytest.mark.usefixtures("one_thread")


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    model = starts.start_from_bundle(str(folder)).model
    return {name: value for name, value in model.state_dict().items() if "num_batches" not in name}


def test_towers_learn_and_the_statistics_of_the_pretraining_stay(
    toy: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = starts.start_model(toy).model.state_dict()
    loop.train(toy, tmp_path / "run")
    after = _weights(tmp_path / "run")
    for name, value in after.items():
        same = torch.allclose(value, before[name], atol=1e-7)
        if "running_" in name:
            assert same, name
        elif name.endswith(("conv.weight", "query.weight", "fc1.weight", "mlp.weight")):
            assert not same, name


def test_one_seed_gives_the_same_weights_and_another_does_not(
    toy: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        loop.train(replace(toy, seed=seed), tmp_path / name)
    a, b, c = (_weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_a_toy_set_is_learnt_and_the_bundle_is_the_model(
    toy: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = replace(toy, epochs=20, image_tower_learning_rate=1e-3, text_tower_learning_rate=1e-3, anchor=0.0)
    loop.train(toy, tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < losses[0] - 0.3

    start = starts.start_from_bundle(str(tmp_path / "run"))
    encoder = OnnxEncoder(Bundle.load(tmp_path / "run"))
    pictures = [Image.open(path) for path in sorted((tmp_path / "images").iterdir())]
    pixels = torch.from_numpy(encoder.preprocessing.pixels(pictures)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (encoder.preprocessing.mean, encoder.preprocessing.std))
    with torch.inference_mode():
        expected = start.model.image.eval()((pixels - mean) / std).numpy()
    np.testing.assert_allclose(encoder.encode_images(pictures), expected, atol=1e-4)
    texts = [
        caption
        for colour in ("red", "green", "blue", "white")
        for caption in (f"a {colour} square", f"something {colour}")
    ]
    ids = torch.tensor([encoding.ids for encoding in Tokenizer.from_str(start.tokenizer_json).encode_batch(texts)])
    with torch.inference_mode():
        expected = start.model.text.eval()(ids).numpy()
    np.testing.assert_allclose(encoder.encode_texts(texts), expected, atol=1e-4)


def test_parts_give_the_gradients_of_the_whole_batch(toy: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval.training.pictures.augment", lambda x: x.permute(0, 3, 1, 2).float() / 255)
    gradients = []
    for part in (8, 3):
        start = starts.start_model(toy)
        towers = TrainedTowers(start.model, start.preprocessing, start.tokenizer_json, 64, "cpu", part, 0.0)
        pictures = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8))
        start.model.train()
        texts = [
            f"a {colour} square on the {side}" for colour in ("red", "green", "blue") for side in ("left", "right")
        ]
        sentences = towers.sentences([*texts, "something red", "left"])  # of several lengths
        loss = towers.image_features(pictures).square().sum() + towers.text_features(sentences).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        trunks = (start.model.image.trunk, start.model.text.trunk)
        gradients.append([weight.grad for trunk in trunks for weight in trunk.parameters()])
    for whole, parts in zip(*gradients, strict=True):
        assert whole is not None
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max()) + 1e-7)


def test_training_computes_what_search_does(toy: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolution and batch norm as one, and as two with their statistics, are the same function."""
    tower = starts.start_model(toy).model.image.trunk
    generator = torch.Generator().manual_seed(0)
    for name, buffer in tower.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5, generator=generator)
    pixels = torch.randn(2, 3, 64, 64, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(tower.train()(pixels), tower.eval()(pixels), rtol=1e-4, atol=1e-5)


def test_the_mix_with_the_start_that_validates_best_is_kept(
    toy: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.train(replace(toy, interpolate=(1e-6,)), tmp_path / "start")
    start = starts.start_model(toy).model
    for name, value in _weights(tmp_path / "start").items():
        if ".trunk." in name:
            torch.testing.assert_close(value, start.state_dict()[name])


def test_a_crop_without_change_is_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_AREA", (1.0, 1.0)), ("_RATIO", (1.0, 1.0)), ("_JITTER", (1.0, 1.0))):
        monkeypatch.setattr(f"retrieval.training.pictures.{name}", value)
    torch.manual_seed(0)
    pictures = torch.randint(0, 256, (16, 8, 6, 3), dtype=torch.uint8)
    views = augment(pictures)
    plain = pictures.permute(0, 3, 1, 2) / 255
    kept = [torch.allclose(view, picture, atol=1e-5) for view, picture in zip(views, plain, strict=True)]
    mirrored = [torch.allclose(view, picture.flip(2), atol=1e-5) for view, picture in zip(views, plain, strict=True)]
    assert all(k != m for k, m in zip(kept, mirrored, strict=True))
    assert 2 <= sum(kept) <= 14


def test_only_words_of_sentences_are_hidden() -> None:
    torch.manual_seed(0)
    long, short = torch.arange(1000, 1020), torch.arange(1000, 1020)
    long[0], long[-1] = 101, 102
    short[9:] = 0
    ids = torch.stack([long, short])
    hidden = hide_words(ids, 0.5)
    assert torch.equal(hidden[1], ids[1])
    changed = hidden[0] != ids[0]
    assert 3 <= int(changed.sum()) <= 15
    assert (hidden[0][changed] == 103).all()
    assert not changed[0]
    assert not changed[-1]


@pytest.mark.parametrize(("what", "locked"), [("text", "image"), ("image", "text")])
def test_a_locked_tower_is_not_run_at_every_step(
    toy: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, locked: str
) -> None:
    """Its features come from the cache, and they are those that it gives in torch."""
    settings = replace(toy, train=what, epochs=2, anchor=0.0, word_dropout=0.0, dropout=0.0)
    used, seen = [], []
    for side in ("image", "text"):
        of = getattr(TrainedTowers, f"{side}_features")
        monkeypatch.setattr(
            TrainedTowers,
            f"{side}_features",
            lambda towers, rows, of=of, side=side: used.append(side) or of(towers, rows),
        )
    loss = loop._Run._loss
    monkeypatch.setattr(loop._Run, "_loss", lambda run, batch: seen.append((run, batch)) or loss(run, batch))
    loop.train(settings, tmp_path / "run")
    assert set(used) == {what}

    run, batch = seen[0]
    cached = (
        run.towers.image_features(batch.pictures) if locked == "image" else run.towers.text_features(batch.sentences)
    )
    start = starts.start_model(settings)
    towers = TrainedTowers(start.model, start.preprocessing, start.tokenizer_json, 64, "cpu", 8, 0.0)
    start.model.eval()
    every = [*read_pairs(tmp_path / "toy.jsonl", "train")]
    rows = (
        towers.image_features(towers.pictures(every)[0][0])
        if locked == "image"
        else towers.text_features(towers.sentences([text for record in every for text in record.texts]))
    )
    cached = cached[: len(every)]  # behind them come those of the vocabulary
    nearest = (torch.nn.functional.normalize(rows, dim=1) @ cached.T).max(0).values  # the batch's order is its own
    assert float(nearest.detach().min()) > 0.9999
