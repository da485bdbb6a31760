"""Treatments of rare classes beside their definitions, written out."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from retrieval.heads.imbalance import class_weights, focal_loss, treated
from retrieval.heads.modalities import Inputs
from retrieval.heads.networks import OGM, FusionNet, dropped, loss_function, right_tensor
from retrieval.heads.problem import TREATMENTS, Part, Problem
from tests.heads.problems import TARGETS, torch, world  # skips without scikit-learn and torch


@pytest.fixture
def rare():
    """40 birds, 12 cats, 4 dogs."""
    random = np.random.default_rng(0)
    right = np.repeat([0, 1, 2], [40, 12, 4])
    values = tuple((random.normal(size=(56, width)) + right[:, None]).astype(np.float32) for width in (3, 2))
    present = np.ones((56, 2), bool)
    present[::5, 1] = False
    values[1][::5] = 0
    part = Part(Inputs(("image", "text"), values, present), right)
    return Problem(TARGETS["class"], part, part)


def test_class_weights_are_scikit_learn_s(rare):
    from sklearn.utils.class_weight import compute_class_weight

    right = rare.train.right
    expected = compute_class_weight("balanced", classes=np.arange(3), y=right)
    np.testing.assert_allclose(class_weights(right, 3), expected)
    assert class_weights(np.array([0, 0, 2]), 3).tolist() == [0.75, 1, 1.5]


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_focal_loss_written_out(gamma):
    logits = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]])
    right = torch.tensor([0, 2])
    slow = []
    for row, own in zip(logits.tolist(), right.tolist(), strict=True):
        share = math.exp(row[own]) / sum(math.exp(value) for value in row)
        slow.append(-((1 - share) ** gamma) * math.log(share))
    assert float(focal_loss(logits, right, gamma=gamma)) == pytest.approx(sum(slow) / 2)
    if gamma == 0:
        assert float(focal_loss(logits, right, gamma=0)) == pytest.approx(
            float(torch.nn.functional.cross_entropy(logits, right))
        )


def test_focal_loss_of_labels_written_out():
    logits, right = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 1.0]])
    shares = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))]
    slow = sum(-((1 - share) ** 2) * math.log(share) for share in shares) / 2
    assert float(focal_loss(logits, right)) == pytest.approx(slow)


def counts(part):
    return np.bincount(part.right, minlength=3).tolist()


def test_what_each_treatment_makes_of_the_rows(rare):
    pytest.importorskip("imblearn")
    found = {kind: treated(replace(rare, treatment=kind)) for kind in TREATMENTS if kind != "augment"}
    assert all(counts(found[kind]) == [40, 12, 4] for kind in ("none", "class-weights", "focal"))
    assert counts(found["oversample"]) == counts(found["smote"]) == [40, 40, 40]
    assert counts(found["undersample"]) == [4, 4, 4]
    rows = {tuple(row) for row in rare.train.inputs.joined().tolist()}
    for kind in ("oversample", "undersample"):
        assert {tuple(row) for row in found[kind].inputs.joined().tolist()} <= rows


def test_smote_makes_rows_between_rows_of_the_same_class(rare):
    pytest.importorskip("imblearn")
    made = treated(replace(rare, treatment="smote"))
    inputs, old = made.inputs, rare.train
    np.testing.assert_array_equal(inputs.values[0][:56], old.inputs.values[0])
    for row in range(56, len(made)):
        own = old.inputs.values[0][old.right == made.right[row]]
        between = any(
            np.linalg.norm(own[i] - inputs.values[0][row]) + np.linalg.norm(own[j] - inputs.values[0][row])
            == pytest.approx(np.linalg.norm(own[i] - own[j]), abs=1e-4)
            for i in range(len(own))
            for j in range(len(own))
        )
        assert between
    assert (inputs.values[1][~inputs.present[:, 1]] == 0).all()


def test_smote_leaves_a_class_of_one_row_alone(rare):
    pytest.importorskip("imblearn")
    part = rare.train.take(np.arange(53))
    assert counts(treated(replace(rare, train=part, treatment="smote"))) == [40, 12, 1]


def test_views_are_added_the_rarer_the_class_the_more(rare):
    views = [
        replace(rare.train.inputs, values=(rare.train.inputs.values[0] + 100 * (i + 1), rare.train.inputs.values[1]))
        for i in range(3)
    ]
    made = treated(replace(rare, treatment="augment", views=views))
    birds, cats, dogs = counts(made)
    assert (birds, dogs) == (40, 16)  # of dogs, every view there is
    assert 12 + 12 + 12 <= cats <= 48
    of_views = made.inputs.values[0][56:, 0]
    assert (of_views > 50).all()


def test_numbers_and_labels_are_left_as_they_are():
    for task in ("labels", "number"):
        problem = replace(world(task).problem, treatment="smote")
        assert treated(problem) is problem.train


def test_the_loss_weighs_classes_as_asked(rare):
    logits = torch.zeros(3, 3)
    logits[:, 0] = 1.0
    right = right_tensor(rare.target, np.array([0, 1, 2]), "cpu")
    plain = torch.nn.functional.cross_entropy(logits, right, reduction="none")
    none = loss_function(replace(rare, treatment="none"), rare.train)(logits, right)
    assert float(none) == pytest.approx(float(plain.mean()))
    weights = torch.tensor(class_weights(rare.train.right, 3), dtype=torch.float32)
    weighted = loss_function(rare, rare.train)(logits, right)
    assert float(weighted) == pytest.approx(float((plain * weights).sum() / weights.sum()), rel=1e-5)


# ---- modalities that learn at different speeds, and that are missing -------------------------------------------------


def test_modality_dropout_never_takes_the_last_one():
    torch.manual_seed(0)
    present = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]).repeat(500, 1)
    shown = dropped(present, 0.4)
    assert (shown <= present).all()
    assert torch.equal(shown[1::3], present[1::3])
    both = shown[::3].sum(1)
    assert (both >= 1).all()
    assert 0.35 < float((both == 1).float().mean()) < 0.62  # 2 · 0.4 · 0.6 = 0.48, and 0.16 would be left with none
    assert dropped(present, 0.0) is present


def test_the_modality_that_is_ahead_is_slowed_down():
    torch.manual_seed(0)
    network = FusionNet([3, 3], 2, "concat", hidden=4)
    balance = OGM(network, alpha=0.5)
    alone = torch.tensor([[[4.0, 0.0], [0.0, 0.0]], [[0.0, 4.0], [0.0, 0.0]]])  # the first one knows, the second not
    balance.look(alone, torch.tensor([0, 1]), torch.ones(2, 2))
    sure = math.exp(4) / (math.exp(4) + 1)
    assert balance.slower.tolist() == pytest.approx([1 - math.tanh(0.5 * sure / 0.5), 1])
    for tower in network.towers:
        for weight in tower.parameters():
            weight.grad = torch.full_like(weight, 2.0)  # no spread: no noise
    balance.slow_down()
    np.testing.assert_allclose(network.towers[0].weight.grad, 2 * balance.slower[0], rtol=1e-5)
    np.testing.assert_array_equal(network.towers[1].weight.grad, 2)


def test_balanced_training_is_another_one_and_learns_too():
    from retrieval.heads.scores import score
    from retrieval.heads.variants import FUSED

    problem = world("class").problem
    plain = FUSED["gmu"].fit(problem).predict(problem.val.inputs)
    other = FUSED["gmu"].fit(replace(problem, balance="ogm-ge")).predict(problem.val.inputs)
    assert not np.array_equal(plain, other)
    assert score(problem.target, problem.val.right, other)["macro_f1"] > 0.9
