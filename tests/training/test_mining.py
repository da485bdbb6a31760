"""Hard negatives against brute force, and what meets in a batch."""

from __future__ import annotations

import numpy as np
import pytest

from indexes.errors import VectorError
from indexes.vectors import as_vectors
from retrieval.training.mining import hard_batches, mine


def vectors(rows: int, dim: int, seed: int) -> np.ndarray:
    return as_vectors(np.random.default_rng(seed).normal(size=(rows, dim)))


@pytest.fixture(params=range(3))
def crowd(request):
    """30 pictures, 26 of them with one to five texts; a third of the texts say nearly or exactly what another says."""
    random = np.random.default_rng(request.param)
    owner = random.permutation(np.repeat(np.arange(2, 28), random.integers(1, 6, 26)))
    texts = vectors(len(owner), 6, request.param)
    for row in random.permutation(len(owner))[: len(owner) // 3]:
        texts[row] = texts[random.integers(len(owner))] + random.choice([0, 0.02]) * vectors(1, 6, row)[0]
    return vectors(30, 6, 9), as_vectors(texts), owner


def cosine(a, b) -> float:
    return float(np.float32((a.astype(np.float64) * b).sum()))


def slow_same(picture, text, texts, owner, ceiling) -> bool:
    """Whether a text is a picture's own, or says what one of its own says."""
    own = np.flatnonzero(owner == picture)
    return text in own or (ceiling is not None and any(cosine(texts[o], texts[text]) >= ceiling for o in own))


def slow_mine(images, texts, owner, k, ceiling):
    """Every picture with every text, sorted."""
    wrong = [
        [not slow_same(picture, text, texts, owner, ceiling) for text in range(len(texts))]
        for picture in range(len(images))
    ]
    found = []
    for queries, answers, allowed in ((images, texts, np.array(wrong)), (texts, images, np.array(wrong).T)):
        columns = min(k, len(answers))
        for query, row in zip(queries, allowed, strict=True):
            best = sorted((-cosine(query, answers[a]), a) for a in np.flatnonzero(row))[:columns]
            best += [(1.0, -1)] * (columns - len(best))
            found.append(best)
    return found[: len(images)], found[len(images) :]


@pytest.mark.parametrize("factory", [None, "Flat"])
@pytest.mark.parametrize("ceiling", [None, 0.99, 0.5])
@pytest.mark.parametrize("k", [1, 4, 1000])
def test_equals_brute_force(crowd, k, ceiling, factory):
    images, texts, owner = crowd
    found = mine(images, texts, owner, k, ceiling=ceiling, factory=factory)
    for hits, slow in zip((found.texts, found.images), slow_mine(images, texts, owner, k, ceiling), strict=True):
        np.testing.assert_array_equal(hits.rows, [[row for _, row in best] for best in slow])
        np.testing.assert_array_equal(hits.scores, np.float32([[-score for score, _ in best] for best in slow]))
    twins = {
        pair
        for a in range(len(owner))
        for b in range(len(owner))
        if ceiling is not None and owner[a] != owner[b] and cosine(texts[a], texts[b]) >= ceiling
        for pair in [(owner[a], owner[b])]
    }
    assert {tuple(pair) for pair in found.twins} == twins
    assert len(found.twins) == len(twins)


def test_links_are_the_hardest_either_way(crowd):
    images, texts, owner = crowd
    found = mine(images, texts, owner, 3)
    slow = {}
    for hits, key in ((found.texts, lambda i, row: (i, owner[row])), (found.images, lambda i, row: (owner[i], row))):
        for i, (rows, scores) in enumerate(zip(hits.rows, hits.scores, strict=True)):
            for row, score in zip(rows, scores, strict=True):
                a, b = key(i, row)
                for pair in ((a, b), (b, a)):
                    slow[pair] = max(slow.get(pair, -1), score)
    one, other, scores = found.links
    assert list(zip(one, other, strict=True)) == sorted(slow)
    assert dict(zip(zip(one, other, strict=True), scores, strict=True)) == slow


def test_captions_that_say_the_same_are_no_mistakes():
    """Pictures 0 and 1 have the same caption: without a ceiling it is the hardest negative of both."""
    images = np.eye(4)[[0, 0, 1, 2]] + 0.1 * np.eye(4)
    texts, owner = np.eye(4)[[0, 0, 1, 2]], [0, 1, 2, 3]
    naive, careful = mine(images, texts, owner, 1), mine(images, texts, owner, 1, ceiling=1.0)
    assert naive.texts.rows[:2, 0].tolist() == [1, 0]
    assert not set(careful.texts.rows[:2, 0]) & {0, 1}
    assert not set(careful.images.rows[:2, 0]) & {0, 1}
    assert careful.twins.tolist() == [[0, 1], [1, 0]]
    assert naive.twins.shape == (0, 2)


@pytest.mark.parametrize("factory", [None, "Flat"])
def test_it_asks_on_until_there_are_enough(factory):
    """The first hundred texts of all are the picture's own."""
    images = np.eye(2)
    texts = np.concatenate([np.tile([1.0, 0.0], (100, 1)), [[0.6, 0.8], [0.0, 1.0], [0.8, 0.6]]])
    owner = np.array([0] * 100 + [1] * 3)
    found = mine(images, texts, owner, 2, factory=factory)
    assert found.texts.rows[0].tolist() == [102, 100]
    np.testing.assert_allclose(found.texts.scores[0], [0.8, 0.6], rtol=1e-6)
    assert found.images.rows[:, 1].tolist() == [-1] * 103  # of two pictures, one is its own
    assert found.images.scores[:, 1].tolist() == [-1] * 103


def test_an_approximate_index_finds_most():
    images, texts, owner = vectors(100, 16, 1), vectors(300, 16, 2), np.repeat(np.arange(100), 3)
    exact, quick = mine(images, texts, owner, 5), mine(images, texts, owner, 5, factory="HNSW16")
    for one, other in ((exact.texts, quick.texts), (exact.images, quick.images)):
        assert np.mean([len(set(a) & set(b)) / 5 for a, b in zip(one.rows, other.rows, strict=True)]) > 0.9
    assert not (owner[quick.texts.rows] == np.arange(100)[:, None]).any()
    assert not (quick.images.rows == owner[:, None]).any()


def test_nothing_to_mine():
    found = mine(np.eye(3), np.empty((0, 3)), [], 2, ceiling=0.9)
    assert (found.texts.rows.shape, found.images.rows.shape) == ((3, 0), (0, 2))
    assert sorted(np.concatenate(hard_batches(found, 2)).tolist()) == [0, 1, 2]
    alone = mine(np.eye(3)[:1], np.eye(3)[:1], [0], 2)
    assert alone.texts.rows.tolist() == alone.images.rows.tolist() == [[-1]]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": 0}, ValueError, "k must be at least 1"),
        ({"owner": [0, 1]}, ValueError, "owner must name one of 3 pictures for each of 4 texts"),
        ({"owner": [0, 1, 2, 3]}, ValueError, "owner must name"),
        ({"owner": [0, 1, 2, -1]}, ValueError, "owner must name"),
        ({"texts": np.eye(5)[:4]}, VectorError, "cannot be compared with vectors of width 4"),
        ({"images": np.zeros((3, 4))}, VectorError, "are zero"),
    ],
)
def test_mistakes(change, error, words):
    given = {"images": np.eye(4)[:3], "texts": np.eye(4), "owner": [0, 1, 2, 2], "k": 1}
    with pytest.raises(error, match=words):
        mine(**{**given, **change})


