"""Contrastive training: from pairs to a bundle.

In this first form the towers stay frozen (LiT on both sides, Zhai et al. 2022, arXiv:2111.07991): their features are
cached, and only the two projections and the temperature learn. That is minutes on two cores.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from retrieval.bundle import IMAGE_FILE, MODEL_FILE, TEXT_FILE, TOKENIZER_FILE, Bundle
from retrieval.encoders import Encoder, Precision, find_bundle
from retrieval.errors import DataError, ModelError, UsageError
from retrieval.evaluation import classify, evaluate
from retrieval.images import Preprocessing
from retrieval.metrics import evaluate_retrieval
from retrieval.onnx_encoder import OnnxEncoder
from retrieval.pairs import Record, checksum, read_pairs
from retrieval.training.export import read_weights, write_graphs
from retrieval.training.features import image_features, text_features
from retrieval.training.losses import info_nce
from retrieval.training.towers import (
    IMAGE_TOWERS,
    TEXT_TOWERS,
    DualEncoder,
    ProjectedTower,
    minilm_folder,
    read_lite2_weights,
)

Settings = TypeVar("Settings")
Progress = Callable[[int, int], None]
Note = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """Pairs to learn from. Every batch comes from one source, which keeps its pictures each other's negatives."""

    pairs: str  # a JSONL file, relative to the data folder
    split: str | None = None
    repeat: int = 1  # passes over it in one epoch


@dataclass(frozen=True)
class Vocabulary:
    """Words beyond the captions: labelled pictures, and an ImageNet classifier's rows as pictures of their classes.

    Some of both join every batch with their class's name in one of the templates.
    """

    pairs: str  # a JSONL file of labels, relative to the data folder; in ImageNet's class order for class rows
    templates: tuple[str, ...] = ("a photo of a {name}.",)
    pictures: int = 512  # a batch
    class_rows: int = 512  # a batch
    mixtures: int = 0  # a batch: 60 to 100 % of one class row, the rest another; named by the first


@dataclass(frozen=True)
class Test:
    """Data to measure the result on, once, at the end."""

    pairs: str
    split: str | None = None
    task: str = "retrieval"


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, and how; the reason stands beside each default."""

    sources: tuple[Source, ...]
    data: str = ""  # folder that the paths are relative to
    name: str = "diptych-run"
    model: str = ""  # bundle to train further; empty: begin from the towers' own packages
    image_tower: str = "efficientnet-lite2"
    text_tower: str = "minilm-l6"
    image_size: int = 260  # what Lite2 was trained at
    context_length: int = 64  # tokens; captions have 13 on average, 5 % have more than 20
    dim: int = 512  # a store of 100,000 photos is 100 MB
    precision: Precision = "fp16"  # of the stored weights; hit@k is that of fp32 to the last digit shown
    views: tuple[str, ...] = ("clean",)  # of each picture, one drawn at every visit
    vocabulary: Vocabulary | None = None
    tests: tuple[Test, ...] = ()
    epochs: float = 40  # of so few parameters that each is seconds
    batch_size: int = 2048  # more negatives, and fewer steps for the projections to learn single photos by heart in
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 100  # steps; AdamW's second moments are noise before
    dropout: float = 0.5  # the projections see the same frozen features again and again
    image_noise: float = 0.8  # standard deviations of each feature, for the same reason: worth 3 points hit@10
    text_noise: float = 0.3  # less: five captions a photo are noise of their own
    scale: float = 20.0  # initial inverse temperature: CLIP's 14 and a bit, since the towers know much already
    seed: int = 0
    licence: str = ""
    command: str = ""  # for the record in model.json: what was typed, DATA standing for the data folder

    def __post_init__(self) -> None:
        towers = {
            "image_tower": tuple(IMAGE_TOWERS),
            "text_tower": tuple(TEXT_TOWERS),
            "precision": get_args(Precision),
        }
        for name, known in towers.items():
            if getattr(self, name) not in known:
                raise DataError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if not self.sources:
            raise DataError("there is nothing to learn from: name pairs in at least one [[sources]]")
        if not 0 < self.epochs < math.inf or self.batch_size < 2 or not 0 <= self.learning_rate < math.inf:
            raise DataError("epochs must be more than 0, batch_size at least 2, and learning_rate a number from 0 on")


def load_config(file: Path, data: Path | None = None) -> TrainConfig:
    """Read a recipe. DataError names an unknown or a missing setting."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        settings = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{file} is not TOML: {error}") from error
    nested: dict[str, Any] = {
        "command": f"diptych train --config {file.name} --data DATA",
        "sources": tuple(_settings(file, Source, table) for table in _listed(settings.pop("sources", []))),
        "tests": tuple(_settings(file, Test, table) for table in _listed(settings.pop("tests", []))),
    }
    if "vocabulary" in settings:
        nested["vocabulary"] = _settings(file, Vocabulary, settings.pop("vocabulary"))
    config = _settings(file, TrainConfig, settings, nested)
    return replace(config, data=str(data)) if data else config


