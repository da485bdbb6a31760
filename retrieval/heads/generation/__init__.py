"""Generation on the shared space: vectors from vectors, and small pictures from vectors.

Every kind is a :class:`retrieval.heads.Generator`, is fitted by :func:`retrieval.heads.generation.fitting.fit`, and
lies on the disk as ``generator.json`` with ``weights.safetensors`` (:mod:`retrieval.heads.generation.storage`).

    autoencoder.py   autoencoder and beta-VAE over the vectors of one modality, or of both joined
    prior.py         a vector of one modality from one of the other: regression, conditional VAE
    adversarial.py   the two players of the conditional GAN, their objectives
    gan.py           their game, its checkpoints, and the picture generator that comes out of it
    scores.py        what comes out, measured
    drawing.py       pictures of sentences, sheets of them, and the odd pictures of an index
"""
