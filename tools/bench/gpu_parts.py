"""One block and the rest of a model, apart, for tools that count the kernels which the compiler generates for a GPU.

`build(shape)` returns (block, inputs, head, parameters): `block(*args, **kwargs)` gives the next hidden states,
`inputs(dtype)` gives its (args, kwargs) with the hidden states [batch, seq, d] first, `head(ids, targets)` is all else
of the model, with its loss. `shape` has dim, n_layers, n_heads, n_kv_heads, ffn, vocab, seq, batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.models.decoder import Decoder, DecoderModel
from megatrain.nn.where import Where
from megatrain.parallel.cross_entropy import reference


class Rest(nn.Module):
    """The model without its blocks: embedding, last norm, head and loss, the mean over tokens.

    The loss is the plain form, which a compiler can look into; the kernel that training uses moves a third less.
    """

    def __init__(self, model: DecoderModel):
        super().__init__()
        self.embedding, self.norm, self.head = model.embedding, model.norm, model.head
        self.n_valid = model.n_valid

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        hidden = self.norm(self.embedding(ids)).flatten(0, 1)
        weights = torch.ones(targets.numel(), device=targets.device)
        loss = reference(hidden, self.head.weight, targets.flatten(), weights, n_valid=self.n_valid)
        return loss / targets.numel()


def build(shape: dict[str, Any]) -> tuple[nn.Module, Callable[..., Any], nn.Module, int]:
    """The parts of a decoder of this shape with untied embeddings, as the peers' models have them.

    From here on this process takes what is traced for what is compiled: layers choose their plain forms then.
    """
    torch.compiler.is_compiling = lambda: True
    choice = Decoder(
        d_model=shape["dim"],
        n_layers=1,
        n_heads=shape["n_heads"],
        n_kv_heads=shape["n_kv_heads"],
        d_ff=shape["ffn"],
        tie_embeddings=False,
    )
    model = choice.build(n_valid=shape["vocab"], seq_len=shape["seq"])
    block = model.layers["0"]
    n_block = sum(p.numel() for p in block.parameters())
    parameters = shape["n_layers"] * n_block + sum(p.numel() for p in model.parameters()) - n_block
    rows = (shape["batch"], shape["seq"])

    def inputs(dtype: torch.dtype) -> tuple[tuple[Tensor, Where], dict[str, Any]]:
        positions = torch.arange(shape["seq"], device=model.head.weight.device).expand(rows)
        where = Where(positions, torch.zeros(rows, dtype=torch.int32, device=positions.device))
        where.tables = choice.position.prepare(positions, choice.width_of_head)
        return (torch.empty(*rows, shape["dim"], dtype=dtype), where), {}

    return block, inputs, Rest(model), parameters
