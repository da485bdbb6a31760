"""Nouns of WordNet: how its files are read, who is kin to whom, and what a text tower learns of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from retrieval.bundle import Bundle  # noqa: E402
from retrieval.errors import DataError  # noqa: E402
from retrieval.images import read_photo  # noqa: E402
from retrieval.onnx_encoder import OnnxEncoder  # noqa: E402
from retrieval.training import config as recipes  # noqa: E402
from retrieval.training import loop  # noqa: E402
from retrieval.training.lexicon import WordNet, nouns_for, words_of  # noqa: E402
from retrieval.training.losses import told_apart  # noqa: E402
from tests.training.drawings import weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

LICENCE = "  1 This software and database is being provided to you  \n"
# synset, file, names, the kinds right above, gloss
TREE = [
    (1740, 3, "entity", (), "that which is"),
    (1930, 3, "physical_entity", (1740,), 'an entity that exists; "it is"'),
    (2100, 5, "animal", (1930,), "a living organism"),
    (2110, 5, "bird", (2100,), "has feathers"),
    (2111, 5, "ostrich Struthio_camelus", (2110,), "a fast-running African bird"),
    (2112, 5, "zorp", (2110,), 'a large Australian bird; similar to the ostrich; "a zorp ran"'),
    (2120, 5, "cat", (2100,), "feline"),
    (2130, 5, "Struthio genus_Struthio", (2110,), "type genus"),
    (2160, 9, "thought", (1740,), "what is thought"),
    (2170, 18, "pilot", (1930,), "a person who flies"),
    (2180, 6, "craft", (1930,), "a vehicle"),
    (2181, 6, "schooner", (2180,), "a sailing vessel"),
    (2182, 6, "blick sailing_blick", (2180,), "a sailing vessel with two masts"),
    (2183, 6, "gig", (2180,), "a vehicle of a third sense"),
    *((3000 + i, 20, f"plant{i}", (1930,), "a plant") for i in range(20)),
]
CLASSES = [2111, 2120, 2181, *range(3000, 3020)]  # ostrich, cat, schooner, and plants of their own kind
MET = {"pilot": 1, "ostrich": 1}


def write_wordnet(folder):
    folder.mkdir()
    data, index = [LICENCE], [LICENCE]
    senses = {}
    for synset, file, names, kinds, gloss in TREE:
        words = names.split()
        pointers = "".join(f" @ {kind:08} n 0000" for kind in kinds) + f" ~ {1740:08} n 0000"
        said = " ".join(f"{word} 0" for word in words)
        data.append(f"{synset:08} {file:02} n {len(words):02x} {said} {len(kinds) + 1:03}{pointers} | {gloss}  \n")
        for word in words:
            senses.setdefault(word.lower(), []).append(synset)
    senses["gig"] = [2110, 2120, 2100, 2183]  # the vehicle is its fourth sense
    for word, found in senses.items():
        offsets = " ".join(f"{synset:08}" for synset in found)
        index.append(f"{word} n {len(found)} 1 @ {len(found)} {MET.get(word, 0)} {offsets}  \n")
    (folder / "data.noun").write_text("".join(data), "latin-1")
    (folder / "index.noun").write_text("".join(index), "latin-1")
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_wordnet(tmp_path / "wordnet")


def test_the_files_are_read(folder):
    wordnet = WordNet(folder)
    zorp = wordnet.synsets[2112]
    assert zorp.names == ("zorp",)
    assert zorp.definition == "a large Australian bird; similar to the ostrich"
    assert (zorp.kinds, zorp.file) == ((2110,), 5)
    assert wordnet.synsets[2182].names == ("blick", "sailing blick")
    assert wordnet.above(2112) == {2112: 0, 2110: 1, 2100: 2, 1930: 3, 1740: 4}
    assert [wordnet.depth(synset) for synset in (1740, 1930, 2112)] == [1, 2, 5]
    assert wordnet.rank(2111) == (0, True)
    assert wordnet.rank(2112) == (0, False)
    assert wordnet.rank(2183) == (3, False)


def test_who_is_kin_to_whom_worked_out_by_hand(folder):
    nouns = nouns_for(WordNet(folder), CLASSES, {"ostrich", "masts"})
    row = {names[0]: number for number, names in enumerate(nouns.names)}
    # Taxa, thoughts and fourth senses are not taught, nor what is neither met in texts nor kin to few of the classes.
    assert row.keys() == {"bird", "ostrich", "zorp", "cat", "animal", "pilot", "craft", "schooner", "blick"} | {
        f"plant{i}" for i in range(20)
    }
    related = nouns.related.astype(float)
    assert related[row["zorp"], :3] == pytest.approx(
        [2 * 4 / (2 * 4 + 1 + 1), 2 * 3 / (6 + 2 + 1), 2 * 2 / (4 + 3 + 2)], abs=1e-3
    )
    assert related[row["ostrich"], 0] == 1
    assert related[row["blick"]].argmax() == 2
    assert nouns.placed[row["zorp"]]
    assert not nouns.placed[row["pilot"]]  # of which nothing is known but that it is a thing
    assert [*np.flatnonzero(nouns.kind_of[row["bird"]])] == [0]
    assert [*np.flatnonzero(nouns.kind_of[row["animal"]])] == [0, 1]
    assert not nouns.kind_of[row["zorp"]].any()
    assert nouns.unsaid[row["zorp"]]
    assert not nouns.unsaid[row["ostrich"]]
    assert not nouns.unsaid[row["pilot"]]  # people are in most photos, whatever the captions call them
    held = {nouns.names[noun][0] for noun in nouns.held_out}
    assert held <= {"zorp", "blick", "bird", "animal", "craft"}
    assert (nouns.chance > 0).sum() == len(nouns.names) - len(held)
    assert nouns.chance[row["ostrich"]] == pytest.approx(2 * nouns.chance[row["cat"]])

    target = nouns.target(np.array([row["zorp"], row["ostrich"]]), np.array([2, 0, 0]))
    np.testing.assert_allclose(target, [[0, 0.5, 0.5]] * 2, atol=1e-3)  # both pictures of the next of kin, alike


def test_words():
    assert words_of("Two dogs' bowls, in-door.") == ["two", "dogs", "bowls", "in", "door"]


def test_what_is_no_wordnet_is_said(folder, tmp_path):
    with pytest.raises(DataError, match=r"data\.noun cannot be read: .*wordnet-base"):
        WordNet(tmp_path / "nowhere")
    whole = (folder / "data.noun").read_text("latin-1")
    (folder / "data.noun").write_text(whole.replace("n 01 zorp", "n zz zorp"), "latin-1")
    with pytest.raises(DataError, match=r"data\.noun, line 7, is not WordNet's"):
        WordNet(folder)
    (folder / "data.noun").write_text("\n".join(line for line in whole.splitlines() if "animal" not in line), "latin-1")
    with pytest.raises(DataError, match="is not whole: it lacks 1 synsets"):
        WordNet(folder)
    (folder / "data.noun").write_text(whole, "latin-1")
    with pytest.raises(DataError, match="classes are no synsets"):
        nouns_for(WordNet(folder), [2111, 5], set())


# ---- what is learnt --------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(world, quick, folder, tmp_path):
    """The built-in model, drawings as pictures of the first classes, and nouns that no sentence encoder has read."""
    (tmp_path / "names").mkdir()
    lines = []
    for row, synset in enumerate(CLASSES):
        name = f"n{synset:08}_{row}.png"
        shutil.copy(world.pairs.parent / f"{3 * (row % 20):02}.png", tmp_path / "names" / name)
        lines.append({"image": name, "label": f"thing {row}"})
    (tmp_path / "names.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return replace(
        recipes.config_for([world.pairs], "builtin"),
        data=str(tmp_path),
        vocabulary=recipes.Vocabulary("names.jsonl", ("a photo of a {name}.",), pictures=23, class_rows=0),
        lexicon=recipes.Lexicon("wordnet", nouns=28, related=5.0),
        train="text",
        epochs=12,
        batch_size=40,
        part=512,
        learning_rate=1e-3,
        text_tower_learning_rate=5e-4,
        precision="fp32",
    )


def margins(run, settings, world):
    """How much nearer to the picture of its kin than to that of the other noun's, for zorp and blick."""
    encoder = OnnxEncoder(Bundle.load(run))
    pictures = encoder.encode_images([read_photo(world.pairs.parent / f"{3 * row:02}.png").image for row in (0, 2)])
    cosines = encoder.encode_texts(["a photo of a zorp.", "a photo of a blick."]) @ pictures.T
    return cosines[0, 0] - cosines[0, 1], cosines[1, 1] - cosines[1, 0]


