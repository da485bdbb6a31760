"""Hard negatives that are looked for again, by the model as it is by then; and a run that ends in between."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from retrieval.training import config as recipes  # noqa: E402
from retrieval.training import loop  # noqa: E402
from retrieval.training.data import Sampler  # noqa: E402
from retrieval.training.mining import hard_batches, mine  # noqa: E402
from tests.training.drawings import weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(world):
    return replace(
        recipes.config_for([world.pairs], "builtin"),
        epochs=5,
        batch_size=10,
        hard_group=5,
        mine_every=2,
        learning_rate=1e-2,
        checkpoint_seconds=0.0,
    )


@pytest.fixture
def looked(monkeypatch):
    """The steps at which negatives were looked for, and the vectors of the first source then."""
    looked = []
    find = loop._Run._mined

    def look(run):
        with torch.inference_mode():
            run.model.eval()
            looked.append((run.step, *(side.numpy() for side in run._vectors(run.data.sources[0]))))
        return find(run)

    monkeypatch.setattr(loop._Run, "_mined", look)
    return looked


@pytest.fixture
def samplers(monkeypatch):
    kept = []
    plan = Sampler._plan
    monkeypatch.setattr(Sampler, "_plan", lambda sampler: kept.append(sampler) or plan(sampler))
    return kept


def test_the_plan_is_of_the_model_as_it_is(config, quick, tmp_path, looked, samplers):
    loop.train(config, tmp_path / "run")
    assert [step for step, *_ in looked] == [0, 8, 16]  # 40 pictures are four batches an epoch
    (run,) = samplers
    owner = run.data.sources[0].owner
    for number, (step, pictures, texts) in enumerate(looked):
        negatives = mine(pictures, texts, owner, 5, ceiling=loop._SAME)
        random = np.random.default_rng([config.seed, 2 * number] if number else config.seed)
        for epoch in range(step, min(step + 8, 20), 4):
            batches = hard_batches(negatives, 10, group=5, seed=int(random.integers(2**32)))
            random.shuffle(batches)
            assert [rows.tolist() for rows in batches] == [rows.tolist() for _, rows in run.plan[epoch : epoch + 4]]
    assert not np.allclose(looked[0][1], looked[1][1], atol=1e-3)  # it was another model


def test_without_it_negatives_are_looked_for_once(config, quick, tmp_path, looked, samplers):
    loop.train(config, tmp_path / "again")
    loop.train(replace(config, mine_every=0), tmp_path / "once")
    assert [step for step, *_ in looked] == [0, 8, 16, 0]
    plans = [[rows.tolist() for _, rows in sampler.plan] for sampler in samplers]
    assert plans[0][:8] == plans[1][:8]
    assert plans[0][8:] != plans[1][8:]


@pytest.mark.parametrize("steps", [(3, 8), (9, 15), (16, 19)])
def test_ended_before_at_or_after_a_look_it_goes_on_bit_for_bit(config, quick, tmp_path, ended_after, steps):
    loop.train(config, tmp_path / "whole")
    ended_after(*steps)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path / "ended")
    with pytest.raises(KeyboardInterrupt):
        loop.resume(tmp_path / "ended")
    loop.resume(tmp_path / "ended")
    assert weights(tmp_path / "ended") == weights(tmp_path / "whole")
    assert (tmp_path / "ended" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()
