"""Tokens to text as they come: whole characters only, and nothing beyond a stop string."""

import re
from collections.abc import Sequence

from megatrain.data.tokenizer import Tokenizer

UNFINISHED = "\ufffd"
"""What bytes that are no character yet decode to."""

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class TextStream:
    """The text of tokens, piece by piece. All pieces together are the decoding of all tokens.

    A character of several bytes may stand across tokens, so a text that ends in the replacement character is held back
    until it is finished (or proves to be no character). How a token reads may depend on the one before it (tokenizers
    that drop a leading space), so tokens are decoded together with some that were printed before.

    Args:
        context: tokens before the first, a prompt; their text is not repeated.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        added = tokenizer.backend.get_added_tokens_decoder().items()
        self._special = {i for i, token in added if token.special}
        self._window = [i for i in context if i not in self._special]  # tokens that are decoded together
        self._printed = len(self._window)  # so many of them were printed before
        self._printed_text = tokenizer.decode(self._window)

    def push(self, token: int) -> str:
        """The text that this token makes certain; often its own, "" where it ends within a character."""
        if token in self._special:  # no text; and bytes before and after it make one group
            return ""
        self._window.append(token)
        # Tokens that are single bytes decode as a group, so the group is waited for.
        if _BYTE.fullmatch(self._tokenizer.backend.id_to_token(token) or ""):
            return ""
        text = self._tokenizer.decode(self._window)
        if text.endswith(UNFINISHED) or len(text) <= len(self._printed_text):
            return ""
        return self._print(text)

    def finish(self) -> str:
        """The rest: bytes that wait for more of their character, as replacement characters."""
        return self._print(self._tokenizer.decode(self._window))

    def _print(self, text: str) -> str:
        piece = text[len(self._printed_text) :]
        del self._window[: self._printed]
        self._printed = len(self._window)
        self._printed_text = self._tokenizer.decode(self._window)
        return piece


class StopStrings:
    """Text up to the first stop string, piece by piece. What may be the beginning of one is held back.

    Of several, the one that is complete first counts; of those complete at once, the longest.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held = tuple(stops), ""
        self.found = False
        """A stop string has come; nothing after it is text."""

    def push(self, text: str) -> str:
        """The text that is certain to stand before any stop string."""
        if self.found:
            return ""
        text = self._held + text
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        n_held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def finish(self) -> str:
        """What was held back and is no stop string after all."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that are the beginning of `stop`, at most."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
