"""The network, how it learns, and the decoders: one conformance test over all of them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from indexes.errors import ModelMismatch, VectorError  # noqa: E402
from retrieval.encoders import find_bundle, load_encoder  # noqa: E402
from retrieval.errors import DataError, ModelError  # noqa: E402
from retrieval.heads.captioning import training  # noqa: E402
from retrieval.heads.captioning.decoders import (  # noqa: E402
    CARD,
    GRAPH,
    KINDS,
    MEMORY,
    PIECES,
    Card,
    ConsensusDecoder,
    decode_all,
    decoder_of,
    load_decoder,
    new_decoder,
)
from retrieval.heads.captioning.export import TorchStepper, settings_of, write_decoder  # noqa: E402
from retrieval.heads.captioning.network import CaptionNet, NetworkSettings  # noqa: E402
from retrieval.heads.captioning.recipe import CaptionSource, load_recipe, order  # noqa: E402
from retrieval.heads.captioning.search import greedy, search  # noqa: E402
from retrieval.heads.captioning.training import Pieces, Validation, cross_entropy, learn, noisy  # noqa: E402
from retrieval.heads.captioning.words import END, UNKNOWN, Words  # noqa: E402
from tests.heads.captions import DIM, SENTENCES, captions, recipe, vectors  # noqa: E402

FINGERPRINT = "f" * 64


@pytest.fixture(scope="module")
def words():
    return Words.learn(SENTENCES, 60)


@pytest.fixture(scope="module")
def learnt(words):
    torch.set_num_threads(1)
    return learn(recipe(), captions(), words, validation=Validation(captions()))


def card(kind, **settings):
    return Card(kind, f"toy {kind}", FINGERPRINT, "builtin", DIM, "none", settings, {"captions": 6})


@pytest.fixture(scope="module")
def folders(learnt, words, tmp_path_factory):
    """A decoder of each kind that there is."""
    place = tmp_path_factory.mktemp("decoders")
    own = settings_of(learnt.network, 3, 1.0)
    write_decoder(place / "transformer", learnt.network, words, card("transformer", **own))
    memory = ConsensusDecoder(card("consensus", neighbours=1), vectors(), SENTENCES)
    with new_decoder(place / "consensus", memory.card) as staging:
        np.savez(staging / MEMORY, **memory.arrays())
    return {kind: place / kind for kind in KINDS}


# ---- all decoders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_decoder(kind, folders):
    decoder = load_decoder(folders[kind], FINGERPRINT)
    assert (decoder.fingerprint, decoder.card.kind) == (FINGERPRINT, kind)
    said = decode_all(decoder, vectors())
    assert said == SENTENCES  # a tiny set, learnt by heart; and what was saved says the same when loaded
    assert decode_all(load_decoder(folders[kind]), vectors()) == said
    assert decode_all(decoder, vectors(), 1) == decode_all(decoder, 7 * vectors(), 4) == said
    assert decode_all(decoder, vectors()[[4, 4, 1]]) == [said[4], said[4], said[1]]
    many = np.repeat(vectors(), 30, axis=0)  # more than a batch
    done = []
    assert decode_all(decoder, many, 1, lambda *steps: done.append(steps)) == [s for s in said for _ in range(30)]
    assert done[-1] == (180, 180)
    assert decode_all(decoder, np.empty((0, DIM), np.float32)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_decoder_refuses(kind, folders):
    with pytest.raises(ModelMismatch, match="was trained on vectors of another model"):
        load_decoder(folders[kind], "e" * 64)
    decoder = load_decoder(folders[kind])
    for bad in (np.nan, np.inf, 0):
        wrong = vectors()
        wrong[2] = bad
        with pytest.raises(VectorError, match="1 of 6 vectors are zero, NaN or infinite: row 2"):
            decode_all(decoder, wrong)
    with pytest.raises(VectorError, match="8"):
        decode_all(decoder, np.ones((2, 8), np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_every_damage_is_one_plain_error(kind, folders, tmp_path):
    files = {file.name: file.read_bytes() for file in folders[kind].iterdir()}
    for name, data in files.items():
        for number, broken in enumerate([None, b"", data[: len(data) // 2]]):
            folder = tmp_path / f"{name}-{number}"
            folder.mkdir()
            for other, whole in files.items():
                if (content := broken if other == name else whole) is not None:
                    (folder / other).write_bytes(content)
            with pytest.raises(ModelError):
                load_decoder(folder)
    fields = json.loads(files[CARD])
    for change in ({"format": 99}, {"kind": "pickle"}, {"dim": 0}, {"settings": {}}, {"dim": 8}):
        folder = tmp_path / str(change)
        folder.mkdir()
        for other, whole in files.items():
            (folder / other).write_bytes(whole)
        (folder / CARD).write_text(json.dumps({**fields, **change}))
        with pytest.raises(ModelError):
            load_decoder(folder)


def test_there_is_no_decoder(tmp_path):
    with pytest.raises(ModelError, match="holds no decoder"):
        load_decoder(tmp_path)
    with pytest.raises(ModelError, match="no decoder comes with ViT-B-32/openai"):
        decoder_of("ViT-B-32/openai")


# ---- the transformer -------------------------------------------------------------------------------------------------


def test_onnx_is_the_network(learnt, folders):
    """Step by step, in batches, from the beginning and after it; the export rounded the network's weights too."""
    ours, theirs = load_decoder(folders["transformer"]), TorchStepper(learnt.network)
    random = np.random.default_rng(1)
    one, past = ours.begin(vectors())
    other, torch_past = theirs.begin(vectors())
    for _ in range(6):
        assert one == pytest.approx(other, abs=1e-4)
        assert past == pytest.approx(torch_past, abs=1e-4)
        pieces = random.integers(0, ours.words.size, 6)
        one, past = ours.go_on(pieces, past)
        other, torch_past = theirs.go_on(pieces, torch_past)


