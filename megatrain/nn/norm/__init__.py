"""Normalisation layers. To add one, add a file that registers it."""

from typing import Any

from megatrain.base.registry import Registry

NORM: Registry[Any] = Registry("norm", "megatrain.nn.norm")
