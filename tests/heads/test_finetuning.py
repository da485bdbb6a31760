"""Gradients of a fusion sent on into the towers: what they reach, what is kept, and what is used again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from indexes.errors import ModelMismatch
from retrieval.bundle import Bundle
from retrieval.encoders import load_encoder
from retrieval.errors import DataError, ModelError, UsageError
from retrieval.heads import finetuning
from retrieval.heads.classify import fit, predict
from retrieval.heads.modalities import IMAGE, TEXT, Scaling, encode_examples
from retrieval.heads.model import ENCODER, SETTINGS, FusionClassifier
from retrieval.heads.networks import Recipe
from retrieval.heads.problem import Part, Problem
from retrieval.heads.settings import ClassifySettings
from retrieval.heads.targets import Target
from retrieval.heads.variants import FUSED
from retrieval.pairs import Example
from retrieval.report.classification import classification_page
from retrieval.training.models import start_from
from retrieval.training.parameters import tower_layers
from tests.cli.commands import complaint, diptych, result
from tests.heads.problems import torch  # skips without scikit-learn and torch
from tests.heads.test_classify import drawn, written
from tests.heads.towers import WORDS, put_small_towers, write_bundle
from tests.retrieval.open_clip_models import TINY, save_model

SETTINGS_ = ClassifySettings(
    variants=("early-logistic", "early-mlp"), draws=50, study=False, pixels=False, finetune=1, start="early-mlp"
)
FAST = Recipe(epochs=20, batch=8, learning_rate=1e-3, drop=0.0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    put_small_towers(monkeypatch)


@pytest.fixture
def noise(tmp_path):
    """Sixteen pictures of noise with nonsense beside them, and labels that nothing in them tells."""
    random = np.random.default_rng(0)
    rows = []
    for i in range(16):
        Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / f"{i}.png")
        text = " ".join(random.choice(WORDS, 5))
        rows.append(Example(tmp_path / f"{i}.png", text, columns={"label": "ab"[int(random.random() < 0.5)]}))
    rows[3] = replace(rows[3], image=None)
    rows[7] = replace(rows[7], text="")
    return rows


def problem_of(rows, encoder, task="class"):
    """They are learnt from, and chosen by."""
    tables = encode_examples(rows, (IMAGE, TEXT), (), encoder)
    scaling = Scaling.of(tables)
    target = Target.of(rows, "label", task)
    part = Part(scaling.apply(tables), target.encode(rows))
    return Problem(target, part, part), scaling


def spec_of(kind, folder):
    if kind == "open_clip":
        return f"local-dir:{save_model(folder, TINY['causal'])}"
    return str(write_bundle(kind, folder).path)


def weights_of(spec):
    return {k: v for k, v in start_from(spec).model.trained.state_dict().items() if "num_batches" not in k}


@pytest.mark.parametrize("kind", ["builtin", "classic", "open_clip"])
def test_it_overfits_and_only_the_last_blocks_change(kind, noise, tmp_path, monkeypatch):
    spec = spec_of(kind, tmp_path / "start")
    problem, scaling = problem_of(noise, load_encoder(spec, precision="fp32"))
    network = FUSED["early-mlp"]
    weak = replace(network, recipe=Recipe(epochs=1)).fit(replace(problem, seed=1))
    before = {name: value.clone() for name, value in weak.network.state_dict().items()}
    for name, rate in (("_HEAD_RATE", 1e-3), ("_IMAGE_RATE", 1e-3), ("_TEXT_RATE", 1e-3), ("_FEWEST", 80)):
        monkeypatch.setattr(finetuning, name, rate)
    monkeypatch.setattr("retrieval.training.pictures.augment", lambda x: x.permute(0, 3, 1, 2).float() / 255)
    random = torch.get_rng_state()
    tuned = finetuning.finetune(
        spec, weak, problem, scaling, noise, noise, tmp_path / "tuned", name="tuned", blocks=1, recipe=FAST
    )
    assert bool((torch.get_rng_state() == random).all())  # it leaves others' random numbers alone
    assert all(torch.equal(value, before[name]) for name, value in weak.network.state_dict().items())

    inputs = scaling.apply(encode_examples(noise, (IMAGE, TEXT), (), load_encoder(str(tuned.bundle.path))))
    assert problem.score(tuned.fitted.predict(inputs)) == 1.0
    old, new = weights_of(spec), weights_of(str(tuned.bundle.path))
    learn = {
        name for layer in tower_layers(start_from(spec).model.trained) if layer.depth <= 1 for name in layer.parameters
    }
    for name, value in new.items():
        same = float(torch.dist(value, old[name])) <= 1e-3 * float(old[name].norm())  # fp16
        if name in learn and value.numel() > 1000:
            assert not same, name
        elif name not in learn and "running_" not in name:
            assert same, name
    assert tuned.parameters == sum(old[name].numel() for name in learn) + sum(v.numel() for v in before.values())
    record = tuned.bundle.training
    assert record["blocks"] == 1
    assert record["start"]["name"] == (spec if kind == "open_clip" else kind)
    assert tuned.bundle.licence == ("" if kind == "open_clip" else "nobody's")


@pytest.mark.parametrize("kind", ["builtin", "classic"])
def test_the_towers_of_torch_begin_where_the_stored_vectors_are(kind, noise, tmp_path):
    spec = spec_of(kind, tmp_path / "start")
    problem, scaling = problem_of(noise, load_encoder(spec, precision="fp32"))
    model = start_from(spec)
    towers = finetuning._towers(model, 1, "cpu", len(noise))
    joint = finetuning._Joint(model, torch.nn.Identity(), towers, (IMAGE, TEXT), scaling, "cpu").eval()
    rows = joint.rows(noise, problem.val, problem, None)
    order = torch.randperm(len(noise))
    with torch.no_grad():
        values = joint.values(rows, order)
    for ours, theirs in zip(values, problem.val.inputs.values, strict=True):
        assert np.abs(ours.numpy() - theirs[order.numpy()]).max() < 0.1  # deviations, of float16 activations
        assert np.abs(theirs).max() > 1
    np.testing.assert_array_equal(rows.present.numpy(), problem.val.inputs.present)


def fitted(file, spec, folder, settings=SETTINGS_, **options):
    notes = []
    scratch = folder / "scratch"
    scratch.mkdir()
    encoder = load_encoder(spec, precision="fp32")
    return *fit(file, lambda: encoder, spec, settings, scratch=scratch, note=notes.append, **options), scratch


@pytest.fixture
def hard(tmp_path):
    """Warm colours on the left: random towers do not tell that apart at once."""
    rows = drawn(tmp_path)
    random = np.random.default_rng(0)
    for row in rows:
        picture = Image.new("RGB", (32, 32), tuple(random.integers(0, 120, 3).tolist()))
        picture.paste((230, 140, 20), (2, 4, 14, 28) if row["label"] == "warm" else (18, 4, 30, 28))
        picture.save(tmp_path / "images" / row["image"])
        row["text"] = "something of a thing"
    return written(tmp_path, rows)


@pytest.fixture
def kept_always(monkeypatch):
    """The frozen models are worth nothing on val, so that fine-tuning is better in any case."""
    score = Problem.score
    seen = []

    def first_low(problem, outputs):
        return score(problem, outputs) if seen else -1.0

    monkeypatch.setattr(Problem, "score", first_low)
    finetune = finetuning.finetune
    monkeypatch.setattr(finetuning, "finetune", lambda *a, **k: (finetune(*a, **k), seen.append(1))[0])


@pytest.mark.usefixtures("kept_always")
def test_what_is_kept_is_used_again(hard, tmp_path):
    spec = str(write_bundle("classic", tmp_path / "towers").path)
    settings = replace(SETTINGS_, explain=True)
    found, model, scratch = fitted(hard, spec, tmp_path, settings)
    assert found.chosen == found.finetuning.name == model.variant == "early-mlp-finetuned"
    assert found.finetuning.kept
    assert set(found.finetuning.differences) == {found.finetuning.frozen, "early-mlp"}
    assert list(found.models) == ["image", "text", "early-logistic", "early-mlp", "early-mlp-finetuned"]
    assert "early-mlp-finetuned is kept: macro-F1 on val" in found.finetuning.verdict("macro_f1")
    plain = json.loads(json.dumps(found.to_json()))
    assert plain["finetuning"]["kept"] is True
    assert set(plain["finetuning"]["differences"]["early-mlp"]) == {"macro_f1", "accuracy"}
    page = classification_page(found)
    assert "Does fine-tuning the towers pay?" in page
    assert "less early-mlp, frozen" in page
    assert found.explanation.names == ("image", "text")

    before = predict(model, hard, lambda: load_encoder(model.encoder))
    model.save(tmp_path / "model")
    shutil.rmtree(scratch)
    shutil.move(tmp_path / "model", tmp_path / "elsewhere")
    again = FusionClassifier.load(tmp_path / "elsewhere")
    assert again.encoder == str(tmp_path / "elsewhere" / ENCODER)
    encoder = load_encoder(again.encoder)
    assert encoder.fingerprint == again.fingerprint == model.fingerprint != Bundle.load(tmp_path / "towers").fingerprint
    assert predict(again, hard, lambda: encoder) == before
    for row, answer in enumerate(predict(again, hard, lambda: encoder, cached=False)):
        assert answer.outputs == pytest.approx(before[row].outputs, abs=1e-5)
    again.save(tmp_path / "copy")
    assert FusionClassifier.load(tmp_path / "copy").fingerprint == again.fingerprint

    # What was measured is what the saved one says of the rows of test.
    rows = [json.loads(line) for line in hard.read_text().splitlines()]
    right = [answer.answer == row["label"] for answer, row in zip(before, rows, strict=True) if row["split"] == "test"]
    assert found.models["early-mlp-finetuned"].test["accuracy"] == pytest.approx(np.mean(right))

    with pytest.raises(ModelMismatch):
        predict(again, hard, lambda: load_encoder(spec))
    shutil.copytree(tmp_path / "towers", tmp_path / "copy" / ENCODER, dirs_exist_ok=True)
    with pytest.raises(ModelError, match="not the one it was fitted with"):
        FusionClassifier.load(tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / ENCODER)
    with pytest.raises(ModelError, match="is not a complete model"):
        FusionClassifier.load(tmp_path / "copy")


def test_what_is_no_better_is_not_kept(tmp_path):
    """Colours and words tell everything: there is nothing to be gained, and the frozen one stays."""
    file = written(tmp_path, drawn(tmp_path))
    spec = str(write_bundle("classic", tmp_path / "towers").path)
    found, model, _ = fitted(file, spec, tmp_path)
    assert found.models[found.finetuning.frozen].val == 1
    assert not found.finetuning.kept
    assert found.chosen == found.finetuning.frozen != found.finetuning.name
    assert found.finetuning.verdict("macro_f1").startswith(f"{found.chosen} is kept, with the towers as they were")
    assert model.encoder == spec
    assert not model.own_encoder
    model.save(tmp_path / "model")
    assert not (tmp_path / "model" / ENCODER).exists()
    assert json.loads((tmp_path / "model" / SETTINGS).read_text())["encoder"] == spec
    assert "Does fine-tuning the towers pay?" in classification_page(found)


@pytest.mark.usefixtures("kept_always")
@pytest.mark.parametrize("lack", ["text", "image"])
def test_one_modality_alone(hard, tmp_path, lack):
    """A perceptron of it is what begins; the other tower stays as it was."""
    rows = [{**json.loads(line), lack: None} for line in hard.read_text().splitlines()]
    if lack == "image":
        rows = [{**row, "text": f"{'red' if row['label'] == 'warm' else 'blue'} thing"} for row in rows]
    spec = str(write_bundle("classic", tmp_path / "towers").path)
    found, model, _ = fitted(written(tmp_path, rows, "one.jsonl"), spec, tmp_path, replace(SETTINGS_, start=""))
    assert found.chosen == model.variant == "mlp-finetuned"
    assert found.verdict == "there is one modality alone: nothing was fused"
    assert classification_page(found)
    other = f"{lack}."
    old, new = weights_of(spec), weights_of(model.encoder)
    assert all(torch.allclose(new[name], old[name], rtol=1e-3, atol=1e-5) for name in old if name.startswith(other))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"folds": 3}, "leave out --finetune, or --folds"),
        ({"start": "graph"}, "'graph' cannot be fine-tuned: fitted networks are early-mlp"),
        ({"start": "", "variants": ("late-average",)}, "no network is among the variants"),
        ({"finetune": 0}, "add --finetune"),
        ({"columns": ("x",)}, "no towers to fine-tune"),
    ],
)
def test_what_cannot_be_fine_tuned_is_told_in_a_line(tmp_path, settings, told):
    rows = [{"x": i % 7 - 3 + 0.5, "label": "up" if i % 7 > 3 else "down"} for i in range(70)]
    with pytest.raises(DataError, match=told):
        fit(written(tmp_path, rows), None, "", replace(SETTINGS_, **settings), scratch=tmp_path)


def test_more_blocks_than_there_are_are_refused(hard, tmp_path):
    spec = str(write_bundle("classic", tmp_path / "towers").path)
    with pytest.raises(ModelError, match="the deeper tower has 3 blocks"):
        fitted(hard, spec, tmp_path, replace(SETTINGS_, finetune=4))
    with pytest.raises(UsageError, match="name a scratch"):
        fit(hard, lambda: load_encoder(spec), spec, SETTINGS_)


def test_the_command(hard, tmp_path):
    spec = write_bundle("classic", tmp_path / "towers").path
    options = ("--variants", "early-mlp", "--bootstrap", "50", "--no-study", "--no-pixels", "--model", spec)
    out = tmp_path / "out"
    run = diptych("classify", "fit", hard, "--out", out, "--json", "--finetune", "--finetune-blocks", "2", *options)
    printed = result(run)
    assert printed["finetuning"]["blocks"] == 2
    assert (out / ENCODER).is_dir() == printed["finetuning"]["kept"] == (printed["chosen"] == "early-mlp-finetuned")
    assert len(result(diptych("classify", "predict", out, hard, "--json"))) == 60
    wrong = complaint(diptych("classify", "fit", hard, "--out", tmp_path / "no", "--finetune-from", "gmu", *options))
    assert "add --finetune" in wrong
