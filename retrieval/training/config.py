"""What a training run is told: settings with their reasons, and the recipes that hold them."""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from retrieval.encoders import Precision
from retrieval.errors import DataError
from retrieval.pairs import read_pairs
from retrieval.training.amp import AMP
from retrieval.training.classic import CLASSIC, CLASSIC_SETTINGS
from retrieval.training.losses import OBJECTIVES
from retrieval.training.parameters import check_what
from retrieval.training.reading import MAY_LACK
from retrieval.training.towers import IMAGE_TOWERS, RANDOM_TOWERS, TEXT_TOWERS

Settings = TypeVar("Settings")
_MOST_RATE = 1e30  # beyond it AdamW's steps are no float32 any more; what diverges diverges long before

# The weight where unlabelled pictures are given and none is. SLIP's own, 1, cost a point of hit@10 with frozen towers
# (600 photos of Flickr8k with captions, 1,500 without); this one cost nothing.
SELF_SUPERVISED = 0.3
_TWO_VIEWS = ("clean", "crop1")  # the fewest to tell a picture by; each more is all pictures encoded once more


@dataclass(frozen=True)
class Source:
    """Pairs to learn from. Every batch comes from one source, which keeps its pictures each other's negatives."""

    pairs: str  # whatever `read_pairs` reads, relative to the data folder
    split: str | None = None
    repeat: int = 1  # passes over it in one epoch
    validate: bool = True  # on its ``val`` split, where it has one
    weight: float = 0.0  # share of the batches that are of this source; 0: as many as its passes make
    balance: str = ""  # a column, or label: pictures of each of its values are drawn equally often; empty: each once
    balance_power: float = 0.0  # 0: so it is; up to 1, values of more pictures are drawn more often, as n ** power

    def __post_init__(self) -> None:
        if self.repeat < 1 or not 0 <= self.weight <= 1 or not 0 <= self.balance_power <= 1:
            raise DataError("repeat must be at least 1, weight and balance_power from 0 to 1")
        if self.weight and self.repeat != 1:
            raise DataError("weight and repeat both say how often a source is drawn: give one of them")
        if self.balance_power and not self.balance:
            raise DataError("balance_power is of a balance: name its column")


@dataclass(frozen=True)
class Unlabelled:
    """Pictures to learn from without a word: a folder of them, or whatever holds pairs, the captions ignored."""

    pictures: str  # relative to the data folder
    split: str | None = None  # None: the ``train`` split where there is one, else everything


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

    def sentences(self, label: str) -> tuple[str, ...]:
        """A class's name in each template."""
        return tuple(template.format(name=label.replace("_", " ")) for template in self.templates)


