"""Upcycling methods against continued dense training, at equal tokens and at equal FLOPs, on a small model.

`python -m benchmarks ablation` trains a base on real text of three domains, then for each seed continues it
on new text of the same domains: dense, and as mixtures of experts made by copy, drop, BTX, BAM and UpIT, the
last with and without its router initialisation and its expansion.
"""
