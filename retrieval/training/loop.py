"""Contrastive training: from pairs to a bundle.

With frozen towers (LiT on both sides, Zhai et al. 2022, arXiv:2111.07991) their features are cached, and only the two
projections and the temperature learn: minutes on two cores. End to end, the towers learn too: minutes on a GPU, from
where the frozen run ended.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from retrieval.bundle import IMAGE_FILE, MODEL_FILE, TEXT_FILE, TOKENIZER_FILE, Bundle
from retrieval.encoders import find_bundle
from retrieval.errors import DataError, ModelError, UsageError
from retrieval.evaluation import classify, dataset_name, evaluate
from retrieval.images import Preprocessing
from retrieval.metrics import evaluate_retrieval
from retrieval.onnx_encoder import OnnxEncoder
from retrieval.pairs import Record, checksum, read_pairs
from retrieval.training.config import TrainConfig, Vocabulary
from retrieval.training.export import read_weights, write_graphs
from retrieval.training.features import FrozenTowers
from retrieval.training.losses import info_nce
from retrieval.training.pictures import TrainedTowers
from retrieval.training.towers import (
    IMAGE_TOWERS,
    TEXT_TOWERS,
    DualEncoder,
    ProjectedTower,
    minilm_folder,
    read_lite2_weights,
)

Progress = Callable[[int, int], None]
Note = Callable[[str], None]


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
    start.model.to(config.device)
    if note:
        note("reading the data" + ("" if config.train_towers else ", and encoding what is not in the cache"))
    with tempfile.TemporaryDirectory(prefix="diptych-train-") as scratch:
        towers: Towers
        if config.train_towers:
            towers = TrainedTowers(
                start.model,
                start.preprocessing,
                start.tokenizer_json,
                start.context_length,
                config.device,
                config.part,
                config.word_dropout,
            )
        else:
            towers = FrozenTowers(_frozen_encoder(start, Path(scratch)), config.views, config.device)
        data = _Data(config, towers, progress)
    if not config.model:
        _standardise(start.model, towers, data)
    run = _Run(config, start.model, towers, data)
    before = run.validate()
    every = max(1, run.total // 10)
    log: list[dict[str, Any]] = [{"step": 0, **before}]
    for step, loss in run.steps():
        if progress:
            progress(step, run.total)
        if step % every == 0 or step == run.total:
            scale = round(float(start.model.scale().detach()), 2)
            log.append({"step": step, "loss": round(loss, 4), "scale": scale, **run.validate()})
            if note and before:
                note(f"step {step}: " + ", ".join(f"{key} {value:.3f}" for key, value in log[-1].items()))
    log += run.interpolate()
    after = run.validate()
    output.mkdir(parents=True)
    bundle = _write_bundle(config, start, data, output)
    if note:
        note("measuring the result")
    metrics = _measure(config, bundle)
    if not metrics and before:
        metrics = {**{f"before_{key}": value for key, value in before.items()}, **after}
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


def start_bundle(spec: str) -> Bundle:
    """The bundle to train further. ModelError for a model of another kind."""
    folder = find_bundle(spec)
    if folder is None:
        raise ModelError(f"{spec} is not a bundle: write one first with  diptych models export {spec} FOLDER")
    return Bundle.load(folder)


def start_from_bundle(spec: str, config: TrainConfig | None = None) -> _Start:
    """Torch towers and projections with a bundle's own weights; ModelError for a bundle whose towers are not ours."""
    bundle = start_bundle(spec)
    folder = bundle.path
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


class Towers(Protocol):
    """What stands between the data and the projections: it says what of a picture or a sentence is kept."""

    def pictures(self, records: Sequence[Record], progress: Progress | None = None) -> list[Tensor]:
        """Views of the records' pictures, one row each."""
        ...

    def sentences(self, texts: Sequence[str]) -> Tensor:
        """One row each."""
        ...

    def image_features(self, pictures: Tensor) -> Tensor:
        """Rows as kept -> (B, F), what the projection takes."""
        ...

    def text_features(self, sentences: Tensor) -> Tensor:
        """Rows as kept -> (B, G), what the projection takes."""
        ...


