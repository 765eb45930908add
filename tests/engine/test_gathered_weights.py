"""Under fully_shard, weights of FP8 layers travel in eight bits, and nothing else about a run changes."""

from collections import Counter
from typing import Any

import pytest
import torch.distributed as dist

from megatrain.audit.communication import Communication, group_names
from megatrain.engine.kinds import fsdp2
from megatrain.models.decoder import Decoder
from megatrain.nn.precision.fp8 import Fp8
from megatrain.nn.precision.select import linears, quantise
from megatrain.nn.precision.sharded import ShardedWeight
from megatrain.optim.kinds.adamw import AdamW
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.shard import initialise
from megatrain.parallel.tensor import TensorParallel
from tests.engine.toy import (
    SEQ_LEN,
    VOCABULARY,
    assembled,
    connected,
    filler,
    floats,
    pieces_of,
    rows_of,
    toy_batch,
    toy_engine,
)
from tests.ranks import run

MODEL = Decoder(d_model=48, n_layers=2, n_heads=2, d_ff=64)
ROWS = 12
DEMOTED = "layers.1.feed_forward.down"


def built(zero: int, parameters: str, *, tp: int = 1, compiled: bool = False) -> tuple[Any, Any, Mesh]:
    """The engine, its quantised products, and the mesh."""
    mesh = connected(tp)
    axis = TensorParallel(mesh.axis("tp"), tp > 1)
    model = MODEL.build(n_valid=VOCABULARY, seq_len=SEQ_LEN, tp=axis)
    initialise(model, seed=3)
    recipe = Fp8(min_size=0, keep_first=0, keep_last=0, weight_gradient="low")
    products = quantise(model, recipe, MODEL.n_layers, axis.axis, mesh.axis("row"))
    if compiled:
        model.compile_blocks("aot_eager")
    engine = toy_engine(
        "fsdp2", zero, mesh, model=model, micro_batch=2, optimizer=AdamW(lr=1e-2), compute="bf16", parameters=parameters
    )
    return engine, products, mesh


def tell(as_they_are: bool, resumed: bool, case: dict[str, Any]) -> list[tuple]:
    """Steps and evaluations of three batches; with `as_they_are` weights are gathered unrounded."""
    if as_they_are:
        fsdp2.gather_in_eight_bits = lambda model, data: None
    how = {name: value for name, value in case.items() if name != "demoted"}
    engine, products, mesh = built(**how)
    layers = linears(engine.model)
    for layer in layers.values():
        even = layer.weight.shape[0] % mesh.axis("data").size == 0
        assert isinstance(layer.weight.to_local(), ShardedWeight) == (even and not as_they_are)
    found: list[tuple] = []
    for step in range(3):
        if resumed and step == 1:
            everyones: Any = [None] * mesh.size
            dist.all_gather_object(everyones, pieces_of(engine))
            scalars = engine.scalars()
            engine, products, mesh = built(**how)
            engine.load(filler(assembled(everyones)))
            engine.load_scalars(scalars)
        products[DEMOTED].demoted = "demoted" in case
        given = rows_of(toy_batch(step, ROWS), mesh)
        found += [floats(engine.step(given, 1e-2)), tuple(map(float, engine.evaluate(given)))]
    return found


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
@pytest.mark.parametrize(
    ("ranks", "case"),
    [
        (2, {"zero": 2, "parameters": "bf16"}),
        (2, {"zero": 3, "parameters": "fp32", "demoted": True}),
        pytest.param(2, {"zero": 3, "parameters": "bf16", "demoted": True, "compiled": True}, marks=pytest.mark.slow),
        (3, {"zero": 3, "parameters": "bf16"}),  # which cannot share 128 rows
        (4, {"zero": 2, "parameters": "bf16", "tp": 2}),
    ],
    ids=str,
)
def test_losses_and_norms_are_to_the_bit_those_of_weights_that_are_rounded_where_they_arrive(ranks, case):
    there, before = run(tell, ranks, True, False, case), run(tell, ranks, False, False, case)
    assert before == there
    assert len({losses for losses, *_ in before[0]}) == len(before[0])


def test_a_run_that_resumes_goes_on_with_the_same_bits():
    case = {"zero": 3, "parameters": "bf16"}
    assert run(tell, 2, False, True, case) == run(tell, 2, False, False, case)


def sent() -> tuple[int, Counter[str]]:
    """Bytes that a step gathers, and elements by how they travel, with those that fill up the last rank's rows."""
    engine, _, mesh = built(2, "bf16")
    given = rows_of(toy_batch(0, 4), mesh)
    engine.step(given, 1e-3)
    with Communication(group_names(mesh.groups)) as seen:
        engine.step(given, 1e-3)
    elements: Counter[str] = Counter()
    for p in engine.model.parameters():
        padded = -(-p.shape[0] // 2) * 2 * p[0].numel()
        elements["e4m3" if isinstance(p.to_local(), ShardedWeight) else "bf16"] += padded
    return seen.traffic["data", "all_gather"].bytes, elements


def test_an_element_of_such_a_weight_is_one_byte_on_the_wire():
    for n_bytes, elements in run(sent, 2):
        assert elements["e4m3"] > elements["bf16"] > 0
        assert n_bytes == elements["e4m3"] + 2 * elements["bf16"]
