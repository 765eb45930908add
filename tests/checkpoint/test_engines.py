"""Real engines: what any layout saves, any other takes up with the same bits and goes on with the same losses."""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatrain.checkpoint.checkpoints import Checkpoints
from megatrain.checkpoint.read import find
from megatrain.engine.kinds.deepspeed import DeepSpeed
from megatrain.models.decoder import Decoder
from megatrain.optim.kinds.adamw import AdamW
from megatrain.optim.optimizer import Group
from megatrain.parallel.shard import initialise
from megatrain.parallel.tensor import TensorParallel
from tests.engine.toy import SEQ_LEN, VOCABULARY, connected, floats, rows_of, toy_batch, toy_engine
from tests.ranks import run

ROWS, SAVED_AT, GOES_ON = 8, 5, 5
SEED = 11

# Groups that do not follow the order of parameters: a partition then has pieces of many of them.
OPTIMIZER = AdamW(
    lr=1e-2, eps=1e-4, clip=0.5,
    groups=(Group(match="*.to_out.*", lr_scale=0.5), Group(match="embedding.*", weight_decay=0.01)),
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    kind: str = "plain"
    zero: int = 0
    dp: int = 1
    tp: int = 1
    tied: bool = True

    def __str__(self) -> str:
        return f"{self.kind}-{self.zero}-dp{self.dp}-tp{self.tp}" + ("" if self.tied else "-untied")

    @property
    def ranks(self) -> int:
        return self.dp * self.tp

    def engine(self):
        mesh = connected(self.tp)
        tp = TensorParallel(mesh.axis("tp"), self.tp > 1)
        model = Decoder(d_model=20, n_layers=1, n_heads=4, head_dim=6, d_ff=24, tie_embeddings=self.tied)
        model = model.build(n_valid=VOCABULARY, seq_len=SEQ_LEN, tp=tp)
        initialise(model, seed=3)
        choice = DeepSpeed(persistent_below=0) if self.kind == "deepspeed" else None
        return toy_engine(self.kind, self.zero, mesh, model=model, optimizer=OPTIMIZER, choice=choice), mesh


def losses(engine, mesh, steps: range) -> list[float]:
    return [floats(engine.step(rows_of(toy_batch(k, ROWS), mesh), 1e-2))[0] for k in steps]


def save(checkpoints: Checkpoints, engine) -> None:
    checkpoints.save(SAVED_AT, engine.slices(), {"engine": engine.scalars()}, {})


def train_and_save(layout: Layout, folder: str) -> list[float]:
    """Losses of all steps, the state in the middle saved."""
    engine, mesh = layout.engine()
    checkpoints = Checkpoints(folder, mesh.axis("world"))
    found = losses(engine, mesh, range(SAVED_AT))
    save(checkpoints, engine)
    found += losses(engine, mesh, range(SAVED_AT, SAVED_AT + GOES_ON))
    checkpoints.close()
    engine.close()
    return found


def take_up(layout: Layout, sources: list[str], out: str) -> list[list[float]]:
    """The losses that follow on each source; what is saved right after loading lies in a folder of its number."""
    engine, mesh = layout.engine()
    found = []
    for i, source in enumerate(sources):
        theirs, ours = Checkpoints(source, mesh.axis("world")), Checkpoints(f"{out}/{i}", mesh.axis("world"))
        reader = theirs.newest().reader()
        ours.load(reader, engine)
        engine.load_scalars(reader.state["engine"])
        save(ours, engine)
        found.append(losses(engine, mesh, range(SAVED_AT, SAVED_AT + GOES_ON)))
        ours.close()
        theirs.close()
    engine.close()
    return found


def call(function, layout: Layout, *args):
    return function(layout, *args) if layout.ranks == 1 else run(function, layout.ranks, layout, *args)[0]


def assert_same_bits(a: str | Path, b: str | Path) -> None:
    a, b = find(a).reader(), find(b).reader()
    assert a.manifest.tensors.keys() == b.manifest.tensors.keys()
    assert {"exp_avg", "exp_avg_sq", "weights"} <= set(a.states())
    assert a.state == b.state
    for state, name in a.manifest.tensors:
        x, y = a.read_full(name, state), b.read_full(name, state)
        assert x.dtype == torch.float32
        assert torch.equal(x.view(torch.int32), y.view(torch.int32)), (state, name)


def check_pairs(sources: list[Layout], targets: dict[Layout, list[Layout]], folder: Path) -> None:
    alone = {layout.tied: call(train_and_save, Layout(tied=layout.tied), f"{folder}/alone") for layout in sources[:1]}
    straight = {layout: call(train_and_save, layout, f"{folder}/{layout}") for layout in sources}
    for layout, found in straight.items():
        assert found == pytest.approx(alone[layout.tied], rel=1e-5)
    for target, chosen in targets.items():
        told = call(take_up, target, [f"{folder}/{source}" for source in chosen], f"{folder}/again/{target}")
        for i, (source, found) in enumerate(zip(chosen, told, strict=True)):
            assert_same_bits(f"{folder}/{source}", f"{folder}/again/{target}/{i}")
            assert found == pytest.approx(straight[source][SAVED_AT:], rel=1e-6), f"{source} -> {target}"


FEW = [Layout(), Layout("deepspeed", 3, dp=2), Layout("plain", tp=2)]


def test_three_layouts_take_up_each_others_state(memory_path):
    check_pairs(FEW, dict.fromkeys(FEW, FEW), memory_path)


def all_layouts(tied: bool) -> list[Layout]:
    sizes = [(dp, tp) for dp in (1, 2, 3, 4) for tp in (1, 2, 4) if dp * tp <= 4]
    plain = [Layout("plain", 0, dp, tp, tied) for dp, tp in sizes if ROWS % dp == 0]
    zero = [Layout("deepspeed", z, dp, tp, tied) for z in (0, 1, 2, 3) for dp, tp in sizes if dp > 1 and ROWS % dp == 0]
    return plain + zero


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_layout_goes_to_one_process_and_back_and_forty_pairs_go_across(tied, memory_path):
    layouts = all_layouts(tied)
    alone = layouts[0]
    r = random.Random(SEED)
    print(f"pairs are drawn with seed {SEED}")
    targets = {layout: [alone] for layout in layouts} | {alone: list(layouts)}
    for _ in range(40):
        target = r.choice(layouts[1:])
        targets[target].append(r.choice([layout for layout in layouts if layout not in (target, alone)]))
    check_pairs(layouts, targets, memory_path)
