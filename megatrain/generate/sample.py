"""Continue prompts with a trained model, token after token, with a cache of keys and values."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from megatrain.base.errors import ConfigError, RunError
from megatrain.base.random import generator
from megatrain.checkpoint.model import trained_here
from megatrain.generate.choose import Choosing
from megatrain.generate.load import Loaded
from megatrain.generate.text import StopStrings, TextStream
from megatrain.nn.position.learned import LearnedPositions
from megatrain.nn.where import KeyValueCache

ROWS_AT_ONCE = 32
"""Prompts that are continued together; more wait for their turn."""


def generate(
    loaded: Loaded,
    prompt: str | Sequence[str],
    *,
    max_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> str | list[str]:
    """Text that continues `prompt`, without the prompt; a list of texts for several prompts.

    The n-th text of a prompt is a function of the model, the options and n alone: not of what else is in the list. So
    the same prompt given three times has three texts, and they are those it would have in any other company.

    Args:
        loaded: what `load` returns.
        prompt: "" starts a document.
        max_tokens: at most so many; less where the model ends the document.
        temperature, top_k, top_p: see `Choosing`; temperature 0 takes the most probable token, always.
        stop: the text ends before the first of these.

    Raises:
        ConfigError: an option or a prompt is not as it must be.
        RunError: the model computed something that is not a finite number.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    choosing = Choosing(temperature=temperature, top_k=top_k, top_p=top_p)
    rows = begin(loaded, prompts, max_tokens=max_tokens, seed=seed, stop=stop)
    for _ in proceed(loaded, rows, choosing):
        pass
    return rows[0].text if isinstance(prompt, str) else [row.text for row in rows]


class Continuation:
    """A prompt and what follows it so far.

    Args:
        ids: the prompt's tokens, at least one.
        uniforms: float64 [max_tokens] in [0, 1): one number a token, which decides what is drawn.
    """

    def __init__(self, loaded: Loaded, prompt: str, ids: list[int], uniforms: Tensor, stop: Sequence[str]):
        self.prompt, self.n_prompt, self.ids, self.uniforms = prompt, len(ids), ids, uniforms
        self.text = ""
        self.ended: str | None = None
        """Why nothing follows: end_of_document, stop, max_tokens, or positions (the model knows no further ones)."""
        self._end, self._longest = loaded.tokenizer.end_of_document, longest(loaded)
        self._characters, self._stops = TextStream(loaded.tokenizer, ids), StopStrings(stop)

    @property
    def tokens(self) -> list[int]:
        """What was chosen, without the token that ends the document."""
        return self.ids[self.n_prompt :]

    def accept(self, token: int) -> str:
        """The next token was chosen; the text that this adds."""
        if token == self._end:
            return self._finish("end_of_document")
        self.ids.append(token)
        piece = self._stops.push(self._characters.push(token))
        self.text += piece
        if self._stops.found:
            self.ended = "stop"
        elif len(self.ids) == self.n_prompt + len(self.uniforms):
            piece += self._finish("max_tokens")
        elif len(self.ids) == self._longest + 1:  # the last one was chosen, and cannot be read
            piece += self._finish("positions")
        return piece

    def _finish(self, why: str) -> str:
        piece = self._stops.push(self._characters.finish())
        if not self._stops.found:
            piece += self._stops.finish()
        self.text += piece
        self.ended = "stop" if self._stops.found else why
        return piece


def longest(loaded: Loaded) -> float:
    """Tokens that the model can read at once: infinite unless each position is learned for itself."""
    positions = loaded.model.positions
    return positions.weight.shape[0] if isinstance(positions, LearnedPositions) else float("inf")


