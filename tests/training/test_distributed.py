"""Several processes learn what one would: with its gradients, its random numbers, its mistakes and its run folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from retrieval.bundle import Bundle  # noqa: E402
from retrieval.encoders import export_bundle  # noqa: E402
from retrieval.errors import UsageError  # noqa: E402
from retrieval.evaluation import evaluate  # noqa: E402
from retrieval.images import Preprocessing  # noqa: E402
from retrieval.onnx_encoder import OnnxEncoder  # noqa: E402
from retrieval.pairs import read_pairs  # noqa: E402
from retrieval.training import distributed, models, pictures  # noqa: E402
from retrieval.training.losses import OBJECTIVES  # noqa: E402
from retrieval.training.run import CHECKPOINT, LOG, RunFolder  # noqa: E402
from retrieval.training.streaming import Streamed, decoders  # noqa: E402
from retrieval.training.towers import DualEncoder, EfficientNetLite, MiniLM  # noqa: E402
from tests.cli.commands import COMMAND  # noqa: E402
from tests.retrieval.open_clip_models import TINY, save_model  # noqa: E402
from tests.training.drawings import weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]


def torchrun(*command, processes=2):
    """As a user would, but for the port, which has to be free."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "XDG_DATA_HOME": "/nonexistent",
        "COLUMNS": "200",
    }
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python", "--nproc-per-node"]
    return subprocess.run(
        [*start, str(processes), *map(str, command)], env=environment, capture_output=True, text=True, timeout=120
    )


def python(code, *arguments):
    return sys.executable, "-c", f"from tests.training.test_distributed import *; {code}", *arguments


# ---- one step --------------------------------------------------------------------------------------------------------

# (pictures, sentences, part): equal shares and unequal ones; more parts than one in a share; fewer rows than processes
STEPS = {"equal": (8, 8, 99), "unequal": (7, 9, 99), "parts": (7, 9, 2), "one": (1, 2, 99)}


def gradients(count, sentences, part):
    """Of everything that learns, after one step's loss over the whole batch."""
    torch.manual_seed(0)
    model = DualEncoder(EfficientNetLite(0.5, 0.5), MiniLM(1100, layers=1), 16)
    preprocessing = Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3, "squash", "bicubic")
    tokenizer = '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'
    towers = pictures.TrainedTowers(model, preprocessing, tokenizer, 16, "cpu", part, 0.0)
    if distributed.process_count() > 1:
        towers = distributed.SharedTowers(towers)
    random = torch.Generator().manual_seed(1)
    photos = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=random)
    ids = torch.randint(1, 1100, (sentences, 12), generator=random)
    ids[:, 6:] *= torch.arange(sentences)[:, None] % 3 == 0  # of two lengths
    owner = torch.arange(sentences) % count
    model.train()
    images, texts = model.image.head(towers.image_features(photos)), model.text.head(towers.text_features(ids))
    loss = OBJECTIVES["infonce"](images[owner], texts, owner, model.scale(), model.bias) + 0.1 * images.square().sum()
    loss.backward()
    distributed.average_gradients(torch.optim.SGD(model.parameters()))
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def all_of_one_step(folder):
    """In each of two processes."""
    pictures.augment = lambda x: x.permute(0, 3, 1, 2).float() / 255
    with distributed.joined("cpu"):
        assert distributed.process_count() == 2
        found = {name: gradients(*step) for name, step in STEPS.items()}
        found["random"] = random_numbers()
        found["statistics"] = statistics()
        rank = torch.distributed.get_rank()
        found["same data"] = refuses(torch.tensor([1, 2], dtype=torch.uint8))
        found["other data"] = refuses(torch.tensor([1 + rank, 2 - rank], dtype=torch.uint8))
    torch.save(found, f"{folder}/{rank}.pt")


def refuses(digest):
    try:
        distributed.check_alike(digest)
    except distributed.DataError as error:
        return str(error)
    return ""


class _Random:
    """Towers whose features are random numbers."""

    def image_features(self, rows):
        return torch.rand(len(rows), 3)


def random_numbers():
    torch.manual_seed(5)
    features = distributed.SharedTowers(_Random()).image_features(torch.zeros(4, 1))
    return {"features": features, "behind them": torch.rand(3), "state": torch.get_rng_state()}


