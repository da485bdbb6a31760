"""What training reads, and what meets in a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrieval.embedding import EmbeddingCache, Progress, encode_pictures, encode_sentences
from retrieval.encoders import Encoder
from retrieval.errors import DataError
from retrieval.evaluation import dataset_name, labelled, prompts_of
from retrieval.pairs import Picture, Record, checksum, read_pairs
from retrieval.training.config import Test, TrainConfig, Unlabelled, Vocabulary
from retrieval.training.mining import HardNegatives, hard_batches


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
class Pairs:
    """One source, as the towers keep it: views of its pictures, sentences, and which of these belong to which."""

    views: list[Tensor]  # each of N rows
    texts: Tensor  # M rows
    first: NDArray[np.int64]  # (N + 1,) picture i owns the sentences first[i]:first[i + 1]
    repeat: int
    anchor: Tensor | None  # (N, F) features of the pictures before training
    taught: tuple[Tensor, Tensor] | None = None  # (N, E) and (M, E) the teacher's vectors of pictures and sentences

    @property
    def owner(self) -> NDArray[np.int64]:
        """(M,) the picture of each sentence."""
        return np.repeat(np.arange(len(self.first) - 1), np.diff(self.first))


@dataclass(frozen=True)
class HeldOut:
    """Data that are not learnt from, to see what a model forgets."""

    name: str
    pairs: Pairs  # with labels: sentences are the classes' prompts, one each
    right: NDArray[np.bool_] | None  # (N, C) which classes are right; None: pairs of pictures and sentences


class Data:
    """Everything that training reads."""

    def __init__(
        self, config: TrainConfig, towers: Towers, progress: Progress | None, teacher: Encoder | None = None
    ) -> None:
        base = Path(config.data)
        self.towers, self.anchored = towers, config.train != "heads" and config.anchor > 0
        self.teacher, self.device = teacher, config.device
        self.record: list[dict[str, Any]] = []
        self.sources: list[Pairs] = []
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
            self.sources.append(self._taught(kept, self._pairs(kept, source.repeat, progress), progress))
            self._note(source.pairs, split, kept)
        self.unlabelled = [self._unlabelled(base, item, progress) for item in config.unlabelled]
        self.vocabulary = self._vocabulary(config, progress)
        self.val = self._pairs(self.validation, 1, progress) if self.validation else None
        self.guard = [self._held_out(base / test.pairs, test, progress) for test in config.guard]

    def _note(self, pairs: str, split: str | None, records: Sequence[Record]) -> None:
        self.record.append({"pairs": pairs, "split": split, "pictures": len(records), "checksum": checksum(records)})

    @torch.no_grad()
    def _pairs(self, records: Sequence[Record], repeat: int, progress: Progress | None) -> Pairs:
        views = self.towers.pictures(records, progress)
        texts = self.towers.sentences([text for record in records for text in record.texts])
        first = np.concatenate([[0], np.cumsum([len(record.texts) for record in records])])
        anchor = self.towers.image_features(views[0]) if self.anchored else None
        return Pairs(views, texts, first, repeat, anchor)

    def _taught(self, records: Sequence[Record], pairs: Pairs, progress: Progress | None) -> Pairs:
        """The same pairs with the teacher's vectors, which come from the cache where they are known."""
        if self.teacher is None:
            return pairs
        cache = EmbeddingCache(self.teacher.fingerprint, self.teacher.dim)
        pictures = encode_pictures(self.teacher, [record.image for record in records], cache=cache, progress=progress)
        sentences = encode_sentences(self.teacher, [text for record in records for text in record.texts], cache=cache)
        taught = torch.from_numpy(pictures).to(self.device), torch.from_numpy(sentences).to(self.device)
        return replace(pairs, taught=taught)

    def _unlabelled(self, base: Path, item: Unlabelled, progress: Progress | None) -> list[Tensor]:
        """Views of pictures without captions; those that validation is on are not among them."""
        held = {_place(record.image) for record in self.validation}
        found = read_pairs(base / item.pictures, item.split, prefer=None if item.split else "train", captioned=False)
        records = [Record(record.image) for record in found if _place(record.image) not in held]
        if len(records) < 2:
            raise DataError(f"{item.pictures} has no two pictures to learn from")
        self._note(item.pictures, found[0].split, records)
        return self.towers.pictures(records, progress)

    def _held_out(self, file: Path, test: Test, progress: Progress | None) -> HeldOut:
        records = read_pairs(file, test.split)
        if test.task != "classification":
            records = [record for record in records if record.texts]
            if not records:
                raise DataError(f'{file} has no captions to guard: say task = "classification" for labels')
            return HeldOut(dataset_name(file), self._pairs(records, 1, progress), None)
        records, names, right = labelled(records)
        pairs = Pairs(
            views=self.towers.pictures(records, progress),
            texts=self.towers.sentences(prompts_of(names)),
            first=np.zeros(len(records) + 1, np.int64),
            repeat=1,
            anchor=None,
        )
        return HeldOut(dataset_name(file), pairs, right)

    def _vocabulary(self, config: TrainConfig, progress: Progress | None) -> Pairs | None:
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
        return self._taught(named, self._pairs(named, 1, progress), progress)


def _place(picture: Picture) -> Picture:
    return picture.resolve() if isinstance(picture, Path) else picture


