"""A spike is told from noise, and what is written about it is true."""

import contextlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatrain.base.device import Device
from megatrain.base.errors import PreemptedError
from megatrain.checkpoint.read import find
from megatrain.data.ledger import Ledger
from megatrain.data.trace import trace
from megatrain.parallel.mesh import Mesh
from megatrain.train.build import build_engine, open_feed
from megatrain.train.check import refuse
from megatrain.train.config import Run, read_run
from megatrain.train.examine import layer_norms
from megatrain.train.hook import Handle, Hook, restore_states, states_of
from megatrain.train.hooks.spikes import Spikes, limit, robust_score
from megatrain.train.run import train
from megatrain.train.trainer import Trainer
from tests.engine.toy import assembled, pieces_of
from tests.ranks import run as run_ranks
from tests.train.small import events, metrics, on_ranks, write_run


def told(losses: list[float], tmp_path: Path, **fields) -> list[dict]:
    found: list[dict] = []
    handle = Handle(
        folder=tmp_path, rank=0, world=1, total_steps=len(losses), first_step=1,
        note=lambda kind, **facts: found.append({"kind": kind, **facts}), examine=lambda: {"documents": ["a"]},
    )  # fmt: skip
    hook = Spikes(**fields).build(handle)
    for step, loss in enumerate(losses, 1):
        hook.after_step({"step": step, "loss": loss, "grad_norm": 1.0, "skipped": 0})
    return found


def falling(n: int) -> list[float]:
    noise = random.Random(0)
    return [3 + 2 * math.exp(-k / 60) + noise.gauss(0, 0.03) for k in range(n)]


def test_a_loss_that_falls_with_noise_has_no_spike(tmp_path):
    assert told(falling(400), tmp_path) == []


@pytest.mark.parametrize("loss", [4.2, math.nan, math.inf])
def test_planted_spikes_are_found_at_their_steps_and_no_others(loss, tmp_path):
    losses = falling(400)
    for step in (150, 151, 300):
        losses[step - 1] = loss
    found = told(losses, tmp_path)
    assert [event["at_step"] for event in found] == [150, 151, 300]
    assert all(event["kind"] == "spike" and event["documents"] == ["a"] for event in found)


def test_a_score_is_counted_in_deviations_that_outliers_do_not_move():
    noise = random.Random(1)
    before = [noise.gauss(2, 0.1) for _ in range(1000)] + [50.0] * 20
    assert robust_score(2.5, before) == pytest.approx(5, rel=0.15)
    assert robust_score(2.0, [2.0] * 50) == 0
    assert robust_score(2.001, [2.0] * 50) == pytest.approx(0.5)


def test_norms_of_parameters_add_up_to_those_of_blocks():
    mine = {"layers.0.a": 9.0, "layers.0.b": 7.0, "layers.11.a": 4.0, "norm.weight": 1.0}
    assert layer_norms([mine, {"layers.0.a": 9.0}]) == {"layers.0": 5.0, "layers.11": 2.0, "norm.weight": 1.0}


def test_limits_are_said_two_steps_ahead_and_again_after_a_resume(tmp_path):
    def heard(state: dict | None, losses: list[float], first: int) -> tuple[dict[int, float], dict]:
        limits: dict[int, float] = {}
        handle = Handle(
            folder=tmp_path, rank=0, world=1, total_steps=99, first_step=first,
            limit_loss=lambda step, most: limits.update({step: most}),
        )  # fmt: skip
        hook = Spikes(action="skip", after=4, window=8).build(handle)
        if state is not None:
            hook.restore(json.loads(json.dumps(state)))
        for step, loss in enumerate(losses, first):
            hook.after_step({"step": step, "loss": loss, "grad_norm": 1.0, "skipped": 0})
        return limits, hook.state()

    losses = falling(30)
    losses[11] = math.nan
    whole, _ = heard(None, losses, 1)
    assert sorted(whole) == list(range(6, 33))
    assert whole[20] == pytest.approx(limit([x for x in losses[10:18] if math.isfinite(x)], 6.0))
    for cut in (3, 4, 5, 12, 13, 20):
        _, state = heard(None, losses[:cut], 1)
        again, _ = heard(state, losses[cut:], cut + 1)
        assert again == {step: most for step, most in whole.items() if step > cut}


# ------------------------------------------------------------------------------------------------ skip and rewind


