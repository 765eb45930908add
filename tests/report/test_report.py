"""A run's files become one page, whatever state they are in."""

import json
import re
import threading
import urllib.error
import urllib.request
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from megatrain.base.errors import DataError
from megatrain.cli.report import command
from megatrain.report.page import page, without_secrets, write_report
from megatrain.report.run import read_run, summary
from megatrain.report.serve import server

FACTS = {
    "name": "little",
    "run_id": "r1",
    "parameters": 1_234_567,
    "ranks": 2,
    "mesh": {"pp": 1, "dp": 2, "cp": 1, "tp": 1},
    "engine": "deepspeed",
    "zero": 1,
    "device": "CPU",
    "compute": "fp32",
    "total_steps": 40,
    "peak_source": "measured: a square product timed at start",
    "revision": "0123abc",
    "versions": {"megatrain": "0.1.0", "torch": "2.13.0"},
}


def step(n: int, **values: Any) -> dict[str, Any]:
    row = {"step": n, "tokens": 100 * n, "loss": 5 / n, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 1000.0 + n}
    row |= {"step_seconds": 0.1, "data_seconds": 0.01, "mfu": 0.25, "mfu_palm": 0.3, "memory_gib": 0.5 + n / 100}
    return row | {"skipped": 0} | values


EVENTS = [
    {"time": 1000.0, "step": 0, "kind": "started", "facts": FACTS},
    {"time": 1001.0, "step": 0, "kind": "evaluated", "held_out_loss": 6.0, "bits_per_byte": 3.0},
    {"time": 1002.0, "step": 20, "kind": "saved", "asynchronous": True},
    {"time": 1003.0, "step": 20, "kind": "preempted"},
    {"time": 1004.0, "step": 20, "kind": "resumed", "facts": FACTS},
    {"time": 1005.0, "step": 30, "kind": "spike", "loss": 9.5},
    {"time": 1006.0, "step": 40, "kind": "finished"},
]
CONFIG = (
    "name: little\nseed: 3\ndata:\n  sources:\n  - path: s3://me:canary1@host/x?sig=canary2\nlog:\n  api_key: canary3\n"
)


