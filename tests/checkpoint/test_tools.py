"""Looking at checkpoints, comparing them, and putting them together."""

import itertools
import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from megatrain.base.errors import CheckpointError, FailedCheckpointError
from megatrain.checkpoint.compare import diff, summaries
from megatrain.checkpoint.manifest import COMMIT, MANIFEST, digest_of
from megatrain.checkpoint.read import find, only_weights
from megatrain.checkpoint.storage import new_place
from megatrain.checkpoint.stream import average, consolidate, write_checkpoint
from megatrain.cli.checkpoint import command
from megatrain.cli.main import main
from megatrain.convert.deepspeed import to_deepspeed
from megatrain.convert.hugging_face import to_hugging_face
from tests.checkpoint.toy import SPECS, STATES, commit_of, full_tensors, ranks_of

FACTS = {"config": {"seed": 0, "model": {"d_model": 4}}, "tokenizer": "abc", "lineage": [{"step": 0}]}


def commit(folder, full, step: int = 1, layout=(2, 2, True), **facts):
    return commit_of(folder, ranks_of(full, *layout), step, state={"tokens": step}, facts=FACTS | facts)


def call(*words: str):
    return CliRunner().invoke(command, words, catch_exceptions=False)


def test_norms_are_those_of_the_full_tensors(tmp_path):
    full = full_tensors()
    full["weights", "scale"].fill_(float("inf"))
    rows = list(summaries(commit(tmp_path, full).reader(), values=True))
    assert [(row.state, row.name) for row in rows] == sorted(full)
    for row in rows:
        x = full[row.state, row.name].double()
        if row.not_finite:
            assert (row.name, row.norm, row.not_finite) == ("scale", 0.0, 1)
        else:
            assert row.norm == pytest.approx(float(x.norm()), rel=1e-12)
            assert row.largest == float(x.abs().max())


def test_names_and_shapes_are_shown_without_reading_values(tmp_path):
    commit(tmp_path, full_tensors())
    answer = json.loads(call("inspect", str(tmp_path), "--no-norms", "--json").output)
    assert len(answer["tensors"]) == len(SPECS) * len(STATES)
    assert all(row["norm"] is None for row in answer["tensors"])
    text = call("inspect", str(tmp_path), "--state", "weights").output
    assert "layers.0.attention.qkv.weight" in text
    assert "exp_avg" not in text


def test_two_layouts_of_the_same_state_are_the_same(tmp_path):
    full = full_tensors()
    commit(tmp_path / "a", full), commit(tmp_path / "b", full, layout=(1, 3, True))
    answer = call("diff", str(tmp_path / "a"), str(tmp_path / "b"))
    assert (answer.output, answer.exit_code) == ("the same\n", 0)


def test_what_differs_is_named_with_its_distance(tmp_path):
    full = full_tensors()
    other = {key: x.clone() for key, x in full.items() if key[1] != "scale"}
    other["weights", "embedding.weight"][0, 0] += 0.5
    a = commit(tmp_path / "a", full)
    b = commit_of(
        tmp_path / "b", ranks_of(other, 1, 1, False, SPECS[:-1]), 2, state={"tokens": 2},
        facts=FACTS | {"config": {"seed": 1, "model": {"d_model": 4}}},
    )  # fmt: skip
    found = {d.what: d.how for d in diff(a.reader(), b.reader())}
    assert found == {
        "config.seed": "0 in a, 1 in b",
        "state.tokens": "1 in a, 2 in b",
        "weights/embedding.weight": found["weights/embedding.weight"],
        **{f"{state}/scale": "only in a" for state in STATES},
    }
    assert found["weights/embedding.weight"].startswith("1 of 48 elements differ, by at most 0.5;")
    assert call("diff", str(tmp_path / "a"), str(tmp_path / "b")).exit_code == 1


def test_verify_names_the_damaged_file(tmp_path):
    commit(tmp_path, full_tensors())
    assert "is whole: 4 files" in call("verify", str(tmp_path)).output
    file = tmp_path / "step-00000001" / "rank-00002-000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CheckpointError, match=r"rank-00002-000.safetensors is damaged"):
        call("verify", str(tmp_path))


