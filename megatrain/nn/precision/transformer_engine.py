"""Products in FP8 by NVIDIA's Transformer Engine (2.9 or newer), whose linear layer is lent our weights.

The layer keeps nothing between calls: scales are those of the operands as they come, and its own weight has no memory.
It rounds what a rank holds by a scale of that rank, where our tensorwise recipe agrees on one over the tensor-parallel
ranks, so a layout changes the last digits. Rows and weights travel as without eight bits.
"""

from typing import Any

from torch import Tensor
from torch.func import functional_call

from megatrain.base.optional import optional
from megatrain.nn.precision.quantised import Quantised
from megatrain.parallel.product import product_format
from megatrain.parallel.tensor import TensorParallel

BACKEND = "transformer_engine"
RECIPES = {"tensorwise": "Float8CurrentScaling", "mx": "MXFP8BlockScaling"}
"""What it calls the kinds that it has."""
ROWS = 32
"""It multiplies a multiple of so many rows: blocks of 32 share a scale in the product of a weight gradient."""


def choice_problems(kind: str, weight_gradient: str) -> list[str]:
    """What a run file asks of it that it cannot do."""
    found = []
    if kind not in RECIPES:
        found.append(f"Transformer Engine has no {kind} scales: set kind to {' or '.join(RECIPES)}, or backend=torch")
    if weight_gradient != "low":
        found.append("Transformer Engine makes weight gradients in FP8: set weight_gradient=low, or backend=torch")
    return found


def why_not(capability: tuple[int, int] | None) -> str:
    """Why it cannot be used here; empty where it can."""
    backend = f"precision.fp8.backend={BACKEND}"
    if capability is None:
        return f"{backend} needs an NVIDIA GPU, and this is a CPU: set backend=torch, which emulates FP8 here"
    found = optional("transformer_engine.pytorch")
    if not found:
        return f"{backend} is not usable here ({found.why_not}): install transformer_engine, or set backend=torch"
    if not hasattr(found.module, "autocast"):
        return f"{backend} is older than 2.9 here: install a newer one, or set backend=torch"
    return ""


def shape_problems(tokens: int) -> list[str]:
    """Why rows of which a rank has so many `tokens` cannot be multiplied; the guard looks at a single one."""
    if tokens % ROWS == 0:
        return []
    return [
        f"precision.fp8.backend={BACKEND} multiplies a multiple of {ROWS} tokens at once, and a row of data.seq_len "
        f"tokens over layout.cp ranks makes {tokens}: change one of them, or set backend=torch"
    ]


class TransformerEngine(Quantised):
    """A linear's product by Transformer Engine; `recipe` is the `Fp8` that asks for it, by which losses are counted."""

    _layer: Any = None

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        engine = optional("transformer_engine.pytorch")
        if self._layer is None:
            rows, columns = weight.shape
            self._layer = engine.Linear(columns, rows, bias=False, params_dtype=weight.dtype, device="meta")
        with engine.autocast(enabled=True, recipe=_recipe(self.recipe)):
            y: Tensor = functional_call(self._layer, {"weight": weight}, (x.to(product_format(x)),))
        return y if bias is None else y + bias.to(y.dtype)

    def multiply_collected(self, x: Tensor, weight: Tensor, tp: TensorParallel) -> Tensor:
        return self.multiply(tp.enter(x), weight, None)


def _recipe(fp8: Any) -> Any:
    recipes = optional("transformer_engine.common.recipe")
    formats = recipes.Format.HYBRID if str(fp8.format("gradient")).endswith("e5m2") else recipes.Format.E4M3
    return getattr(recipes, RECIPES[fp8.kind])(fp8_format=formats)
