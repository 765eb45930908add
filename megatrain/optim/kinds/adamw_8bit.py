"""AdamW whose moments are kept in 8 bits."""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from megatrain.base.optional import torchao
from megatrain.optim.kinds.adamw import AdamW
from megatrain.optim.optimizer import OPTIMIZER
from megatrain.optim.steps import State, Work

BLOCK = 256
"""Elements that share a scale."""

SMALLEST = 4096
"""Tensors of fewer elements keep float32 moments: they are few, and norm gains among them are sensitive."""


@OPTIMIZER.register("adamw_8bit")
@dataclass(frozen=True, kw_only=True)
class AdamW8bit(AdamW):
    """AdamW with block-wise quantised moments, by torchao's kernels: two bytes a parameter instead of eight.

    A step works on float32 moments, of which only the 8-bit ones are kept. Blocks lie in what a rank holds, so layouts
    differ in the last digits of 8 bits. Checkpoints hold float32 values, which AdamW can go on from and the other way
    round; taken up again by the same layout, they give back every bit.

    Paper: Dettmers et al. 2021, arXiv:2110.02861, section 2.
    """

    def problems(self) -> list[str]:
        found = super().problems()
        if not (ao := torchao("optim.quant_utils")):
            found.append(f"kind=adamw_8bit needs torchao ({ao.why_not}): install megatrain[precision], or use adamw")
        return found

    @property
    def moments(self) -> str:
        return f"8 bits (fp32 below {SMALLEST} elements)"

    def start(self, p: Tensor) -> State:
        state = super().start(p)
        if p.numel() >= SMALLEST:
            for what in self.states:
                values = state.pop(what)
                state |= {
                    what: torch.empty_like(values, dtype=torch.uint8),
                    _scales(what): _blocks(values)[:, 0].clone(),
                }
                self.encode(state, what, values)
        return state

    def decoded(self, state: State, what: str) -> Tensor:
        if state[what].dtype != torch.uint8:
            return state[what]
        return _dequantised(state, what, _table(what, state[what].device, whole=True))

    def encode(self, state: State, what: str, values: Tensor) -> None:
        codes = state[what]
        if codes.dtype != torch.uint8:
            return
        ao = torchao("optim.quant_utils")
        scaled, scales = ao.scale_tensor(_blocks(values), BLOCK)
        state[_scales(what)].copy_(scales)
        found = ao.quantize_8bit_with_qmap(scaled, _table(what, codes.device))
        codes.copy_(found.view(-1)[: codes.numel()].view_as(codes))

    def update(self, work: Work) -> None:
        step, (b1, b2), go = work.step, self.betas, work.step.go
        for p, state in zip(work.tensors, work.states, strict=True):
            gradient = step.gradient(p)
            m, v = (self._moment(state, what) for what in self.states)
            m, v = m.lerp(gradient, (1 - b1) * go), v.lerp(gradient.square(), (1 - b2) * go)
            state["step"] += go
            count = state["step"].clamp(min=1)
            p.sub_(p * (step.lr * step.weight_decay * go))
            root = (v.sqrt() / (1 - b2**count).sqrt()).add_(self.eps)
            p.sub_((m / (1 - b1**count)).mul_(step.lr * go).div_(root))
            self._keep(state, {"exp_avg": m, "exp_avg_sq": v}, step.found_inf)

    def _moment(self, state: State, what: str) -> Tensor:
        if state[what].dtype != torch.uint8:
            return state[what]
        return _dequantised(state, what, _table(what, state[what].device))

    def _keep(self, state: State, moments: dict[str, Tensor], found_inf: Tensor) -> None:
        """Store the moments, or leave the old codes where nothing may change: to encode once more could move them."""
        for what, values in moments.items():
            if state[what].dtype != torch.uint8:
                state[what].copy_(values)
                continue
            before = {key: state[key].clone() for key in (what, _scales(what))}
            self.encode(state, what, values)
            for key, old in before.items():
                state[key].copy_(torch.where(found_inf > 0, old, state[key]))


def _scales(what: str) -> str:
    return f"{what}_scales"


def _blocks(values: Tensor) -> Tensor:
    """[n] -> [blocks, BLOCK], the last one filled up with zeros."""
    flat = values.reshape(-1)
    return F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def _dequantised(state: State, what: str, table: Tensor) -> Tensor:
    codes = state[what]
    values = table[_blocks(codes).int()] * state[_scales(what)][:, None]
    return values.view(-1)[: codes.numel()].view_as(codes)


@cache
def _table(what: str, device: torch.device, *, whole: bool = False) -> Tensor:
    """float32 [256]: the number that each code stands for; exp_avg has a sign.

    The lowest signed code stands for a little more than -1. With `whole` it stands for -1, which is what was rounded to
    it wherever it sets a block's scale: so values written to a checkpoint have exactly the block's scale as their
    largest, and give the same scale and codes when they are encoded again.
    """
    table = torch.tensor(torchao("optim.quant_utils").create_dynamic_map(signed=what == "exp_avg"))
    if whole and what == "exp_avg":
        table[0] = -1.0
    return table.to(device)
