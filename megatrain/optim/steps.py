"""The torch optimiser that every choice builds: it applies to each parameter group the rule that the group names.

It steps on whatever tensors an engine puts into its groups. What those are of the full parameters (`Held`) it is told
once, by `settle`; from then on it can name its state for checkpoints, whatever the layout.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatrain.optim.rounding import round_stochastically
from megatrain.optim.whole import Held, Whole
from megatrain.parallel.mesh import Axis
from megatrain.parallel.shard import Part, Shard, Slice, slices_of

State = dict[str, Tensor]
"""What a rule keeps for one tensor: `step`, a float32 scalar on its device, and its moments."""


@dataclass(frozen=True)
class Step:
    """What an update knows beside its tensors. Nothing in it was read from the device."""

    lr: float
    weight_decay: float
    divisor: Tensor
    """float32 scalar that gradients are divided by."""
    found_inf: Tensor
    """float32 scalar: 1 where everything must stay as it is, else 0."""

    @property
    def go(self) -> Tensor:
        """1, or 0 where nothing may change. A rate multiplied by it leaves every bit as it is."""
        return 1 - self.found_inf

    def gradient(self, p: Tensor) -> Tensor:
        """float32, of the shape of `p`: divided, and zeros where nothing may change."""
        assert p.grad is not None
        return torch.where(self.found_inf > 0, 0.0, p.grad.float() / self.divisor)


@dataclass(frozen=True)
class Work:
    """One group's share of a step."""

    names: list[str]
    """Parameters of the group on all ranks; this one may hold nothing of some of them."""
    tensors: list[Tensor]
    """float32, to be changed in place; each has its `grad`."""
    states: list[State]
    held: dict[str, tuple[Held, int]]
    """What this rank holds of each name, and in which of the tensors."""
    step: Step
    whole: Whole | None
    vectors: "dict[tuple[str, str], Tensor]"
    """State that all ranks hold alike, by (state, name)."""
    copies: list[Tensor]
    """bf16, one for each of the tensors or none: they take the tensors' values after an update, unless it gave them
    itself and emptied this list."""


