"""Stopping and going on: nothing of the run may show that it was interrupted."""

import shutil
from pathlib import Path

import pytest

import megatrain
from megatrain.base.errors import ConfigError, PreemptedError
from megatrain.data.build import BuildOptions, build
from megatrain.train.run import train
from tests.ranks import RankError, run
from tests.train.small import events, metrics, on_ranks, tensors, write_run

EXACT = ("step", "tokens", "loss", "grad_norm", "lr", "skipped")


def exact(folder: Path) -> list[dict]:
    return [{key: line[key] for key in EXACT} for line in metrics(folder)]


@pytest.mark.parametrize(
    ("engine", "zero"), [("plain", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3), ("fsdp2", 3)]
)
def test_a_run_killed_in_between_is_bit_exact(tmp_path: Path, text_data: Path, engine: str, zero: int) -> None:
    """40 steps straight, and 40 steps with a kill -9 after step 23, on two ranks."""
    layout = (
        f"layout.engine={engine}",
        f"layout.zero={zero}",
        "checkpoint.every=20",
        "checkpoint.async=false",
        "train.steps=40",
    )
    path = str(write_run(tmp_path, text_data))
    run(on_ranks, 2, path, ("name=straight", *layout))
    with pytest.raises(RankError, match="exit code -9"):
        run(on_ranks, 2, path, ("name=killed", *layout), (1, 23))
    run(on_ranks, 2, path, ("name=killed", *layout))

    straight, killed = tmp_path / "runs/straight", tmp_path / "runs/killed"
    assert [e["step"] for e in events(killed, "resumed")] == [20]
    assert exact(killed) == exact(straight)
    assert tensors(killed, 40) == tensors(straight, 40)
    assert len(tensors(straight, 40)) > 30


def test_a_run_asked_to_stop_is_saved_and_goes_on_bit_exact(tmp_path: Path, text_data: Path) -> None:
    path = write_run(tmp_path, text_data)
    train(path, ["name=straight"])
    with pytest.raises(PreemptedError, match=r"stopped after step 4 of 12"):
        train(path, ["name=paused", "hooks=[{kind: pause, at: 4}]"])
    train(path, ["name=paused", "hooks=[{kind: pause, at: 4}]"])  # it passes the step that it paused at
    straight, paused = tmp_path / "runs/straight", tmp_path / "runs/paused"
    assert exact(paused) == exact(straight)
    assert tensors(paused, 12) == tensors(straight, 12)


def test_metrics_beyond_the_commit_move_to_the_events(tmp_path: Path, text_data: Path) -> None:
    path = write_run(tmp_path, text_data, checkpoint__async=False)
    with pytest.raises(RankError, match="exit code -9"):
        run(on_ranks, 1, str(path), ("name=killed",), (0, 9))
    before = metrics(tmp_path / "runs/killed")
    train(path, ["name=killed"])
    (rewound,) = events(tmp_path / "runs/killed", "rewound")
    assert rewound["step"] == 6
    assert rewound["lines"] == before[6:]
    assert [line["step"] for line in metrics(tmp_path / "runs/killed")] == list(range(1, 13))


def test_a_run_killed_before_its_first_commit_starts_anew_with_clean_metrics(tmp_path: Path, text_data: Path) -> None:
    path = write_run(tmp_path, text_data)
    with pytest.raises(RankError, match="exit code -9"):
        run(on_ranks, 1, str(path), ("name=killed",), (0, 4))
    assert [line["step"] for line in metrics(tmp_path / "runs/killed")] == [1, 2, 3]
    train(path, ["name=killed"])
    assert [line["step"] for line in metrics(tmp_path / "runs/killed")] == list(range(1, 13))
    (rewound,) = events(tmp_path / "runs/killed", "rewound")
    assert [line["step"] for line in rewound["lines"]] == [1, 2, 3]


def test_a_finished_run_does_nothing(tmp_path: Path, text_data: Path) -> None:
    path = write_run(tmp_path, text_data, train__steps=2)
    assert train(path) == "finished"
    before = (tmp_path / "runs/small/metrics.jsonl").read_bytes()
    assert train(path) == "already finished"
    assert (tmp_path / "runs/small/metrics.jsonl").read_bytes() == before


