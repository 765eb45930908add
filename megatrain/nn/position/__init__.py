"""How a model knows the order of its tokens. To add a scheme, add a file that registers it.

A scheme may add a vector to each embedded token (`build`), turn queries and keys (`prepare` once a pass, `rotate` in
each layer), or both.
"""

from typing import Any

from megatrain.base.registry import Registry

POSITION: Registry[Any] = Registry("position", "megatrain.nn.position")
