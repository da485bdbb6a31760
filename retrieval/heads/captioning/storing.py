"""Captions for every picture of an index, from the vectors that it holds: nothing is encoded, or even read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from retrieval.embedding import Progress
from retrieval.heads import check_fingerprint
from retrieval.heads.captioning.decoders import CaptionDecoder, decode_all
from retrieval.library import Library

_BATCH = 512  # pictures captioned between two commits: what a kill may cost


@dataclass(frozen=True)
class Captioned:
    """How many pictures got a caption, and how many had one that was left alone."""

    captioned: int
    kept: int


def caption_store(
    library: Library,
    decoder: CaptionDecoder,
    *,
    again: bool = False,
    beams: int | None = None,
    wait: float = 0.0,
    progress: Progress | None = None,
) -> Captioned:
    """Write a caption into the column ``caption`` of each picture that has none.

    Args:
        library: the index.
        decoder: of the index's model.
        again: also where there is a caption already, whoever wrote it.
        beams: the decoder's own unless given.
        wait: seconds to wait for another writer.
        progress: called with (pictures done, pictures in all).

    Raises:
        ModelMismatch: the decoder is of another model than the index.
        StoreLocked, StoreError: another process is writing, or the index cannot be written.
    """
    store = library.store
    check_fingerprint("the decoder", decoder.fingerprint, store.model.fingerprint)
    with store.write(wait) as writer:
        snapshot = store.snapshot
        pictures = ~snapshot.texts
        bare = snapshot.columns("caption")["caption"].is_null().to_numpy(zero_copy_only=False)
        wanted = pictures if again else pictures & bare
        ids = snapshot.ids[wanted]  # which stay while other rows are replaced
        for begin in range(0, len(ids), _BATCH):
            chunk = ids[begin : begin + _BATCH].tolist()
            snapshot = store.snapshot
            positions = np.searchsorted(snapshot.ids, chunk)
            captions = decode_all(decoder, snapshot.stored(snapshot.live[positions]), beams)
            for row_id, caption in zip(chunk, captions, strict=True):
                writer.replace(row_id, replace(store.row(row_id), caption=caption))
            writer.commit()
            if progress:
                progress(begin + len(chunk), len(ids))
    library.build_stale_index()
    return Captioned(len(ids), int(pictures.sum()) - len(ids))
