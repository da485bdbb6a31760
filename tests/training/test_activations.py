"""Towers cut below their last blocks: what is held of a row, and what the blocks make of it: the whole tower's."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from retrieval.pairs import PictureBytes, Record  # noqa: E402
from retrieval.training.activations import PartlyFrozenTowers  # noqa: E402
from retrieval.training.models import start_from  # noqa: E402
from retrieval.training.parameters import tower_layers, train_mode, trainable_groups  # noqa: E402
from retrieval.training.pictures import TrainedTowers  # noqa: E402
from tests.heads.towers import start  # noqa: E402
from tests.retrieval.open_clip_models import TINY, save_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
SENTENCES = ["a red thing", "something", "a thing of something yellow a thing of something blue", "nothing known"]


@pytest.fixture
def records(tmp_path):
    random = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(random.integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / f"{i}.png")
    return [Record(tmp_path / f"{i}.png") for i in range(4)]


def whole(model):
    return TrainedTowers(
        model.model, model.preprocessing, model.tokenizer_json, model.context_length, "cpu", 2, 0.0, amp="fp32"
    )


@pytest.mark.parametrize("kind", ["builtin", "classic"])
@pytest.mark.parametrize("last", [1, 2, 99])
@torch.no_grad()
def test_both_parts_of_a_tower_are_the_tower(kind, last, records):
    model = start(kind)
    cut, towers = PartlyFrozenTowers(model, last, "cpu"), whole(model)
    (rows,), unreadable = cut.pictures(records)
    assert not unreadable
    assert rows.dtype == torch.float16
    (pictures,), _ = towers.pictures(records)
    torch.testing.assert_close(cut.image_features(rows), towers.image_features(pictures), rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(cut.image_features(rows[1:2]), cut.image_features(rows)[1:2], rtol=1e-4, atol=1e-5)
    said = cut.sentences(SENTENCES)
    expected = towers.text_features(towers.sentences(SENTENCES))
    torch.testing.assert_close(cut.text_features(said), expected, rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(cut.text_features(said[:1]), cut.text_features(said)[:1], rtol=1e-4, atol=1e-5)
    assert said[0].numel() * 2 + rows[0].numel() * 2 <= cut.needed(1, 1)

    pixels = torch.rand(2, 3, 32, 32)
    trunk = model.model.image.trunk
    torch.testing.assert_close(trunk.above(trunk.below(pixels, last), last), trunk(pixels), rtol=0, atol=0)
    ids = towers.sentences(SENTENCES)
    trunk = model.model.text.trunk
    torch.testing.assert_close(trunk.above(trunk.below(ids, last), ids != 0, last), trunk(ids), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["builtin", "classic"])
def test_the_last_blocks_have_the_gradients_of_the_whole_tower(kind, records, monkeypatch):
    monkeypatch.setattr("retrieval.training.pictures.augment", lambda x: x.permute(0, 3, 1, 2).float() / 255)
    found = []
    for cut in (True, False):
        model = start(kind)
        trainable_groups(model.model, "last-1", learning_rate=1.0, weight_decay=0.0)
        towers = PartlyFrozenTowers(model, 1, "cpu") if cut else whole(model)
        towers.part = 99  # batch norms of the classic pair see all of a batch at once
        (rows,), _ = towers.pictures(records)
        said = towers.sentences(SENTENCES)
        train_mode(model.model)
        (towers.image_features(rows).square().sum() + towers.text_features(said).square().sum()).backward()
        found.append({name: weight.grad for name, weight in model.model.named_parameters() if weight.grad is not None})
    ours, theirs = found
    learn = {name for layer in tower_layers(start(kind).model) if layer.depth <= 1 for name in layer.parameters}
    assert ours.keys() == theirs.keys() == {name for name in learn if ".head." not in name}
    for name, gradient in ours.items():  # of float16 inputs: the same direction and length
        a, b = gradient.flatten(), theirs[name].flatten()
        assert float(torch.dist(a, b)) < 0.05 * float(b.norm()) + 1e-5, name


def test_what_cannot_be_read_is_told_by_its_place(records):
    broken = [records[0], Record(PictureBytes("b.png", b"no picture")), records[1]]
    cut = PartlyFrozenTowers(start("classic"), 1, "cpu")
    (rows,), unreadable = cut.pictures(broken)
    assert len(rows) == 2
    assert list(unreadable) == [1]
    (rows,), unreadable = cut.pictures(broken[1:2])
    assert len(rows) == 0
    assert list(unreadable) == [0]


def test_open_clip_s_towers_are_not_cut(tmp_path):
    folder = save_model(tmp_path / "causal", TINY["causal"])
    with pytest.raises(TypeError, match="built-in kind"):
        PartlyFrozenTowers(start_from(f"local-dir:{folder}"), 1, "cpu")
