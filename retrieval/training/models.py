"""A model to train: where it begins, and what its pictures and sentences have to go through first."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from retrieval import torch_encoder
from retrieval.bundle import IMAGE_FILE, MODEL_FILE, TEXT_FILE, TOKENIZER_FILE, Bundle
from retrieval.encoders import Precision, find_bundle
from retrieval.errors import DataError, ModelError
from retrieval.images import Preprocessing
from retrieval.onnx_encoder import OnnxEncoder
from retrieval.training.classic import LSTM, put_word_vectors, split_words, word_tokenizer, words_of
from retrieval.training.config import TrainConfig
from retrieval.training.export import any_length_text, read_weights, write_graphs
from retrieval.training.losses import OBJECTIVES
from retrieval.training.open_clip_models import SCRATCH, OpenClipEncoder, create, from_bundle
from retrieval.training.reading import Note, is_labelled_only, read_for_training, with_prompts
from retrieval.training.tokenizer_json import to_json
from retrieval.training.towers import IMAGE_TOWERS, TEXT_TOWERS, DualEncoder, ProjectedTower, Trunk, minilm_folder
from retrieval.training.word_vectors import read_word_vectors

_NONE: Mapping[str, Any] = {}
_MORE_WORDS = 20_000  # of word vectors, beyond the captions': a language's everyday words, in 12 MB of a bundle


@dataclass(frozen=True)
class StartModel:
    """A model to train, with what its pictures and sentences have to go through first."""

    model: DualEncoder | OpenClipEncoder
    preprocessing: Preprocessing
    tokenizer_json: str
    context_length: int
    dim: int
    source: Mapping[str, Any]  # from which the towers can be built again

    def write(
        self, folder: Path, name: str, precision: Precision, *, licence: str = "", training: Mapping[str, Any] = _NONE
    ) -> Bundle:
        """Write the model as it is now as a bundle into a folder that is there; it is on the CPU then."""
        self.model.eval().cpu()
        image, text, any_length = self.model.exported()
        write_graphs(
            folder,
            image=image,
            text=text,
            tokenizer_json=self.tokenizer_json,
            preprocessing=self.preprocessing,
            context_length=self.context_length,
            any_length=any_length,
            precision=precision,
        )
        return Bundle(
            path=folder,
            name=name,
            dim=self.dim,
            preprocessing=self.preprocessing,
            context_length=self.context_length,
            score_scale=float(self.model.scale().detach()),
            precision={"image": precision, "text": precision},
            licence=licence,
            source=self.source,
            training=training,
        ).save()


def start_model(config: TrainConfig, note: Note | None = None) -> StartModel:
    """The model that a config begins with.

    A bundle, an open_clip model by its name or with random weights (``scratch:ViT-B-32``), or, where none is named, the
    towers that the config names, from their own packages or with random weights, and new projections. An LSTM's words
    are those of the captions to learn from, and the first of ``word_vectors``; ``note`` is told how many have vectors.
    """
    if config.model.startswith(SCRATCH):
        return _open_clip(*create(config.model.removeprefix(SCRATCH)), config)
    if config.model:
        return start_from(config.model, config)
    tokenizer, text = _lstm(config, note) if config.text_tower == "lstm" else _minilm(config)
    model = DualEncoder(IMAGE_TOWERS[config.image_tower][1](), text, config.dim, config.shared_trunk)
    _regularise(model, config)
    source: dict[str, Any] = {"image_tower": config.image_tower, "text_tower": config.text_tower}
    if config.shared_trunk:
        source["shared_trunk"] = True
    if isinstance(text, LSTM):
        source["words"] = {"vocabulary": len(text.words), "width": text.words.shape[1], "fixed": text.fixed}
    return StartModel(
        model,
        Preprocessing(
            size=(config.image_size, config.image_size),
            mean=(127 / 255,) * 3,  # Lite's own: (byte - 127) / 128
            std=(128 / 255,) * 3,
            resize_mode="squash",
            interpolation="bicubic",
        ),
        tokenizer.to_str(),
        config.context_length,
        config.dim,
        source,
    )


def _minilm(config: TrainConfig) -> tuple[Tokenizer, Trunk]:
    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(config.context_length)
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")  # noqa: S106
    return tokenizer, TEXT_TOWERS["minilm-l6"][1]()


def _lstm(config: TrainConfig, note: Note | None) -> tuple[Tokenizer, LSTM]:
    words = words_of(_sentences(config))
    if not config.word_vectors:
        return word_tokenizer(words, config.context_length), LSTM(3 + len(words))
    file = Path(config.data) / config.word_vectors
    vectors = read_word_vectors(file, set(words), _MORE_WORDS, lambda word: split_words(word) == [word])
    if not vectors:
        raise DataError(f"{file} has a vector of none of the {len(words)} words of the captions, nor of any other word")
    known = set(words)
    more = [word for word in vectors if word not in known]
    if note:
        said = f"{len(vectors) - len(more)} of {len(words)} words of the captions have vectors"
        note(f"{file.name}: {said}; {len(more)} other words are known as well")
    words += more
    tower = LSTM(3 + len(words), len(next(iter(vectors.values()))), fixed=True)
    put_word_vectors(tower, words, vectors)
    return word_tokenizer(words, config.context_length), tower


def _sentences(config: TrainConfig) -> Iterator[str]:
    """What is learnt from, as :class:`retrieval.training.data.Data` reads it."""
    base = Path(config.data)
    for source in config.sources:
        records = read_for_training(base / source.pairs)
        split = source.split or ("train" if any(record.split == "train" for record in records) else None)
        kept = [record for record in records if split is None or record.split == split]
        for record in with_prompts(kept) if is_labelled_only(kept) else kept:
            yield from record.texts
    if config.vocabulary:
        for record in read_for_training(base / config.vocabulary.pairs):
            if record.labels:
                yield from config.vocabulary.sentences(record.labels[0])


def _open_clip(
    clip: Any,
    architecture: Mapping[str, Any],
    tokenizer: Any,
    config: TrainConfig | None,
    preprocessing: Preprocessing | None = None,
) -> StartModel:
    any_length, context_length = any_length_text(clip) is not None, int(tokenizer.context_length)
    return StartModel(
        OpenClipEncoder(clip, _bias(config)),
        preprocessing or torch_encoder.default_preprocessing(clip),
        to_json(tokenizer, context_length, any_length),
        context_length,
        int(architecture["embed_dim"]),
        {"library": "open_clip", "architecture": architecture},
    )


def _regularise(model: DualEncoder, config: TrainConfig) -> None:
    for tower, noise in ((model.image, config.image_noise), (model.text, config.text_noise)):
        tower.head.dropout, tower.head.noise = config.dropout, noise
    model.bias.data.fill_(OBJECTIVES[config.objective].bias)
    if not config.model:
        model.log_scale.data.fill_(math.log(config.scale))


def _bias(config: TrainConfig | None) -> float:
    return OBJECTIVES[config.objective].bias if config else 0.0


def start_from(spec: str, config: TrainConfig | None = None) -> StartModel:
    """Torch towers with the weights of a model that :func:`retrieval.encoders.load_encoder` knows.

    Raises:
        ModelError: there is no such model, or its towers cannot be built.
    """
    if find_bundle(spec) is not None:
        return start_from_bundle(spec, config)
    encoder = torch_encoder.load(spec, precision="fp32")
    return _open_clip(encoder.model, encoder.architecture, encoder.tokenizer, config, encoder.preprocessing)


def described(spec: str) -> Mapping[str, Any]:
    """What a record of training says of the model that it began with."""
    folder = None if spec.startswith(SCRATCH) else find_bundle(spec)
    if folder is None:
        return {"name": spec}
    bundle = Bundle.load(folder)
    return {"name": bundle.name, "fingerprint": bundle.fingerprint, "training": bundle.training}


def software() -> dict[str, str]:
    """What a record says of the software that it was made with."""
    return {"diptych": version("diptych"), "python": platform.python_version(), "torch": torch.__version__}


def start_from_bundle(spec: str, config: TrainConfig | None = None) -> StartModel:
    """Torch towers with a bundle's own weights; ModelError for a bundle whose towers cannot be built."""
    folder = find_bundle(spec)
    if folder is None:
        raise ModelError(f"{spec} is not a bundle: write one first with  diptych models export {spec} FOLDER")
    bundle = Bundle.load(folder)
    library = bundle.source.get("library")
    own = library != "open_clip"
    model = _own_towers(bundle, config) if own else OpenClipEncoder(from_bundle(bundle), _bias(config))
    return StartModel(
        model,
        bundle.preprocessing,
        (folder / TOKENIZER_FILE).read_text("utf-8"),
        bundle.context_length,
        bundle.dim,
        bundle.source,
    )


