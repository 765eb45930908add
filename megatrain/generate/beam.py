"""Beam search: the most probable text that can be found by keeping several beginnings of it at once.

The score of a text is its log-probability divided by a penalty that grows with its length, so that long texts are not
beaten just for having more factors (Wu et al. 2016, arXiv:1609.08144, equation 14, without its coverage term).

Two things differ from the usual search. The greedy text is always followed as well, so that a score is never below
greedy's, which a beam alone does not promise. And the search ends when no open text could still win, however it went
on, rather than when enough texts are complete.
"""

from dataclasses import dataclass
from typing import Any

import torch

from megatrain.base.errors import ConfigError
from megatrain.generate.load import Loaded
from megatrain.generate.sample import encode_prompt, longest, not_finite, prompt_problem
from megatrain.nn.where import KeyValueCache


@dataclass(frozen=True, kw_only=True)
class Beam:
    """How to search."""

    width: int
    """Open texts that are kept at each length; the greedy one is kept besides."""
    length_penalty: float = 0.0
    """Exponent of the penalty: 0 is the plain log-probability, 0.6 to 1 is usual in translation."""
    max_tokens: int = 128
    """A text is complete here, with or without its end."""

    def problems(self) -> list[str]:
        found = []
        if self.width < 1:
            found.append(f"beams={self.width}: keep at least 1; 1 is greedy")
        if self.length_penalty < 0:
            found.append(f"length_penalty={self.length_penalty}: it is 0 or above; 0 does not look at the length")
        if self.max_tokens < 1:
            found.append(f"max_tokens={self.max_tokens}: ask for at least 1")
        return found

    def score(self, log_probability: float, n_tokens: int) -> float:
        """What a text is judged by; its end counts as a token."""
        return log_probability / ((5 + n_tokens) / 6) ** self.length_penalty


@dataclass(frozen=True)
class Hypothesis:
    """A text as tokens, its probability and its place in the search."""

    tokens: tuple[int, ...]
    """With the end of the document, where it ended there."""
    log_probability: float
    """Of all tokens after the prompt, nats."""
    greedy: bool
    """Each token was the most probable one."""


def beam_text(loaded: Loaded, prompt: str, beam: Beam) -> tuple[str, Hypothesis]:
    """The best text found to continue `prompt`, without the prompt.

    Raises:
        ConfigError: `beam` is not as it must be, or the prompt is too long for the model.
        RunError: the model computed something that is not a finite number.
    """
    ids = encode_prompt(loaded, prompt)
    problems = beam.problems()
    if problem := prompt_problem(loaded, ids):
        problems.append(problem)
    if problems:
        raise ConfigError(problems)
    n = int(min(beam.max_tokens, longest(loaded) - len(ids) + 1))
    best = search(loaded.model, ids, n, beam, loaded.tokenizer.end_of_document, loaded.device)[0]
    whole, before = (loaded.tokenizer.decode(part) for part in ([*ids, *best.tokens], ids))
    return whole[len(before) :], best


@torch.inference_mode()
def search(
    model: Any, prompt: list[int], max_tokens: int, beam: Beam, end: int, device: torch.device
) -> list[Hypothesis]:
    """Complete texts, the best first.

    Args:
        model: has `decode(tokens, cache, latest) -> logits`.
        prompt: at least one token.
        max_tokens: a text is complete at this length.
        end: the token that completes a text before that.

    Raises:
        RunError: the model computed something that is not a finite number.
    """
    cache = KeyValueCache(len(prompt) + max_tokens - 1)
    open_texts, complete = [Hypothesis((), 0.0, greedy=True)], []
    tokens = torch.tensor([prompt], device=device)
    for length in range(1, max_tokens + 1):
        log_probabilities = model.decode(tokens, cache, latest=1)[:, -1].double().log_softmax(-1)
        if not log_probabilities.isfinite().all():
            raise not_finite(cache.length)
        going = []
        for parent, h in _extend(open_texts, log_probabilities, beam.width):
            if h.tokens[-1] == end or length == max_tokens:
                complete.append(h)
            else:
                going.append((parent, h))
        # From here a text only loses probability, and is penalised least at full length.
        hope = max((beam.score(h.log_probability, max_tokens) for _, h in going), default=-torch.inf)
        if max((beam.score(h.log_probability, len(h.tokens)) for h in complete), default=-torch.inf) >= hope:
            break
        open_texts = [h for _, h in going]
        cache.select([parent for parent, _ in going])
        tokens = torch.tensor([h.tokens[-1:] for h in open_texts], device=device)
    return sorted(complete, key=lambda h: -beam.score(h.log_probability, len(h.tokens)))


def _extend(open_texts: list[Hypothesis], log_probabilities: torch.Tensor, width: int) -> list[tuple[int, Hypothesis]]:
    """The `width` most probable texts with one more token, and the greedy one, each with the row it comes from.

    Args:
        log_probabilities: float64 [rows, v] of the next token.
    """
    n_tokens = log_probabilities.shape[-1]
    so_far = torch.tensor([h.log_probability for h in open_texts], dtype=torch.float64, device=log_probabilities.device)
    total = (so_far[:, None] + log_probabilities).flatten()
    best = log_probabilities.argmax(-1).tolist()
    chosen = total.topk(min(width, total.numel())).indices.tolist()
    chosen += [row * n_tokens + best[row] for row, h in enumerate(open_texts) if h.greedy]
    found = []
    values = total[chosen].tolist()
    for flat, value in dict(zip(chosen, values, strict=True)).items():  # the greedy one may be among the best
        row, token = divmod(flat, n_tokens)
        parent = open_texts[row]
        found.append((row, Hypothesis((*parent.tokens, token), value, parent.greedy and token == best[row])))
    return found
