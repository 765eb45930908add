"""Readers make every document exactly once, in a fixed order, however the input is cut into chunks."""

import gzip
import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatrain.base.errors import DataError
from megatrain.data.documents import Document, Refused
from megatrain.data.sources import chunks_of, find_sources


def read(*inputs: Path, include=(), exclude=(), **options) -> list[Document | Refused]:
    sources = find_sources(inputs, include, exclude)
    chunks = list(chunks_of(sources, options))
    assert sum(chunk.size for chunk in chunks) == sum(source.size for source in sources)  # progress ends at 100%
    return [found for chunk in chunks for found in chunk.documents()]


def texts(found) -> list[str]:
    found = list(found)
    assert all(isinstance(document, Document) for document in found), found
    return [document.text for document in found]


COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


@pytest.mark.parametrize("compression", COMPRESS)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.text().filter(str.strip), max_size=20), chunk_bytes=st.integers(1, 400), last=st.booleans())
def test_json_lines_gives_each_line_once_for_any_chunk_size(tmp_path, compression, lines, chunk_bytes, last):
    path = tmp_path / f"a.jsonl{compression}"
    content = "\n".join(json.dumps({"text": line}, ensure_ascii=False) for line in lines).replace("\u2028", " ")
    path.write_bytes(COMPRESS[compression]((content + ("\n" if last else "") or " ").encode()))
    found = read(path, chunk_bytes=chunk_bytes)
    assert texts(found) == [line.replace("\u2028", " ") for line in lines]
    assert [document.id for document in found] == [f"{path.name}:{i}" for i in range(1, len(lines) + 1)]


def test_json_lines_says_why_a_line_is_no_document(tmp_path):
    path = tmp_path / "a.jsonl"
    bad = [
        b"{",
        b'{"body": "x"}',
        b'{"text": 3}',
        b"[1]",
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": " "}',
    ]
    path.write_bytes(b"\n".join([*bad, b"[" * 100_000, b'{"text": "good"}']))
    *refused, good = read(path)
    no_text = "no text under 'text'"
    reasons = ["not JSON", no_text, no_text, no_text, "not UTF-8", "not UTF-8", "empty", "not JSON"]
    assert [found.reason for found in refused] == reasons
    assert good == Document("a.jsonl:9", "good")


@given(paragraphs=st.lists(st.text(alphabet="aé東 \n", min_size=1, max_size=60), min_size=1, max_size=20))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_long_prose_is_cut_without_losing_a_character(tmp_path, paragraphs):
    path = tmp_path / "a.txt"
    whole = "\n\n".join(paragraphs) + "."
    path.write_bytes(whole.encode())
    found = read(path, piece_bytes=16, chunk_bytes=64)
    kept = "".join(document.text for document in found if isinstance(document, Document))
    assert kept.split() == whole.split()
    assert not any(f.reason == "not UTF-8" for f in found if isinstance(f, Refused))
    assert all(len(text.encode()) <= 32 for text in texts(f for f in found if isinstance(f, Document)))


def test_long_prose_is_cut_at_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one two\n\nthree four\n\nfive six\n\nseven eight")
    found = texts(read(tmp_path / "a.txt", piece_bytes=11))
    assert found[0] == "one two\n\nthree four\n\n"
    assert "".join(found).endswith("seven eight")


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("chunk_bytes", [1, 7, 10**6])
def test_a_separator_divides_a_text_file(tmp_path, compression, chunk_bytes):
    (tmp_path / f"a.txt{compression}").write_bytes(COMPRESS[compression](b"one<|e|>two\n\ntwo<|e|>three"))
    found = read(tmp_path / f"a.txt{compression}", separator="<|e|>", chunk_bytes=chunk_bytes)
    assert texts(found) == ["one", "two\n\ntwo", "three"]


def test_ids_of_json_lines_can_be_their_own(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "id": "one"}\n{"text": "y", "id": 2}\n{"text": "z"}\n')
    assert [document.id for document in read(path, id_field="id")] == ["one", "2", "a.jsonl:3"]