def statistics():
    """Running statistics after each process has taken in its half of the rows; a frozen norm's are left alone."""
    rows = torch.randn(8, 2, 3, 3, generator=torch.Generator().manual_seed(3))
    net = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2).eval())
    own = distributed.own_share(8)
    net[1].running_mean += own.start
    net(rows[own.start : own.stop])
    distributed.average_statistics(net)
    return {"own": net[0].running_mean, "frozen": net[1].running_mean, "all": 0.1 * rows.mean((0, 2, 3))}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What two processes found."""
    folder = tmp_path_factory.mktemp("step")
    run = torchrun(*python("all_of_one_step(sys.argv[1])", folder))
    assert run.returncode == 0, run.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", STEPS)
def test_gradients_are_those_of_one_process(both, name, monkeypatch):
    monkeypatch.setattr(pictures, "augment", lambda x: x.permute(0, 3, 1, 2).float() / 255)
    count, sentences, _ = STEPS[name]
    alone = gradients(count, sentences, 99)
    assert any("trunk" in weight for weight in alone)
    assert any("head" in weight for weight in alone)
    first, second = (found[name] for found in both)
    assert first.keys() == second.keys() == alone.keys()
    for weight, expected in alone.items():
        assert torch.equal(first[weight], second[weight]), weight
        torch.testing.assert_close(first[weight], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()) + 1e-7)


def test_shares_draw_their_own_random_numbers_and_what_is_behind_them_the_same(both):
    first, second = (found["random"] for found in both)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["features"][:2], first["features"][2:])


def test_running_statistics_are_those_of_the_whole_batch(both):
    first, second = (found["statistics"] for found in both)
    assert torch.equal(first["own"], second["own"])
    torch.testing.assert_close(first["own"], first["all"])
    assert not torch.equal(first["frozen"], second["frozen"])


def test_other_data_are_refused(both):
    for found in both:
        assert found["same data"] == ""
        assert "have read different pictures" in found["other data"]


def test_one_process_alone():
    assert (distributed.process_count(), distributed.is_first(), distributed.own_share(5)) == (1, True, range(5))
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    net(torch.randn(4, 2)).sum().backward()
    before = {name: value.clone() for name, value in [*net.state_dict().items()]}, net[1].weight.grad.clone()
    distributed.average_gradients(torch.optim.SGD(net.parameters()))
    distributed.average_statistics(net)
    distributed.wait_for_all()
    assert all(torch.equal(value, before[0][name]) for name, value in net.state_dict().items())
    assert torch.equal(net[1].weight.grad, before[1])


def test_streamed_pictures_are_decoded_where_they_are_wanted():
    decoded = []

    def prepare(picture, data):
        decoded.append(picture.name)
        return np.full((2, 2, 3), int(picture.name), np.uint8)

    class Source:
        def __init__(self, name):
            self.name = name

    rows = Streamed([Source(str(i)) for i in range(9)], prepare, torch.device("cpu"), 4)
    with pytest.MonkeyPatch.context() as patch, decoders() as pool:
        patch.setattr("retrieval.training.streaming.picture_bytes", lambda picture: b"")
        for wanted, expected in ((range(1, 3), [0, 7, 1, 0]), (range(4), [5, 7, 1, 3]), (range(0), [5, 0, 0, 0])):
            decoded.clear()
            found = rows.begin(np.array([5, 7, 1, 3]), pool, wanted)()
            assert found[:, 0, 0, 0].tolist() == expected
            assert len(decoded) == max(1, len(wanted))


@pytest.mark.parametrize(("device", "complaint"), [("cuda:1", "say cuda"), ("cuda", "start as many processes")])
def test_which_gpu(monkeypatch, device, complaint):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match=complaint), distributed.joined(device):
        pass
    assert not distributed.is_first()


# ---- whole runs ------------------------------------------------------------------------------------------------------


def trained(*arguments, before="", processes=2):
    """`diptych train` with pictures as they are, so that a run of one process is the same."""
    plain = "pictures.augment = lambda x: x.permute(0, 3, 1, 2).float() / 255"
    command = python(f"{plain}; {before or 'pass'}; {COMMAND}", "train", *arguments)
    return torchrun(*command, processes=processes)


def killed_after_its_checkpoint_of_step(wanted):
    save = RunFolder.save

    def save_and_end(folder, step, *rest):
        save(folder, step, *rest)
        if step == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    RunFolder.save = save_and_end


def unlucky(rank, step):
    """One process's towers have no more memory at a step."""
    features, steps = pictures.TrainedTowers.text_features, []

    def text_features(towers, rows):
        steps.append(towers.model.training)
        if os.environ["RANK"] == rank and sum(steps) == step:
            raise distributed.DataError("no memory left")
        return features(towers, rows)

    pictures.TrainedTowers.text_features = text_features


