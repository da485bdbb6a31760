"""Contrastive training: from pairs to a bundle.

With frozen towers (LiT on both sides, Zhai et al. 2022, arXiv:2111.07991) their features are cached, and only the two
projections and the temperature learn: minutes on two cores. End to end, the towers learn too: minutes on a GPU, from
where the frozen run ended.
"""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrieval.bundle import Bundle
from retrieval.encoders import device_beside, lasting_spec, load_encoder
from retrieval.errors import DataError, ModelError, UsageError
from retrieval.evaluation import classify, dataset_name, evaluate, mean_vectors, prompts_of
from retrieval.metrics import evaluate_classification, evaluate_retrieval
from retrieval.onnx_encoder import OnnxEncoder
from retrieval.pairs import read_pairs
from retrieval.report import write_run_page
from retrieval.training import distributed
from retrieval.training.amp import LossScale
from retrieval.training.auxiliary import Auxiliary, check_views
from retrieval.training.averaging import Interpolation, WeightAverage, choose_interpolation, interpolated, learnt
from retrieval.training.averaging import Scores as Mixed
from retrieval.training.config import TrainConfig
from retrieval.training.data import Batch, Data, HeldOut, Pairs, Sampler, Towers, image_features
from retrieval.training.features import FrozenTowers, OneFrozen
from retrieval.training.fit import FitConfig, adamw, check_finite, fit
from retrieval.training.lexicon import Nouns
from retrieval.training.lora import add_lora, merge_lora
from retrieval.training.losses import OBJECTIVES, info_nce, matryoshka, mutual_information_bound, relation_distillation
from retrieval.training.mining import HardNegatives, mine
from retrieval.training.models import StartModel, described, frozen_encoder, software, start_model
from retrieval.training.open_clip_models import OpenClipEncoder
from retrieval.training.parameters import clamp_scale, trainable_groups
from retrieval.training.pictures import TrainedTowers
from retrieval.training.run import PAGE, Checkpoint, RunFolder, load_optimizer, optimizer_tensors
from retrieval.training.towers import DualEncoder, EfficientNetLite, read_lite2_weights

_SHARES = (0.25, 0.5, 0.75, 1.0)  # of the new weights, where there is something not to be forgotten
_SAME = 0.95  # cosine of two captions that say the same: their pictures are no hard negatives of each other
_CANDIDATES = 1000  # sentences that a picture is told from, for the bound of mutual information

Progress = Callable[[int, int], None]
Note = Callable[[str], None]


def train(
    config: TrainConfig, output: Path, *, progress: Progress | None = None, note: Note | None = None
) -> dict[str, float]:
    """Train, and write the run folder: see :mod:`retrieval.training.run`. A finished one is a bundle.

    Args:
        config: what and how.
        output: the folder to make; it must not exist.
        progress: called with (steps done, steps in all).
        note: called with a line of text as each stage begins.

    Returns:
        The measures of the config's tests; without tests, hit@k on the ``val`` split of the pairs before and after,
        where there is one. Of torchrun's processes, those after the first return the latter at the end alone.

    Raises:
        DataError: the data are missing or wrong, the loss is no number any more, or the disk is full.
        UsageError: the folder exists.
        ModelError: the bundle cannot be trained.
    """
    if distributed.is_first():
        _check_output(output)
    lasting = replace(
        config,
        data=str(Path(config.data).absolute()),
        model=lasting_spec(config.model),
        teacher=lasting_spec(config.teacher),
    )
    with distributed.joined(config.device):
        folder_of = RunFolder.create if distributed.is_first() else distributed.FollowedFolder
        return _train(config, lambda: folder_of(output, lasting), progress, note)


def resume(output: Path, *, progress: Progress | None = None, note: Note | None = None) -> dict[str, float]:
    """Go on with a run that was ended, however it was ended, from its last checkpoint.

    On the same processor with the same number of threads the result is that of a run that was never ended, bit for
    bit. Arguments, result and errors as for :func:`train`; UsageError when there is no run, or it is done.
    """
    folder = RunFolder.open(output)
    with distributed.joined(folder.config.device):
        own = folder if distributed.is_first() else distributed.FollowedFolder(output, folder.config)
        return _train(folder.config, lambda: own, progress, note)


