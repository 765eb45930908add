"""From a tree of values to frozen dataclasses. All problems are collected, so that one try shows every mistake.

A field's type says what may stand there: `int`, `float`, `bool`, `str`, `Literal[...]`, `X | None`, `tuple[X, ...]`,
`dict[str, X]`, another dataclass, or

    Annotated[Norm, NORM]          a choice: a mapping with `kind`, looked up in the registry (a bare word is a kind)
    Annotated[Any, MODEL, "decoder"]    the same, with the kind that is meant where none is named
    Annotated[int, "tokens"]       a quantity: 4B, "4B tokens"
    Annotated[int, "bytes"]        a quantity: 80GiB

A dataclass may have `problems() -> list[str]`: what is wrong among its own fields, in sentences that name them.
"""

import dataclasses
import math
import types
from collections.abc import Callable
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from megatrain.base import units
from megatrain.base.errors import ConfigError, did_you_mean, nearest
from megatrain.base.registry import Registry
from megatrain.config.source import Node

T = TypeVar("T")

DEFAULT = "default"


@dataclasses.dataclass
class Built:
    """A configuration and where each of its values was written, by dotted key."""

    value: Any
    origins: dict[str, str]


def build(cls: type[T], tree: Node, *, also_allowed: tuple[str, ...] = ()) -> tuple[T, dict[str, str]]:
    """A `cls` from `tree`, and the origin of every value.

    Args:
        also_allowed: keys that the reader of files consumes, named when a mistyped one is like them.

    Raises:
        ConfigError: with every problem found.
    """
    builder = _Builder(also_allowed)
    value = builder.dataclass(cls, tree, "")
    if builder.problems:
        raise ConfigError(builder.problems)
    return value, builder.origins


_FAILED: Any = object()


