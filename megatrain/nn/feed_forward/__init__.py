"""Feed-forward layers. To add one, add a file that registers it.

Each has `build(...)`, `parameters_per_width` for counting, a slow twin on the layer (`reference`) and `examples()`.
"""

from typing import Any

from megatrain.base.registry import Registry

FEED_FORWARD: Registry[Any] = Registry("feed_forward", "megatrain.nn.feed_forward")
