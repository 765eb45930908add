"""Where two sides of a comparison begin to differ, and which collective feeds that place.

A step is followed as it runs: what flows forward, the loss, gradients from the loss backwards, the norm, the weights.
The first thing that is off is named: what comes before it is right, and what comes after it is off because of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatrain.engine.layout import Layout

Named = Sequence[tuple[str, float]]
"""Names with relative differences."""

ORDER = ("attention_norm", "to_qkv", "q_norm", "k_norm", "to_out", "feed_forward_norm", "gate_up", "up", "down")
"""Parts of a layer as a token meets them."""


LATER = "what only steps after the first do"


@dataclass(frozen=True)
class Difference:
    """Something that is not what one process gives."""

    name: str
    relative: float
    suspect: str
    """The collective that feeds it, and over which axis."""


@dataclass(frozen=True)
class Evidence:
    """Relative differences of everything that both sides wrote down."""

    flow: Named
    """Outputs of the model's parts in the first micro-batch, in forward order."""
    losses: Sequence[float]
    """Of each step."""
    gradients: Named
    """Of the first step, before clipping."""
    norms: Sequence[float]
    """Of each step, before clipping."""
    apart: Sequence[tuple[str, float]]
    """Axes along which ranks have different norms in the first step, and how different."""
    weights: Named
    """After the first step."""
    averages: Named
    """Of the gradients of all steps: the optimiser's first moment after the last one."""


@dataclass(frozen=True)
class Limits:
    """Largest relative differences that count as equal."""

    loss: float = 1e-5
    norm: float = 1e-5
    gradient: float = 1e-4


def first_difference(evidence: Evidence, layout: Layout, limits: Limits) -> Difference | None:
    """The first thing that is off in the order in which a step computes; None if nothing is."""
    for name, share in evidence.flow:
        if not share <= limits.gradient:
            return Difference(f"the output of {name}", share, _feeds_forward(name, layout))
    if not evidence.losses[0] <= limits.loss:
        return Difference("the loss of step 1", evidence.losses[0], _feeds_loss(layout))
    for axis, share in evidence.apart:
        if not share <= limits.norm:
            return Difference(
                "the gradient norm of step 1, different from rank to rank", share, _feeds_norm(axis, layout)
            )
    backward = sorted(evidence.gradients, key=lambda found: position(found[0]), reverse=True)
    off = [name for name, share in backward if not share <= limits.gradient]
    if off:
        share = dict(backward)[off[0]]
        return Difference(f"the gradient of {off[0]}", share, _feeds_gradient(off, backward[0][0], layout))
    if not evidence.norms[0] <= limits.norm:
        axes = [axis for axis in ("tp", "pp", "data") if _sizes(layout)[axis] > 1]
        return Difference("the gradient norm of step 1", evidence.norms[0], f"the sum of squares, axis {_or(axes)}")
    for name, share in evidence.weights:
        if not share <= limits.gradient:
            return Difference(
                f"{name} after step 1", share, "the optimiser's step, or what ranks gather after it, axis data"
            )
    for what, shares, limit in (("loss", evidence.losses, limits.loss), ("norm", evidence.norms, limits.norm)):
        for step, share in enumerate(shares, 1):
            if not share <= limit:
                return Difference(f"the {what} of step {step}", share, LATER)
    for name, share in evidence.averages:
        if not share <= limits.gradient:
            return Difference(f"the gradients of {name} after step 1", share, LATER)
    return None


def position(name: str) -> tuple[float, float]:
    """Where a parameter stands on the way from tokens to loss; a tied embedding at its beginning."""
    words = name.split(".")
    if words[0] == "layers":
        part = next((i for i, p in enumerate(ORDER) if p in words), ORDER.index("feed_forward_norm") + 0.5)
        return float(words[1]), part
    before = {"embedding": 0, "positions": 1}
    return (-1, before[words[0]]) if words[0] in before else (math.inf, 0 if "norm" in words[0] else 1)


