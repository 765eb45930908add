"""One wrong character in any key of a shipped configuration is refused at once, with the key that was meant."""

import random
import resource
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatrain.base.errors import ConfigError
from megatrain.train.config import read_run

ROOT = Path(__file__).parents[2]
RUNS = sorted((ROOT / "configs/run").glob("*.yaml"))


def keys(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every mapping key in a run file."""
    if isinstance(value, dict):
        return [p for k, v in value.items() for p in [(*path, k), *keys(v, (*path, k))]]
    if isinstance(value, list):
        return [p for i, v in enumerate(value) for p in keys(v, (*path, i))]
    return []


def misspelt(config: Any, path: tuple[Any, ...], rng: random.Random) -> tuple[Any, str] | None:
    """A copy of `config` with one character of the key at `path` changed, and the new key."""
    copy = yaml.safe_load(yaml.safe_dump(config))
    at = copy
    for step in path[:-1]:
        at = at[step]
    key = path[-1]
    place = rng.randrange(len(key))
    letter = rng.choice([c for c in string.ascii_lowercase if c != key[place]])
    wrong = key[:place] + letter + key[place + 1 :]
    if wrong in at:
        return None
    items = [(wrong if k == key else k, v) for k, v in at.items()]
    at.clear()
    at.update(items)
    return copy, wrong


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_every_misspelt_key_is_refused_with_its_nearest_name(path: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    config["base"] = [str((path.parent / b).resolve()) for b in config.get("base", [])]
    rng = random.Random(0)
    tried = 0
    for where in keys(config):
        for _ in range(3):
            changed = misspelt(config, where, rng)
            if changed is None:
                continue
            mistake = tmp_path / "mistake.yaml"
            mistake.write_text(yaml.safe_dump(changed[0], sort_keys=False))
            with pytest.raises(ConfigError) as refused:
                read_run(mistake)
            line = next(p for p in refused.value.problems if changed[1] in p)
            assert f"did you mean {where[-1]}" in line, line
            tried += 1
    assert tried > 50


def cpu_seconds(*arguments: str | Path) -> tuple[float, subprocess.CompletedProcess[str]]:
    """What one Python process costs, whatever else the machine does, and its answer."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, done


def test_a_misspelt_key_is_refused_for_little_more_than_the_import_of_torch(tmp_path: Path) -> None:
    text = (ROOT / "configs/run/tiny.yaml").read_text().replace("global_batch:", "global_bitch:")
    path = tmp_path / "tiny.yaml"
    path.write_text(text)
    torch_alone, _ = cpu_seconds("-c", "import torch")
    refusal, done = cpu_seconds("-m", "megatrain", "train", path)
    assert done.returncode == 2
    assert "train.global_bitch" in done.stderr
    assert "did you mean global_batch?" in done.stderr
    assert "Traceback" not in done.stderr
    assert refusal < 3 * torch_alone  # no engine, no compiler, no logger is loaded
    assert not (tmp_path / "runs").exists()


def test_a_configuration_is_checked_before_deepspeed_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from megatrain.train.run import read_run\n"
        f"read_run({str(ROOT / 'configs/run/tiny.yaml')!r})\n"
        "print(sorted(m for m in ('deepspeed', 'torchao', 'wandb', 'matplotlib') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
