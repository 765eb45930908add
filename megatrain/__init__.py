"""megatrain: pretrain large Transformers on GPU clusters; the layout never changes the result.

The public face is three functions, loaded when first used, so that importing megatrain stays cheap:

    megatrain.train("configs/run/tiny.yaml")            run (or resume) a training
    model = megatrain.load("runs/tiny/checkpoints/step-00000100")
    megatrain.generate(model, "def main(")
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_FACE = {"train": "megatrain.train.run", "load": "megatrain.generate.load", "generate": "megatrain.generate.sample"}


def __getattr__(name: str) -> Any:
    if name in _FACE:
        return getattr(import_module(_FACE[name]), name)
    raise AttributeError(f"megatrain offers {', '.join(sorted(_FACE))}; it has no {name!r}")


def __dir__() -> list[str]:
    return [*sorted(_FACE), "__version__"]
