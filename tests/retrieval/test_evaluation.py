"""Evaluation with an encoder whose numbers can be worked out by hand, and against slow computations."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from retrieval.errors import DataError, UsageError
from retrieval.evaluation import (
    PROMPT,
    Settings,
    class_vectors,
    classify,
    clip_benchmark_result,
    dataset_name,
    evaluate,
    trec_qrels,
    trec_run,
    write_lines,
)
from retrieval.metrics import evaluate_retrieval
from retrieval.pairs import Record, checksum, read_pairs
from tests.fakes import COLOURS, ColourEncoder


class Colours(ColourEncoder):
    """Reads words with a full stop behind them, as prompts have."""

    fingerprint = "colours-with-stops"

    def encode_texts(self, texts):
        return super().encode_texts([text.replace(".", " ") for text in texts])


@pytest.fixture
def paint(tmp_path):
    def make(name, rgb):
        path = tmp_path / name
        Image.new("RGB", (12, 9), tuple(int(255 * c) for c in (COLOURS[rgb] if isinstance(rgb, str) else rgb))).save(
            path
        )
        return path

    return make


# ---- retrieval -------------------------------------------------------------------------------------------------------


def hand_worked(paint):
    """Cosines, to two digits (a picture's RGB is nearly its axis; yellow lies between red and green):

                              red   green blue  yellow
    red         red           1     0     0     .71      rank of its own picture: 1
    red         2 red green   .89   .45   0     .95      2
    green       green         0     1     0     .71      1
    green       green 3 blue  0     .32   .95   .22      2
    blue        blue 2 green  0     .89   .45   .63      3

    Best own sentence of red: 1, above all others; of green: 1, likewise; of blue: .45, with .95 above it.
    """
    return [
        Record(paint("red.png", "red"), ("red", "red red green")),
        Record(paint("green.png", "green"), ("green", "green blue blue blue")),
        Record(paint("blue.png", "blue"), ("blue green green",)),
        Record(paint("yellow.png", "yellow")),  # no caption: it stands in the way of others all the same
    ]


def test_retrieval_by_hand(paint):
    records = hand_worked(paint)
    result = evaluate(Colours(), records, Settings(ks=(1, 2, 3)))
    expected = {  # text ranks 1 2 1 2 3; of red's texts 1 and 3, of green's 1 and 3, of blue's 2
        "t2i_hit@1": 2 / 5,
        "t2i_hit@2": 4 / 5,
        "t2i_hit@3": 1.0,
        "t2i_recall@1": 2 / 5,
        "t2i_r_precision": 2 / 5,
        "t2i_map": (1 + 1 / 2 + 1 + 1 / 2 + 1 / 3) / 5,
        "t2i_mrr": (1 + 1 / 2 + 1 + 1 / 2 + 1 / 3) / 5,
        "t2i_ndcg@2": (1 + 1 / np.log2(3) + 1 + 1 / np.log2(3) + 0) / 5,
        "t2i_mean_rank": 9 / 5,
        "t2i_median_rank": 2.0,
        "i2t_hit@1": 2 / 3,
        "i2t_hit@2": 1.0,
        "i2t_hit@3": 1.0,
        "i2t_mean_rank": 4 / 3,
        "i2t_median_rank": 1.0,
        "rsum": 2 / 5 + 1 + 1 + 2 / 3 + 1 + 1,
    }
    assert {name: result.metrics[name] for name in expected} == pytest.approx(expected)
    assert (result.task, result.model, result.fingerprint) == ("retrieval", "colours", "colours-with-stops")
    assert (result.images, result.texts, result.checksum, result.note) == (4, 5, checksum(records), "")


def test_a_distractor_counts(paint):
    without = evaluate(Colours(), hand_worked(paint)[:3])
    assert without.metrics["t2i_hit@1"] == pytest.approx(3 / 5)  # yellow no longer stands before red


def test_numbers_are_plain_and_keys_those_of_the_design(paint):
    result = evaluate(Colours(), hand_worked(paint), Settings(bootstrap=20, slices=("caption-length",)))
    at_k = [f"{name}@{k}" for name in ("hit", "recall", "ndcg") for k in (1, 5, 10)]
    plain = ["r_precision", "map", "mrr", "mean_rank", "median_rank"]
    names = [f"{way}_{name}" for way in ("t2i", "i2t") for name in (*at_k, *plain)] + ["rsum"]
    assert sorted(result.metrics) == sorted(names)
    assert sorted(result.intervals) == sorted(names)
    fields = json.loads(json.dumps(result.to_json()))
    assert all(type(value) is float for value in fields["metrics"].values())
    for name, (low, high) in fields["intervals"].items():
        assert low <= fields["metrics"][name] <= high, name
    assert "details" not in fields


def test_the_order_of_the_pictures_does_not_matter(paint):
    records = hand_worked(paint)
    assert evaluate(Colours(), records[::-1]).metrics == evaluate(Colours(), records).metrics


# ---- classification --------------------------------------------------------------------------------------------------


def seven(paint):
    """Seven pictures, seven classes; a class's name is read as the sum of the colours in it."""
    return [
        Record(paint("a.png", "red"), labels=("red",)),  # right
        Record(paint("b.png", "yellow"), labels=("red", "yellow")),  # right: one of its two labels is the nearest
        Record(paint("c.png", "green"), labels=("dark_blue",)),  # wrong: five classes and more lie nearer
        Record(paint("d.png", "blue"), labels=("white",)),  # second, behind dark_blue
        Record(paint("e.png", "green"), labels=("green",)),  # right
        Record(paint("f.png", (1, 0, 0.5)), labels=("red_red_blue",)),  # right
        Record(paint("g.png", (0.5, 1, 0)), labels=("green_yellow",)),  # right
    ]


def test_classification_by_hand(paint):
    records = seven(paint)
    result = classify(Colours(), records, Settings(bootstrap=50))
    assert result.metrics["top1"] == pytest.approx(5 / 7)
    assert result.metrics["top5"] == pytest.approx(6 / 7)
    # of each class: dark_blue 0/1, green 1/1, green_yellow 1/1, red 2/2, red_red_blue 1/1, white 0/1, yellow 1/1
    assert result.metrics["mean_per_class"] == pytest.approx(5 / 7)
    assert list(result.intervals) == ["top1", "top5", "mean_per_class"]
    assert (result.task, result.images, result.texts, result.note) == ("classification", 7, 7, "")
    assert result.checksum == checksum(records)
    names, confusion = result.details.names, result.details.result.confusion
    assert confusion.sum() == 7
    assert confusion[names.index("white"), names.index("dark_blue")] == 1


def test_caltech_s_background_is_left_out_and_the_note_says_so(paint):
    records = [
        *seven(paint),
        Record(paint("h.png", "white"), labels=("BACKGROUND_Google",)),
        Record(paint("i.png", "blue"), labels=("BACKGROUND_Google", "red")),
        Record(paint("j.png", "blue")),
    ]
    result = classify(Colours(), records)
    assert result.metrics == classify(Colours(), seven(paint)).metrics
    assert (result.images, result.texts) == (7, 7)
    assert result.note == "3 pictures without a nameable label left out (BACKGROUND_Google)"


def test_underscores_are_read_as_spaces_and_the_prompt_is_the_design_s():
    heard = []

    class Listening(Colours):
        def encode_texts(self, texts):
            heard.extend(texts)
            return super().encode_texts(texts)

    class_vectors(Listening(), ["dark_blue", "red"])
    assert PROMPT == "a photo of a {name}."
    assert heard == ["a photo of a dark blue.", "a photo of a red."]


def test_prompt_ensemble_against_a_slow_computation(paint):
    names, prompts = (
        ["red", "green_blue", "yellow"],
        ["{name}", "white {name} white", "a {name}.", "{name} blue {oops}"],
    )
    encoder = Colours()
    expected = []
    for name in names:
        total = np.zeros(3)
        for prompt in prompts:
            words = prompt.replace("{name}", name).replace("_", " ").replace(".", " ").split()
            colours = [np.array(COLOURS[word], float) for word in words if word in COLOURS]
            one = sum(colours)
            total += one / np.sqrt((one**2).sum())
        expected.append(total / np.sqrt((total**2).sum()))
    np.testing.assert_allclose(class_vectors(encoder, names, prompts), expected, atol=1e-6)
    # A class's prompts are its own: an ensemble that mixed them up would not leave a lone prompt as it is.
    np.testing.assert_allclose(
        class_vectors(encoder, names, ["{name}"]), encoder.encode_texts(["red", "green blue", "yellow"])
    )


def test_prompts_decide(paint):
    """`{name} blue` makes both classes bluish; the yellowish picture changes its class."""
    records = [
        Record(paint("x.png", (1, 0.2, 0.9)), labels=("red",)),
        Record(paint("y.png", "white"), labels=("white",)),
    ]
    for place in ("{name}", "{c}", "{}"):
        one, blue = Settings(prompts=[place]), Settings(prompts=[f"{place} blue"])
        assert classify(Colours(), records, one).metrics["top1"] == 0.5  # nearer to white than to red
        assert classify(Colours(), records, blue).metrics["top1"] == 1.0


# ---- pictures and errors ---------------------------------------------------------------------------------------------


def test_unreadable_pictures_are_counted_and_the_first_is_named(paint, tmp_path):
    records = hand_worked(paint)
    (tmp_path / "green.png").write_bytes((tmp_path / "green.png").read_bytes()[:30])
    (tmp_path / "yellow.png").write_text("a poem")
    with pytest.raises(DataError) as caught:
        evaluate(Colours(), records)
    assert "\n" not in str(caught.value)
    assert f"2 of 4 pictures cannot be read, the first: {tmp_path / 'green.png'}: " in str(caught.value)
    with pytest.raises(DataError, match=r"1 of 1 pictures cannot be read, .*yellow\.png: not an image: plain text"):
        classify(Colours(), [Record(tmp_path / "yellow.png", labels=("yellow",))])


def test_nothing_to_measure(paint):
    red = paint("red.png", "red")
    with pytest.raises(DataError, match="none of these pictures has a caption: for labels use --task classification"):
        evaluate(Colours(), [Record(red, labels=("red",))])
    for records in ([Record(red, ("red",))], [Record(red, labels=("BACKGROUND_Google",))], []):
        with pytest.raises(DataError, match="none of these pictures has a label: for captions use --task retrieval"):
            classify(Colours(), records)
    with pytest.raises(DataError, match="caption"):
        evaluate(Colours(), [])


def test_from_a_pairs_file(paint, tmp_path):
    """The same numbers by way of the file that a user writes."""
    lines = [{"image": r.image.name, "captions": list(r.texts), "split": "test"} for r in hand_worked(paint)]
    lines.append({"image": paint("other.png", "red").name, "captions": ["blue"], "split": "train"})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert evaluate(Colours(), read_pairs(tmp_path / "pairs.jsonl", "test")).metrics["t2i_hit@1"] == pytest.approx(
        2 / 5
    )


# ---- ties, several pictures for a caption, slices, another model -----------------------------------------------------


def test_ties_by_hand(paint):
    records = [Record(paint("a.png", "red"), ("red",)), Record(paint("b.png", "red")), Record(paint("c.png", "red"))]
    rank = {
        ties: evaluate(Colours(), records, Settings(ties=ties)).metrics["t2i_mean_rank"]
        for ties in ("pessimistic", "mean")
    }
    assert rank == {"pessimistic": 3.0, "mean": 2.0}


def test_equal_captions_of_two_pictures(paint):
    """As papers count: two queries, each with one right picture. Merged: one query with two."""
    records = [
        Record(paint("a.png", "red"), ("red", "green")),
        Record(paint("b.png", (1, 0.2, 0)), ("red",)),
        Record(paint("c.png", "green"), ("green green",)),
    ]
    apart = evaluate(Colours(), records)
    assert (apart.texts, apart.metrics["t2i_recall@1"]) == (4, 2 / 4)  # "red" finds a, which is wrong for b
    merged = evaluate(Colours(), records, Settings(ks=(1, 2), merge_captions=True))
    assert (merged.texts, merged.images) == (3, 3)
    assert merged.metrics["t2i_hit@1"] == pytest.approx(2 / 3)
    assert merged.metrics["t2i_recall@1"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert merged.metrics["t2i_recall@2"] == pytest.approx((1 + 0 + 1) / 3)
    assert len(list(trec_qrels(merged))) == 2 * 4


def sliced(records, column, **settings):
    result = evaluate(Colours(), records, Settings(slices=(column,), **settings))
    return {part.name: (part.images, part.texts, part.metrics) for part in result.slices}


def test_slices_are_parts_of_the_queries_ranked_among_everything(paint):
    records = [
        Record(
            paint("red.png", "red"), ("red", "red red green"), ("warm",), columns={"place": "indoors", "year": 2020}
        ),
        Record(
            paint("green.png", "green"), ("green", "green blue blue blue"), ("cold",), columns={"place": "outdoors"}
        ),
        Record(paint("blue.png", "blue"), ("blue green green",), ("cold", "deep"), columns={"place": "outdoors"}),
        Record(paint("yellow.png", "yellow"), columns={"place": ""}),
    ]
    parts = sliced(records, "place")
    assert [(name, *part[:2]) for name, part in parts.items()] == [("place=outdoors", 2, 3), ("place=indoors", 1, 2)]
    assert parts["place=indoors"][2]["t2i_mean_rank"] == pytest.approx((1 + 2) / 2)  # yellow still stands before red
    assert parts["place=outdoors"][2]["t2i_mean_rank"] == pytest.approx((1 + 2 + 3) / 3)
    assert parts["place=outdoors"][2]["i2t_mean_rank"] == pytest.approx((1 + 2) / 2)
    labels = sliced(records, "label")
    assert {name: part[:2] for name, part in labels.items()} == {
        "label=cold": (2, 3),
        "label=warm": (1, 2),
        "label=deep": (1, 1),
    }
    assert [(name, *part[:2]) for name, part in sliced(records, "year").items()] == [("year=2020", 1, 2)]
    lengths = sliced(records, "caption-length")
    assert {name: part[:2] for name, part in lengths.items()} == {
        "caption-length=1": (0, 2),
        "caption-length=3": (0, 2),
        "caption-length=4": (0, 1),
    }
    assert lengths["caption-length=3"][2]["t2i_mean_rank"] == pytest.approx((2 + 3) / 2)
    assert not any(name.startswith("i2t") or name == "rsum" for name in lengths["caption-length=3"][2])


def test_a_column_of_many_numbers_is_sliced_in_quarters(paint):
    records = [Record(paint("red.png", "red"), ("red",), columns={"n": n}) for n in range(12)]
    assert list(sliced(records, "n")) == ["n=0-2", "n=3-5", "n=6-8", "n=9-11"]
    assert sum(part[0] for part in sliced(records, "n").values()) == 12


def test_a_column_that_differs_between_captions(paint):
    records = [
        Record(paint("red.png", "red"), ("red", "red red green"), text_columns={"language": ("en", "de")}),
        Record(paint("green.png", "green"), ("green",), text_columns={"language": ("en",)}),
        Record(paint("yellow.png", "yellow")),
    ]
    parts = sliced(records, "language")
    assert {name: part[:2] for name, part in parts.items()} == {"language=en": (0, 2), "language=de": (0, 1)}
    assert parts["language=de"][2]["t2i_mean_rank"] == 2.0
    with pytest.raises(UsageError, match=r"language differs between captions: .* merged"):
        sliced([*records, Record(paint("x.png", "red"), ("red",))], "language", merge_captions=True)


def test_an_unknown_slice_names_the_known_ones(paint):
    records = [Record(paint("red.png", "red"), ("red",), columns={"place": "here"})]
    with pytest.raises(UsageError, match=r"no column 'plaice' .*: known are caption-length, label, place"):
        sliced(records, "plaice")


def test_slices_of_classification(paint):
    records = [
        Record(paint("a.png", "red"), labels=("red",), columns={"light": "day"}),
        Record(paint("b.png", "red"), labels=("blue",), columns={"light": "night"}),
    ]
    result = classify(Colours(), records, Settings(slices=("light",)))
    assert {part.name: part.metrics["top1"] for part in result.slices} == {"light=day": 1.0, "light=night": 0.0}


class Swapped(Colours):
    """Takes red for green in pictures."""

    name, fingerprint = "swapped", "colours-swapped"

    def encode_images(self, images):
        return super().encode_images(images)[:, [1, 0, 2]]


def test_comparison_with_another_model(paint):
    records = hand_worked(paint)[:3]
    result = evaluate(Colours(), records, Settings(bootstrap=200), other=Swapped())
    alone = evaluate(Swapped(), records)
    comparison = result.comparison
    assert comparison.other.model == "swapped"
    assert comparison.other.metrics == alone.metrics
    for name, change in comparison.differences.items():
        assert change == pytest.approx(result.metrics[name] - alone.metrics[name])
        low, high = comparison.intervals[name]
        assert low <= change <= high
    assert comparison.differences["t2i_hit@1"] > 0
    same = evaluate(Colours(), records, Settings(bootstrap=50), other=Colours()).comparison
    assert set(same.intervals.values()) == {(0.0, 0.0)}  # paired: the same model never differs, whatever is drawn
    fields = result.to_json()["comparison"]
    assert fields["differences"] == comparison.differences
    assert fields["fingerprint"] == "colours-swapped"


def test_comparison_of_classification(paint):
    result = classify(Colours(), seven(paint), Settings(bootstrap=50), other=Swapped())
    assert result.comparison.differences["top1"] == pytest.approx(
        5 / 7 - classify(Swapped(), seven(paint)).metrics["top1"]
    )
    assert list(result.comparison.intervals) == ["top1", "top5", "mean_per_class"]


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_a_second_evaluation_encodes_nothing_and_says_the_same(paint, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    encoder, records = Colours(), hand_worked(paint)
    first = evaluate(encoder, records)
    assert encoder.encoded == 4
    second = evaluate(encoder, records)
    assert encoder.encoded == 4
    assert second.to_json() == first.to_json()
    evaluate(encoder, records, Settings(cached=False))
    assert encoder.encoded == 8


def test_a_cache_that_cannot_be_written_is_said_and_does_no_harm(paint, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    expected = evaluate(Colours(), hand_worked(paint), Settings(cached=False))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = evaluate(Colours(), hand_worked(paint))
    assert result.metrics == expected.metrics
    assert "vectors are not kept for the next time" in result.note


# ---- other people's formats ------------------------------------------------------------------------------------------


def test_clip_benchmark_s_json(paint):
    class Pretrained(Colours):
        name = "ViT-B-32/laion2b"

    result = evaluate(Pretrained(), hand_worked(paint), Settings(ks=(1, 5)))
    assert clip_benchmark_result(result, "colours") == {
        "dataset": "colours",
        "model": "ViT-B-32",
        "pretrained": "laion2b",
        "task": "zeroshot_retrieval",
        "metrics": {
            "image_retrieval_recall@1": result.metrics["t2i_hit@1"],
            "image_retrieval_recall@5": result.metrics["t2i_hit@5"],
            "text_retrieval_recall@1": result.metrics["i2t_hit@1"],
            "text_retrieval_recall@5": result.metrics["i2t_hit@5"],
        },
        "language": "en",
    }
    single = [record for record in seven(paint) if len(record.labels) == 1]
    named = clip_benchmark_result(classify(Colours(), single), "seven")
    assert (named["task"], named["pretrained"]) == ("zeroshot_classification", "")
    assert named["metrics"] == {
        "acc1": pytest.approx(4 / 6),
        "acc5": pytest.approx(5 / 6),
        "mean_per_class_recall": pytest.approx(4 / 6),
    }
    few = clip_benchmark_result(classify(Colours(), single[:2]), "two")
    assert np.isnan(few["metrics"]["acc5"])
    several = clip_benchmark_result(classify(Colours(), seven(paint)), "several")
    assert list(several["metrics"]) == ["mean_average_precision"]


def test_a_run_and_its_judgements_give_the_same_measures(paint, tmp_path):
    """Read back as trec_eval does: by query, sorted by score."""
    result = evaluate(Colours(), hand_worked(paint), Settings(ks=(1, 2)))
    write_lines(trec_run(result), tmp_path / "run")
    right, found = {}, {}
    for line in trec_qrels(result):
        query, zero, document, relevance = line.split()
        assert (zero, relevance) == ("0", "1")
        right.setdefault(query, set()).add(document)
    for line in (tmp_path / "run").read_text().splitlines():
        query, q0, document, rank, score, tag = line.split()
        assert (q0, tag) == ("Q0", "colours")
        found.setdefault(query, []).append((int(rank), -float(score), document))
    assert set(found) == set(right)
    reciprocal = {"t2i": [], "i2t": []}
    for query, rows in found.items():
        assert rows == sorted(rows)
        assert [rank for rank, *_ in rows] == list(range(1, len(rows) + 1))
        ranks = [rank for rank, _, document in rows if document in right[query]]
        reciprocal[query[:3]].append(1 / min(ranks))
    for way, values in reciprocal.items():
        assert result.metrics[f"{way}_mrr"] == pytest.approx(np.mean(values))
    assert "t2i:red.png#1" in found
    assert "i2t:yellow.png" not in found
    assert len(list(trec_run(result, depth=1))) == 5 + 3


def test_names_in_runs_have_no_space_and_no_twin(paint, tmp_path):
    (tmp_path / "b").mkdir()
    records = [Record(paint("a b.png", "red"), ("red",)), Record(paint("b/a b.png", "green"), ("green",))]
    lines = [line.split() for line in trec_run(evaluate(Colours(), records))]
    assert {len(line) for line in lines} == {6}
    assert {line[0] for line in lines} == {
        "t2i:0-a%20b.png#0",
        "t2i:1-a%20b.png#0",
        "i2t:0-a%20b.png",
        "i2t:1-a%20b.png",
    }


def test_no_run_of_a_classification(paint):
    with pytest.raises(UsageError, match="--task retrieval"):
        next(trec_run(classify(Colours(), seven(paint))))
    with pytest.raises(UsageError, match="cannot be written"):
        write_lines(iter(["x"]), paint("d.png", "red").parent / "no" / "run")


def test_what_data_are_called(tmp_path):
    assert dataset_name(tmp_path / "flickr8k" / "captions.jsonl") == "flickr8k"
    assert dataset_name(tmp_path / "caltech101.jsonl") == "caltech101"


def test_the_arrays_behind_it_give_the_same_numbers(paint):
    """The one call for people with arrays of their own."""
    result = evaluate(Colours(), hand_worked(paint), Settings(bootstrap=30))
    details = result.details
    scores = evaluate_retrieval(details.image_vectors, details.text_vectors, details.owner, bootstrap=30)
    assert dict(scores) == result.metrics
    assert scores.intervals == result.intervals