def _train(
    config: TrainConfig, folder_of: Callable[[], RunFolder], progress: Progress | None, note: Note | None
) -> dict[str, float]:
    if not distributed.is_first():
        progress = note = None
    torch.manual_seed(config.seed)
    start = start_model(config, note)
    start.model.to(config.device)
    frozen = _frozen_sides(config, start)
    _check_fit(config, start)
    check_views(config, "image" in frozen)
    if note:
        note("reading the data" + (", and encoding what is not in the cache" if frozen else ""))
    with tempfile.TemporaryDirectory(prefix="diptych-train-") as scratch:
        towers = _towers(config, start, Path(scratch))
        if distributed.process_count() > 1:
            towers = distributed.SharedTowers(towers)
        teacher = load_encoder(config.teacher, device=device_beside(config.device)) if config.teacher else None
        start.model.eval()  # what is computed of the data now is of the pictures as they are
        data = Data(config, towers, progress, teacher, note)
        if config.word_vectors:  # a part of what is learnt from: the words that it knows, each in its place
            checksum = hashlib.sha256(start.tokenizer_json.encode()).hexdigest()
            data.record.append({"word_vectors": Path(config.word_vectors).name, "checksum": checksum})
    distributed.check_alike(data.digest)
    if not config.model and isinstance(start.model, DualEncoder):
        _standardise(start.model, towers, data)
    run = _Run(config, start.model, towers, data)
    folder = folder_of()  # not before all is there that can be missing
    try:
        before = _steps(run, folder, progress, note)
    except DataError:
        folder.discard_unless_begun()
        raise
    chosen = run.finish()
    for one in chosen.tries if chosen else ():
        folder.log({"share": one.share, "target": one.scores.target, **one.scores.held_out})
    if note and chosen and config.guard:
        note(f"{chosen.share:.0%} of the new weights: {chosen.reason}")
    after = run.validate()
    if not distributed.is_first():
        return after
    with folder.writing():
        bundle = _write_bundle(config, start, data, folder.path, chosen)
    if note:
        note("measuring the result")
    metrics = _measure(config, bundle)
    if not metrics and before:
        metrics = {**{f"before_{key}": value for key, value in before.items()}, **after}
    folder.log({"step": run.total, **metrics})
    scores = {key: round(value, 4) for key, value in metrics.items()}
    log, share = folder.read_log(), chosen.share if chosen else None
    with folder.writing():
        replace(bundle, training={**bundle.training, "scores": scores}).save()
        write_run_page(folder.path.name, log, asdict(config), folder.path / PAGE, share=share)
    folder.finish()
    return metrics


def _frozen_sides(config: TrainConfig, start: StartModel) -> Collection[str]:
    """The towers whose features stay the same, so that they can be cached."""
    if not isinstance(start.model, DualEncoder):
        return ()
    return {"heads": ("image", "text"), "image": ("text",), "text": ("image",)}.get(config.train, ())


def _towers(config: TrainConfig, start: StartModel, scratch: Path) -> Towers:
    sides = _frozen_sides(config, start)
    frozen = FrozenTowers(frozen_encoder(start, scratch), config.views, config.device) if sides else None
    if frozen and len(sides) == 2:
        return frozen
    trained = TrainedTowers(
        start.model,
        start.preprocessing,
        start.tokenizer_json,
        start.context_length,
        config.device,
        config.part,
        config.word_dropout,
        trim=isinstance(start.model, DualEncoder),
        in_memory=config.in_memory_gb * 1e9,
        amp=config.amp,
    )
    if frozen is None:
        return trained
    return OneFrozen(frozen, trained) if "image" in sides else OneFrozen(trained, frozen)