@dataclass(frozen=True)
class _Pairs:
    """One source, as the towers keep it: views of its pictures, sentences, and which of these belong to which."""

    views: list[Tensor]  # each of N rows
    texts: Tensor  # M rows
    first: NDArray[np.int64]  # (N + 1,) picture i owns the sentences first[i]:first[i + 1]
    repeat: int
    anchor: Tensor | None  # (N, F) features of the pictures before training


class _Data:
    """Everything that training reads."""

    def __init__(self, config: TrainConfig, towers: Towers, progress: Progress | None) -> None:
        base = Path(config.data)
        self.towers, self.anchored = towers, config.train_towers and config.anchor > 0
        self.record: list[dict[str, Any]] = []
        self.sources: list[_Pairs] = []
        self.validation: list[Record] = []
        for source in config.sources:
            records = read_pairs(base / source.pairs)
            splits = {record.split for record in records}
            split = source.split or ("train" if "train" in splits else None)
            if "val" in splits and split == "train" and source.validate:
                self.validation += [record for record in records if record.split == "val" and record.texts]
            kept = [r for r in records if r.texts and (split is None or r.split == split)]
            if len(kept) < 2:
                raise DataError(f"{source.pairs} has no two captioned pictures of split {split!r} to learn from")
            self.sources.append(self._pairs(kept, source.repeat, progress))
            self._note(source.pairs, split, kept)
        self.vocabulary = self._vocabulary(config, progress)
        self.val = self._pairs(self.validation, 1, progress) if self.validation else None

    def _note(self, pairs: str, split: str | None, records: Sequence[Record]) -> None:
        self.record.append({"pairs": pairs, "split": split, "pictures": len(records), "checksum": checksum(records)})

    @torch.no_grad()
    def _pairs(self, records: Sequence[Record], repeat: int, progress: Progress | None) -> _Pairs:
        views = self.towers.pictures(records, progress)
        texts = self.towers.sentences([text for record in records for text in record.texts])
        first = np.concatenate([[0], np.cumsum([len(record.texts) for record in records])])
        anchor = self.towers.image_features(views[0]) if self.anchored else None
        return _Pairs(views, texts, first, repeat, anchor)

    def _vocabulary(self, config: TrainConfig, progress: Progress | None) -> _Pairs | None:
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
        return self._pairs(named, 1, progress)


@torch.no_grad()
def _standardise(model: DualEncoder, towers: Towers, data: _Data) -> None:
    model.eval()
    for tower, features in (
        (model.image, torch.cat([towers.image_features(source.views[0]) for source in data.sources])),
        (model.text, torch.cat([towers.text_features(source.texts) for source in data.sources])),
    ):
        features = F.normalize(features, dim=-1)  # as the projection will see them
        head = tower.head
        head.mean.copy_(features.mean(0))
        head.std.copy_(features.std(0) + 1e-3 * features.std())  # a feature that is always zero stays so


@dataclass(frozen=True)
class _Batch:
    """What meets in one step: sentence i is of row ``shown[i]`` of the pictures, virtual ones behind them."""

    pictures: Tensor  # P rows, as the towers keep them
    virtual: Tensor | None  # (V, F) features
    shown: Tensor  # (B,)
    sentences: Tensor  # B rows, as the towers keep them
    owner: Tensor  # (B,) see `info_nce`
    anchor: Tensor | None  # (P, F)


