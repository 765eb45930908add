"""Rules that say whether a document is fit to train on, each with the limit it broke and what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from megatrain.base.errors import ConfigError, did_you_mean
from megatrain.base.registry import Registry


@dataclass(frozen=True)
class Drop:
    """Why a document is left out."""

    reason: str
    """One of few, to be counted: the rule and its limit, such as "gopher_quality.min_words"."""
    detail: str
    """What was measured in this document."""


class Rule(Protocol):
    """A frozen dataclass whose fields are limits."""

    def broken(self, text: str) -> tuple[str, str] | None:
        """The field that this text breaks and what was measured, or None."""
        ...


RULE: Registry[Any] = Registry("rule", "megatrain.data.rules")


def parse_rule(word: str) -> Rule:
    """A rule from "kind" or "kind:limit=value,limit=value".

    Raises:
        ConfigError: there is no such rule or limit, or a value is no number.
    """
    kind, _, rest = word.partition(":")
    cls = RULE[kind]
    known = {field.name: type(getattr(cls(), field.name)) for field in fields(cls)}
    limits = {}
    for part in filter(None, rest.split(",")):
        name, _, value = part.partition("=")
        if name not in known:
            raise ConfigError(f"rule {kind} has no limit {name!r}: {did_you_mean(name, known)}")
        try:
            limits[name] = known[name](value)
        except ValueError as error:
            raise ConfigError(f"rule {kind}: {name}={value!r} is no {known[name].__name__}: give a number") from error
    return cls(**limits)


def first_broken(rules: Sequence[Any], text: str) -> Drop | None:
    """The first rule that `text` breaks."""
    for rule in rules:
        if (found := rule.broken(text)) is not None:
            return Drop(f"{rule.kind}.{found[0]}", found[1])
    return None
