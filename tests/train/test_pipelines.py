"""Runs whose model is cut into pipeline stages: the loop, evaluation, checkpoints and resuming know no difference."""

from pathlib import Path

import pytest
from safetensors import safe_open

from megatrain.train.run import train
from tests.ranks import RankError, run
from tests.train.small import events, metrics, on_ranks, write_run

PIPED = ("layout.pp=2", "layout.schedule=zbv", "checkpoint.async=false")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, text_data: Path) -> str:
    return str(write_run(tmp_path_factory.mktemp("pipelines"), text_data, model__n_layers=4, model__dropout=0.1))


@pytest.fixture(scope="module")
def straight(path: str) -> Path:
    """The same run in one process."""
    train(path, ["name=straight"])
    return Path(path).parent / "runs/straight"


def assert_same_run(found: Path, expected: Path) -> None:
    lines, others = metrics(found), metrics(expected)
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for key in ("loss", "grad_norm", "held_out_loss", "tokens"):
        assert [line.get(key) for line in lines] == [
            pytest.approx(line[key], rel=2e-4) if key in line else None for line in others
        ], key


def test_a_pipeline_stopped_and_resumed_in_one_process_is_the_same_run(path: str, straight: Path) -> None:
    with pytest.raises(RankError, match="exit code -9"):
        run(on_ranks, 2, path, ("name=to-one", *PIPED), (1, 9))
    folder = Path(path).parent / "runs/to-one"
    (started,) = events(folder, "started")
    assert started["facts"]["mesh"]["pp"] == 2
    assert sum(started["facts"]["stages"]) == 4
    assert started["facts"]["parameters"] == events(straight, "started")[0]["facts"]["parameters"]
    train(path, ["name=to-one"])
    assert [e["step"] for e in events(folder, "resumed")] == [6]
    assert_same_run(folder, straight)


def test_one_process_resumed_as_a_pipeline_under_zero_is_the_same_run(path: str, straight: Path) -> None:
    with pytest.raises(RankError, match="exit code -9"):
        run(on_ranks, 1, path, ("name=to-many", "checkpoint.async=false"), (0, 9))
    run(on_ranks, 4, path, ("name=to-many", "layout.pp=2", "layout.schedule=interleaved", "layout.zero=1"))
    folder = Path(path).parent / "runs/to-many"
    assert [e["step"] for e in events(folder, "resumed")] == [6]
    assert_same_run(folder, straight)


def test_a_checkpoint_of_a_pipeline_has_each_tensor_once(path: str, straight: Path) -> None:
    """The copy of the tied embedding on the last stage is not among them."""
    run(on_ranks, 2, path, ("name=once", "layout.pp=2", "train.steps=2", "checkpoint.every=2"))

    def elements(folder: Path, step: int) -> dict[str, int]:
        found: dict[str, int] = {}
        for file in sorted((folder / f"checkpoints/step-{step:08d}").glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (it is no mapping)
                    name = key.split("@")[0]
                    found[name] = found.get(name, 0) + opened.get_tensor(key).numel()
        return found

    assert elements(Path(path).parent / "runs/once", 2) == elements(straight, 12)