def _steps(run: _Run, folder: RunFolder, progress: Progress | None, note: Note | None) -> dict[str, float]:
    """All steps that are left, with log and checkpoints on the way. Returns the measures before the first."""
    checkpoint = folder.load()
    distributed.wait_for_all()  # to have read it; the first process is soon to replace it
    if checkpoint:
        run.restore(checkpoint)
    else:
        folder.log({"step": 0, **run.validate()})
    before = {key: value for key, value in folder.read_log()[0].items() if key != "step"}
    every = max(1, run.total // 10)
    saved = time.monotonic()
    for step, loss in run.steps():
        if progress:
            progress(step, run.total)
        measured = step % every == 0 or step == run.total
        if measured:
            scale = round(float(run.model.scale().detach()), 2)
            line = {"step": step, "loss": round(loss, 4), "scale": scale, **run.validate()}
            folder.log(line)
            if note and before:
                note(f"step {step}: " + ", ".join(f"{key} {value:.3f}" for key, value in line.items()))
        if measured or time.monotonic() - saved > run.config.checkpoint_seconds:
            state = run.state()
            run.check_finite(*state.values())  # or it would take the place of the last one that is good
            folder.save(step, state, run.sampler.random)
            saved = time.monotonic()
    return before


def _check_fit(config: TrainConfig, start: StartModel) -> None:
    """Refuse what only the built-in kind of towers can do, and what only towers that learn have a use for."""
    if isinstance(start.model, DualEncoder):
        lite = isinstance(start.model.image.trunk, EfficientNetLite)
        if config.vocabulary and config.vocabulary.class_rows and not lite:
            raise DataError("a vocabulary's class_rows are rows of EfficientNet-Lite2's classifier: set it to 0")
        if config.train == "heads" and config.amp not in ("auto", "fp32"):
            raise DataError("amp is for towers that learn: projections alone, from cached features, learn in fp32")
        if config.train == "heads" and distributed.process_count() > 1:
            raise DataError("projections alone, from cached features, learn in minutes: start one process, not several")
        return
    if config.word_dropout or (config.vocabulary and config.vocabulary.class_rows):
        raise DataError("word_dropout and a vocabulary's class_rows are for the built-in towers: set both to 0")


def _check_output(output: Path) -> None:
    """Refuse before the data are read, not after it."""
    if output.exists():
        RunFolder.refuse(output)
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"{output} cannot be made: {above} is not a folder that can be written to")


@torch.no_grad()
def _standardise(model: DualEncoder, towers: Towers, data: Data) -> None:
    model.eval()
    for tower, features in (
        (model.image, torch.cat([image_features(towers, source.views[0]) for source in data.sources])),
        (model.text, torch.cat([towers.text_features(source.texts) for source in data.sources])),
    ):
        features = F.normalize(features, dim=-1)  # as the projection will see them
        head = tower.head
        head.mean.copy_(features.mean(0))
        head.std.copy_(features.std(0) + 1e-3 * features.std())  # a feature that is always zero stays so


