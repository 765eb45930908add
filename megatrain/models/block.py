"""One layer of a Transformer: attention and feed-forward, with norms and residual connections.

Where the norms stand, and whether the two sublayers read the same input, is all that the kinds differ in:

| norm.placement | a layer | as in |
|---|---|---|
| pre | x + f(norm(x)), for attention, then for feed-forward | Xiong et al. 2020, arXiv:2002.04745 |
| post | norm(x + f(x)) | Vaswani et al. 2017, arXiv:1706.03762, section 3.1 |
| output | x + norm(f(x)) | OLMo et al. 2025, arXiv:2501.00656, section 3.2 |
| parallel | x + attention(norm(x)) + feed_forward(other_norm(x)) | Black et al. 2022, arXiv:2204.06745, section 2.1 |
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from megatrain.nn.attention.layer import SelfAttention
from megatrain.nn.dropout import Dropout
from megatrain.nn.where import Where


class Block(nn.Module):
    """What all kinds hold, under the same names.

    Args:
        norm: makes a norm of the model's width.
        drop: makes the dropout of the sublayer of that name.
    """

    ends_normalised: ClassVar[bool] = False
    """What leaves the block is normalised, so that the head needs no norm before it."""

    def __init__(
        self,
        attention: SelfAttention,
        feed_forward: nn.Module,
        norm: Callable[[], nn.Module],
        drop: Callable[[str], Dropout],
    ):
        super().__init__()
        self.attention_norm, self.attention = norm(), attention
        self.feed_forward_norm, self.feed_forward = norm(), feed_forward
        self.attention_dropout, self.feed_forward_dropout = drop("attention"), drop("feed_forward")


class PreNormBlock(Block):
    """The residual stream stays untouched."""

    def forward(self, x: Tensor, where: Where) -> Tensor:
        x, y = _beside(self.attention_norm, x)
        x = x + self.attention_dropout(self.attention(y, where), where.noise)
        x, y = _beside(self.feed_forward_norm, x)
        return x + self.feed_forward_dropout(self.feed_forward(y), where.noise)


def _beside(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` as it goes on, and norm(x); where that is compiled for a GPU, as norms do that have a kernel for it."""
    if torch.compiler.is_compiling() and x.is_cuda and (beside := getattr(norm, "beside", None)) is not None:
        return beside(x)
    return x, norm(x)


class PostNormBlock(Block):
    """Every sum is normalised."""

    ends_normalised = True

    def forward(self, x: Tensor, where: Where) -> Tensor:
        x = self.attention_norm(x + self.attention_dropout(self.attention(x, where), where.noise))
        return self.feed_forward_norm(x + self.feed_forward_dropout(self.feed_forward(x), where.noise))


class OutputNormBlock(Block):
    """What a sublayer adds is normalised; what it reads is not."""

    def forward(self, x: Tensor, where: Where) -> Tensor:
        x = x + self.attention_dropout(self.attention_norm(self.attention(x, where)), where.noise)
        return x + self.feed_forward_dropout(self.feed_forward_norm(self.feed_forward(x)), where.noise)


class ParallelBlock(Block):
    """Both sublayers read the same input, each through a norm of its own."""

    def forward(self, x: Tensor, where: Where) -> Tensor:
        attended = self.attention_dropout(self.attention(self.attention_norm(x), where), where.noise)
        return x + attended + self.feed_forward_dropout(self.feed_forward(self.feed_forward_norm(x)), where.noise)


BLOCKS: dict[str, type[Block]] = {
    "pre": PreNormBlock,
    "post": PostNormBlock,
    "output": OutputNormBlock,
    "parallel": ParallelBlock,
}