class Rule(Protocol):
    """How one kind of optimiser changes its tensors."""

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the tensors it keeps for each of its tensors, of the same shape."""
        ...

    @property
    def sees_whole(self) -> bool:
        """It looks at whole matrices, wherever their parts are."""
        ...

    def start(self, p: Tensor) -> State:
        """The state of `p` before its first step."""
        ...

    def vectors(self, name: str, shape: tuple[int, ...]) -> dict[str, int]:
        """Lengths of the vectors it keeps beside that for a parameter of this full shape, alike on all ranks."""
        ...

    def decoded(self, state: State, what: str) -> Tensor:
        """State `what` as float32 numbers, of the shape of its tensor; the memory itself where it holds just those."""
        ...

    def encode(self, state: State, what: str, values: Tensor) -> None:
        """Take up what `decoded` gave, after it was changed."""
        ...

    def update(self, work: Work) -> None:
        """One step of a group."""
        ...


class Steps(torch.optim.Optimizer):
    """Each group holds `names`, `lr`, `lr_scale`, `weight_decay` and `rule`.

    While `grad_scale` and `found_inf` are set (see `guarded`), a step divides gradients by the first and leaves all as
    it is where the second is 1, without asking the device.
    """

    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(self, groups: list[dict[str, Any]], lr: float):
        super().__init__(groups, {"lr": lr})
        self.held: list[Held] = []
        self.whole: Whole | None = None
        self.vectors: dict[tuple[str, str], Tensor] = {}
        self.copies: Mapping[Tensor, Tensor] = {}
        self.shards: Mapping[str, Shard] = {}
        self.axis = Axis("alone")

    @property
    def rules(self) -> dict[str, Rule]:
        """The rule of each parameter by name."""
        return {name: group["rule"] for group in self.param_groups for name in group["names"]}

    def settle(
        self,
        held: Sequence[Held],
        shards: Mapping[str, Shard],
        axis: Axis,
        copies: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        """Learn what the tensors are of the full parameters, and give each the state it has before its first step.

        Args:
            held: what this rank holds, in each of its tensors.
            shards: of all trained parameters, by name.
            axis: ranks that hold parts or copies of these parameters. All of them call this together.
            copies: what computes with the values of the tensors, in bf16, by tensor: a step changes both.
        """
        rules = self.rules
        self.held, self.axis, self.copies = [h for h in held if h.numel], axis, copies or {}
        self.shards = {name: shard for name, shard in shards.items() if name in rules}
        if any(rule.sees_whole for rule in rules.values()):
            self.whole = Whole(self.held, self.shards, axis)
        for h in held:
            if not self.state[h.tensor]:
                self.state[h.tensor] = rules[h.name].start(h.tensor)
        device = held[0].tensor.device if held else None
        for name, shard in self.shards.items():
            for what, length in rules[name].vectors(name, shard.full_shape).items():
                self.vectors[what, name] = torch.zeros(length, device=device)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        held_in = self._held_in()
        for group in self.param_groups:
            tensors = [p for p in group["params"] if p.grad is not None]
            if not tensors:
                continue  # ZeRO-3 lends the optimiser one group after the other
            rule: Rule = group["rule"]
            for p in tensors:
                if not self.state[p]:
                    self.state[p] = rule.start(p)
            held = {h.name: (h, i) for i, p in enumerate(tensors) for h in held_in.get(id(p), ())}
            exact = [_exact(p) for p in tensors]
            states = [self.state[p] for p in tensors]
            step = self._facts(group, tensors[0].device)
            copies = [self.copies[p] for p in tensors] if self.copies else []
            work = Work(group["names"], exact, states, held, step, self.whole, self.vectors, copies)
            rule.update(work)
            if work.copies:
                torch._foreach_copy_(work.copies, tensors)
            for p, wide, state in zip(tensors, exact, states, strict=True):
                if wide is not p:
                    p.copy_(round_stochastically(wide, p, state["step"], held_in[id(p)]))

    def _facts(self, group: dict[str, Any], device: torch.device) -> Step:
        divisor, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        return Step(
            group["lr"],
            group["weight_decay"],
            torch.ones((), device=device) if divisor is None else divisor,
            torch.zeros((), device=device) if found is None else found,
        )

    def publish(self) -> None:
        """Give the copies the values of their tensors, which something other than a step has changed."""
        if self.copies:
            torch._foreach_copy_(list(self.copies.values()), list(self.copies))

    # --------------------------------------------------------------------------------- its state

    def slices(self) -> Iterator[Slice]:
        """Every tensor it keeps, as slices of full named tensors."""
        for rule, tensor, held in self._by_tensor():
            for what in rule.states:
                yield from _slices(what, held, rule.decoded(self.state[tensor], what))
        yield from self._vector_slices()

    @torch.no_grad()
    def load(self, fill: Callable[[Slice], None], states: Callable[[str], bool]) -> None:
        """Fill the wanted states through `fill(slice)`."""
        for rule, tensor, held in self._by_tensor():
            for what in rule.states:
                if states(what):
                    values = rule.decoded(self.state[tensor], what)
                    for piece in _slices(what, held, values):
                        fill(piece)
                    rule.encode(self.state[tensor], what, values)
        for piece in self._vector_slices():
            if states(piece.state):
                fill(piece)

    def _by_tensor(self) -> Iterator[tuple[Rule, Tensor, list[Held]]]:
        rules = self.rules
        for held in self._held_in().values():
            yield rules[held[0].name], held[0].tensor, held

    def _held_in(self) -> dict[int, list[Held]]:
        """What each tensor holds, by its id."""
        found: dict[int, list[Held]] = {}
        for h in self.held:
            found.setdefault(id(h.tensor), []).append(h)
        return found

    def _vector_slices(self) -> Iterator[Slice]:
        for (what, name), vector in self.vectors.items():
            n, of = vector.numel(), self.shards[name]
            saved = self.axis.rank == 0 and any(part.counted for part in of.parts)  # not by both ends of a pipeline
            shard = Shard((n,), of.init, parts=(Part(0, n, counted=saved),))
            yield from slices_of(what, name, shard, vector)


def _exact(p: Tensor) -> Tensor:
    """`p` itself, or float32 numbers of it that carry its gradient where it is kept in fewer digits."""
    if p.dtype == torch.float32:
        return p
    wide = p.detach().float()
    wide.grad = None if p.grad is None else p.grad.float()
    return wide


def _slices(what: str, held: list[Held], values: Tensor) -> Iterator[Slice]:
    for h in held:
        for piece in slices_of(what, h.name, h.shard, h.of(values), h.start):
            yield dataclasses.replace(piece, counted=piece.counted and h.counted)


def load(
    weights: Iterator[Slice], optimizer: Steps, fill: Callable[[Slice], None], states: Callable[[str], bool]
) -> None:
    """Fill the wanted ones of an engine's weights and of its optimiser's states through `fill(slice)`."""
    if states("weights"):
        for piece in weights:
            fill(piece)
        optimizer.publish()
    optimizer.load(fill, states)