def at_step(monkeypatch: pytest.MonkeyPatch, acts: dict[int, Callable[[Trainer], None]]) -> None:
    """Do something to the trainer right after the steps of these numbers, each once."""
    inner, left = Trainer.step, dict(acts)

    def step(trainer: Trainer) -> None:
        inner(trainer)
        if (act := left.pop(trainer.state.step, None)) is not None:
            act(trainer)

    monkeypatch.setattr(Trainer, "step", step)


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.data for p in trainer.engine.parts.model.parameters()]


def spoil(trainer: Trainer) -> None:
    for x in weights(trainer):
        x.mul_(-20)


def stop(trainer: Trainer) -> None:
    trainer.stopping = True


def plain_steps(run: Run, batches: list[int], refused: tuple[int, ...] = ()) -> dict[str, bytes]:
    """Weights after steps on these batches of the data, without the loop, its hooks and its checkpoints."""
    device, mesh = Device.of("cpu"), Mesh()
    manifests = refuse(run, 1)
    engine = build_engine(run, manifests[0].tokenizer, mesh, device)
    with contextlib.closing(open_feed(run, mesh, device, manifests, None)) as feed:
        rows = [next(feed) for _ in range(max(batches) + 1)]
    for step, number in enumerate(batches, 1):
        lr = run.optimizer.lr * run.schedule.lr_factor(step, run.total_steps)
        engine.step(rows[number], lr, -1.0 if step in refused else math.inf)
    whole = assembled([pieces_of(engine)])
    return {name: x.numpy().tobytes() for (state, name), x in whole.items() if state == "weights"}


def saved_weights(run: Run, step: int) -> dict[str, bytes]:
    reader = find(run.folder, step).reader()
    return {name: reader.read_full(name).numpy().tobytes() for name in reader.names()}


SPIKES = {"kind": "spikes", "after": 4, "window": 8, "threshold": 8.0}


def test_a_step_of_too_high_a_loss_is_not_taken(tmp_path, text_data, monkeypatch):
    kept: list[torch.Tensor] = []

    def mend(trainer: Trainer) -> None:
        for x, y in zip(weights(trainer), kept, strict=True):
            x.copy_(y)

    def keep_and_spoil(trainer: Trainer) -> None:
        kept.extend(x.clone() for x in weights(trainer))
        spoil(trainer)

    at_step(monkeypatch, {8: keep_and_spoil, 9: mend})
    run = read_run(str(write_run(tmp_path, text_data, hooks=[SPIKES | {"action": "skip"}], train__eval_every=0))).run
    train(run)
    assert [(line["step"], line["skipped"]) for line in metrics(run.folder) if line["skipped"]] == [(9, 1)]
    [event] = events(run.folder, "spike")
    assert (event["at_step"], event["action"]) == (9, "skip")
    monkeypatch.undo()
    assert saved_weights(run, 12) == plain_steps(run, list(range(12)), refused=(9,))


def test_a_run_goes_back_before_a_spike_and_leaves_out_the_data_that_led_to_it(tmp_path, text_data, monkeypatch):
    """Saved at step 6, spoiled after step 8, told at step 9 while step 10 runs: step 7 is taken again with batch 10."""
    at_step(monkeypatch, {8: spoil})
    run = read_run(str(write_run(tmp_path, text_data, hooks=[SPIKES | {"action": "rewind"}], train__eval_every=0))).run
    train(run)
    [rewound] = events(run.folder, "rewound")
    spikes = [(event["at_step"], event["action"]) for event in events(run.folder, "spike")]
    assert spikes == [(9, "rewind"), (10, "log")]
    assert [line["step"] for line in rewound["lines"]] == [7, 8, 9, 10]
    assert [line["step"] for line in metrics(run.folder)] == list(range(1, 13))
    monkeypatch.undo()
    batches = [*range(6), *range(10, 16)]
    assert saved_weights(run, 12) == plain_steps(run, batches)
    seen = [(t.after, t.upto, t.first_batch) for t in Ledger(run.folder / "ledger.jsonl").history()]
    assert seen == [(0, 6, 0), (6, 12, 10)]


def test_a_run_that_went_back_resumes_exactly(tmp_path, text_data, monkeypatch):
    hooks = [SPIKES | {"action": "rewind"}]
    changes = {"train__eval_every": 0, "train__steps": 20, "checkpoint__every": 4}
    at_step(monkeypatch, {8: spoil, 16: stop})
    run = read_run(str(write_run(tmp_path, text_data, hooks=hooks, **changes))).run
    with pytest.raises(PreemptedError):
        train(run)
    monkeypatch.undo()
    train(run)
    assert [event["action"] for event in events(run.folder, "spike")] == ["rewind", "log"]
    assert [line["step"] for line in metrics(run.folder)] == list(range(1, 21))
    history = list(Ledger(run.folder / "ledger.jsonl").history())
    batches = [t.first_batch + i for t in history for i in range(t.upto - t.after)]
    assert batches == [*range(8), *range(10, 22)]
    assert saved_weights(run, 20) == plain_steps(run, batches)