def test_the_number_of_ranks_may_change_on_resume(tmp_path: Path, text_data: Path) -> None:
    path = write_run(tmp_path, text_data)
    train(path, ["name=straight"])
    with pytest.raises(PreemptedError):
        train(path, ["name=moved", "hooks=[{kind: pause, at: 5}]"])
    run(on_ranks, 2, str(path), ("name=moved", "layout.zero=2"))
    straight, moved = exact(tmp_path / "runs/straight"), exact(tmp_path / "runs/moved")
    assert [line["loss"] for line in moved] == pytest.approx([line["loss"] for line in straight], rel=1e-5)


def test_another_run_in_the_folder_is_refused_and_left_alone(tmp_path: Path, text_data: Path) -> None:
    path = write_run(tmp_path, text_data, train__steps=2)
    train(path)
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "runs").rglob("*") if "lease" not in str(p))
    with pytest.raises(ConfigError, match=r"model\.d_ff=48, and it is 64 here"):
        train(path, ["model.d_ff=64"])
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "runs").rglob("*") if "lease" not in str(p)) == before


def test_a_change_of_the_mathematics_must_be_acknowledged_by_name(tmp_path: Path, text_data: Path) -> None:
    path = write_run(tmp_path, text_data)
    with pytest.raises(PreemptedError):
        train(path, ["hooks=[{kind: pause, at: 3}]"])
    with pytest.raises(ConfigError, match=r"add optimizer\.lr to checkpoint\.acknowledge"):
        train(path, ["optimizer.lr=0.02"])
    train(path, ["optimizer.lr=0.02", "checkpoint.acknowledge=[optimizer.lr]"])
    (resumed,) = events(tmp_path / "runs/small", "resumed")
    assert resumed["changed"]["optimizer.lr"] == [0.01, 0.02]


def test_init_from_takes_the_weights_and_starts_anew(tmp_path: Path, text_data: Path) -> None:
    path = write_run(tmp_path, text_data)
    train(path, ["name=first"])
    source = tmp_path / "runs/first/checkpoints/step-00000012"
    train(path, ["name=second", f"checkpoint.init_from={source}", "train.steps=3"])
    last = metrics(tmp_path / "runs/first")[-1]["held_out_loss"]
    (start,) = events(tmp_path / "runs/second", "evaluated")
    assert start["held_out_loss"] == pytest.approx(last, rel=1e-6)
    assert metrics(tmp_path / "runs/second")[0]["step"] == 1


def test_resume_must_refuses_to_start_and_never_refuses_to_go_on(tmp_path: Path, text_data: Path) -> None:
    path = write_run(tmp_path, text_data, train__steps=2)
    with pytest.raises(Exception, match="must"):
        train(path, ["checkpoint.resume=must"])
    train(path)
    with pytest.raises(ConfigError, match="never"):
        train(path, ["checkpoint.resume=never"])


def test_weights_of_another_tokenizer_are_refused_unless_acknowledged(tmp_path: Path, text_data: Path) -> None:
    source = Path(megatrain.__file__).parent / "nn"
    other = tmp_path / "other"
    build(BuildOptions(inputs=(source,), out=other, include=("*.py",), vocab_size=290, held_out=0.2))
    path = write_run(tmp_path, text_data, train__steps=2, model__vocab_size=300)
    train(path, ["name=first"])
    start = [f"checkpoint.init_from={tmp_path}/runs/first", "name=second", f"data.sources.0.path={other}"]
    with pytest.raises(ConfigError, match="was trained with another tokenizer"):
        train(path, start)
    train(path, [*start, "checkpoint.acknowledge=[tokenizer]"])


def test_the_data_set_may_move_between_stop_and_resume(tmp_path: Path, text_data: Path) -> None:
    path = write_run(tmp_path, text_data)
    train(path, ["name=straight"])
    with pytest.raises(PreemptedError):
        train(path, ["name=moved", "hooks=[{kind: pause, at: 5}]"])
    shutil.copytree(text_data, tmp_path / "elsewhere")
    train(path, ["name=moved", f"data.sources.0.path={tmp_path}/elsewhere"])
    assert exact(tmp_path / "runs/moved") == exact(tmp_path / "runs/straight")
