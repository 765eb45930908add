"""Stopping and going on: nothing of the run may show that it was interrupted."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

import megatrain
from megatrain.base.errors import CheckpointError, ConfigError, FailedCheckpointError, PreemptedError
from megatrain.checkpoint.save import Save
from megatrain.cli.checkpoint import command
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


def test_another_optimizer_is_told_that_its_moments_are_not_there(tmp_path: Path, text_data: Path) -> None:
    path = write_run(tmp_path, text_data)
    with pytest.raises(PreemptedError):
        train(path, ["hooks=[{kind: pause, at: 3}]"])
    asked = ["optimizer={kind: adafactor, lr: 0.01}", "checkpoint.acknowledge=[optimizer]"]
    with pytest.raises(CheckpointError, match=r"which this run's optimizer keeps .*: set the optimizer that it was"):
        train(path, asked)


def test_parameters_in_another_format_are_taken_once_that_is_acknowledged(tmp_path: Path, text_data: Path) -> None:
    path = write_run(tmp_path, text_data)
    low = ["precision.compute=bf16", "precision.parameters=bf16", "precision.stochastic_rounding=true"]
    with pytest.raises(PreemptedError):
        train(path, ["hooks=[{kind: pause, at: 3}]", *low])
    acknowledge = "checkpoint.acknowledge=[precision.compute,precision.stochastic_rounding{}]"
    with pytest.raises(ConfigError, match=r"add precision\.parameters to checkpoint\.acknowledge"):
        train(path, [acknowledge.format("")])
    train(path, [acknowledge.format(",precision.parameters")])
    assert [line["step"] for line in metrics(tmp_path / "runs/small")] == list(range(1, 13))


def test_init_from_takes_the_weights_and_starts_anew(tmp_path: Path, text_data: Path) -> None:
    path = write_run(tmp_path, text_data)
    train(path, ["name=first"])
    source = tmp_path / "runs/first/checkpoints/step-00000012"
    train(path, ["name=second", f"checkpoint.init_from={source}", "train.steps=3"])
    last = metrics(tmp_path / "runs/first")[-1]["held_out_loss"]
    (start,) = events(tmp_path / "runs/second", "evaluated")
    assert start["held_out_loss"] == pytest.approx(last, rel=1e-6)
    assert metrics(tmp_path / "runs/second")[0]["step"] == 1


OTHER_MEANINGS = {
    "model.n_heads": {"model__n_heads": 2, "model__n_kv_heads": 1},
    "model.position.kind": {"model__position": {"kind": "none"}},
    "model.position.factor": {"model__position": {"kind": "rotary_linear", "factor": 2.0}},
    "model.feed_forward.kind": {"model__feed_forward": {"kind": "geglu"}},
    "model.norm.eps": {"model__norm": {"kind": "rms_norm", "eps": 1e-3}},
    "model.attention.window": {"model__attention": {"kind": "sliding_window", "window": 4}},
    "model.scale_embeddings": {"model__scale_embeddings": True},
}


@pytest.fixture(scope="module")
def first(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("first")
    train(write_run(folder, text_data, train__steps=2), ["name=first"])
    return folder / "runs/first"


@pytest.mark.parametrize("key", OTHER_MEANINGS)
def test_weights_of_the_same_shapes_and_another_meaning_are_refused(
    key: str, first: Path, tmp_path: Path, text_data: Path
) -> None:
    path = write_run(tmp_path, text_data, train__steps=2, checkpoint__init_from=str(first), **OTHER_MEANINGS[key])
    with pytest.raises(ConfigError, match=rf"is no model of this run file .*inspect {first}") as caught:
        train(path)
    assert f"{key} is " in str(caught.value)
    names = [line.split(" is ")[0].split(": ")[-1] for line in str(caught.value).splitlines()[1:]]
    assert train(path, [f"checkpoint.acknowledge=[{','.join(names)}]"]) == "finished"


def test_weights_of_other_shapes_are_refused_by_the_name_of_where_they_are(
    first: Path, tmp_path: Path, text_data: Path
) -> None:
    path = write_run(tmp_path, text_data, checkpoint__init_from=str(first), model__d_ff=64)
    with pytest.raises(CheckpointError, match=rf"{first}/checkpoints/step-00000002 is not of this model:"):
        train(path, ["checkpoint.acknowledge=[model.d_ff]"])


def test_learned_positions_say_which_seq_len_they_are_for(tmp_path: Path, text_data: Path) -> None:
    learned = {"model__position": {"kind": "learned"}, "train__steps": 2}
    train(write_run(tmp_path, text_data, **learned), ["name=first"])
    path = write_run(tmp_path, text_data, data__seq_len=16, checkpoint__init_from=f"{tmp_path}/runs/first", **learned)
    with pytest.raises(ConfigError, match=r"has learned 32 positions, and data\.seq_len is 16: set it to 32"):
        train(path)


def test_weights_may_come_with_other_dropout_and_initialisation(first: Path, tmp_path: Path, text_data: Path) -> None:
    only_in_training = {"model__dropout": 0.1, "model__init_std": 0.5}
    path = write_run(tmp_path, text_data, train__steps=2, checkpoint__init_from=str(first), **only_in_training)
    assert train(path) == "finished"


def test_the_model_section_that_inspect_writes_is_taken(first: Path, tmp_path: Path, text_data: Path) -> None:
    done = CliRunner().invoke(command, ["inspect", str(first), "--model"], catch_exceptions=False)
    (tmp_path / "model.yaml").write_text(done.output)
    path = write_run(tmp_path, text_data, train__steps=2, checkpoint__init_from=str(first))
    section = yaml.safe_load(path.read_text())
    del section["model"]
    path.write_text(yaml.safe_dump(section | {"base": ["model.yaml"]}))
    assert train(path) == "finished"
    as_json = CliRunner().invoke(command, ["inspect", str(first), "--model", "--json"], catch_exceptions=False)
    assert json.loads(as_json.output) == yaml.safe_load(done.output)


def test_a_run_that_began_elsewhere_does_not_go_on_as_if_it_had_begun_there(
    first: Path, tmp_path: Path, text_data: Path
) -> None:
    path = write_run(tmp_path, text_data, train__steps=2)
    train(path, ["name=own"])
    with pytest.raises(ConfigError, match=rf"began with weights of its own, and checkpoint\.init_from is {first} here"):
        train(path, ["name=own", f"checkpoint.init_from={first}"])
    train(path, ["name=from", f"checkpoint.init_from={first}"])
    with pytest.raises(ConfigError, match=rf"began with those of {first}, and checkpoint\.init_from is \S*/own here"):
        train(path, ["name=from", f"checkpoint.init_from={tmp_path}/runs/own"])
    assert train(path, ["name=from", f"checkpoint.init_from={first}/"]) == "already finished"
    assert train(path, ["name=from"]) == "already finished"


def failing(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Saves of these steps fail as on a full disk."""
    run = Save.run

    def fail(save: Save) -> None:
        if save.step in steps:
            raise FailedCheckpointError("no room for a checkpoint")
        run(save)

    monkeypatch.setattr(Save, "run", fail)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_run_whose_last_state_is_not_saved_has_not_finished(
    asynchronous: bool, tmp_path: Path, text_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_run(tmp_path, text_data, checkpoint__failed_save="go_on", checkpoint__async=asynchronous)
    failing(monkeypatch, 6, 12)
    with pytest.raises(FailedCheckpointError, match=r"step 12 is lost, its checkpoint was not saved: no room"):
        train(path)
    folder = tmp_path / "runs/small"
    assert not events(folder, "saved")
    assert not events(folder, "finished")
    assert "step 12 is lost" in events(folder, "failed")[0]["error"]
    assert [line["step"] for line in metrics(folder)] == list(range(1, 13))


def test_a_save_in_between_may_fail_and_no_event_says_that_it_was_saved(
    tmp_path: Path, text_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_run(tmp_path, text_data, checkpoint__failed_save="go_on", checkpoint__every=3)
    failing(monkeypatch, 6)
    assert train(path) == "finished"
    assert [event["step"] for event in events(tmp_path / "runs/small", "saved")] == [3, 9, 12]


@pytest.mark.parametrize("how", ["removed", "another checkpoint.dir"])
def test_a_run_whose_checkpoints_are_gone_does_not_start_anew(how: str, tmp_path: Path, text_data: Path) -> None:
    path = write_run(tmp_path, text_data, train__steps=4)
    train(path)
    folder = tmp_path / "runs/small"
    before = (folder / "metrics.jsonl").read_bytes()
    elsewhere = [f"checkpoint.dir={tmp_path}/elsewhere"] if how == "another checkpoint.dir" else []
    if how == "removed":
        (folder / "checkpoints").rename(tmp_path / "unmounted")
    with pytest.raises(CheckpointError, match=r"has saved step 4, and \S* holds no checkpoint: bring it back"):
        train(path, elsewhere)
    assert (folder / "metrics.jsonl").read_bytes() == before
    if how == "removed":
        (tmp_path / "unmounted").rename(folder / "checkpoints")
    assert train(path) == "already finished"


def test_a_finished_run_says_that_it_did_not_read_its_checkpoint(
    tmp_path: Path, text_data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, text_data, train__steps=2)
    train(path)
    assert train(path) == "already finished"
    assert f"megatrain checkpoint verify {tmp_path}/runs/small/checkpoints/step-00000002 does" in capfd.readouterr().err


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