class _Builder:
    def __init__(self, also_allowed: tuple[str, ...]):
        self.problems: list[str] = []
        self.origins: dict[str, str] = {}
        self.also_allowed = also_allowed

    def refuse(self, key: str, node: Node, message: str) -> Any:
        self.problems.append(f"{key} ({node.origin}) {message}")
        return _FAILED

    # ------------------------------------------------------------------------------------- dataclasses and choices

    def dataclass(self, cls: Any, node: Node, key: str, choice: str | None = None) -> Any:
        if not isinstance(node.value, dict):
            allowed = ", ".join(f.name.rstrip("_") for f in dataclasses.fields(cls) if f.init)
            return self.refuse(key or "the run file", node, f"is {_yaml(node.plain())}: it must hold keys ({allowed})")
        hints = get_type_hints(cls, include_extras=True)
        _refuse_silent_attributes(cls)
        fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
        # YAML names are Python's, except where they are Python's keywords (`async`): then the field ends in "_".
        by_key = {name.rstrip("_"): name for name in fields}
        extra = (("kind",) if choice is not None else ()) + (self.also_allowed if not key else ())
        before = len(self.problems)
        for name, child in node.value.items():
            if name not in by_key and not (choice is not None and name == "kind"):
                full = f"{key}.{name}" if key else name
                of = f" of {choice}" if choice else ""
                self.problems.append(
                    f"{full} ({child.origin}) is not a key{of}: {did_you_mean(name, [*by_key, *extra])}"
                )
        values = {}
        for yaml_name, name in by_key.items():
            full = f"{key}.{yaml_name}" if key else yaml_name
            if yaml_name in node.value:
                values[name] = self.value(hints[name], node.value[yaml_name], full)
            elif _has_default(fields[name]):
                default = _default(fields[name])
                self.note_defaults(default, full)
            else:
                self.problems.append(f"{full} is missing (needed by {node.origin}): give it a value")
        if len(self.problems) > before:
            return _FAILED
        made = cls(**values)
        check: Callable[[], list[str]] | None = getattr(made, "problems", None)
        if check is not None:
            where = f"{key}: " if key else ""
            self.problems += [f"{where}{sentence}" for sentence in check()]
        return made

    def choice(self, registry: Registry, node: Node, key: str, usual: str | None = None) -> Any:
        if isinstance(node.value, str):
            node = Node({"kind": Node(node.value, node.origin)}, node.origin)
        if not isinstance(node.value, dict):
            return self.refuse(key, node, f"is {_yaml(node.plain())}: it must name a {registry.name} kind")
        named = node.value.get("kind") or (Node(usual, DEFAULT) if usual else None)
        if named is None:
            guess = nearest("kind", node.value)
            instead = f"did you mean kind instead of {guess}? " if guess else ""
            return self.refuse(key, node, f"has no kind: {instead}(allowed: {', '.join(registry.kinds())})")
        if named.value not in registry:
            hint = did_you_mean(str(named.value), registry.kinds())
            return self.refuse(f"{key}.kind", named, f"is {named.value!r}, which is no {registry.name}: {hint}")
        self.origins[f"{key}.kind"] = named.origin
        return self.dataclass(registry[named.value], node, key, choice=f"{registry.name} {named.value}")

    def note_defaults(self, value: Any, key: str) -> None:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            if getattr(value, "kind", None) is not None:
                self.origins[f"{key}.kind"] = DEFAULT
            for f in dataclasses.fields(value):
                self.note_defaults(getattr(value, f.name), f"{key}.{f.name.rstrip('_')}")
        else:
            self.origins[key] = DEFAULT

    # ------------------------------------------------------------------------------------- values by type

    def value(self, hint: Any, node: Node, key: str) -> Any:
        origin, arguments = get_origin(hint), get_args(hint)
        if origin is Annotated:
            return self.annotated(arguments[0], arguments[1], node, key, *arguments[2:])
        if origin in (Union, types.UnionType):
            if node.value is None and type(None) in arguments:
                self.origins[key] = node.origin
                return None
            return self.union([a for a in arguments if a is not type(None)], node, key)
        if origin is Literal:
            if not any(type(node.value) is type(a) and node.value == a for a in arguments):  # 1 is not true
                allowed = [_yaml(a) for a in arguments]
                return self.refuse(key, node, f"is {_yaml(node.plain())}: {did_you_mean(_yaml(node.value), allowed)}")
            self.origins[key] = node.origin
            return node.value
        if origin in (tuple, list):
            return self.sequence(arguments, node, key)
        if origin is dict:
            if not isinstance(node.value, dict):
                return self.refuse(key, node, f"is {_yaml(node.plain())}: it must be a mapping")
            found = {k: self.value(arguments[1], child, f"{key}.{k}") for k, child in node.value.items()}
            return _FAILED if _FAILED in found.values() else found
        if dataclasses.is_dataclass(hint):
            return self.dataclass(hint, node, key)
        return self.scalar(hint, node, key)

    def annotated(self, hint: Any, note: Any, node: Node, key: str, usual: str | None = None) -> Any:
        if node.value is None and type(None) in get_args(hint):
            self.origins[key] = node.origin
            return None
        if isinstance(note, Registry):
            if get_origin(hint) is tuple:
                return self.sequence((Annotated[Any, note], ...), node, key)
            return self.choice(note, node, key, usual)
        try:
            if not isinstance(node.value, str | int | float):
                raise ValueError(f"{_yaml(node.plain())} is not a number of {note}")
            found = units.n_bytes(node.value) if note == "bytes" else units.count(node.value, note)
        except ValueError as error:
            return self.refuse(key, node, f"is wrong: {error}")
        self.origins[key] = node.origin
        return found

    def union(self, hints: list[Any], node: Node, key: str) -> Any:
        tries = []
        for hint in sorted(hints, key=lambda hint: type(node.value) is not hint):  # 3 is a number before it is text
            attempt = _Builder(self.also_allowed)
            found = attempt.value(hint, node, key)
            if not attempt.problems:
                self.origins |= attempt.origins
                return found
            tries.append(attempt.problems)
        if len(tries) == 1:
            self.problems += tries[0]
            return _FAILED
        return self.refuse(key, node, f"is {_yaml(node.plain())}: it must be {' or '.join(_name(h) for h in hints)}")

    def sequence(self, arguments: tuple[Any, ...], node: Node, key: str) -> Any:
        if not isinstance(node.value, list):
            return self.refuse(key, node, f"is {_yaml(node.plain())}: it must be a list")
        if len(arguments) == 1 or arguments[1] is Ellipsis:
            hints = [arguments[0]] * len(node.value)
        elif len(arguments) != len(node.value):
            return self.refuse(key, node, f"has {len(node.value)} elements: it must have {len(arguments)}")
        else:
            hints = list(arguments)
        found = [self.value(h, child, f"{key}.{i}") for i, (h, child) in enumerate(zip(hints, node.value, strict=True))]
        self.origins.setdefault(key, node.origin)
        return _FAILED if any(f is _FAILED for f in found) else tuple(found)

    def scalar(self, hint: Any, node: Node, key: str) -> Any:
        value = node.value
        is_bool = isinstance(value, bool)
        if hint is float and isinstance(value, int | float) and not is_bool:
            value = float(value)
        elif hint is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        elif hint is str and isinstance(value, int | float) and not is_bool:
            value = str(value)
        elif hint is not Any and (not isinstance(value, hint) or (is_bool and hint is not bool)):
            return self.refuse(key, node, f"is {_yaml(node.plain())}: it must be {_name(hint)}")
        if isinstance(value, float) and not math.isfinite(value):
            return self.refuse(key, node, f"is {value}: it must be a finite number")
        self.origins[key] = node.origin
        return value


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _name(hint: Any) -> str:
    """What a value of this type is called in a sentence."""
    if get_origin(hint) is Literal:
        return " or ".join(_yaml(a) for a in get_args(hint))
    if get_origin(hint) is Annotated:
        note = get_args(hint)[1]
        return f"a {note.name}" if isinstance(note, Registry) else f"a number of {note}"
    if get_origin(hint) in (tuple, list):
        return "a list"
    if get_origin(hint) is dict or dataclasses.is_dataclass(hint):
        return "a mapping"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _yaml(value: Any) -> str:
    """A value as a run file spells it: true, null, 'text'."""
    return (
        {True: "true", False: "false", None: "null"}[value]
        if value is None or value is True or value is False
        else repr(value)
    )


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _refuse_silent_attributes(cls: type) -> None:
    """A class attribute without an annotation is silently no field: a mistake in the code, not in the file."""
    known = {"kind", *(f.name for f in dataclasses.fields(cls)), *cls.__annotations__}
    for name, value in vars(cls).items():
        if name.startswith("_") or name in known:
            continue
        if not callable(value) and not isinstance(value, property | cached_property | classmethod | staticmethod):
            raise TypeError(f"{cls.__name__}.{name} has no annotation, so it is not a field")


# ------------------------------------------------------------------------------------------------ and back


def plain(value: Any) -> Any:
    """A configuration as plain mappings, lists and scalars, `kind` included; building it again gives the same."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = getattr(value, "kind", None)
        found = {"kind": kind} if kind is not None else {}
        return found | {f.name.rstrip("_"): plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Dotted keys and scalars of `plain(value)`; empty lists and mappings stay as they are."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        found: dict[str, Any] = {}
        for name, child in items:
            found |= flat(child, f"{key}.{name}" if key else str(name))
        return found
    return {key: value}
