"""A run that is killed goes on where it was, and ends with the very weights of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from retrieval.errors import DataError, UsageError  # noqa: E402
from retrieval.training import config as recipes  # noqa: E402
from retrieval.training import loop  # noqa: E402
from retrieval.training.run import CHECKPOINT, CONFIG, LOG, RunFolder, load_optimizer, optimizer_tensors  # noqa: E402
from tests.cli.commands import COMMAND, complaint, diptych  # noqa: E402
from tests.training.drawings import weights  # noqa: E402


@pytest.fixture
def config(world):
    start = recipes.config_for([world.pairs], "builtin")
    return replace(start, epochs=12, learning_rate=1e-3, views=("clean", "crop1"), checkpoint_seconds=0.0)


def test_ended_at_any_step_it_goes_on_bit_for_bit(config, quick, tmp_path, ended_after):
    whole = loop.train(config, tmp_path / "whole")
    ended_after(1, 5, 12)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path / "ended")
    torch.manual_seed(99)  # whatever the next process begins with
    for _ in range(2):
        assert not (tmp_path / "ended" / "model.json").exists()
        with pytest.raises(KeyboardInterrupt):
            loop.resume(tmp_path / "ended")
    assert loop.resume(tmp_path / "ended") == whole
    assert weights(tmp_path / "ended") == weights(tmp_path / "whole")
    assert (tmp_path / "ended" / LOG).read_text() == (tmp_path / "whole" / LOG).read_text()
    assert not (tmp_path / "ended" / CHECKPOINT).exists()
    with pytest.raises(UsageError, match="is done: there is nothing to resume"):
        loop.resume(tmp_path / "ended")


def test_ended_while_the_result_is_measured(config, quick, tmp_path, monkeypatch):
    """All steps are done and the bundle is written: resuming measures it, and writes what is missing."""
    whole = loop.train(config, tmp_path / "whole")

    def end(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_measure", end)
        with pytest.raises(KeyboardInterrupt):
            loop.train(config, tmp_path / "ended")
    assert loop.resume(tmp_path / "ended") == whole
    assert weights(tmp_path / "ended") == weights(tmp_path / "whole")
    assert (tmp_path / "ended" / LOG).read_text() == (tmp_path / "whole" / LOG).read_text()
    assert (tmp_path / "ended" / "run.html").exists()


def test_kill_9_at_random_moments(world, tmp_path):
    """Of the whole command, from its first second to its last."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'model = "builtin"\nepochs = 40\nlearning_rate = 1e-3\ncheckpoint_seconds = 0.0\n'
        f'[[sources]]\npairs = "{world.pairs}"\nsplit = "train"\n'
    )
    assert diptych("train", "--config", recipe, "-o", tmp_path / "whole").returncode == 0
    random = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    arguments, kills = ["--config", str(recipe), "-o", str(tmp_path / "killed")], 0
    while kills < 3:
        with subprocess.Popen(
            [sys.executable, "-c", COMMAND, "train", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            begun = time.monotonic() + 60
            while not (tmp_path / "killed" / CHECKPOINT).exists() and process.poll() is None:
                assert time.monotonic() < begun
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.5 if kills else 0.1))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
            else:
                break  # it was done before: the test is of fewer kills
        arguments = ["--resume", str(tmp_path / "killed")]
    if not (tmp_path / "killed" / "model.json").exists():
        run = diptych("train", *arguments)
        assert run.returncode == 0, run.stderr
    assert kills
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_the_log_is_cut_back_to_the_checkpoint(config, tmp_path):
    folder = RunFolder.create(tmp_path / "run", config)
    for step in range(3):
        folder.log({"step": step})
    folder.save(3, {}, np.random.default_rng(1))
    folder.log({"step": 4})
    with (tmp_path / "run" / LOG).open("a") as file:
        file.write('{"step": 5, "lo')  # a line that a kill cut short
    checkpoint = RunFolder.open(tmp_path / "run").load()
    assert (checkpoint.step, folder.read_log()) == (3, [{"step": step} for step in range(3)])
    assert RunFolder.open(tmp_path / "run").config == config


def test_an_optimiser_goes_there_and_back(tmp_path, config):
    torch.manual_seed(0)
    one, other = (torch.nn.Linear(3, 2) for _ in range(2))
    other.load_state_dict(one.state_dict())
    optimisers = [torch.optim.AdamW(layer.parameters(), lr=0.1) for layer in (one, other)]
    data = torch.randn(4, 3)
    folder, random = RunFolder.create(tmp_path / "run", config), np.random.default_rng(0)
    for step in range(4):
        if step == 2:  # the other goes on from the disk
            folder.save(step, {"weight": one.weight, "bias": one.bias, **optimizer_tensors(optimisers[0])}, random)
            stored = folder.load().tensors
            with torch.no_grad():
                other.weight.copy_(stored["weight"])
                other.bias.copy_(stored["bias"])
            load_optimizer(optimisers[1], stored)
        for layer, optimiser in zip((one, other), optimisers, strict=True):
            if layer is other and step < 2:
                continue
            optimiser.zero_grad()
            layer(data).square().sum().backward()
            optimiser.step()
    assert torch.equal(one.weight, other.weight)


def test_mistakes(config, quick, tmp_path, monkeypatch, world):
    (tmp_path / "empty").mkdir()
    assert "holds no training run" in complaint(diptych("train", "--resume", tmp_path / "empty"))
    assert "holds no training run" in complaint(diptych("train", "--resume", tmp_path / "none"))
    run = diptych("train", "--resume", tmp_path / "empty", "--epochs", "3")
    assert (run.returncode, "leave out epochs" in run.stderr) == (2, True)
    assert diptych("train", world.pairs, "--resume", tmp_path / "empty").returncode == 2

    folder = RunFolder.create(tmp_path / "run", config)
    folder.save(1, {}, np.random.default_rng(0))
    with pytest.raises(UsageError, match=r"exists already: .* or go on with  diptych train --resume"):
        loop.train(config, tmp_path / "run")
    with pytest.raises(DataError, match="does not fit"):
        loop.resume(tmp_path / "run")
    (tmp_path / "run" / CHECKPOINT).write_bytes(b"\x00" * 50)
    with pytest.raises(DataError, match="is damaged"):
        loop.resume(tmp_path / "run")
    (tmp_path / "run" / CONFIG).write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        loop.resume(tmp_path / "run")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("retrieval.training.run.replacing", full)
    with pytest.raises(DataError, match="No space left on device"):
        folder.save(2, {}, np.random.default_rng(0))


def test_the_config_comes_back_as_it_was(tmp_path, world):
    config = recipes.TrainConfig(
        sources=(recipes.Source(str(world.pairs), "train", 2),),
        vocabulary=recipes.Vocabulary("words.jsonl", ("a {name}", "the {name}"), 3, 0, 0),
        tests=(recipes.Test("t.jsonl"), recipes.Test("u.jsonl", "val", "classification")),
        views=("clean", "flip"),
        interpolate=(0.5, 1.0),
        command="typed",
    )
    RunFolder.create(tmp_path / "run", config)
    assert recipes.config_from_json(tmp_path / "run" / CONFIG) == config
    assert json.loads((tmp_path / "run" / CONFIG).read_text())["command"] == "typed"
