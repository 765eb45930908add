"""What a step costs while a checkpoint is written."""

import statistics
import time

import pytest
import torch

from megatrain.checkpoint.write import HostCopy
from megatrain.train.run import read_run
from megatrain.train.trainer import Trainer
from tests.train.small import session, write_run

EVERY, STEPS = 6, 42


def timed(monkeypatch, owner: type, name: str) -> list[float]:
    """Seconds of each call of a method from now on."""
    found, inner = [], getattr(owner, name)

    def outer(*args, **kwargs):
        began = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            found.append(time.perf_counter() - began)

    monkeypatch.setattr(owner, name, outer)
    return found


@pytest.mark.slow
def test_a_step_during_a_save_takes_at_most_1_3_times_a_normal_one_and_the_copy(text_data, tmp_path, monkeypatch):
    """20 million parameters, 240 MB a checkpoint, one thread; a second core writes. Run it on a machine at rest."""
    path = write_run(
        tmp_path,
        text_data,
        model={"d_model": 512, "n_layers": 6, "n_heads": 8, "d_ff": 1408},
        data__seq_len=128,
        train={"steps": STEPS, "global_batch": 4},
        layout={"micro_batch": 4},
        checkpoint={"every": EVERY, "keep": {"last": 2}},
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        copies, steps = timed(monkeypatch, HostCopy, "take"), timed(monkeypatch, Trainer, "step")
        session(read_run(str(path)).run)
    finally:
        torch.set_num_threads(threads)
    saves = range(EVERY, STEPS, EVERY)
    assert len(copies) == len(saves) + 1  # and the one at the end
    # a step that saves holds the copy; the one after it runs beside the writing
    normal = statistics.median(step for n, step in enumerate(steps, 1) if n > 2 and n % EVERY > 1)
    during = [steps[n] for n in saves]
    with_copy = [steps[n - 1] - copy for n, copy in zip(saves, copies, strict=False)]
    worst = [round(x / normal, 2) for x in during]
    print(f"normal {normal:.3f} s, during a save {worst} times that, and the copy {statistics.median(copies):.3f} s")
    assert statistics.median(during) <= 1.3 * normal
    assert statistics.median(with_copy) <= 1.3 * normal
