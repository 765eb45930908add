"""YAML files and `key=value` words merged into one tree in which each value knows where it was written.

Merging, later over earlier (`base:` files in order, then the file, then the command line): mappings merge key by key,
except that a new `kind` replaces its whole mapping; lists are replaced. `data.sources.0.path=x` addresses an element.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatrain.base.errors import ConfigError

COMMAND_LINE = "command line"


@dataclass
class Node:
    """A value of the tree: a mapping or list of nodes, or a scalar; and where it was written."""

    value: Any
    origin: str

    def plain(self) -> Any:
        """The value without origins."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


def from_plain(value: Any, origin: str) -> Node:
    """The tree of plain mappings, lists and scalars that all come from `origin`."""
    if isinstance(value, dict):
        return Node({key: from_plain(child, origin) for key, child in value.items()}, origin)
    if isinstance(value, list):
        return Node([from_plain(child, origin) for child in value], origin)
    return Node(value, origin)


def scalar_or_list(text: str, origin: str) -> Node:
    """What stands right of the `=` of a `key=value`, as YAML.

    Raises:
        ConfigError: it is none.
    """
    return _compose(text, origin)


def read(path: str | Path, overrides: Sequence[str] = ()) -> Node:
    """The run file at `path` with its bases and the command line's `key=value` words, interpolations resolved.

    Raises:
        ConfigError: a file is missing or is not YAML, a key stands twice, a base includes itself, an override or an
            interpolation cannot be understood.
    """
    tree = _read_file(Path(path), including=())
    words = [_Word.of(word) for word in overrides]
    # A new kind replaces its whole mapping, so kinds come first: `optimizer.lr=1 optimizer.kind=lion` keeps its lr.
    for word in sorted(words, key=lambda word: word.path[-1] != "kind"):
        tree = _set(tree, word.path, word.value, word.text)
    return _interpolate(tree)