def test_the_cache_changes_nothing(learnt, words):
    """Scores of a whole caption at once are those of it piece by piece."""
    ids = torch.tensor(Pieces.of(words, SENTENCES[:2], 12).ids[:, :5])
    with torch.inference_mode():
        whole = learnt.network.begin(torch.from_numpy(vectors()[:2]), ids).numpy()
    stepper = TorchStepper(learnt.network)
    scores, past = stepper.begin(vectors()[:2])
    for i in range(5):
        assert scores == pytest.approx(whole[:, i], abs=1e-4)
        scores, past = stepper.go_on(ids[:, i].numpy(), past)
    assert scores == pytest.approx(whole[:, 5], abs=1e-4)


def test_no_place_sees_what_comes_after_it():
    torch.manual_seed(0)
    network = CaptionNet(NetworkSettings(DIM, 20, 16, 2, 2, 3, 8)).eval()
    ids = torch.randint(0, 20, (1, 6))
    other = ids.clone()
    other[0, 4] = (ids[0, 4] + 1) % 20
    vector = torch.from_numpy(vectors()[:1])
    with torch.inference_mode():
        one, two = network.begin(vector, ids), network.begin(vector, other)
    assert torch.allclose(one[:, :5], two[:, :5], atol=1e-6)
    assert not torch.allclose(one[:, 5], two[:, 5], atol=1e-3)


def test_beams_are_read_from_the_card(folders):
    decoder = load_decoder(folders["transformer"])
    settings = {"length": 12, "end": END, "banned": (UNKNOWN,)}
    assert decoder.decode(vectors()) == decoder.words.decode(search(decoder, vectors(), beams=3, **settings))
    assert decoder.decode(vectors(), 1) == decoder.words.decode(greedy(decoder, vectors(), **settings))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_it_learns_on_any_device(device, words):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    found = learn(recipe(validate_every=50), captions(), words, device=device)
    assert next(found.network.parameters()).device.type == "cpu"
    said = search(TorchStepper(found.network), vectors(), beams=2, length=12, end=END, banned=(UNKNOWN,))
    assert words.decode(said) == SENTENCES


# ---- learning --------------------------------------------------------------------------------------------------------


def test_the_best_weights_are_kept(learnt, words):
    rows = Pieces.of(words, SENTENCES, 12)
    with torch.inference_mode():
        loss = training.mean_loss(learnt.network, captions(), rows, "cpu")
    best = min(line["val_loss"] for line in learnt.log)
    assert loss == pytest.approx(best, abs=2e-3)  # the export rounded them
    assert next(line["step"] for line in learnt.log if line["val_loss"] == best) == learnt.step


class Killed(Exception):
    pass


def test_a_run_that_was_killed_ends_as_if_it_had_not_been(words, tmp_path):
    file = tmp_path / "run.safetensors"
    settings = recipe(dropout=0.1, validate_every=10, checkpoint_seconds=0)
    whole = learn(settings, captions(), words, validation=Validation(captions()))

    def die(done, _total):
        if done in (7, 33, 34, 80):
            raise Killed

    for _ in range(5):
        try:
            found = learn(settings, captions(), words, validation=Validation(captions()), checkpoint=file, progress=die)
        except Killed:
            continue
    for name, weight in whole.network.state_dict().items():
        assert torch.equal(weight, found.network.state_dict()[name])
    assert (found.log, found.step) == (whole.log, whole.step)
    again = learn(settings, captions(), words, validation=Validation(captions()), checkpoint=file)
    assert again.step == whole.step  # all was done
    with pytest.raises(DataError, match="is of another recipe"):
        learn(replace(settings, noise=0.2), captions(), words, checkpoint=file)
    learn(
        replace(settings, name="other", beams=5), captions(), words, checkpoint=file
    )  # decides nothing that is learnt
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match="is damaged"):
        learn(settings, captions(), words, checkpoint=file)


