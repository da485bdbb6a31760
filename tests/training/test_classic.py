"""The classic pair: a CNN and an LSTM from random weights, as a user trains them, searches with them, and goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from retrieval.bundle import Bundle  # noqa: E402
from retrieval.encoders import load_encoder  # noqa: E402
from retrieval.errors import DataError, ModelError  # noqa: E402
from retrieval.evaluation import evaluate  # noqa: E402
from retrieval.onnx_encoder import OnnxEncoder  # noqa: E402
from retrieval.pairs import read_pairs  # noqa: E402
from retrieval.training import config as recipes  # noqa: E402
from retrieval.training import loop, models  # noqa: E402
from retrieval.training.classic import (  # noqa: E402
    CLASSIC,
    CNN,
    LSTM,
    put_word_vectors,
    split_words,
    word_tokenizer,
    words_of,
)
from retrieval.training.export import NormalisedTower  # noqa: E402
from retrieval.training.parameters import tower_layers, trainable_groups  # noqa: E402
from tests.cli.commands import complaint, diptych  # noqa: E402
from tests.training.drawings import COLOURS, SHAPES, draw, weights  # noqa: E402

SENTENCES = ["a red circle", "", "a", "?!", "circle", "An unheard-of BLACK cross. " * 30, "a drawing of a green square"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Twenty drawings of each name to learn from, and one that is not among them."""
    root, random, lines = tmp_path_factory.mktemp("drawn"), np.random.default_rng(0), []
    for colour in COLOURS:
        for shape in SHAPES:
            for number in range(21):
                said, name = f"a {colour} {shape}", f"{len(lines):03}.png"
                draw(colour, shape, random).save(root / name)
                captions = [said, f"A drawing of {said}."] if number else [said]
                lines.append({"image": name, "captions": captions, "split": "train" if number else "val"})
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    few = [line for line in lines if line["split"] == "val"]
    (root / "few.jsonl").write_text(
        "\n".join(json.dumps({**line, "split": s}) for line in few for s in ("train", "val"))
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield SimpleNamespace(root=root, pairs=root / "pairs.jsonl", few=root / "few.jsonl")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(drawn):
    """What the command does of ``--model scratch:cnn-lstm``, in as many epochs as drawings need."""
    config = recipes.config_for([drawn.pairs], CLASSIC)
    config = recipes.with_changes(config, {"epochs": 20.0, "batch_size": 20, "precision": "fp32"})
    loop.train(config, drawn.root / "run")
    return drawn.root / "run"


@pytest.fixture
def quick(drawn, tmp_path):
    """A run of a few steps on a drawing of each name."""

    def quick(name, model=CLASSIC, **changes):
        changes = {"epochs": 2.0, "batch_size": 10, "image_size": 32, "precision": "fp32", **changes}
        loop.train(recipes.with_changes(recipes.config_for([drawn.few], model), changes), tmp_path / name)
        return tmp_path / name

    return quick


# ---- what it learns --------------------------------------------------------------------------------------------------


def test_drawings_are_learnt_from_random_weights(drawn, trained):
    scores = evaluate(load_encoder(str(trained)), read_pairs(drawn.pairs, "val")).metrics
    assert (scores["t2i_hit@1"], scores["i2t_hit@1"]) == (1.0, 1.0)
    before = json.loads((trained / "log.jsonl").read_text().splitlines()[0])
    assert max(before["val_t2i_hit@1"], before["val_i2t_hit@1"]) <= 0.3  # by chance 0.05


def test_other_sentences_of_the_same_words_find_them_too(drawn, trained):
    encoder = load_encoder(str(trained))
    same = ["a red circle", "A RED circle!", " a  red\ncircle. "]
    rows = encoder.encode_texts([*same, "a drawing of a red circle", "a blue circle", "a red square"])
    np.testing.assert_array_equal(rows[:3], rows[[0, 0, 0]])
    assert rows[0] @ rows[3] > max(rows[0] @ rows[4], rows[0] @ rows[5]) + 0.1


# ---- torch, ONNX, and one sentence at a time -------------------------------------------------------------------------


@torch.inference_mode()
def test_the_bundle_s_vectors_are_torch_s(drawn, trained):
    start, encoder = models.start_from_bundle(str(trained)), OnnxEncoder(Bundle.load(trained))
    start.model.eval()
    photos = [Image.open(drawn.root / f"{number:03}.png").convert("RGB") for number in (0, 30, 60)]
    tower = NormalisedTower(start.model.image, start.preprocessing)
    ours = tower(torch.from_numpy(start.preprocessing.pixels(photos)))
    np.testing.assert_allclose(encoder.encode_images(photos), ours, atol=1e-5)
    tokenizer = models.Tokenizer.from_str(start.tokenizer_json)
    ids = torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(SENTENCES)])
    np.testing.assert_allclose(encoder.encode_texts(SENTENCES), start.model.text(ids), atol=1e-5)
    for sentence, row in zip(SENTENCES, encoder.encode_texts(SENTENCES), strict=True):  # nothing but its own words
        alone = torch.tensor([tokenizer.encode(sentence).ids])
        assert 1 <= alone.shape[1] <= 64
        np.testing.assert_allclose(row, start.model.text(alone)[0], atol=1e-5, err_msg=sentence)
        np.testing.assert_allclose(row, encoder.encode_texts([sentence])[0], atol=1e-5, err_msg=sentence)


