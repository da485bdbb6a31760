"""Every variant does what every variant has to do: one test for all of them, for each task."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from retrieval.heads.modalities import Column
from retrieval.heads.model import FusionClassifier, load_fitted
from retrieval.heads.problem import Problem
from retrieval.heads.scores import score
from retrieval.heads.variants import ALONE, FUSED
from tests.heads.problems import TARGETS, WIDTHS, torch, with_alone, world  # skips without scikit-learn and torch

PULSE = Column("pulse", "number", 1)
VARIANTS = {**{f"alone-{name}": spec for name, spec in ALONE.items()}, **FUSED}


def check_outputs(target, outputs, rows):
    assert outputs.shape == (rows, target.outputs)
    assert outputs.dtype == np.float64
    assert np.isfinite(outputs).all()
    if target.task == "class":
        np.testing.assert_allclose(outputs.sum(1), 1, atol=1e-6)
    if target.task != "number":
        assert ((outputs >= 0) & (outputs <= 1)).all()


@pytest.mark.parametrize("task", TARGETS)
@pytest.mark.parametrize("name", VARIANTS)
def test_conformance(name, task, tmp_path):
    small = world(task)
    problem: Problem = with_alone(small.problem)
    target, inputs = problem.target, problem.train.inputs
    torch_random = torch.get_rng_state()
    model = VARIANTS[name].fit(problem)
    assert bool((torch.get_rng_state() == torch_random).all())  # it leaves others' random numbers alone
    outputs = model.predict(inputs)
    check_outputs(target, outputs, len(inputs))

    # It overfits a tiny set.
    measured = score(target, problem.train.right, outputs)
    assert measured["r2" if task == "number" else "macro_f1"] > 0.85, measured

    # The same problem gives the same model.
    np.testing.assert_array_equal(VARIANTS[name].fit(problem).predict(inputs), outputs)

    # A row's answer does not depend on the rows beside it.
    np.testing.assert_allclose(model.predict(inputs.take(np.array([3]))), outputs[3:4], atol=1e-6)

    # Any modality may be missing, or all of them; the answer changes with what is told apart by.
    for missing in WIDTHS:
        less = inputs.without(missing)
        check_outputs(target, model.predict(less), len(less))
    nothing = inputs.without("image").without("text").without("pulse")
    check_outputs(target, model.predict(nothing), len(nothing))
    assert (np.ptp(model.predict(nothing), axis=0) < 1e-9).all()
    assert np.abs(model.predict(inputs.without("image").without("text")) - outputs).max() > 0.02

    # Attention, where there is any, is shares of what is there.
    looked = model.attention(inputs.without("pulse"))
    if looked is not None:
        assert looked.shape == (len(inputs), 3)
        np.testing.assert_allclose(looked.sum(1), 1, atol=1e-5)
        assert (np.abs(looked[:, 2]) < 1e-6).all()

    # Saved and loaded, it says the same; what is saved is arrays and JSON.
    settings = json.loads(json.dumps(model.settings()))
    again = load_fitted(target, settings, model.arrays())
    np.testing.assert_array_equal(again.predict(inputs), outputs)
    classifier = FusionClassifier("f" * 64, "builtin", name, target, inputs.names, (PULSE,), small.scaling, model)
    classifier.save(tmp_path / "model")
    loaded = FusionClassifier.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict(small.tables), outputs)
    assert (loaded.variant, loaded.target, loaded.modalities) == (name, target, inputs.names)


@pytest.mark.parametrize("name", FUSED)
def test_joined_they_know_more_than_each_alone(name):
    """What is right shows in two modalities, with noise of their own; of rows that were not learnt from."""
    problem = with_alone(world("class", 400, noise=7.0, same=False).problem.only("image", "text"))

    def measured(model, inputs):
        return score(problem.target, problem.val.right, model.predict(inputs))["macro_f1"]

    val = problem.val.inputs
    alone = max(measured(problem.alone[one], val.only(one)) for one in ("image", "text"))
    assert alone < 0.9
    assert measured(FUSED[name].fit(problem), val) > alone + 0.01


@pytest.mark.parametrize("name", [n for n in VARIANTS if n not in ("late-vote", "late-average", "late-stacking")])
def test_two_classes_and_one_modality(name):
    small = world("class").problem
    rows = np.flatnonzero(small.train.right < 2)
    target = replace(small.target, names=("bird", "cat"))
    part = small.train.take(rows).only("text")
    model = VARIANTS[name].fit(replace(small, target=target, train=part, val=part))
    outputs = model.predict(part.inputs)
    check_outputs(target, outputs, len(rows))
    assert score(target, part.right, outputs)["accuracy"] == 1
