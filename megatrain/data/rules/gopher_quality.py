"""Is it prose? The quality filters of Gopher (Rae et al. 2021, arXiv:2112.11446, appendix A.1.1)."""

from dataclasses import dataclass

from megatrain.data.quality import RULE

_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_BULLETS = ("•", "-", "*", "‣", "◦")
_ELLIPSES = ("...", "…")


@RULE.register("gopher_quality")
@dataclass(frozen=True)
class GopherQuality:
    """Words are what stands between spaces, as in the paper; meant for English prose, not for code."""

    min_words: int = 50
    max_words: int = 100_000
    min_mean_length: float = 3.0
    """Characters of a word, on average."""
    max_mean_length: float = 10.0
    max_symbols: float = 0.1
    """Hash signs, and ellipses, for each word."""
    max_bullets: float = 0.9
    """Share of lines that begin with a bullet."""
    max_ellipses: float = 0.3
    """Share of lines that end with an ellipsis."""
    min_alphabetic: float = 0.8
    """Share of words with a letter."""
    min_stop_words: int = 2
    """Different ones out of eight common English words."""

    def broken(self, text: str) -> tuple[str, str] | None:
        words = text.split()
        if len(words) < self.min_words:
            return "min_words", f"{len(words)} words"
        if len(words) > self.max_words:
            return "max_words", f"{len(words)} words"
        length = sum(map(len, words)) / max(1, len(words))
        if length < self.min_mean_length:
            return "min_mean_length", f"{length:.2f} characters a word"
        if length > self.max_mean_length:
            return "max_mean_length", f"{length:.2f} characters a word"
        return self._broken_symbols(text, words) or self._broken_lines(text) or self._broken_words(words)

    def _broken_symbols(self, text: str, words: list[str]) -> tuple[str, str] | None:
        hashes, ellipses = text.count("#"), sum(map(text.count, _ELLIPSES))
        most = max(hashes, ellipses) / max(1, len(words))
        return ("max_symbols", f"{most:.3f} symbols a word") if most > self.max_symbols else None

    def _broken_lines(self, text: str) -> tuple[str, str] | None:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        bullets = sum(line.startswith(_BULLETS) for line in lines) / max(1, len(lines))
        if bullets > self.max_bullets:
            return "max_bullets", f"{bullets:.1%} of the lines"
        ellipses = sum(line.endswith(_ELLIPSES) for line in lines) / max(1, len(lines))
        return ("max_ellipses", f"{ellipses:.1%} of the lines") if ellipses > self.max_ellipses else None

    def _broken_words(self, words: list[str]) -> tuple[str, str] | None:
        alphabetic = sum(any(map(str.isalpha, word)) for word in words) / max(1, len(words))
        if alphabetic < self.min_alphabetic:
            return "min_alphabetic", f"{alphabetic:.1%} of the words"
        stop_words = len(_STOP_WORDS.intersection(map(str.lower, words)))
        return ("min_stop_words", f"{stop_words} stop words") if stop_words < self.min_stop_words else None
