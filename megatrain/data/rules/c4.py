"""The pages that C4 drops (Raffel et al. 2020, arXiv:1910.10683, section 2.2). Differs: pages keep all lines."""

from dataclasses import dataclass

from megatrain.data.quality import RULE
from megatrain.data.words import sentences, words


@RULE.register("c4")
@dataclass(frozen=True)
class C4:
    """Meant for web prose: code is what it drops."""

    min_sentences: int = 3
    max_braces: int = 0
    """Opening curly brackets, which prose has none of and code has."""
    max_placeholders: int = 0
    """Occurrences of "lorem ipsum"."""

    def broken(self, text: str) -> tuple[str, str] | None:
        if (braces := text.count("{")) > self.max_braces:
            return "max_braces", f"{braces} braces"
        if (placeholders := text.lower().count("lorem ipsum")) > self.max_placeholders:
            return "max_placeholders", f"{placeholders} placeholders"
        found = sum(bool(words(sentence)) for sentence in sentences(text))
        return ("min_sentences", f"{found} sentences") if found < self.min_sentences else None
