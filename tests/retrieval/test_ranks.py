"""Ranks: cases worked by hand, and a slow, obvious oracle that sorts, which they have to equal on every path."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexes.errors import VectorError
from indexes.vectors import as_vectors
from retrieval import ranks
from retrieval.ranks import rank_pairs

TIES = ("pessimistic", "mean")


# ---- the oracle ------------------------------------------------------------------------------------------------------


def slow_scores(images, texts):
    """(N, M): every cosine, summed in float64 and rounded to float32."""
    images, texts = as_vectors(images), as_vectors(texts)
    rows = [(texts.astype(np.float64) * image).sum(1).astype(np.float32) for image in images]
    return np.stack(rows)


def slow_places(scores, right, ties):
    """Ranks of one query's right items: sort, with wrong ones first among equals, and for `mean` also last."""

    def places(right_first):
        order = np.lexsort((right != right_first, -scores))  # by falling score; among equals, False comes first
        return (1 + np.flatnonzero(right[order])).tolist()

    worst, best = places(False), places(True)
    return worst if ties == "pessimistic" else [(a + b) / 2 for a, b in zip(worst, best, strict=True)]


def slow_ranks(images, texts, image_rows, text_rows, ties):
    """{text: ranks of its images}, {image: ranks of its texts}, of those that have any."""
    scores = slow_scores(images, texts)
    right = np.zeros(scores.shape, bool)
    right[image_rows, text_rows] = True
    return tuple(
        {
            query: slow_places(mine, own, ties)
            for query, (mine, own) in enumerate(zip(table, owned, strict=True))
            if own.any()
        }
        for table, owned in ((scores.T, right.T), (scores, right))
    )


def listed(direction):
    """A Ranks as the oracle has it."""
    first = direction.first.tolist()
    return {
        query: direction.ranks[first[i] : first[i + 1]].tolist() for i, query in enumerate(direction.queries.tolist())
    }


def check(images, texts, image_rows, text_rows, ties):
    """Equal to the oracle, in all that a Ranks holds; returns it."""
    ranking = rank_pairs(images, texts, image_rows, text_rows, ties)
    t2i, i2t = slow_ranks(images, texts, image_rows, text_rows, ties)
    assert listed(ranking.t2i) == t2i
    assert listed(ranking.i2t) == i2t
    firsts = {}
    for image, text in zip(np.asarray(image_rows).tolist(), np.asarray(text_rows).tolist(), strict=True):
        firsts[text] = min(image, firsts.get(text, image))
    assert ranking.t2i.images.tolist() == [firsts[text] for text in sorted(t2i)]
    assert ranking.i2t.images.tolist() == sorted(i2t)
    for direction, slow in ((ranking.t2i, t2i), (ranking.i2t, i2t)):
        assert direction.relevant.tolist() == [len(places) for places in slow.values()]
        assert direction.best.tolist() == [min(places) for places in slow.values()]
        assert direction.ordinal.tolist() == [i for places in slow.values() for i in range(1, len(places) + 1)]
    return ranking


