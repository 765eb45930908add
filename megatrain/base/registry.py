"""Registries filled by folder scan: adding a variant is adding one file, with no list to extend.

    NORM: Registry[Norm] = Registry("norm", "megatrain.nn.norm")

    @NORM.register("rms_norm")
    @dataclass(frozen=True, kw_only=True)
    class RMSNorm: ...

The first lookup imports every module of the package named, so each `register` has run.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from megatrain.base.errors import ConfigError, did_you_mean

T = TypeVar("T")


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


class Registry(Generic[T]):
    """Frozen dataclasses by `kind`. Each is a choice in a run file and builds the code it describes."""

    def __init__(self, name: str, package: str):
        self.name, self.package = name, package
        self._members: dict[str, type[T]] = {}
        self._scanned = False

    def register(self, kind: str) -> Callable[[type], type]:
        """Class decorator: make the dataclass known as `kind`, and set `cls.kind`."""

        def add(cls: type) -> type:
            parameters = getattr(cls, "__dataclass_params__", None)
            if parameters is None or not parameters.frozen:
                raise TypeError(f"{self.name} {kind!r}: {cls.__name__} must be a frozen dataclass")
            if "kind" in vars(cls):
                raise TypeError(f"{self.name} {kind!r}: {cls.__name__} is registered as {vars(cls)['kind']!r} already")
            known = self._members.get(kind)
            if known is not None and _place(known) != _place(cls):  # the same place twice is a module imported again
                raise TypeError(f"{self.name} {kind!r} is registered by both {_place(known)} and {_place(cls)}")
            cls.kind = kind  # type: ignore[attr-defined]
            self._members[kind] = cls
            return cls

        return add

    def kinds(self) -> list[str]:
        self._scan()
        return sorted(self._members)

    def __getitem__(self, kind: str) -> type[T]:
        self._scan()
        if kind not in self._members:
            raise ConfigError(f"{self.name} kind {kind!r} is not known: {did_you_mean(kind, self._members)}")
        return self._members[kind]

    def __contains__(self, kind: object) -> bool:
        self._scan()
        return isinstance(kind, str) and kind in self._members

    def items(self) -> Iterator[tuple[str, type[T]]]:
        self._scan()
        return iter(sorted(self._members.items()))

    def _scan(self) -> None:
        if self._scanned:
            return
        self._scanned = True  # first, since a member may look into its own registry while it is imported
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            name = f"{self.package}.{module.name}"
            try:
                importlib.import_module(name)
            except Exception as error:
                self._scanned = False
                raise ImportError(f"the {self.name} registry could not import {name}: {error}") from error
