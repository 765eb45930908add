"""Moved to megatrain.nn.batch (models and data stand on one floor); this file goes when nothing imports it."""

from megatrain.nn.batch import Batch as Batch