class _Run:
    """A model, what it learns from, and how far it is."""

    def __init__(self, config: TrainConfig, model: DualEncoder | OpenClipEncoder, towers: Towers, data: Data) -> None:
        self.config, self.model, self.towers, self.data = config, model, towers, data
        self.weights = model.trained
        rows = self._class_rows() if config.vocabulary and config.vocabulary.class_rows else None
        self.step = 0
        self.sampler = Sampler(config, data, rows, self._mined if config.hard_group > 1 else None)
        self.total = len(self.sampler)
        self.objective = OBJECTIVES[config.objective]
        self.shares = config.interpolate or (_SHARES if config.guard and config.model else ())
        self.start = _copy(self.weights) if self.shares else {}
        if config.train == "lora":
            for tower in model.adaptable:
                add_lora(tower, config.lora_rank, config.lora_rank, ("attention", "linear", "conv1x1"))
        groups = trainable_groups(
            self.weights,
            config.train,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            image_learning_rate=config.image_tower_learning_rate,
            text_learning_rate=config.text_tower_learning_rate,
        )
        self.auxiliary = Auxiliary(config, model, towers, data)
        self.optimizer = adamw([*groups, *self.auxiliary.groups()])
        self.loss_scale = LossScale(config.amp, config.device)
        self.average = WeightAverage(self.model, config.ema) if config.ema else None

    def _class_rows(self) -> Tensor:
        """(C, F) the ImageNet classifier's rows, scaled to the features' spread: a virtual picture of each class."""
        weight = read_lite2_weights()["fc.weight"].to(self.config.device)
        assert isinstance(self.model, DualEncoder)  # see _check_fit
        head = self.model.image.head
        return F.normalize((weight - weight.mean(0)) / weight.std(0) * head.std + head.mean, dim=-1)

    @torch.inference_mode()
    def _mined(self) -> list[HardNegatives]:
        """What the model as it is takes for each other, in each source."""
        self.model.eval()
        found = []
        for source in self.data.sources:
            pictures, texts = (vectors.cpu().numpy() for vectors in self._vectors(source))
            found.append(mine(pictures, texts, source.owner, self.config.hard_group, ceiling=_SAME))
        return found

    def steps(self) -> Iterator[tuple[int, float]]:
        """Train; yield (steps done, loss) after each."""
        config = FitConfig(
            self.model,
            self.optimizer,
            self.total,
            warmup=self.config.warmup,
            begun=self.step,
            loss_scale=self.loss_scale,
            average=self.average,
            hint=self._hint(),
            before_step=lambda: distributed.average_gradients(self.optimizer),
            after_step=self._settle,
        )
        for step, loss in fit(self._loss, self.sampler.batches(self.step), config):
            self.step = step
            yield step, loss

    def _settle(self) -> None:
        distributed.average_statistics(self.weights)
        clamp_scale(self.weights)

    def _loss(self, batch: Batch) -> Tensor:
        features = self.towers.image_features(batch.pictures)
        rows = features if batch.virtual is None else torch.cat([features, batch.virtual])
        shown, said = rows[batch.shown], self.towers.text_features(batch.sentences)
        images, texts = self.model.image.head(shown), self.model.text.head(said)

        def objective(x: Tensor, y: Tensor) -> Tensor:
            return self.objective(x, y, batch.owner, self.model.scale(), self.model.bias)

        loss = objective(images, texts)
        if self.config.matryoshka:
            loss = loss + matryoshka(objective, images, texts, self.config.matryoshka)
        if batch.taught and self.data.teacher:
            theirs, count = self.data.teacher.score_scale, len(batch.taught[0])
            loss = loss + self.config.distil * relation_distillation(
                images[:count], texts[:count], *batch.taught, self.model.scale(), theirs
            )
        random = np.random.default_rng([self.config.seed, self.step])  # not the sampler's, which is ahead of the step
        loss = loss + self.auxiliary.loss(batch, (shown, said), (images, texts), random)
        if batch.anchor is not None:
            loss = loss + self.config.anchor * (1 - F.cosine_similarity(features, batch.anchor).mean())
        return loss

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """What the model, or the average of its weights, scores on the validation pairs and on the guard."""
        self.model.eval()
        with self.average.applied(self.model) if self.average else nullcontext():
            return {**self._validation(), **self._guard()}

    def _validation(self) -> dict[str, float]:
        """hit@k, and a lower bound of what picture and sentence tell of each other, in nats; empty without pairs."""
        val = self.data.val
        named = {f"val_{name}": value for held in self.data.named for name, value in self._held_out(held).items()}
        if self.data.nouns and len(self.data.nouns.held_out):
            named["val_nouns_hit@1"] = self._nouns_found(self.data.nouns)
        if val is None:
            return named
        pictures, texts = self._vectors(val)
        measured = evaluate_retrieval(pictures.cpu().numpy(), texts.cpu().numpy(), val.owner)
        count = min(len(pictures), _CANDIDATES)
        loss = info_nce(pictures[:count], texts[val.first[:count]], self.model.scale())
        return {
            **{f"val_{key}": value for key, value in measured.items() if "hit@" in key or "median" in key},
            "val_mutual_information": float(mutual_information_bound(loss, count)),
            **named,
        }

    def _nouns_found(self, nouns: Nouns) -> float:
        """How often a noun that was not taught finds a picture of its kin, among one of each class."""
        vocabulary, rows = self.data.vocabulary, self.sampler.class_rows
        assert vocabulary is not None  # see TrainConfig
        pictures = image_features(self.towers, vocabulary.views[0]) if rows is None else rows
        prompts = prompts_of([nouns.names[noun][0] for noun in nouns.held_out])
        texts = self.model.text.head(self.towers.text_features(self.towers.sentences(prompts)))
        best = (texts @ self.model.image.head(pictures).T).argmax(1)
        return nouns.kin_found(best.cpu().numpy())

    def _guard(self) -> dict[str, float]:
        return {f"guard_{name}": value for held in self.data.guard for name, value in self._held_out(held).items()}

    def _held_out(self, held: HeldOut) -> dict[str, float]:
        pictures, texts = (vectors.cpu().numpy() for vectors in self._vectors(held.pairs))
        if held.right is None:
            measured = evaluate_retrieval(pictures, texts, held.pairs.owner)
            return {f"{held.name}_{way}_hit@10": measured[f"{way}_hit@10"] for way in ("t2i", "i2t")}
        cosines = pictures @ mean_vectors(texts, held.right.shape[1]).T
        return {f"{held.name}_top1": evaluate_classification(cosines, held.right)["top1"]}

    def _vectors(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        pictures = self.model.image.head(image_features(self.towers, pairs.views[0]))
        texts = self.model.text.head(self.towers.text_features(pairs.texts))
        self.check_finite(pictures, texts)
        return pictures, texts

    def check_finite(self, *values: Tensor, step: int | None = None) -> None:
        """Refuse what comes of a run that diverges: DataError."""
        check_finite(*values, step=step or self.step, hint=self._hint())

    def _hint(self) -> str:
        return ", or --amp bf16" if self.config.amp == "fp16" else ""  # an activation of 65,520 is too much for it

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint has to hold, beside the step and numpy's random numbers."""
        state = {f"model.{name}": value for name, value in learnt(self.weights).items()}
        if self.average:
            state |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        state["data"] = self.data.digest
        state |= self.sampler.state()
        state |= {f"auxiliary.{name}": value for name, value in self.auxiliary.learnt.state_dict().items()}
        state["random.cpu"] = torch.get_rng_state()
        if torch.device(self.config.device).type == "cuda":
            state["random.cuda"] = torch.cuda.get_rng_state(self.config.device)
        return {**state, **self.loss_scale.state(), **optimizer_tensors(self.optimizer)}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Be as at the moment of a checkpoint. DataError when it is of another run."""
        tensors = checkpoint.tensors
        try:
            weights = _under("model.", tensors)
            if weights.keys() != learnt(self.weights).keys():
                raise ValueError("it has other weights")
            self.weights.load_state_dict({**self.weights.state_dict(), **weights})
            if self.average:
                self.average.load_state_dict(_under("average.", tensors))
            self.auxiliary.learnt.load_state_dict(_under("auxiliary.", tensors))
            load_optimizer(self.optimizer, tensors)
            if not torch.equal(tensors["data"], self.data.digest):
                raise ValueError("words, pictures or captions are others than when it began")
            self.sampler.restore(tensors)
            self.loss_scale.restore(tensors)
            torch.set_rng_state(tensors["random.cpu"])
            if "random.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["random.cuda"], self.config.device)
        except (RuntimeError, ValueError, KeyError, ModelError) as error:
            raise DataError(f"the checkpoint does not fit the run's config: {str(error).splitlines()[0]}") from error
        self.sampler.random.bit_generator.state = checkpoint.random
        self.step = checkpoint.step

    def finish(self) -> Interpolation | None:
        """Give the model the weights to keep: averaged, merged, and mixed with those of the start.

        The mixture (WiSE-FT) is the one that validation likes best among those that lose no more than ``max_loss`` on
        the guard; None where nothing was to be mixed.
        """
        if self.average:
            with self.average.applied(self.model):
                averaged = _copy(self.weights)
            self.weights.load_state_dict(averaged)
            self.average = None
        if self.config.train == "lora":
            for tower in self.model.adaptable:
                merge_lora(tower)
        if not self.shares or not (self.data.val or self.data.named or self.data.guard):
            return None
        end = _copy(self.weights)

        def score(share: float) -> Mixed:
            self.weights.load_state_dict(interpolated(self.start, end, share))
            scores = self.validate()
            hits = [v for key, v in scores.items() if key.startswith("val_") and ("hit@" in key or "_top1" in key)]
            held_out = {key: value for key, value in scores.items() if key.startswith("guard_")}
            return Mixed(sum(hits) if hits else share, held_out)  # without validation, as much as is allowed

        chosen = choose_interpolation(self.shares, score, self.config.max_loss)
        self.weights.load_state_dict(interpolated(self.start, end, chosen.share))
        return chosen


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _write_bundle(
    config: TrainConfig, start: StartModel, data: Data, output: Path, chosen: Interpolation | None
) -> Bundle:
    # What stands elsewhere in the record, or is nobody's business.
    told = ("data", "sources", "unlabelled", "word_vectors", "tests", "guard", "licence", "model", "teacher", "command")
    record = {
        "command": config.command,
        "data": data.record,
        "settings": {k: v for k, v in asdict(config).items() if k not in told},
        "software": software(),
        "hardware": _hardware(config.device),
    }
    if data.teacher:
        record["teacher"] = {"name": data.teacher.name, "fingerprint": data.teacher.fingerprint}
    if chosen:
        record["interpolation"] = {"share": chosen.share, "reason": chosen.reason}
    if config.model:
        record["start"] = described(config.model)
    return start.write(output, config.name, config.precision, licence=config.licence, training=record)


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
