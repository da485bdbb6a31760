"""Evaluation with an encoder whose numbers can be worked out by hand, and against slow computations."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from retrieval import evaluation
from retrieval.errors import DataError
from retrieval.evaluation import PROMPT, class_vectors, classify, encode_files, evaluate
from retrieval.pairs import Record, checksum, read_pairs
from tests.fakes import COLOURS, ColourEncoder


class Colours(ColourEncoder):
    """Reads words with a full stop behind them, as prompts have."""

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
    result = evaluate(Colours(), records, ks=(1, 2, 3))
    assert result.metrics == {
        "t2i_hit@1": pytest.approx(2 / 5),
        "t2i_hit@2": pytest.approx(4 / 5),
        "t2i_hit@3": 1.0,
        "t2i_median_rank": 2.0,
        "i2t_hit@1": pytest.approx(2 / 3),
        "i2t_hit@2": 1.0,
        "i2t_hit@3": 1.0,
        "i2t_median_rank": 1.0,
    }
    assert (result.task, result.model, result.fingerprint) == ("retrieval", "colours", "colours-1")
    assert (result.images, result.texts, result.checksum, result.note) == (4, 5, checksum(records), "")


def test_a_distractor_counts(paint):
    without = evaluate(Colours(), hand_worked(paint)[:3])
    assert without.metrics["t2i_hit@1"] == pytest.approx(3 / 5)  # yellow no longer stands before red


def test_numbers_are_plain_and_keys_those_of_the_design(paint):
    metrics = evaluate(Colours(), hand_worked(paint)).metrics
    assert list(metrics) == [
        f"{way}_{name}" for way in ("t2i", "i2t") for name in ("hit@1", "hit@5", "hit@10", "median_rank")
    ]
    assert all(type(value) is float for value in metrics.values())
    json.dumps(metrics)


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
    result = classify(Colours(), records)
    assert result.metrics == {"top1": pytest.approx(5 / 7), "top5": pytest.approx(6 / 7)}
    assert (result.task, result.images, result.texts, result.note) == ("classification", 7, 7, "")
    assert result.checksum == checksum(records)


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
    assert classify(Colours(), records, ["{name}"]).metrics["top1"] == 0.5  # nearer to white than to red
    assert classify(Colours(), records, ["{name} blue"]).metrics["top1"] == 1.0


# ---- pictures and errors ---------------------------------------------------------------------------------------------


def test_files_are_encoded_in_order_across_batches(paint, monkeypatch):
    random = np.random.default_rng(0)
    paths = [paint(f"{i:02}.png", random.random(3)) for i in range(11)]
    expected = Colours().encode_images([Image.open(path) for path in paths])
    told = []
    for batch in (1, 4, 11, 64):
        monkeypatch.setattr(evaluation, "_BATCH", batch)
        told.clear()
        vectors = encode_files(Colours(), paths, lambda done, total: told.append((done, total)))
        np.testing.assert_array_equal(vectors, expected)
        assert told[-1] == (11, 11)
        assert told == sorted(told)
    assert encode_files(Colours(), []).shape == (0, 3)


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
    lines.append({"image": "red.png", "captions": ["blue"], "split": "train"})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert evaluate(Colours(), read_pairs(tmp_path / "pairs.jsonl", "test")).metrics["t2i_hit@1"] == pytest.approx(
        2 / 5
    )