def test_damage_exits_1_with_the_file_named_and_a_wrong_call_2(tmp_path, capsys):
    commit(tmp_path, full_tensors())
    file = tmp_path / "step-00000001" / "rank-00001-000.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    for words, code, message in [
        (["checkpoint", "verify", str(tmp_path)], 1, "rank-00001-000.safetensors has"),
        (["checkpoint", "inspect", str(tmp_path)], 1, "rank-00001-000.safetensors has"),
        (["generate", str(tmp_path), "--prompt", "x"], 1, "rank-00001-000.safetensors has"),
        (["checkpoint", "verify", str(tmp_path / "nowhere")], 2, "holds no checkpoint"),
    ]:
        with pytest.raises(SystemExit) as end:
            main(words)
        assert (end.value.code, message in capsys.readouterr().err) == (code, True), words


def test_weights_can_be_used_though_a_moment_is_damaged_and_only_then(tmp_path):
    """What is not read need not be sound; a header always is read."""
    stored = commit(tmp_path, full_tensors(), layout=(1, 1, False)).manifest.tensors["exp_avg", "embedding.weight"]
    file = tmp_path / "step-00000001" / stored.slices[0].file
    data = bytearray(file.read_bytes())
    data[stored.slices[0].begin] ^= 1
    file.write_bytes(data)
    assert find(tmp_path, states=only_weights).step == 1
    with pytest.raises(FailedCheckpointError, match=r"exp_avg/embedding.weight has digest"):
        find(tmp_path)
    data[8] ^= 1
    file.write_bytes(data)
    with pytest.raises(FailedCheckpointError, match="its header has digest"):
        find(tmp_path, states=only_weights)


def test_every_tool_answers_in_json_where_it_is_asked_to(tmp_path):
    whole = commit(tmp_path / "a", full_tensors())
    a = str(tmp_path / "a")
    asked = {
        "inspect": ["inspect", a, "--no-norms"],
        "diff": ["diff", a, a],
        "verify": ["verify", a],
        "consolidate": ["consolidate", a, str(tmp_path / "all.safetensors")],
        "average": ["average", a, a, "--out", str(tmp_path / "soup")],
    }
    told = {name: json.loads(call(*words, "--json").output) for name, words in asked.items()}
    assert told["diff"] == []
    assert len(told["inspect"]["tensors"]) == len(SPECS) * len(STATES)
    assert told["verify"] == {
        "folder": f"{a}/step-00000001", "step": 1, "files": 4, "digest": whole.digest,
        "bytes": sum(file.bytes for file in whole.manifest.files.values()),
    }  # fmt: skip
    assert told["consolidate"]["bytes"] == (tmp_path / "all.safetensors").stat().st_size
    assert told["average"] == {"folder": str(tmp_path / "soup"), "step": 1, "of": 2,
                               "digest": find(tmp_path / "soup").digest}  # fmt: skip


def test_one_file_holds_all_weights_under_their_names(tmp_path):
    full = full_tensors()
    commit(tmp_path, full)
    out = tmp_path / "folder" / "all.safetensors"
    call("consolidate", str(tmp_path), str(out))
    found = load_file(out)
    assert found.keys() == {s.name for s in SPECS}
    assert all(torch.equal(values, full["weights", name]) for name, values in found.items())
    with pytest.raises(CheckpointError, match="exists"):
        consolidate(find(tmp_path).reader(), out)


def test_the_average_is_the_weighted_mean_of_weights_alone(tmp_path):
    states = [full_tensors(seed=seed) for seed in range(3)]
    places = [
        str(commit(tmp_path / "c", full, step).storage.root / f"step-{step:08d}") for step, full in enumerate(states)
    ]
    call("average", *places, "--out", str(tmp_path / "soup"), "--share", "1", "--share", "2", "--share", "1")
    reader = find(tmp_path / "soup").reader()
    assert reader.states() == ["weights"]
    for s in SPECS:
        x, y, z = (full["weights", s.name].double() for full in states)
        assert torch.equal(reader.read_full(s.name), ((x + 2 * y + z) / 4).float())
    assert (reader.step, reader.facts["config"]) == (2, FACTS["config"])
    assert len(reader.facts["lineage"][-1]["averaged"]) == 3