# ---- batches ---------------------------------------------------------------------------------------------------------


def slow_groups(found, size, seed, count):
    """The groups by their definition: every free picture is looked at for each place."""
    score = {}
    for a, b, s in zip(*found.links, strict=True):
        score[int(a), int(b)] = float(s)
    twins = {tuple(pair) for pair in found.twins.tolist()}
    free, groups = set(range(count)), []
    for start in np.random.default_rng(seed).permutation(count).tolist():
        if start not in free:
            continue
        members = [start]
        while len(members) < size:
            open_ = [
                (-max(score[m, p] for m in members if (m, p) in score), p)
                for p in free.difference(members)
                if any((m, p) in score for m in members) and not any((m, p) in twins for m in members)
            ]
            if not open_:
                break
            members.append(min(open_)[1])
        free -= set(members)
        groups.append(members)
    return groups


@pytest.mark.parametrize("ceiling", [None, 0.9])
@pytest.mark.parametrize("group", [1, 3, 6])
def test_batches_are_made_of_groups(crowd, group, ceiling):
    found = mine(*crowd, 3, ceiling=ceiling)
    batches = hard_batches(found, 6, group=group, seed=5)
    assert [len(batch) for batch in batches] == [6] * 5
    assert sorted(np.concatenate(batches).tolist()) == list(range(30))
    groups = slow_groups(found, group, 5, 30)
    assert sum(map(len, groups)) == 30
    batch_of = {picture: i for i, batch in enumerate(batches) for picture in batch.tolist()}
    for members in groups:
        if len(members) == group:  # whole ones stay together; what is left over fills the rest
            assert len({batch_of[picture] for picture in members}) == 1
    if group == 1:
        assert len(groups) == 30
    if ceiling is not None and group == 6:
        assert len(found.twins)


