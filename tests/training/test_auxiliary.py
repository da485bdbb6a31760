"""What is learnt beside the objective does what it says: to the vectors, to the decoders, and never to the bundle."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402 - torch first

from cli.main import main as run_command  # noqa: E402
from retrieval.bundle import Bundle  # noqa: E402
from retrieval.encoders import load_encoder  # noqa: E402
from retrieval.errors import DataError  # noqa: E402
from retrieval.onnx_encoder import OnnxEncoder  # noqa: E402
from retrieval.pairs import read_pairs  # noqa: E402
from retrieval.training import config as recipes  # noqa: E402
from retrieval.training import loop  # noqa: E402
from retrieval.training.auxiliary import Auxiliary, Decoder  # noqa: E402
from retrieval.training.features import augment  # noqa: E402
from retrieval.training.run import CHECKPOINT, LOG, RunFolder  # noqa: E402
from tests.retrieval.open_clip_models import TINY, save_model  # noqa: E402
from tests.training.drawings import COLOURS, SHAPES, draw, weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photos(world):
    """A plain folder of drawings that nothing is said of."""
    folder, random = world.root / "photos", np.random.default_rng(1)
    folder.mkdir()
    for number, (colour, shape) in enumerate((c, s) for c in COLOURS for s in SHAPES for _ in range(2)):
        draw(colour, shape, random).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture
def recipe(world):
    start = recipes.config_for([world.pairs], "builtin")
    return replace(start, epochs=30, learning_rate=1e-3, views=("clean", "crop1"))


@pytest.fixture
def beside(monkeypatch):
    """The auxiliary losses of the runs of a test, as they are made."""
    made = []
    create = Auxiliary.__init__

    def keep(self, *arguments):
        create(self, *arguments)
        made.append(self)

    monkeypatch.setattr(Auxiliary, "__init__", keep)
    return made


def everything(config, **changes):
    """All of it at once, with a teacher of another width."""
    given = {"self_supervised": 0.5, "reconstruct": 0.5, "distil_features": 0.5, "distil_interactive": 0.5}
    return replace(config, teacher="builtin", **{**given, **changes})


# ---- two views of a picture ------------------------------------------------------------------------------------------


def apart(run, pictures):
    """Mean cosines of two views: of one picture, and of different ones."""
    encoder = OnnxEncoder(Bundle.load(run))
    drawn = [Image.open(picture).convert("RGB") for picture in pictures]
    views = [
        [augment(p, view, str(i), encoder.preprocessing) for i, p in enumerate(drawn)] for view in ("crop8", "crop9")
    ]
    first, second = (encoder.encode_images(view) for view in views)
    cosines = first @ second.T
    same = np.eye(len(drawn), dtype=bool)
    return float(cosines[same].mean()), float(cosines[~same].mean())


def test_photos_without_captions_teach_that_two_views_are_one_picture(world, quick, recipe, photos, tmp_path):
    held_out = [record.image for record in read_pairs(world.pairs, "val")]
    loop.train(recipe, tmp_path / "alone")
    unlabelled = recipes.unlabelled([photos])
    loop.train(replace(recipe, unlabelled=unlabelled, self_supervised=1.0), tmp_path / "seen")
    alone, seen = apart(tmp_path / "alone", held_out), apart(tmp_path / "seen", held_out)
    assert seen[0] - seen[1] > alone[0] - alone[1] + 0.05
    assert Bundle.load(tmp_path / "seen").training["data"][1]["pictures"] == 40


def test_towers_that_learn_see_every_photo_twice(world, recipe, tmp_path):
    held_out = [record.image for record in read_pairs(world.pairs, "val")]
    folder = save_model(tmp_path / "tiny", TINY["causal"])
    rates = {"image_tower_learning_rate": 1e-3, "text_tower_learning_rate": 1e-3, "precision": "fp32"}
    settings = replace(recipe, model=f"local-dir:{folder}", train="all", epochs=15, batch_size=20, part=20, **rates)
    loop.train(settings, tmp_path / "alone")
    loop.train(replace(settings, self_supervised=1.0), tmp_path / "seen")  # without others, the pictures of the pairs
    alone, seen = apart(tmp_path / "alone", held_out), apart(tmp_path / "seen", held_out)
    assert seen[0] - seen[1] > alone[0] - alone[1] + 0.3


def test_the_views_are_different_ones_of_the_same_pictures_of_one_set(toy, tmp_path, monkeypatch):
    """Rows that say what they are: set, view and picture."""
    sets = [
        [torch.stack([torch.tensor([number, view, row]) for row in range(size)]).float() for view in range(3)]
        for number, size in enumerate((5, 50))
    ]
    config = replace(toy, train="heads", anchor=0.0, self_supervised=2.0, views=("clean", "clean", "crop1"))
    seen = []

    class Towers(loop.FrozenTowers):
        def __init__(self) -> None:
            pass

        def image_features(self, pictures):
            seen.append(pictures.reshape(2, -1, 3).numpy())
            return pictures

    class Model:
        class image:  # noqa: N801 - an attribute
            head = staticmethod(lambda rows: F.normalize(rows + 1, dim=1))

    class Pictures:
        unlabelled, sources, teacher = sets, (), None

    auxiliary, random = Auxiliary(config, Model, Towers(), Pictures), np.random.default_rng(0)
    losses = [float(auxiliary._self_supervision(8, random)) for _ in range(60)]
    for (first, second), loss in zip(seen, losses, strict=True):
        vectors = np.concatenate([first, second]).astype(np.float64) + 1
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        asked, count = np.exp(10 * vectors @ vectors.T), len(first)
        shares = [asked[i, (i + count) % (2 * count)] / np.delete(asked[i], i).sum() for i in range(2 * count)]
        assert loss == pytest.approx(-np.log(shares).mean(), rel=1e-4)
        np.testing.assert_array_equal(first[:, (0, 2)], second[:, (0, 2)])
        assert len({*first[:, 0]}) == 1
        assert {first[0, 1], second[0, 1]} == {0, 2}  # "clean", twice in the list, is one view
        assert len({*first[:, 2]}) == len(first) == (8 if first[0, 0] else 5)
    chosen = [first[0, 0] for first, _ in seen]
    assert 0 < chosen.count(0) < chosen.count(1)  # by their sizes
    assert len({tuple(first[:, 2]) for first, _ in seen}) > 30


def test_what_is_held_out_for_validation_is_left_out(world, quick, recipe, tmp_path):
    folder = recipes.unlabelled([world.pairs.parent])  # all 60 drawings, those of the val split too
    loop.train(replace(recipe, epochs=1, unlabelled=folder, self_supervised=1.0), tmp_path / "run")
    record = Bundle.load(tmp_path / "run").training
    assert [(entry["pictures"], entry["split"]) for entry in record["data"]] == [(40, "train"), (40, None)]
    assert "unlabelled" not in record["settings"]


def test_a_folder_is_all_the_pictures_in_it(photos, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(photos, folder / "train" / "2024")
    shutil.copytree(photos, folder / "val")
    with pytest.raises(DataError, match="nothing that goes with them"):
        read_pairs(photos)
    (folder / "list.jsonl").write_text("{}")
    with pytest.raises(DataError, match="name that file itself"):
        read_pairs(folder)
    (folder / "train" / "2024" / "00.txt").write_text("a circle")
    found = read_pairs(folder, captioned=False)
    assert (len(found), {(record.texts, record.labels) for record in found}) == (80, {((), ())})
    assert {record.image for record in read_pairs(folder, "train", captioned=False)} == {
        *(folder / "train" / "2024").glob("*.png")
    }


# ---- features decoded ------------------------------------------------------------------------------------------------


def explained(auxiliary, towers, pairs):
    """The share of the features' variance that is decoded from the vectors: of own, and of the other side's."""
    model = auxiliary.model.eval()
    with torch.inference_mode():
        features = towers.image_features(pairs.views[0])[pairs.owner], towers.text_features(pairs.texts)
        vectors = model.image.head(features[0]), model.text.head(features[1])
        shares = []
        for side, name in enumerate(("image_decoder", "text_decoder")):
            decoder, target = auxiliary.learnt[name], F.normalize(features[side], dim=1)
            spread = torch.maximum(decoder.spread, 0.1 * decoder.spread.square().mean().sqrt())
            shares.append([1 - float(((decoder(v) - target) / spread).square().mean()) for v in vectors])
        (own_image, cross_image), (cross_text, own_text) = shares
    return np.array([own_image, own_text, cross_image, cross_text])


def test_vectors_keep_what_the_features_say(world, quick, recipe, tmp_path, monkeypatch, beside):
    """Held-out drawings. A decoder learns at a tiny weight too, since Adam knows no size; the vectors do not."""
    runs = []
    create = loop._Run.__init__
    monkeypatch.setattr(loop._Run, "__init__", lambda self, *rest: runs.append(self) or create(self, *rest))
    shares = []
    for name, weight, epochs in (("begun", 1.0, 1), ("little", 1e-3, 40), ("much", 1.0, 40)):
        loop.train(replace(recipe, epochs=epochs, reconstruct=weight), tmp_path / name)
        shares.append(explained(beside[-1], runs[-1].towers, runs[-1].data.val))
    begun, little, much = shares
    assert (much > begun + 0.1).all()
    assert (much > little + 0.05).all()


def test_a_decoder_begins_with_the_mean(world):
    features = torch.randn(500, 7, generator=torch.Generator().manual_seed(0)) * torch.arange(7) + 3
    decoder = Decoder(4, features)
    for parameter in decoder.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(decoder(torch.randn(2, 4)), features.mean(0).expand(2, -1))
    assert decoder.spread[6] == pytest.approx(6, rel=0.1)


# ---- a teacher's vectors ---------------------------------------------------------------------------------------------


@pytest.fixture
def student(toy):
    settings = replace(toy, train="heads", vocabulary=None, anchor=0.0, word_dropout=0.0, epochs=40, learning_rate=3e-3)
    return replace(settings, objective="distance", teacher="builtin", distil=0.0)


def vectors(run, tmp_path):
    """Student's and teacher's vectors of the pictures and of their sentences."""
    records = read_pairs(tmp_path / "toy.jsonl", "val")
    pictures = [Image.open(record.image).convert("RGB") for record in records]
    texts = [text for record in records for text in record.texts]
    encoders = OnnxEncoder(Bundle.load(run)), load_encoder()
    return [(encoder.encode_images(pictures), encoder.encode_texts(texts)) for encoder in encoders]


def test_vectors_come_to_be_the_teacher_s(student, tmp_path, beside):
    student = replace(student, dim=512)
    loop.train(student, tmp_path / "alone")
    loop.train(replace(student, distil_features=10.0), tmp_path / "taught")
    for name, least, most in (("alone", -0.3, 0.3), ("taught", 0.8, 1.0)):
        ours, theirs = vectors(tmp_path / name, tmp_path)
        for mine, other in zip(ours, theirs, strict=True):
            assert least < float((mine * other).sum(1).mean()) <= most, name
    assert not len(beside[-1].learnt)  # of one width, nothing stands between


def test_another_width_is_mapped(student, tmp_path, beside):
    loop.train(replace(student, epochs=100, distil_features=10.0), tmp_path / "taught")
    (ours, theirs), maps = vectors(tmp_path / "taught", tmp_path), beside[-1].learnt
    assert (ours[0].shape[1], theirs[0].shape[1]) == (32, 512)
    for mine, other, name in zip(ours, theirs, ("image_map", "text_map"), strict=True):
        with torch.inference_mode():
            mapped = F.normalize(maps[name](torch.from_numpy(mine)), dim=1)
        assert float((mapped * torch.from_numpy(other)).sum(1).mean()) > 0.8


def test_pictures_find_the_teacher_s_sentences(student, tmp_path):
    student = replace(student, dim=512)
    loop.train(student, tmp_path / "alone")
    loop.train(replace(student, distil_interactive=1.0), tmp_path / "taught")
    found = {}
    for name in ("alone", "taught"):
        (pictures, _), (_, sentences) = vectors(tmp_path / name, tmp_path)
        best = (pictures @ sentences.T).argmax(1)
        found[name] = float((best // 2 == np.arange(len(pictures))).mean())
    assert found["taught"] > max(0.7, found["alone"] + 0.3)


# ---- all of it, ended and resumed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["all", "heads"])
def test_ended_and_resumed_it_is_the_run_that_was_not(toy, photos, tmp_path, ended_after, train):
    config = everything(toy, train=train, views=("clean", "crop1"), checkpoint_seconds=0.0)
    config = replace(config, unlabelled=recipes.unlabelled([photos]), anchor=0.0)
    whole = loop.train(config, tmp_path / "whole")
    ended_after(1, 2)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path / "ended")
    stored = RunFolder.open(tmp_path / "ended").load().tensors
    assert {name.split(".")[1] for name in stored if name.startswith("auxiliary.")} == {
        *("image_decoder", "text_decoder", "image_map", "text_map")
    }
    torch.manual_seed(99)
    with pytest.raises(KeyboardInterrupt):
        loop.resume(tmp_path / "ended")
    torch.manual_seed(98)
    assert loop.resume(tmp_path / "ended") == whole
    assert weights(tmp_path / "ended") == weights(tmp_path / "whole")
    assert (tmp_path / "ended" / LOG).read_text() == (tmp_path / "whole" / LOG).read_text()


def test_a_checkpoint_without_them_is_refused(toy, tmp_path, ended_after):
    ended_after(1)
    with pytest.raises(KeyboardInterrupt):
        loop.train(replace(toy, checkpoint_seconds=0.0), tmp_path / "plain")
    with pytest.raises(KeyboardInterrupt):
        loop.train(replace(toy, checkpoint_seconds=0.0, reconstruct=1.0), tmp_path / "run")
    shutil.copy(tmp_path / "plain" / CHECKPOINT, tmp_path / "run" / CHECKPOINT)
    with pytest.raises(DataError, match="does not fit the run's config"):
        loop.resume(tmp_path / "run")


def test_a_bundle_holds_the_encoders_alone(toy, tmp_path):
    loop.train(toy, tmp_path / "plain")
    loop.train(everything(toy), tmp_path / "run")
    for graph in ("image.onnx", "text.onnx"):
        plain, run = (onnx.load(tmp_path / name / graph).graph.initializer for name in ("plain", "run"))
        assert {(weight.name, *weight.dims) for weight in plain} == {(weight.name, *weight.dims) for weight in run}
    assert {file.name for file in (tmp_path / "plain").iterdir()} == {
        file.name for file in (tmp_path / "run").iterdir()
    }


# ---- as a user sets it -----------------------------------------------------------------------------------------------


def command(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["diptych", "train", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            run_command()
    return int(leaving.value.code or 0)


def test_the_command_takes_a_folder(world, quick, photos, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(photos.parent)
    run = tmp_path / "run"
    arguments = ("--unlabelled", photos.name, "--unlabelled", photos.name, "--epochs", 1)
    assert command(world.pairs, "-o", run, *arguments) == 0
    config = recipes.config_from_json(run / "config.json")
    assert config.unlabelled == (recipes.Unlabelled(str(photos)),) * 2
    assert (config.self_supervised, config.views) == (recipes.SELF_SUPERVISED, ("clean", "crop1"))
    assert len(Bundle.load(run).training["data"]) == 3


def test_what_was_set_stays():
    given = recipes.unlabelled([recipes.Path("x")])
    start = recipes.config_for([recipes.Path("p")], "builtin")
    towers = recipes.with_changes(start, {"unlabelled": given, "train": "all"})
    assert (towers.views, towers.self_supervised) == (("clean",), recipes.SELF_SUPERVISED)
    mine = replace(start, self_supervised=0.2, views=("flip", "crop3"))
    mine = recipes.with_changes(mine, {"unlabelled": given})
    assert (mine.views, mine.self_supervised) == (("flip", "crop3"), 0.2)


def test_a_recipe_comes_back_as_it_was(recipe, photos, tmp_path):
    (tmp_path / "recipe.toml").write_text(
        'teacher = "builtin"\nself_supervised = 0.3\nreconstruct = 1\ndistil_features = 2.0\ndistil_interactive = 1\n'
        '[[sources]]\npairs = "p.jsonl"\n[[unlabelled]]\npictures = "photos"\n'
        '[[unlabelled]]\npictures = "more.jsonl"\nsplit = "extra"\n'
    )
    config = recipes.load_config(tmp_path / "recipe.toml")
    assert config.unlabelled == (recipes.Unlabelled("photos"), recipes.Unlabelled("more.jsonl", "extra"))
    assert (config.self_supervised, config.reconstruct, config.distil_features) == (0.3, 1, 2.0)
    RunFolder.create(tmp_path / "run", config)
    assert recipes.config_from_json(tmp_path / "run" / "config.json") == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"self_supervised": -1.0}, "must be a number from 0 on"),
        ({"reconstruct": float("nan")}, "must be a number from 0 on"),
        ({"distil_features": 1.0}, "need a teacher"),
        ({"distil_interactive": 1.0}, "need a teacher"),
        ({"unlabelled": (recipes.Unlabelled("photos"),)}, r"set self_supervised, 0\.3"),
        ({"self_supervised": 1.0, "train": "text"}, "the image tower, which"),
    ],
)
def test_settings_that_are_wrong(recipe, changes, words):
    with pytest.raises(DataError, match=words):
        replace(recipe, **changes)


def test_mistakes_are_said_in_one_line(world, quick, photos, tmp_path, capfd):
    def complaint(*arguments):
        assert command(*arguments, "-o", tmp_path / "run") == 1
        assert not (tmp_path / "run").exists()
        return capfd.readouterr().err.splitlines()[-1]

    file = tmp_path / "recipe.toml"
    learn = f'self_supervised = 1.0\nmodel = "builtin"\n[[sources]]\npairs = "{world.pairs}"\n'
    file.write_text(learn)
    assert 'set views to ["clean", "crop1"]' in complaint("--config", file)
    file.write_text('views = ["flip", "flip"]\n' + learn)
    assert 'set views to ["clean", "crop1"]' in complaint("--config", file)
    file.write_text(learn + '[[unlabelled]]\nphotos = "x"\n')
    assert "unknown setting 'photos'" in complaint("--config", file)
    file.write_text('unlabelled = "photos"\n' + learn)
    assert "expected a table with pictures, split, not 'photos'" in complaint("--config", file)
    lone = tmp_path / "lone"
    lone.mkdir()
    assert f"{lone} is empty" in complaint(world.pairs, "--unlabelled", lone)
    shutil.copy(photos / "00.png", lone)
    assert "has no two pictures to learn from" in complaint(world.pairs, "--unlabelled", lone)
    assert "cannot be read" in complaint(world.pairs, "--unlabelled", tmp_path / "nowhere")
    for name in ("00.png", "01.png"):
        (lone / name).write_bytes((photos / name).read_bytes()[:50])
    assert f"2 of 2 pictures cannot be read, the first: {lone / '00.png'}: truncated" in complaint(
        world.pairs, "--unlabelled", lone
    )
