"""What flows forward through a model in its first micro-batch, part by part, to be compared with another layout's.

Gradients say what is wrong behind a mistake, which is everything. What flows forward says where a mistake begins: the
parts before it give the same numbers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megatrain.parallel.mesh import Mesh

COLUMNS = "columns"
FILES = "flow-*.safetensors"


class Flow:
    """Records the first output [b, t, d] of each part of `model`: of its first row, this rank's tokens.

    Only ranks with the first rows of the global batch record. Use it as a context around the step.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, columns: tuple[tuple[int, int], ...]):
        self.tp, self.first_rows = mesh.axis("tp"), mesh.axis("dp").rank == 0
        self.columns = torch.cat([torch.arange(start, stop) for start, stop in columns])
        self.parts = list(parts_of(model))
        self.seen: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        self.hooks = [part.register_forward_hook(self._hook(name)) for name, part in self.parts]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def _hook(self, name: str) -> Any:
        def record(part: nn.Module, given: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.ndim == 3 and name not in self.seen:
                self.seen[name] = out[0].detach().float().clone()

        return record

    def save(self, folder: Path, rank: int) -> list[str]:
        """Write what was recorded and return the names in the order of the forward pass."""
        if not (self.first_rows and self.seen):
            return []
        n = next(iter(self.seen.values())).shape[0]
        cut = len(self.columns) // n  # 1, or the size of tp where activations are cut over it
        columns = self.columns.chunk(cut)[self.tp.rank if cut > 1 else 0]
        save_file(self.seen | {COLUMNS: columns.contiguous()}, folder / FILES.replace("*", str(rank)))
        return list(self.seen)


def parts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Parts of a model by name: what stands beside its stacks of blocks, the blocks, and what each block is made of.

    Not the insides of a block that is compiled or recomputed as a whole: a hook there would be part of the graph.
    """
    for name, part in model.named_children():
        if not isinstance(part, nn.ModuleDict):
            yield name, part
            continue
        for key, block in part.items():
            if "forward" not in vars(block):
                yield from ((f"{name}.{key}.{inner}", module) for inner, module in block.named_children())
            yield f"{name}.{key}", block


def flow_differences(one: Path, many: Path, names: list[str]) -> Iterator[tuple[str, float]]:
    """Largest difference of each part's output between the sides, as a share of its largest value, in forward order."""
    [whole] = (safe_open(path, "pt") for path in one.glob(FILES))
    others = [safe_open(path, "pt") for path in sorted(many.glob(FILES))]
    for name in names:
        exact, worst = whole.get_tensor(name), 0.0
        for other in others:
            if name in other.keys():  # noqa: SIM118 (it is no mapping)
                difference = (other.get_tensor(name) - exact[other.get_tensor(COLUMNS)]).abs().max()
                share = float(difference / exact.abs().max().clamp(min=1e-30))
                worst = max(worst, share if share == share else float("inf"))
        yield name, worst
