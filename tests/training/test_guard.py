"""What a run keeps: the average of its weights, the mixture that forgets nothing; whatever learns, by any objective."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from retrieval.bundle import Bundle  # noqa: E402
from retrieval.encoders import load_encoder  # noqa: E402
from retrieval.errors import DataError  # noqa: E402
from retrieval.evaluation import classify, evaluate  # noqa: E402
from retrieval.onnx_encoder import OnnxEncoder  # noqa: E402
from retrieval.pairs import read_pairs  # noqa: E402
from retrieval.training import config as recipes  # noqa: E402
from retrieval.training import loop  # noqa: E402
from retrieval.training.losses import OBJECTIVES  # noqa: E402
from retrieval.training.run import LOG  # noqa: E402
from tests.cli.commands import complaint, diptych  # noqa: E402
from tests.odd_photos import real_photos  # noqa: E402
from tests.training.drawings import weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def log(run):
    return [json.loads(line) for line in (run / LOG).read_text().splitlines()]


@pytest.fixture
def guard(tmp_path):
    """Photos that the built-in model knows and the drawings' run should not forget: captions, and labels."""
    known = {"chelsea.png": "a cat", "coffee.png": "a cup of coffee", "rocket.jpg": "a rocket launching into the sky"}
    rows = [
        {"image": str(photo), "captions": [known[photo.name]], "label": known[photo.name][2:]}
        for photo in real_photos()
        if photo.name in known
    ]
    captions, labels = tmp_path / "photos.jsonl", tmp_path / "named.jsonl"
    captions.write_text("\n".join(json.dumps({"image": row["image"], "captions": row["captions"]}) for row in rows))
    labels.write_text("\n".join(json.dumps({"image": row["image"], "label": row["label"]}) for row in rows))
    return captions, labels


@pytest.fixture
def kept(monkeypatch):
    """The weights that a run ends with, by name."""
    kept = {}
    write = loop._write_bundle

    def look(settings, start, *rest):
        kept.update({name: value.clone() for name, value in start.model.state_dict().items()})
        return write(settings, start, *rest)

    monkeypatch.setattr(loop, "_write_bundle", look)
    return kept


def test_nothing_is_forgotten_that_must_not_be(world, quick, guard, tmp_path):
    """A learning rate that ruins the model: with the guard, what is kept knows the photos as before."""
    settings = replace(
        recipes.config_for([world.pairs], "builtin"), epochs=25, learning_rate=0.03, guard=recipes.guards(guard)
    )
    assert [(test.task, test.split) for test in settings.guard] == [("retrieval", None), ("classification", None)]
    metrics = loop.train(settings, tmp_path / "run")
    names = ["guard_photos_t2i_hit@10", "guard_photos_i2t_hit@10", "guard_named_top1"]
    assert all(metrics[f"before_{name}"] == 1.0 for name in names)
    assert all(metrics[name] >= 0.99 for name in names)
    lines = log(tmp_path / "run")
    assert any(line["guard_named_top1"] < 0.99 for line in lines if "loss" in line), "it forgot nothing: a weak test"
    tries = [line for line in lines if "share" in line]
    assert [line["share"] for line in tries] == [0.0, 0.25, 0.5, 0.75, 1.0]
    bundle = Bundle.load(tmp_path / "run")
    share = bundle.training["interpolation"]["share"]
    allowed = [line for line in tries if line["guard_named_top1"] >= 0.99]
    assert share == max(allowed, key=lambda line: line["target"])["share"]
    page = (tmp_path / "run" / "run.html").read_text("utf-8")
    assert "Won and lost" in page
    assert "named" in page
    # The bundle as written says so too.
    assert classify(OnnxEncoder(bundle), read_pairs(guard[1])).metrics["top1"] == 1.0


def test_the_command_takes_a_guard(world, guard, tmp_path):
    run = diptych(
        "train", world.pairs, "-o", tmp_path / "run", "--epochs", "2", "--guard", guard[0], "--max-loss", "0", "--json"
    )
    assert run.returncode == 0, run.stderr
    metrics = json.loads(run.stdout)["metrics"]
    assert metrics["guard_photos_t2i_hit@10"] == metrics["before_guard_photos_t2i_hit@10"] == 1.0
    assert "of the new weights:" in run.stderr
    assert "unknown" not in run.stderr
    for wrong, words in (
        (["--objective", "magic"], "objective must be one of infonce"),
        (["--train", "half"], "half"),
        (["--guard", tmp_path / "none.jsonl"], "none.jsonl"),
    ):
        line = complaint(diptych("train", world.pairs, "-o", tmp_path / "other", *wrong))
        assert words in line


