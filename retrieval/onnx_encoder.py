"""The encoder over a bundle: on the CPU, without torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from indexes.runtime import thread_count
from indexes.vectors import Vectors, as_vectors
from retrieval import sessions
from retrieval.bundle import IMAGE_FILE, TEXT_FILE, TOKENIZER_FILE, Bundle
from retrieval.errors import ModelError
from retrieval.sessions import OnnxRuntimeSession, RunPrecision, Session, image_precision, open_image_session

if TYPE_CHECKING:
    from PIL import Image
    from tokenizers import Tokenizer


class OnnxEncoder:
    """Pictures and sentences to unit vectors with a bundle's two graphs.

    ``precision`` is the arithmetic of the image tower, see :func:`retrieval.sessions.image_precision`.
    Each graph is opened at its first use: a text search never opens the image tower.

    Batches of pictures are computed side by side, each on one thread: threads that share a batch wait for each other at
    every layer, and the more so the more else there is to do. Measured on two cores beside other work: 13 and not 17 ms
    of processor time a picture with the built-in model, 1.4 times the pictures a second.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None, precision: RunPrecision = "auto") -> None:
        self.bundle = bundle
        self.name, self.fingerprint, self.dim = bundle.name, bundle.fingerprint, bundle.dim
        self.preprocessing = bundle.preprocessing
        self.score_scale = bundle.score_scale
        self._stored, self._asked = bundle.precision.get("image", "fp32"), precision
        self._threads = min(threads or thread_count(), os.cpu_count() or 1)  # more never helps, thousands never start
        self.batch_size = sessions.IMAGE_BATCH * self._threads

    def encode_images(self, images: Sequence[Image.Image]) -> Vectors:
        """Pictures of any size and mode -> (N, D) unit rows."""
        # Few pictures are shared out as well, but not one by one.
        step = min(sessions.IMAGE_BATCH, max(2, -(-len(images) // self._threads)))
        parts = [images[i : i + step] for i in range(0, len(images), step)]

        def encode(part: Sequence[Image.Image]) -> Vectors:
            return self._image_session.run(self.preprocessing.pixels(part))

        if min(len(parts), self._threads) < 2:
            return self._gather([encode(part) for part in parts])
        from concurrent.futures import ThreadPoolExecutor

        _ = self._image_session  # opened here, not by every thread at once
        with ThreadPoolExecutor(self._threads, "encode") as pool:
            batches = list(pool.map(encode, parts))
        return self._gather(batches)

    def encode_texts(self, texts: Sequence[str]) -> Vectors:
        """Sentences -> (N, D) unit rows. What is longer than the context length is cut off."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # like lengths together: little padding
        batches = []
        for i in range(0, len(order), sessions.TEXT_BATCH):
            # Half characters, as bytes that are no text become on the command line, are refused by the tokenizer.
            batch = [texts[j].encode("utf-8", "replace").decode("utf-8") for j in order[i : i + sessions.TEXT_BATCH]]
            encodings = self._tokenizer.encode_batch(batch)
            batches.append(self._text_session.run(np.array([e.ids for e in encodings], np.int64)))
        rows = self._gather(batches)
        unsorted = np.empty_like(rows)
        unsorted[order] = rows
        return unsorted

    def _gather(self, batches: list[Vectors]) -> Vectors:
        if not batches:
            return np.empty((0, self.dim), np.float32)
        return as_vectors(np.concatenate(batches))

    @cached_property
    def precision(self) -> str:
        """The arithmetic of the image tower: fp32, bf16 or int8."""
        return image_precision(self.bundle.path, self._stored, self._asked)

    @cached_property
    def _image_session(self) -> Session:
        return open_image_session(self.bundle.path / IMAGE_FILE, self._threads, self.precision)

    @cached_property
    def _text_session(self) -> Session:
        # Never OpenVINO: it takes longer to open a graph than a whole query may take.
        return OnnxRuntimeSession(self.bundle.path / TEXT_FILE, self._threads)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads gain nothing here and warn at a fork
        from tokenizers import Tokenizer

        path = self.bundle.path / TOKENIZER_FILE
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{path} cannot be read as a tokenizer: {error}") from error
