"""A build gives the same bytes for any number of workers and however often it was killed."""

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import webdataset
from click.testing import CliRunner

from megatrain.base.errors import ConfigError, DataError
from megatrain.base.files import sha256_of
from megatrain.cli.data import command
from megatrain.data.build import BuildOptions, build
from megatrain.data.manifest import Manifest
from megatrain.data.shards import Shard, ShardWriter
from megatrain.data.tokenizer import Tokenizer
from tests.data.test_readers import write_megatron

WORDS = "the of data order shard token slot rank layer norm head model train loss step".split()  # noqa: SIM905


def document(number: int) -> str:
    drawn = np.random.default_rng(number).choice(WORDS, size=20 + number % 40)
    return f"{number} " + " ".join(drawn)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """300 documents as JSON lines, and two files that are none."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": document(i)}) + "\n" for i in range(300)))
    (folder / "bad.txt").write_bytes(b"\xff\xff")
    (folder / "binary").write_bytes(b"\0\0")
    return folder


def options(corpus: Path, out: Path, **changes) -> BuildOptions:
    given = {"held_out": 0.05, "shard_tokens": 2000} | ({} if "tokenizer" in changes else {"vocab_size": 320})
    return BuildOptions(inputs=(corpus,), out=out, **{**given, **changes})


@pytest.fixture(scope="module")
def built(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built") / "data"
    build(options(corpus, out))
    return out


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_of(p) for p in folder.rglob("*") if p.is_file()}


def documents_of(folder: Path, split: str) -> dict[str, str]:
    manifest, tokenizer = Manifest.read(folder), Tokenizer.open(folder / "tokenizer.json")
    found = {}
    for entry in manifest.splits[split].shards:
        shard = Shard.of(folder, entry, manifest.dtype)
        for number in range(entry.documents):
            ids = shard.tokens(number)
            assert ids[-1] == manifest.tokenizer.end_of_document
            found[shard.document_id(number)] = tokenizer.decode(ids)
    return found


def test_every_document_is_in_one_split_and_decodes_to_itself(built):
    train, held_out = documents_of(built, "train"), documents_of(built, "held_out")
    assert not train.keys() & held_out.keys()
    assert train | held_out == {f"a.jsonl:{i + 1}": document(i) for i in range(300)}
    assert 5 <= len(held_out) <= 30  # 15 are expected


def test_the_manifest_counts_what_is_there(built):
    manifest = Manifest.read(built)
    assert len(manifest.splits["train"].shards) > 3
    texts = [document(i) for i in range(300)]
    assert sum(split.text_bytes for split in manifest.splits.values()) == sum(len(t.encode()) for t in texts)
    assert manifest.tokenizer.fingerprint == sha256_of(built / "tokenizer.json")
    for split in manifest.splits.values():
        for shard in split.shards:
            assert (shard.sha256, shard.index_sha256) == (sha256_of(built / shard.path), sha256_of(built / shard.index))
    assert manifest.provenance["refused"] == {
        "not UTF-8": {"documents": 1, "first": ["bad.txt"]},
        "binary": {"documents": 1, "first": ["binary"]},
    }


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
def test_webdataset_reads_the_shards(built):
    manifest = Manifest.read(built)
    urls = [str(built / shard.path) for shard in manifest.splits["train"].shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    tokenizer = Tokenizer.open(built / "tokenizer.json")
    texts = [tokenizer.decode(np.frombuffer(sample["tokens"], dtype=np.uint16)) for sample in samples]
    gc.collect()
    assert texts == list(documents_of(built, "train").values())


def test_the_number_of_workers_changes_nothing(built, corpus, tmp_path):
    build(options(corpus, tmp_path / "data", workers=2))
    assert digests(tmp_path / "data") == digests(built)


class _Stop(Exception):  # noqa: N818
    pass


class StopAfter:
    """A watcher that ends a build at its `count`-th chunk of writing."""

    def __init__(self, count: int):
        self.count, self.writing = count, False

    def stage(self, name: str, total: int) -> None:
        self.writing = name == "writing tokens"

    def advance(self, bytes: int, tokens: int) -> None:
        self.count -= self.writing
        if self.count < 0:
            raise _Stop


@pytest.mark.parametrize("pace", [0, 1, 3, 5, 8])
def test_a_build_that_is_stopped_again_and_again_ends_with_the_same_bytes(built, corpus, tmp_path, pace):
    wanted, shards = options(corpus, tmp_path / "data"), []
    for count in range(pace, 100, max(pace, 1)):
        try:
            result = build(wanted, StopAfter(count))
            break
        except _Stop:
            assert not wanted.out.exists()
            shards.append(len(list(tmp_path.rglob("shard-*.tar"))))
    assert len(shards) > 0
    assert result.resumed_shards == shards[-1]
    assert digests(tmp_path / "data") == digests(built)


def test_a_build_killed_in_the_middle_ends_with_the_same_bytes(built, corpus, tmp_path):
    program = """if True:
        import os, signal, sys
        from pathlib import Path
        from megatrain.data import build as module
        from megatrain.data.journal import Journal

        add = Journal.add
        def add_and_die(self, done):
            if len(self.done) == 2:
                os.kill(os.getpid(), signal.SIGKILL)  # a shard is on disk, its line is not
            add(self, done)
        Journal.add = add_and_die
        corpus, out = map(Path, sys.argv[1:])
        module.build(module.BuildOptions((corpus,), out, vocab_size=320, held_out=0.05, shard_tokens=2000))
    """
    died = subprocess.run([sys.executable, "-c", program, corpus, tmp_path / "data"], check=False)
    assert died.returncode == -signal.SIGKILL
    assert not (tmp_path / "data").exists()
    assert build(options(corpus, tmp_path / "data")).resumed_shards == 2
    assert digests(tmp_path / "data") == digests(built)


@pytest.mark.slow
def test_builds_with_workers_killed_at_random_moments_end_with_the_same_bytes_and_leave_no_process(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": document(i)}) + "\n" for i in range(3000)))
    arguments = [sys.executable, "-m", "megatrain", "data", "build", "a.jsonl", "--vocab-size", "400"]
    arguments += ["--shard-tokens", "20k", "--workers", "2", "--out"]
    subprocess.run([*arguments, "whole"], cwd=tmp_path, check=True)
    draw = np.random.default_rng(0)
    for shards in (0, 1, 3, 4, 6):  # killed a moment after so many are there
        process = subprocess.Popen([*arguments, "killed"], cwd=tmp_path)
        while len(list(tmp_path.glob(".killed.building/train/shard-*.tar"))) < shards:
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        assert not psutil.wait_procs(children, timeout=60)[1]
    subprocess.run([*arguments, "killed"], cwd=tmp_path, check=True)
    (tmp_path / "whole").rename(tmp_path / "first")
    (tmp_path / "killed").rename(tmp_path / "whole")
    whole, killed = digests(tmp_path / "first"), digests(tmp_path / "whole")
    assert whole.keys() == killed.keys()
    assert {name for name in whole if whole[name] != killed[name]} <= {"manifest.json"}  # which has the folder's name


def test_a_build_loads_no_torch():
    program = (
        "import sys, megatrain.data.build, megatrain.data.clean, megatrain.data.verification, megatrain.data.summary"
    )
    subprocess.run([sys.executable, "-c", f"{program}\nassert 'torch' not in sys.modules"], check=True)


def test_a_stopped_build_starts_afresh_when_the_input_was_edited(corpus, tmp_path):
    copy = tmp_path / "corpus"
    copy.mkdir()
    (copy / "a.jsonl").write_bytes((corpus / "a.jsonl").read_bytes())
    with pytest.raises(_Stop):
        build(options(copy, tmp_path / "data"), StopAfter(8))
    (copy / "a.jsonl").write_bytes((corpus / "a.jsonl").read_bytes().replace(b"shard", b"SHARD"))
    assert build(options(copy, tmp_path / "data")).resumed_shards == 0
    assert not any("shard" in text for text in documents_of(tmp_path / "data", "train").values())


def test_building_again_finds_the_data_set_and_touches_nothing(built, corpus):
    before = {p: p.stat().st_mtime_ns for p in built.rglob("*")}
    again = build(options(corpus, built, workers=2))
    assert again.existed
    assert again.manifest == Manifest.read(built)
    assert {p: p.stat().st_mtime_ns for p in built.rglob("*")} == before


def test_another_data_set_in_the_folder_is_refused(built, corpus):
    with pytest.raises(DataError, match=r"already holds the data set 'data', built from other input or options"):
        build(options(corpus, built, held_out=0.1))


def test_a_folder_with_other_files_is_refused(corpus, tmp_path):
    (tmp_path / "notes").write_text("keep me")
    with pytest.raises(DataError, match=r"is not empty and holds no data set"):
        build(options(corpus, tmp_path))
    assert (tmp_path / "notes").read_text() == "keep me"


def test_an_empty_folder_is_built_into(corpus, built, tmp_path):
    (tmp_path / "data").mkdir()
    build(options(corpus, tmp_path / "data"))
    assert digests(tmp_path / "data") == digests(built)


def test_a_folder_that_cannot_be_written_is_refused(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written"):
        build(options(corpus, tmp_path / "file" / "data"))


def test_whoever_may_read_the_shards_may_read_the_index(built):
    modes = {path.stat().st_mode & 0o777 for path in built.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~_umask()}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_full_disk_is_an_error_and_the_same_command_goes_on(built, corpus, tmp_path, monkeypatch):
    write, count = ShardWriter.write, iter(range(100_000))

    def full(self, *arguments):
        if next(count) == 150:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", full)
        with pytest.raises(DataError, match=r"cannot be written .No space left on device"):
            build(options(corpus, tmp_path / "data"))
    assert not list(tmp_path.rglob("*.tmp"))
    assert build(options(corpus, tmp_path / "data")).resumed_shards > 0
    assert digests(tmp_path / "data") == digests(built)


def test_two_builds_of_one_folder_do_not_meet(corpus, tmp_path):
    class Second:
        def stage(self, name, total):
            with pytest.raises(DataError, match=r"another process is building"):
                build(options(corpus, tmp_path / "data"))
            raise _Stop

    with pytest.raises(_Stop):
        build(options(corpus, tmp_path / "data"), Second())


def test_a_data_set_made_with_the_tokenizer_of_another_has_its_fingerprint(built, corpus, tmp_path):
    given = options(corpus, tmp_path / "data", tokenizer=built / "tokenizer.json")
    manifest = build(given).manifest
    assert manifest.tokenizer == Manifest.read(built).tokenizer
    assert digests(tmp_path / "data")["train/shard-000000.tar"] == digests(built)["train/shard-000000.tar"]


def test_ids_of_megatron_become_the_same_data_set_as_their_text(built, corpus, tmp_path):
    tokenizer = Tokenizer.open(built / "tokenizer.json")
    write_megatron(tmp_path / "a", [[tokenizer.encode(document(i))] for i in range(50)], 8, "<u2")
    with pytest.raises(DataError, match="give the --tokenizer that made them"):
        build(options(tmp_path / "a.bin", tmp_path / "data"))
    given = options(tmp_path / "a.bin", tmp_path / "data", tokenizer=built / "tokenizer.json")
    splits = build(given).manifest.splits
    found = documents_of(tmp_path / "data", "train") | documents_of(tmp_path / "data", "held_out")
    assert found == {f"a.bin:{i}": document(i) for i in range(50)}
    assert sum(split.text_bytes for split in splits.values()) == sum(len(document(i).encode()) for i in range(50))


def test_ids_that_the_tokenizer_does_not_have_are_refused(built, tmp_path):
    write_megatron(tmp_path / "a", [[[1, 2, 319]], [[320]]], 8, "<u2")
    with pytest.raises(DataError, match=r"a.bin:1 holds the id 320 and the tokenizer has 320"):
        build(options(tmp_path / "a.bin", tmp_path / "data", tokenizer=built / "tokenizer.json"))


def test_a_vocabulary_larger_than_the_type_is_refused(built, corpus, tmp_path):
    tokenizer = json.loads((built / "tokenizer.json").read_text())
    extra = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    tokenizer["added_tokens"].append({"id": 70_000, "content": "<extra>", **extra})
    tokenizer["model"]["vocab"]["<extra>"] = 70_000
    (tmp_path / "large.json").write_text(json.dumps(tokenizer))
    given = options(corpus, tmp_path / "data", tokenizer=tmp_path / "large.json", dtype="uint16")
    with pytest.raises(DataError, match=r"a vocabulary of 70001 does not fit uint16.*--dtype uint32"):
        build(given)
    assert build(replace(given, dtype="auto")).manifest.dtype == "uint32"
    assert documents_of(tmp_path / "data", "train")["a.jsonl:1"] == document(0)


def test_small_corpora_hold_out_one_document_and_train_on_one(tmp_path):
    for n in (2, 3):
        folder = tmp_path / f"corpus-{n}"
        folder.mkdir()
        for i in range(n):
            (folder / f"{i}.txt").write_text(document(i))
        for share in (0.001, 0.999):
            splits = build(options(folder, tmp_path / f"{n}-{share}", held_out=share)).manifest.splits
            assert min(splits["train"].documents, splits["held_out"].documents) == 1
            assert splits["train"].documents + splits["held_out"].documents == n


def test_a_single_document_is_trained_on(tmp_path):
    (tmp_path / "a.txt").write_text(document(0))
    splits = build(options(tmp_path / "a.txt", tmp_path / "data")).manifest.splits
    assert (splits["train"].documents, splits["held_out"].documents) == (1, 0)


def test_growing_a_corpus_moves_no_document_to_the_other_split(built, corpus, tmp_path):
    (tmp_path / "corpus").mkdir()
    lines = (corpus / "a.jsonl").read_text() + "".join(
        json.dumps({"text": document(i)}) + "\n" for i in range(300, 400)
    )
    (tmp_path / "corpus" / "a.jsonl").write_text(lines)
    build(options(tmp_path / "corpus", tmp_path / "data"))
    grown = documents_of(tmp_path / "data", "held_out")
    assert documents_of(built, "held_out").items() <= grown.items()


def test_nothing_but_refused_files_is_an_error_with_the_reasons(tmp_path):
    (tmp_path / "a").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"nothing to train on in 1 files: 1 not UTF-8"):
        build(options(tmp_path / "a", tmp_path / "data"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_another_tokenizer_in_the_same_place_is_read_anew(corpus, tmp_path):
    for vocab_size in (320, 280):
        with pytest.raises(_Stop):
            build(options(corpus, tmp_path / "data", vocab_size=vocab_size), StopAfter(3))
    build(options(corpus, tmp_path / "data", vocab_size=280))
    assert documents_of(tmp_path / "data", "train")["a.jsonl:1"] == document(0)


def test_all_problems_of_the_options_are_shown_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        build(BuildOptions((), tmp_path, vocab_size=256, held_out=1.0, shard_tokens=0, workers=0, dtype="int8"))
    assert len(caught.value.problems) == 6


def test_a_tokenizer_that_is_given_is_not_trained(built, corpus, tmp_path):
    with pytest.raises(ConfigError, match="vocab_size=320 is of a tokenizer to train, and one is given"):
        build(options(corpus, tmp_path / "data", tokenizer=built / "tokenizer.json", vocab_size=320))


def test_a_dead_worker_is_an_error_that_says_so():
    from megatrain.base.errors import RunError
    from megatrain.data.encoding import ordered_map

    with pytest.raises(RunError, match=r"a worker process died"):
        list(ordered_map(os._exit, [3], workers=2))


def test_the_command_line_builds_and_reports(corpus, tmp_path):
    arguments = ["build", str(corpus), "--out", str(tmp_path / "d"), "--vocab-size", "300", "--workers", "1"]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "left out: 1 documents: not UTF-8 (bad.txt)" in result.output
    assert "vocabulary: 300, ids are uint16" in result.output
    again = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert again.exit_code == 0
    assert "exists" in again.output
