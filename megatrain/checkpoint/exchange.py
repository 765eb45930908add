"""JSON between the ranks of a run, over a process group of its own, so that a thread may use it while others train."""

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatrain.base.errors import CheckpointError, FailedCheckpointError
from megatrain.parallel.mesh import Axis


class Exchange:
    """Small JSON values between all ranks of `world`. Making one is collective: every rank does it together."""

    def __init__(self, world: Axis):
        self.rank, self.size, self._ranks = world.rank, world.size, world.ranks
        self._group = dist.new_group(list(world.ranks), backend="gloo") if world.size > 1 else None

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks in rank order, on rank 0; an empty list elsewhere."""
        if self._group is None:
            return [value]
        data = _encode(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([data.numel()]), group=self._group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: data.numel()] = data
        rows = [torch.empty_like(padded) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(padded, rows, dst=self._ranks[0], group=self._group)
        return [_decode(row[: int(size)]) for row, size in zip(rows, sizes, strict=True)] if rows else []

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self._group is None:
            return value
        data = _encode(value) if self.rank == 0 else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([data.numel()])
        dist.broadcast(size, src=self._ranks[0], group=self._group)
        if self.rank != 0:
            data = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, src=self._ranks[0], group=self._group)
        return _decode(data)

    def all(self, value: Any) -> list[Any]:
        """The values of all ranks in rank order, on every rank."""
        return self.broadcast(self.gather(value))

    def on_rank_0(self, do: Callable[[], Any]) -> Any:
        """What `do` returns on rank 0, or the CheckpointError that it raises there, on every rank."""
        answer: dict[str, Any] = {}
        if self.rank == 0:
            try:
                answer = {"value": do()}
            except CheckpointError as error:
                answer = error_as_json(error)
            except Exception as error:
                self.broadcast(error_as_json(FailedCheckpointError(f"rank 0 failed: {error!r}")))
                raise
        answer = self.broadcast(answer)
        if "problem" in answer:
            raise error_of(answer)
        return answer["value"]

    def close(self) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None


def _encode(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(data: torch.Tensor) -> Any:
    return json.loads(data.numpy().tobytes())


def error_as_json(error: CheckpointError) -> dict[str, Any]:
    """An error, for the other ranks."""
    return {"problem": str(error), "failed": isinstance(error, FailedCheckpointError)}


def error_of(told: dict[str, Any]) -> CheckpointError:
    return (FailedCheckpointError if told["failed"] else CheckpointError)(told["problem"])
