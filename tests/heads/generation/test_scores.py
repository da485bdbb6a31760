from __future__ import annotations

import numpy as np
import pytest

from indexes.vectors import as_vectors
from retrieval.errors import DataError

pytest.importorskip("sklearn")
scipy_linalg = pytest.importorskip("scipy.linalg")

from retrieval.heads.generation.scores import (  # noqa: E402
    area_under_curve,
    coverage,
    frechet_distance,
    mean_distance,
)


def test_frechet_distance_is_that_of_its_formula():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(50, 6)), random.normal(size=(40, 6)) @ random.normal(size=(6, 6)) + 1
    one, other = np.cov(a.T), np.cov(b.T)
    root = scipy_linalg.sqrtm(one @ other).real
    slow = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + other - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(slow, rel=1e-8)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(a, a + 2) == pytest.approx(4 * 6)
    few = random.normal(size=(4, 6))  # fewer rows than numbers: a covariance without full rank
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    with pytest.raises(DataError, match="at least 2 rows"):
        frechet_distance(a[:1], b)


def test_mean_distance_is_that_of_every_pair():
    rows = as_vectors(np.random.default_rng(1).normal(size=(7, 5)))
    slow = np.mean([1 - rows[i] @ rows[j] for i in range(7) for j in range(7) if i != j])
    assert mean_distance(rows) == pytest.approx(slow, abs=1e-6)
    assert mean_distance(rows[[0, 0, 0]]) == pytest.approx(0, abs=1e-6)
    assert np.isnan(mean_distance(rows[:1]))


def test_coverage_counts_real_rows_that_something_was_made_near():
    random = np.random.default_rng(2)
    real, made = (as_vectors(random.normal(size=(count, 4))) for count in (20, 8))
    slow = 0
    for i in range(20):
        near = sorted((float(real[i] @ real[j]) for j in range(20) if j != i), reverse=True)[2]
        slow += any(float(real[i] @ one) >= near for one in made)
    assert coverage(real, made, k=3) == pytest.approx(slow / 20)
    assert coverage(real, real) == 1
    assert coverage(real, real[[0] * 20], 3) < 0.5  # all at one place
    with pytest.raises(DataError, match="more than 5"):
        coverage(real[:5], made)


def test_area_under_curve_is_the_share_of_pairs():
    odd, ordinary = np.array([3.0, 1.0, 2.0]), np.array([0.0, 2.0, 1.5, 1.0])
    slow = np.mean([(a > b) + (a == b) / 2 for a in odd for b in ordinary])
    assert area_under_curve(odd, ordinary) == pytest.approx(slow)
