"""Hugging Face model families, a table each. To add one, add a file that registers it."""

from typing import Any

from megatrain.base.registry import Registry

FAMILY: Registry[Any] = Registry("family", "megatrain.convert.families")
