"""Does it repeat itself? Gopher's filters (Rae et al. 2021, arXiv:2112.11446, appendix A.1.1 and table A1)."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from megatrain.data.quality import RULE


@RULE.register("gopher_repetition")
@dataclass(frozen=True)
class GopherRepetition:
    """Limits are shares; those of characters count the characters that are inside repetitions."""

    max_lines: float = 0.30
    """Lines that occurred before."""
    max_paragraphs: float = 0.30
    max_line_characters: float = 0.20
    max_paragraph_characters: float = 0.20
    max_top_2: float = 0.20
    """Characters in the most frequent run of two words."""
    max_top_3: float = 0.18
    max_top_4: float = 0.16
    max_repeated_5: float = 0.15
    """Characters in runs of five words that occurred before."""
    max_repeated_6: float = 0.14
    max_repeated_7: float = 0.13
    max_repeated_8: float = 0.12
    max_repeated_9: float = 0.11
    max_repeated_10: float = 0.10

    def broken(self, text: str) -> tuple[str, str] | None:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
        words = text.split()
        shares: dict[str, Callable[[], float]] = {
            "max_lines": partial(_repeated, lines),
            "max_paragraphs": partial(_repeated, paragraphs),
            "max_line_characters": partial(_repeated_characters, lines, text),
            "max_paragraph_characters": partial(_repeated_characters, paragraphs, text),
            **{f"max_top_{n}": partial(_top, words, n) for n in (2, 3, 4)},
            **{f"max_repeated_{n}": partial(_in_repeated_runs, words, n) for n in range(5, 11)},
        }
        for limit, share in shares.items():  # the cheap ones first, and no further than the first that is broken
            if (found := share()) > getattr(self, limit):
                return limit, f"{found:.1%}"
        return None


def _repeated(parts: Sequence[str]) -> float:
    return (len(parts) - len(set(parts))) / max(1, len(parts))


def _repeated_characters(parts: Sequence[str], text: str) -> float:
    first = sum(map(len, dict.fromkeys(parts)))
    return (sum(map(len, parts)) - first) / max(1, len(text))


def _runs(words: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[k:] for k in range(n)), strict=False))


def _top(words: list[str], n: int) -> float:
    """Share of the words' characters that the most frequent run covers; a run that occurs once repeats nothing."""
    counts = Counter(_runs(words, n))
    run, times = max(counts.items(), key=lambda item: (item[1], item[0]), default=((), 0))
    return times * sum(map(len, run)) / max(1, sum(map(len, words))) if times > 1 else 0.0


def _in_repeated_runs(words: list[str], n: int) -> float:
    """Share of the words' characters that lie in a run which occurred before; each counts once."""
    seen: set[tuple[str, ...]] = set()
    covered, inside = 0, 0  # words before `covered` are counted already
    for i, run in enumerate(_runs(words, n)):
        if run in seen:
            inside += sum(map(len, words[max(i, covered) : i + n]))
            covered = i + n
        seen.add(run)
    return inside / max(1, sum(map(len, words)))
