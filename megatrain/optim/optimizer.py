"""What an optimiser is to the engines, and how parameters are sorted into groups with settings of their own."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from megatrain.base.registry import Registry
from megatrain.optim.steps import State, Steps, Work


@dataclass(frozen=True, kw_only=True)
class Group:
    """Settings for the parameters whose full name matches a pattern; the first group that matches wins."""

    match: str
    """A shell pattern over the full name: `*.norm.*`, `embedding.weight`."""
    weight_decay: float | None = None
    """None: as without the group, which is the optimiser's, and 0 for vectors."""
    lr_scale: float = 1.0
    """Factor on the learning rate."""

    def problems(self) -> list[str]:
        found = []
        if not self.match:
            found.append("match is empty: give a pattern of parameter names, for example *.norm.*")
        if self.weight_decay is not None and self.weight_decay < 0:
            found.append(f"weight_decay={self.weight_decay} must be at least 0")
        if self.lr_scale < 0:
            found.append(f"lr_scale={self.lr_scale} must be at least 0")
        return found

    def matches(self, name: str) -> bool:
        return fnmatchcase(name, self.match)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What all choices of the run file's `optimizer` section share; each is registered in `OPTIMIZER`.

    A choice is also the rule (`steps.Rule`) by which its parameters change: it says what it keeps for each tensor and
    makes a step of a group. One that works element by element inherits all but `states` and `update`.
    """

    lr: float
    """Peak learning rate; a schedule scales it."""
    weight_decay: float = 0.1
    clip: float | None = 1.0
    """Largest 2-norm of the whole gradient; null leaves it as it is."""
    groups: tuple[Group, ...] = ()
    """Settings of parameters by name; the first that matches wins."""

    def problems(self) -> list[str]:
        found = [
            f"{name}={getattr(self, name)} must be at least 0"
            for name in ("lr", "weight_decay")
            if getattr(self, name) < 0
        ]
        if self.clip is not None and self.clip <= 0:
            found.append(f"clip={self.clip} must be above 0; write null to leave gradients as they are")
        return found

    def build(self, named: Mapping[str, Tensor]) -> Steps:
        """A torch optimiser over these parameters, by full name."""
        return Steps(self.sorted(named), self.lr)

    def sorted(self, named: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """`named` as torch's parameter groups, each with its rule."""
        return [group | {"rule": self} for group in parameter_groups(named, self.weight_decay, self.groups)]

    def unmatched(self, named: Mapping[str, Tensor]) -> list[str]:
        """A sentence for each group without effect on these parameters of a whole model."""
        return unmatched(self.groups, named)

    # --------------------------------------------------------------------------------- a rule, element by element

    @property
    def states(self) -> tuple[str, ...]:
        raise NotImplementedError

    @property
    def moments(self) -> str:
        """Their number format, for people."""
        return "fp32"

    @property
    def sees_whole(self) -> bool:
        return False

    def start(self, p: Tensor) -> State:
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        return {"step": step} | {s: torch.zeros_like(p.data, dtype=torch.float32) for s in self.states}

    def vectors(self, name: str, shape: tuple[int, ...]) -> dict[str, int]:
        return {}

    def decoded(self, state: State, what: str) -> Tensor:
        return state[what]

    def encode(self, state: State, what: str, values: Tensor) -> None:
        pass  # `decoded` gave the memory itself

    def update(self, work: Work) -> None:
        raise NotImplementedError


def beta_problems(betas: tuple[float, ...]) -> list[str]:
    if all(0 <= beta < 1 for beta in betas):
        return []
    return [f"betas={list(betas)} must each be at least 0 and below 1"]


def parameter_groups(named: Mapping[str, Tensor], weight_decay: float, groups: Iterable[Group]) -> list[dict[str, Any]]:
    """Parameters sorted into torch's parameter groups, one for each pair of settings, in order of appearance.

    Parameters with one dimension or none (norm gains, biases) are not decayed unless a group says so: decay would pull
    a gain to 0 and not to the 1 where it starts.
    """
    found: dict[tuple[float, float], dict[str, Any]] = {}
    for name, tensor in named.items():
        group = next((g for g in groups if g.matches(name)), Group(match="*"))
        decay = group.weight_decay
        if decay is None:
            decay = weight_decay if tensor.ndim > 1 else 0.0
        settings = {"weight_decay": decay, "lr_scale": group.lr_scale}
        into = found.setdefault((decay, group.lr_scale), {"params": [], "names": [], **settings})
        into["params"].append(tensor)
        into["names"].append(name)
    return list(found.values())


def unmatched(groups: Iterable[Group], names: Iterable[str]) -> list[str]:
    """A sentence for each group that no parameter goes into, which is most likely a mistake in its pattern."""
    names, taken, found = list(names), set[str](), []
    for i, group in enumerate(groups):
        matched = {name for name in names if group.matches(name)}
        if not matched:
            found.append(
                f"optimizer.groups.{i}.match is {group.match!r}, which is the name of no parameter: names are like "
                f"{', '.join(names[:3])}"
            )
        elif matched <= taken:
            found.append(
                f"optimizer.groups.{i}.match is {group.match!r}, and groups before it take all of that: put it first"
            )
        taken |= matched
    return found


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step, scaled for each group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


@contextlib.contextmanager
def guarded(optimizer: torch.optim.Optimizer, divisor: Tensor, found_inf: Tensor) -> Iterator[None]:
    """Within, `optimizer.step()` works on gradients divided by `divisor`, and does nothing where `found_inf` is 1.

    Args:
        divisor: float32 scalar on the parameters' device.
        found_inf: float32 scalar on the parameters' device, 0 or 1.
    """
    optimizer.grad_scale, optimizer.found_inf = divisor, found_inf  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]


def step_count(optimizer: torch.optim.Optimizer) -> int:
    """Steps taken so far, as the optimiser counts them; skipped ones are not among them. Waits for the device."""
    counts = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    return max(counts, default=0)


def set_step_count(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Continue counting from `steps`."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(steps)


OPTIMIZER: Registry[Any] = Registry("optimizer", "megatrain.optim.kinds")
