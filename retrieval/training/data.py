"""What training reads, and what meets in a batch."""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrieval.embedding import EmbeddingCache, Progress, cache_name, encode_pictures, encode_sentences
from retrieval.encoders import Encoder
from retrieval.errors import DataError
from retrieval.evaluation import dataset_name, labelled, prompts_of
from retrieval.pairs import Picture, Record, checksum, read_pairs
from retrieval.training.config import Source, Test, TrainConfig, Unlabelled, Vocabulary
from retrieval.training.distributed import own_share
from retrieval.training.lexicon import Nouns, WordNet, nouns_for, synsets_of, words_of
from retrieval.training.mining import HardNegatives, hard_batches
from retrieval.training.reading import (
    Note,
    classes_of,
    is_labelled_only,
    read_for_training,
    with_prompts,
    without_unreadable,
)
from retrieval.training.sampling import Balance, balance_by, batches_of_sources
from retrieval.training.streaming import PictureRows, begin, decoders, parts


class Towers(Protocol):
    """What stands between the data and the projections: it says what of a picture or a sentence is kept."""

    def pictures(
        self, records: Sequence[Record], progress: Progress | None = None
    ) -> tuple[list[PictureRows], Mapping[int, str]]:
        """Views of the pictures that can be read, one row each; of the others, by their place, which and why."""
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

    views: list[PictureRows]  # each of N rows
    texts: Tensor  # M rows
    first: NDArray[np.int64]  # (N + 1,) picture i owns the sentences first[i]:first[i + 1]
    repeat: int
    anchor: Tensor | None  # (N, F) features of the pictures before training
    taught: tuple[Tensor, Tensor] | None = None  # (N, E) and (M, E) the teacher's vectors of pictures and sentences
    weight: float = 0.0  # share of the batches; 0: as many as the passes over it make
    balance: Balance | None = None  # which pictures are drawn how often; None: each once in a pass
    classes: NDArray[np.int64] | None = None  # (N,) pictures of one class are no negatives; None: each is its own

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
        self,
        config: TrainConfig,
        towers: Towers,
        progress: Progress | None,
        teacher: Encoder | None = None,
        note: Note | None = None,
    ) -> None:
        base = Path(config.data)
        self.towers, self.anchored = towers, config.train != "heads" and config.anchor > 0
        self.teacher, self.device = teacher, config.device
        self.progress, self.note = progress, note
        self.record: list[dict[str, Any]] = []
        self.sources: list[Pairs] = []
        self.validation: list[Record] = []
        self.named: list[HeldOut] = []  # to validate on: sources of labels
        self.said: set[str] = set()  # the words of all captions
        self.synsets: list[int] = []  # of the vocabulary's classes
        for test in config.tests:
            read_pairs(base / test.pairs, test.split)  # what is missing is said now, and not when all is done
        for source in config.sources:
            self.sources.append(self._source(base / source.pairs, source))
        self.unlabelled = [self._unlabelled(base, item) for item in config.unlabelled]
        self.vocabulary = self._vocabulary(config)
        self.nouns = self._nouns(base / config.lexicon.wordnet) if config.lexicon else None
        self.val = self._pairs(self.validation, "validation")[1] if self.validation else None
        self.guard = [self._held_out(base / test.pairs, test) for test in config.guard]

    def _source(self, file: Path, source: Source) -> Pairs:
        records = read_for_training(file, note=self.note)
        splits = {record.split for record in records}
        split = source.split or ("train" if "train" in splits else None)
        kept = [record for record in records if split is None or record.split == split]
        labelled_only = is_labelled_only(kept)
        if "val" in splits and split == "train" and source.validate:
            val = [record for record in records if record.split == "val"]
            self.validation += [record for record in val if record.texts]
            if labelled_only and any(record.labels for record in val):
                self.named.append(self._classes(val, dataset_name(file)))
        kept = with_prompts(kept) if labelled_only else [record for record in kept if record.texts]
        readable, pairs = self._pairs(kept, file.name) if kept else ([], None)
        if pairs is None or len(readable) < 2:
            raise DataError(f"{source.pairs} has no two captioned pictures of split {split!r} to learn from")
        self._record(source.pairs, split, readable, unreadable=len(kept) - len(readable))
        self.said.update(word for record in readable for text in record.texts for word in words_of(text))
        balance = balance_by(readable, source.balance, source.balance_power) if source.balance else None
        return replace(
            self._taught(readable, pairs),
            repeat=source.repeat,
            weight=source.weight,
            balance=balance,
            classes=classes_of(readable) if labelled_only else None,
        )

    @property
    def digest(self) -> Tensor:
        """(32,) a SHA-256 over what is learnt from: a run goes on with what it began with."""
        return torch.tensor([*hashlib.sha256(json.dumps(self.record).encode()).digest()], dtype=torch.uint8)

    def _record(self, pairs: str, split: str | None, records: Sequence[Record], unreadable: int) -> None:
        entry = {"pairs": pairs, "split": split, "pictures": len(records), "checksum": checksum(records)}
        self.record.append({**entry, "unreadable": unreadable} if unreadable else entry)

    @torch.no_grad()
    def _pairs(self, records: Sequence[Record], name: str) -> tuple[list[Record], Pairs]:
        """The records whose pictures can be read, and the pairs that they are."""
        views, unreadable = self.towers.pictures(records, self.progress)
        readable = without_unreadable(records, unreadable, name, self.note)
        texts = self.towers.sentences([text for record in readable for text in record.texts])
        first = np.concatenate([[0], np.cumsum([len(record.texts) for record in readable])])
        anchor = image_features(self.towers, views[0]) if self.anchored else None
        return readable, Pairs(views, texts, first, 1, anchor)

    def _taught(self, records: Sequence[Record], pairs: Pairs) -> Pairs:
        """The same pairs with the teacher's vectors, which come from the cache where they are known."""
        if self.teacher is None:
            return pairs
        cache = EmbeddingCache(cache_name(self.teacher), self.teacher.dim)
        images = [record.image for record in records]
        spoken = [text for record in records for text in record.texts]
        pictures = encode_pictures(self.teacher, images, cache=cache, progress=self.progress)
        sentences = encode_sentences(self.teacher, spoken, cache=cache)
        for items, vectors in ((images, pictures), (spoken, sentences)):
            wrong = np.flatnonzero(~np.isfinite(vectors).all(1))
            if len(wrong):
                raise DataError(
                    f"{len(wrong)} of {len(vectors)} vectors of the teacher {self.teacher.name} are no numbers, "
                    f"the first of them that of: {items[wrong[0]]}"
                )
        taught = torch.from_numpy(pictures).to(self.device), torch.from_numpy(sentences).to(self.device)
        return replace(pairs, taught=taught)

    def _unlabelled(self, base: Path, item: Unlabelled) -> list[PictureRows]:
        """Views of pictures without captions; those that validation is on are not among them."""
        held = {_place(record.image) for record in self.validation}
        found = read_for_training(
            base / item.pictures, item.split, prefer=None if item.split else "train", captioned=False, note=self.note
        )
        records = [Record(record.image) for record in found if _place(record.image) not in held]
        if not records:
            raise DataError(f"{item.pictures} has no two pictures to learn from")
        views, unreadable = self.towers.pictures(records, self.progress)
        readable = without_unreadable(records, unreadable, item.pictures, self.note)
        if len(readable) < 2:
            raise DataError(f"{item.pictures} has no two pictures to learn from")
        self._record(item.pictures, found[0].split, readable, unreadable=len(unreadable))
        return views

    def _held_out(self, file: Path, test: Test) -> HeldOut:
        records = read_for_training(file, test.split, note=self.note)
        if test.task == "classification":
            return self._classes(records, dataset_name(file))
        records = [record for record in records if record.texts]
        if not records:
            raise DataError(f'{file} has no captions to guard: say task = "classification" for labels')
        return HeldOut(dataset_name(file), self._pairs(records, file.name)[1], None)

    def _classes(self, records: Sequence[Record], name: str) -> HeldOut:
        records = labelled(records)[0]
        views, unreadable = self.towers.pictures(records, self.progress)
        records, names, right = labelled(without_unreadable(records, unreadable, name, self.note))
        pairs = Pairs(
            views=views,
            texts=self.towers.sentences(prompts_of(names)),
            first=np.zeros(len(records) + 1, np.int64),
            repeat=1,
            anchor=None,
        )
        return HeldOut(name, pairs, right)

    def _vocabulary(self, config: TrainConfig) -> Pairs | None:
        settings = config.vocabulary
        if settings is None:
            return None
        file = Path(config.data) / settings.pairs
        records = read_for_training(file, note=self.note)
        named = [replace(record, texts=settings.sentences(record.labels[0])) for record in records if record.labels]
        if not named:
            raise DataError(f"{settings.pairs} has no labels to take words from")
        readable, pairs = self._pairs(named, file.name)
        if settings.class_rows and len(readable) < len(records):
            raise DataError(
                f"{len(records) - len(readable)} of {len(records)} pictures of {settings.pairs} have no label or "
                "cannot be read: its rows would not be those of the classes any more; set class_rows to 0"
            )
        self._record(settings.pairs, None, readable, unreadable=len(named) - len(readable))
        if config.lexicon:
            self.synsets = synsets_of(readable)
        return self._taught(readable, pairs)

    def _nouns(self, folder: Path) -> Nouns:
        nouns = nouns_for(WordNet(folder), self.synsets, self.said)
        if self.note:
            self.note(f"{len(nouns.names)} nouns of WordNet, {int(nouns.placed.sum())} of them kin to a class")
        self.record.append({"wordnet": folder.name, "nouns": len(nouns.names)})
        return nouns


