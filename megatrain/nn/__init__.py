"""Layers that know nothing of training: norms, positions, attention, feed-forward.

Shape letters used in comments and einsum strings: b batch, t query position, s key position, d model, h head, g key and
value head, k head dimension, f feed-forward, v vocabulary, e expert.
"""
