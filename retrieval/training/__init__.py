"""Contrastive training, from pairs to a bundle. Needs torch."""
