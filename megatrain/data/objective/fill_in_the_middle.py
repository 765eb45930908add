"""Documents cut in three and told with the middle last, so that a model learns to fill a gap.

Paper: Bavarian et al. 2022, arXiv:2207.14255. A document becomes `PREFIX p SUFFIX s MIDDLE m` (or, for `spm_rate` of
them, `PREFIX SUFFIX s MIDDLE p m`). Differs in that cuts fall between tokens, not characters, and that the last three
tokens of what stands in the row make place for the special ones.
"""

from dataclasses import dataclass

import numpy as np

from megatrain.data.objective import OBJECTIVE, Name, Seeds, Special, fractions, ids_of
from megatrain.data.rows import Rows, pieces

_SHORTEST = 8  # tokens; of less there is nothing to fill in


@OBJECTIVE.register("fill_in_the_middle")
@dataclass(frozen=True, kw_only=True)
class FillInTheMiddle:
    rate: float = 0.5
    """Share of the documents that are rewritten."""
    spm_rate: float = 0.5
    """Share of those whose suffix comes first."""
    prefix: Name = "<|fim_prefix|>"
    suffix: Name = "<|fim_suffix|>"
    middle: Name = "<|fim_middle|>"

    def problems(self) -> list[str]:
        rates = {"rate": self.rate, "spm_rate": self.spm_rate}
        return [f"data.objective.{k} is {v}: it must be between 0 and 1" for k, v in rates.items() if not 0 <= v <= 1]

    def build(self, special: Special) -> "FimRewriter":
        return FimRewriter(self, ids_of("data.objective", (self.prefix, self.suffix, self.middle), special))


@dataclass(frozen=True)
class FimRewriter:
    config: FillInTheMiddle
    ids: list[int]

    def rewrite(self, rows: Rows, seeds: Seeds) -> None:
        for piece in list(pieces(rows)):
            body = rows.body(piece)
            if len(body) < _SHORTEST:
                continue
            rewritten, suffix_first, *cuts = fractions(seeds(piece.row, piece.column), 4)
            if rewritten >= self.config.rate:
                continue
            kept = body[:-3]
            i, j = sorted(int(cut * (len(kept) + 1)) for cut in cuts)
            prefix, middle, suffix = kept[:i], kept[i:j], kept[j:]
            p, s, m = (np.array([token]) for token in self.ids)
            if suffix_first < self.config.spm_rate:
                parts = [p, s, suffix, m, prefix, middle]
            else:
                parts = [p, prefix, s, suffix, m, middle]
            rows.rewrite(piece, np.concatenate(parts))
