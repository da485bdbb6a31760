"""Mixed precision: what towers multiply in, what a scale of the loss is for, and what is a divergence."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors import safe_open  # noqa: E402

from retrieval.errors import DataError  # noqa: E402
from retrieval.training import config as recipes  # noqa: E402
from retrieval.training import loop  # noqa: E402
from retrieval.training import models as starts  # noqa: E402
from retrieval.training.amp import LossScale, autocast  # noqa: E402
from retrieval.training.pictures import TrainedTowers  # noqa: E402
from retrieval.training.run import CHECKPOINT, LOG  # noqa: E402
from tests.cli.commands import complaint, diptych  # noqa: E402
from tests.retrieval.open_clip_models import TINY, save_model  # noqa: E402
from tests.training.drawings import weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(world, tmp_path):
    """A small open_clip model with random weights and the drawings; two steps an epoch."""
    folder = save_model(tmp_path / "tiny", TINY["causal"])
    return replace(
        recipes.config_for([world.pairs], f"local-dir:{folder}"),
        train="all",
        epochs=10,
        batch_size=20,
        part=20,
        precision="fp32",
        image_tower_learning_rate=1e-3,
        text_tower_learning_rate=1e-3,
    )


def losses(run):
    return [line["loss"] for line in map(json.loads, (run / LOG).read_text().splitlines()) if "loss" in line]


def test_which_arithmetic_on_which_device():
    for amp, on_cpu, on_cuda in (
        ("auto", None, torch.bfloat16),
        ("fp32", None, None),
        ("bf16", torch.bfloat16, torch.bfloat16),
        ("fp16", torch.float16, torch.float16),
    ):
        for device, expected in (("cpu", on_cpu), ("cuda", on_cuda)):
            with pytest.MonkeyPatch.context() as patch:
                asked = []
                patch.setattr(torch, "autocast", lambda *a, enabled, into=asked: into.append((*a, enabled)))
                autocast(amp, torch.device(device))
            ((kind, dtype, enabled),) = asked
            assert (kind, dtype if enabled else None) == (device, expected), amp


@pytest.mark.parametrize("part", [8, 3])
def test_gradients_are_those_of_fp32_as_closely_as_the_numbers_are(toy, monkeypatch, part):
    """Also when a part's activations are computed again; bf16 keeps 8 bits of each number, fp16 keeps 11."""
    monkeypatch.setattr("retrieval.training.pictures.augment", lambda x: x.permute(0, 3, 1, 2).float() / 255)
    found = {}
    for amp in ("fp32", "auto", "bf16", "fp16"):
        start = starts.start_model(toy)
        towers = TrainedTowers(start.model, start.preprocessing, start.tokenizer_json, 64, "cpu", part, 0.0, amp=amp)
        start.model.train()
        pictures = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8))
        features = towers.image_features(pictures), towers.text_features(towers.sentences(["a red square"] * 8))
        assert all(rows.dtype == torch.float32 for rows in features)
        scale = LossScale(amp, "cpu")
        scale.backward(sum(rows.square().mean() for rows in features))
        scale._scaler.unscale_(torch.optim.SGD(start.model.parameters()))
        grads = [weight.grad for weight in start.model.parameters() if weight.grad is not None]
        found[amp] = torch.cat([grad.flatten() for grad in grads])
    assert torch.equal(found["auto"], found["fp32"])
    difference = {amp: float((found[amp] - found["fp32"]).norm() / found["fp32"].norm()) for amp in ("bf16", "fp16")}
    assert 1e-4 < difference["fp16"] < 0.02
    assert difference["fp16"] < difference["bf16"] < 0.15


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_run_learns_as_in_fp32(config, tmp_path, amp):
    for one in ("fp32", amp):
        loop.train(replace(config, amp=one), tmp_path / one)
    plain, found = losses(tmp_path / "fp32"), losses(tmp_path / amp)
    assert plain[-1] < plain[0] - 0.1
    np.testing.assert_allclose(found[1:], plain[1:], atol=0.03)  # before that, steps were left out to find the scale
    assert weights(tmp_path / amp) != weights(tmp_path / "fp32")


def test_gradients_that_overflow_cost_a_step_and_no_more(config, tmp_path, monkeypatch):
    """A scale far too large at first: steps are left out until it fits, the weights stay, and that is no divergence."""
    monkeypatch.setattr("torch.amp.GradScaler", _scaler(init_scale=2.0**24))
    seen = []
    step = LossScale.step

    def watch(scale, optimizer):
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        before, was = [weight.detach().clone() for weight in weights], scale._scaler.get_scale()
        step(scale, optimizer)
        still = all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
        seen.append((still, scale._scaler.get_scale() < was))

    monkeypatch.setattr(LossScale, "step", watch)
    loop.train(replace(config, amp="fp16"), tmp_path / "run")
    del seen[-1]  # of learning rate 0
    assert all(still == smaller for still, smaller in seen)
    assert seen[0] == (True, True)
    assert seen[-1] == (False, False)


def _scaler(**settings):
    real = torch.amp.GradScaler
    return lambda device, enabled: real(device, enabled=enabled, **settings)


def test_gradients_that_are_no_numbers_at_any_scale_are_a_divergence(config, tmp_path, monkeypatch):
    """The loss is a number at every step, but there is no way down it."""
    monkeypatch.setattr("torch.amp.GradScaler", _scaler(init_scale=2.0**4))

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, grad):
            return grad * float("nan")

    features = TrainedTowers.image_features
    monkeypatch.setattr(TrainedTowers, "image_features", lambda *a: Broken.apply(features(*a)))
    with pytest.raises(DataError, match="no numbers any more, at any scale: try a lower --lr, or --amp bf16"):
        loop.train(replace(config, amp="fp16"), tmp_path / "run")


def test_a_loss_that_is_no_number_is_a_divergence_with_a_scale_too(config, tmp_path):
    rates = {"learning_rate": 1e30, "image_tower_learning_rate": 1e30, "text_tower_learning_rate": 1e30}
    with pytest.raises(DataError, match=r"the loss is no number any more at step \d: try a lower --lr, or --amp bf16"):
        loop.train(replace(config, amp="fp16", **rates), tmp_path / "run")


def test_a_run_with_a_scale_goes_on_bit_for_bit(config, tmp_path, ended_after, monkeypatch):
    """The scale is halved in the first steps, and doubled after five good ones: neither may be lost."""
    monkeypatch.setattr("torch.amp.GradScaler", _scaler(init_scale=2.0**24, growth_interval=5))
    settings = replace(config, amp="fp16", checkpoint_seconds=0.0)
    whole = loop.train(settings, tmp_path / "whole")
    ended_after(12)
    with pytest.raises(KeyboardInterrupt):
        loop.train(settings, tmp_path / "ended")
    with safe_open(str(tmp_path / "ended" / CHECKPOINT), "pt") as stored:
        assert stored.get_tensor("amp.scale") < 2.0**24
        assert stored.get_tensor("amp._growth_tracker") > 0
    assert loop.resume(tmp_path / "ended") == whole
    assert weights(tmp_path / "ended") == weights(tmp_path / "whole")


def test_what_cannot_be(toy, tmp_path, world):
    with pytest.raises(DataError, match="amp must be one of auto, fp32, bf16, fp16, not 'fp8'"):
        replace(toy, amp="fp8")
    line = complaint(diptych("train", world.pairs, "-o", tmp_path / "run", "--amp", "bf16"))
    assert "amp is for towers that learn" in line
    assert "amp must be one of" in complaint(diptych("train", world.pairs, "-o", tmp_path / "run", "--amp", "int8"))
    assert not (tmp_path / "run").exists()