def _own_towers(bundle: Bundle, config: TrainConfig | None) -> DualEncoder:
    names = str(bundle.source.get("image_tower")), str(bundle.source.get("text_tower"))
    if names[0] not in IMAGE_TOWERS or names[1] not in TEXT_TOWERS:
        raise ModelError(
            f"{bundle.path} cannot be trained further: its towers are neither open_clip's nor among "
            f"{', '.join([*IMAGE_TOWERS, *TEXT_TOWERS])}"
        )
    try:
        text = TEXT_TOWERS[names[1]][0](**bundle.source.get("words", {}))
    except (TypeError, ValueError, RuntimeError) as error:  # sizes that are none
        raise ModelError(f"{bundle.path / MODEL_FILE} cannot be trained further: {error}") from error
    shared = bundle.source.get("shared_trunk") is True
    model = DualEncoder(IMAGE_TOWERS[names[0]][0](), text, bundle.dim, shared)
    model.log_scale.data.fill_(math.log(bundle.score_scale))
    if config is not None:
        _regularise(model, config)
    _load_tower(model.image, bundle.path / IMAGE_FILE)
    trunk = {name: value.clone() for name, value in model.text.head.state_dict().items()} if shared else {}
    _load_tower(model.text, bundle.path / TEXT_FILE)
    own = model.image.head.state_dict()
    if any(not torch.equal(trunk[name], own[name]) for name in trunk if name.startswith(("mlp.", "norm."))):
        raise ModelError(f"{bundle.path} cannot be trained further: its shared trunk is not the same in both graphs")
    return model


def _load_tower(tower: ProjectedTower, file: Path) -> None:
    counters = {k: v for k, v in tower.state_dict().items() if k.endswith("num_batches_tracked")}  # no graph has them
    try:
        tower.load_state_dict({**counters, **read_weights(file)})
    except RuntimeError as error:
        raise ModelError(f"{file} cannot be trained further: it is not the network that {MODEL_FILE} names") from error


def frozen_encoder(start: StartModel, folder: Path) -> OnnxEncoder:
    """The towers alone, as an encoder whose vectors are the features."""
    assert isinstance(start.model, DualEncoder)
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
    bundle = Bundle(folder, "frozen towers", features, start.preprocessing, start.context_length, 1.0).save()
    return OnnxEncoder(bundle, precision="fp32")
