"""Every generator does what every generator has to do: one test for all kinds; then what is one kind's own."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from indexes.errors import ModelMismatch, VectorError
from retrieval.errors import DataError, ModelError, UsageError
from retrieval.heads import blended, filled
from tests.heads.generation.materials import DIM, FINGERPRINT, collection, colours, torch

from retrieval.heads.generation import storage  # isort: skip
from retrieval.heads.generation.autoencoder import Autoencoder  # isort: skip
from retrieval.heads.generation.fitting import KINDS, evaluate, fit, settings_of  # isort: skip
from retrieval.heads.generation.gan import CHECKPOINT, LOG, PictureGenerator, read_checkpoint  # isort: skip
from retrieval.heads.generation.prior import between, choose_share, hits  # isort: skip

SMALL = {"epochs": 150, "batch": 16, "hidden": 64, "learning_rate": 3e-3, "weight_decay": 0.0}
TINY = {
    "gan": {"side": 8, "width": 16, "noise": 4, "steps": 250, "batch": 16, "learning_rate": 2e-3},
    "regression": {**SMALL, "noise": 0.0},
    "cvae": {**SMALL, "latent": 4, "noise": 0.0},
    "autoencoder": {**SMALL, "latent": 4},
    "denoiser": {**SMALL, "latent": 4},
    "vae": {**SMALL, "latent": 4},
    "joint": {**SMALL, "latent": 4},
    "joint-vae": {**SMALL, "latent": 4},
}


@pytest.fixture(scope="module")
def material():
    return collection()


@pytest.fixture(scope="module")
def fitted(material, tmp_path_factory):
    """Each kind, fitted once."""
    made = {}

    def of(kind):
        if kind not in made:
            out = tmp_path_factory.mktemp("generators") / kind
            made[kind] = fit(material, kind, settings_of(kind, TINY[kind]), out, about={"from": "here"}), out
        return made[kind]

    return of


@pytest.mark.parametrize("kind", KINDS)
def test_conformance(kind, fitted, material, tmp_path):
    generator, out = fitted(kind)
    assert (generator.fingerprint, generator.encoder) == (FINGERPRINT, "builtin")
    given = {"image": material.images, "text": material.texts}[generator.source]
    made = generator.generate(given, seed=3)

    # Unit rows of the target, or pictures from 0 to 1.
    if generator.target == "picture":
        assert made.shape == (len(given), 8, 8, 3)
        assert made.min() >= 0
        assert made.max() <= 1
    else:
        assert made.shape == given.shape
        np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, atol=1e-5)
    assert made.dtype == np.float32

    # It has learnt a tiny set.
    each = np.arange(len(material.images)) if generator.source == "image" else material.owner
    if generator.target == "picture":
        wrong = np.abs(made.mean((1, 2)) - colours(material)[each]).mean()
        assert wrong < 0.6 * np.abs(colours(material) - colours(material).mean(0)).mean(), wrong
    else:
        right = {"image": material.images[each], "text": material.texts}[generator.target]
        assert (made * right).sum(1).mean() > 0.95

    # The same for the same seed; a row's does not depend on those behind it; one row, and none, are fine.
    np.testing.assert_array_equal(generator.generate(given, seed=3), made)
    np.testing.assert_allclose(generator.generate(given[:1], seed=3), made[:1], atol=1e-5)
    assert generator.generate(given[:0], seed=3).shape == (0, *made.shape[1:])

    # The same material and seed give the same weights, and others' random numbers are left alone.
    state = torch.get_rng_state()
    again = fit(material, kind, settings_of(kind, TINY[kind]), tmp_path / "again")
    assert bool((torch.get_rng_state() == state).all())
    for name, value in generator.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], value)

    # Saved and loaded, it gives the same; what is saved is arrays and JSON.
    assert sorted(file.name for file in out.iterdir() if file.name != LOG) == ["generator.json", "weights.safetensors"]
    loaded = storage.load(out)
    assert type(loaded) is type(generator)
    np.testing.assert_array_equal(loaded.generate(given, seed=3), made)
    assert storage.told(out)["about"] == {"from": "here"}

    # What is no vector of its space is refused.
    for odd in (np.full((2, DIM), np.nan, np.float32), np.zeros((1, DIM), np.float32)):
        with pytest.raises(VectorError, match="zero, NaN or infinite"):
            generator.generate(odd)
    with pytest.raises((VectorError, ModelError)):
        generator.generate(np.ones((2, DIM + 1), np.float32))
    with pytest.raises(ModelMismatch, match="another model"):
        evaluate(replace(generator, fingerprint="0" * 64), material, lambda: None)


@pytest.mark.parametrize("kind", ["gan", "regression", "vae"])
def test_a_damaged_folder_is_a_plain_error(kind, fitted, tmp_path):
    _, out = fitted(kind)
    with pytest.raises(ModelError, match="holds no generator"):
        storage.load(tmp_path)
    for name, data in ((storage.ARRAYS, b"x"), (storage.SETTINGS, b"{"), (storage.SETTINGS, b'{"format": 1}')):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for file in out.iterdir():
            (folder / file.name).write_bytes(data if file.name == name else file.read_bytes())
        with pytest.raises(ModelError, match="cannot be read as a generator"):
            storage.load(folder)
    fields = json.loads((out / storage.SETTINGS).read_text())
    (folder / storage.SETTINGS).write_text(json.dumps({**fields, "format": 2}))
    with pytest.raises(ModelError, match="upgrade"):
        storage.load(folder)
    with pytest.raises(UsageError, match="exists already"):
        storage.refuse(out)


def test_settings_are_checked_by_name_and_kind():
    assert settings_of("vae", {"latent": 8, "epochs": 3}).recipe.epochs == 3
    assert settings_of("autoencoder", {"modalities": "image,text"}).modalities == ("image", "text")
    for kind, changes, said in (
        ("gan", {"stesp": 3}, "did you mean steps"),
        ("gan", {"side": 48}, "8, 16, 32, 64"),
        ("gan", {"objective": "luck"}, "min-max, hinge"),
        ("gan", {"steps": "many"}, "steps is like"),
        ("vae", {"modalities": "sound"}, "over image, text"),
        ("vae", {"beta": -1.0}, "not negative"),
        ("regression", {"source": "sound"}, "from 'sound'"),
        ("diffusion", {}, "no kind of generator"),
    ):
        with pytest.raises(DataError, match=said):
            settings_of(kind, changes)


# ---- autoencoders ----------------------------------------------------------------------------------------------------


def test_joint_rebuilds_either_modality_from_the_other(fitted, material):
    joint, _ = fitted("joint")
    images, texts = material.pairs("train")
    nothing = np.full_like(images, np.nan)
    for tables in ({"image": images}, {"image": images, "text": nothing}):
        made = joint.rebuild(tables)
        assert (made["text"] * texts).sum(1).mean() > 0.95
        assert (made["image"] * images).sum(1).mean() > 0.95
    np.testing.assert_array_equal(joint.rebuild({"image": images})["text"], made["text"])
    # A row that has nothing gets what rows are like, and costs nothing.
    empty = joint.rebuild({"image": nothing, "text": nothing})
    assert np.isfinite(empty["image"]).all()
    assert (joint.losses({"image": nothing, "text": nothing}).reconstruction == 0).all()
    with pytest.raises(ModelError, match="knows no 'sound'"):
        joint.codes({"sound": images})
    with pytest.raises(ModelError, match="must be a table"):
        joint.codes({"image": images, "text": texts[:1]})


def test_losses_are_those_of_each_row_by_hand(fitted, material):
    vae, _ = fitted("vae")
    rows = material.images[:5]
    losses = vae.losses({"image": rows})
    for i, row in enumerate(rows):
        centred = (row - vae.centring.means["image"]) * np.sqrt(DIM)
        with torch.no_grad():
            mean, log_variance = vae.network.encode(
                torch.tensor(centred, dtype=torch.float32)[None, None], torch.ones(1, 1)
            )
            rebuilt = vae.network.decode(mean)[0, 0].numpy()
        assert losses.reconstruction[i] == pytest.approx(((rebuilt - centred) ** 2).sum() / 2, rel=1e-4)
        slow = sum(
            (float(m) ** 2 + np.exp(float(v)) - 1 - float(v)) / 2 for m, v in zip(mean[0], log_variance[0], strict=True)
        )
        assert losses.kl[i] == pytest.approx(slow, rel=1e-4)
        assert vae.oddness({"image": rows})[i] == pytest.approx(
            losses.reconstruction[i] + vae.beta * losses.kl[i], rel=1e-5
        )


def test_what_was_never_seen_is_odd(fitted, material):
    vae, _ = fitted("vae")
    odd = np.random.default_rng(5).normal(size=(20, DIM)).astype(np.float32)
    assert vae.oddness({"image": odd}).min() > np.median(vae.oddness({"image": material.images}))


def test_a_denoiser_takes_noise_away(fitted, material):
    denoiser, _ = fitted("denoiser")
    noise = np.random.default_rng(6).normal(size=material.images.shape) * 0.15
    noisy = (material.images + noise).astype(np.float32)
    noisy /= np.linalg.norm(noisy, axis=1, keepdims=True)
    before = (noisy * material.images).sum(1).mean()
    assert (denoiser.generate(noisy) * material.images).sum(1).mean() > before + 0.05


def test_only_a_vae_has_a_prior_to_draw_from(fitted, material):
    vae, _ = fitted("vae")
    drawn = vae.sample(40, seed=1)["image"]
    np.testing.assert_array_equal(drawn, vae.sample(40, seed=1)["image"])
    nearest = (drawn @ material.images.T).max(1)
    elsewhere = np.random.default_rng(0).normal(size=(40, DIM))
    elsewhere /= np.linalg.norm(elsewhere, axis=1, keepdims=True)
    assert nearest.mean() > (elsewhere @ material.images.T).max(1).mean() + 0.2
    with pytest.raises(ModelError, match="fit a vae"):
        fitted("autoencoder")[0].sample(3)


# ---- translation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["regression", "cvae", "joint"])
def test_translated_queries_find_their_pictures(kind, fitted, material):
    translator = between(fitted(kind)[0], "text", "image")
    before, after = hits(None, material, "train"), hits(translator, material, "train", 1.0)
    assert after["t2i_mrr"] > before["t2i_mrr"] + 0.1  # two ways to turn what is hidden have nothing in common
    share, tried = choose_share(translator, material)
    assert tried[str(share)] == max(tried.values())
    assert storage.translators(fitted(kind)[1], "text", "image")[0].share == share
    made = blended(translator, material.texts, 0.5)
    slow = (material.texts + translator.generate(material.texts)) / 2
    np.testing.assert_allclose(made, slow / np.linalg.norm(slow, axis=1, keepdims=True), atol=1e-5)
    np.testing.assert_array_equal(blended(translator, material.texts, 0.0), material.texts)


def test_hits_are_counted_by_hand(material):
    small = collection(12, 2, seed=3, same=False)
    found = hits(None, small, "val")
    rows = small.parts["val"]
    ranks = []
    for text, owner in zip(small.texts, small.owner, strict=True):
        if owner in rows:
            scores = {int(row): float(text @ small.images[row]) for row in rows}
            ranks.append(sorted(scores, key=scores.get, reverse=True).index(int(owner)) + 1)
    assert len(ranks) == 8
    assert found["t2i_hit@1"] == pytest.approx(np.mean([rank <= 1 for rank in ranks]))
    assert found["t2i_mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))


def test_missing_modalities_are_filled_in_from_what_a_row_has(fitted, material):
    _, out = fitted("joint")
    ways = storage.translators(out)
    assert [(way.source, way.target) for way in ways] == [("text", "image"), ("image", "text")]
    images, texts = (table.copy() for table in material.pairs("train"))
    images[0], texts[1], images[2], texts[2] = np.nan, np.nan, np.nan, np.nan
    tables = filled({"image": images, "text": texts}, ways)
    np.testing.assert_allclose(tables["image"][0], ways[0].generate(texts[:1])[0], atol=1e-5)
    np.testing.assert_allclose(tables["text"][1], ways[1].generate(images[1:2])[0], atol=1e-5)
    assert np.isnan(tables["image"][2]).all()  # from nothing, nothing
    np.testing.assert_array_equal(tables["image"][3:], images[3:])
    assert np.isnan(images[0]).all()  # what was given stays
    assert filled({"text": texts}, ways).keys() == {"text"}


def test_what_translates_nothing_is_no_prior(fitted):
    for kind in ("vae", "gan"):
        with pytest.raises(ModelError, match="translates nothing from text to image"):
            storage.translators(fitted(kind)[1], "text", "image")


def test_a_mean_of_draws_and_one_draw_of_a_conditional_vae(fitted, material):
    cvae, _ = fitted("cvae")
    one = replace(cvae, draws=1)
    drawn = np.stack([one.generate(material.texts, seed=seed) for seed in range(12)])
    assert np.ptp(drawn, axis=0).max() > 1e-4  # a sentence may mean several pictures
    np.testing.assert_allclose(one.generate(material.texts, seed=5), drawn[5])


def test_priors_need_sentences_and_say_so(material, tmp_path):
    silent = replace(material, texts=material.texts[:0], owner=material.owner[:0], sentences=[])
    for kind in ("regression", "joint"):
        with pytest.raises(DataError, match="learns from pictures with sentences"):
            fit(silent, kind, settings_of(kind, TINY[kind]), tmp_path / kind)
    assert not list(tmp_path.iterdir())
    assert isinstance(fit(silent, "vae", settings_of("vae", TINY["vae"]), tmp_path / "vae"), Autoencoder)


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_a_gan_learns_without_a_word_and_from_a_store_s_vectors_alone(material, tmp_path):
    silent = replace(material, texts=material.texts[:0], owner=material.owner[:0], sentences=[])
    settings = settings_of("gan", {**TINY["gan"], "steps": 3})
    generator = fit(silent, "gan", settings, tmp_path / "gan")
    assert isinstance(generator, PictureGenerator)
    np.testing.assert_allclose(generator.centring.means["text"], material.everyday.mean(0), atol=1e-6)
    assert generator.generate(material.texts[:2]).shape == (2, 8, 8, 3)
    assert replace(generator, source="image").generate(material.images[:2]).shape == (2, 8, 8, 3)


def test_a_game_goes_on_from_its_checkpoint_bit_for_bit(material, tmp_path, monkeypatch):
    from retrieval.heads.generation import gan

    settings = settings_of("gan", {**TINY["gan"], "steps": 40})
    whole = fit(material, "gan", settings, tmp_path / "whole")
    played = gan.Game.play

    def interrupted(game):
        if game.step == 23:
            raise KeyboardInterrupt
        return played(game)

    monkeypatch.setattr(gan.Game, "play", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(material, "gan", settings, tmp_path / "cut", about={"data": "x"})
    monkeypatch.setattr(gan.Game, "play", played)
    assert [file.name for file in (tmp_path / "cut").iterdir()] == [CHECKPOINT]
    _, state = read_checkpoint(tmp_path / "cut")
    assert (state["step"], state["kind"], state["about"]) == (23, "gan", {"data": "x"})
    again = fit(material, "gan", settings, tmp_path / "cut")
    for name, value in whole.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], value)
    assert not (tmp_path / "cut" / CHECKPOINT).exists()
    (tmp_path / CHECKPOINT).write_bytes(b"x")
    with pytest.raises(DataError, match="is damaged"):
        read_checkpoint(tmp_path)
    with pytest.raises(DataError, match="no training that could go on"):
        read_checkpoint(tmp_path / "whole")


def test_another_seed_gives_other_weights_and_every_objective_plays(material, tmp_path):
    outs = []
    for changes in ({}, {"seed": 1}, {"objective": "hinge"}, {"penalty": 0.0, "mismatched": 0.0, "layout": 0.0}):
        settings = settings_of("gan", {**TINY["gan"], "steps": 3, **changes})
        outs.append(fit(material, "gan", settings, tmp_path / str(len(outs))).generate(material.texts[:1]))
    for i, one in enumerate(outs):
        assert np.isfinite(one).all()
        assert all(not np.array_equal(one, other) for other in outs[:i])


def test_a_gan_that_diverges_says_so(material, tmp_path):
    settings = settings_of("gan", {**TINY["gan"], "learning_rate": 1e30})
    with pytest.raises(DataError, match="no number any more"):
        fit(material, "gan", settings, tmp_path / "gan")


def test_pictures_that_cannot_be_read_are_left_out(material, tmp_path):
    from retrieval.pairs import PictureBytes

    pictures = [PictureBytes("bad.png", b"no picture"), *material.pictures[1:]]
    notes = []
    settings = settings_of("gan", {**TINY["gan"], "steps": 2})
    fit(replace(material, pictures=pictures), "gan", settings, tmp_path / "gan", note=notes.append)
    assert notes == ["1 of 30 pictures cannot be read and are left out"]


def test_pictures_of_different_sentences_differ(fitted):
    """The log says how much, as a share of how much real ones do: a collapse would be near 0."""
    _, out = fitted("gan")
    lines = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines] == [50, 100, 150, 200, 250]
    assert lines[-1]["diversity"] > 0.4
