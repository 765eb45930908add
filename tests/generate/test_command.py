"""`megatrain generate`: text on standard output as it comes, facts on standard error, one sentence for a mistake."""

import json

import pytest
from click.testing import CliRunner

import megatrain
from megatrain.base.errors import UserError
from megatrain.cli.generate import command
from megatrain.generate.beam import Beam, beam_text
from megatrain.generate.load import load
from megatrain.generate.sample import generate
from tests.generate.toy import loaded, save_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_run(folder, loaded())
    return folder


def called(*words: object, text: str = ""):
    return CliRunner().invoke(command, [str(word) for word in words], input=text)


def test_prompt_and_text_are_written_and_the_speed_beside(run):
    found = called(run, "--prompt", "def ", "--max-tokens", 6, "--seed", 3, "--top-p", 0.9)
    assert found.exit_code == 0, found.output
    assert found.stdout == "def " + generate(load(run), "def ", max_tokens=6, seed=3, top_p=0.9) + "\n"
    assert "step 3: 6 tokens" in found.stderr
    assert "tokens/s, ended: max_tokens" in found.stderr


def test_json_is_an_object_a_prompt(run):
    found = called(run, "--prompt", "日", "--prompt", "x", "--json", "--max-tokens", 4, "--temperature", 0)
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["日", "x"]
    assert [row["text"] for row in rows] == generate(load(run), ["日", "x"], max_tokens=4, temperature=0)
    assert all(row["step"] == 3 and row["tokens"] <= 4 and row["tokens_per_second"] > 0 for row in rows)


def test_a_prompt_may_be_a_file_or_standard_input_or_nothing(run, tmp_path):
    (tmp_path / "prompt.txt").write_text("def \n", encoding="utf-8")
    one = called(run, "--prompt-file", tmp_path / "prompt.txt", "--max-tokens", 3)
    other = called(run, "--prompt-file", "-", "--max-tokens", 3, text="def \n")
    assert one.stdout == other.stdout
    assert one.stdout.startswith("def \n")
    assert called(run, "--max-tokens", 3).stdout == generate(load(run), "", max_tokens=3) + "\n"


def test_a_beam_search_prints_the_best_text(run):
    found = called(run, "--prompt", "def ", "--beams", 3, "--max-tokens", 4, "--json", "--length-penalty", 0.6)
    text, best = beam_text(load(run), "def ", Beam(width=3, max_tokens=4, length_penalty=0.6))
    row = json.loads(found.stdout)
    assert (row["text"], row["log_probability"]) == (text, pytest.approx(best.log_probability))


def test_a_text_longer_than_the_training_sequences_is_said(run):
    assert "the model was trained on sequences of 24" in called(run, "--max-tokens", 60, "--seed", 2).stderr
    assert "trained on" not in called(run, "--max-tokens", 3).stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--beams", 2, "--top-k", 3], "leave out --top-k"),
        (["--length-penalty", 0.5], "give --beams"),
        (["--max-tokens", "many"], "--max-tokens"),
    ],
)
def test_options_that_do_not_go_together_are_a_wrong_call(run, words, sentence):
    found = called(run, *words)
    assert found.exit_code == 2
    assert sentence in found.stderr


@pytest.mark.parametrize("words", [["--top-p", 0], ["--max-tokens", 0], ["--beams", 0], ["--temperature", -1]])
def test_a_wrong_value_is_an_error_for_users_before_anything_is_printed(run, words):
    found = called(run, "--prompt", "x", *words)
    assert isinstance(found.exception, UserError)
    assert found.stdout == ""


def test_help_has_an_example():
    assert 'megatrain generate runs/tiny --prompt "def main("' in called("--help").stdout


def test_the_public_functions_do_the_same(run):
    model = megatrain.load(run)
    assert megatrain.generate(model, "def ", max_tokens=4) == generate(load(run), "def ", max_tokens=4)


def test_a_prompt_file_that_is_no_text_is_one_sentence(run, tmp_path, monkeypatch):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 at byte 3"):
        command.main([str(run), "--prompt-file", str(tmp_path / "latin.txt")], standalone_mode=False)
    with pytest.raises(UserError, match="nowhere cannot be read"):
        command.main([str(run), "--prompt-file", str(tmp_path / "nowhere")], standalone_mode=False)
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="standard input, which is closed"):
        command.main([str(run), "--prompt-file", "-"], standalone_mode=False)
