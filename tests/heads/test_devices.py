"""The heads on a GPU: what is learnt there overfits as it does on a CPU, and says the same when it is loaded on one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from retrieval.heads.model import load_fitted
from retrieval.heads.scores import score
from retrieval.heads.variants import ALONE, FUSED
from tests.cli.commands import diptych, result
from tests.heads.generation.materials import collection
from tests.heads.generation.test_generators import TINY
from tests.heads.problems import torch, with_alone, world  # skips without scikit-learn and torch
from tests.heads.test_classify import drawn, written
from tests.heads.towers import write_bundle

from retrieval.heads.generation import storage  # isort: skip
from retrieval.heads.generation.fitting import KINDS, fit, settings_of  # isort: skip

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NEAR = 2e-3  # convolutions and matrix products of a GPU round to fewer bits


@pytest.mark.parametrize("name", [*ALONE, *FUSED])
def test_classifiers(name):
    problem = replace(with_alone(world("class").problem), device="cuda")
    inputs = problem.train.inputs
    model = {**ALONE, **FUSED}[name].fit(problem)
    outputs = model.predict(inputs)
    assert score(problem.target, problem.train.right, outputs)["macro_f1"] > 0.85
    again = load_fitted(problem.target, model.settings(), model.arrays())
    np.testing.assert_allclose(again.predict(inputs), outputs, atol=NEAR)


@pytest.mark.parametrize("kind", KINDS)
def test_generators(kind, tmp_path):
    material = collection()
    made = fit(material, kind, settings_of(kind, TINY[kind]), tmp_path / kind, device="cuda")
    given = {"image": material.images, "text": material.texts}[made.source]
    outputs = made.generate(given, seed=3)
    for device in ("cpu", "cuda"):
        loaded = storage.load(tmp_path / kind, device)
        np.testing.assert_allclose(loaded.generate(given, seed=3), outputs, atol=NEAR)


def test_the_command_with_pixels_and_fine_tuning(tmp_path):
    spec = write_bundle("classic", tmp_path / "towers").path
    file = written(tmp_path, drawn(tmp_path))
    out = tmp_path / "out"
    options = ("--variants", "early-mlp,gmu,graph", "--bootstrap", "50", "--no-study", "--finetune", "--model", spec)
    printed = result(diptych("classify", "fit", file, "--out", out, "--json", "--device", "cuda", *options))
    assert printed["models"][printed["chosen"]]["accuracy"]["value"] > 0.9
    assert len(result(diptych("classify", "predict", out, file, "--json"))) == 60
