"""Cleaning finds what was planted, leaves the rest alone, and accounts for every document."""

import json
from pathlib import Path

import numpy as np
import pytest
import zstandard
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.base.errors import ConfigError, DataError
from megatrain.base.files import sha256_of
from megatrain.cli.data import command
from megatrain.data.build import BuildOptions, build
from megatrain.data.clean import CleanOptions, clean
from megatrain.data.compression import read_whole
from megatrain.data.contamination import Benchmarks
from megatrain.data.duplicates import bands, signature
from megatrain.data.quality import RULE, first_broken, parse_rule
from megatrain.data.shards import Shard
from megatrain.data.words import gram_hashes, sentences, word_hashes, words

VOCABULARY = [f"{a}{b}" for a in "bcdfglmnprst" for b in ("ane", "olt", "ip", "eft", "une", "ast", "im", "ork")]


def prose(seed: int, length: int = 150) -> list[str]:
    return np.random.default_rng(seed).choice(VOCABULARY, size=length).tolist()


def write(path: Path, documents: dict[str, str]) -> Path:
    lines = (json.dumps({"id": id, "text": text}) for id, text in documents.items())
    path.write_text("\n".join(lines))
    return path


def run(tmp_path: Path, documents: dict[str, str], **options) -> tuple[list[str], dict[str, tuple[str, str]]]:
    """Ids kept, and reason and detail of the others."""
    path = write(tmp_path / "in.jsonl", documents)
    clean(CleanOptions((path,), tmp_path / "out", reading={"id_field": "id"}, **options))
    kept = [json.loads(line)["id"] for line in _kept_lines(tmp_path / "out")]
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert sorted([*kept, *(row["id"] for row in dropped)]) == sorted(documents)  # each once
    return kept, {row["id"]: (row["reason"], row["detail"]) for row in dropped}


def _kept_lines(folder: Path) -> list[bytes]:
    return [line for path in sorted(folder.glob("kept/*.jsonl.zst")) for line in read_whole(path).splitlines()]


# ------------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The CAT's hat—ﬁne!", ["the", "cat", "s", "hat", "fine"]),
        ("Straße ＡＢＣ", ["strasse", "abc"]),
        ("我爱北京 and スシ", ["我", "爱", "北", "京", "and", "ス", "シ"]),
        ("snake_case, x_1", ["snake", "case", "x", "1"]),
        (" \n", []),
    ],
)
def test_words_have_one_form(text, expected):
    assert words(text) == expected


def test_sentences_end_at_stops_and_blank_lines_and_not_in_numbers():
    found = [s.strip() for s in sentences("Pi is 3.14. True?\n\nYes! 是。否")]
    assert list(filter(None, found)) == [
        "Pi is 3.14",
        "True",
        "Yes",
        "是",
        "否",
    ]


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 6))
@settings(deadline=None)
def test_runs_of_words_have_equal_numbers_exactly_when_they_are_equal(found, n):
    runs = [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
    numbers = gram_hashes(word_hashes(found), n).tolist()
    assert len(numbers) == len(runs)
    assert len(set(numbers)) == len(set(runs)) == len(set(zip(numbers, runs, strict=True)))


# ------------------------------------------------------------------------------------------------ rules

PROSE = (
    "It was late when we came down to the harbour, and the boats that had been out since dawn were tied up already. "
    "Nobody spoke of the storm. An old man with a lantern counted ropes, and children carried baskets to their "
    "mothers, who would have to sort fish until midnight. We sat on a wall, ate bread, and looked at the far lights."
)

BROKEN = {
    "gopher_quality.min_words": " ".join(PROSE.split()[:49]),
    "gopher_quality.min_mean_length": "to be of a " * 30,
    "gopher_quality.max_mean_length": "the incomprehensibilities of antidisestablishmentarianism and counterrevolution "
    * 10,
    "gopher_quality.max_symbols": PROSE + " #tag" * 12,
    "gopher_quality.max_bullets": "\n".join(f"- {part} and more words to fill this line" for part in PROSE.split(", ")),
    "gopher_quality.max_ellipses": "\n".join(
        f"{part} and more words to fill this line..." for part in PROSE.split(", ")
    ),
    "gopher_quality.min_alphabetic": PROSE + " 1234" * 30,
    "gopher_quality.min_stop_words": " ".join(prose(0)),
    "gopher_repetition.max_lines": "\n".join(["a line of text", "another line of it", *(["menu"] * 3)]),
    "gopher_repetition.max_paragraphs": "\n".join(prose(6, 20)) + "\n\nmenu" * 4,
    "gopher_repetition.max_line_characters": "\n".join([*prose(1, 10), *([" ".join(prose(2, 12))] * 2)]),
    "gopher_repetition.max_top_2": " ".join(f"spam eggs {word}" for word in prose(3, 40)),
    "gopher_repetition.max_repeated_5": " ".join(prose(4, 40) + prose(5, 30) + prose(4, 40)[:20]),
    "c4.max_braces": PROSE + " { }",
    "c4.max_placeholders": PROSE + " Lorem ipsum dolor.",
    "c4.min_sentences": "One sentence. And another",
}


@pytest.mark.parametrize("reason", BROKEN)
def test_each_limit_drops_what_breaks_it(reason):
    drop = first_broken([parse_rule(reason.split(".")[0])], BROKEN[reason])
    assert drop is not None
    assert drop.reason == reason


def test_prose_breaks_no_rule():
    for kind in RULE.kinds():
        assert first_broken([parse_rule(kind)], PROSE) is None


def test_a_limit_is_not_broken_by_reaching_it():
    exactly = " ".join(PROSE.split()[:50])
    assert first_broken([parse_rule("gopher_quality")], exactly) is None
    assert first_broken([parse_rule("gopher_quality:min_words=51")], exactly).detail == "50 words"


@given(st.lists(st.sampled_from("ab"), max_size=24), st.integers(2, 5))
@settings(deadline=None)
def test_characters_in_repeated_runs_are_counted_once(found, n):
    from megatrain.data.rules.gopher_repetition import _in_repeated_runs

    runs = [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
    inside = {i + k for i, run in enumerate(runs) if run in runs[:i] for k in range(n)}
    assert _in_repeated_runs(found, n) == len(inside) / max(1, len(found))


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("gopher", "did you mean gopher_"),
        ("c4:min_sentense=3", "did you mean min_sentences"),
        ("c4:min_sentences=few", "min_sentences='few' is no int"),
    ],
)
def test_a_rule_that_is_none_is_refused(tmp_path, rule, says):
    with pytest.raises(ConfigError, match=says):
        run(tmp_path, {"a": "text"}, rules=(rule,))


