"""The dtype table is true: what flows through a step of each shipped run is read operator by operator and compared."""

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import megatrain
from megatrain.engine.dtypes import dtype_table, lines
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.product import CPU_MULTIPLIES_BF16
from megatrain.parallel.shard import initialise
from megatrain.train.config import read_run
from tests.engine.toy import SEQ_LEN, VOCABULARY, connected, rows_of, toy_batch, toy_engine
from tests.ranks import run

CONFIGS = Path(megatrain.__file__).parents[1] / "configs/run"
BENCH = CONFIGS.with_name("bench")
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}
PRODUCTS = ("mm", "addmm", "bmm", "addmm_")
LARGE = 8
"""Elements from which a collective carries gradients and no figures of the step."""


class Formats(TorchDispatchMode):
    """Which formats each operator met."""

    def __init__(self) -> None:
        super().__init__()
        self.products: set[str] = set()
        self.sent: set[str] = set()
        self.exponentials: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in PRODUCTS:
            matrices = [a for a in args if isinstance(a, Tensor)][-2:]
            self.products |= {_carried(m) for m in matrices}
        if name in ("exp", "exp_", "_log_softmax", "log"):
            self.exponentials.add(NAMES[args[0].dtype])
        if "c10d" in func.namespace and ("reduce" in name):
            tensors = [t for a in args for t in (a if isinstance(a, list | tuple) else [a]) if isinstance(t, Tensor)]
            self.sent |= {NAMES[t.dtype] for t in tensors if t.numel() >= LARGE and t.is_floating_point()}
        return func(*args, **(kwargs or {}))


def _carried(m: Tensor) -> str:
    """The format of an operand; a CPU without bf16 products gets bf16 numbers as float32."""
    if m.dtype == torch.float32 and not CPU_MULTIPLIES_BF16 and torch.equal(m, m.bfloat16().float()):
        return "bf16"
    return NAMES[m.dtype]


def flow(path: str, overrides: list[str], kind: str, zero: int) -> dict[str, set[str]]:
    """The formats of one step of a run's precision and optimiser under an engine, on a small model."""
    precision, optimizer, model = _parts(path, overrides)
    mesh: Mesh = connected()
    built = model.build(n_valid=VOCABULARY, seq_len=SEQ_LEN)
    initialise(built, seed=0)
    facts = {f.name: getattr(precision, f.name) for f in dataclasses.fields(precision)}
    engine: Any = toy_engine(kind, zero, mesh, model=built, micro_batch=2, optimizer=optimizer, **facts)
    found: dict[str, set[str]] = defaultdict(set)
    block = next(iter(built.layers.values()))
    block.register_forward_hook(lambda m, i, out: found["residual stream"].add(NAMES[out.dtype]))
    watched = Formats()
    with watched:
        engine.step(rows_of(toy_batch(0, 4), mesh), 1e-3)
    found["products"], found["gradients sent in"], found["logits and loss"] = (
        watched.products, watched.sent, watched.exponentials
    )  # fmt: skip
    for piece in engine.slices():
        found["masters" if piece.state == "weights" else "moments"].add(NAMES[piece.values.dtype])
    if kind == "plain":
        found["parameters"] = {NAMES[p.dtype] for p in built.parameters()}
        found["gradients summed in"] = {NAMES[p.grad_dtype] for p in built.parameters()}
    engine.close()
    return dict(found)


def _parts(path: str, overrides: list[str]) -> tuple[Any, Any, Any]:
    chosen = read_run(path, [*overrides, "log.dir=/tmp"]).run
    heads = min(4, chosen.model.n_heads)
    model = dataclasses.replace(
        chosen.model, d_model=16, n_layers=2, n_heads=heads, n_kv_heads=heads, d_ff=32, head_dim=None, vocab_size=None
    )
    return chosen.precision, chosen.optimizer, model


EACH = [
    *((path.name, (), kind, zero) for path in sorted(CONFIGS.glob("*.yaml")) for kind, zero in (("plain", 0),)),
    ("tiny.yaml", ("precision.compute=bf16",), "plain", 0),
    ("llama-124m.yaml", (), "deepspeed", 1),
    ("llama-124m.yaml", (), "fsdp2", 2),
    ("llama-124m.yaml", ("precision.stochastic_rounding=true",), "plain", 0),
    ("../bench/gpu-1b.yaml", (), "plain", 0),
]


def test_runs_that_measure_cards_have_one_set_of_formats():
    first, *others = ((run.precision, run.optimizer) for run in map(shipped, sorted(BENCH.glob("gpu-*.yaml"))))
    assert others == [first, first]


def shipped(path: Path) -> Any:
    return read_run(path, ["log.dir=/tmp"]).run


@pytest.mark.parametrize(("name", "overrides", "kind", "zero"), EACH, ids=str)
def test_what_flows_is_what_the_table_says(name, overrides, kind, zero):
    path = str(CONFIGS / name)
    precision, optimizer, _ = _parts(path, list(overrides))
    table = dtype_table(precision, engine=kind, zero=zero, moments=optimizer.moments)
    found = run(flow, 2, path, list(overrides), kind, zero)[0]
    masters = {"the parameters": table["parameters"], "none: rounded stochastically": "bf16"}
    expected = {
        "parameters": table["parameters"],
        "residual stream": table["residual stream"],
        "gradients summed in": table["gradients summed in"],
        "gradients sent in": table["gradients sent in"],
        "logits and loss": table["logits and loss"],
        "moments": table["moments"],
        "masters": masters.get(table["masters"], table["masters"]),
    }
    for row, value in expected.items():
        if row in ("parameters", "gradients summed in") and kind != "plain":
            continue  # engines that take parameters apart sum and keep them in buffers of their own
        assert found[row] == {value}, f"{row}: the table says {value}, and {found[row]} flow"
    # where products take bf16, some operands of the head's gradients are float32 numbers on a CPU
    assert found["products"] - {"fp32"} == {table["products"]} - {"fp32"}


def test_eight_bits_are_rows_of_the_table():
    from megatrain.engine.api import Precision
    from megatrain.nn.precision.fp8 import Fp8
    from megatrain.nn.precision.int8 import Int8

    table = dtype_table(Precision(compute="bf16", fp8=Fp8()), engine="plain", zero=0, moments="fp32")
    assert table["fp8 products"].startswith("e4m3 (tensorwise) in layers like *")
    assert table["fp8 gradients"] == "e5m2, of weights in bf16"
    for kind, sent in (("tensorwise", "fp32, those of fp8 layers in e4m3"), ("rowwise", "fp32")):
        table = dtype_table(Precision(compute="bf16", fp8=Fp8(kind=kind)), engine="fsdp2", zero=2, moments="fp32")
        assert table["parameters sent in"] == sent
    table = dtype_table(Precision(compute="bf16", int8=Int8(weight_gradient="low")), engine="plain", zero=0, moments="")
    assert table["int8 gradients"] == "int8, of weights in int8"
    assert "but the first 1 and last 1 blocks" in table["int8 products"]
    assert all(line.split()[0] == name.split()[0] for line, name in zip(lines(table), table, strict=True))