@contextlib.contextmanager
def settings_of_ranks(tile=(240, 2032), unsure=4096, threads=1, few=32):
    """Run with other tiles, other limits of unsure scores and of few ones, and a number of threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "_TILE_IMAGES", tile[0])
        patch.setattr(ranks, "_TILE_TEXTS", tile[1])
        patch.setattr(ranks, "_UNSURE", unsure)
        patch.setattr(ranks, "_FEW", few)
        patch.setattr(ranks, "thread_count", lambda: threads)
        yield


# ---- by hand ---------------------------------------------------------------------------------------------------------

IMAGES = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
CAPTIONS = [[3, 1, 2], [1, 3, 2], [2, 3, 1]]  # one caption against another: the same three cosines in another order


def test_several_captions_and_a_tie_between_captions():
    """Cosines × sqrt(14):

               text 0  text 1  text 2
    image 0    3*      1*      2         * = its own
    image 1    1       3       3*        texts 1 and 2 are tied
    image 2    2       2       1         owns nothing: distracts
    """
    for ties, second in (("pessimistic", 2), ("mean", 1.5)):
        ranking = check(IMAGES, CAPTIONS, [0, 0, 1], [0, 1, 2], ties)
        assert listed(ranking.t2i) == {0: [1], 1: [3], 2: [1]}
        assert listed(ranking.i2t) == {0: [1, 3], 1: [second]}


def test_several_images_of_one_caption():
    """Text 0 (cosines 3 1 2) shows images 1 and 2; text 1 (1 3 2) image 0. Image 1's own is below text 1: 1 < 3."""
    ranking = check(IMAGES, CAPTIONS[:2], [2, 1, 0], [0, 0, 1], "pessimistic")
    assert listed(ranking.t2i) == {0: [2, 3], 1: [3]}
    assert listed(ranking.i2t) == {0: [2], 1: [2], 2: [2]}  # image 2: 2 against 2, a tie
    assert ranking.t2i.images.tolist() == [1, 0]  # the bootstrap draws text 0 with image 1
    assert listed(check(IMAGES, CAPTIONS[:2], [2, 1, 0], [0, 0, 1], "mean").i2t) == {0: [2], 1: [2], 2: [1.5]}


def test_a_model_that_says_the_same_of_everything_finds_nothing():
    same = np.ones((4, 3))
    assert listed(rank_pairs(same, same, range(4), range(4)).t2i) == {i: [4] for i in range(4)}
    assert listed(rank_pairs(same, same, range(4), range(4), "mean").i2t) == {i: [2.5] for i in range(4)}


def test_right_items_tied_among_themselves_do_not_stand_in_each_others_way():
    image, texts = [[1, 0]], [[1, 0], [1, 0], [1, 0], [1, 1]]
    ranking = rank_pairs([*image, [0, 1]], texts, [0, 0, 0], [0, 1, 3], "pessimistic")
    assert listed(ranking.i2t) == {0: [2, 3, 4]}  # text 2 is a copy, and not its own
    assert listed(rank_pairs([*image, [0, 1]], texts, [0, 0, 0], [0, 1, 3], "mean").i2t) == {0: [1.5, 2.5, 4]}


def test_a_slice_keeps_its_ranks_among_all_items():
    ranking = rank_pairs(IMAGES, CAPTIONS, [0, 0, 1], [0, 1, 2])
    part = ranking.select(np.array([False, True, True]), np.array([True, False, True]))
    assert listed(part.t2i) == {1: [3], 2: [1]}
    assert listed(part.i2t) == {0: [1, 3]}
    assert (part.t2i.images.tolist(), part.i2t.images.tolist()) == ([0, 1], [0])
    none = ranking.select(np.zeros(3, bool), np.zeros(3, bool))
    assert (len(none.t2i.queries), len(none.i2t.ranks), none.t2i.best.tolist()) == (0, 0, [])


# ---- against the oracle ----------------------------------------------------------------------------------------------


def some_rows(random, kind, count, dim, base):
    """Vectors of one kind; `base` is shared between images and texts where the kind has one."""
    if kind == "random":
        return random.normal(size=(count, dim))
    if kind == "integers":
        rows = random.integers(-1, 2, (count, dim))
        rows[~rows.any(axis=1), 0] = 1
        return rows
    if kind == "duplicates":
        return base[random.integers(0, len(base), count)]
    if kind == "one-hot":
        return np.eye(dim)[random.integers(0, dim, count)]
    jitter = {"collapsed": 0.0, "nearly collapsed": 1e-7, "close": 1e-5}[kind]
    return base[0] + jitter * random.normal(size=(count, dim))


KINDS = ("random", "integers", "duplicates", "one-hot", "collapsed", "nearly collapsed", "close")


