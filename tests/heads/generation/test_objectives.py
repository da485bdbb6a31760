"""Objectives and networks against slow, obvious versions of themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from tests.heads.generation.materials import torch  # skips without scikit-learn and torch

from retrieval.heads.generation.adversarial import (  # isort: skip
    OBJECTIVES,
    DiscriminatorNet,
    GeneratorNet,
    augment,
    gradient_penalty,
    layout_loss,
)
from retrieval.heads.generation.autoencoder import disturbed, kl_divergence  # isort: skip


def test_kl_is_the_integral_that_it_stands_for():
    """Of one number: sum of q(z) log(q(z) / p(z)) over a fine grid."""
    random = np.random.default_rng(0)
    mean, log_variance = random.normal(size=(3, 4)), random.normal(size=(3, 4))
    z = np.linspace(-30, 30, 200_001)
    slow = np.zeros(3)
    for row in range(3):
        for m, v in zip(mean[row], np.exp(log_variance[row]), strict=True):
            log_q = -((z - m) ** 2) / (2 * v) - math.log(2 * math.pi * v) / 2
            log_p = -(z**2) / 2 - math.log(2 * math.pi) / 2
            slow[row] += (np.exp(log_q) * (log_q - log_p)).sum() * (z[1] - z[0])
    fast = kl_divergence(torch.tensor(mean), torch.tensor(log_variance)).numpy()
    np.testing.assert_allclose(fast, slow, rtol=1e-6)
    assert kl_divergence(torch.zeros(1, 5), torch.zeros(1, 5)) == 0


def test_min_max_is_binary_cross_entropy():
    real, fake = [0.3, -2.0, 5.0], [1.5, -0.2, -4.0]

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    slow = -sum(math.log(sigmoid(x)) for x in real) / 3 - sum(math.log(1 - sigmoid(x)) for x in fake) / 3
    objective = OBJECTIVES["min-max"]
    assert float(objective.discriminator(torch.tensor(real), torch.tensor(fake))) == pytest.approx(slow, rel=1e-6)
    assert float(objective.generator(torch.tensor(fake))) == pytest.approx(
        -sum(math.log(sigmoid(x)) for x in fake) / 3, rel=1e-6
    )
    # A discriminator that cannot tell, says one half of each: the game's value at its fixed point is 2 log 2.
    nothing = torch.zeros(3)
    assert float(objective.discriminator(nothing, nothing)) == pytest.approx(2 * math.log(2))


def test_hinge_ends_at_its_margin():
    objective = OBJECTIVES["hinge"]
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert float(objective.discriminator(real, fake)) == pytest.approx((0 + 0.5) / 2 + (0 + 2) / 2)
    assert float(objective.generator(fake)) == pytest.approx(1.0)


def test_gradient_penalty_of_a_plane_is_half_its_squared_slope():
    pictures = torch.randn(5, 3, 4, 4, requires_grad=True)
    slope = torch.randn(3, 4, 4)
    logits = (pictures * slope).sum((1, 2, 3))
    assert float(gradient_penalty(logits, pictures)) == pytest.approx(float(slope.square().sum()) / 2, rel=1e-5)


def test_the_layout_is_that_of_a_picture_or_of_its_mirror_image():
    real = torch.rand(4, 3, 16, 16) * 2 - 1
    assert float(layout_loss(real, real, 8)) == 0
    assert float(layout_loss(real.flip(3), real, 8)) == pytest.approx(0, abs=1e-6)
    made = torch.rand(4, 3, 16, 16) * 2 - 1
    small, target = (x.reshape(4, 3, 8, 2, 8, 2).mean((3, 5)) for x in (made, real))
    slow = [
        min(float((small[i] - target[i]).abs().mean()), float((small[i] - target[i].flip(2)).abs().mean()))
        for i in range(4)
    ]
    assert float(layout_loss(made, real, 8)) == pytest.approx(sum(slow) / 4, rel=1e-5)


def test_projection_is_an_inner_product_and_its_trunk_does_not_see_the_condition():
    critic = DiscriminatorNet(5, (8, 16)).eval()
    pictures, condition = torch.rand(3, 3, 16, 16), torch.randn(3, 5)
    with torch.no_grad():
        features = critic.features(pictures)
        slow = [
            float(critic.real(features[i]))
            + sum(float(a * b) for a, b in zip(critic.project(condition[i]), features[i], strict=True))
            for i in range(3)
        ]
        np.testing.assert_allclose(critic(pictures, condition).numpy(), slow, rtol=1e-5)


def test_a_picture_does_not_depend_on_those_beside_it():
    network = GeneratorNet(5, 4, (16, 8)).eval()
    condition, noise = torch.randn(6, 5), torch.randn(6, 4)
    with torch.no_grad():
        together, alone = network(condition, noise), network(condition[2:3], noise[2:3])
    assert together.shape == (6, 3, 16, 16)
    np.testing.assert_allclose(alone[0].numpy(), together[2].numpy(), atol=1e-6)


def test_augmented_pictures_are_shifted_with_a_hole_and_let_gradients_through():
    pictures = torch.rand(32, 3, 16, 16, requires_grad=True)
    shown = augment(pictures, torch.Generator().manual_seed(0))
    assert shown.shape == pictures.shape
    assert torch.equal(shown, augment(pictures, torch.Generator().manual_seed(0)))
    assert not torch.equal(shown, augment(pictures, torch.Generator().manual_seed(1)))
    black = (shown == 0).all(1)  # (B, S, S)
    holes = black.sum((1, 2))
    assert holes.min() >= 16  # a corner of the square at least, however far out it lies
    assert holes.max() < 16 * 16
    shown.sum().backward()
    assert bool((pictures.grad != 0).any((1, 2, 3)).all())


def test_noise_is_no_longer_than_asked_for():
    rows = torch.randn(50, 8)
    moved = (disturbed(rows, 0.5) - rows).norm(dim=1) / rows.norm(dim=1)
    assert 0 < moved.max() <= 0.5 + 1e-5
    assert disturbed(rows, 0) is rows


def test_a_mirror_of_pillow_is_the_one_that_is_meant():
    """Pictures are (B, 3, rows, columns): flipping the last is left and right."""
    image = Image.new("RGB", (4, 4))
    image.putpixel((0, 1), (255, 0, 0))
    turned = np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    np.testing.assert_array_equal(pixels.flip(2).permute(1, 2, 0).numpy(), turned)