# ------------------------------------------------------------------------------------------------ who is suspected


def _or(words: Sequence[str]) -> str:
    return " or ".join(words) or "none: no rank takes part in it but this one"


def _suspects(layout: Layout, *of: tuple[str, str]) -> str:
    """Sentences on collectives, of axes that the layout has."""
    return _or([f"{words}, axis {axis}" for axis, words in of if _sizes(layout)[axis] > 1])


def _sizes(layout: Layout) -> dict[str, int]:
    return {"tp": layout.tp, "cp": layout.cp, "pp": layout.pp, "data": layout.cp * (layout.dp or 1)}


def _feeds_forward(name: str, layout: Layout) -> str:
    if "dropout" in name:
        return "the numbers of a rank's tokens, from which dropout is drawn"
    if name.endswith("attention"):
        return _suspects(
            layout,
            ("cp", f"what ranks of a {layout.cp_kind} send each other"),
            ("tp", "the gathered input of a column-parallel product, or the sum of a row-parallel one's outputs"),
        )
    if "feed_forward" in name and not name.endswith("norm"):
        return _suspects(
            layout,
            ("tp", "the gathered input of a column-parallel product, or the sum of a row-parallel one's outputs"),
        )
    if name == "embedding":
        tokens = ("data", "which tokens a rank is given")
        return _suspects(layout, ("tp", "the sum over the vocabulary's rows"), tokens)
    return _suspects(layout, ("pp", "what stages send each other"), ("data", "which tokens a rank is given"))


def _feeds_norm(axis: str, layout: Layout) -> str:
    """Ranks that hold the same sums of gradients have the same norm, so along data it is those that are not the same;
    unless each counts a part of them."""
    unsummed = axis == "data" and not layout.zero and layout.engine != "fsdp2"
    return f"the sum of {'gradients' if unsummed else 'squares'}, axis {axis}"


def _feeds_loss(layout: Layout) -> str:
    return _suspects(
        layout,
        ("tp", "the largest logit and the sums of the vocabulary-parallel loss"),
        ("data", "the sums of losses and of token counts"),
        ("pp", "the loss that the last stage tells the others"),
    )


def _feeds_gradient(off: list[str], top: str, layout: Layout) -> str:
    """Args: off: names whose gradients are off, from the loss backwards. top: the parameter nearest to the loss."""
    first = off[0]
    if layout.tp > 1 and all(name.endswith(("norm.weight", "bias", "positions.weight")) for name in off):
        return "the sum over ranks of the gradients of copies, axis tp"
    if layout.tp > 1 and all("to_qkv" in name or "k_norm" in name for name in off):
        return "the sum over ranks that hold the same key and value heads, axis tp"
    if off == ["embedding.weight"]:
        return _suspects(
            layout,
            ("pp", "the sum over its copies on the first and the last stage"),
            ("tp", "the gradient that the embedding collects"),
        )
    if first == top:
        return _suspects(
            layout, ("data", "the sum of gradients"), ("tp", "the sum of the loss's input gradients"),
            ("pp", "which stage's gradient is kept"),
        )  # fmt: skip
    parts = first.split(".")
    if "to_qkv" in parts:
        attention = f"gradients that ranks of a {layout.cp_kind} send each other"
        return _suspects(layout, ("cp", attention), ("tp", "the collected input of a column-parallel product"))
    if "to_out" in parts or "down" in parts:
        collected = ("tp", "the gradient that a row-parallel product collects")
        return _suspects(layout, collected, ("pp", "gradients that stages send each other"))
    if "gate_up" in parts or "up" in parts:
        return _suspects(layout, ("tp", "the collected input of a column-parallel product"))
    return _suspects(
        layout,
        ("tp", "the sum of input gradients behind a column-parallel product"),
        ("pp", "gradients that stages send each other"),
        ("data", "the sum of gradients"),
    )
