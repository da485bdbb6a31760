"""A model to train: where it begins, and what its pictures and sentences have to go through first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from retrieval.bundle import IMAGE_FILE, MODEL_FILE, TEXT_FILE, TOKENIZER_FILE, Bundle
from retrieval.encoders import find_bundle
from retrieval.errors import ModelError
from retrieval.images import Preprocessing
from retrieval.onnx_encoder import OnnxEncoder
from retrieval.training.config import TrainConfig
from retrieval.training.export import read_weights, write_graphs
from retrieval.training.losses import OBJECTIVES
from retrieval.training.towers import IMAGE_TOWERS, TEXT_TOWERS, DualEncoder, ProjectedTower, minilm_folder


@dataclass(frozen=True)
class StartModel:
    """A model to train, with what its pictures and sentences have to go through first."""

    model: DualEncoder
    preprocessing: Preprocessing
    tokenizer_json: str
    context_length: int
    image_tower: str
    text_tower: str
    dim: int


def start_model(config: TrainConfig) -> StartModel:
    """The model that a config begins with: a bundle, or the towers' own packages with new projections."""
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
    return StartModel(
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
        model.bias.data.fill_(OBJECTIVES[config.objective].bias)


def start_bundle(spec: str) -> Bundle:
    """The bundle to train further. ModelError for a model of another kind."""
    folder = find_bundle(spec)
    if folder is None:
        raise ModelError(f"{spec} is not a bundle: write one first with  diptych models export {spec} FOLDER")
    return Bundle.load(folder)


def start_from_bundle(spec: str, config: TrainConfig | None = None) -> StartModel:
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
    return StartModel(
        model, bundle.preprocessing, tokenizer_json, bundle.context_length, names[0], names[1], bundle.dim
    )


def _load_tower(tower: ProjectedTower, file: Path) -> None:
    counters = {k: v for k, v in tower.state_dict().items() if k.endswith("num_batches_tracked")}  # no graph has them
    try:
        tower.load_state_dict({**counters, **read_weights(file)})
    except RuntimeError as error:
        raise ModelError(f"{file} cannot be trained further: it is not the network that {MODEL_FILE} names") from error


def frozen_encoder(start: StartModel, folder: Path) -> OnnxEncoder:
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
    features = start.model.image.trunk.features
    return OnnxEncoder(Bundle(folder, "frozen towers", features, start.preprocessing, start.context_length, 1.0).save())
