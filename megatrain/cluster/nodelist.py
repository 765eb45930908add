"""Slurm's short forms of host names and task counts, read without asking Slurm."""

import itertools
import re

from megatrain.base.errors import ConfigError

_PIECE = re.compile(r"([^\[\],]*)(?:\[([^\[\]]*)\])?")
_LARGEST = 100_000  # hosts; beyond it the list is a mistake, not a cluster


def hosts(text: str) -> list[str]:
    """The hosts of a Slurm node list, in its order.

    Raises:
        ConfigError: it is not such a list.

    >>> hosts("n[01-03,7],x9")
    ['n01', 'n02', 'n03', 'n7', 'x9']
    >>> hosts("rack[1-2]-n[8,09]")
    ['rack1-n8', 'rack1-n09', 'rack2-n8', 'rack2-n09']
    """
    refusal = ConfigError(
        f"{text!r} is not a Slurm node list: it must look like n[01-03,7],x9 (see SLURM_JOB_NODELIST)"
    )
    found: list[str] = []
    for word in _split_outside_brackets(text):
        parts: list[list[str]] = []
        for match in _PIECE.finditer(word):
            name, ranges = match.groups()
            parts.append([name])
            if ranges is not None:
                numbers = [_numbers(r) for r in ranges.split(",")]
                if any(n is None for n in numbers):
                    raise refusal
                parts.append([n for several in numbers if several for n in several])
        if "".join(match.group(0) for match in _PIECE.finditer(word)) != word or not word.strip():
            raise refusal
        found += ["".join(chosen) for chosen in itertools.product(*parts)]
        if len(found) > _LARGEST:
            raise refusal
    if not found:
        raise refusal
    return found


def tasks_per_node(text: str) -> list[int]:
    """Tasks on each node, in node order.

    Raises:
        ConfigError: it is not a list of counts.

    >>> tasks_per_node("8(x2),4")
    [8, 8, 4]
    """
    found: list[int] = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", word.strip())
        if not match:
            raise ConfigError(f"{text!r} is not a list of tasks per node: it must look like 8(x2),4")
        found += [int(match[1])] * int(match[2] or 1)
    return found


def _split_outside_brackets(text: str) -> list[str]:
    return re.split(r",(?![^\[]*\])", text)


def _numbers(text: str) -> list[str] | None:
    """ "01-03" -> 01, 02, 03 with their zeros; None where it is no range."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not match:
        return None
    first, last = match[1], match[2] or match[1]
    if int(last) < int(first) or int(last) - int(first) > _LARGEST:
        return None
    return [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
