"""Captions from embeddings: three decoders behind :class:`retrieval.heads.Decoder`.

A transformer on pairs and one on text alone are the same network with other recipes; a consensus of near captions
learns nothing. Reading and using one needs no torch: :mod:`~retrieval.heads.captioning.decoders`.
"""