def test_drops_are_counted_by_rule(tmp_path):
    documents = {"good": PROSE, "short": "too short", "braces": PROSE + "{", "also": "short too"}
    kept, dropped = run(tmp_path, documents, rules=("gopher_quality", "c4"), near=0)
    assert kept == ["good"]
    assert dropped["braces"] == ("c4.max_braces", "1 braces")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["dropped"] == {"gopher_quality.min_words": 2, "c4.max_braces": 1}


# ------------------------------------------------------------------------------------------------ duplicates


def test_the_first_of_equal_documents_is_kept(tmp_path):
    kept, dropped = run(tmp_path, {"a": "same text", "b": "other text", "c": "same text\n", "d": "Same text"}, near=0)
    assert kept == ["a", "b", "d"]
    assert dropped == {"c": ("duplicate", "of a")}


def test_near_copies_are_found_and_unlike_documents_are_kept(tmp_path):
    pytest.importorskip("datasketch")
    documents = {f"{i}": " ".join(prose(i)) for i in range(40)}
    for i in range(40):
        changed = prose(i)
        changed[i % 150], changed[(i + 70) % 150] = "another", "word"  # at most 10 of 146 runs are others
        documents[f"{i} again"] = " ".join(changed).upper() + "!"
    kept, dropped = run(tmp_path, documents, near=0.8)
    assert kept == [f"{i}" for i in range(40)]
    assert {id: detail.split(",")[0] for id, (_, detail) in dropped.items()} == {
        f"{i} again": f"of {i}" for i in range(40)
    }
    assert {reason for reason, _ in dropped.values()} == {"near duplicate"}


def test_signatures_estimate_the_resemblance():
    pytest.importorskip("datasketch")
    for kept in (0, 60, 120, 150):
        one, other = prose(1), prose(1)[:kept] + prose(2)[kept:]
        sets = [set(zip(*(text[k:] for k in range(5)), strict=False)) for text in (one, other)]
        resemblance = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        estimate = (signature(word_hashes(one)) == signature(word_hashes(other))).mean()
        assert abs(estimate - resemblance) <= 4 * np.sqrt(resemblance * (1 - resemblance) / 128)


@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_bands_bring_up_pairs_at_the_threshold(threshold):
    count, rows = bands(threshold)
    assert count * rows <= 128
    assert (1 - threshold**rows) ** count < 0.01


# ------------------------------------------------------------------------------------------------ evaluation sets


def disguised(sentence: list[str], how: int) -> str:
    return [
        " ".join(sentence),
        " ".join(sentence).upper() + "!",
        ",\n  ".join(sentence),
        " ".join(word.capitalize() for word in sentence) + ".",
        "«" + "—".join(sentence) + "»",
    ][how % 5]


