"""Retrieval through an index: exact kinds against exact measures, lossy ones against slow counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from indexes import choice
from indexes.errors import VectorError
from indexes.vectors import VectorIndex, as_vectors
from retrieval.evaluation import Settings, evaluate
from retrieval.index_evaluation import Direction, check_kinds, evaluate_indexes
from retrieval.metrics import evaluate_retrieval, measure
from retrieval.pairs import Record
from retrieval.probes import everyday_queries
from retrieval.ranks import rank_pairs
from tests.fakes import ColourEncoder

DIM = 16


def unit(n, seed=0, dim=DIM):
    return as_vectors(np.random.default_rng(seed).standard_normal((n, dim)))


def coarse(n, seed):
    """Vectors of few values: many rows are equal, and ties are everywhere."""
    numbers = np.random.default_rng(seed).integers(-1, 2, (n, 5)).astype(float)
    numbers[~numbers.any(axis=1), 0] = 1
    return as_vectors(numbers)


def directions(images, texts, image_rows, text_rows, ties="pessimistic"):
    ranking = rank_pairs(images, texts, image_rows, text_rows, ties)
    by_text, by_image = np.lexsort((image_rows, text_rows)), np.lexsort((text_rows, image_rows))
    return (
        Direction("t2i", images, texts[ranking.t2i.queries], ranking.t2i, image_rows[by_text]),
        Direction("i2t", texts, images[ranking.i2t.queries], ranking.i2t, text_rows[by_image]),
    ), ranking


def at_k(metrics, way):
    return {name: value for name, value in metrics.items() if "@" in name and name.startswith(way)}


@pytest.mark.parametrize("ties", ["pessimistic", "mean"])
@pytest.mark.parametrize("make", [coarse, unit])
def test_what_is_exact_measures_what_exact_search_does(make, ties):
    """Flat names the candidates: ties at rank k, several right answers, and more than one depth of search."""
    images, texts = make(300, 1), make(400, 2)
    pairs = np.unique(np.random.default_rng(3).integers(0, 300, (500, 2)), axis=0)
    ks = (1, 3, 10, 50)
    both, ranking = directions(images, texts, pairs[:, 0], pairs[:, 1], ties)
    expected = measure(ranking, ks).metrics
    for direction in both:
        exact, flat = evaluate_indexes(["Flat"], direction, {}, ks, ties)
        assert (exact.kind, exact.bytes, flat.kind, flat.way, flat.rows) == (
            "exact", 0, "Flat", direction.way, len(direction.gallery),
        )  # fmt: skip
        assert exact.metrics == flat.metrics == at_k(expected, direction.way)
        assert exact.recall == flat.recall == 1
        assert min(exact.queries_per_second, flat.queries_per_second) > 0


def noisy_pairs(count, noise, texts_each=1):
    images = unit(count, 1)
    owner = np.repeat(np.arange(count), texts_each)
    texts = as_vectors(images[owner] + noise * unit(len(owner), 2))
    return images, texts, owner


@pytest.mark.parametrize("kind", ["PQ4x4fs", "IVF23,Flat", "RaBitQfs", "HNSW4"])
def test_a_lossy_kind_against_a_slow_count(kind):
    images, texts, owner = noisy_pairs(900, 1.2)
    (direction, _), _ = directions(images, texts, owner, np.arange(900))
    probes = {"text": unit(300, 5)}
    _, scores = evaluate_indexes([kind], direction, probes, ks=(1, 5, 10, 20))
    index = VectorIndex.build(images, kind)
    if scores.effort:
        index.set_effort(scores.effort)
    found, hits = 0, dict.fromkeys((1, 5, 10, 20), 0)
    for text, query in enumerate(texts):
        cosine = np.float32((images.astype(np.float64) * query).sum(axis=1))
        for depth, ks in ((10, (1, 5, 10)), (20, (20,))):
            ((rows, _),) = index.candidates(query[None], depth, depth * scores.refine)
            best = sorted(rows.tolist(), key=lambda row: (-cosine[row], row))[:depth]
            for k in ks:
                hits[k] += owner[text] in best[:k]
            if depth == 10:
                found += len(set(best) & set(np.argsort(-cosine, kind="stable")[:10].tolist()))
    assert scores.recall == pytest.approx(found / 9000, abs=1e-12)
    assert 0.8 < scores.recall < 1
    assert {k: scores.metrics[f"t2i_hit@{k}"] for k in hits} == pytest.approx({k: n / 900 for k, n in hits.items()})
    assert set(scores.tuned) == {"text", "image"}


def test_bytes_are_those_of_the_file(tmp_path):
    images, texts, owner = noisy_pairs(900, 0.5)
    (direction, _), _ = directions(images, texts, owner, np.arange(900))
    _, flat, coded = evaluate_indexes(["Flat", "SQ8"], direction, {})
    for scores in (flat, coded):
        VectorIndex.build(images, scores.kind).save(tmp_path / "index")
        assert scores.bytes == (tmp_path / "index").stat().st_size
    assert 900 * DIM < coded.bytes < 1.2 * 900 * DIM


def test_auto_is_what_a_store_would_choose(monkeypatch):
    images, texts, owner = noisy_pairs(900, 0.5)
    (direction, _), _ = directions(images, texts, owner, np.arange(900))
    probes = {"text": unit(300, 5)}
    exact, auto = evaluate_indexes(["auto"], direction, probes)
    assert auto == replace(exact, asked="auto")
    assert auto.name == "auto: exact"
    monkeypatch.setattr(choice, "_EXACT_ROWS", 800)
    _, auto, forced = evaluate_indexes(["auto", "PCAR8,PQ4x4fs"], direction, probes)
    assert (auto.asked, auto.kind, auto.name) == ("auto", "PCAR8,PQ4x4fs", "auto: PCAR8,PQ4x4fs")
    assert (auto.metrics, auto.recall, auto.tuned, auto.refine) == (
        forced.metrics, forced.recall, forced.tuned, forced.refine,
    )  # fmt: skip


def test_each_kind_once_and_exact_first():
    images, texts, owner = noisy_pairs(60, 0.5)
    (direction, _), _ = directions(images, texts, owner, np.arange(60))
    found = evaluate_indexes(["Flat", "exact", "SQ8", "Flat", "exact"], direction, {})
    assert [scores.asked for scores in found] == ["exact", "Flat", "SQ8"]


def test_where_an_index_loses_its_way_exact_search_steps_in():
    """As in a store: a few lists hold fewer rows than are wanted."""
    centres = np.eye(DIM)
    images = as_vectors(np.repeat(centres, 50, axis=0) + 0.02 * unit(800, 1))
    texts = as_vectors(images + 0.02 * unit(800, 2))
    (direction, _), ranking = directions(images, texts, np.arange(800), np.arange(800))
    _, scores = evaluate_indexes(["IVF16,Flat"], direction, {}, ks=(1, 700))
    assert scores.effort * 50 < 700  # candidates alone would not do
    assert scores.refine == 1
    assert scores.metrics["t2i_hit@700"] == measure(ranking, (700,)).metrics["t2i_hit@700"]


def test_few_rows_are_searched_exactly():
    for count in (1, 2, 9):
        images, texts, owner = noisy_pairs(count, 2.0)
        (direction, _), ranking = directions(images, texts, owner, np.arange(count))
        for scores in evaluate_indexes(["RaBitQfs", "HNSW32"], direction, {"text": unit(30, 5)}):
            assert scores.metrics == at_k(measure(ranking).metrics, "t2i")
            assert scores.recall == 1


def test_kinds_are_checked_against_every_gallery():
    check_kinds(["exact", "auto", "Flat", "IVF64,Flat"], (2496, 5000), DIM)
    with pytest.raises(VectorError, match="'IVF64,Flat' on 2,495 vectors"):
        check_kinds(["Flat", "IVF64,Flat"], (5000, 2495), DIM)
    for wrong in ("Flatt", "", "Exact", "PQ5x4fs"):
        with pytest.raises(VectorError, match="cannot build"):
            check_kinds([wrong], (100,), DIM)


# ---- as part of an evaluation ----------------------------------------------------------------------------------------


class Numbers(ColourEncoder):
    """A sentence of three numbers is that vector; everyday queries are spread by their letters."""

    def encode_texts(self, texts):
        rows = [text.split() if text[0].isdigit() else [1 + len(text) % 7, text.count("e"), 1] for text in texts]
        return as_vectors(np.array(rows, np.float32).reshape(-1, 3))


@pytest.fixture
def records(tmp_path):
    """120 coloured squares with two captions each, a few of which are the same."""
    random = np.random.default_rng(7)
    out = []
    for i in range(120):
        colour = random.integers(0, 256, 3)
        Image.new("RGB", (4, 4), tuple(colour.tolist())).save(tmp_path / f"{i}.png")
        near = np.clip(colour + random.integers(-40, 40, 3), 1, None)
        texts = (" ".join(map(str, near)), f"{i % 3} 1 2")
        out.append(Record(tmp_path / f"{i}.png", texts))
    return out


@pytest.mark.parametrize("merge", [False, True])
def test_both_directions_of_an_evaluation(records, merge):
    settings = Settings(ks=(1, 10, 15), indexes=("Flat", "auto"), merge_captions=merge, cached=False)
    result = evaluate(Numbers(), records, settings)
    assert [(scores.way, scores.asked) for scores in result.indexes] == [
        (way, kind) for way in ("t2i", "i2t") for kind in ("exact", "Flat", "auto")
    ]
    for scores in result.indexes:
        assert scores.metrics == at_k(result.metrics, scores.way)
        assert scores.rows == (result.images if scores.way == "t2i" else result.texts)
    fields = result.to_json()["indexes"]
    assert [field["direction"] for field in fields] == ["t2i"] * 3 + ["i2t"] * 3
    assert fields[1]["metrics"]["t2i_hit@15"] == result.metrics["t2i_hit@15"]
    assert [set(fields[i]["tuned"]) for i in (1, 4)] == [{"text", "image"}, {"text", "stored"}]


def test_without_a_kind_nothing_is_said_of_indexes(records):
    result = evaluate(Numbers(), records[:5], Settings(cached=False))
    assert result.indexes == ()
    assert "indexes" not in result.to_json()


def test_a_wrong_kind_is_refused_before_anything_is_encoded(records):
    encoder = Numbers()
    with pytest.raises(VectorError, match=r"'IVF4,Flat' on 120 vectors: it needs at least 156"):
        evaluate(encoder, records, Settings(indexes=("Flat", "IVF4,Flat"), cached=False))
    assert encoder.encoded == 0


def test_it_is_tuned_on_everyday_queries_and_stored_rows_alone(records, monkeypatch):
    tuned_on, tune = [], choice.tune

    def noted(index, probes, *more):
        tuned_on.append(probes)
        return tune(index, probes, *more)

    monkeypatch.setattr(choice, "tune", noted)
    result = evaluate(Numbers(), records, Settings(indexes=("SQ8",), cached=False))
    galleries = (result.details.image_vectors, result.details.text_vectors)
    for probes, gallery, stored in zip(tuned_on, galleries, ("image", "stored"), strict=True):
        assert list(probes) == ["text", stored]
        np.testing.assert_array_equal(probes["text"], Numbers().encode_texts(everyday_queries()))
        assert {row.tobytes() for row in probes[stored]} <= {row.tobytes() for row in gallery}
    assert evaluate_retrieval(*galleries, result.details.owner)["t2i_hit@1"] == result.indexes[0].metrics["t2i_hit@1"]