def test_loss_beside_the_slow_way(words):
    """Every piece, the end counted, of every caption; nothing else."""
    rows = np.arange(6)
    ids, after = Pieces.of(words, [*SENTENCES[:5], "a " * 20], 12).batch(rows, "cpu")
    scores = torch.randn((6, ids.shape[1] + 1, words.size), generator=torch.Generator().manual_seed(0))
    losses = []
    for row, text in enumerate([*SENTENCES[:5], "a " * 20]):
        said = words.encode([text])[0]
        wanted = [*said, END][:12]  # what is too long has no end
        for place, piece in enumerate(wanted):
            losses.append(-torch.log_softmax(scores[row, place], 0)[piece])
    assert cross_entropy(scores, after) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-6)


def test_noise_has_the_length_that_is_said():
    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(4000, 512), dim=1)
    for length in (0.3, 1.0, 2.0):
        cosines = (noisy(rows, length) * rows).sum(1)
        assert float(cosines.mean()) == pytest.approx((1 + length**2) ** -0.5, abs=0.01)


def test_nothing_to_learn_from():
    with pytest.raises(DataError, match="no word in the captions"):
        Words.learn([" ", "…"], 50)


def test_order_spreads_each_source_over_its_share():
    settings = replace(
        recipe(batch=10),
        sources=(CaptionSource("a", repeat=2.5), CaptionSource("b", until=0.4)),
    )
    both = replace(
        captions(), texts=["x"] * 4000, source_of=np.repeat([0, 1], 2000), vector_of=np.zeros(4000, np.int64)
    )
    lengths = np.random.default_rng(0).integers(1, 20, 4000)
    batches = order(settings, both, lengths)
    whole = np.concatenate(batches)
    counts = np.bincount(whole, minlength=4000)
    assert (counts[2000:] == 1).all()
    assert set(counts[:2000]) == {2, 3}
    assert counts[:2000].mean() == pytest.approx(2.5, abs=0.05)
    places = np.flatnonzero(whole >= 2000)
    assert places.max() < 0.62 * len(whole)  # of captions; 40 % of the time, in which both are seen
    assert np.mean([np.ptp(lengths[batch]) for batch in batches]) < 2
    assert [batch.tolist() for batch in order(settings, both, lengths)] == [batch.tolist() for batch in batches]


# ---- words and recipes -----------------------------------------------------------------------------------------------


def test_words_come_back(words, tmp_path):
    (tmp_path / PIECES).write_text(words.to_json(), "utf-8")
    again = Words.load(tmp_path / PIECES)
    assert again.decode(again.encode(["A RED dog, runs on the grass!", ""])) == ["a red dog runs on the grass", ""]
    assert again.encode(SENTENCES) == words.encode(SENTENCES)
    with pytest.raises(ModelError, match="no tokenizer of captions"):
        Words.load(find_bundle("builtin") / PIECES)


@pytest.mark.parametrize("name", ["builtin", "text-only"])
def test_the_recipes_that_ship_are_read(name):
    file = training.__file__.replace("training.py", f"recipes/{name}.toml")
    settings = load_recipe(type(find_bundle("builtin"))(file))
    assert {source.learn_from for source in settings.sources} == {"image" if name == "builtin" else "text"}
    assert settings.licence


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "nothing to learn from"),
        ("[[sources]]\npath = 'a'\nwidht = 3", "unknown setting 'widht'"),
        ("widht = 3\n[[sources]]\npath = 'a'", "did you mean width"),
        ("kind = 'gan'\n[[sources]]\npath = 'a'", "transformer or consensus"),
        ("noise = -1.0\n[[sources]]\npath = 'a'", "noise"),
        ("[[sources]]\npath = 'a'\nlearn_from = 'sound'", "image or text"),
        ("[[sources]]\npath = 'a'\nrepeat = 0.0", "repeat"),
        ("= 3", "is not TOML"),
    ],
)
def test_a_wrong_recipe_is_one_plain_error(text, message, tmp_path):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(DataError, match=message):
        load_recipe(tmp_path / "a.toml")


# ---- what ships ------------------------------------------------------------------------------------------------------


def test_the_built_in_decoder_is_small_and_of_the_built_in_model():
    folder = decoder_of("builtin")
    assert {file.name for file in folder.iterdir()} == {CARD, GRAPH, PIECES}
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 15e6
    decoder = load_decoder(folder, load_encoder().fingerprint)
    assert "CC BY 4.0" in decoder.card.licence
    assert "research" in decoder.card.licence
