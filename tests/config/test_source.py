"""Files and words merged into one tree that knows where each value was written."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatrain.base.errors import ConfigError
from megatrain.config.source import dump, read


@pytest.fixture
def tree(tmp_path: Path):
    """Reads a run file from its text, with other files by name, and `key=value` words."""

    def make(text: str, *words: str, **files: str):
        for name, body in files.items():
            path = tmp_path / f"{name}.yaml"
            path.write_text(body)
        (tmp_path / "run.yaml").write_text(text)
        return read(tmp_path / "run.yaml", words)

    return make


def refusal(tree, text: str, *words: str, **files: str) -> str:
    with pytest.raises(ConfigError) as caught:
        tree(text, *words, **files)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ scalars


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1", 1), ("-3", -3), ("1_000", 1000), ("010", 10), ("08", 8), ("+4", 4),
        ("1.5", 1.5), ("1e-4", 1e-4), ("1E6", 1e6), (".5", 0.5), ("2.", 2.0),
        ("-1.5e+3", -1500.0), (".inf", float("inf")),
        ("true", True), ("false", False), ("null", None), ("~", None), ("", None),
        ("yes", "yes"), ("on", "on"), ("no", "no"), ("True", "True"), ("1:30", "1:30"), ("2020-01-01", "2020-01-01"),
        ("4B tokens", "4B tokens"), ("80GiB", "80GiB"), ("0x10", "0x10"), ("=", "="), ("e5", "e5"), ("1e", "1e"),
        ("'1'", "1"), ('"true"', "true"), ("1.2.3", "1.2.3"),
    ],
)  # fmt: skip
def test_scalars_are_read_as_yaml_1_2(tree, written, value):
    for found in (tree(f"key: {written}").value["key"].value, tree("", f"key={written}").value["key"].value):
        assert found == value
        assert type(found) is type(value)


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
_KEYS = st.from_regex(r"[a-z_]{1,6}", fullmatch=True)
_VALUES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3), max_leaves=8
)


@given(st.dictionaries(_KEYS, _VALUES, max_size=4))
def test_what_is_dumped_is_read_back_the_same(tmp_path_factory, value):
    value.pop("base", None)
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump(value), encoding="utf-8")
    assert repr(read(path).plain()) == repr(value)  # repr tells 1 from 1.0 from true


@pytest.mark.parametrize(
    "text", ["1e-4", "010", "yes", "${oc.env:HOME}", "a ${b} c", "null", "", " x", "<<", "1:30", "é\n#"]
)
def test_texts_that_look_like_something_else_stay_texts(tmp_path, text):
    (tmp_path / "config.yaml").write_text(dump({"key": text}))
    assert read(tmp_path / "config.yaml").plain() == {"key": text}


# ------------------------------------------------------------------------------------------------ origins and merging


def test_each_value_knows_its_file_and_line(tree, tmp_path):
    root = tree(
        "base: under.yaml\ntrain:\n  steps: 3\n", "train.eval_every=5", under="seed: 1\ntrain:\n  steps: 2\n  keep: 1\n"
    )
    assert root.value["seed"].origin == f"{tmp_path}/under.yaml:1"
    train = root.value["train"].value
    assert train["steps"].origin == f"{tmp_path}/run.yaml:3"
    assert train["keep"].origin == f"{tmp_path}/under.yaml:4"
    assert train["eval_every"].origin == "command line"
    assert root.plain() == {"seed": 1, "train": {"steps": 3, "keep": 1, "eval_every": 5}}


def test_later_bases_win_over_earlier_and_the_file_over_both(tree):
    files = {"one": "a: 1\nb: 1\nc: 1\n", "two": "b: 2\nc: 2\n"}
    assert tree("base: [one.yaml, two.yaml]\nc: 3\n", **files).plain() == {"a": 1, "b": 2, "c": 3}


def test_a_base_is_found_from_the_file_that_names_it(tree, tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "model.yaml").write_text("base: size.yaml\n")
    (tmp_path / "parts" / "size.yaml").write_text("d_model: 8\n")
    assert tree("base: [parts/model.yaml]\n").plain() == {"d_model": 8}


BASE = "norm: {kind: rms, eps: 1}\nlayers: [1, 2]\n"


@pytest.mark.parametrize(
    ("over", "merged"),
    [
        ("norm: {eps: 2}", {"kind": "rms", "eps": 2}),
        ("norm: {kind: rms, eps: 2}", {"kind": "rms", "eps": 2}),
        ("norm: {kind: rms}", {"kind": "rms", "eps": 1}),
        ("norm: rms", {"kind": "rms", "eps": 1}),
        ("norm: {kind: layer, bias: true}", {"kind": "layer", "bias": True}),
        ("norm: layer", {"kind": "layer"}),
        ("norm: null", None),
    ],
)
def test_a_new_kind_replaces_its_mapping_and_the_same_kind_merges(tree, over, merged):
    assert tree(f"base: under.yaml\n{over}\n", under=BASE).plain()["norm"] == merged


def test_a_bare_word_below_a_mapping_is_its_kind(tree):
    assert tree("base: under.yaml\nnorm: {eps: 2}\n", under="norm: rms\n").plain() == {
        "norm": {"kind": "rms", "eps": 2}
    }


def test_lists_are_replaced(tree):
    assert tree("base: under.yaml\nlayers: [3]\n", under=BASE).plain()["layers"] == [3]


# ------------------------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["norm.eps=2"], "norm", {"kind": "rms", "eps": 2}),
        (["norm.kind=layer"], "norm", {"kind": "layer"}),
        (["norm.kind=rms"], "norm", {"kind": "rms", "eps": 1}),
        (["norm=layer"], "norm", {"kind": "layer"}),
        (["norm.eps=2", "norm.kind=layer"], "norm", {"kind": "layer", "eps": 2}),  # the order of words is no trap
        (["norm.kind=layer", "norm.eps=2"], "norm", {"kind": "layer", "eps": 2}),
        (["layers.1=9"], "layers", [1, 9]),
        (["layers=[]"], "layers", []),
        (["layers.0={kind: a}", "layers.0.b=1"], "layers", [{"kind": "a", "b": 1}, 2]),
        (["new.deep.key=x"], "new", {"deep": {"key": "x"}}),
        (["seed="], "seed", None),
        (["seed= # nothing"], "seed", None),
        (["text=a=b"], "text", "a=b"),
    ],
)
def test_words_of_the_command_line_change_one_place(tree, words, key, value):
    assert tree(BASE, *words).plain()[key] == value


def test_a_bare_word_takes_further_keys_from_the_command_line(tree):
    assert tree("norm: rms\n", "norm.eps=2").plain() == {"norm": {"kind": "rms", "eps": 2}}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("seed", "'seed' is not key=value: write for example train.steps=100"),
        ("=1", "'=1' is not key=value"),
        ("a..b=1", "'a..b=1' is not key=value"),
        ("layers.2=1", "layers.2=1: '2' is not an element of the list at"),
        ("layers.x.y=1", "(allowed: 0 to 1)"),
        ("seed={", "command line"),
    ],
)
def test_words_that_make_no_sense_are_refused(tree, word, message):
    assert message in refusal(tree, BASE, word)


# ------------------------------------------------------------------------------------------------ interpolation


def test_interpolations_keep_type_and_place(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("MEGATRAIN_TEST_WORD", "here")
    text = "a: 3\nb: ${a}\nc: ${d}\nd: [1, 2]\ne: at ${oc.env:MEGATRAIN_TEST_WORD}\n"
    root = tree(text, "a=4")
    assert root.plain() == {"a": 4, "b": 4, "c": [1, 2], "d": [1, 2], "e": "at here"}
    assert root.value["b"].origin == f"{tmp_path}/run.yaml:2"


@pytest.mark.parametrize("text", ["a: ${a}", "a: ${b}\nb: ${a}", "a: ${nowhere}", "a: ${", "a: ${no_resolver:1}"])
def test_interpolations_that_lead_nowhere_are_refused(tree, text):
    message = refusal(tree, text)
    assert "interpolat" in message
    assert "Traceback" not in message


# ------------------------------------------------------------------------------------------------ files that are wrong


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "run.yaml:3: the key 'a' stands twice (first at {here}/run.yaml:1): keep one"),
        ("a: {b: 1, b: 2}", "the key 'b' stands twice"),
        ("a: [1\n", "is not YAML"),
        ("a: 1\n--- \nb: 2\n", "is not YAML"),
        ("- 1\n", "must hold keys and values, not a single list"),
        ("a: &x {b: *x}\n", "an alias refers to what holds it"),
        ("a: &x {b: 1}\nc: {<<: *x}\n", "merge key << is not read"),
        ("[a]: 1\n", "a key must be a word"),
        ("a: !!python/object:os.system x\n", "cannot be read"),
        ("base: run.yaml\n", "includes itself through base"),
        ("base: absent.yaml\n", "there is no run file {here}/absent.yaml (named by base in {here}/run.yaml)"),
        ("base: [{a: 1}]\n", "must list the paths of run files"),
        ("base:\n", "must list the paths of run files"),
    ],
)
def test_broken_files_are_refused_with_their_line(tree, tmp_path, text, message):
    assert message.format(here=tmp_path) in refusal(tree, text)


def test_bases_that_include_each_other_are_refused(tree):
    message = refusal(tree, "base: one.yaml\n", one="base: two.yaml\n", two="base: one.yaml\n")
    assert "includes itself through base" in message
    assert "one.yaml -> " in message


def test_paths_that_are_no_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no run file"):
        read(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        read(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "binary.yaml")


def test_an_empty_file_is_an_empty_run(tree):
    assert tree("").plain() == {}
    assert tree("# only words\n").plain() == {}


@given(st.text())
def test_any_text_is_read_or_refused_but_never_crashes(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("any") / "run.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        yaml.safe_dump(read(path).plain())
    except ConfigError as error:
        assert error.problems  # noqa: PT017