def begin(
    loaded: Loaded, prompts: Sequence[str], *, max_tokens: int, seed: int = 0, stop: Sequence[str] = ()
) -> list[Continuation]:
    """Prompts made ready for `proceed`.

    Raises:
        ConfigError: there is no room for a token, a stop string is empty, or a prompt is too long for the model.
    """
    problems = []
    if max_tokens < 1:
        problems.append(f"max_tokens={max_tokens}: ask for at least 1")
    if "" in stop:
        problems.append("a stop string is empty, and stands before every text: leave it out")
    encoded = [encode_prompt(loaded, prompt) for prompt in prompts]
    problems += [problem for ids in encoded if (problem := prompt_problem(loaded, ids))]
    if problems:
        raise ConfigError(problems)
    seen: Counter[str] = Counter()
    rows = []
    for prompt, ids in zip(prompts, encoded, strict=True):
        own = generator(seed, "generate", prompt, seen[prompt])
        seen[prompt] += 1
        rows.append(Continuation(loaded, prompt, ids, torch.rand(max_tokens, dtype=torch.float64, generator=own), stop))
    return rows


def encode_prompt(loaded: Loaded, prompt: str) -> list[int]:
    """A prompt's tokens, as the beginning of a document.

    Runs read each document behind an end-of-document token, so that is what a prompt begins with. A converted model,
    which was trained elsewhere, is given what its tokenizer's own file puts in front (often nothing; where there is no
    prompt either, an end-of-document token).
    """
    end = loaded.tokenizer.end_of_document
    begin = [end] if trained_here(loaded.config) else loaded.tokenizer.put_in_front
    return [*begin, *loaded.tokenizer.encode(prompt)] or [end]


def prompt_problem(loaded: Loaded, ids: Sequence[int]) -> str | None:
    """Why the model cannot read a prompt."""
    if len(ids) <= longest(loaded):
        return None
    return (
        f"the prompt has {len(ids)} tokens and this model has learned positions for {longest(loaded)}: shorten it, or "
        "train with a larger data.seq_len"
    )


def proceed(loaded: Loaded, rows: Sequence[Continuation], choosing: Choosing) -> Iterator[tuple[Continuation, str]]:
    """Continue all rows to their ends, some at a time: each yields a row and the text that it has grown by.

    Raises:
        ConfigError: `choosing` is not as it must be; raised by the call, before anything is computed.
        RunError: the model computed something that is not a finite number.
    """
    if problems := choosing.problems():
        raise ConfigError(problems)
    by_length = sorted(rows, key=lambda row: len(row.ids))  # rows of one length wait least for each other
    groups = [by_length[first : first + ROWS_AT_ONCE] for first in range(0, len(rows), ROWS_AT_ONCE)]
    return chain.from_iterable(_proceed_together(loaded, group, choosing) for group in groups)


@torch.inference_mode()
def _proceed_together(
    loaded: Loaded, rows: list[Continuation], choosing: Choosing
) -> Iterator[tuple[Continuation, str]]:
    """All rows stand at one position: those whose prompt goes on read it while the others read what was chosen.

    So there is no padding, and a row is computed as it would be alone.
    """
    capacity = max(row.n_prompt + len(row.uniforms) - 1 for row in rows)  # the last token is chosen, not read
    cache = KeyValueCache(int(min(capacity, longest(loaded))))
    while rows:
        unread = slice(cache.length, min(len(row.ids) for row in rows))
        tokens = torch.tensor([row.ids[unread] for row in rows], device=loaded.device)
        logits = loaded.model.decode(tokens, cache, latest=1)[:, -1]
        for row, token in zip(rows, _chosen(rows, logits, choosing, cache.length), strict=True):
            if len(row.ids) == cache.length:
                yield row, row.accept(token)
        alive = [n for n, row in enumerate(rows) if row.ended is None]
        if len(alive) < len(rows):
            rows = [rows[n] for n in alive]
            cache.select(alive)


def _chosen(rows: list[Continuation], logits: Tensor, choosing: Choosing, position: int) -> list[int]:
    """The token that each row [b, v] would choose after `position` tokens; what a prompt goes on with is not asked."""
    uniform = torch.stack([row.uniforms[max(0, position - row.n_prompt)] for row in rows])
    tokens = choosing.choose(logits, uniform.to(logits.device)).tolist()
    if -1 in tokens:
        raise not_finite(position)
    return tokens


def not_finite(position: int) -> RunError:
    return RunError(
        f"the model computed logits that are not finite after {position} tokens: its weights are damaged, or too "
        "large for the number format; try an earlier checkpoint, or fp32"
    )