def test_the_lstm_by_numpy():
    """Word by word, each sentence alone, against a padded batch."""
    torch.manual_seed(0)
    tower = LSTM(11, 6).double()
    p = {name: value.detach().numpy() for name, value in tower.state_dict().items()}
    sentences = [[5, 3, 9, 2], [2], [7, 1, 2]]

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    expected = []
    for ids in sentences:
        h, c = np.zeros(512), np.zeros(512)
        for word in ids:
            gates = p["lstm.weight_ih_l0"] @ p["words"][word] + p["lstm.weight_hh_l0"] @ h
            i, f, g, o = np.split(gates + p["lstm.bias_ih_l0"] + p["lstm.bias_hh_l0"], 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        expected.append(h)
    padded = torch.tensor([[*ids, *[0] * (6 - len(ids))] for ids in sentences])
    np.testing.assert_allclose(tower(padded).detach().numpy(), expected, atol=1e-12)


def test_the_cnn_takes_pictures_of_any_size():
    tower = CNN().eval()
    for size in ((32, 32), (1, 1), (37, 90)):
        assert tower(torch.zeros(2, 3, *size)).shape == (2, CNN.features)


# ---- words -----------------------------------------------------------------------------------------------------------


def test_words_of_captions_and_their_ids():
    assert split_words("It's a DOG's life, in 1,999 cafe\u0301s!") == [
        *("it", "s", "a", "dog", "s", "life", "in", "1", "999", "cafés")
    ]
    words = words_of(["b a", "A b c", "a \ud800"])
    assert words[:3] == ["a", "b", "c"]  # by how often, then by the alphabet
    tokenizer = word_tokenizer(["a", "b", "c"], 4)
    ids = [encoding.ids for encoding in tokenizer.encode_batch(["c a", "", "b [END] [PAD]", "a b c a b"])]
    assert ids == [[5, 3, 2, 0], [2, 0, 0, 0], [4, 1, 1, 2], [3, 4, 5, 2]]
    assert models.Tokenizer.from_str(tokenizer.to_str()).encode("c a").ids == [5, 3, 2]


def test_no_more_words_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr("retrieval.training.classic._MOST_WORDS", 2)
    assert words_of(["c c c b a a"]) == ["c", "a"]


def test_words_without_a_vector_have_one_of_the_same_spread():
    torch.manual_seed(0)
    tower, words = LSTM(3 + 500, 40, fixed=True), [f"w{number}" for number in range(500)]
    vectors = {f"w{n}": np.random.default_rng(n).normal(0, 7, 40).astype(np.float32) for n in range(400, 450)}
    put_word_vectors(tower, words, vectors)
    for word, vector in vectors.items():
        np.testing.assert_array_equal(tower.words[3 + words.index(word)], vector)
    assert not tower.words[:2].any()  # padding, and what is unknown
    assert 6 < float(tower.words[2:403].std()) < 8
    assert len(torch.unique(tower.words[2:], dim=0)) == 501


@pytest.fixture
def vectors(tmp_path):
    """Words of the captions without "triangle"; and colours that mean nearly the same as two of them."""
    random = np.random.default_rng(0)
    rows = {
        word: random.normal(0, 0.3, 20) for word in ("drawing", "of", *COLOURS, *(s for s in SHAPES if s != "triangle"))
    }
    rows["a"] = random.normal(0, 0.3, 20)
    rows["scarlet"], rows["azure"] = (rows[word] + random.normal(0, 0.03, 20) for word in ("red", "blue"))
    file = tmp_path / "vectors.txt"
    file.write_text("".join(" ".join([word, *(f"{value:.6f}" for value in row)]) + "\n" for word, row in rows.items()))
    return file


def test_search_knows_words_of_the_vectors_that_no_caption_has(drawn, vectors, tmp_path):
    notes = []
    config = recipes.with_changes(
        recipes.config_for([drawn.pairs], CLASSIC),
        {"word_vectors": str(vectors), "epochs": 4.0, "batch_size": 20, "image_size": 48},
    )
    loop.train(config, tmp_path / "run", note=notes.append)
    assert "vectors.txt: 11 of 12 words of the captions have vectors; 2 other words are known as well" in notes
    encoder, bundle = load_encoder(str(tmp_path / "run")), Bundle.load(tmp_path / "run")
    colours = encoder.encode_texts([f"a {colour} circle" for colour in COLOURS])
    for word, colour in (("scarlet", "red"), ("azure", "blue")):
        assert COLOURS[int(np.argmax(colours @ encoder.encode_texts([f"a {word} circle"])[0]))] == colour
    assert bundle.source["words"] == {"vocabulary": 3 + 12 + 2, "width": 20, "fixed": True}
    record = next(entry for entry in bundle.training["data"] if "word_vectors" in entry)
    assert record["word_vectors"] == "vectors.txt"
    assert str(vectors) not in (tmp_path / "run" / "model.json").read_text()
    # The file's numbers are in the bundle as they were, but for fp16, and stay there when it is trained further.
    tokenizer = models.Tokenizer.from_file(str(tmp_path / "run" / "tokenizer.json"))
    table = models.start_from_bundle(str(tmp_path / "run")).model.text.trunk.words
    for line in vectors.read_text().splitlines():
        word, *numbers = line.split()
        np.testing.assert_allclose(table[tokenizer.token_to_id(word)], np.float32(numbers), atol=1e-3, err_msg=word)


def test_resumed_with_other_words_it_is_refused(drawn, vectors, quick, tmp_path, ended_after):
    ended_after(1)
    with pytest.raises(KeyboardInterrupt):
        quick("run", word_vectors=str(vectors), checkpoint_seconds=0.0)
    vectors.write_text(vectors.read_text().replace("azure", "ultramarine"))  # as many words as before
    with pytest.raises(DataError, match="words, pictures or captions are others than when it began"):
        loop.resume(tmp_path / "run")


# ---- through the same doors as every other model ---------------------------------------------------------------------


def test_the_layers_of_both_towers(drawn):
    model = models.start_model(recipes.config_for([drawn.few], CLASSIC)).model
    layers = [(layer.tower, layer.name, layer.depth) for layer in tower_layers(model)]
    assert layers == [
        ("image", "stem", 4),
        *(("image", f"block {number}", 4 - number) for number in (1, 2, 3)),
        ("image", "top", 0),
        *(("text", name, depth) for name, depth in (("stem", 2), ("block 1", 1), ("top", 0))),
    ]
    assert sorted(name for layer in tower_layers(model) for name in layer.parameters) == sorted(
        name for name, _ in model.named_parameters() if name not in ("log_scale", "bias")
    )
    words = [g for g in trainable_groups(model, learning_rate=1, weight_decay=0.5) if g["weight_decay"] == 0]
    assert any(parameter is model.text.trunk.words for group in words for parameter in group["params"])


@pytest.mark.parametrize("what", ["all", "image", "text", "last-1"])
def test_what_learns_and_what_stays(quick, trained, what):
    run = quick("run", str(trained), train=what, anchor=0.1, ema=0.9)
    before, after = (models.start_from_bundle(str(folder)).model.state_dict() for folder in (trained, run))
    changed = {
        name for name in before if not torch.equal(before[name], after[name]) if before[name].is_floating_point()
    }
    image, text = ({name for name in changed if name.startswith(side)} for side in ("image", "text"))
    assert bool(image) == (what != "text")
    assert bool(text) == (what != "image")
    assert ("text.trunk.words" in changed) == (what in ("all", "text"))
    assert ("image.trunk.conv_stem.weight" in changed) == (what in ("all", "image"))


def test_a_guard_and_frozen_towers_from_its_bundle(drawn, quick, trained):
    """Heads alone, from cached features, guarded by what it knew: hit@1 stays what it was."""
    run = quick("run", str(trained), train="heads", guard=recipes.guards([drawn.pairs]))
    scores = evaluate(load_encoder(str(run)), read_pairs(drawn.pairs, "val")).metrics
    assert min(scores["t2i_hit@1"], scores["i2t_hit@1"]) >= 0.9


def test_from_its_bundle_it_goes_on_where_it_was(quick, drawn, trained):
    first = quick(
        "still",
        str(trained),
        train="all",
        learning_rate=0.0,
        image_tower_learning_rate=0.0,
        text_tower_learning_rate=0.0,
        word_dropout=0.0,
    )
    before, after = (load_encoder(str(folder)) for folder in (trained, first))
    np.testing.assert_allclose(after.encode_texts(SENTENCES), before.encode_texts(SENTENCES), atol=1e-5)
    assert (first / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()


def test_ended_at_any_step_it_goes_on_bit_for_bit(quick, tmp_path, ended_after):
    settings = {"ema": 0.9, "word_dropout": 0.3, "checkpoint_seconds": 0.0, "part": 4}
    whole = quick("whole", **settings)
    ended_after(1, 3)
    with pytest.raises(KeyboardInterrupt):
        quick("ended", **settings)
    torch.manual_seed(99)
    with pytest.raises(KeyboardInterrupt):
        loop.resume(tmp_path / "ended")
    loop.resume(tmp_path / "ended")
    assert weights(tmp_path / "ended") == weights(whole)


def test_hidden_words_become_the_unknown_word(drawn, trained):
    start = models.start_from_bundle(str(trained))
    towers = loop.TrainedTowers(
        start.model, start.preprocessing, start.tokenizer_json, start.context_length, "cpu", 256, 1.0
    )
    heard = []
    start.model.text.trunk.register_forward_pre_hook(lambda _, ids: heard.append(ids[0]))
    start.model.train()
    towers.text_features(towers.sentences(["a red circle", "a red circle " * 5]))
    unseen, short = heard[0][1], heard[0][0]
    assert unseen[:16].tolist() == [1] * 15 + [2]  # all words, but not the end
    assert 1 not in short.tolist()  # may be a name: without one of its words none any more


# ---- by the command and in recipes -----------------------------------------------------------------------------------


def test_the_command_and_a_recipe_begin_alike(drawn, vectors, tmp_path):
    options = ["--epochs", "1", "--seed", "3", "--word-vectors", vectors]
    run = diptych("train", drawn.few, "--model", CLASSIC, "-o", tmp_path / "run", *options)
    assert run.returncode == 0, run.stderr
    assert "vectors.txt: 11 of 12" not in run.stderr  # without "drawing" and "of" there are fewer
    assert "vectors.txt: 9 of 10 words" in run.stderr
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'model = "{CLASSIC}"\nepochs = 1\nseed = 3\nword_vectors = "{vectors}"\n[[sources]]\npairs = "{drawn.few}"\n'
    )
    loop.train(recipes.load_config(recipe), tmp_path / "again")
    assert weights(tmp_path / "run") == weights(tmp_path / "again")


def test_mistakes(drawn, vectors, quick, trained, tmp_path):
    config = recipes.config_for([drawn.few], CLASSIC)
    assert (config.model, config.image_tower, config.text_tower, config.train) == ("", "cnn", "lstm", "all")
    with pytest.raises(DataError, match='the tower cnn is random, and would stay so: set train = "all"'):
        replace(config, train="heads")
    with pytest.raises(DataError, match="word_vectors are for an LSTM that begins anew"):
        quick("further", str(trained), word_vectors=str(vectors))
    said = complaint(diptych("train", drawn.few, "--model", CLASSIC, "--word-vectors", "none", "-o", tmp_path / "r"))
    assert "none cannot be read: No such file" in said
    assert not (tmp_path / "r").exists()
    vectors.write_text("!!! 1 2 3\n")
    with pytest.raises(DataError, match="has a vector of none of the 10 words of the captions"):
        quick("none", word_vectors=str(vectors))
    with pytest.raises(DataError, match="class_rows are rows of EfficientNet-Lite2's classifier"):
        quick("rows", vocabulary=recipes.Vocabulary(str(drawn.few)))


@pytest.mark.parametrize("words", [{"vocabulary": -1}, {"vocabulary": 9, "size": 3}, {}, {"vocabulary": 9}, 7])
def test_a_description_that_is_not_the_network_s(trained, tmp_path, words):
    bundle = Bundle.load(trained).copy_to(tmp_path / "copy")
    replace(bundle, source={**bundle.source, "words": words}).save()
    with pytest.raises(ModelError, match="cannot be trained further") as caught:
        models.start_from_bundle(str(tmp_path / "copy"))
    assert "\n" not in str(caught.value)
