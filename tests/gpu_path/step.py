"""Train a run file's model for three steps on a fake card and print what was seen, as JSON. A process of its own.

python -m tests.gpu_path.step configs/run/llama-124m.yaml [key=value ...] [--plant NAME]
"""

import argparse
import contextlib
import json
import warnings
from collections.abc import Iterator
from typing import Any

from megatrain.audit import fake_cuda

fake_cuda.install()  # before torch

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode, mm_flop  # noqa: E402

from megatrain.audit.compiled import without_kernels  # noqa: E402
from megatrain.audit.generated import code_for  # noqa: E402
from megatrain.audit.watch import Watch  # noqa: E402
from megatrain.base.device import Device  # noqa: E402
from megatrain.data.manifest import TokenizerEntry  # noqa: E402
from megatrain.nn.batch import Batch  # noqa: E402
from megatrain.parallel.mesh import Mesh  # noqa: E402
from megatrain.train.build import build_engine  # noqa: E402
from megatrain.train.config import Run, read_run  # noqa: E402
from megatrain.train.stop import StopRequest, StopVote  # noqa: E402
from megatrain.train.trainer import State, Trainer  # noqa: E402
from tests.gpu_path.plants import PLANTS  # noqa: E402

PLACES = 8
"""Documents in a row that is packed."""
STEPS = 3
"""The first makes the optimiser's state; the second is watched for waits, memory and cost; the third for FLOPs."""


class NoFigures:
    """Throughput of a step that took no time."""

    def figures(self, tokens: int, seconds: float) -> dict[str, Any]:
        return {}


class Feed:
    """Endless batches in pinned memory, packed with documents or one document a row."""

    def __init__(self, rows: int, seq_len: int, vocab: int, packed: bool):
        self.shape, self.vocab, self.packed = (rows, seq_len), vocab, packed

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        def row(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(self.shape, dtype=dtype).pin_memory()

        whole = row(torch.int64)
        return Batch(
            whole, whole, row(torch.float32), whole, row(torch.int32), most_documents=PLACES if self.packed else 1
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--plants", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    run = read_run(args.run, ["layout.compile=false", *args.overrides]).run
    for plant in PLANTS if args.plants else (None,):
        print(json.dumps({"plant": plant} | watched(run, args.vocab, args.packed, plant)))


def watched(run: Run, vocab: int, packed: bool, plant: str | None = None) -> dict[str, Any]:
    """Costs and findings of the second step of `run` on one card."""
    watch = Watch(late_reads=1)  # of the numbers of the step before
    rows, raised = run.train.global_batch, None
    with FakeTensorMode(allow_non_fake_inputs=True), fake_cuda.card(watch.note_wait), compiler(run):
        trainer = trainer_of(run, vocab, packed)
        engine: Any = trainer.engine
        with Watch():
            trainer.step()
        watch.hold(*(piece.values for piece in engine.slices()), *engine.model.parameters(), *engine.model.buffers())
        static = watch.memory.live
        try:
            with watch:
                trainer.step() if plant is None else PLANTS[plant](trainer)
        except (RuntimeError, NotImplementedError) as error:
            raised = type(error).__name__
        counted = {} if plant else flops_of(trainer)
    formula = run.model.flops_per_token(vocab, run.data.seq_len)
    return {
        "places": PLACES if packed else 1,
        "syncs": [str(f) for f in watch.syncs],
        "mixes": [str(f) for f in watch.mixes],
        "raised": raised,
        "products": dict(watch.costs.products),
        "launches": watch.costs.launches,
        "bytes_moved": watch.costs.bytes_moved,
        "static_bytes": static,
        "peak_bytes": watch.memory.peak,
        "reserved_bytes": watch.memory.reserved,
        "counted_flops": counted,
        "formula_flops": {
            "causal": formula.causal * rows * run.data.seq_len,
            "palm": formula.palm * rows * run.data.seq_len,
        },
        "operators": dict(watch.costs.operators.most_common()),
    }


@contextlib.contextmanager
def compiler(run: Run) -> Iterator[None]:
    """Where blocks are compiled, let Inductor's code for the card run without its kernels."""
    if not run.layout.compile:
        yield
        return
    with code_for(), without_kernels():
        yield


def trainer_of(run: Run, vocab: int, packed: bool, mesh: Mesh | None = None) -> Trainer:
    """The run's own loop around its own engine on a fake card, fed with batches without values."""
    mesh = mesh or Mesh.of().at(0)
    rows = run.train.global_batch // mesh.axis("dp").size
    engine = build_engine(run, TokenizerEntry("none", vocab, 0), mesh, Device("cuda"))
    return Trainer(
        state=State(),
        feed=Feed(rows, run.data.seq_len, vocab, packed),
        engine=engine,
        schedule=lambda step: 1e-3 / step,
        total_steps=STEPS,
        global_batch=run.train.global_batch,
        max_skips=STEPS,
        throughput=NoFigures(),
        vote=StopVote(StopRequest(), mesh.axis("world")),
    )


def addmm_flop(total: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    """Of `total + a b`; torch's own formula does not know the form that writes another format than it reads."""
    return mm_flop(a, b)


def flops_of(trainer: Trainer) -> dict[str, int]:
    """FLOPs of one more step by operator. Apart from the watched step, since the counter keeps tensors alive."""
    _FlopCounterMode.ignore_compile_internals = classmethod(lambda cls: True)  # or compiled code would not run as such
    with Watch(), FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm: addmm_flop}) as counter:
        trainer.step()
    return {str(op).removeprefix("aten."): n for op, n in counter.get_flop_counts()["Global"].items()}


if __name__ == "__main__":
    main()
