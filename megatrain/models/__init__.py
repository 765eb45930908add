"""Models put together from the layers. To add one, add a file that registers it."""

from typing import Any

from megatrain.base.registry import Registry

MODEL: Registry[Any] = Registry("model", "megatrain.models")