def test_a_word_that_no_caption_has_finds_the_pictures_of_its_kin(settings, world, tmp_path, monkeypatch):
    monkeypatch.setattr("retrieval.training.lexicon._HELD_OUT", 0)
    loop.train(settings, tmp_path / "run")
    loop.train(replace(settings, lexicon=replace(settings.lexicon, related=0.0)), tmp_path / "without")
    taught, untaught = margins(tmp_path / "run", settings, world), margins(tmp_path / "without", settings, world)
    print(taught, untaught)
    assert min(taught) > 0.04
    assert min(taught) > min(untaught) + 0.05
    record = Bundle.load(tmp_path / "run").training["data"]
    assert {"wordnet": "wordnet", "nouns": 29} in record


def test_pictures_are_kept_from_words_that_say_nothing_of_them(settings, tmp_path, monkeypatch):
    """The loss falls that it is for, and only where it is asked for."""
    seen = {}
    for name, weight in (("with", 2.0), ("without", 0.0)):
        found = seen[name] = []
        monkeypatch.setattr(
            "retrieval.training.auxiliary.told_apart",
            lambda *a, into=found, real=told_apart: into.append(real(*a)) or into[-1],
        )
        loop.train(replace(settings, lexicon=replace(settings.lexicon, unlike=weight)), tmp_path / name)
    assert float(seen["with"][-1]) < float(seen["without"][-1])


def test_a_run_goes_on_bit_for_bit(settings, tmp_path, ended_after):
    settings = replace(settings, epochs=4, checkpoint_seconds=0.0)
    whole = loop.train(settings, tmp_path / "whole")
    assert "val_nouns_hit@1" in json.loads((tmp_path / "whole" / "log.jsonl").read_text().splitlines()[0])
    ended_after(2)
    with pytest.raises(KeyboardInterrupt):
        loop.train(settings, tmp_path / "ended")
    assert loop.resume(tmp_path / "ended") == whole
    assert weights(tmp_path / "ended") == weights(tmp_path / "whole")


def test_mistakes(settings, tmp_path):
    for changes in ({"train": "heads"}, {"train": "image"}, {"vocabulary": None}):
        with pytest.raises(DataError, match="a lexicon is for a text tower that learns"):
            replace(settings, **changes)
    with pytest.raises(DataError, match="at least 2"):
        recipes.Lexicon("wordnet", nouns=1)
    names = tmp_path / "names.jsonl"
    names.write_text(names.read_text().replace("n00002111_0", "ostrich"))
    (tmp_path / "names" / "n00002111_0.png").rename(tmp_path / "names" / "ostrich.png")
    with pytest.raises(DataError, match=r"'ostrich\.png' does not begin with one"):
        loop.train(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()
