"""megatrain: pretrain large Transformers on GPU clusters; the layout never changes the result.

The public face is three functions, loaded when first used, so that importing megatrain stays cheap:

    megatrain.train("configs/run/tiny.yaml")            run (or resume) a training
    model = megatrain.load("runs/tiny/checkpoints/step-00000100")
    megatrain.generate(model, "def main(")
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_FACE = {"train": "megatrain.train.run", "load": "megatrain.generate.load", "generate": "megatrain.generate.sample"}


def __getattr__(name: str) -> Any:
    if name in _FACE:
        return getattr(import_module(_FACE[name]), name)
    raise AttributeError(f"megatrain offers {', '.join(sorted(_FACE))}; it has no {name!r}")


def __dir__() -> list[str]:
    return [*sorted(_FACE), "__version__"]


class _CallableFolder(ModuleType):
    """`megatrain.train` and `megatrain.generate` are folders of code and, called, the functions of the public face."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return __getattr__(self.__name__.rpartition(".")[2])(*arguments, **options)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Once a folder is imported, importlib binds its name here, and `__getattr__` is no longer asked.
        if name in _FACE and isinstance(value, ModuleType):
            value.__class__ = _CallableFolder
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