def test_every_planted_sentence_is_found_whatever_its_length_and_looks(tmp_path):
    questions = [prose(1000 + i, length=6 + i % 30) for i in range(100)]
    lines = [
        json.dumps({"question": " ".join(q) + "?", "choices": ["yes", " ".join(prose(5000 + i))]})
        for i, q in enumerate(questions)
    ]
    (tmp_path / "eval.jsonl").write_text("\n".join(lines))
    documents = {f"clean {i}": " ".join(prose(i)) for i in range(100)}
    for i, question in enumerate(questions):
        around = prose(2000 + i)
        planted = [*around[: i + 1], disguised(question, i), *around[i + 1 :]]
        documents[f"planted {i}"] = " ".join(planted)
    kept, dropped = run(tmp_path, documents, against=(tmp_path / "eval.jsonl",), near=0)
    assert kept == [f"clean {i}" for i in range(100)]
    assert {reason for reason, _ in dropped.values()} == {"contaminated"}
    items = {id: detail.split(": ")[0] for id, (_, detail) in dropped.items()}
    assert items == {f"planted {i}": f"eval.jsonl:{i + 1}" for i in range(100)}


@given(begin=st.integers(0, 27), place=st.integers(0, 50), shorter=st.booleans())
@settings(deadline=None)
def test_a_run_of_n_words_is_found_anywhere_and_one_less_is_not(begin, place, shorter):
    item = prose(1, length=40)
    passage = item[begin : begin + 13 - shorter]
    document = [*(f"x{i}" for i in range(place)), *passage, *(f"y{i}" for i in range(50 - place))]
    hit = Benchmarks([("item", " ".join(item))]).find(document, word_hashes(document))
    assert (hit is None) == shorter


def test_a_sentence_below_the_shortest_is_anyones():
    found = Benchmarks([("item", "It is what it is. We shall see about that tomorrow.")], shortest=6)
    assert len(found) == 1
    for text, item in (("it is what it is", None), ("We shall see about that, tomorrow", "item")):
        hit = found.find(words(text), word_hashes(words(text)))
        assert (hit and hit.item) == item


def test_an_evaluation_set_with_nothing_to_look_for_is_refused(tmp_path):
    (tmp_path / "eval.jsonl").write_text('{"text": "too short"}')
    with pytest.raises(DataError, match="hold no sentence of 6 words"):
        run(tmp_path, {"a": "text"}, against=(tmp_path / "eval.jsonl",))
    (tmp_path / "eval.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"line 1 of the evaluation set .* is not JSON"):
        run(tmp_path, {"a": "text"}, against=(tmp_path / "eval.jsonl",))


# ------------------------------------------------------------------------------------------------ the whole


def test_the_number_of_workers_changes_nothing(tmp_path):
    documents = {f"{i}": " ".join(prose(i % 30)) for i in range(60)}
    path = write(tmp_path / "in.jsonl", documents)
    for workers in (1, 2):
        out = tmp_path / f"out-{workers}"
        clean(CleanOptions((path,), out, near=0, reading={"chunk_bytes": 4000}, workers=workers))
    digests = [{p.name: sha256_of(p) for p in (tmp_path / f"out-{w}").rglob("*") if p.is_file()} for w in (1, 2)]
    assert digests[0] == digests[1]


def test_what_was_kept_builds_under_the_same_ids(tmp_path):
    kept, _ = run(tmp_path, {"a/1": PROSE, "a/2": PROSE, "b/1": " ".join(prose(1))}, near=0)
    assert kept == ["a/1", "b/1"]
    folders = (tmp_path / "out" / "kept",), tmp_path / "data"
    manifest = build(BuildOptions(*folders, vocab_size=300, held_out=0, reading={"id_field": "id"})).manifest
    shard = Shard.of(tmp_path / "data", manifest.splits["train"].shards[0], manifest.dtype)
    assert [shard.document_id(i) for i in range(2)] == kept


def test_an_output_folder_in_use_is_refused_and_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(DataError, match="is there already and not empty"):
        run(tmp_path, {"a": "text"})
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_failed_cleaning_leaves_nothing(tmp_path):
    path = write(tmp_path / "in.jsonl", {"a": "text"})
    (tmp_path / "cut.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "x"}\n' * 99)[:-3])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match="is cut"):
        clean(CleanOptions((path, tmp_path / "cut.jsonl.zst"), tmp_path / "out", near=0))
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_reports_what_went(tmp_path):
    write(tmp_path / "in.jsonl", {"a": PROSE, "b": PROSE, "c": "short"})
    arguments = ["clean", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out"), "--rule", "gopher_quality"]
    result = CliRunner().invoke(command, [*arguments, "--near", "0", "--workers", "1"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "kept: 1 documents" in result.output
    assert "left out: 1 documents: duplicate" in result.output
    assert "left out: 1 documents: gopher_quality.min_words" in result.output
