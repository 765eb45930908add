"""The bound of a step: its matrix products and attention, forward and backward, and nothing else.

No trainer that computes the same can be faster with these kernels; what a peer needs beside them is its share.
"""

import torch
import torch.nn.functional as F
from recipe import Shape, Step
from torch import Tensor

from megatrain.parallel.product import CPU_MULTIPLIES_BF16


def products(shape: Shape, bf16: bool, compiled: bool) -> Step:
    """Each product three times (output, gradient of the input, gradient of the weight), each attention both ways."""
    s = shape
    # A CPU without bf16 products multiplies the rounded operands as float32 numbers.
    multiplies = CPU_MULTIPLIES_BF16 or torch.get_default_device().type == "cuda"
    dtype = torch.bfloat16 if bf16 and multiplies else torch.float32
    inner = [(s.d_model, sum(s.widths)), (s.d_model, s.d_model), (s.d_model, 2 * s.d_ff), (s.d_ff, s.d_model)]
    layers = [[_Product(s.tokens, i, o, dtype) for i, o in inner] for _ in range(s.n_layers)]
    head = _Product(s.tokens, s.d_model, s.vocab_size, dtype)
    heads = [
        torch.randn(s.batch, n, s.seq_len, s.head_dim, dtype=dtype, requires_grad=True)
        for n in (s.n_heads, s.kv_heads, s.kv_heads)
    ]

    def step() -> float:
        for layer in layers:
            for product in layer:
                product.forward()
            y = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=s.kv_heads != s.n_heads)
            torch.autograd.grad(y, heads, y.detach())
            for product in layer:
                product.backward()
        head.forward()
        head.backward()
        return 0.0

    return Step(step)


class _Product:
    """One linear layer's products, into memory that is there."""

    def __init__(self, n: int, i: int, o: int, dtype: torch.dtype):
        self.x, self.weight = torch.randn(n, i, dtype=dtype), torch.randn(o, i, dtype=dtype)
        self.y, self.grad_x, self.grad_weight = (torch.empty(*size, dtype=dtype) for size in ((n, o), (n, i), (o, i)))

    def forward(self) -> None:
        torch.mm(self.x, self.weight.T, out=self.y)

    def backward(self) -> None:
        grad: Tensor = self.y  # any values
        torch.mm(grad, self.weight, out=self.grad_x)
        torch.mm(grad.T, self.x, out=self.grad_weight)
