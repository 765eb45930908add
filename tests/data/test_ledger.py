"""The ledger says which documents were trained on at which step, through resumes, and shows when it was changed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.base.errors import DataError
from megatrain.config.build import plain
from megatrain.data.build import BuildOptions, build
from megatrain.data.config import Data, Stage, WeightedSource
from megatrain.data.ledger import FILE, Ledger, order_of
from megatrain.data.manifest import Manifest
from megatrain.data.seen import _data, documents_by_step, seen
from megatrain.data.stream import Order, Stream
from megatrain.data.trace import trace
from tests.data.corpora import write

SEED, BATCH = 3, 4


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("ledger")
    for name in ("a", "b"):
        lines = (json.dumps({"text": f"{name} document {i} " * (1 + i % 9)}) for i in range(60))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        tokenizer, size = (folder / "a" / "tokenizer.json", None) if name == "b" else (None, 270)
        build(
            BuildOptions((folder / f"{name}.jsonl",), folder / name, tokenizer=tokenizer, vocab_size=size, held_out=0.1)
        )
    return [str(folder / "a"), str(folder / "b")]


def data_of(*paths: str) -> Data:
    return Data(sources=tuple(WeightedSource(path=path) for path in paths), seq_len=16, workers=0)


class Run:
    """A run as its ledger sees it: steps, saves, kills and resumes."""

    def __init__(self, folder: Path, data: Data):
        self.path, self.data = folder / FILE, data
        self.saved = (0, None)
        self.taken: dict[int, set[tuple[str, str]]] = {}  # by step: what a slow twin notes of each batch
        self.resume()

    def resume(self, data: Data | None = None) -> None:
        self.data = data or self.data
        self.step, cursors = self.saved
        self.stream = Stream(Order(self.data, SEED, BATCH), cursors)
        self.ledger = Ledger(self.path)
        prints = [Manifest.read(Path(source.path)).fingerprint for source in self.data.sources]
        self.ledger.start(self.step, cursors, order_of(plain(self.data), SEED, BATCH, prints))

    def train(self, steps: int, skipped: tuple[int, ...] = ()) -> None:
        for _ in range(steps):
            self.step += 1
            ids = self.documents_of_next_batch()
            self.taken[self.step] = set() if self.step in skipped else ids

    def documents_of_next_batch(self) -> set[tuple[str, str]]:
        from megatrain.data.rows import empty, pieces

        _, rows = self.stream.fill(empty(*self.stream.shape))
        return {(str(Path(piece.tar).parent.parent), piece.document) for piece in pieces(rows)}

    def write(self, skipped: tuple[int, ...] = ()) -> None:
        self.ledger.trained(self.step, self.stream.cursors(), skipped)

    def save(self) -> None:
        self.saved = (self.step, self.stream.cursors())

    def expected(self) -> dict[int, set[tuple[str, str]]]:
        return {step: ids for step, ids in self.taken.items() if step <= self.step and ids}


def told(path: Path) -> dict[int, set[tuple[str, str]]]:
    found = list(documents_by_step(Ledger(path)))
    assert len({step for step, _ in found}) == len(found)
    return dict(found)


def test_each_step_is_told_with_its_documents(sources, tmp_path):
    run = Run(tmp_path, data_of(*sources))
    for _ in range(3):
        run.train(5)
        run.write()
        run.save()
    assert told(run.path) == run.expected()
    assert len(run.path.read_bytes().splitlines()) == 4  # the order, and three ranges
    rows = trace(run.data, seed=SEED, global_batch=BATCH, start=0, stop=15)
    assert [{id for _, id in documents} for documents in told(run.path).values()] == [set(r["documents"]) for r in rows]


@given(st.lists(st.sampled_from(["train", "write", "save", "kill", "cut"]), max_size=14))
@settings(deadline=None, max_examples=40)
def test_whatever_happens_to_a_run_the_ledger_tells_what_its_weights_were_trained_on(sources, tmp_path_factory, events):
    run = Run(tmp_path_factory.mktemp("run"), data_of(sources[0]))
    for event in events:
        if event == "train":
            run.train(3)
        elif event == "write":
            run.write()
        elif event == "save":
            run.write()
            run.save()
        elif event == "kill":
            run.resume()
        else:  # killed after the save and before its line, and in the middle of writing another
            run.save()
            with open(run.path, "ab") as file:
                file.write(b'{"kind": "trai')
            run.resume()
    run.write()
    assert told(run.path) == run.expected()


def test_nothing_is_cut_when_a_run_is_rewound(sources, tmp_path):
    run = Run(tmp_path, data_of(sources[0]))
    run.train(4)
    run.write()
    run.save()
    run.train(4)
    run.write()
    before = run.path.read_bytes()
    run.resume()
    run.train(2)
    run.write()
    assert run.path.read_bytes().startswith(before)
    kinds = [line["kind"] for line in Ledger(run.path).lines]
    assert kinds == ["order", "trained", "trained", "rewound", "trained"]
    assert sorted(told(run.path)) == [1, 2, 3, 4, 5, 6]


def test_steps_that_changed_nothing_are_not_told(sources, tmp_path):
    run = Run(tmp_path, data_of(sources[0]))
    run.train(6, skipped=(2, 5))
    run.write(skipped=(2, 5))
    assert sorted(told(run.path)) == [1, 3, 4, 6]
    assert told(run.path) == run.expected()


def test_a_source_that_is_added_on_resume_is_told_from_there(sources, tmp_path):
    run = Run(tmp_path, data_of(sources[0]))
    run.train(3)
    run.write()
    run.save()
    run.resume(data_of(*sources))
    run.train(4)
    run.write()
    assert told(run.path) == run.expected()
    assert {source for step, ids in told(run.path).items() for source, _ in ids if step <= 3} == {sources[0]}
    assert {source for step, ids in told(run.path).items() for source, _ in ids if step > 3} == set(sources)


def test_a_curriculum_is_followed(sources, tmp_path):
    run = Run(
        tmp_path, replace(data_of(*sources), curriculum=(Stage(after=128, seq_len=8), Stage(after=256, seq_len=12)))
    )
    run.train(12)
    run.write()
    assert told(run.path) == run.expected()


def test_no_secret_of_an_address_is_written():
    address = "https://me:secret@host/data?token=secret"
    order = order_of(plain(data_of(address)), SEED, BATCH, ["fingerprint"])
    assert "secret" not in json.dumps(order)
    assert order["data"]["sources"][0]["path"] == "https://host/data"


def test_an_address_in_full_is_taken_from_the_run_file(sources):
    line = order_of(plain(data_of("https://me:secret@host/data")), SEED, BATCH, ["fingerprint"])
    access = data_of("https://me:secret@host/data")
    assert [source.path for source in _data(line, access).sources] == ["https://me:secret@host/data"]
    assert [source.path for source in _data(line, None).sources] == ["https://host/data"]


def test_the_number_of_workers_is_no_other_order(sources, tmp_path):
    run = Run(tmp_path, data_of(sources[0]))
    run.train(2)
    run.write()
    run.save()
    run.resume(replace(run.data, workers=3))
    assert [line["kind"] for line in Ledger(run.path).lines] == ["order", "trained"]


@pytest.mark.parametrize("change", ["edit", "remove", "swap", "insert"])
def test_a_line_that_was_changed_or_taken_out_shows(sources, tmp_path, change):
    run = Run(tmp_path, data_of(sources[0]))
    for _ in range(3):
        run.train(1)
        run.write()
    lines = run.path.read_bytes().splitlines(keepends=True)
    edited = {
        "edit": [lines[0], lines[1].replace(b'"upto": 1', b'"upto": 2'), *lines[2:]],
        "remove": [lines[0], *lines[2:]],
        "swap": [lines[0], lines[2], lines[1], lines[3]],
        "insert": [*lines[:2], lines[1], *lines[2:]],
    }[change]
    run.path.write_bytes(b"".join(edited))
    with pytest.raises(DataError, match=r"was changed: line [23] does not follow"):
        Ledger(run.path)


def test_a_line_taken_from_the_end_changes_the_head(sources, tmp_path):
    run = Run(tmp_path, data_of(sources[0]))
    run.train(1)
    run.write()
    head = run.ledger.head
    lines = run.path.read_bytes().splitlines(keepends=True)
    run.path.write_bytes(b"".join(lines[:-1]))
    assert Ledger(run.path).head != head


def test_a_data_set_that_changed_is_refused(sources, tmp_path):
    run = Run(tmp_path, data_of(sources[0]))
    run.train(2)
    run.write()
    text = run.path.read_text().replace(sources[0], sources[1])  # as if another data set stood there now
    lines = [json.loads(line) for line in text.splitlines()]
    run.path.unlink()
    forged = Ledger(run.path)
    for line in lines:
        line.pop("chain")
        forged._append(line)
    with pytest.raises(DataError, match="is not the one that the run was trained on"):
        told(run.path)


def test_documents_are_found_by_id_and_by_text(sources, tmp_path):
    run = Run(tmp_path, data_of(*sources))
    run.train(10)
    run.write()
    expected = run.expected()
    for name, source in zip("ab", sources, strict=True):
        for i in (7, 8, 17):
            by_text = seen(tmp_path, contains=f"{name} document {i} ")
            assert [(found.source, found.document) for found in by_text] == [(source, f"{name}.jsonl:{i + 1}")]
            steps = tuple(step for step, ids in expected.items() if (source, f"{name}.jsonl:{i + 1}") in ids)
            assert by_text[0].steps == steps
            assert by_text == seen(tmp_path, document=f"{name}.jsonl:{i + 1}")


def test_a_held_out_document_was_never_trained_on(sources, tmp_path):
    from megatrain.data.shards import Shard

    run = Run(tmp_path, data_of(sources[0]))
    run.train(40)
    run.write()
    manifest = Manifest.read(Path(sources[0]))
    shard = Shard.of(Path(sources[0]), manifest.splits["held_out"].shards[0], manifest.dtype)
    (found,) = seen(tmp_path, document=shard.document_id(0))
    assert (found.split, found.steps) == ("held_out", ())


def test_an_id_that_was_trained_on_and_held_out_is_told_of_both(tmp_path):
    train, held = ({"same": np.arange(1, n)} for n in (40, 9))
    write(tmp_path / "data", {"other": np.arange(1, 80), **train}, held)
    run = Run(tmp_path, data_of(str(tmp_path / "data")))
    run.train(4)
    run.write()
    found = {one.split: one.steps for one in seen(tmp_path, document="same")}
    assert found == {
        "train": tuple(step for step, ids in run.expected().items() if "same" in {id for _, id in ids}),
        "held_out": (),
    }
    assert found["train"]


def test_a_document_that_is_none_is_refused_with_the_nearest(sources, tmp_path):
    run = Run(tmp_path, data_of(sources[0]))
    run.train(1)
    run.write()
    with pytest.raises(DataError, match=r"is called 'a.jsnl:7': did you mean a.jsonl:7"):
        seen(tmp_path, document="a.jsnl:7")
    with pytest.raises(DataError, match="contains 'Document'"):
        seen(tmp_path, contains="Document")
    with pytest.raises(DataError, match=r"elsewhere does not exist"):
        seen(tmp_path / "elsewhere", document="a")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(DataError, match=r"has no ledger.jsonl"):
        seen(tmp_path / "elsewhere", document="a")
