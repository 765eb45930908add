"""What a run leaves behind, and that it learns."""

from pathlib import Path

import pytest
import yaml

from megatrain.base.errors import RunError
from megatrain.train.run import read_run, train
from tests.train.small import events, metrics, write_run

PROMISED = {
    "step", "tokens", "loss", "grad_norm", "lr", "tokens_per_second", "step_seconds", "data_seconds", "mfu", "mfu_palm",
    "memory_gib", "skipped",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(write_run(folder, text_data, train__steps=60))
    return folder / "runs/small"


def test_every_step_has_its_line_with_all_that_is_promised(finished: Path) -> None:
    lines = metrics(finished)
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert all(set(line) >= PROMISED for line in lines)
    assert [line["tokens"] for line in lines] == [8 * 32 * n for n in range(1, 61)]


def test_evaluations_come_at_their_steps_and_at_the_end(finished: Path) -> None:
    assert [line["step"] for line in metrics(finished) if "held_out_loss" in line] == list(range(6, 61, 6))


def test_it_learns_real_text(finished: Path) -> None:
    (start,) = events(finished, "evaluated")
    last = metrics(finished)[-1]
    assert last["held_out_loss"] < start["held_out_loss"] - 1.0
    assert last["bits_per_byte"] < start["bits_per_byte"]


def test_bits_per_byte_is_the_loss_over_the_text_that_the_tokens_stand_for(finished: Path, text_data: Path) -> None:
    split = yaml.safe_load((text_data / "manifest.json").read_text())["splits"]["held_out"]
    line = metrics(finished)[-1]
    nats_per_byte = line["held_out_loss"] * split["tokens"] / split["text_bytes"]
    assert line["bits_per_byte"] == pytest.approx(nats_per_byte / 0.6931471805599453, rel=1e-4)


def test_the_resolved_run_file_gives_the_same_run(finished: Path) -> None:
    again = read_run(finished / "config.yaml").run
    assert again.name == "small"
    assert again.train.steps == 60
    assert again.model.d_model == 32


def test_the_run_folder_holds_what_it_takes_to_use_the_model(finished: Path) -> None:
    assert (finished / "tokenizer.json").stat().st_size > 0
    assert (finished / "report.html").read_text().startswith("<!")
    assert (finished / "checkpoints/step-00000060/COMMIT").exists()


def test_too_many_skipped_steps_end_the_run_with_a_reason(tmp_path: Path, text_data: Path) -> None:
    # A learning rate without bounds makes the loss infinite within a few steps.
    path = write_run(
        tmp_path, text_data, optimizer__lr=1e30, optimizer__clip=None, train__max_skips=2, schedule__warmup=0
    )
    with pytest.raises(RunError, match=r"3 steps in a row .* lower the learning rate"):
        train(path)
    assert events(tmp_path / "runs/small", "failed")
    assert [line["skipped"] for line in metrics(tmp_path / "runs/small")][-2:] == [1, 1]


def test_it_says_the_held_out_loss_before_and_after(
    tmp_path: Path, text_data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(write_run(tmp_path, text_data))
    words = capfd.readouterr().err
    (start,) = events(tmp_path / "runs/small", "evaluated")
    last = metrics(tmp_path / "runs/small")[-1]
    assert f"held-out loss {start['held_out_loss']:.3f} before, {last['held_out_loss']:.3f} at step 12" in words
    assert f"bits per byte {start['bits_per_byte']:.3f} before, {last['bits_per_byte']:.3f} now" in words