@pytest.fixture
def run_folder(tmp_path: Path):
    """Writes a run of 40 steps, with parts replaced where the test says so."""

    def make(steps=None, events=None, config: str | None = CONFIG) -> Path:
        folder = tmp_path / "little"
        folder.mkdir(exist_ok=True)
        if steps is None:
            steps = [step(n) for n in range(1, 41)]
            steps[24]["skipped"] = 1
            steps[39] |= {"held_out_loss": 2.5, "bits_per_byte": 1.2}
        lines = [json.dumps(row) + "\n" for row in steps]
        (folder / "metrics.jsonl").write_text("".join(lines))
        events = EVENTS if events is None else events
        (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        if config is not None:
            (folder / "config.yaml").write_text(config)
        return folder

    return make


def drawings(text: str) -> list[ElementTree.Element]:
    """The charts of a page, parsed."""
    return [
        ElementTree.fromstring(svg)
        for svg in re.findall(r"<svg viewBox=.*?</svg><line class=\"cursor\"[^>]*/></svg>", text)
    ]


def titles(text: str) -> list[str]:
    return [svg.attrib["aria-label"] for svg in drawings(text)]


def test_a_run_becomes_one_file_that_needs_no_network(run_folder):
    path = write_report(run_folder())
    assert path.name == "report.html"
    text = path.read_text()
    assert not re.search(r"(src|href)\s*=|@import|url\(|fetch\(", text)
    assert "http://" not in text
    assert '<meta name="viewport"' in text
    assert titles(text) == [
        "Loss, nats a token", "Loss, nats a token", "Learning rate", "Gradient norm", "Tokens per second", "MFU, %",
        "Peak memory, GiB", "Waiting for data, % of the step",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "fact",
    [
        "little", "finished", "step 40 of 40", "6.000 → 2.500", "3.000 → 1.200", "6.0000 before, 2.5000 now",
        "1,234,567", "4,000", "2 x CPU", "dp=2", "deepspeed, ZeRO 1", "measured: a square product timed at start",
        "0123abc", "2.13.0", "seed: 3", "spike at step 30: loss 9.5", "resumed at step 20", "25.0%",
    ],
)  # fmt: skip
def test_the_page_states(run_folder, fact):
    assert fact in page(read_run(run_folder()))


def test_events_are_marked_where_they_happened(run_folder):
    wide = drawings(page(read_run(run_folder())))[0]
    marks = {m.attrib["class"].split()[-1]: m for m in wide.iter("line") if m.attrib["class"].startswith("mark")}
    assert set(marks) == {"saved", "preempted", "resumed", "skipped", "spike"}
    assert marks["skipped"].find("title").text == "step 25 skipped"
    assert (
        float(marks["resumed"].attrib["x1"]) < float(marks["skipped"].attrib["x1"]) < float(marks["spike"].attrib["x1"])
    )
    assert marks["resumed"].attrib["x1"] == marks["preempted"].attrib["x1"]


def test_a_summary_is_what_the_files_say(run_folder):
    found = summary(read_run(run_folder()))
    assert found["step"] == 40
    assert found["loss"] == 5 / 40
    assert (found["held_out_loss_first"], found["held_out_loss_last"]) == (6.0, 2.5)
    assert (found["bits_per_byte_first"], found["bits_per_byte_last"]) == (3.0, 1.2)
    assert found["tokens_per_second"] == 1022.5  # the median of steps 5 to 40
    assert found["memory_gib"] == 0.9
    assert found["skipped"] == 1
    assert found["outcome"] == "finished"


@pytest.mark.parametrize(
    ("kinds", "outcome"),
    [
        (["started"], "running"),
        (["started", "saved"], "running"),
        (["started", "preempted"], "preempted"),
        (["started", "failed", "resumed"], "running"),
        (["started", "resumed", "finished"], "finished"),
        ([], "running"),
    ],
)
def test_the_outcome_is_that_of_the_last_start(run_folder, kinds, outcome):
    run = read_run(run_folder(events=[{"step": 1, "kind": kind} for kind in kinds]))
    assert run.outcome == outcome
    assert f'badge {outcome}">' in page(run)


# ------------------------------------------------------------------------------------------------ files that lack


def test_a_line_cut_by_a_crash_is_left_out(run_folder):
    folder = run_folder()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "loss": 0.')
    assert read_run(folder).steps[-1]["step"] == 40


def test_a_folder_that_is_no_run_is_one_sentence(run_folder, tmp_path):
    with pytest.raises(DataError, match=r"there is no run folder .*nowhere"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no step of a run"):
        read_run(run_folder(steps=[]))
    with pytest.raises(DataError, match=r"config\.yaml is not YAML"):
        read_run(run_folder(config="a: ["))
    (folder := run_folder()).joinpath("metrics.jsonl").write_text('{"step": 1}\nbroken\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 is not JSON"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_one_step_and_nothing_else_still_makes_a_page(run_folder):
    text = page(read_run(run_folder(steps=[{"step": 1, "loss": 3.0}], events=[], config=None)))
    assert titles(text) == ["Loss, nats a token"] * 2
    assert "Configuration" not in text


def test_numbers_that_are_not_finite_leave_gaps_and_do_no_harm(run_folder):
    steps = [step(n) for n in range(1, 11)]
    steps[3]["loss"] = float("nan")
    steps[4]["grad_norm"] = float("inf")
    steps[9]["loss"] = None
    run = read_run(run_folder(steps=steps))
    assert [n for n, _ in run.points("loss")] == [1, 2, 3, 5, 6, 7, 8, 9]
    text = page(run)
    assert "not finite" in text
    assert not re.search(r'points="[^"]*(nan|inf)', text)


def test_words_from_files_cannot_become_markup(run_folder):
    evil = "<script>alert(1)</script>\"'"
    events = [EVENTS[0], {"time": 1.0, "step": 1, "kind": evil, "text": evil}]
    text = page(read_run(run_folder(events=events, config=f"name: \"{evil[:25]}\"\nnote: '{evil[:25]}'\n")))
    assert text.count("<script>") == 1  # our own
    assert "&lt;script&gt;alert(1)" in text


# ------------------------------------------------------------------------------------------------ size and secrets


def test_a_run_of_many_steps_stays_a_small_page(run_folder):
    steps = [step(n) for n in range(1, 8001)]
    steps[4321]["loss"] = 77.0
    events = [{"time": float(n), "step": n, "kind": "saved"} for n in range(1, 8001)]
    path = write_report(run_folder(steps=steps, events=events))
    assert path.stat().st_size < 500_000
    wide = json.loads(drawings(path.read_text())[0].attrib["data-curves"])
    assert [4322, 77.0] in wide[0]["points"]  # a spike of one step is not thinned away


def test_secrets_of_the_configuration_are_not_shown(run_folder):
    text = page(read_run(run_folder()))
    assert "canary" not in text
    assert "api_key: (hidden)" in text
    assert "s3://(hidden)@host/x?(hidden)" in text


def test_ordinary_keys_are_not_taken_for_secrets():
    text = "tokens: 5\ntokenizer: a/b.json\nsecretary: x\npath: https://host/a/b"
    assert without_secrets(text) == text


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_writes_the_page_and_says_where(run_folder):
    folder = run_folder()
    result = CliRunner().invoke(command, [str(folder)])
    assert result.exit_code == 0, result.output
    assert result.output.strip() == str(folder / "report.html")
    assert Path(result.output.strip()).exists()


def test_the_command_prints_figures_for_machines(run_folder):
    result = CliRunner().invoke(command, [str(run_folder()), "--json"])
    assert json.loads(result.output)["held_out_loss_last"] == 2.5


def test_a_served_page_is_drawn_anew_each_time(run_folder):
    folder = run_folder()
    with server(folder) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            url = f"http://127.0.0.1:{http.server_address[1]}/"
            with urllib.request.urlopen(url) as answer:
                assert b"step 40 of 40" in answer.read()
            run_folder(steps=[step(1)])
            with urllib.request.urlopen(url) as answer:
                assert b"step 1 of 40" in answer.read()
            run_folder(steps=[])
            for path, code in (("", 503), ("../config.yaml", 404)):
                with pytest.raises(urllib.error.HTTPError) as caught:
                    urllib.request.urlopen(url + path)
                assert caught.value.code == code
                caught.value.close()
        finally:
            http.shutdown()
            thread.join()