def test_an_average_of_one_is_the_same_bits(tmp_path):
    full = full_tensors()
    commit(tmp_path / "c", full)
    reader = average([tmp_path / "c"], tmp_path / "out").reader()
    assert all(torch.equal(reader.read_full(s.name), full["weights", s.name]) for s in SPECS)


def test_an_average_of_two_formats_has_the_wider_one(tmp_path):
    held = [("weights", "a", torch.tensor([1.0 + 2**-20]))]
    write_checkpoint(tmp_path / "wide", held, step=0, state=None, facts=FACTS)
    write_checkpoint(tmp_path / "narrow", [("weights", "a", torch.ones(1).bfloat16())], step=0, state=None, facts=FACTS)
    for n, order in enumerate([("wide", "narrow"), ("narrow", "wide")]):
        reader = average([tmp_path / name for name in order], tmp_path / str(n)).reader()
        assert torch.equal(reader.read_full("a"), torch.tensor([1.0 + 2**-21]))


@pytest.mark.parametrize(
    "shares",
    [[float("nan"), 1.0], [float("inf"), 1.0], [1e308, 1e308], [1.0, -1.0], [1.0, -0.9999], [1.0]],
    ids=["nan", "inf", "too large", "to 0", "next to 0", "one too few"],
)
def test_shares_that_make_no_mean_are_refused(shares, tmp_path):
    commit(tmp_path / "a", full_tensors()), commit(tmp_path / "b", full_tensors())
    with pytest.raises(CheckpointError, match=r"add up to|give each one"):
        average([tmp_path / "a", tmp_path / "b"], tmp_path / "mean", shares)
    assert not (tmp_path / "mean").exists()


@pytest.mark.parametrize("place", ["a/step-00000001/COMMIT", "a/latest", "x" * 300])
def test_what_is_no_folder_holds_no_checkpoint(place, tmp_path):
    commit(tmp_path / "a", full_tensors())
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find(tmp_path / place)


def test_a_state_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    commit(tmp_path, full_tensors())
    with pytest.raises(CheckpointError, match=r"--state bogus: .*exp_avg.*weights"):
        call("inspect", str(tmp_path), "--state", "bogus")


def test_checkpoints_of_different_models_are_not_averaged(tmp_path):
    commit(tmp_path / "a", full_tensors())
    commit_of(tmp_path / "b", ranks_of(full_tensors(), 1, 1, False, SPECS[:2]))
    with pytest.raises(CheckpointError, match="not of the same model"):
        average([tmp_path / "a", tmp_path / "b"], tmp_path / "out")


