"""One layer of a Transformer: attention and feed-forward, each with a norm and a residual connection."""

from typing import Any

from torch import Tensor, nn

from megatrain.nn.attention.layer import SelfAttention
from megatrain.nn.dropout import Dropout
from megatrain.nn.where import Where


class PreNormBlock(nn.Module):
    """Norm before each sublayer (Xiong et al. 2020, arXiv:2002.04745): the residual stream stays untouched."""

    def __init__(
        self, attention: SelfAttention, feed_forward: nn.Module, norms: tuple[nn.Module, nn.Module], drop: Any
    ):
        super().__init__()
        self.attention_norm, self.attention = norms[0], attention
        self.feed_forward_norm, self.feed_forward = norms[1], feed_forward
        self.attention_dropout: Dropout = drop("attention")
        self.feed_forward_dropout: Dropout = drop("feed_forward")

    def forward(self, x: Tensor, where: Where) -> Tensor:
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), where), where.noise)
        return x + self.feed_forward_dropout(self.feed_forward(self.feed_forward_norm(x)), where.noise)


class PostNormBlock(nn.Module):
    """Norm after each residual sum (Vaswani et al. 2017, arXiv:1706.03762, section 3.1)."""

    def __init__(
        self, attention: SelfAttention, feed_forward: nn.Module, norms: tuple[nn.Module, nn.Module], drop: Any
    ):
        super().__init__()
        self.attention, self.attention_norm = attention, norms[0]
        self.feed_forward, self.feed_forward_norm = feed_forward, norms[1]
        self.attention_dropout: Dropout = drop("attention")
        self.feed_forward_dropout: Dropout = drop("feed_forward")

    def forward(self, x: Tensor, where: Where) -> Tensor:
        x = self.attention_norm(x + self.attention_dropout(self.attention(x, where), where.noise))
        return self.feed_forward_norm(x + self.feed_forward_dropout(self.feed_forward(x), where.noise))


BLOCKS = {"pre": PreNormBlock, "post": PostNormBlock}
