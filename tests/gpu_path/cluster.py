"""Play ranks of a large cluster, one after another, on a fake card: what each communicates in a step, as JSON lines.

python -m tests.gpu_path.cluster RUN.yaml --world 512 --ranks 0 7 [key=value ...]
"""

import argparse
import json
import warnings
from collections import Counter
from typing import Any
from unittest import mock

from megatrain.audit import fake_cuda

fake_cuda.install()  # before torch

import torch.distributed as dist  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily  # noqa: E402
from torch.distributed.device_mesh import DeviceMesh  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from megatrain.audit.communication import Communication, group_names  # noqa: E402
from megatrain.audit.watch import Watch  # noqa: E402
from megatrain.engine.traffic import StepShape, step_traffic  # noqa: E402
from megatrain.train.config import Run, read_run  # noqa: E402
from tests.gpu_path.step import compiler, trainer_of  # noqa: E402

BFLOAT16 = 2
_from_group = DeviceMesh.from_group


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--world", type=int, default=512)
    parser.add_argument("--ranks", type=int, nargs="+", default=[0])
    parser.add_argument("--vocab", type=int, default=128_256)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    run = read_run(args.run, ["layout.compile=false", *args.overrides]).run
    for rank in args.ranks:
        print(json.dumps(played(run, args.world, rank, args.vocab)), flush=True)


def played(run: Run, world: int, rank: int, vocab: int) -> dict[str, Any]:
    """What `rank` of `world` does in its second step: collectives, in order and summed, and those of the formulas."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    mesh = run.layout.mesh(world).at(rank).connect()
    watch = Watch(late_reads=1)
    fake, card = FakeTensorMode(allow_non_fake_inputs=True), fake_cuda.card(watch.note_wait)
    with fake, card, compiler(run), mock.patch.object(DeviceMesh, "from_group", mesh_of_group):
        trainer = trainer_of(run, vocab, packed=False, mesh=mesh)
        with Watch():  # the first step makes the optimiser's state, and a pipeline's buffers
            trainer.step()
        engine: Any = trainer.engine
        watch.hold(*(piece.values for piece in engine.slices()), *engine.model.parameters(), *engine.model.buffers())
        with Communication(group_names(mesh.groups)) as seen, watch:
            trainer.step()
    shape = StepShape(run.model, vocab, run.data.seq_len, run.layout, mesh, run.train.global_batch, BFLOAT16, "cuda")
    dist.destroy_process_group()
    return {
        "rank": rank,
        "place": mesh.coordinates,
        "counted": summed(seen.calls),
        "formula": {f"{axis} {op}": [t.calls, t.bytes] for (axis, op), t in step_traffic(shape).items()},
        "calls": [list(call) for call in seen.calls],
        "syncs": [str(f) for f in watch.syncs],
        "mixes": [str(f) for f in watch.mixes],
        "peak_bytes": watch.memory.peak,
        "parameters": sum(p.numel() for p in engine.model.parameters()),
    }


def mesh_of_group(*args: Any, **kwargs: Any) -> DeviceMesh:
    """Made of real tensors: it reads the numbers of ranks out of them."""
    with unset_fake_temporarily():
        return _from_group(*args, **kwargs)


def summed(calls: list[tuple[str, str, int]]) -> dict[str, list[int]]:
    """[calls, bytes] by "axis operation"."""
    found: dict[str, Counter[str]] = {}
    for axis, operation, n_bytes in calls:
        found.setdefault(f"{axis} {operation}", Counter()).update(calls=1, bytes=n_bytes)
    return {name: [tally["calls"], tally["bytes"]] for name, tally in found.items()}


if __name__ == "__main__":
    main()
