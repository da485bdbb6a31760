"""What a training run is told: settings with their reasons, and the recipes that hold them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retrieval.encoders import Precision
from retrieval.errors import DataError


@dataclass(frozen=True)
class Source:
    """Pairs to learn from. Every batch comes from one source, which keeps its pictures each other's negatives."""

    pairs: str  # a JSONL file, relative to the data folder
    split: str | None = None
    repeat: int = 1  # passes over it in one epoch
    validate: bool = True  # on its ``val`` split, where it has one


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
    device: str = "cpu"
    train_towers: bool = False  # end to end, from pictures and words; frozen towers learn from cached features
    image_tower_learning_rate: float = 1e-4  # a third of the projections': 4e-4 on the tower diverged
    text_tower_learning_rate: float = 3e-5  # usual for a BERT
    anchor: float = 0.0  # weight of the distance to the starting tower's features of the same picture, clean
    word_dropout: float = 0.0  # share of a caption's words hidden, so that none is learnt by heart
    captions: int = 1  # of each picture in a batch, at most as many as it has; costs the text tower only
    part: int = 256  # pictures in the tower at a time; a larger batch is passed twice in parts: memory for time
    interpolate: tuple[float, ...] = ()  # shares of the new weights to try, the rest the start's; empty: new ones


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
    try:
        settings["sources"] = tuple(Source(**item) for item in settings["sources"])
        settings["tests"] = tuple(Test(**item) for item in settings.get("tests", []))
        vocabulary = settings.get("vocabulary")
        if vocabulary:
            settings["vocabulary"] = Vocabulary(**{**vocabulary, "templates": tuple(vocabulary["templates"])})
        for name in ("views", "interpolate"):
            if name in settings:
                settings[name] = tuple(settings[name])
        config = TrainConfig(**settings)
    except (TypeError, KeyError) as error:
        raise DataError(f"{file}: {str(error).replace('__init__() got an', 'has an')}") from error
    return replace(config, data=str(data)) if data else config


def config_for(pairs: Sequence[Path], model: str) -> TrainConfig:
    """Settings to train a bundle further on someone's own pairs."""
    return TrainConfig(
        sources=tuple(Source(str(path.absolute())) for path in pairs),
        model=model,
        learning_rate=3e-4,  # a third of that from scratch: the projections are good already
    )


def with_changes(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """The config with some settings replaced."""
    return replace(config, **changes)
