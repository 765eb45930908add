"""Normalisation layers. To add one, add a file that registers it."""

from typing import Any, Literal

from megatrain.base.registry import Registry

NORM: Registry[Any] = Registry("norm", "megatrain.nn.norm")

Placement = Literal["pre", "post", "output", "parallel"]
"""Where norms stand in a block: see `models.block`."""