class _Run:
    """The steps: which rows meet in a batch, and what they learn."""

    def __init__(self, config: TrainConfig, model: DualEncoder, towers: Towers, data: _Data) -> None:
        self.config, self.model, self.towers, self.data = config, model, towers, data
        self.random = np.random.default_rng(config.seed)
        self.batches = self._plan()
        self.total = len(self.batches)
        self.step = 0
        heads = [*model.image.head.parameters(), *model.text.head.parameters()]
        groups = [
            {"params": heads, "weight_decay": config.weight_decay, "peak": config.learning_rate},
            {"params": [model.log_scale], "weight_decay": 0.0, "peak": config.learning_rate},
        ]
        if config.train_towers:
            for tower, rate in (
                (model.image, config.image_tower_learning_rate),
                (model.text, config.text_tower_learning_rate),
            ):
                for decay, kept in ((config.weight_decay, True), (0.0, False)):  # no decay of norms and biases
                    chosen = [weight for weight in tower.trunk.parameters() if (weight.ndim > 1) == kept]
                    groups.append({"params": chosen, "weight_decay": decay, "peak": rate})
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
        self.class_rows = self._class_rows() if config.vocabulary and config.vocabulary.class_rows else None
        self.start = {name: value.clone() for name, value in model.state_dict().items()} if config.interpolate else {}

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
        weight = read_lite2_weights()["fc.weight"].to(self.config.device)
        head = self.model.image.head
        return F.normalize((weight - weight.mean(0)) / weight.std(0) * head.std + head.mean, dim=-1)

    def steps(self) -> Iterator[tuple[int, float]]:
        """Train; yield (steps done, loss) after each."""
        self.model.train()
        for step, (source, rows) in enumerate(self.batches, 1):
            warm = min(1.0, step / max(1, min(self.config.warmup, self.total // 10)))
            done = step / max(self.total, 2)  # 0 at the end, and yet a run of a single step learns something
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"] * warm * (1 + math.cos(math.pi * done)) / 2
            loss = self._loss(self._batch(source, rows))
            self.step = step
            self._check_finite(loss)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            yield step, float(loss.detach())
            self.model.train()
        self.model.eval()

    def _loss(self, batch: _Batch) -> Tensor:
        features = self.towers.image_features(batch.pictures)
        rows = features if batch.virtual is None else torch.cat([features, batch.virtual])
        images = self.model.image.head(rows[batch.shown])
        texts = self.model.text.head(self.towers.text_features(batch.sentences))
        loss = info_nce(images, texts, self.model.scale(), batch.owner)
        if batch.anchor is not None:
            loss = loss + self.config.anchor * (1 - F.cosine_similarity(features, batch.anchor).mean())
        return loss

    def _batch(self, source: _Pairs, rows: NDArray[np.int64]) -> _Batch:
        captions = min(self.config.captions, int(np.diff(source.first).min()))
        owners = [np.tile(rows, captions)]
        pictures, sentences = [self._pictures(source, rows)], [self._sentences(source, owners[0])]
        anchors, virtual = [] if source.anchor is None else [source.anchor[rows]], []
        vocabulary, settings = self.data.vocabulary, self.config.vocabulary
        if vocabulary is not None and settings is not None:
            classes = self.random.permutation(len(vocabulary.views[0]))[: settings.pictures]
            pictures.append(self._pictures(vocabulary, classes))
            sentences.append(self._sentences(vocabulary, classes))
            anchors += [] if vocabulary.anchor is None else [vocabulary.anchor[classes]]
            owners.append(-1 - classes)  # negative: never a row of the source
            for features, classes in self._virtual(settings):
                virtual.append(features)
                sentences.append(self._sentences(vocabulary, classes))
                owners.append(-1 - classes)
        shown = [np.tile(np.arange(len(rows)), captions), np.arange(len(rows), sum(map(len, pictures + virtual)))]
        return _Batch(
            torch.cat(pictures),
            torch.cat(virtual) if virtual else None,
            torch.from_numpy(np.concatenate(shown)),
            torch.cat(sentences),
            torch.from_numpy(np.concatenate(owners)).to(self.config.device),
            torch.cat(anchors) if anchors else None,
        )

    def _virtual(self, settings: Vocabulary) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """Features of pictures that there are not, and their classes."""
        if self.class_rows is None:
            return
        classes = self.random.permutation(len(self.class_rows))[: settings.class_rows]
        yield self.class_rows[classes], classes
        if settings.mixtures:  # photos show more than one thing (mixup, Zhang et al. 2018, with one name for both)
            first, second = self.random.integers(len(self.class_rows), size=(2, settings.mixtures))
            share = torch.from_numpy(self.random.uniform(0.6, 1, (settings.mixtures, 1))).to(self.class_rows)
            yield share * self.class_rows[first] + (1 - share) * self.class_rows[second], first

    def _pictures(self, source: _Pairs, rows: NDArray[np.int64]) -> Tensor:
        """One view of each of these pictures."""
        return source.views[self.random.integers(len(source.views))][rows]

    def _sentences(self, source: _Pairs, rows: NDArray[np.int64]) -> Tensor:
        """One sentence of each of these pictures."""
        return source.texts[self.random.integers(source.first[rows], source.first[rows + 1])]

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """hit@k on the validation pairs, from their features; empty without any."""
        val = self.data.val
        if val is None:
            return {}
        self.model.eval()
        pictures = self.model.image.head(self.towers.image_features(val.views[0]))
        texts = self.model.text.head(self.towers.text_features(val.texts))
        self._check_finite(pictures, texts)
        owner = np.repeat(np.arange(len(pictures)), np.diff(val.first))
        measured = evaluate_retrieval(pictures.cpu().numpy(), texts.cpu().numpy(), owner)
        return {f"val_{key}": value for key, value in measured.items() if "hit@" in key or "median" in key}

    def _check_finite(self, *values: Tensor) -> None:
        if not all(bool(torch.isfinite(value).all()) for value in values):
            raise DataError(f"the loss is no number any more at step {self.step}: try a lower --lr")

    def interpolate(self) -> list[dict[str, float]]:
        """Mix the starting weights back in (WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903), as validation likes best.

        Returns what each share scored, the best one last; the model has its weights.
        """
        shares = self.config.interpolate
        if not shares or self.data.val is None:
            return []
        end = {name: value.clone() for name, value in self.model.state_dict().items()}
        scored = []

        def mix(share: float) -> None:
            mixed = {k: torch.lerp(self.start[k], v, share) if v.is_floating_point() else v for k, v in end.items()}
            self.model.load_state_dict(mixed)

        for share in shares:
            mix(share)
            scored.append({"share": share, **self.validate()})
        scored.sort(key=lambda one: sum(value for key, value in one.items() if "hit@" in key))
        mix(scored[-1]["share"])
        return scored


def _write_bundle(config: TrainConfig, start: _Start, data: _Data, output: Path) -> Bundle:
    write_graphs(
        output,
        image=start.model.image.eval().cpu(),
        text=start.model.text.eval().cpu(),
        tokenizer_json=start.tokenizer_json,
        preprocessing=start.preprocessing,
        context_length=start.context_length,
        any_length=True,
        precision=config.precision,
    )
    told = ("data", "sources", "tests", "licence", "model", "command")  # elsewhere in the record
    record = {
        "command": config.command,
        "data": data.record,
        "settings": {k: v for k, v in asdict(config).items() if k not in told},
        "software": {"python": platform.python_version(), "torch": torch.__version__},
        "hardware": _hardware(config.device),
    }
    if config.model:
        first = start_bundle(config.model)
        record["start"] = {"name": first.name, "fingerprint": first.fingerprint, "training": first.training}
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


def _hardware(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def _measure(config: TrainConfig, bundle: Bundle) -> dict[str, float]:
    """The config's tests, with the bundle as written: what a user will get."""
    encoder = OnnxEncoder(bundle)
    scores: dict[str, float] = {}
    for test in config.tests:
        file = Path(config.data) / test.pairs
        measure = classify if test.task == "classification" else evaluate
        result = measure(encoder, read_pairs(file, test.split))
        scores |= {f"{dataset_name(file)}_{key}": value for key, value in result.metrics.items()}
    return scores