@pytest.fixture(scope="module")
def recipe(world):
    bundle = export_bundle(f"local-dir:{save_model(world.root / 'tiny', TINY['causal'])}", world.root / "tiny bundle")
    file = world.root / "recipe.toml"
    settings = {
        "train": "all",
        "epochs": 3,
        "batch_size": 21,
        "part": 4,
        "precision": "fp32",
        "ema": 0.5,
        "anchor": 0.1,
    }
    settings |= {"model": str(bundle.path), "checkpoint_seconds": 0, "in_memory_gb": 0.0, "anchor": 0.1}
    settings |= {"image_tower_learning_rate": 1e-3, "text_tower_learning_rate": 1e-3}
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    file.write_text("\n".join([*lines, "[[sources]]", f"pairs = {json.dumps(str(world.pairs))}"]))
    return file


@pytest.fixture(scope="module")
def run_of_two(recipe, world):
    run = trained("--config", recipe, "-o", world.root / "two", "--json")
    assert run.returncode == 0, run.stderr
    return world.root / "two", run


def test_a_run_of_two_processes_is_that_of_one(run_of_two, recipe, world):
    """But for the order in which numbers are added, which AdamW makes more of than the gradients are."""
    two, run = run_of_two
    assert json.loads(run.stdout)["model"] == str(two)
    assert run.stderr.count("measuring the result") == 1
    one, tiny = world.root / "one", world.root / "tiny bundle"
    alone = trained("--config", recipe, "-o", one, "--json", processes=1)
    assert alone.returncode == 0, alone.stderr
    first, second = ([json.loads(line) for line in (folder / LOG).read_text().splitlines()] for folder in (one, two))
    assert [line["loss"] for line in second[1:-1]] == pytest.approx([line["loss"] for line in first[1:-1]], abs=1e-3)
    start, alone, both = (models.start_from_bundle(str(folder)).model.clip.state_dict() for folder in (tiny, one, two))
    assert alone.keys() == both.keys()
    for name, expected in alone.items():
        learnt = ...
        if name.endswith("in_proj_bias"):  # the keys' has no gradient but noise: it adds the same to all of a softmax
            learnt = np.arange(len(expected)) // (len(expected) // 3) != 1
        torch.testing.assert_close(both[name][learnt], expected[learnt], rtol=0, atol=5e-5, msg=name)
    changes = {
        name: float((both[name] - start[name]).abs().max()) for name in both if name.endswith(("l.proj", "_projection"))
    }
    assert len(changes) == 2
    assert all(change > 1e-3 for change in changes.values()), changes


def test_its_bundle_is_a_model(run_of_two, world):
    two, run = run_of_two
    measured = evaluate(OnnxEncoder(Bundle.load(two)), read_pairs(world.pairs, "val")).metrics
    told = json.loads(run.stdout)["metrics"]
    assert {key: measured[key.removeprefix("val_")] for key in told if key.startswith("val_t2i_hit@")} == pytest.approx(
        {key: value for key, value in told.items() if key.startswith("val_t2i_hit@")}, abs=0.06
    )
    assert not (two / CHECKPOINT).exists()


def test_killed_it_ends_and_goes_on_bit_for_bit(run_of_two, recipe, world):
    two, _ = run_of_two
    killed = world.root / "killed"
    kill = "os.environ['RANK'] == '0' and killed_after_its_checkpoint_of_step(4)"
    run = trained("--config", recipe, "-o", killed, before=kill)
    assert run.returncode != 0
    assert not (killed / "model.json").exists()
    run = trained("--resume", killed)
    assert run.returncode == 0, run.stderr
    assert weights(killed) == weights(two)
    assert (killed / LOG).read_text() == (two / LOG).read_text()


def complaint(run):
    """The one line of ours, beside what torchrun tells of itself."""
    assert run.returncode == 1, run.stderr
    ours = [line for line in run.stderr.splitlines() if line.startswith("diptych:")]
    assert len(ours) == 1, run.stderr
    assert run.stderr.count("Traceback") == 1, run.stderr  # torchrun's own
    return ours[0]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_mistake_of_one_process_ends_all(recipe, world, rank):
    run = trained("--config", recipe, "-o", world.root / f"unlucky {rank}", before=f"unlucky('{rank}', 3)")
    assert complaint(run) == "diptych: no memory left"


def test_a_mistake_of_all_is_told_once(world):
    run = trained(world.pairs, "-o", world.root / "heads")
    assert "start one process, not several" in complaint(run)
    assert not (world.root / "heads").exists()
