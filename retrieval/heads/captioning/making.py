"""From a recipe to a decoder in a folder of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retrieval.embedding import EmbeddingCache, Progress, cache_name, encode_pictures, encode_sentences
from retrieval.encoders import Encoder
from retrieval.errors import DataError, ModelError
from retrieval.heads.captioning.decoders import MEMORY, Card, ConsensusDecoder, new_decoder
from retrieval.heads.captioning.export import TorchStepper, settings_of, write_decoder
from retrieval.heads.captioning.network import CaptionNet
from retrieval.heads.captioning.recipe import CaptionRecipe, Captions, read_captions
from retrieval.heads.captioning.scores import bleu
from retrieval.heads.captioning.search import greedy
from retrieval.heads.captioning.training import Learnt, Validation, first_captions, learn
from retrieval.heads.captioning.words import END, UNKNOWN, Words, plain
from retrieval.pairs import read_pairs

Note = Callable[[str], None]


def fit_decoder(
    recipe: CaptionRecipe,
    data: Path,
    encoder: Encoder,
    spec: str,
    out: Path,
    *,
    checkpoint: Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    cached: bool = True,
    encoding: Progress | None = None,
    progress: Progress | None = None,
    note: Note = lambda _: None,
) -> Card:
    """Make a decoder and write it into a new folder.

    Args:
        recipe: what it is, and learns from.
        data: the folder that the recipe's paths are relative to.
        encoder: the model whose vectors it reads.
        spec: how that is loaded, for the card.
        out: the folder to make.
        checkpoint: see :func:`retrieval.heads.captioning.training.learn`.
        device: of the network.
        threads: of torch; None is as many as it takes.
        cached: whether vectors are kept for the next time.
        encoding: called with (pictures done, pictures in all) of each source.
        progress: called with (steps done, steps in all).
        note: told what there is to wait for, and each validation.

    Raises:
        ModelError: the folder exists, or cannot be written.
        DataError: a source cannot be read or has no captions, the checkpoint does not fit, or the loss diverges.
    """
    if out.exists():
        raise ModelError(f"{out} exists already: choose another --out, or remove it first")
    if threads:
        torch.set_num_threads(threads)
    captions = read_captions(recipe, data, encoder, encoding, cached)
    note(f"{len(captions):,} captions behind {len(captions.vectors):,} vectors")
    make = _KINDS[recipe.kind]
    cache = EmbeddingCache(cache_name(encoder), encoder.dim) if cached else None
    return make(recipe, captions, _Place(data, encoder, spec, out, cache, checkpoint, device, progress, note))


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a decoder is made, and for which encoder."""

    data: Path
    encoder: Encoder
    spec: str
    out: Path
    cache: EmbeddingCache | None
    checkpoint: Path | None
    device: str
    progress: Progress | None
    note: Note

    def card(self, recipe: CaptionRecipe, settings: Mapping[str, Any], training: Mapping[str, Any]) -> Card:
        sources = [asdict(source) for source in recipe.sources]
        return Card(
            recipe.kind,
            recipe.name,
            self.encoder.fingerprint,
            self.spec,
            self.encoder.dim,
            recipe.licence,
            settings,
            {"sources": sources, **training},
        )


def _consensus(recipe: CaptionRecipe, captions: Captions, place: _Place) -> Card:
    said = list(dict.fromkeys(text for text in map(plain, captions.texts) if text))
    if not said:
        raise DataError("there is no word in the captions")
    card = place.card(recipe, {"neighbours": recipe.neighbours}, {"captions": len(said)})
    decoder = ConsensusDecoder(card, encode_sentences(place.encoder, said, cache=place.cache), said)
    with new_decoder(place.out, card) as staging, (staging / MEMORY).open("wb") as file:
        np.savez(file, **decoder.arrays())  # type: ignore[arg-type]
    return card


def _transformer(recipe: CaptionRecipe, captions: Captions, place: _Place) -> Card:
    words = Words.learn(captions.texts, recipe.pieces)
    learnt = learn(
        recipe,
        captions,
        words,
        validation=_validation(recipe, place, words),
        checkpoint=place.checkpoint,
        device=place.device,
        progress=place.progress,
        note=place.note,
    )
    settings = settings_of(learnt.network, recipe.beams, recipe.length_penalty)
    card = place.card(recipe, settings, _record(recipe, captions, learnt))
    write_decoder(place.out, learnt.network, words, card)
    return card


def _record(recipe: CaptionRecipe, captions: Captions, learnt: Learnt) -> dict[str, Any]:
    kept = next((line for line in learnt.log if line["step"] == learnt.step), {})
    return {
        "captions": len(captions),
        "weights": sum(weight.numel() for weight in learnt.network.parameters()),
        "recipe": {name: value for name, value in recipe.to_json().items() if name not in ("sources", "licence")},
        "kept": dict(kept),
    }


def _validation(recipe: CaptionRecipe, place: _Place, words: Words) -> Validation | None:
    if not recipe.validation:
        return None
    records = [one for one in read_pairs(place.data / recipe.validation, "val") if any(map(plain, one.texts))]
    if not records:
        raise DataError(f"{place.data / recipe.validation} has no captions to validate with")
    vectors = encode_pictures(place.encoder, [record.image for record in records], cache=place.cache)
    texts = [record.texts for record in records]

    def measure(network: CaptionNet) -> dict[str, float]:
        said = greedy(TorchStepper(network), vectors, length=recipe.length, end=END, banned=(UNKNOWN,))
        return {"val_bleu_4": bleu(words.decode(said), texts)["bleu_4"]}

    return Validation(first_captions(vectors, texts), measure)


_KINDS: Mapping[str, Callable[[CaptionRecipe, Captions, _Place], Card]] = {
    "transformer": _transformer,
    "consensus": _consensus,
}
