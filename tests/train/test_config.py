"""The run file as a whole: its length, and what may be shown of it."""

from pathlib import Path

import yaml

from megatrain.train.config import read_run
from megatrain.train.run import train
from tests.train.small import metrics, write_run


def test_a_budget_of_tokens_is_rounded_up_to_whole_steps(tmp_path: Path) -> None:
    path = write_run(tmp_path, tmp_path, train__steps=None, train__tokens="1000 tokens")
    assert read_run(path).run.total_steps == 4  # 256 tokens a step


def test_a_curriculum_of_lengths_counts_the_tokens_of_each_step(tmp_path: Path, text_data: Path) -> None:
    stages = [{"after": 0, "seq_len": 16}, {"after": 256, "seq_len": 32}]
    path = write_run(
        tmp_path, text_data, data__curriculum=stages, train__steps=None, train__tokens=768, schedule__warmup=1
    )
    assert read_run(path).run.total_steps == 4
    train(path)
    assert [line["tokens"] for line in metrics(tmp_path / "runs/small")] == [128, 256, 512, 768]


def test_passwords_in_addresses_are_not_shown(tmp_path: Path) -> None:
    path = write_run(tmp_path, tmp_path, data__sources=[{"path": "https://me:canary@host/data?key=canary"}])
    run = read_run(path).run
    assert "canary" in run.data.sources[0].path
    assert "canary" not in yaml.safe_dump(run.shown())
    assert run.shown()["data"]["sources"][0]["path"] == "https://host/data"