def test_the_average_of_the_weights_is_measured_and_kept(toy, kept, tmp_path, monkeypatch):
    seen = []
    step = torch.optim.AdamW.step

    def watch(optimizer, *arguments):
        result = step(optimizer, *arguments)
        seen.append(next(iter(optimizer.param_groups[1]["params"])).detach().clone())  # the image head's projection
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    begun = []
    monkeypatch.setattr(loop.WeightAverage, "__init__", _remember(loop.WeightAverage.__init__, begun))
    loop.train(replace(toy, ema=0.8), tmp_path / "run")
    names = [name for name, value in kept.items() if value.shape == seen[0].shape and "image.head" in name]
    expected = next(begun[0][name] for name in names)
    for number, value in enumerate(seen, 1):
        decay = min(0.8, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * value
    assert any(torch.allclose(kept[name], expected, atol=1e-6) for name in names)
    assert not any(torch.allclose(kept[name], seen[-1], atol=1e-6) for name in names)


def _remember(init, into):
    def wrapped(average, model, decay):
        into.append({name: value.clone() for name, value in model.state_dict().items()})
        init(average, model, decay)

    return wrapped


def test_a_run_with_an_average_goes_on_bit_for_bit(toy, tmp_path, ended_after):
    settings = replace(toy, ema=0.9, checkpoint_seconds=0.0, objective="sigmoid", matryoshka=(8,))
    whole = loop.train(settings, tmp_path / "whole")
    ended_after(3)
    with pytest.raises(KeyboardInterrupt):
        loop.train(settings, tmp_path / "ended")
    assert loop.resume(tmp_path / "ended") == whole
    assert weights(tmp_path / "ended") == weights(tmp_path / "whole")


@pytest.mark.parametrize("what", ["heads", "all", "last-1", "image", "text", "lora"])
def test_what_learns_and_what_stays(toy, kept, tmp_path, what):
    """Weights of the start and of the end, by tower; and the bundle is what was validated."""
    settings = replace(toy, train=what, anchor=0.0, word_dropout=0.0)
    metrics = loop.train(settings, tmp_path / "run")
    start = loop.start_model(settings).model.state_dict()
    assert kept.keys() == start.keys()  # LoRA's updates are merged
    changed = {name for name in start if not torch.equal(start[name], kept[name])} - {"log_scale"}
    standardised = {f"{side}.head.{name}" for side in ("image", "text") for name in ("mean", "std")}
    parts = {"image.trunk", "text.trunk", "image.head", "text.head"}
    expected = {
        "heads": {"image.head", "text.head"},
        "all": parts,
        "last-1": parts,
        "image": {"image.trunk", "image.head"},
        "text": {"text.trunk", "text.head"},
        "lora": {"image.trunk", "text.trunk"},
    }[what]
    assert {".".join(name.split(".")[:2]) for name in changed - standardised} == expected
    if what == "last-1":
        blocks = {name.split(".")[3] for name in changed if name.startswith("image.trunk.blocks")}
        assert blocks == {max(name.split(".")[3] for name in start if name.startswith("image.trunk.blocks"))}
    measured = evaluate(OnnxEncoder(Bundle.load(tmp_path / "run")), read_pairs(tmp_path / "toy.jsonl", "val")).metrics
    assert metrics["val_t2i_hit@5"] == pytest.approx(measured["t2i_hit@5"], abs=0.13)  # one near tie of 16 captions


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_every_objective_runs(toy, tmp_path, objective):
    loop.train(replace(toy, objective=objective, epochs=12, ema=0.5), tmp_path / "run")
    losses = [line["loss"] for line in log(tmp_path / "run") if "loss" in line]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-4:]) < np.mean(losses[:4])  # each batch is of other crops


def test_the_bound_of_mutual_information_is_below_the_log_of_the_candidates(world, quick, tmp_path):
    loop.train(replace(recipes.config_for([world.pairs], "builtin"), epochs=10, learning_rate=1e-3), tmp_path / "run")
    bounds = [line["val_mutual_information"] for line in log(tmp_path / "run") if "val_mutual_information" in line]
    assert all(bound <= np.log(20) for bound in bounds)
    assert bounds[-1] > bounds[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": "luck"}, "objective must be one of infonce"),
        ({"train": "last-"}, "last-"),
        ({"ema": 1.0}, "ema must be"),
        ({"matryoshka": (512,)}, "matryoshka prefixes must lie between"),
        ({"max_loss": float("nan")}, "max_loss"),
    ],
)
def test_settings_that_are_wrong(world, changes, words):
    with pytest.raises(DataError, match=words):
        replace(recipes.config_for([world.pairs], "builtin"), **changes)


def test_a_teacher_is_followed(toy, tmp_path, world):
    """The built-in model knows the colours; a student that only distils comes to rank the sentences as it does."""
    settings = replace(toy, train="heads", vocabulary=None, anchor=0.0, word_dropout=0.0, epochs=60, learning_rate=3e-3)
    alone = loop.train(replace(settings, objective="distance"), tmp_path / "alone")
    taught = loop.train(replace(settings, objective="distance", teacher="builtin", distil=20.0), tmp_path / "taught")
    records = read_pairs(tmp_path / "toy.jsonl", "val")
    teacher = evaluate(load_encoder(), records).details
    theirs = teacher.image_vectors @ teacher.text_vectors.T

    def agreement(run):
        student = evaluate(OnnxEncoder(Bundle.load(run)), records).details
        return np.corrcoef((student.image_vectors @ student.text_vectors.T).ravel(), theirs.ravel())[0, 1]

    assert agreement(tmp_path / "taught") > max(0.7, agreement(tmp_path / "alone") + 0.2)
    assert taught.keys() == alone.keys()
    record = Bundle.load(tmp_path / "taught").training
    assert record["teacher"]["fingerprint"] == load_encoder().fingerprint
    assert "teacher" not in Bundle.load(tmp_path / "alone").training
