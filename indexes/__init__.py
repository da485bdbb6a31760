"""Vectors in, ranked rows out: the store of an index folder, and exact and FAISS search over it."""