@st.composite
def data(draw, most=24):
    """Images, texts and pairs; every shape of ownership."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    images, texts, dim = draw(st.integers(1, most)), draw(st.integers(1, 2 * most)), draw(st.integers(1, 20))
    kind, base = draw(st.sampled_from(KINDS)), random.normal(size=(3, dim))
    vectors = [some_rows(random, kind, count, dim, base) for count in (images, texts)]
    owners = draw(st.sampled_from(["one each", "ragged", "one owns nearly all", "any pairs"]))
    if owners == "any pairs":
        pairs = np.argwhere(random.random((images, texts)) < random.choice([0.05, 0.3, 0.9]))
        if not len(pairs):
            pairs = np.array([[images - 1, texts - 1]])
        return *vectors, *random.permutation(pairs).T
    owner = np.arange(texts) % images
    if owners == "ragged":
        owner = random.integers(0, images, texts)
    if owners == "one owns nearly all":
        owner = np.where(random.random(texts) < 0.9, images // 2, owner)
    return *vectors, owner, np.arange(texts)


PATHS = st.builds(
    dict,
    tile=st.tuples(st.sampled_from([1, 3, 8, 240]), st.sampled_from([1, 7, 8, 17, 2032])),
    unsure=st.sampled_from([0, 3, 4096, 10**9]),
    threads=st.sampled_from([1, 1, 2, 5]),
    few=st.sampled_from([0, 4, 32, 10**9]),  # all are few, down to none
)


@settings(max_examples=200, deadline=None)
@given(data(), st.sampled_from(TIES), PATHS)
def test_equal_to_the_oracle_on_every_path(case, ties, path):
    with settings_of_ranks(**path):
        check(*case, ties)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "path",
    [{"unsure": 0}, {"unsure": 10**9}, {"few": 0}, {"few": 10**9}, {"threads": 2}, {"tile": (50, 64), "threads": 5}],
)
def test_larger_cases(kind, path):
    """Ragged owners: images with 0, 1 and 300 texts, and right copies of wrong items far away in another tile."""
    random = np.random.default_rng(5)
    base = random.normal(size=(40, 16))
    images, texts = some_rows(random, kind, 150, 16, base), some_rows(random, kind, 700, 16, base)
    owner = random.permutation(np.concatenate([np.full(300, 77), np.arange(40), random.integers(50, 150, 360)]))
    images[149], texts[699] = images[0], texts[3]
    with settings_of_ranks(**path):
        check(images, texts, owner, np.arange(700), TIES[len(path) % 2])


@pytest.mark.parametrize("threads", [1, 2])
def test_large_with_copies_far_apart(threads):
    random = np.random.default_rng(6)
    owner = np.concatenate([np.arange(700), random.integers(0, 600, 2400)])
    images = random.normal(size=(700, 64)).astype(np.float32)
    texts = images[owner] + 2 * random.normal(size=(3100, 64)).astype(np.float32)
    images[650:] = images[:50]  # copies, of which the last own few texts
    texts[3000:] = texts[:100]
    with settings_of_ranks(threads=threads):
        ranking = check(images, texts, owner, np.arange(3100), "pessimistic")
        mean = rank_pairs(images, texts, owner, np.arange(3100), "mean")
    assert 0.2 < (ranking.t2i.best == 1).mean() < 0.8
    assert (mean.t2i.ranks < ranking.t2i.ranks).sum() >= 50  # the copies are found to be tied
    assert not (mean.t2i.ranks > ranking.t2i.ranks).any()


def one_after_another(images, texts, out):
    """The worst product there can be: float32, each term added to one sum. The true one rounds in blocks."""
    out[:] = 0
    for image, text in zip(images.T, texts, strict=True):
        out += np.multiply.outer(image, text)


@pytest.mark.parametrize("matmul", [None, one_after_another])
@pytest.mark.parametrize("unsure", [0, 4096, 10**9])
def test_rounding_that_goes_one_way(monkeypatch, matmul, unsure):
    """4,128 terms, nearly all of one value: each sum is rounded the same way at each step, far beyond sqrt(D)."""
    dim, random = 4128, np.random.default_rng(7)
    images, texts = (np.where(np.arange(dim) < random.integers(0, 40, (count, 1)), 1.001, 1) for count in (20, 60))
    texts[30:40] = texts[:10]
    margins, counted = [], ranks._count_within

    def count_within(sides, own, margin):
        margins.append(margin)
        return counted(sides, own, margin)

    monkeypatch.setattr(ranks, "_count_within", count_within)
    if matmul:
        monkeypatch.setattr(np, "matmul", matmul)
    with settings_of_ranks(tile=(7, 24), unsure=unsure):
        for ties in TIES:
            check(images, texts, np.arange(60) % 20, np.arange(60), ties)
    if matmul:
        assert margins == [steps * 2.0**-24 for steps in (8 + 2 * math.sqrt(dim), 8 + 2 * dim)] * 2


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 8])
def test_few_dimensions_and_scores_on_both_sides_of_one(dim):
    """Steps of float32 are twice as long above 1 as below: bounds next to it must not be rounded inwards."""
    random = np.random.default_rng(dim)
    for _ in range(100):
        base = random.normal(size=dim)
        images, texts = (base + 1e-7 * random.normal(size=(count, dim)) for count in (8, 12))
        check(images, texts, np.arange(12) % 8, np.arange(12), "mean")


# ---- what must not matter --------------------------------------------------------------------------------------------


def crowd(seed, images=60, texts=200, dim=12, duplicates=20):
    random = np.random.default_rng(seed)
    left, right = random.normal(size=(images, dim)), random.normal(size=(texts, dim))
    left[-duplicates:], right[-duplicates:] = left[:duplicates], right[:duplicates]
    return left, right, random.integers(0, images, texts)


def same(one, other):
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for a, b in ((one.t2i, other.t2i), (one.i2t, other.i2t))
        for name in ("queries", "images", "first", "ranks")
    )


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("unsure", [0, 4096])
def test_the_number_of_threads(threads, unsure):
    images, texts, owner = crowd(1)
    results = []
    for number in (1, threads):
        with settings_of_ranks((16, 24), unsure, number):
            results.append(rank_pairs(images, texts, owner, np.arange(200), "mean"))
    assert same(*results)


def test_omp_num_threads(monkeypatch):
    images, texts, owner = crowd(2, images=300, texts=2500)
    results = []
    for number in ("1", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", number)
        results.append(rank_pairs(images, texts, owner, np.arange(2500), "mean"))
    assert same(*results)


@settings(max_examples=40, deadline=None)
@given(data(most=12), st.sampled_from(TIES), st.integers(0, 100))
def test_the_order_of_rows_and_of_pairs(case, ties, seed):
    images, texts, rows, columns = case
    random = np.random.default_rng(seed)
    new_rows, new_columns = random.permutation(len(images)), random.permutation(len(texts))
    pairs = random.permutation(len(rows))
    plain = rank_pairs(images, texts, rows, columns, ties)
    moved = rank_pairs(
        images[np.argsort(new_rows)],
        texts[np.argsort(new_columns)],
        new_rows[rows[pairs]],
        new_columns[columns[pairs]],
        ties,
    )
    t2i, i2t = listed(plain.t2i), listed(plain.i2t)
    assert listed(moved.t2i) == {int(new_columns[query]): places for query, places in t2i.items()}
    assert listed(moved.i2t) == {int(new_rows[query]): places for query, places in i2t.items()}


def test_the_length_of_vectors():
    """Powers of two scale exactly; the rest to within rounding, which decides nothing here. Rows differ in length."""
    images, texts, owner = crowd(3, duplicates=1)
    plain = rank_pairs(images, texts, owner, np.arange(200))
    for factor in (2.0**-60, 8, 2.0**60, np.float32(3.7)):
        assert same(plain, rank_pairs(images * factor, texts * factor, owner, np.arange(200)))
    lengths = np.random.default_rng(0).uniform(0.1, 10, (60, 1))
    assert same(plain, rank_pairs(images * lengths, texts, owner, np.arange(200)))


def test_what_is_given_stays_as_it_is():
    images, texts, owner = crowd(4)
    for left, right in ((images, texts), (as_vectors(images), as_vectors(texts))):
        before = left.copy(), right.copy()
        rank_pairs(left, right, owner, np.arange(200))
        assert np.array_equal(left, before[0])
        assert np.array_equal(right, before[1])


def test_vectors_that_are_not_copied():
    """Unit rows are taken as they lie; whatever else holds the same numbers gives the same ranks."""
    images, texts, owner = crowd(5)
    unit = [as_vectors(images), as_vectors(texts)]
    plain = check(*unit, owner, np.arange(200), "mean")
    for form in (np.ndarray.tolist, np.asfortranarray, np.float64, lambda rows: rows * 4, lambda rows: rows[::1, :]):
        assert same(plain, rank_pairs(*map(form, unit), owner, np.arange(200), "mean"))


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["images", "texts"])
@pytest.mark.parametrize("value", [0, np.nan, np.inf, -np.inf])
def test_bad_rows_are_named(which, value):
    vectors = {"images": np.ones((3, 4), np.float32), "texts": np.ones((5, 4), np.float32)}
    vectors[which][2] = value
    with pytest.raises(VectorError, match=f"{which}: 1 of . vectors are zero, NaN or infinite: row 2$"):
        rank_pairs(vectors["images"], vectors["texts"], [0], [0])


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([], [], "no pair"),
        ([0, 1, 0], [1, 1, 1], "given twice"),
        ([0, 3], [0, 1], "image 0 or 3, and there are 3"),
        ([-1, 1], [0, 1], "image -1 or 1, and there are 3"),
        ([0, 1], [0, 5], "text 0 or 5, and there are 5"),
        ([0, 1], [0], "text rows must be one integer each, not int64 .1,"),
        ([[0, 1]], [[0, 1]], "image rows must be one integer each"),
        ([0.0, 1.0], [0, 1], "image rows must be one integer each, not float64"),
        ([True, False], [0, 1], "image rows must be one integer each, not bool"),
        (0, 0, "image rows must be one integer each"),
    ],
)
def test_pairs_that_are_none(rows, columns, message):
    with pytest.raises(ValueError, match=message):
        rank_pairs(np.ones((3, 4)), np.ones((5, 4)), rows, columns)


def test_bad_rows_are_counted_from_the_first(monkeypatch):
    monkeypatch.setattr(ranks, "_PAIRS", 2)
    texts = as_vectors(np.ones((9, 4)))
    texts[7] = 0
    with pytest.raises(VectorError, match=r"texts: 1 of 9 vectors .* row 7$"):
        rank_pairs(np.ones((3, 4)), texts, [0], [0])


def test_other_mistakes():
    with pytest.raises(VectorError, match="images have 4 dimensions and texts 3"):
        rank_pairs(np.ones((3, 4)), np.ones((5, 3)), [0], [0])
    with pytest.raises(VectorError, match="images: vectors must be a table"):
        rank_pairs(np.ones(4), np.ones((5, 4)), [0], [0])
    with pytest.raises(ValueError, match="ties must be one of pessimistic, mean, not 'optimistic'"):
        rank_pairs(np.ones((3, 4)), np.ones((5, 4)), [0], [0], "optimistic")
    with pytest.raises(ValueError, match="no pair"):
        rank_pairs(np.ones((3, 4)), np.ones((0, 4)), [], [])
    with pytest.raises(ValueError, match="text 0 or 0, and there are 0"):
        rank_pairs(np.ones((3, 4)), np.ones((0, 4)), [0], [0])