@dataclass(frozen=True)
class Batch:
    """What meets in one step: sentence i is of row ``shown[i]`` of the pictures, virtual ones behind them."""

    pictures: Tensor  # P rows, as the towers keep them
    virtual: Tensor | None  # (V, F) features
    shown: Tensor  # (B,)
    sentences: Tensor  # B rows, as the towers keep them
    owner: Tensor  # (B,) see `info_nce`
    anchor: Tensor | None  # (P, F)
    taught: tuple[Tensor, Tensor] | None  # (T, E) each: the teacher's vectors of the first T pairs


class Sampler:
    """The batches of a run, in the order they are learnt from; what is drawn in each is drawn as it is asked for."""

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        class_rows: Tensor | None = None,
        negatives: Sequence[HardNegatives] = (),
    ) -> None:
        """Plan a run.

        Args:
            config: how many epochs, and of which batches.
            data: what to draw from.
            class_rows: (C, F) features of virtual pictures of the vocabulary's classes.
            negatives: of each source, for batches that are harder than those drawn by chance.
        """
        self.config, self.data, self.class_rows, self.negatives = config, data, class_rows, negatives
        self.random = np.random.default_rng(config.seed)
        self.plan = self._plan()

    def __len__(self) -> int:
        return len(self.plan)

    def batches(self, done: int) -> Iterator[Batch]:
        """What is left of the plan after so many steps."""
        for source, rows in self.plan[done:]:
            yield self._batch(source, rows)

    def _plan(self) -> list[tuple[Pairs, NDArray[np.int64]]]:
        """All batches of all epochs, as (source, picture rows), in the order they are learnt from."""
        plan = []
        whole, part = divmod(self.config.epochs, 1)
        for share in [1.0] * int(whole) + ([part] if part else []):
            epoch = []
            for number, source in enumerate(self.data.sources):
                for _ in range(source.repeat):
                    chunks = self._hard(number, share) if self.negatives else self._by_chance(source, share)
                    smallest = int(np.argmin([len(chunk) for chunk in chunks]))
                    if len(chunks) > 1 and len(chunks[smallest]) < self.config.batch_size // 2:
                        chunks.pop(smallest)  # too few negatives to learn from; another epoch draws them elsewhere
                    epoch += [(source, chunk) for chunk in chunks if len(chunk) > 1]
            self.random.shuffle(epoch)
            plan += epoch
        return plan

    def _by_chance(self, source: Pairs, share: float) -> list[NDArray[np.int64]]:
        rows = self.random.permutation(len(source.views[0]))[: math.ceil(share * len(source.views[0]))]
        return [rows[i : i + self.config.batch_size] for i in range(0, len(rows), self.config.batch_size)]

    def _hard(self, source: int, share: float) -> list[NDArray[np.int64]]:
        seed = int(self.random.integers(2**32))
        size = min(self.config.batch_size, len(self.data.sources[source].views[0]))
        chunks = hard_batches(self.negatives[source], size, group=min(self.config.hard_group, size), seed=seed)
        return chunks[: math.ceil(share * len(chunks))]

    def _batch(self, source: Pairs, rows: NDArray[np.int64]) -> Batch:
        captions = min(self.config.captions, int(np.diff(source.first).min()))
        vocabulary, settings = self.data.vocabulary, self.config.vocabulary
        drawn = [(source, np.tile(rows, captions), np.tile(rows, captions))]  # from where, pictures, and their owner
        pictures = [self._pictures(source, rows)]
        anchors = [] if source.anchor is None else [source.anchor[rows]]
        virtual = []
        if vocabulary is not None and settings is not None:
            classes = self.random.permutation(len(vocabulary.views[0]))[: settings.pictures]
            pictures.append(self._pictures(vocabulary, classes))
            anchors += [] if vocabulary.anchor is None else [vocabulary.anchor[classes]]
            drawn.append((vocabulary, classes, -1 - classes))  # negative: never a row of the source
            for features, classes in self._virtual(settings):
                virtual.append(features)
                drawn.append((vocabulary, classes, -1 - classes))
        spoken = [self._drawn(pairs, of) for pairs, of, _ in drawn]
        shown = [np.tile(np.arange(len(rows)), captions), np.arange(len(rows), sum(map(len, pictures + virtual)))]
        real = list(zip(drawn, spoken, strict=True))[: len(pictures)]  # what a teacher can have seen
        taught = [(p.taught[0][of], p.taught[1][said]) for (p, of, _), said in real if p.taught]
        images, texts = ([both[side] for both in taught] for side in (0, 1))
        return Batch(
            torch.cat(pictures),
            torch.cat(virtual) if virtual else None,
            torch.from_numpy(np.concatenate(shown)),
            torch.cat([pairs.texts[said] for (pairs, _, _), said in zip(drawn, spoken, strict=True)]),
            torch.from_numpy(np.concatenate([owner for _, _, owner in drawn])).to(self.config.device),
            torch.cat(anchors) if anchors else None,
            (torch.cat(images), torch.cat(texts)) if taught else None,
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

    def _pictures(self, source: Pairs, rows: NDArray[np.int64]) -> Tensor:
        """One view of each of these pictures."""
        return source.views[self.random.integers(len(source.views))][rows]

    def _drawn(self, source: Pairs, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """One sentence of each of these pictures, as its row."""
        return self.random.integers(source.first[rows], source.first[rows + 1])
