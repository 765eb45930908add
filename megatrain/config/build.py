"""From a tree of values to frozen dataclasses. All problems are collected, so that one try shows every mistake.

A field's type says what may stand there: `int`, `float`, `bool`, `str`, `Literal[...]`, `X | None`, `tuple[X, ...]`,
`dict[str, X]`, another dataclass, or

    Annotated[Norm, NORM]          a choice: a mapping with `kind`, looked up in the registry (a bare word is a kind)
    Annotated[int, "tokens"]       a quantity: 4B, "4B tokens"
    Annotated[int, "bytes"]        a quantity: 80GiB

A dataclass may have `problems() -> list[str]`: what is wrong among its own fields, in sentences that name them.
"""

import dataclasses
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from megatrain.base import units
from megatrain.base.errors import ConfigError, did_you_mean
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
            allowed = ", ".join(f.name for f in dataclasses.fields(cls))
            return self.refuse(key or "the run file", node, f"is {node.plain()!r}: it must hold keys ({allowed})")
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

    def choice(self, registry: Registry, node: Node, key: str) -> Any:
        if isinstance(node.value, str):
            node = Node({"kind": Node(node.value, node.origin)}, node.origin)
        if not isinstance(node.value, dict):
            return self.refuse(key, node, f"is {node.plain()!r}: it must name a {registry.name} kind")
        named = node.value.get("kind")
        if named is None:
            for name, child in node.value.items():
                self.problems.append(f"{key}.{name} ({child.origin}): {key}.kind is missing: " + did_you_mean(name, ["kind"]))
            if not node.value:
                self.problems.append(f"{key} ({node.origin}): {key}.kind is missing (allowed: {', '.join(registry.kinds())})")
            return _FAILED
        if named.value not in registry:
            hint = did_you_mean(str(named.value), registry.kinds())
            return self.refuse(f"{key}.kind", named, f"is {named.value!r}, which is no {registry.name}: {hint}")
        self.origins[f"{key}.kind"] = named.origin
        return self.dataclass(registry[named.value], node, key, choice=f"{registry.name} {named.value}")

    def note_defaults(self, value: Any, key: str) -> None:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            if kind := getattr(value, "kind", None):
                self.origins[f"{key}.kind"] = DEFAULT
                del kind
            for f in dataclasses.fields(value):
                self.note_defaults(getattr(value, f.name), f"{key}.{f.name.rstrip('_')}")
        else:
            self.origins[key] = DEFAULT

    # ------------------------------------------------------------------------------------- values by type

    def value(self, hint: Any, node: Node, key: str) -> Any:
        origin, arguments = get_origin(hint), get_args(hint)
        if origin is Annotated:
            return self.annotated(arguments[0], arguments[1], node, key)
        if origin in (Union, types.UnionType):
            if node.value is None and type(None) in arguments:
                self.origins[key] = node.origin
                return None
            return self.union([a for a in arguments if a is not type(None)], node, key)
        if origin is Literal:
            if node.value not in arguments:
                hint_text = did_you_mean(str(node.value), [str(a) for a in arguments])
                return self.refuse(key, node, f"is {node.plain()!r}: {hint_text}")
            self.origins[key] = node.origin
            return node.value
        if origin in (tuple, list):
            return self.sequence(arguments, node, key)
        if origin is dict:
            if not isinstance(node.value, dict):
                return self.refuse(key, node, f"is {node.plain()!r}: it must be a mapping")
            found = {k: self.value(arguments[1], child, f"{key}.{k}") for k, child in node.value.items()}
            return _FAILED if _FAILED in found.values() else found
        if dataclasses.is_dataclass(hint):
            return self.dataclass(hint, node, key)
        return self.scalar(hint, node, key)

    def annotated(self, hint: Any, note: Any, node: Node, key: str) -> Any:
        if node.value is None and type(None) in get_args(hint):
            self.origins[key] = node.origin
            return None
        if isinstance(note, Registry):
            if get_origin(hint) is tuple:
                if not isinstance(node.value, list):
                    return self.refuse(key, node, f"is {node.plain()!r}: it must be a list of {note.name} choices")
                found = [self.choice(note, child, f"{key}.{i}") for i, child in enumerate(node.value)]
                self.origins.setdefault(key, node.origin)
                return _FAILED if any(f is _FAILED for f in found) else tuple(found)
            return self.choice(note, node, key)
        parse = units.n_bytes if note == "bytes" else lambda text: units.count(text, note)
        try:
            if not isinstance(node.value, str | int | float):
                raise ValueError(f"{node.plain()!r} is not a number of {note}")
            found = parse(node.value)
        except ValueError as error:
            return self.refuse(key, node, f"is wrong: {error}")
        self.origins[key] = node.origin
        return found

    def union(self, hints: list[Any], node: Node, key: str) -> Any:
        tries = []
        for hint in hints:
            attempt = _Builder(self.also_allowed)
            found = attempt.value(hint, node, key)
            if not attempt.problems:
                self.origins |= attempt.origins
                return found
            tries.append(attempt.problems)
        self.problems += min(tries, key=len) if len(tries) == 1 else [
            f"{key} ({node.origin}) is {node.plain()!r}: it must be {' or '.join(_name(h) for h in hints)}"
        ]  # fmt: skip
        return _FAILED

    def sequence(self, arguments: tuple[Any, ...], node: Node, key: str) -> Any:
        if not isinstance(node.value, list):
            return self.refuse(key, node, f"is {node.plain()!r}: it must be a list")
        if len(arguments) == 2 and arguments[1] is Ellipsis or len(arguments) == 1:
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
        elif hint is int and isinstance(value, float) and value == int(value):
            value = int(value)
        elif hint is str and isinstance(value, int | float) and not is_bool:
            value = str(value)
        elif hint is not Any and (not isinstance(value, hint) or (is_bool and hint is not bool)):
            return self.refuse(key, node, f"is {node.plain()!r}: it must be {_name(hint)}")
        self.origins[key] = node.origin
        return value


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _name(hint: Any) -> str:
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]


def _refuse_silent_attributes(cls: type) -> None:
    """A class attribute without an annotation is silently no field: a mistake in the code, not in the file."""
    fields = {f.name for f in dataclasses.fields(cls)}
    for name, value in vars(cls).items():
        if name.startswith("_") or name == "kind" or name in fields:
            continue
        if not callable(value) and not isinstance(value, property | classmethod | staticmethod):
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
