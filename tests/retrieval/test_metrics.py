"""Measures and intervals: cases worked by hand, slow computations of the same, and what must hold of any data."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexes.errors import VectorError
from retrieval import metrics
from retrieval.metrics import (
    Scores,
    average_precision,
    difference,
    evaluate_classification,
    evaluate_retrieval,
    hit_at_k,
    measure,
    ndcg_at_k,
    per_query,
    r_precision,
    recall_at_k,
    reciprocal_rank,
)
from retrieval.ranks import Ranking, Ranks, rank_pairs
from tests.retrieval.test_ranks import CAPTIONS, IMAGES, TIES, data, listed, slow_ranks

KS = (1, 2, 5, 10)


def ranks_of(*places):
    """A Ranks of queries 0, 1, …, each of an image of its own, from the places of their right items."""
    first = np.cumsum([0, *map(len, places)])
    rows = np.arange(len(places))
    return Ranks(rows, rows, first, np.array([place for some in places for place in some], float))


# ---- the oracle ------------------------------------------------------------------------------------------------------


def slow_values(places, k):
    """Every measure of one query with its right items at these places."""
    count, first = len(places), min(places)
    return {
        f"hit@{k}": 1.0 if first <= k else 0.0,
        f"recall@{k}": len([p for p in places if p <= k]) / count,
        f"ndcg@{k}": sum(1 / math.log2(1 + p) for p in places if p <= k)
        / sum(1 / math.log2(1 + p) for p in range(1, min(count, k) + 1)),
        "r_precision": len([p for p in places if p <= count]) / count,
        "map": sum(i / p for i, p in enumerate(sorted(places), 1)) / count,
        "mrr": 1 / first,
        "mean_rank": first,
    }


def slow_measures(t2i, i2t, ks):
    """Every measure of two lists of queries, each a list of places."""
    result = {}
    for way, queries in (("t2i", t2i), ("i2t", i2t)):
        for k in ks:
            for name in slow_values([1], k) if queries else ():
                result[f"{way}_{name}"] = statistics.fmean(slow_values(places, k)[name] for places in queries)
        if queries:
            result[f"{way}_median_rank"] = statistics.median(min(places) for places in queries)
    if t2i and i2t:
        hits = [statistics.fmean(min(places) <= k for places in queries) for queries in (t2i, i2t) for k in (1, 5, 10)]
        result["rsum"] = sum(hits)
    return result


def close(one, other):
    assert dict(one).keys() == dict(other).keys()
    for name, value in other.items():
        assert one[name] == pytest.approx(value, abs=1e-12, rel=1e-12), name


@settings(max_examples=120, deadline=None)
@given(data(most=16), st.sampled_from(TIES))
def test_every_measure_equals_the_oracle(case, ties):
    t2i, i2t = slow_ranks(*case, ties)
    close(measure(rank_pairs(*case, ties), KS), slow_measures(list(t2i.values()), list(i2t.values()), KS))


@settings(max_examples=30, deadline=None)
@given(data(most=16), st.sampled_from(TIES), st.integers(0, 100))
def test_every_measure_of_a_slice_equals_the_oracle(case, ties, seed):
    random = np.random.default_rng(seed)
    images, texts = random.random(len(case[0])) < 0.4, random.random(len(case[1])) < 0.4
    t2i, i2t = slow_ranks(*case, ties)
    some = [[p for row, p in all_.items() if kept[row]] for all_, kept in ((t2i, texts), (i2t, images))]
    close(measure(rank_pairs(*case, ties).select(texts, images), KS), slow_measures(*some, KS))


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_each_measure_by_hand():
    """The first query has one right item, second; the second query has three, at 1, 3 and 12."""
    ranks = ranks_of([2], [1, 3, 12])
    assert [hit_at_k(ranks, k).tolist() for k in (1, 2)] == [[0, 1], [1, 1]]
    assert [recall_at_k(ranks, k).tolist() for k in (1, 3, 12)] == [[0, 1 / 3], [1, 2 / 3], [1, 1]]
    assert r_precision(ranks).tolist() == [0, 2 / 3]
    assert average_precision(ranks) == pytest.approx([1 / 2, (1 + 2 / 3 + 3 / 12) / 3])
    assert reciprocal_rank(ranks).tolist() == [1 / 2, 1]
    assert ndcg_at_k(ranks, 1).tolist() == [0, 1]
    gains, most = 1 + 1 / math.log2(4), 1 + 1 / math.log2(3) + 1 / math.log2(4)
    assert ndcg_at_k(ranks, 10) == pytest.approx([1 / math.log2(3), gains / most])
    assert ndcg_at_k(ranks, 2) == pytest.approx([1 / math.log2(3), 1 / (1 + 1 / math.log2(3))])
    assert per_query(ranks, (1,))["mean_rank"].tolist() == [2, 1]


def test_retrieval_by_hand():
    """See test_ranks: texts 0 and 1 belong to image 0 (ranks 1, 3), text 2 to image 1 (rank 1); image 1's text 2 is
    tied with text 1."""
    scores = evaluate_retrieval(IMAGES, CAPTIONS, [0, 0, 1], ks=(1, 2))
    assert dict(scores) == {
        "t2i_hit@1": pytest.approx(2 / 3),
        "t2i_hit@2": pytest.approx(2 / 3),
        "t2i_recall@1": pytest.approx(2 / 3),
        "t2i_recall@2": pytest.approx(2 / 3),
        "t2i_ndcg@1": pytest.approx(2 / 3),
        "t2i_ndcg@2": pytest.approx(2 / 3),
        "t2i_r_precision": pytest.approx(2 / 3),
        "t2i_map": pytest.approx((1 + 1 / 3 + 1) / 3),
        "t2i_mrr": pytest.approx((1 + 1 / 3 + 1) / 3),
        "t2i_mean_rank": pytest.approx(5 / 3),
        "t2i_median_rank": 1.0,
        "i2t_hit@1": 0.5,
        "i2t_hit@2": 1.0,
        "i2t_recall@1": 0.25,
        "i2t_recall@2": 0.75,
        "i2t_ndcg@1": 0.5,
        "i2t_ndcg@2": pytest.approx((1 / (1 + 1 / math.log2(3)) + 1 / math.log2(3)) / 2),
        "i2t_r_precision": 0.25,
        "i2t_map": pytest.approx(((1 + 2 / 3) / 2 + 1 / 2) / 2),
        "i2t_mrr": 0.75,
        "i2t_mean_rank": 1.5,
        "i2t_median_rank": 1.5,
        "rsum": pytest.approx(2 / 3 + 1 + 1 + 0.5 + 1 + 1),
    }
    assert (scores.units.tolist(), scores.drawn, scores.intervals) == ([0, 1], {}, {})
    mean = evaluate_retrieval(IMAGES, CAPTIONS, [0, 0, 1], ks=(1, 2), ties="mean")
    assert (mean["i2t_mean_rank"], mean["i2t_mrr"]) == (1.25, pytest.approx((1 + 1 / 1.5) / 2))
    assert mean["i2t_hit@1"] == 0.5  # a rank of 1.5 is not among the first


def test_a_model_that_says_the_same_of_everything_finds_nothing():
    same = np.ones((50, 8))
    scores = evaluate_retrieval(same, same, np.arange(50))
    assert (scores["rsum"], scores["t2i_median_rank"], scores["t2i_mrr"]) == (0, 50, 1 / 50)
    assert evaluate_retrieval(same, same, np.arange(50), ties="mean")["t2i_mean_rank"] == 25.5


def test_a_k_beyond_the_corpus_finds_all():
    scores = evaluate_retrieval(np.ones((3, 2)), np.ones((4, 2)), [0, 0, 1, 1], ks=(4, 1000))
    assert [scores[f"{way}_{name}@{k}"] for way in ("t2i", "i2t") for name in ("hit", "recall") for k in (4, 1000)] == [
        1
    ] * 8


# ---- what holds of any data ------------------------------------------------------------------------------------------


def owned(seed, images=40, dim=6, noise=1.0, extra=60):
    """Vectors of which every image owns one text or more."""
    random = np.random.default_rng(seed)
    left = random.normal(size=(images, dim))
    owner = np.concatenate([np.arange(images), random.integers(0, images, extra)])
    return left, left[owner] + noise * random.normal(size=(len(owner), dim)), owner


@settings(max_examples=40, deadline=None)
@given(data(most=12), st.sampled_from(TIES), st.integers(0, 100))
def test_permuting_the_corpus_changes_nothing(case, ties, seed):
    images, texts, rows, columns = case
    random = np.random.default_rng(seed)
    new_rows, new_columns = random.permutation(len(images)), random.permutation(len(texts))
    moved = images[np.argsort(new_rows)], texts[np.argsort(new_columns)], new_rows[rows], new_columns[columns]
    assert dict(measure(rank_pairs(*case, ties))) == dict(measure(rank_pairs(*moved, ties)))


@settings(max_examples=60, deadline=None)
@given(data(most=12), st.sampled_from(TIES), st.integers(0, 100))
def test_a_distractor_only_ever_harms(case, ties, seed):
    images, texts, rows, columns = case
    random = np.random.default_rng(seed)
    more = random.choice([images[random.integers(len(images))], texts[0], random.normal(size=images.shape[1])])
    plain, fuller = rank_pairs(*case, ties), rank_pairs(np.concatenate([images, [more]]), texts, rows, columns, ties)
    assert (fuller.t2i.ranks >= plain.t2i.ranks).all()
    assert np.array_equal(fuller.i2t.ranks, plain.i2t.ranks)
    before, after = (measure(ranking, KS) for ranking in (plain, fuller))
    for name in before:
        assert after[name] >= before[name] if name.endswith("rank") else after[name] <= before[name], name


@settings(max_examples=60, deadline=None)
@given(data(most=12), st.sampled_from(TIES))
def test_more_guesses_find_more(case, ties):
    scores = measure(rank_pairs(*case, ties), range(1, 40))
    for way in ("t2i", "i2t"):
        for name in ("hit", "recall"):
            assert (np.diff([scores[f"{way}_{name}@{k}"] for k in range(1, 40)]) >= 0).all()


@settings(max_examples=60, deadline=None)
@given(data(most=12))
def test_the_mean_rule_is_never_below_the_pessimistic_one(case):
    worse, better = (measure(rank_pairs(*case, ties), KS) for ties in TIES)
    for name in worse:
        assert better[name] <= worse[name] if name.endswith("rank") else better[name] >= worse[name], name


def test_with_one_right_item_hit_and_recall_are_one():
    images, texts, owner = owned(1, extra=0)
    scores = evaluate_retrieval(images, texts, owner)
    for way in ("t2i", "i2t"):
        assert all(scores[f"{way}_hit@{k}"] == scores[f"{way}_recall@{k}"] for k in (1, 5, 10))
        assert scores[f"{way}_map"] == scores[f"{way}_mrr"]
        assert scores[f"{way}_r_precision"] == scores[f"{way}_hit@1"]


# ---- the bootstrap ---------------------------------------------------------------------------------------------------


def literal_draws(ranking, ks, draws):
    """Each draw with its queries written out as often as their image was drawn: {measure: values}."""
    units = sorted({*ranking.t2i.images.tolist(), *ranking.i2t.images.tolist()})
    result = {}
    for weights in np.concatenate(list(metrics.bootstrap_weights(len(units), draws))).astype(int):
        times = dict(zip(units, weights.tolist(), strict=True))
        queries = [
            [
                places
                for image, places in zip(ranks.images.tolist(), listed(ranks).values(), strict=True)
                for _ in range(times[image])
            ]
            for ranks in (ranking.t2i, ranking.i2t)
        ]
        for name, value in slow_measures(*queries, ks).items():
            result.setdefault(name, []).append(value)
    return result


def check_bootstrap(ranking, draws=30, ks=(1, 10)):
    scores, literal = measure(ranking, ks, draws), literal_draws(ranking, ks, draws)
    drawn = {name: values[~np.isnan(values)].tolist() for name, values in scores.drawn.items()}
    close(drawn, {name: literal.get(name, []) for name in drawn})
    assert literal.keys() <= scores.metrics.keys() == scores.drawn.keys()
    return scores


@settings(max_examples=25, deadline=None)
@given(data(most=10), st.sampled_from(TIES))
def test_the_bootstrap_equals_a_literal_one(case, ties):
    check_bootstrap(rank_pairs(*case, ties), draws=8)


def test_the_bootstrap_of_a_larger_case_and_of_a_slice():
    images, texts, owner = owned(2, images=150, extra=400)
    texts[500:], owner[500:] = texts[0], 0  # one image owns many, all equal
    ranking = rank_pairs(np.concatenate([images, images[:20]]), texts, owner, np.arange(550))
    scores = check_bootstrap(ranking)
    assert scores.units.tolist() == list(range(150))
    low, high = scores.intervals["t2i_median_rank"]
    assert low <= scores["t2i_median_rank"] <= high
    random = np.random.default_rng(0)
    check_bootstrap(ranking.select(random.random(550) < 0.1, random.random(170) < 0.3))
    check_bootstrap(ranking.select(np.arange(550) == 7, np.zeros(170, bool)))


def test_a_draw_may_miss_every_query_of_one_way():
    ranking = rank_pairs(np.eye(5), np.eye(5), range(5), range(5))
    scores = check_bootstrap(ranking.select(np.arange(5) < 1, np.arange(5) > 2), draws=40)
    assert 0 < np.isnan(scores.drawn["t2i_hit@1"]).sum() < 40
    assert np.array_equal(np.isnan(scores.drawn["t2i_hit@1"]), np.isnan(scores.drawn["t2i_median_rank"]))
    assert scores.intervals["t2i_hit@1"] == (1, 1)


def test_medians_far_from_the_median(monkeypatch):
    """Half of the ranks are 1 and half are large and all different, one image owns many: the window has to widen."""
    looks, look = [], metrics._Median._look
    monkeypatch.setattr(metrics._Median, "_look", lambda self, reach: (looks.append(reach), look(self, reach))[1])
    owners = np.concatenate([np.zeros(1000, np.int64), np.arange(1, 41)])
    places = np.concatenate([np.arange(2, 1002), np.ones(20), np.arange(5000, 5020)]).astype(float)
    ranks = Ranks(np.arange(1040), owners, np.arange(1041), places)
    few = ranks_of(*([place] for place in [1] * 21 + list(range(100, 120))))
    check_bootstrap(Ranking(ranks, few), draws=30, ks=(1,))
    assert len(looks) > 2


def test_the_same_data_give_the_same_interval():
    case = owned(3)
    one, other = (evaluate_retrieval(*case, bootstrap=230) for _ in range(2))
    assert one.intervals == other.intervals
    assert all(len(values) == 230 for values in one.drawn.values())
    fewer = evaluate_retrieval(*case, bootstrap=30)
    assert all(np.array_equal(fewer.drawn[name], one.drawn[name][:30]) for name in one)


def test_intervals_are_the_middle_95_percent():
    scores = Scores({"x": 0.5}, np.arange(3), {"x": np.arange(1001) / 1000})
    assert scores.intervals == {"x": pytest.approx((0.025, 0.975))}


def test_intervals_cover_the_truth():
    """Images of which each is found or not, with all of its 3 texts: the truth is 0.4, 19 times out of 20."""
    random, covered = np.random.default_rng(8), []
    for _ in range(300):
        found = random.random(120) < 0.4
        texts = Ranks(
            np.arange(360), np.repeat(np.arange(120), 3), np.arange(361), np.where(np.repeat(found, 3), 1.0, 9)
        )
        low, high = measure(Ranking(texts, texts.select(np.zeros(360, bool))), (1,), 200).intervals["t2i_hit@1"]
        covered.append(low <= 0.4 <= high)
    assert 0.9 <= np.mean(covered) <= 0.98


def test_a_paired_difference_is_narrower():
    images, texts, owner = owned(4, images=200, noise=1.5)
    random = np.random.default_rng(4)
    better = texts + 0.3 * (images[owner] - texts)
    one, other = (evaluate_retrieval(images, vectors, owner, bootstrap=400) for vectors in (better, texts))
    paired = difference(one, other)
    for name in ("t2i_hit@5", "t2i_mrr", "i2t_hit@5", "rsum"):
        assert paired[name] == one[name] - other[name]
        assert np.array_equal(paired.drawn[name], one.drawn[name] - other.drawn[name])
        shuffled = one.drawn[name] - random.permutation(other.drawn[name])
        unpaired = np.diff(np.quantile(shuffled, (0.025, 0.975)))[0]
        assert np.diff(paired.intervals[name])[0] < 0.8 * unpaired
        assert paired.intervals[name][0] > 0


def test_differences_of_what_cannot_be_compared():
    images, texts, owner = owned(5)
    one = evaluate_retrieval(images, texts, owner, bootstrap=20)
    for other in (
        evaluate_retrieval(images, texts[:40][::-1], owner[:40][::-1] // 2, bootstrap=20),  # other images
        evaluate_retrieval(images, texts, owner, ks=(1, 5), bootstrap=20),
        evaluate_retrieval(images, texts, owner, bootstrap=1),
        evaluate_retrieval(images, texts, owner),
    ):
        for pair in ((one, other), (other, one)):
            with pytest.raises(ValueError, match="not of the same queries"):
                difference(*pair)
    assert difference(one, one).intervals["rsum"] == (0, 0)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, np.nan, np.inf])
def test_bad_vectors_are_named(value):
    images, texts, owner = owned(6)
    for name, vectors in (("images", images), ("texts", texts)):
        good = vectors[3].copy()
        vectors[3] = value
        with pytest.raises(VectorError, match=f"{name}: 1 of .* row 3$"):
            evaluate_retrieval(images, texts, owner)
        vectors[3] = good


def test_mistakes():
    images, texts, owner = owned(7)
    with pytest.raises(VectorError, match="images have 6 dimensions and texts 5"):
        evaluate_retrieval(images, texts[:, :5], owner)
    with pytest.raises(ValueError, match="owner must name one image row for each of the 100 texts, not have shape"):
        evaluate_retrieval(images, texts, owner[:-1])
    with pytest.raises(ValueError, match="names image 0 or 40, and there are 40"):
        evaluate_retrieval(images, texts, np.append(owner[:-1], 40))
    with pytest.raises(ValueError, match="names image -1 or 39"):
        evaluate_retrieval(images, texts, owner - (owner == 0))
    for ks in ((0,), (1, -5)):
        with pytest.raises(ValueError, match="every k must be at least 1"):
            evaluate_retrieval(images, texts, owner, ks=ks)
        with pytest.raises(ValueError, match="every k must be at least 1"):
            evaluate_classification(np.ones((1, 1)), np.ones((1, 1), bool), ks=ks)
    with pytest.raises(ValueError, match="no text belongs to any image"):
        evaluate_retrieval(images, np.empty((0, 6)), [])


# ---- classification --------------------------------------------------------------------------------------------------


def test_classification_by_hand():
    table = np.array([[0.9, 0.5, 0.1], [0.2, 0.3, 0.9], [0.5, 0.5, 0.1], [0.1, 0.2, 0.3]])
    right = np.eye(3, dtype=bool)[[0, 1, 0, 2]]
    scores = evaluate_classification(table, right, ks=(1, 2, 3))
    assert scores.ranks.tolist() == [1, 2, 2, 1]  # row 2 is tied with a wrong class
    assert dict(scores) == {"top1": 0.5, "top2": 1.0, "top3": 1.0, "mean_per_class": pytest.approx((0.5 + 0 + 1) / 3)}
    assert scores.per_class.tolist() == [0.5, 0, 1]
    assert scores.confusion.tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 1]]


def test_several_right_classes_by_hand():
    """Row 0: class 0 above both of its own, 1 and 2. Row 1: class 2 above. Row 2: first but tied. Class 3 is empty."""
    table = np.array([[0.9, 0.5, 0.1, -1], [0.2, 0.3, 0.9, -1], [0.5, 0.5, 0.1, -1]], np.float32)
    right = np.array([[0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
    scores = evaluate_classification(table, right, ks=(1, 2))
    assert scores.ranks.tolist() == [2, 2, 2]
    assert (scores["top1"], scores["top2"], scores["mean_per_class"]) == (0, 1, 0)
    # class 0: rows 1, 2 among .9 .2 .5: at 2 and 3. class 1: rows 0, 1 among .5 .3 .5: tied first is 2nd, then 3rd.
    # class 2: row 0 among .1 .9 .1: tied last, 3rd
    assert scores["map"] == pytest.approx(((1 / 2 + 2 / 3) / 2 + (1 / 2 + 2 / 3) / 2 + 1 / 3) / 3)
    assert np.isnan(scores.per_class[3])
    assert scores.confusion.tolist() == [[0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def slow_classification(table, right, ks, times):
    """The measures with row i counted times[i] times: top-k, mean_per_class and map; and per class, and confusion."""
    count, classes = table.shape
    ranks, guesses, truths = [], [], []
    for row, own in zip(table.tolist(), right.tolist(), strict=True):
        order = sorted(range(classes), key=lambda c: (-row[c], own[c]))  # wrong ones first among equals
        ranks.append(1 + next(place for place, c in enumerate(order) if own[c]))
        guesses.append(order[0])
        truths.append(max((c for c in range(classes) if own[c]), key=lambda c: row[c]))
    rows = [i for i in range(count) for _ in range(times[i])]
    result = {f"top{k}": statistics.fmean(ranks[i] <= k for i in rows) for k in ks}
    per_class, precisions = [], []
    for c in range(classes):
        mine = [ranks[i] == 1 for i in rows if right[i, c]]
        per_class.append(statistics.fmean(mine) if mine else math.nan)
        order = sorted(rows, key=lambda i: (-table[i, c], right[i, c]))
        places = [place for place, i in enumerate(order, 1) if right[i, c]]
        if places:
            precisions.append(statistics.fmean(n / place for n, place in enumerate(places, 1)))
    result["mean_per_class"] = statistics.fmean(share for share in per_class if not math.isnan(share))
    if (right.sum(1) > 1).any():
        result["map"] = statistics.fmean(precisions)
    confusion = np.zeros((classes, classes), int)
    for i in rows:
        # of two right guesses that are equal, the first is taken, as for the truth
        confusion[truths[i], truths[i] if ranks[i] == 1 else guesses[i]] += 1
    return result, ranks, per_class, confusion


@st.composite
def tables(draw):
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, classes = draw(st.integers(1, 30)), draw(st.integers(1, 8))
    table = random.normal(size=(rows, classes)) if draw(st.booleans()) else random.integers(0, 3, (rows, classes))
    right = np.eye(classes, dtype=bool)[random.integers(0, draw(st.integers(1, classes)), rows)]
    if draw(st.booleans()):
        right |= random.random((rows, classes)) < 0.3
    return table.astype(draw(st.sampled_from([np.float32, np.float64, np.int64]))), right


@settings(max_examples=150, deadline=None)
@given(tables())
def test_classification_equals_the_oracle(case):
    table, right = case
    scores = evaluate_classification(table, right, ks=(1, 2, 50), bootstrap=5)
    expected, ranks, per_class, confusion = slow_classification(table, right, (1, 2, 50), [1] * len(table))
    close(scores, expected)
    assert scores.ranks.tolist() == ranks
    assert scores.per_class == pytest.approx(per_class, nan_ok=True, abs=1e-12)
    assert np.array_equal(scores.confusion, confusion)
    assert scores.units.tolist() == list(range(len(table)))
    for number, weights in enumerate(np.concatenate(list(metrics.bootstrap_weights(len(table), 5))).astype(int)):
        literal = slow_classification(table, right, (1, 2, 50), weights)[0]
        close(
            {name: values[number] for name, values in scores.drawn.items()},
            {name: literal[name] for name in scores.drawn},
        )
    assert scores.drawn.keys() == expected.keys() - {"map"} == scores.intervals.keys()


def test_classification_can_be_compared():
    random = np.random.default_rng(9)
    right = np.eye(10, dtype=bool)[random.integers(0, 10, 300)]
    noise = random.normal(size=(300, 10))
    one, other = (evaluate_classification(signal * right + noise, right, bootstrap=200) for signal in (2, 1.5))
    paired = difference(one, other)
    assert paired["top1"] == one["top1"] - other["top1"] > 0
    assert paired.intervals["top1"][0] > 0


@pytest.mark.parametrize(
    ("table", "right", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 2), bool), "must be tables of one shape"),
        (np.ones((2, 3)), np.ones((2, 3)), "must be tables of one shape"),
        (np.ones(3), np.ones(3, bool), "must be tables of one shape"),
        (np.ones((2, 3)), np.array([[1, 0, 0], [0, 0, 0]], bool), "needs a right class"),
        (np.full((2, 3), np.nan), np.ones((2, 3), bool), "finite"),
        (np.full((2, 3), -np.inf), np.ones((2, 3), bool), "finite"),
        (np.ones((0, 3)), np.ones((0, 3), bool), "must be a row"),
    ],
)
def test_classification_refuses(table, right, message):
    with pytest.raises(ValueError, match=message):
        evaluate_classification(table, right)