@dataclass(frozen=True)
class Lexicon:
    """Nouns beyond captions and classes, from WordNet: a text tower is taught what they are and what they look like.

    It needs a vocabulary of ImageNet's classes, each picture named by its synset (``n02084071_dog.jpg``).
    """

    wordnet: str  # folder with WordNet 3.0's data.noun and index.noun, relative to the data folder
    nouns: int = 256  # a batch, each with its definition: two short sentences, as much work as a caption or two
    related: float = 0.3  # weight of a noun finding the pictures of the classes that are next of kin
    defined: float = 0.3  # weight of a noun and its definition finding each other
    unlike: float = 0.5  # weight of a picture not being taken for other nouns: rare words become hubs without

    def __post_init__(self) -> None:
        if self.nouns < 2 or not all(0 <= weight < math.inf for weight in (self.related, self.defined, self.unlike)):
            raise DataError("a lexicon's nouns must be at least 2, and its weights numbers from 0 on")


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
    model: str = ""  # bundle to train further; empty: begin from the towers' own packages; `CLASSIC`: these two towers
    image_tower: str = "efficientnet-lite2"
    text_tower: str = "minilm-l6"
    word_vectors: str = ""  # file that the LSTM's words begin with, relative to the data folder; empty: random
    image_size: int = 260  # what Lite2 was trained at
    context_length: int = 64  # tokens; captions have 13 on average, 5 % have more than 20
    shared_trunk: bool = False  # one MLP and norm behind both projections; it ties what CLIP's two sides learn apart
    dim: int = 512  # a store of 100,000 photos is 100 MB
    precision: Precision = "fp16"  # of the stored weights; hit@k is that of fp32 to the last digit shown
    views: tuple[str, ...] = ("clean",)  # of each picture, one drawn at every visit
    vocabulary: Vocabulary | None = None
    lexicon: Lexicon | None = None
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
    device: str = "cpu"
    train: str = "heads"  # what learns, see `trainable_groups`; heads alone learn from cached features, in minutes
    objective: str = "infonce"  # one of `losses.OBJECTIVES`; CLIP's is hard to beat where batches are large
    matryoshka: tuple[int, ...] = ()  # prefixes that are to be usable alone, for a smaller index
    layer_decay: float = 1.0  # of the towers' learning rates with each block down; 0.7 or so for a few pairs
    lora_rank: int = 16  # with train = "lora"
    ema: float = 0.0  # decay of the average of the weights that is measured and kept; 0: the weights themselves
    teacher: str = ""  # a model whose similarities are learnt too, on the pictures as they are (CLIP-KD)
    distil: float = 1.0  # weight of what the teacher says, beside the objective
    distil_features: float = 0.0  # weight of the distance to the teacher's own vectors; CLIP-KD's 2000 is 4 of ours
    distil_interactive: float = 0.0  # weight of the contrast of our pictures with its sentences, and the reverse
    unlabelled: tuple[Unlabelled, ...] = ()  # pictures without captions, for self-supervision
    self_supervised: float = 0.0  # weight of two views of a picture finding each other (SLIP, 1 there)
    reconstruct: float = 0.0  # weight of the towers' features decoded from the vectors of both sides
    hard_group: int = 1  # pictures put together in a batch that the starting model takes for each other; 1: by chance
    mine_every: int = 0  # epochs, after which the hard groups are looked for anew, by the model as it is; 0: never
    guard: tuple[Test, ...] = ()  # what must not be forgotten: scored before, during and after
    max_loss: float = 0.01  # how far a score of the guard may fall, as a share
    image_tower_learning_rate: float = 1e-4  # a third of the projections': 4e-4 on the tower diverged
    text_tower_learning_rate: float = 3e-5  # usual for a BERT
    anchor: float = 0.0  # weight of the distance to the starting tower's features of the same picture, clean
    word_dropout: float = 0.0  # share of a caption's words hidden, so that none is learnt by heart
    captions: int = 1  # of each picture in a batch, at most as many as it has; costs the text tower only
    amp: str = "auto"  # arithmetic of towers in training: bf16 on CUDA, where it is fast, fp32 on a CPU; or say which
    part: int = 256  # pictures in the tower at a time; a larger batch is passed twice in parts: memory for time
    in_memory_gb: float = 4.0  # of decoded pictures; beyond it they are decoded at every visit. A quarter of a laptop
    interpolate: tuple[float, ...] = ()  # shares of the new weights to try, the rest the start's; empty: new ones
    checkpoint_seconds: float = 120  # between checkpoints: what a kill may cost
    command: str = ""  # for the record in model.json: what was typed, DATA standing for the data folder

    def __post_init__(self) -> None:
        self._check_start()
        towers = {
            "image_tower": tuple(IMAGE_TOWERS),
            "text_tower": tuple(TEXT_TOWERS),
            "precision": get_args(Precision),
            "amp": tuple(AMP),
        }
        for name, known in towers.items():
            if getattr(self, name) not in known:
                raise DataError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        check_what(self.train)
        if self.objective not in OBJECTIVES:
            raise DataError(f"objective must be one of {', '.join(OBJECTIVES)}, not {self.objective!r}")
        if not 1 <= self.hard_group <= self.batch_size:
            raise DataError(f"hard_group must be from 1 to batch_size, {self.batch_size}, not {self.hard_group}")
        if not 0 <= self.ema < 1 or self.lora_rank < 1 or not self.max_loss >= 0:
            raise DataError("ema must be from 0 to below 1, lora_rank at least 1, and max_loss at least 0")
        if not all(0 < prefix < self.dim for prefix in self.matryoshka):
            raise DataError(f"matryoshka prefixes must lie between 0 and dim, {self.dim}")
        self._check_sampling()
        if not 0 <= self.in_memory_gb < math.inf:
            raise DataError(f"in_memory_gb must be a number from 0 on, not {self.in_memory_gb}")
        self._check_auxiliary()
        if not self.sources:
            raise DataError("there is nothing to learn from: name pairs in at least one [[sources]]")
        if not 0 < self.epochs < math.inf or self.batch_size < 2 or not 0 <= self.learning_rate < math.inf:
            raise DataError("epochs must be more than 0, batch_size at least 2, and learning_rate a number from 0 on")
        rates = (self.learning_rate, self.image_tower_learning_rate, self.text_tower_learning_rate)
        if not all(0 <= rate <= _MOST_RATE for rate in rates):
            raise DataError(f"learning rates must be numbers from 0 to {_MOST_RATE:g}")

    def _check_start(self) -> None:
        if self.model == CLASSIC:
            for name, value in (("model", ""), ("image_tower", "cnn"), ("text_tower", "lstm")):
                object.__setattr__(self, name, value)  # else the two ways to say it would have to be told apart later
        random = [] if self.model else [t for t in (self.image_tower, self.text_tower) if t in RANDOM_TOWERS]
        if random and self.train == "heads":
            raise DataError(f'the tower {random[0]} is random, and would stay so: set train = "all"')
        if self.shared_trunk and self.model:
            raise DataError("shared_trunk is for projections that begin anew: a model to train further has its own")
        if self.word_vectors and "lstm" not in random:
            raise DataError("word_vectors are for an LSTM that begins anew: set text_tower to lstm, and no model")

    def _check_sampling(self) -> None:
        if self.mine_every < 0 or (self.mine_every and self.hard_group == 1):
            raise DataError("mine_every must be at least 0, and is of hard groups: set hard_group to more than 1")
        if self.hard_group > 1 and any(source.balance for source in self.sources):
            raise DataError("a balance and hard groups both decide who is drawn: leave one of them out")
        weights = [source.weight for source in self.sources]
        if sum(weights) >= 1 and not all(weights):
            raise DataError("the weights leave no batch to the sources without one: their sum must be below 1")

    def _check_auxiliary(self) -> None:
        weights = ("distil", "distil_features", "distil_interactive", "self_supervised", "reconstruct")
        if not all(0 <= getattr(self, name) < math.inf for name in weights):
            raise DataError(f"{', '.join(weights)} are weights: each must be a number from 0 on")
        if (self.distil_features or self.distil_interactive) and not self.teacher:
            raise DataError("distil_features and distil_interactive need a teacher: name a model")
        if self.unlabelled and not self.self_supervised:
            raise DataError(
                f"self-supervision is all that learns from unlabelled pictures: set self_supervised, {SELF_SUPERVISED} "
                "for example"
            )
        if self.lexicon and (self.vocabulary is None or self.train in ("heads", "image")):
            raise DataError("a lexicon is for a text tower that learns, beside a vocabulary: train all, text or lora")
        if self.self_supervised and self.train == "text":
            raise DataError('self_supervised is for the image tower, which train = "text" locks')