def image_features(towers: Towers, pictures: PictureRows) -> Tensor:
    """(N, F) features of all pictures, in portions that fit into memory."""
    return torch.cat([towers.image_features(part) for part in parts(pictures)])


def _place(picture: Picture) -> Picture:
    return picture.resolve() if isinstance(picture, Path) else picture


@dataclass(frozen=True)
class Words:
    """Nouns that meet a batch's pairs, see :class:`retrieval.training.config.Lexicon`."""

    names: Tensor  # N rows, as the towers keep sentences
    definitions: Tensor  # N rows
    placed: Tensor  # (N,) bool: those that the targets are of
    classed: Tensor  # (B,) bool: the pairs whose pictures are of a class
    targets: Tensor  # (placed, classed) the share of each picture in a noun's attention
    wrong: Tensor  # (B, N) bool: the noun says nothing of the pair's picture


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
    words: Words | None = None


class Sampler:
    """The batches of a run, in the order they are learnt from; what is drawn in each is drawn as it is asked for."""

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        class_rows: Tensor | None = None,
        mine: Callable[[], Sequence[HardNegatives]] | None = None,
    ) -> None:
        """Plan a run.

        Args:
            config: how many epochs, and of which batches.
            data: what to draw from.
            class_rows: (C, F) features of virtual pictures of the vocabulary's classes.
            mine: hard negatives of each source, as the model is when it is called; for batches that are harder than
                those drawn by chance.
        """
        self.config, self.data, self.class_rows, self.mine = config, data, class_rows, mine
        self.negatives = mine() if mine else ()
        self.random = np.random.default_rng(config.seed)
        whole, part = divmod(config.epochs, 1)
        self.shares = [1.0] * int(whole) + ([part] if part else [])  # of each epoch's data
        self.starts: list[int] = []  # the step that each epoch begins with, and the end
        self.plan = self._plan()
        self.mined_again: tuple[int, int] | None = None  # steps of the plan that come of negatives found under way

    def __len__(self) -> int:
        return len(self.plan)

    def batches(self, done: int) -> Iterator[Batch]:
        """What is left of the plan after so many steps; pictures are decoded while the batch before is learnt from.

        A batch is drawn before it is asked for; and yet, whenever one has been given, ``random`` is as it was when that
        one had been drawn: what a checkpoint has to hold.
        """
        every = self.config.mine_every or len(self.shares)
        for epoch in range(0, len(self.shares), every):
            start, end = self.starts[epoch], self.starts[min(epoch + every, len(self.shares))]
            if done < end:
                if epoch and done <= start:  # else it was done before the checkpoint, which holds the plan
                    self._mine_again(epoch, start, end)
                yield from self._prepared(max(done, start), end)

    def _prepared(self, start: int, end: int) -> Iterator[Batch]:
        with decoders() as pool:
            waiting: deque[tuple[Callable[[], Batch], Mapping[str, Any]]] = deque()
            for step in range(start, end):
                for ahead in range(step + len(waiting), min(step + 2, end)):
                    waiting.append((self._batch(*self.plan[ahead], pool), self.random.bit_generator.state))
                batch, here = waiting.popleft()
                ahead_of_it, self.random.bit_generator.state = self.random.bit_generator.state, here
                yield batch()
                self.random.bit_generator.state = ahead_of_it

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold beside the random numbers: the plan, as far as its seed does not tell it."""
        if self.mined_again is None:
            return {}
        start, end = self.mined_again
        numbers = {id(source): number for number, source in enumerate(self.data.sources)}
        sources, rows = zip(*self.plan[start:end], strict=True)
        return {
            "plan.start": torch.tensor(start),
            "plan.sources": torch.tensor([numbers[id(source)] for source in sources]),
            "plan.sizes": torch.tensor([len(of_batch) for of_batch in rows]),
            "plan.rows": torch.from_numpy(np.concatenate(rows)),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Be as at the moment of a checkpoint."""
        if "plan.start" not in state:
            return
        start, sizes = int(state["plan.start"]), state["plan.sizes"].tolist()
        rows = [of_batch.numpy() for of_batch in torch.split(state["plan.rows"], sizes)]
        sources = [self.data.sources[number] for number in state["plan.sources"].tolist()]
        self.mined_again = start, start + len(rows)
        self.plan[start : start + len(rows)] = zip(sources, rows, strict=True)

    def _mine_again(self, epoch: int, start: int, end: int) -> None:
        """Plan some epochs anew, with what the model takes for each other by now."""
        assert self.mine is not None  # see TrainConfig: mine_every is of hard groups
        self.negatives = self.mine()
        shares = self.shares[epoch : epoch + self.config.mine_every]
        random = np.random.default_rng([self.config.seed, epoch])  # not the run's own, which is ahead of the plan
        self.plan[start:end] = [batch for one in self._epochs(shares, random) for batch in one]
        self.mined_again = start, end

    def _plan(self) -> list[tuple[Pairs, NDArray[np.int64]]]:
        """All batches of all epochs, as (source, picture rows), in the order they are learnt from."""
        epochs = [*self._epochs(self.shares, self.random)]
        self.starts = np.cumsum([0, *map(len, epochs)]).tolist()
        return [batch for epoch in epochs for batch in epoch]

    def _epochs(
        self, shares: Sequence[float], random: np.random.Generator
    ) -> Iterator[list[tuple[Pairs, NDArray[np.int64]]]]:
        sources = self.data.sources
        left: list[list[NDArray[np.int64]]] = [[] for _ in sources]  # of a weighted source's pass, for the next epoch
        for share in shares:
            passes = [source.repeat * self._count(source, share) for source in sources]
            counts = batches_of_sources(passes, [source.weight for source in sources])
            epoch = []
            for number, source in enumerate(sources):
                chunks = left[number]
                for _ in range(0 if source.weight else source.repeat):
                    chunks += self._pass(number, share, random)
                while source.weight and len(chunks) < counts[number]:
                    chunks += self._pass(number, 1.0, random)
                taken = counts[number] if source.weight else len(chunks)
                epoch += [(source, chunk) for chunk in chunks[:taken]]
                del chunks[:taken]
            random.shuffle(epoch)
            yield epoch

    def _count(self, source: Pairs, share: float) -> int:
        """Batches of one pass."""
        whole, rest = divmod(math.ceil(share * len(source.views[0])), self.config.batch_size)
        return whole + (not whole or rest >= self.config.batch_size // 2)

    def _pass(self, number: int, share: float, random: np.random.Generator) -> list[NDArray[np.int64]]:
        source, size = self.data.sources[number], self.config.batch_size
        if self.negatives:
            chunks = self._without_small(self._hard(number, random))
            return chunks[: math.ceil(share * len(chunks))]
        count = len(source.views[0])
        some = math.ceil(share * count)
        rows = source.balance.draw(some, random) if source.balance else random.permutation(count)[:some]
        return self._without_small([rows[i : i + size] for i in range(0, len(rows), size)])

    def _without_small(self, chunks: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        """Without the one that has too few negatives to learn from; another epoch draws them elsewhere."""
        smallest = int(np.argmin([len(chunk) for chunk in chunks]))
        if len(chunks) > 1 and len(chunks[smallest]) < self.config.batch_size // 2:
            chunks.pop(smallest)
        return [chunk for chunk in chunks if len(chunk) > 1]

    def _hard(self, source: int, random: np.random.Generator) -> list[NDArray[np.int64]]:
        seed = int(random.integers(2**32))
        size = min(self.config.batch_size, len(self.data.sources[source].views[0]))
        return hard_batches(self.negatives[source], size, group=min(self.config.hard_group, size), seed=seed)

    def _batch(self, source: Pairs, rows: NDArray[np.int64], pool: ThreadPoolExecutor) -> Callable[[], Batch]:
        """Draw a batch, and have its pictures decoded where they are not held; what is returned waits for them."""
        captions = min(self.config.captions, int(np.diff(source.first).min()))
        vocabulary, settings = self.data.vocabulary, self.config.vocabulary
        whose = rows if source.classes is None else source.classes[rows]
        drawn = [(source, np.tile(rows, captions), np.tile(whose, captions))]  # from where, pictures, and their owner
        named = min(settings.pictures, len(vocabulary.views[0])) if vocabulary is not None and settings else 0
        own, count = own_share(len(rows) + named), len(rows)
        pictures = [self._pictures(source, rows, pool, own)]
        anchors = [] if source.anchor is None else [source.anchor[rows]]
        virtual = []
        if vocabulary is not None and settings is not None:
            classes = self.random.permutation(len(vocabulary.views[0]))[: settings.pictures]
            behind = range(own.start - count, own.stop - count)
            pictures.append(self._pictures(vocabulary, classes, pool, behind))
            count += len(classes)
            anchors += [] if vocabulary.anchor is None else [vocabulary.anchor[classes]]
            drawn.append((vocabulary, classes, -1 - classes))  # negative: never a row of the source
            for features, classes in self._virtual(settings):
                virtual.append(features)
                drawn.append((vocabulary, classes, -1 - classes))
        spoken = [self._drawn(pairs, of) for pairs, of, _ in drawn]
        words = self._words(drawn)
        shown = [np.tile(np.arange(len(rows)), captions), np.arange(len(rows), count + sum(map(len, virtual)))]
        real = list(zip(drawn, spoken, strict=True))[: len(pictures)]  # what a teacher can have seen
        taught = [(p.taught[0][of], p.taught[1][said]) for (p, of, _), said in real if p.taught]
        images, texts = ([both[side] for both in taught] for side in (0, 1))
        return lambda: Batch(
            torch.cat([decoded() for decoded in pictures]),
            torch.cat(virtual) if virtual else None,
            torch.from_numpy(np.concatenate(shown)),
            torch.cat([pairs.texts[said] for (pairs, _, _), said in zip(drawn, spoken, strict=True)]),
            torch.from_numpy(np.concatenate([owner for _, _, owner in drawn])).to(self.config.device),
            torch.cat(anchors) if anchors else None,
            (torch.cat(images), torch.cat(texts)) if taught else None,
            words,
        )

    def _words(self, drawn: Sequence[tuple[Pairs, NDArray[np.int64], NDArray[np.int64]]]) -> Words | None:
        """Nouns by their chance, each with one of its names in one of the vocabulary's templates."""
        nouns, settings, vocabulary = self.data.nouns, self.config.lexicon, self.config.vocabulary
        if nouns is None or settings is None or vocabulary is None:
            return None
        chosen = self.random.choice(
            len(nouns.names), min(settings.nouns, int((nouns.chance > 0).sum())), False, nouns.chance
        )
        names = [
            self.random.choice(vocabulary.templates).format(name=self.random.choice(nouns.names[noun]))
            for noun in chosen
        ]
        # Of each pair, the class of its picture; -1 for one with a caption.
        classes = np.concatenate([of if pairs is self.data.vocabulary else 0 * of - 1 for pairs, of, _ in drawn])
        classed, placed = classes >= 0, nouns.placed[chosen]
        wrong = np.where(classed[:, None], ~nouns.kind_of[chosen].T[classes], nouns.unsaid[chosen])
        targets = nouns.target(chosen[placed], classes[classed])
        sentences = self.data.towers.sentences([*names, *(nouns.definitions[noun] for noun in chosen)])
        return Words(
            *sentences.chunk(2),
            *(torch.from_numpy(rows).to(self.config.device) for rows in (placed, classed, targets, wrong)),
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

    def _pictures(
        self, source: Pairs, rows: NDArray[np.int64], pool: ThreadPoolExecutor, own: range
    ) -> Callable[[], Tensor]:
        """One view of each of these pictures, begun; of streamed ones, those at the process's own places."""
        view = source.views[self.random.integers(len(source.views))]
        return begin(view, rows, pool, range(max(0, own.start), max(0, min(own.stop, len(rows)))))

    def _drawn(self, source: Pairs, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """One sentence of each of these pictures, as its row."""
        return self.random.integers(source.first[rows], source.first[rows + 1])
