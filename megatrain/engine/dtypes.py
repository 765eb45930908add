"""Every number format of a run in one table, printed when it starts and kept with it."""

from typing import Any

from megatrain.engine.api import Precision


def dtype_table(precision: Precision, *, engine: str, zero: int, moments: str, experts: bool = False) -> dict[str, str]:
    """What is kept, summed, sent and multiplied in which format.

    Args:
        moments: the optimiser's format of its moments (`Optimizer.moments`).
        experts: the model has a router.
    """
    compute, kept = precision.compute, precision.parameters
    gathered = engine == "fsdp2" or zero == 3
    masters = "fp32" if precision.masters else "none: rounded stochastically" if kept == "bf16" else "the parameters"
    table = {
        "parameters": "fp32 shards, gathered in bf16" if engine == "fsdp2" and kept == "bf16" else kept,
        "masters": masters,
        "products": compute,
        "residual stream": kept,
        "norms": "fp32 inside",
        "attention scores and softmax": "fp32 inside",
        "logits and loss": "fp32",
        "gradients summed in": "fp32",
        "gradients sent in": "fp32",
        "moments": moments,
    }
    if gathered:
        table["parameters sent in"] = kept
    if experts:
        table["router"] = "fp32"
    if precision.eight_bits is not None:
        table |= _eight_bits(precision.eight_bits)
        if engine == "fsdp2" and precision.eight_bits.one_scale:
            table["parameters sent in"] = f"{kept}, those of fp8 layers in e4m3"
    return table


def _eight_bits(low: Any) -> dict[str, str]:
    what = "fp8" if hasattr(low, "gradient") else "int8"
    form, gradient, by = "int8", "int8", ""
    if what == "fp8":
        form, by = f"e4m3 ({low.kind})", "" if low.backend == "torch" else ", by Transformer Engine"
        gradient = str(low.format("gradient")).removeprefix("torch.float8_").removesuffix("fn")
    names = f"{form} in layers like {low.layers} of {low.min_size:,} weights and more{by}"
    names += f", but the first {low.keep_first} and last {low.keep_last} blocks"
    weight = gradient if low.weight_gradient == "low" else "bf16"
    return {f"{what} products": names, f"{what} gradients": f"{gradient}, of weights in {weight}"}


def lines(table: dict[str, str]) -> list[str]:
    """The table as lines for people."""
    width = max(map(len, table))
    return [f"{name:{width}}  {value}" for name, value in table.items()]