def test_a_spike_at_the_last_step_is_gone_back_from_too(tmp_path, text_data, monkeypatch):
    at_step(monkeypatch, {11: spoil})
    run = read_run(str(write_run(tmp_path, text_data, hooks=[SPIKES | {"action": "rewind"}], train__eval_every=0))).run
    train(run)
    monkeypatch.undo()
    assert [event["at_step"] for event in events(run.folder, "spike")] == [12]
    assert saved_weights(run, 12) == plain_steps(run, [*range(6), *range(12, 18)])


def test_a_stop_at_a_spike_goes_back_first_and_can_be_resumed(tmp_path, text_data, monkeypatch):
    at_step(monkeypatch, {8: spoil, 9: stop})
    run = read_run(str(write_run(tmp_path, text_data, hooks=[SPIKES | {"action": "rewind"}], train__eval_every=0))).run
    with pytest.raises(PreemptedError, match="stopped after step 6 of 12"):
        train(run)
    monkeypatch.undo()
    train(run)
    assert [line["step"] for line in metrics(run.folder)] == list(range(1, 13))
    assert saved_weights(run, 12) == plain_steps(run, [*range(12)])


def test_only_going_back_counts_as_having_gone_back(tmp_path):
    found: list[str] = []
    handle = Handle(
        folder=tmp_path, rank=0, world=1, total_steps=400, first_step=1, rewind=lambda: None, examine=dict,
        note=lambda kind, **facts: found.append(facts["action"]),
    )  # fmt: skip
    hook = Spikes(action="rewind", most_rewinds=1).build(handle)
    for step, loss in enumerate(falling(400), 1):
        high = step in (150, 200, 300)
        hook.after_step({"step": step, "loss": 9.0 if high else loss, "grad_norm": 1.0, "skipped": 0})
        if step == 200:  # at 150 there was no checkpoint
            hook.rewound(100)
    assert found == ["rewind", "rewind", "log"]


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path, text_data, monkeypatch, capfd):
    at_step(monkeypatch, {8: spoil})
    hooks = [SPIKES | {"action": "rewind"}]
    run = read_run(str(write_run(tmp_path, text_data, hooks=hooks, train__eval_every=0, checkpoint__every=None))).run
    train(run)
    assert [line["step"] for line in metrics(run.folder)] == list(range(1, 13))
    assert "there is no checkpoint yet to go back to" in capfd.readouterr().err


@pytest.mark.parametrize("ranks", [1, 2], ids=["plain", "zero-1"])
def test_documents_norms_and_activations_are_those_of_the_step(ranks: int, tmp_path: Path, text_data: Path) -> None:
    hooks = [{"kind": "spikes", "after": 2, "window": 2, "threshold": 1e-6}]  # any rise is a spike here
    noisy = {"train__steps": 30, "optimizer__lr": 0.7}  # so long that the loss rises whatever the data of the day
    path = write_run(tmp_path, text_data, hooks=hooks, train__eval_every=0, **noisy)
    run = read_run(path).run
    if ranks == 1:
        train(run)
    else:
        run_ranks(on_ranks, ranks, str(path))
    found = events(run.folder, "spike")
    assert found, "no loss rose in the whole run"
    norms = {line["step"]: line["grad_norm"] for line in metrics(run.folder)}
    traced = {line["step"] + 1: line for line in trace(run.data, seed=run.seed, global_batch=8, start=0, stop=30)}
    for event in found:
        step = event["at_step"]
        assert event["documents"] == traced[step]["documents"]
        total = math.sqrt(sum(norm**2 for norm in event["gradient_norms"].values()))
        assert total == pytest.approx(norms[step], rel=1e-4)
        assert set(event["activations"]) == {"layers.0", "layers.1"} < set(event["gradient_norms"])
        assert all(0 < x < math.inf for x in event["activations"].values())


class Counting(Hook):
    def __init__(self, n: int) -> None:
        self.n = n

    def state(self) -> int:
        return self.n

    def restore(self, state: int) -> None:
        self.n = state


def test_two_hooks_of_one_kind_are_each_given_their_own_state():
    states = json.loads(json.dumps(states_of([Counting(1), Hook(), Counting(2)])))
    resumed = [Counting(0), Hook(), Counting(0), Counting(7)]
    restore_states(resumed, states)
    assert [hook.n for hook in resumed if isinstance(hook, Counting)] == [1, 2, 7]
