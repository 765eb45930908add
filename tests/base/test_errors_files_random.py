"""Errors that say what to do, files that are whole or absent, randomness by name, devices and optional packages."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatrain.base.device import Device, cpu_threads
from megatrain.base.errors import ConfigError, DataError, LayoutError, PreemptedError, RunError, UserError, did_you_mean
from megatrain.base.files import read_json, read_json_lines, sha256_of, write_json, written_whole
from megatrain.base.optional import nvidia_apex, optional
from megatrain.base.random import generator, seed_of


def test_exit_codes_tell_a_wrong_call_from_a_failure_and_a_preemption():
    assert [e.exit_code for e in (UserError, ConfigError, LayoutError, DataError, RunError, PreemptedError)] == [
        2, 2, 2, 2, 1, 75,
    ]  # fmt: skip


def test_a_config_error_shows_every_problem():
    error = ConfigError(["first", "second"])
    assert error.problems == ["first", "second"]
    assert str(error) == "first\nsecond"


def test_suggestions_name_the_nearest_choice_only_if_one_is_near():
    assert did_you_mean("global_bach", ["global_batch", "steps"]).startswith("did you mean global_batch?")
    assert did_you_mean("zzz", ["b", "a"]) == "allowed: a, b"
    assert did_you_mean("x", []) == "nothing is allowed here"


# ------------------------------------------------------------------------------------------------ files


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "deep" / "value.json"
    write_json(path, {"b": 1, "a": [2]})
    assert read_json(path) == {"b": 1, "a": [2]}
    before = sha256_of(path)

    def fail_midway() -> None:
        with written_whole(path) as file:
            file.write("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail_midway()
    assert sha256_of(path) == before
    assert os.listdir(path.parent) == ["value.json"]


@given(st.lists(st.dictionaries(st.text(max_size=3), st.integers(), max_size=2), min_size=1, max_size=4), st.data())
def test_json_lines_survive_a_cut_at_any_byte(tmp_path_factory, rows, data):
    path = tmp_path_factory.mktemp("lines") / "metrics.jsonl"
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    cut = data.draw(st.integers(0, sum(map(len, lines))))
    path.write_bytes(b"".join(lines)[:cut])
    whole = 0
    while whole < len(lines) and sum(map(len, lines[: whole + 1])) - 1 <= cut:  # its newline may be missing
        whole += 1
    assert read_json_lines(path) == rows[:whole]


def test_damage_before_the_last_line_is_refused_by_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 is not JSON"):
        read_json_lines(path)
    assert read_json_lines(tmp_path / "none.jsonl") == []


# ------------------------------------------------------------------------------------------------ randomness


def test_a_name_always_gives_the_same_numbers():
    assert seed_of(0, "layers.0.norm.weight") == 7565205664016284145
    first = torch.rand(4, generator=generator(0, "embedding"))
    torch.manual_seed(123)  # global state has no say
    assert torch.equal(first, torch.rand(4, generator=generator(0, "embedding")))


@given(st.integers(0, 2**31), st.lists(st.text(max_size=4), max_size=3), st.lists(st.text(max_size=4), max_size=3))
def test_different_names_give_different_seeds(seed, a, b):
    separator = "\x1f"
    if any(separator in name for name in a + b):
        return
    assert (seed_of(seed, *a) == seed_of(seed, *b)) == (a == b)
    assert 0 <= seed_of(seed, *a) < 2**63


# ------------------------------------------------------------------------------------------------ device, optional


def test_the_cpu_is_a_device_like_any_other():
    device = Device.of("cpu", local_rank=3)
    assert (device.kind, device.index, device.torch, device.backend) == ("cpu", 0, torch.device("cpu"), "gloo")
    assert device.memory_bytes() > 10 * 2**20
    flops, source = device.peak_flops(torch.float32)
    assert flops > 1e6
    assert source.startswith("measured")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a card")
def test_asking_for_a_card_that_is_not_there_says_what_to_do():
    assert Device.of("auto").kind == "cpu"
    with pytest.raises(ConfigError, match=r"this node has 0 cards .* set layout.device=cpu"):
        Device.of("cuda")


def test_threads_are_shared_among_local_ranks_unless_the_user_says(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert [cpu_threads(n) for n in (1, cores, 10 * cores)] == [cores, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    assert cpu_threads(4) == 3


def test_an_absent_package_is_told_from_a_broken_one(tmp_path: Path, monkeypatch):
    (tmp_path / "broken_for_test.py").write_text("raise RuntimeError('bad build')")
    (tmp_path / "needy_for_test.py").write_text("import absent_for_test")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert optional("json").dumps([1]) == "[1]"
    assert optional("absent_for_test").why_not == "it is not installed"
    assert optional("needy_for_test").why_not == "it needs absent_for_test"
    assert "does not import (RuntimeError: bad build)" in optional("broken_for_test").why_not
    assert not optional("broken_for_test")
    with pytest.raises(ImportError, match=r"broken_for_test is not usable here: .*bad build"):
        _ = optional("broken_for_test").anything


def test_another_project_that_is_called_apex_is_not_nvidias(tmp_path: Path, monkeypatch):
    for name in ("apex", "no_extension_for_test"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "apex.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    optional.cache_clear()
    assert not nvidia_apex("no_extension_for_test")
    assert "it may be another project" in nvidia_apex("no_extension_for_test").why_not
    (tmp_path / "extension_for_test.py").write_text("answer = 42")
    assert nvidia_apex("extension_for_test").answer == 42
    optional.cache_clear()
    nvidia_apex.cache_clear()
    sys.modules.pop("apex")
