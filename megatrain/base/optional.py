"""Optional packages: looked for when first used, and never a mystery when they are not there."""

import importlib
import logging
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Optional:
    """An optional package: the module, or why there is none."""

    name: str
    module: ModuleType | None
    why_not: str

    def __bool__(self) -> bool:
        return self.module is not None

    def __getattr__(self, attribute: str) -> Any:
        if self.module is None:
            raise ImportError(f"{self.name} is not usable here: {self.why_not}")
        return getattr(self.module, attribute)


@cache
def optional(name: str) -> Optional:
    """The package `name` if it imports; otherwise the cause is kept, since a broken install is not an absent one."""
    try:
        return Optional(name, importlib.import_module(name), "")
    except ModuleNotFoundError as error:
        missing = error.name or name
        why = "it is not installed" if missing.split(".")[0] == name.split(".")[0] else f"it needs {missing}"
        return Optional(name, None, why)
    except Exception as error:
        return Optional(name, None, f"it is installed but does not import ({type(error).__name__}: {error})")


@cache
def torchao(module: str) -> Optional:
    """A module of torchao, which complains while it is imported of GPU kernels that do not load and are not used."""
    logging.disable(logging.WARNING)
    try:
        return optional(f"torchao.{module}")
    finally:
        logging.disable(logging.NOTSET)


@cache
def nvidia_apex(extension: str) -> Optional:
    """A compiled extension of NVIDIA's apex (`amp_C`, `fused_layer_norm_cuda`), and of nothing else of that name: the
    package index has another project."""
    found = optional("apex")
    if not found:
        return found
    kernels = optional(extension)
    if not kernels:
        why = f"this apex has no CUDA extensions ({extension}: {kernels.why_not}), so it may be another project"
        return Optional("apex", None, why)
    return kernels