_KINDS = {"str": (str,), "str | None": (str,), "int": (int,), "float": (int, float), "tuple[str, ...]": (list,)}


def _settings(file: Path, kind: type[Settings], table: Any, nested: Mapping[str, Any] | None = None) -> Settings:
    """One table of a recipe; DataError names a setting that is unknown, missing or of a wrong type."""
    known = {field.name: _KINDS.get(str(field.type), (str,)) for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(table, dict):
        raise DataError(f"{file}: expected a table with {', '.join(known)}, not {table!r}")
    for name, value in table.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise DataError(f"{file}: unknown setting {name!r}; {hint}")
        if type(value) not in known[name]:
            raise DataError(f"{file}: {name} cannot be {value!r}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}
    try:
        return kind(**values, **(nested or {}))
    except (TypeError, DataError) as error:
        raise DataError(f"{file}: {str(error).partition('() ')[2] or error}") from error


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def config_for(pairs: Sequence[Path], model: str) -> TrainConfig:
    """Settings to train a bundle further on someone's own pairs."""
    return TrainConfig(
        sources=tuple(Source(str(path.absolute())) for path in pairs),
        model=model,
        command=f"diptych train {' '.join(path.name for path in pairs)} --model {model}",
        learning_rate=3e-4,  # a third of that from scratch: the projections are good already
    )


def with_changes(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """The config with some settings replaced."""
    return replace(config, **changes)


def train(
    config: TrainConfig, output: Path, *, progress: Progress | None = None, note: Note | None = None
) -> dict[str, float]:
    """Train, and write the run folder, which is a bundle beside ``config.json`` and ``log.jsonl``.

    Args:
        config: what and how.
        output: the folder to make; it must not exist.
        progress: called with (steps done, steps in all).
        note: called with a line of text as each stage begins.

    Returns:
        The measures of the config's tests; without tests, hit@k on the ``val`` split of the pairs before and after,
        where there is one.

    Raises:
        DataError: the data are missing or wrong.
        UsageError: the folder exists.
        ModelError: the bundle cannot be trained.
    """
    _check_output(output)
    torch.manual_seed(config.seed)
    start = _start(config)
    with tempfile.TemporaryDirectory(prefix="diptych-train-") as scratch:
        frozen = _frozen_encoder(start, Path(scratch))
        if note:
            note("reading the data, and encoding what is not in the cache")
        data = _Data(config, frozen, progress)
    if not config.model:
        _standardise(start.model, data)
    run = _Run(config, start.model, data)
    before = run.validate()
    log = [{"step": 0, **before}]
    for step, loss in run.steps():
        if progress:
            progress(step, run.total)
        if step % 50 == 0 or step == run.total:
            log.append({"step": step, "loss": round(loss, 4), "scale": round(float(start.model.scale().detach()), 2)})
    output.mkdir(parents=True)
    bundle = _write_bundle(config, start, data, output)
    if note:
        note("measuring the result")
    metrics = _measure(config, bundle)
    if not metrics and before:
        metrics = {**{f"before_{key}": value for key, value in before.items()}, **run.validate()}
    bundle = replace(
        bundle, training={**bundle.training, "scores": {k: round(v, 4) for k, v in metrics.items()}}
    ).save()
    log.append({"step": run.total, **metrics})
    (output / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n", "utf-8")
    (output / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log), "utf-8")
    return metrics


def _check_output(output: Path) -> None:
    """Refuse before the training, not after it."""
    if output.exists():
        raise UsageError(f"{output} exists already: choose another --output")
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"{output} cannot be made: {above} is not a folder that can be written to")


@dataclass(frozen=True)
class _Start:
    """A model to train, with what its pictures and sentences have to go through first."""

    model: DualEncoder
    preprocessing: Preprocessing
    tokenizer_json: str
    context_length: int
    image_tower: str
    text_tower: str
    dim: int


def _start(config: TrainConfig) -> _Start:
    if config.model:
        return start_from_bundle(config.model, config)
    image, text = IMAGE_TOWERS[config.image_tower][1](), TEXT_TOWERS[config.text_tower][1]()
    preprocessing = Preprocessing(
        size=(config.image_size, config.image_size),
        mean=(127 / 255,) * 3,  # Lite's own: (byte - 127) / 128
        std=(128 / 255,) * 3,
        resize_mode="squash",
        interpolation="bicubic",
    )
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(config.context_length)
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")  # noqa: S106
    model = DualEncoder(image, text, config.dim)
    _regularise(model, config)
    return _Start(
        model,
        preprocessing,
        tokenizer.to_str(),
        config.context_length,
        config.image_tower,
        config.text_tower,
        config.dim,
    )


def _regularise(model: DualEncoder, config: TrainConfig) -> None:
    for tower, noise in ((model.image, config.image_noise), (model.text, config.text_noise)):
        tower.head.dropout, tower.head.noise = config.dropout, noise
    if not config.model:
        model.log_scale.data.fill_(math.log(config.scale))


def start_from_bundle(spec: str, config: TrainConfig | None = None) -> _Start:
    """Torch towers and projections with a bundle's own weights; ModelError for a bundle whose towers are not ours."""
    folder = find_bundle(spec)
    if folder is None:
        raise ModelError(f"{spec} is not a bundle: write one first with  diptych models export {spec} FOLDER")
    bundle = Bundle.load(folder)
    names = bundle.source.get("image_tower"), bundle.source.get("text_tower")
    if names[0] not in IMAGE_TOWERS or names[1] not in TEXT_TOWERS:
        raise ModelError(f"{spec} cannot be trained further: its towers are not among {[*IMAGE_TOWERS, *TEXT_TOWERS]}")
    image, text = IMAGE_TOWERS[names[0]][0](), TEXT_TOWERS[names[1]][0]()
    model = DualEncoder(image, text, bundle.dim)
    model.log_scale.data.fill_(math.log(bundle.score_scale))
    if config is not None:
        _regularise(model, config)
    _load_tower(model.image, folder / IMAGE_FILE)
    _load_tower(model.text, folder / TEXT_FILE)
    tokenizer_json = (folder / TOKENIZER_FILE).read_text("utf-8")
    return _Start(model, bundle.preprocessing, tokenizer_json, bundle.context_length, names[0], names[1], bundle.dim)


def _load_tower(tower: ProjectedTower, file: Path) -> None:
    counters = {k: v for k, v in tower.state_dict().items() if k.endswith("num_batches_tracked")}  # no graph has them
    try:
        tower.load_state_dict({**counters, **read_weights(file)})
    except RuntimeError as error:
        raise ModelError(f"{file} cannot be trained further: it is not the network that {MODEL_FILE} names") from error


def _frozen_encoder(start: _Start, folder: Path) -> OnnxEncoder:
    """The towers alone, as an encoder whose vectors are the features."""
    write_graphs(
        folder,
        image=start.model.image.trunk.eval(),
        text=start.model.text.trunk.eval(),
        tokenizer_json=start.tokenizer_json,
        preprocessing=start.preprocessing,
        context_length=start.context_length,
        any_length=True,
    )
    features = IMAGE_TOWERS[start.image_tower][0].features
    return OnnxEncoder(Bundle(folder, "frozen towers", features, start.preprocessing, start.context_length, 1.0).save())


@dataclass(frozen=True)
class _Pairs:
    """One source in features: pictures under each view, sentences, and which sentences belong to which picture."""

    views: list[Tensor]  # each (N, F)
    texts: Tensor  # (M, G)
    first: NDArray[np.int64]  # (N + 1,) picture i owns the sentences first[i]:first[i + 1]
    repeat: int


class _Data:
    """Everything that training reads, as features of the frozen towers."""

    def __init__(self, config: TrainConfig, frozen: Encoder, progress: Progress | None) -> None:
        base = Path(config.data)
        self.record: list[dict[str, Any]] = []
        self.sources: list[_Pairs] = []
        self.validation: list[Record] = []
        for source in config.sources:
            records = read_pairs(base / source.pairs)
            splits = {record.split for record in records}
            split = source.split or ("train" if "train" in splits else None)
            if "val" in splits and split == "train":
                self.validation += [record for record in records if record.split == "val" and record.texts]
            kept = [r for r in records if r.texts and (split is None or r.split == split)]
            if len(kept) < 2:
                raise DataError(f"{source.pairs} has no two captioned pictures of split {split!r} to learn from")
            self.sources.append(self._pairs(kept, frozen, config.views, source.repeat, progress))
            self._note(source.pairs, split, kept)
        self.vocabulary = self._vocabulary(config, frozen, progress)
        self.val = self._pairs(self.validation, frozen, ("clean",), 1, progress) if self.validation else None

    def _note(self, pairs: str, split: str | None, records: Sequence[Record]) -> None:
        self.record.append({"pairs": pairs, "split": split, "pictures": len(records), "checksum": checksum(records)})

    @staticmethod
    def _pairs(
        records: Sequence[Record], frozen: Encoder, views: Sequence[str], repeat: int, progress: Progress | None
    ) -> _Pairs:
        pictures = [torch.from_numpy(image_features(frozen, records, view, progress)).float() for view in views]
        texts = text_features(frozen, [text for record in records for text in record.texts])
        first = np.concatenate([[0], np.cumsum([len(record.texts) for record in records])])
        return _Pairs(pictures, torch.from_numpy(texts).float(), first, repeat)

    def _vocabulary(self, config: TrainConfig, frozen: Encoder, progress: Progress | None) -> _Pairs | None:
        if config.vocabulary is None:
            return None
        records = read_pairs(Path(config.data) / config.vocabulary.pairs)
        self._note(config.vocabulary.pairs, None, records)
        named = [
            replace(
                record,
                texts=tuple(t.format(name=record.labels[0].replace("_", " ")) for t in config.vocabulary.templates),
            )
            for record in records
        ]
        return self._pairs(named, frozen, config.views, 1, progress)


def _standardise(model: DualEncoder, data: _Data) -> None:
    for tower, features in (
        (model.image, torch.cat([source.views[0] for source in data.sources])),
        (model.text, torch.cat([source.texts for source in data.sources])),
    ):
        head = tower.head
        head.mean.copy_(features.mean(0))
        head.std.copy_(features.std(0) + 1e-3 * features.std())  # a feature that is always zero stays so


class _Run:
    """The steps: which rows meet in a batch, and what they learn."""

    def __init__(self, config: TrainConfig, model: DualEncoder, data: _Data) -> None:
        self.config, self.model, self.data = config, model, data
        self.random = np.random.default_rng(config.seed)
        self.batches = self._plan()
        self.total = len(self.batches)
        heads = [*model.image.head.parameters(), *model.text.head.parameters()]
        groups = [
            {"params": heads, "weight_decay": config.weight_decay},
            {"params": [model.log_scale], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
        self.class_rows = self._class_rows() if config.vocabulary and config.vocabulary.class_rows else None

    def _plan(self) -> list[tuple[_Pairs, NDArray[np.int64]]]:
        """All batches of all epochs, as (source, picture rows), in the order they are learnt from."""
        plan = []
        whole, part = divmod(self.config.epochs, 1)
        for share in [1.0] * int(whole) + ([part] if part else []):
            epoch = []
            for source in self.data.sources:
                for _ in range(source.repeat):
                    rows = self.random.permutation(len(source.views[0]))[: math.ceil(share * len(source.views[0]))]
                    size = self.config.batch_size
                    chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
                    if len(chunks) > 1 and len(chunks[-1]) < size // 2:
                        chunks.pop()  # too few negatives to learn from; another epoch draws them elsewhere
                    epoch += [(source, chunk) for chunk in chunks if len(chunk) > 1]
            self.random.shuffle(epoch)
            plan += epoch
        return plan

    def _class_rows(self) -> Tensor:
        """(C, F) the ImageNet classifier's rows, scaled to the features' spread: a virtual picture of each class."""
        weight = read_lite2_weights()["fc.weight"]
        head = self.model.image.head
        return F.normalize((weight - weight.mean(0)) / weight.std(0) * head.std + head.mean, dim=-1)

    def steps(self) -> Iterator[tuple[int, float]]:
        """Train; yield (steps done, loss) after each."""
        self.model.train()
        for step, (source, rows) in enumerate(self.batches, 1):
            warm = min(1.0, step / max(1, min(self.config.warmup, self.total // 10)))
            done = step / max(self.total, 2)  # 0 at the end, and yet a run of a single step learns something
            rate = self.config.learning_rate * warm * (1 + math.cos(math.pi * done)) / 2
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            pictures, texts, owner = self._batch(source, rows)
            loss = info_nce(self.model.image.head(pictures), self.model.text.head(texts), self.model.scale(), owner)
            if not torch.isfinite(loss):
                raise DataError(f"the loss is no number any more at step {step}: try a lower --lr")
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            yield step, float(loss.detach())
        self.model.eval()

    def _batch(self, source: _Pairs, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        parts = [(*self._draw(source, rows), rows)]
        vocabulary, settings = self.data.vocabulary, self.config.vocabulary
        if vocabulary is not None and settings is not None:
            classes = len(vocabulary.views[0])
            picked = self.random.permutation(classes)[: settings.pictures]
            parts.append((*self._draw(vocabulary, picked), -1 - picked))  # negative: never a row of the source
            if self.class_rows is not None:
                picked = self.random.permutation(classes)[: settings.class_rows]
                _, texts = self._draw(vocabulary, picked)
                parts.append((self.class_rows[picked], texts, -1 - picked))
                if settings.mixtures:
                    parts.append(self._mixtures(vocabulary, self.class_rows, settings.mixtures))
        return (
            torch.cat([pictures for pictures, _, _ in parts]),
            torch.cat([texts for _, texts, _ in parts]),
            torch.from_numpy(np.concatenate([owners for _, _, owners in parts])),
        )

    def _mixtures(self, vocabulary: _Pairs, rows: Tensor, count: int) -> tuple[Tensor, Tensor, NDArray[np.int64]]:
        """Photos show more than one thing: virtual ones do too (mixup, Zhang et al. 2018, with one name for both)."""
        first, second = self.random.integers(len(rows), size=(2, count))
        share = torch.from_numpy(self.random.uniform(0.6, 1, (count, 1))).float()
        _, texts = self._draw(vocabulary, first)
        return share * rows[first] + (1 - share) * rows[second], texts, -1 - first

    def _draw(self, source: _Pairs, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """One view and one sentence of each of these pictures."""
        view = source.views[self.random.integers(len(source.views))]
        sentences = self.random.integers(source.first[rows], source.first[rows + 1])
        return view[rows], source.texts[sentences]

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """hit@k on the validation pairs, from their features; empty without any."""
        val = self.data.val
        if val is None:
            return {}
        self.model.eval()
        pictures, texts = self.model.image.head(val.views[0]), self.model.text.head(val.texts)
        owner = np.repeat(np.arange(len(pictures)), np.diff(val.first))
        return {
            f"val_{key}": value for key, value in evaluate_retrieval(pictures.numpy(), texts.numpy(), owner).items()
        }


def _write_bundle(config: TrainConfig, start: _Start, data: _Data, output: Path) -> Bundle:
    write_graphs(
        output,
        image=start.model.image.eval(),
        text=start.model.text.eval(),
        tokenizer_json=start.tokenizer_json,
        preprocessing=start.preprocessing,
        context_length=start.context_length,
        any_length=True,
        precision=config.precision,
    )
    record = {
        "command": config.command,
        "data": data.record,
        "settings": {
            k: v for k, v in asdict(config).items() if k not in ("data", "sources", "tests", "licence", "command")
        },
        "software": {"python": platform.python_version(), "torch": torch.__version__},
    }
    return Bundle(
        path=output,
        name=config.name,
        dim=start.dim,
        preprocessing=start.preprocessing,
        context_length=start.context_length,
        score_scale=float(start.model.scale().detach()),
        precision={"image": config.precision, "text": config.precision},
        licence=config.licence,
        source={"image_tower": start.image_tower, "text_tower": start.text_tower},
        training=record,
    ).save()


def _measure(config: TrainConfig, bundle: Bundle) -> dict[str, float]:
    """The config's tests, with the bundle as written: what a user will get."""
    encoder = OnnxEncoder(bundle)
    scores: dict[str, float] = {}
    for test in config.tests:
        file = Path(config.data) / test.pairs
        measure = classify if test.task == "classification" else evaluate
        result = measure(encoder, read_pairs(file, test.split))
        name = file.stem if file.stem != "captions" else file.parent.name
        scores |= {f"{name}_{key}": value for key, value in result.metrics.items()}
    return scores
