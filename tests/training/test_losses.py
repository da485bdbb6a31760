"""InfoNCE against a loop over pairs, closed forms and numerical gradients."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from retrieval.training.losses import info_nce  # noqa: E402 - torch first


def unit(rows: int, dim: int, seed: int, requires_grad: bool = False):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.nn.functional.normalize(torch.randn(rows, dim, dtype=torch.float64, generator=generator), dim=1)
    return vectors.requires_grad_(requires_grad)


def scalar(value: float, requires_grad: bool = False):
    return torch.tensor(value, dtype=torch.float64, requires_grad=requires_grad)


def slow_info_nce(images, texts, scale, owner=None) -> float:
    """Number by number, as the paper's figure 3 says it; pairs of one owner are left out of each other's sums."""
    n = len(images)
    owner = list(range(n)) if owner is None else owner
    total = 0.0
    for queries, answers in ((images, texts), (texts, images)):
        for i in range(n):
            others = [j for j in range(n) if j == i or owner[j] != owner[i]]
            score = {j: scale * sum(a * b for a, b in zip(queries[i], answers[j], strict=True)) for j in others}
            total += math.log(sum(math.exp(value) for value in score.values())) - score[i]
    return total / (2 * n)


@pytest.mark.parametrize("owner", [None, [0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 1, 2], [-7, 3, -7, 3, 5, 5], [9] * 6])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_equals_a_loop(owner, scale):
    images, texts = unit(6, 4, seed=1), unit(6, 4, seed=2)
    loss = info_nce(images, texts, scalar(scale), None if owner is None else torch.tensor(owner))
    assert float(loss) == pytest.approx(slow_info_nce(images.tolist(), texts.tolist(), scale, owner), rel=1e-12)


def test_pairs_that_agree_and_are_orthogonal_to_all_others():
    """Each row's softmax is over one score of s and n - 1 of 0: the loss is log(1 + (n - 1) exp(-s))."""
    for n, scale in ((2, 0.0), (5, 3.0), (8, 20.0)):
        rows = torch.eye(n, dtype=torch.float64)
        expected = math.log1p((n - 1) * math.exp(-scale))
        assert float(info_nce(rows, rows, scalar(scale))) == pytest.approx(expected, rel=1e-9)


def test_encoders_that_know_nothing_lose_log_n():
    same = torch.ones(7, 1, dtype=torch.float64)
    assert float(info_nce(same, same, scalar(30.0))) == pytest.approx(math.log(7))


def test_rows_of_one_owner_are_no_negatives_of_each_other():
    """Two owners of two rows each, all four orthogonal: three scores are left in a row's sum, its own and two of 0."""
    rows = torch.eye(4, dtype=torch.float64)
    loss = info_nce(rows, rows, scalar(2.0), torch.tensor([5, 5, 8, 8]))
    assert float(loss) == pytest.approx(math.log1p(2 * math.exp(-2.0)))
    # Two captions of one photo: with the same vectors they would be each other's hardest negatives.
    twins = rows[[0, 0, 1, 1]]
    assert float(info_nce(twins, twins, scalar(2.0))) == pytest.approx(math.log(2 + 2 * math.exp(-2.0)))
    owned = info_nce(twins, twins, scalar(2.0), torch.tensor([0, 0, 1, 1]))
    assert float(owned) == pytest.approx(math.log1p(2 * math.exp(-2.0)))
    assert float(info_nce(twins, twins, scalar(2.0), torch.tensor([3, 3, 3, 3]))) == 0.0


def test_both_directions_count_alike():
    images, texts = unit(5, 3, seed=3), unit(5, 3, seed=4)
    owner = torch.tensor([0, 1, 1, 2, 3])
    one, other = (info_nce(a, b, scalar(9.0), owner) for a, b in ((images, texts), (texts, images)))
    assert float(one) == pytest.approx(float(other), rel=1e-12)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert float(info_nce(images[order], texts[order], scalar(9.0), owner[order])) == pytest.approx(float(one))


@pytest.mark.parametrize("owner", [None, [0, 0, 1, 2, 2], [4] * 5])
def test_gradients(owner):
    images, texts, scale = unit(5, 3, 5, True), unit(5, 3, 6, True), scalar(4.0, True)
    owners = None if owner is None else torch.tensor(owner)
    assert torch.autograd.gradcheck(lambda i, t, s: info_nce(i, t, s, owners), (images, texts, scale))
