"""What several tests of training learn from: drawings with the built-in model, and a toy set with tiny towers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

torch = pytest.importorskip("torch")

from retrieval.training import loop  # noqa: E402
from retrieval.training import models as starts  # noqa: E402
from retrieval.training.config import Source, TrainConfig, Vocabulary  # noqa: E402
from retrieval.training.run import RunFolder  # noqa: E402
from retrieval.training.towers import EfficientNetLite, MiniLM  # noqa: E402
from tests.training.drawings import COLOURS, SHAPES, draw  # noqa: E402

_RGB = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (250, 250, 250)}
_SIDES = ("left", "right")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Drawings, two to learn from and one to be tested on for each of 20 captions; and a cache of their own."""
    root = tmp_path_factory.mktemp("training")
    (root / "drawings").mkdir()
    random, lines = np.random.default_rng(0), []
    for colour in COLOURS:
        for shape in SHAPES:
            for split in ("train", "train", "val"):
                name = f"{len(lines):02}.png"
                draw(colour, shape, random).save(root / "drawings" / name)
                lines.append({"image": name, "captions": [f"a {colour} {shape}"], "split": split})
    pairs = root / "drawings" / "pairs.jsonl"
    pairs.write_text("\n".join(map(json.dumps, lines)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")  # so little work that sharing it costs more than it gains
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield SimpleNamespace(root=root, pairs=pairs, captions=lines)
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def frozen(world):
    """The towers' own encoder, written once and not by every run in this process."""
    folder = world.root / "frozen"
    folder.mkdir()
    return starts.frozen_encoder(starts.start_from_bundle("builtin"), folder)


@pytest.fixture
def quick(frozen, monkeypatch):
    monkeypatch.setattr(loop, "frozen_encoder", lambda start, folder: frozen)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """Eight pictures, a square of one of four colours on one of two sides, to learn from and to validate with; and tiny
    towers in place of the packaged ones.
    """
    (tmp_path / "images").mkdir()
    lines = []
    for colour, rgb in _RGB.items():
        for side in _SIDES:
            picture = Image.new("RGB", (40, 32), (90, 90, 90))
            picture.paste(rgb, (2, 4, 18, 28) if side == "left" else (22, 4, 38, 28))
            name = f"{colour}-{side}.png"
            picture.save(tmp_path / "images" / name)
            captions = [f"a {colour} square on the {side}", f"{side} there is something {colour}"]
            lines += [{"image": name, "captions": captions, "split": split} for split in ("train", "val")]
    named = [{"image": f"{colour}-left.png", "label": colour} for colour in _RGB]
    (tmp_path / "names.jsonl").write_text("".join(json.dumps(line) + "\n" for line in named))
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = TrainConfig(
        sources=(Source("toy.jsonl", "train"),),
        data=str(tmp_path),
        vocabulary=Vocabulary("names.jsonl", ("{name}",), pictures=2, class_rows=0),  # of fewer tokens than captions
        train="all",
        image_size=64,
        dim=32,
        epochs=3,
        batch_size=8,
        captions=2,
        part=3,
        anchor=0.1,
        word_dropout=0.1,
        dropout=0.0,
        image_noise=0.0,
        text_noise=0.0,
        precision="fp32",
    )
    _put_tiny_towers(config, monkeypatch)
    return config


def _put_tiny_towers(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Towers of random weights in place of the packaged ones, and a tokenizer of the toy's words."""
    said = "a {} square on the {} there is something"
    words = sorted({w for c in _RGB for s in _SIDES for w in said.format(c, s).split()})
    vocabulary = {"[PAD]": 0, "[UNK]": 100, "[MASK]": 103, **{w: 1000 + i for i, w in enumerate(words)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    folder = Path(config.data) / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    monkeypatch.setattr(starts, "minilm_folder", lambda: folder)

    def image() -> EfficientNetLite:
        torch.manual_seed(1)
        return EfficientNetLite(0.5, 0.5)

    def text() -> MiniLM:
        torch.manual_seed(2)
        return MiniLM(1100, layers=1)

    monkeypatch.setattr(starts, "IMAGE_TOWERS", {"efficientnet-lite2": (image, image)})
    monkeypatch.setattr(starts, "TEXT_TOWERS", {"minilm-l6": (text, text)})


@pytest.fixture
def one_thread(monkeypatch):
    """So little work that sharing it costs more than it gains."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def ended_after(monkeypatch):
    """Have every run end, as by Ctrl-C, right after the checkpoints of these steps."""

    def ended_after(*steps: int):
        save = RunFolder.save

        def save_and_end(folder, step, tensors, random):
            save(folder, step, tensors, random)
            if step in steps:
                raise KeyboardInterrupt

        monkeypatch.setattr(RunFolder, "save", save_and_end)

    return ended_after