# ------------------------------------------------------------------------------------------------ one file


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: 1e-4 and 010 are decimal numbers, only true and false are booleans, 1:30 and = are text."""


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


_Loader.yaml_implicit_resolvers = {}
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(?:~|null|)$"), ["~", "n", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?:true|false)$"), list("tf"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?\d[\d_]*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:(?:\d[\d_]*\.\d*|\.\d+|\d[\d_]*(?=[eE]))(?:[eE][-+]?\d+)?|\.inf)$|\.nan$"),
    list("-+.0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


def _compose(text: str, name: str) -> Node:
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"{where} is not YAML: {getattr(error, 'problem', None) or error}") from None
    return Node(None, name) if root is None else _convert(root, name, _Loader(""), inside=())


def _convert(node: yaml.Node, name: str, loader: _Loader, inside: tuple[yaml.Node, ...]) -> Node:
    """`node` with origins; `inside` are the nodes around it, since an alias may point to one of them."""

    def line(of: yaml.Node) -> str:
        return name if name == COMMAND_LINE else f"{name}:{of.start_mark.line + 1}"

    origin = line(node)
    if node in inside:
        raise ConfigError(f"{origin}: an alias refers to what holds it: write the value out")
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Node] = {}
        for key_node, value_node in node.value:
            key, where = key_node.value, line(key_node)
            if not isinstance(key, str):
                raise ConfigError(f"{where}: a key must be a word, not a list or mapping")
            if key == "<<":
                raise ConfigError(f"{where}: YAML's merge key << is not read: name the file to build on with base")
            if key in mapping:
                raise ConfigError(f"{where}: the key {key!r} stands twice (first at {mapping[key].origin}): keep one")
            mapping[key] = _convert(value_node, name, loader, (*inside, node))
            mapping[key].origin = where
        return Node(mapping, origin)
    if isinstance(node, yaml.SequenceNode):
        return Node([_convert(child, name, loader, (*inside, node)) for child in node.value], origin)
    try:
        return Node(loader.construct_object(node), origin)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{origin}: {node.value!r} cannot be read: {error}") from None


def _read_file(path: Path, including: tuple[Path, ...]) -> Node:
    if path.resolve() in including:
        chain = " -> ".join(str(p) for p in (*including, path))
        raise ConfigError(f"{path} includes itself through base: {chain}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        by = f" (named by base in {including[-1]})" if including else ""
        raise ConfigError(f"there is no run file {path}{by}: give the path of a YAML file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder: give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    tree = _compose(text, str(path))
    if tree.value is None:
        tree = Node({}, tree.origin)
    if not isinstance(tree.value, dict):
        raise ConfigError(f"{path} must hold keys and values, not a single {type(tree.value).__name__}")
    bases = tree.value.pop("base", Node([], str(path)))
    merged = Node({}, str(path))
    names = bases.value if isinstance(bases.value, list) else [bases]
    for base in names:
        if not isinstance(base.value, str):
            raise ConfigError(f"base ({bases.origin}) must list the paths of run files, got {base.plain()!r}")
        merged = merge(merged, _read_file(path.parent / base.value, (*including, path.resolve())))
    return merge(merged, tree)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_Loader` would take for something else."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def dump(value: Any) -> str:
    """Plain mappings, lists and scalars as YAML; `read` gives the same values back."""

    def literally(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: literally(child) for key, child in value.items()}
        if isinstance(value, list):
            return [literally(child) for child in value]
        return value.replace("${", r"\${") if isinstance(value, str) else value

    return yaml.dump(literally(value), Dumper=_Dumper, sort_keys=False, width=120)


# ------------------------------------------------------------------------------------------------ merging


def merge(under: Node, over: Node) -> Node:
    """`over` laid on `under`: mappings key by key, anything else replaced; a new `kind` replaces its mapping."""
    under, over = _spelled_out(under, beside=over), _spelled_out(over, beside=under)
    if not (isinstance(under.value, dict) and isinstance(over.value, dict)):
        return over
    kinds = [side.value["kind"].value for side in (under, over) if "kind" in side.value]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        return over
    merged = dict(under.value)
    for key, node in over.value.items():
        merged[key] = merge(merged[key], node) if key in merged else node
    return Node(merged, over.origin)


def _spelled_out(node: Node, beside: Node) -> Node:
    """`attention: causal` is short for `{kind: causal}`, and means the same where it meets a mapping."""
    if isinstance(node.value, str) and isinstance(beside.value, dict):
        return Node({"kind": Node(node.value, node.origin)}, node.origin)
    return node


@dataclass(frozen=True)
class _Word:
    """A `key=value` of the command line."""

    text: str
    path: list[str]
    value: Node

    @classmethod
    def of(cls, text: str) -> "_Word":
        key, equals, value = text.partition("=")
        path = key.strip().split(".")
        if not equals or not all(path):
            raise ConfigError(f"{text!r} is not key=value: write for example train.steps=100")
        try:
            return cls(text, path, _compose(value, COMMAND_LINE))
        except ConfigError as error:
            raise ConfigError(f"{text!r}: {error}; quote the whole word for the shell") from None


def _set(tree: Node, path: list[str], value: Node, word: str) -> Node:
    if not path:
        return merge(tree, value)
    head, rest = path[0], path[1:]
    if isinstance(tree.value, list):
        if not head.isdecimal() or int(head) >= len(tree.value):
            elements = f"0 to {len(tree.value) - 1}" if tree.value else "it is empty"
            raise ConfigError(
                f"{word}: {head!r} is not an element of the list at {tree.origin} (allowed: {elements}): to add one, "
                "write the whole list, as in 'data.sources=[{path: a}, {path: b}]'"
            )
        items = list(tree.value)
        items[int(head)] = _set(items[int(head)], rest, value, word)
        return Node(items, COMMAND_LINE)
    mapping = dict(tree.value) if isinstance(tree.value, dict) else {}
    child = mapping.get(head)
    if not rest and head == "kind" and child is not None and child.value != value.value:
        mapping = {}  # a new kind replaces its whole mapping
    start = child if child is not None else Node({} if rest else None, COMMAND_LINE)
    if rest:
        start = _spelled_out(start, beside=tree)
    mapping[head] = _set(start, rest, value, word)
    return Node(mapping, tree.origin)


# ------------------------------------------------------------------------------------------------ interpolation


def _interpolate(tree: Node) -> Node:
    plain = tree.plain()
    if not any("${" in text for text in _texts(plain)):
        return tree
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(plain), resolve=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{key or 'a value'} cannot be interpolated: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError("an interpolation ${...} refers to itself: break the cycle") from None
    return _with_origins(resolved, tree)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _texts(child)


def _with_origins(value: Any, like: Node) -> Node:
    if isinstance(value, dict):
        children = like.value if isinstance(like.value, dict) else {}
        return Node({str(k): _with_origins(v, children.get(str(k), like)) for k, v in value.items()}, like.origin)
    if isinstance(value, list):
        items = like.value if isinstance(like.value, list) else [like] * len(value)
        return Node([_with_origins(v, n) for v, n in zip(value, items, strict=True)], like.origin)
    return Node(value, like.origin)