def test_pictures_that_are_mistaken_for_each_other_meet():
    """Twelve kinds of four pictures each: a batch of four is a kind, and one of eight has two."""
    random = np.random.default_rng(0)
    kind = random.permutation(np.repeat(np.arange(12), 4))
    images = np.eye(12)[kind] + 0.1 * random.normal(size=(48, 12))
    texts = np.eye(12)[kind] + 0.1 * random.normal(size=(48, 12))
    found = mine(images, texts, np.arange(48), 3)
    assert all(len(set(kind[batch])) == 1 for batch in hard_batches(found, 4, seed=1))
    batches = hard_batches(found, 8, group=4, seed=1)
    assert [len(set(kind[batch])) for batch in batches] == [2] * 6
    random_ones = hard_batches(found, 8, group=1, seed=1)
    assert np.mean([len(set(kind[batch])) for batch in random_ones]) > 4


def test_twins_are_kept_out_of_each_other_s_groups():
    """Kinds as above; two pictures of each have the same caption."""
    random = np.random.default_rng(0)
    kind = np.repeat(np.arange(6), 5)
    images = np.eye(6)[kind] + 0.1 * random.normal(size=(30, 6))
    texts = np.eye(6)[kind] + 0.1 * random.normal(size=(30, 6))
    texts[1::5] = texts[0::5]
    found = mine(images, texts, np.arange(30), 4, ceiling=0.9999)
    assert len(found.twins) == 12
    together = {
        (a, b)
        for seed in range(10)
        for batch in hard_batches(found, 4, seed=seed)
        if len(set(kind[batch])) == 1  # a whole group, and not what is left over
        for a in batch.tolist()
        for b in batch.tolist()
    }
    assert not together & {tuple(pair) for pair in found.twins.tolist()}
    assert len(together) > 100


@pytest.mark.parametrize(("count", "size"), [(30, 7), (30, 30), (30, 100), (30, 1)])
def test_every_picture_once_an_epoch(crowd, count, size):
    found = mine(*crowd, 2)
    batches = hard_batches(found, size, seed=3)
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))
    sizes = sorted(map(len, batches), reverse=True)
    assert sizes == [size] * (count // size) + ([count % size] if count % size else [])


def test_batches_come_in_random_order(crowd):
    """What is left over is not always learned last."""
    found = mine(*crowd, 2)
    smallest = {int(np.argmin([len(batch) for batch in hard_batches(found, 7, seed=seed)])) for seed in range(20)}
    assert len(smallest) > 2


def test_the_seed_decides_everything(crowd):
    found = mine(*crowd, 2)

    def epoch(seed):
        return [batch.tolist() for batch in hard_batches(found, 6, seed=seed)]

    assert epoch(1) == epoch(1)
    assert epoch((1, 2)) == epoch((1, 2))
    assert len({str(epoch(seed)) for seed in (1, 2, (1, 2), (1, 3))}) == 4


@pytest.mark.parametrize(("size", "group"), [(0, None), (4, 0), (4, 5)])
def test_batches_that_cannot_be(crowd, size, group):
    with pytest.raises(ValueError, match="a group must have from 1 to"):
        hard_batches(mine(*crowd, 2), size, group=group)
