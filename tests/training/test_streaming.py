"""Pictures that do not fit into memory: decoded as batches ask for them, and nothing else is different."""

from __future__ import annotations

import io
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from retrieval.errors import DataError  # noqa: E402
from retrieval.pairs import read_pairs  # noqa: E402
from retrieval.training import config as recipes  # noqa: E402
from retrieval.training import data as training_data  # noqa: E402
from retrieval.training import loop  # noqa: E402
from retrieval.training import models as starts  # noqa: E402
from retrieval.training.data import Data, Sampler  # noqa: E402
from retrieval.training.pictures import TrainedTowers  # noqa: E402
from retrieval.training.streaming import Streamed, read_rows  # noqa: E402
from tests.training.drawings import weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def several(toy):
    """The toy with several batches an epoch, drawn from a vocabulary and watched by a guard as well."""
    guard = Path(toy.data) / "names.jsonl"
    return replace(toy, batch_size=4, epochs=2, guard=(recipes.Test(str(guard), None, "classification"),), max_loss=1.0)


def as_tars(pairs: Path, folder: Path, shards: int) -> Path:
    """The same pictures and captions as webdataset has them; the pattern that names all shards."""
    folder.mkdir()
    tars = [tarfile.open(folder / f"toy-{number:03}.tar", "w") for number in range(shards)]  # noqa: SIM115
    for number, record in enumerate(read_pairs(pairs, "train")):
        note = "\n".join(record.texts).encode()
        for kind, content in (("png", record.image.read_bytes()), ("txt", note)):
            member = tarfile.TarInfo(f"{record.image.stem}.{kind}")
            member.size = len(content)
            tars[number * shards // 8].addfile(member, io.BytesIO(content))
    for tar in tars:
        tar.close()
    return folder / f"toy-{{000..{shards - 1:03}}}.tar"


def test_held_or_streamed_the_weights_are_the_same(several, tmp_path):
    for name, gigabytes in (("held", 4.0), ("streamed", 0.0), ("partly", 1.2e-4)):  # 8 pictures of 12 KB, and no more
        loop.train(replace(several, in_memory_gb=gigabytes), tmp_path / name)
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("held", "streamed", "partly")]
    assert logs[0] == logs[1] == logs[2]
    assert weights(tmp_path / "held") == weights(tmp_path / "streamed") == weights(tmp_path / "partly")


def test_what_is_held_is_what_fits(several):
    start = starts.start_model(several)

    def kinds(gigabytes):
        towers = TrainedTowers(
            start.model, start.preprocessing, start.tokenizer_json, 64, "cpu", 3, 0.0, in_memory=gigabytes * 1e9
        )
        data = Data(several, towers, None)
        return [type(pairs.views[0]) for pairs in (*data.sources, data.vocabulary, data.guard[0].pairs)]

    assert kinds(4.0) == [torch.Tensor] * 3
    assert kinds(0.0) == [Streamed] * 3
    assert kinds(1.2e-4) == [torch.Tensor, Streamed, Streamed]


def test_from_tars_as_from_files(several, tmp_path):
    """Several shards in brace notation, streamed out of them; no file stays open."""
    pattern = as_tars(Path(several.data) / "toy.jsonl", tmp_path / "shards", 3)
    before = len([*Path("/proc/self/fd").iterdir()]) if Path("/proc/self/fd").exists() else 0
    from_files = replace(several, sources=(recipes.Source("toy.jsonl", "train", validate=False),))
    from_tars = replace(several, sources=(recipes.Source(str(pattern)),), in_memory_gb=0.0)
    loop.train(from_files, tmp_path / "files")
    loop.train(from_tars, tmp_path / "tars")
    assert weights(tmp_path / "files") == weights(tmp_path / "tars")
    if before:
        assert len([*Path("/proc/self/fd").iterdir()]) <= before + 1