DECODER = {"kind": "decoder", "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"config": {"model": DECODER | {"n_heads": 2}}}, "model.n_heads is 2 and 4"),
        ({"config": {"model": DECODER | {"position": {"kind": "rotary", "theta": 500.0}}}}, "position.theta is 500"),
        ({"config": {"model": DECODER | {"feed_forward": {"kind": "geglu"}}}}, "feed_forward.kind is geglu"),
        ({"tokenizer": {"fingerprint": "of another"}}, "their tokenizers differ"),
    ],
    ids=["heads", "theta", "activation", "tokenizer"],
)
def test_checkpoints_of_the_same_shapes_and_another_meaning_are_not_averaged(other, words, tmp_path):
    commit(tmp_path / "a", full_tensors(), config={"model": DECODER})
    commit(tmp_path / "b", full_tensors(), **({"config": {"model": DECODER}} | other))
    with pytest.raises(CheckpointError, match=rf"not of the same model \(.*{words}"):
        average([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    same = {"model": DECODER | {"dropout": 0.5, "n_kv_heads": 4, "position": {"kind": "rotary"}}}  # its defaults
    commit(tmp_path / "c", full_tensors(), config=same)
    average([tmp_path / "a", tmp_path / "c"], tmp_path / "out")


def test_values_that_are_not_finite_are_told_apart_from_those_that_differ(tmp_path):
    full = full_tensors()
    x = full["weights", "embedding.weight"]
    x[0, 0] = float("nan")
    commit(tmp_path / "a", full), commit(tmp_path / "same", full)
    x[1, 0] = float("inf")
    x[2, 0] += 0.5
    commit(tmp_path / "b", full)
    a, b = find(tmp_path / "a").reader(), find(tmp_path / "b").reader()
    assert not list(diff(a, find(tmp_path / "same").reader()))
    (found,) = list(diff(a, b))
    assert found.how.startswith("2 of 48 elements differ, by at most 0.5;")
    assert found.how.endswith("1 of them are not finite in a or in b")


def test_a_checkpoint_written_tensor_by_tensor_has_many_files_and_all_values(tmp_path):
    full = full_tensors()

    def tensors():
        for key, values in full.items():
            yield (*key, values)

    written = write_checkpoint(tmp_path / "out", tensors(), step=3, state=None, facts={}, file_bytes=400)
    assert len(written.manifest.files) > 5
    assert written.damage() == []
    reader = find(tmp_path / "out").reader()
    assert all(torch.equal(reader.read_full(name, state), values) for (state, name), values in full.items())
    with pytest.raises(CheckpointError, match="exists"):
        write_checkpoint(tmp_path / "out", tensors(), step=3, state=None, facts={})


def test_a_streamed_checkpoint_that_fails_leaves_nothing(tmp_path):
    def tensors():
        yield "weights", "x", torch.zeros(3)
        raise ValueError("the cause")

    with pytest.raises(ValueError, match="the cause"):
        write_checkpoint(tmp_path / "out", tensors(), step=0, state=None, facts={})
    assert list(tmp_path.iterdir()) == []


WRITERS = ["average", "consolidate", "to-hf", "to-deepspeed"]
NO_PLACES = [*itertools.product(["exists", "too long", "under a file", "no name"], WRITERS)]


@pytest.mark.parametrize(("how", "command"), [*NO_PLACES, ("folder for a file", "consolidate")])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(how, command, tmp_path):
    commit(tmp_path / "run", full_tensors())
    (tmp_path / "file").write_text("mine")
    out = {
        "exists": tmp_path / "file",
        "too long": tmp_path / ("x" * 300),
        "under a file": tmp_path / "file" / "out",
        "no name": "",
        "folder for a file": f"{tmp_path}/new/",
    }[how]
    write = {
        "average": lambda: average([tmp_path / "run"], out),
        "consolidate": lambda: consolidate(find(tmp_path / "run").reader(), out),
        "to-hf": lambda: to_hugging_face(tmp_path / "run", out),
        "to-deepspeed": lambda: to_deepspeed(tmp_path / "run", out),
    }[command]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"name a new|give one of") as refused:
        write()
    assert len(str(refused.value).splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_may_not_be_written_to_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(CheckpointError, match=f"{tmp_path} may not be written to: make it writable"):
        new_place(tmp_path / "a" / "b")


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path):
    commit(tmp_path, full_tensors(), step=7)
    (tmp_path / "step-00000007").rename(tmp_path / "step-00000008")
    with pytest.raises(FailedCheckpointError, match=r"is the checkpoint of step 7 .* call it step-00000007"):
        find(tmp_path)


@pytest.mark.parametrize("fact", [{"origin": "x"}, {"lineage": 5}])
def test_facts_of_another_kind_are_refused_although_their_digest_is_right(fact, tmp_path):
    found = commit(tmp_path, full_tensors())
    folder = tmp_path / found.folder
    value = json.loads((folder / MANIFEST).read_text())
    value["facts"] |= fact
    (folder / MANIFEST).write_text(json.dumps(value))
    (folder / COMMIT).write_text(digest_of((folder / MANIFEST).read_bytes()) + "\n")
    with pytest.raises(FailedCheckpointError, match=f"its {next(iter(fact))} is"):
        find(tmp_path)


@pytest.mark.parametrize("place", ["http://127.0.0.1:9/a", "nosuch://a/b"])
def test_a_store_that_does_not_answer_is_a_sentence(place):
    with pytest.raises(CheckpointError, match=r"check the address|cannot be opened") as refused:
        find(place)
    assert len(str(refused.value).splitlines()) == 1