def load_config(file: Path, data: Path | None = None) -> TrainConfig:
    """Read a recipe. DataError names an unknown or a missing setting."""
    config = _config(file, read_toml(file), {"command": f"diptych train --config {file.name} --data DATA"})
    return replace(config, data=str(data)) if data else config


def read_toml(file: Path) -> dict[str, Any]:
    """Read the tables of a recipe of any kind. DataError when it cannot be read, or is no TOML."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        tables: dict[str, Any] = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{file} is not TOML: {error}") from error
    return tables


def config_from_json(file: Path) -> TrainConfig:
    """Read the config of a run folder back. FileNotFoundError; DataError when it is not what was written."""

    def without_nothing(fields: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if value is not None}

    try:
        given = json.loads(file.read_text("utf-8"), object_hook=without_nothing)
        command = str(given.pop("command"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise DataError(f"{file} is damaged ({error}): begin the run anew") from error
    return _config(file, given, {"command": command})


def _config(file: Path, settings: dict[str, Any], nested: dict[str, Any]) -> TrainConfig:
    nested["sources"] = tuple(read_settings(file, Source, table) for table in listed(settings.pop("sources", [])))
    for name in ("tests", "guard"):
        nested[name] = tuple(read_settings(file, Test, table) for table in listed(settings.pop(name, [])))
    nested["unlabelled"] = tuple(
        read_settings(file, Unlabelled, item) for item in listed(settings.pop("unlabelled", []))
    )
    if "vocabulary" in settings:
        nested["vocabulary"] = read_settings(file, Vocabulary, settings.pop("vocabulary"))
    if "lexicon" in settings:
        nested["lexicon"] = read_settings(file, Lexicon, settings.pop("lexicon"))
    if settings.get("model") == CLASSIC:
        settings = {**CLASSIC_SETTINGS, **settings}
    return read_settings(file, TrainConfig, settings, nested)


_KINDS = {"str": (str,), "str | None": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}
_LISTS = ("tuple[str, ...]", "tuple[float, ...]", "tuple[int, ...]")


def read_settings(file: Path, kind: type[Settings], table: Any, nested: Mapping[str, Any] | None = None) -> Settings:
    """One table of a recipe; DataError names a setting that is unknown, missing or of a wrong type."""
    kinds = {field.name: str(field.type) for field in fields(cast("Any", kind))}
    known = {name: (list,) if text in _LISTS else _KINDS.get(text, (str,)) for name, text in kinds.items()}
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


def listed(value: Any) -> list[Any]:
    """An array of tables as it is, and a single table as an array of one."""
    return value if isinstance(value, list) else [value]


def config_for(pairs: Sequence[Path], model: str) -> TrainConfig:
    """Settings to train a bundle further, or the classic pair from scratch, on someone's own pairs."""
    further = {"learning_rate": 3e-4}  # a third of that from scratch: the projections are good already
    return TrainConfig(
        sources=tuple(Source(str(path.absolute())) for path in pairs),
        model=model,
        command=f"diptych train {' '.join(path.name for path in pairs)} --model {model}",
        **(CLASSIC_SETTINGS if model == CLASSIC else further),
    )


def guards(sources: Sequence[Path]) -> tuple[Test, ...]:
    """What to watch over: captions where there are any, else labels; the test split where there is one."""
    found = []
    for source in sources:
        records = read_pairs(source, prefer="test", may_lack=MAY_LACK)
        split = "test" if all(record.split == "test" for record in records) else None
        task = "retrieval" if any(record.texts for record in records) else "classification"
        found.append(Test(str(source.absolute()), split, task))
    return tuple(found)


def with_changes(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """The config with some settings replaced; those that unlabelled pictures need come with them."""
    needed: dict[str, Any] = {}
    if changes.get("unlabelled"):
        needed["self_supervised"] = config.self_supervised or SELF_SUPERVISED
        if changes.get("train", config.train) == "heads" and len(set(config.views)) < 2:
            needed["views"] = _TWO_VIEWS
    return replace(config, **{**needed, **changes})


def unlabelled(sources: Sequence[Path]) -> tuple[Unlabelled, ...]:
    """Pictures to learn from without a word, wherever they lie."""
    return tuple(Unlabelled(str(source.absolute())) for source in sources)