@pytest.mark.parametrize("steps", [(1, 3), (2,)])
def test_ended_at_any_step_a_streamed_run_goes_on_bit_for_bit(several, tmp_path, ended_after, steps):
    """The batch that was being decoded when the run ended is drawn again, of the same random numbers."""
    streamed = replace(several, in_memory_gb=0.0, checkpoint_seconds=0.0, views=("clean",))
    loop.train(replace(several, checkpoint_seconds=0.0), tmp_path / "whole")
    ended_after(*steps)
    with pytest.raises(KeyboardInterrupt):
        loop.train(streamed, tmp_path / "ended")
    for _ in steps[1:]:
        with pytest.raises(KeyboardInterrupt):
            loop.resume(tmp_path / "ended")
    loop.resume(tmp_path / "ended")
    assert weights(tmp_path / "ended") == weights(tmp_path / "whole")


def test_the_next_batch_is_decoded_while_one_is_learnt_from(several):
    start = starts.start_model(several)
    towers = TrainedTowers(start.model, start.preprocessing, start.tokenizer_json, 64, "cpu", 3, 0.0, in_memory=0)
    data = Data(replace(several, vocabulary=None), towers, None)
    asked, decode = [], data.sources[0].views[0].prepare
    ready = threading.Condition()

    def counted(picture, content):
        with ready:
            asked.append(picture)
            ready.notify()
        return decode(picture, content)

    data.sources[0].views[0] = replace(data.sources[0].views[0], prepare=counted)
    sampler = Sampler(several, data)
    batches = sampler.batches(0)
    next(batches)
    with ready:
        assert ready.wait_for(lambda: len(asked) == 8, 10)  # two batches of 4, and not more
    states = [sampler.random.bit_generator.state]
    states += [sampler.random.bit_generator.state for _ in batches]
    assert len(asked) == 4 * len(sampler) == 16
    assert states == [_after_batches(several, data, step + 1) for step in range(4)]  # as if none had been drawn ahead


def _after_batches(config, data, count):
    """The slow way: batches drawn one by one, each when the one before it is done."""
    sampler = Sampler(config, data)
    with training_data.decoders() as pool:
        for step in range(count):
            sampler._batch(*sampler.plan[step], pool)()
    return sampler.random.bit_generator.state


def test_rows_are_the_pictures_in_any_order(tmp_path):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (11, 6, 5, 3), np.uint8)
    files = [tmp_path / f"{number}.png" for number in range(11)]
    for file, picture in zip(files, pixels, strict=True):
        Image.fromarray(picture).save(file)
    files.insert(4, tmp_path / "none.png")

    def prepare(_, content):
        return np.array(Image.open(io.BytesIO(content)))

    for held in (True, False):
        rows, unreadable = read_rows(files, prepare, (6, 5), held=held, device=torch.device("cpu"), part=4)
        assert unreadable == {4: f"{tmp_path / 'none.png'}: missing: there is no such file"}
        assert len(rows) == 11
        order = random.integers(0, 11, 20)
        np.testing.assert_array_equal(rows[order].numpy(), pixels[order])
        together = [*training_data.parts(rows)]
        assert [len(part) for part in together] == ([11] if held else [4, 4, 3])
        np.testing.assert_array_equal(torch.cat(together).numpy(), pixels)
    files[0].unlink()
    with pytest.raises(DataError, match=r"0\.png could be read when the run began, and not any more: missing"):
        rows[np.array([3, 0])]


def test_anchors_are_features_of_the_pictures_as_they_are(toy, monkeypatch, tmp_path):
    """And not of an augmented view, whichever mode the model was made in."""
    kept = []
    read = loop.Data

    def look(*arguments):
        kept.append(read(*arguments))
        return kept[0]

    monkeypatch.setattr(loop, "Data", look)
    loop.train(replace(toy, epochs=1), tmp_path / "run")
    start = starts.start_model(toy)
    towers = TrainedTowers(start.model.eval(), start.preprocessing, start.tokenizer_json, 64, "cpu", 8, 0.0)
    (rows,), _ = towers.pictures(read_pairs(Path(toy.data) / "toy.jsonl", "train"))
    with torch.no_grad():
        expected = towers.image_features(rows)
    size = expected.abs().max()  # small, of random weights
    torch.testing.assert_close(kept[0].sources[0].anchor / size, expected / size, rtol=0, atol=1e-4)
