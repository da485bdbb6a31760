"""Who is drawn how often: shares of sources, and balance of what their pictures show."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402 - torch first

from retrieval.errors import DataError  # noqa: E402
from retrieval.pairs import Record  # noqa: E402
from retrieval.training import config as recipes  # noqa: E402
from retrieval.training import loop  # noqa: E402
from retrieval.training.data import Pairs, Sampler  # noqa: E402
from retrieval.training.losses import info_nce  # noqa: E402
from retrieval.training.sampling import Balance, balance_by, batches_of_sources  # noqa: E402
from tests.training.drawings import weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def planned(sources, **settings):
    """The batches of a run over sources given as (pictures, repeat, weight, balance)."""
    pairs = [
        Pairs([torch.zeros(n, 1)], torch.zeros(n, 1), np.arange(n + 1), repeat, None, weight=weight, balance=balance)
        for n, repeat, weight, balance in sources
    ]
    config = recipes.with_changes(recipes.config_for([Path("x")], "builtin"), settings)
    return pairs, Sampler(config, SimpleNamespace(sources=pairs, vocabulary=None))


def counted(pairs, plan):
    return [sum(source is one for source, _ in plan) for one in pairs]


# ---- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passes", "weights", "expected"),
    [
        ([6, 5], [0, 0], [6, 5]),
        ([70, 5], [0, 0.3], [70, 30]),  # 30 of 100
        ([70, 500], [0, 0.3], [70, 30]),  # whatever it has itself
        ([10, 10, 60, 3], [0, 0, 0.5, 0.1], [10, 10, 25, 5]),
        ([90, 10], [0.5, 0.5], [50, 50]),
        ([90, 10], [0.2, 0.2], [50, 50]),  # against each other
        ([7, 100], [0, 0.001], [7, 1]),  # never none
    ],
)
def test_shares_of_the_batches(passes, weights, expected):
    assert batches_of_sources(passes, weights) == expected


def test_a_weight_is_the_share_of_the_batches_and_all_pictures_take_their_turn():
    pairs, run = planned([(400, 1, 0.0, None), (400, 1, 0.2, None)], epochs=4, batch_size=20)
    assert counted(pairs, run.plan) == [80, 20]
    assert [counted(pairs, run.plan[25 * epoch :][:25]) for epoch in range(4)] == [[20, 5]] * 4
    seen = np.bincount(np.concatenate([rows for source, rows in run.plan if source is pairs[1]]), minlength=400)
    assert seen.tolist() == [1] * 400  # the pass is gone on with by the next epoch, not begun again
    pairs, run = planned([(400, 1, 0.0, None), (40, 1, 0.5, None)], epochs=1, batch_size=20)
    assert counted(pairs, run.plan) == [20, 20]
    seen = np.bincount(np.concatenate([rows for source, rows in run.plan if source is pairs[1]]), minlength=40)
    assert seen.tolist() == [10] * 40  # a small one comes again


def test_without_weights_the_plan_is_what_it_was():
    """Drawn by the plain way: a permutation for each pass, then the batches of the epoch in random order."""
    pairs, run = planned([(45, 2, 0.0, None), (30, 1, 0.0, None)], epochs=2, batch_size=20, seed=3)
    random, plan = np.random.default_rng(3), []
    for _ in range(2):
        epoch = []
        for source, n in zip(pairs, (45, 30), strict=True):
            for _ in range(source.repeat):
                rows = random.permutation(n)
                epoch += [(source, rows[:20]), (source, rows[20:40])]  # 5 are too few
        random.shuffle(epoch)
        plan += epoch
    assert [(id(source), rows.tolist()) for source, rows in run.plan] == [(id(s), rows.tolist()) for s, rows in plan]


# ---- balance ---------------------------------------------------------------------------------------------------------

GROUPS = [np.arange(900), np.arange(900, 990), np.arange(990, 1000)]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_an_epoch_draws_as_often_as_the_power_says(power):
    _, run = planned([(1000, 1, 0.0, Balance(GROUPS, power))], epochs=30, batch_size=100)
    assert len(run) == 300  # an epoch is as long as without
    for epoch in range(30):
        rows = np.concatenate([rows for _, rows in run.plan[10 * epoch :][:10]])
        counts = np.array([np.isin(rows, group).sum() for group in GROUPS])
        share = np.array([900, 90, 10]) ** power
        assert np.abs(counts - 1000 * share / share.sum()).max() < 1
        for group in GROUPS:  # of one group, each as often as any other, but for one
            often = np.bincount(rows, minlength=1000)[group]
            assert often.max() - often.min() <= 1
    seen = np.bincount(np.concatenate([rows for _, rows in run.plan]), minlength=1000)
    assert seen.min() >= 1  # over the epochs, every picture has its turn


def test_a_share_of_less_than_one_picture_is_kept_in_expectation():
    """A fifth of a picture an epoch is one in five epochs."""
    groups = [np.arange(98), np.array([98]), np.array([99])]
    random = np.random.default_rng(0)
    drawn = np.concatenate([Balance(groups, 1.0).draw(20, random) for _ in range(2000)])
    assert len(drawn) == 40_000
    assert [np.isin(drawn, group).mean() for group in groups] == pytest.approx([0.98, 0.01, 0.01], abs=0.002)


def test_groups_are_the_values_of_a_column():
    records = [
        Record(Path(f"{row}.png"), ("said",), labels, None, columns)
        for row, (labels, columns) in enumerate(
            [(("a",), {"year": 1}), (("b", "a"), {"year": 2}), ((), {"year": 1}), (("b",), {}), (("c",), {"year": ""})]
        )
    ]

    def groups(column):
        return [rows.tolist() for rows in balance_by(records, column, 0.0).groups]

    assert groups("label") == [[2], [0, 1], [1, 3], [4]]  # without a label; then a, b, c
    assert groups("year") == [[3, 4], [0, 2], [1]]
    with pytest.raises(DataError, match="nothing to balance by in 'yaer': columns are label, year"):
        groups("yaer")


def test_what_is_rare_is_found_as_often_as_what_is_not():
    """Points around four means, 600 of one and 20 of each other, with their class as a text: how many new points of
    each class lie nearest to its text, learnt in batches drawn either way.
    """
    random = np.random.default_rng(0)
    means = random.normal(size=(4, 16)) / 2

    def points(counts):
        classes = np.repeat(np.arange(4), counts)
        return torch.from_numpy(means[classes] + 1.2 * random.normal(size=(len(classes), 16))).float(), classes

    pictures, classes = points([600, 20, 20, 20])
    asked, right = points([500] * 4)
    texts = torch.eye(4)[torch.from_numpy(classes)]
    hits = {}
    for how, balance in (
        ("chance", None),
        ("balance", Balance([np.flatnonzero(classes == number) for number in range(4)], 0.0)),
    ):
        torch.manual_seed(0)
        image, text = torch.nn.Linear(16, 8), torch.nn.Linear(4, 8)
        source = Pairs([pictures], texts, np.arange(len(texts) + 1), 1, None, balance=balance, classes=classes)
        config = replace(recipes.config_for([Path("x")], ""), epochs=15, batch_size=32)
        optimizer = torch.optim.Adam([*image.parameters(), *text.parameters()], 1e-2)
        for batch in Sampler(config, SimpleNamespace(sources=[source], vocabulary=None, nouns=None)).batches(0):
            images, said = (F.normalize(side, dim=1) for side in (image(batch.pictures), text(batch.sentences)))
            loss = info_nce(images[batch.shown], said, 10.0, batch.owner)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            found = (image(asked) @ F.normalize(text(torch.eye(4)), dim=1).T).argmax(1).numpy()
        hits[how] = np.array([(found == right)[right == number].mean() for number in range(4)])
    assert hits["balance"].min() > hits["chance"].min() + 0.2


@pytest.fixture
def labelled(world, quick, tmp_path):
    """The drawings by their label alone, 14 of red circles and a few of two others."""
    rows = [
        {"image": str(world.pairs.parent / line["image"]), "label": line["captions"][0]}
        for line in world.captions
        if line["captions"][0] in ("a red circle", "a red cross", "a blue circle")
    ]
    (tmp_path / "labelled.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "labelled.jsonl"


def test_seeds_and_resuming(labelled, world, tmp_path, ended_after):
    config = replace(
        recipes.config_for([labelled], "builtin"),
        sources=(
            recipes.Source(str(labelled), balance="label", balance_power=0.3, weight=0.4),
            recipes.Source(str(world.pairs), "train"),
        ),
        batch_size=8,
        epochs=2,
        checkpoint_seconds=0.0,
    )
    loop.train(config, tmp_path / "whole")
    loop.train(replace(config, seed=1), tmp_path / "other")
    ended_after(4)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path / "ended")
    loop.resume(tmp_path / "ended")
    assert weights(tmp_path / "ended") == weights(tmp_path / "whole")
    assert weights(tmp_path / "other") != weights(tmp_path / "whole")
    with pytest.raises(DataError, match=r"nothing to balance by in 'colour': columns are label"):
        loop.train(replace(config, sources=(recipes.Source(str(labelled), balance="colour"),)), tmp_path / "none")