def test_parquet_gives_each_row_once(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = ["one", "東京", None, " ", "five"]
    table = pa.table({"other": range(5), "body": rows, "name": list("abcde")})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    found = read(tmp_path / "a.parquet", text_field="body")
    assert texts(found[i] for i in (0, 1, 4)) == ["one", "東京", "five"]
    assert [document.id for document in found] == [f"a.parquet:{i}" for i in range(5)]
    assert [found[i].reason for i in (2, 3)] == ["no text under 'body'", "empty"]
    assert [d.id for d in read(tmp_path / "a.parquet", text_field="body", id_field="name")] == list("abcde")


def test_parquet_that_is_not_as_asked_is_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"texts": ["one"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'text': did you mean texts"):
        read(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-10])
    with pytest.raises(DataError, match=r"b.parquet is no whole parquet file"):
        read(tmp_path / "b.parquet", text_field="texts")


def test_parquet_text_that_is_not_utf8_is_refused_row_by_row(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    raw = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pyarrow.parquet.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    good, bad, fine = read(tmp_path / "a.parquet")
    assert (good.text, bad.reason, fine.text) == ("good", "not UTF-8", "fine")


def write_megatron(prefix: Path, documents: list[list[list[int]]], code: int, dtype: str) -> None:
    """A pair of files from documents of sequences, as the format says."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], dtype="<i4")
    item = np.dtype(dtype).itemsize
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype("<i8") * item if sequences else np.zeros(0, "<i8")
    table = np.cumsum([0, *(len(document) for document in documents)]).astype("<i8")
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(table))
    prefix.with_suffix(".idx").write_bytes(head + lengths.tobytes() + offsets.tobytes() + table.tobytes())
    prefix.with_suffix(".bin").write_bytes(b"".join(np.array(s, dtype=dtype).tobytes() for s in sequences))


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4"), (5, "<i8")])
@pytest.mark.parametrize("name", ["a.bin", "a.idx", ""])
@pytest.mark.parametrize("chunk_bytes", [8, 10**6])
def test_megatron_documents_keep_their_ids(tmp_path, code, dtype, name, chunk_bytes):
    documents = [[[1, 2, 3]], [[4], [5, 6]], [], [[7, 8, 60_000, 9]]]
    write_megatron(tmp_path / "a", documents, code, dtype)
    found = read(tmp_path / name, chunk_bytes=chunk_bytes)
    assert [d.tokens.tolist() if isinstance(d, Document) else d.reason for d in found] == [
        [1, 2, 3],
        [4, 5, 6],
        "empty",
        [7, 8, 60_000, 9],
    ]


def test_megatron_files_that_do_not_fit_are_refused(tmp_path):
    write_megatron(tmp_path / "a", [[[1, 2, 3]], [[4, 5]]], 8, "<u2")
    table, ids = (tmp_path / "a.idx").read_bytes(), (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(ids[:-1])
    with pytest.raises(DataError, match=r"places sequences beyond the 9 bytes"):
        read(tmp_path / "a.idx")
    (tmp_path / "a.bin").write_bytes(ids)
    for end in range(9, len(table)):
        (tmp_path / "a.idx").write_bytes(table[:end])
        with pytest.raises(DataError, match="is cut"):
            read(tmp_path / "a.idx")
    (tmp_path / "a.idx").write_bytes(table[:17] + b"\7" + table[18:])
    with pytest.raises(DataError, match="type code 7"):
        read(tmp_path / "a.idx")
    (tmp_path / "a.idx").unlink()
    assert [f.reason for f in read(tmp_path / "a.bin")] == ["binary"]


def write_tar(path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("chunk_bytes", [1, 2000, 10**6])
def test_samples_of_webdataset_are_documents(tmp_path, chunk_bytes):
    members = {
        "en/1.txt": "one é".encode(),
        "en/1.json": b'{"text": "metadata"}',
        "en/2.json": b'{"text": "two", "id": "second"}',
        "en/3.jpg": b"\xff\xd8",
        "en/4.5.txt": b"no sample's text",
        "en/6.TXT": b"six",
        "en/7.txt": b"\xff",
    }
    write_tar(tmp_path / "a.tar", members)
    found = read(tmp_path / "a.tar", chunk_bytes=chunk_bytes, id_field="id")
    assert [(f.id, f.text if isinstance(f, Document) else f.reason) for f in found] == [
        ("a.tar/en/1", "one é"),
        ("second", "two"),
        ("a.tar/en/3", "no .txt and no .json in its sample"),
        ("a.tar/en/4", "no .txt and no .json in its sample"),
        ("a.tar/en/6", "six"),
        ("a.tar/en/7", "not UTF-8"),
    ]


def test_what_webdataset_writes_is_read(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(50):
            writer.write({"__key__": f"{i:03d}", "txt": f"text {i}", "json": {"n": i}})
    assert texts(read(tmp_path / "a.tar", chunk_bytes=5000)) == [f"text {i}" for i in range(50)]


def test_a_hostile_tar_of_text_gives_no_document_and_touches_nothing(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(f"{i}.txt")
            info.type, info.linkname = kind, str(tmp_path / "secret.txt")
            tar.addfile(info)
        info = tarfile.TarInfo("../../escaped.txt")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"text"))
    before = sorted(tmp_path.rglob("*"))
    *refused, escaped = read(tmp_path / "a.tar")
    assert {f.reason for f in refused} == {"a link or a device in a tar"}
    assert escaped == Document("a.tar/../../escaped", "text")  # a name, and no path
    assert sorted(tmp_path.rglob("*")) == before


def test_a_compressed_tar_is_refused(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(bytes(10240)))
    with pytest.raises(DataError, match="is a compressed tar"):
        read(tmp_path / "a.tar.gz")


def test_a_folder_is_walked_in_sorted_order_without_hidden_files(tmp_path):
    for name in ("b/z.py", "b/a.py", "a.py", "c.md", ".git/config", "b/__pycache__/a.pyc", ".hidden.py", "b/é.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(name)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "linked.py").symlink_to(tmp_path / "a.py")
    assert [d.id for d in read(tmp_path)] == ["a.py", "b/a.py", "b/z.py", "b/é.py", "c.md", "linked.py"]
    assert [d.id for d in read(tmp_path, include=["*.py"], exclude=["b"])] == ["a.py", "linked.py"]
    assert [d.id for d in read(tmp_path, include=["b/*.py"], exclude=["z*"])] == ["b/a.py", "b/é.py"]


def test_ids_of_several_inputs_differ_even_where_names_do_not(tmp_path):
    for name in ("x/data/a.txt", "y/data/a.txt", "z/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    found = read(tmp_path / "x/data", tmp_path / "y/data", tmp_path / "z/a.txt")
    assert [document.id for document in found] == ["0:data/a.txt", "1:data/a.txt", "a.txt"]


def test_a_file_that_is_no_text_is_refused_and_the_others_are_read(tmp_path):
    for name, content in {"a": b"\xff\xfeabc", "b": b"\x7fELF\0\0", "c": b" \n", "d": b"\xef\xbb\xbftext"}.items():
        (tmp_path / name).write_bytes(content)
    found = read(tmp_path)
    assert [f.reason for f in found[:3]] == ["not UTF-8", "binary", "empty"]
    assert found[3] == Document("d", "text")  # its byte order mark is no text


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_compressed_file_that_is_cut_or_damaged_is_an_error(tmp_path, compression):
    whole = COMPRESS[compression](b"".join(b'{"text": "%d"}\n' % i for i in range(2000)))
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"a.jsonl.* is cut"):
        read(path)
    path.write_bytes(b"\0" * 4 + whole[4:])
    with pytest.raises(DataError, match=r"a.jsonl.* is damaged"):
        read(path)


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_compressed_files_that_were_appended_to_each_other_are_read_whole(tmp_path, compression):
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(COMPRESS[compression](b'{"text": "1"}\n') + COMPRESS[compression](b'{"text": "2"}\n'))
    assert texts(read(path)) == ["1", "2"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "no file to read"),
        (lambda p: p.write_bytes(b""), "is empty"),
    ],
)
def test_input_without_text_is_refused(tmp_path, make, says):
    make(tmp_path / "input")
    with pytest.raises(DataError, match=says):
        find_sources([tmp_path / "input"])
