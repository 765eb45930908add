"""Every damage is found and named at its file, and a hostile shard is read without harm."""

import dataclasses
import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from megatrain.base.errors import DataError
from megatrain.base.files import sha256_of
from megatrain.cli.data import command
from megatrain.data.build import BuildOptions, build
from megatrain.data.manifest import Manifest, ShardEntry, Split
from megatrain.data.verification import Fault, verify

TAR, INDEX = "train/shard-000001.tar", "train/shard-000001.index"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    lines = (json.dumps({"text": f"document {i} of the corpus " * (1 + i % 7)}) for i in range(80))
    (folder / "a.jsonl").write_text("\n".join(lines))
    build(BuildOptions((folder / "a.jsonl",), folder / "data", vocab_size=280, held_out=0.1, shard_tokens=600))
    return folder / "data"


@pytest.fixture
def data(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "data"))


def faults(folder: Path) -> list[Fault]:
    return [fault for _, found in verify(str(folder)) for fault in found]


def bad(folder: Path) -> set[str]:
    return {fault.path for fault in faults(folder)}


def change(path: Path, edit: Callable[[bytes], bytes]) -> None:
    path.write_bytes(edit(path.read_bytes()))


def flip(content: bytes, bit: int) -> bytes:
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def test_a_whole_data_set_has_no_fault(whole):
    looked_at = [path for path, _ in verify(str(whole))]
    assert faults(whole) == []
    assert looked_at[:3] == ["manifest.json", "tokenizer.json", "train/shard-000000.tar"]
    assert len(looked_at) == 2 + len(list(whole.glob("*/*.tar")))


DAMAGE = {
    "truncated at a block": lambda b: b[: len(b) // 2 // 512 * 512],
    "truncated in a header": lambda b: b[:100],
    "truncated in a payload": lambda b: b[:600],
    "header bit": lambda b: flip(b, 8 * 3),
    "payload bit": lambda b: flip(b, 8 * 515),
    "zeroed hole": lambda b: b[:512] + bytes(512) + b[1024:],
    "garbage at the end": lambda b: b + b"garbage",
    "two tars": lambda b: b + b,
    "not a tar": lambda b: b"x" * len(b),
    "empty": lambda b: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_tar_is_named_and_no_other(data, damage):
    change(data / TAR, DAMAGE[damage])
    assert bad(data) == {TAR}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_tar_is_found_even_where_its_checksum_was_made_to_fit(data, damage):
    change(data / TAR, DAMAGE[damage])
    forge(data)
    assert {TAR} == bad(data)


def test_any_flipped_bit_is_found_and_named(data):
    files = [path for path in sorted(data.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    draw = np.random.default_rng(0)
    for _ in range(100):
        path = files[draw.integers(len(files))]
        content = path.read_bytes()
        path.write_bytes(flip(content, int(draw.integers(8 * len(content)))))
        assert path.relative_to(data).as_posix() in bad(data)
        path.write_bytes(content)
    assert faults(data) == []


def test_missing_swapped_and_stray_files_are_named(data):
    (data / INDEX).unlink()
    first, second = data / "train/shard-000000.tar", data / "train/shard-000002.tar"
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])
    (data / "train/shard-999999.tar").write_bytes(b"")
    expected = {INDEX, "train/shard-000000.tar", "train/shard-000002.tar", "train/shard-999999.tar"}
    assert bad(data) == expected


def test_a_shard_that_is_listed_twice_or_copied_is_named(data):
    def repeat(split: Split) -> Split:
        return Split(
            (*split.shards, split.shards[0], dataclasses.replace(split.shards[1], path="train/shard-000099.tar"))
        )

    rewrite(data, repeat)
    whats = [fault.what for fault in faults(data) if fault.path == "manifest.json"]
    assert whats == [
        "lists train/shard-000000.tar twice",
        "lists train/shard-000001.tar and train/shard-000099.tar, which have the same content",
    ]


@pytest.mark.parametrize("count", ["documents", "tokens", "text_bytes"])
def test_counts_that_are_not_those_of_the_shard_are_named(data, count):
    def add_one(split: Split) -> Split:
        shard = split.shards[1]
        changed = dataclasses.replace(shard, **{count: getattr(shard, count) + 1})
        return Split((split.shards[0], changed, *split.shards[2:]))

    rewrite(data, add_one)
    assert bad(data) == {TAR}


def test_a_tokenizer_of_other_data_is_named(data):
    change(data / "tokenizer.json", lambda b: b.replace(b"document", b"dokument") + b"\n")
    assert bad(data) == {"tokenizer.json"}


def test_ids_that_the_tokenizer_does_not_have_are_named_with_their_documents(data):
    manifest = Manifest.read(data)
    smaller = dataclasses.replace(manifest.tokenizer, vocab_size=279)
    dataclasses.replace(manifest, tokenizer=smaller).write(data)
    whats = [fault.what for fault in faults(data)]
    assert whats[0] == "has 280 tokens and the manifest says 279"
    assert any("hold ids that are not in the vocabulary of 279: 'a.jsonl:" in what for what in whats)


def test_a_damaged_manifest_is_a_fault_and_a_missing_one_is_a_wrong_call(data):
    change(data / "manifest.json", lambda b: b[:-20])
    assert bad(data) == {"manifest.json"}
    (data / "manifest.json").unlink()
    with pytest.raises(DataError, match="is not a finished data set"):
        faults(data)


# ------------------------------------------------------------------------------------------------ hostile shards


def rewrite(folder: Path, edit: Callable[[Split], Split]) -> None:
    """Change what the manifest says of the split to train on."""
    manifest = Manifest.read(folder)
    splits = {**manifest.splits, "train": edit(manifest.splits["train"])}
    dataclasses.replace(manifest, splits=splits).write(folder)


def forge(folder: Path) -> None:
    """Make the manifest's sizes and checksums fit the files, as whoever made a hostile data set would."""

    def fit(entry: ShardEntry) -> ShardEntry:
        sums = {"sha256": sha256_of(folder / entry.path), "index_sha256": sha256_of(folder / entry.index)}
        return dataclasses.replace(entry, bytes=(folder / entry.path).stat().st_size, **sums)

    rewrite(folder, lambda split: Split(tuple(fit(entry) for entry in split.shards)))


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def member(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", link: str = "") -> Callable:
    def add(tar: tarfile.TarFile, canary: Path) -> None:
        info = tarfile.TarInfo(name.replace("CANARY", str(canary)))
        info.type, info.linkname = kind, link.replace("CANARY", str(canary))
        body = pickle.dumps(Canary(canary)) if content == b"PICKLE" else content
        info.size = len(body) if kind == tarfile.REGTYPE else 0
        tar.addfile(info, io.BytesIO(body))

    return add


HOSTILE = {
    "pickle": member("000000000.pkl", content=b"PICKLE"),
    "pickled tokens": member("000000000.pyd", content=b"PICKLE"),
    "parent": member("../canary", content=b"x"),
    "absolute": member("CANARY", content=b"x"),
    "symlink": member("000000000.tokens", tarfile.SYMTYPE, link="CANARY"),
    "hard link": member("000000000.tokens", tarfile.LNKTYPE, link="CANARY"),
    "device": member("000000000.tokens", tarfile.CHRTYPE),
    "pipe": member("000000000.tokens", tarfile.FIFOTYPE),
    "folder": member("000000000", tarfile.DIRTYPE),
    "newline": member("000000000.tokens\n../canary", content=b"x"),
    "pax header": member("é" * 200, content=b"x"),
    "duplicate": member("000000000.tokens", content=b"xx"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_member_is_named_and_nothing_is_run_or_written(data, tmp_path, kind):
    canary = tmp_path / "canary"
    with tarfile.open(data / TAR, "w") as tar:
        HOSTILE[kind](tar, canary)
    forge(data)
    before = sorted(tmp_path.rglob("*"))
    assert bad(data) == {TAR}
    assert sorted(tmp_path.rglob("*")) == before
    assert not canary.exists()


def header(size: bytes, kind: bytes = b"0") -> bytes:
    raw = bytearray(b"000000000.tokens".ljust(512, b"\0"))
    raw[124:136], raw[148:156], raw[156:157], raw[257:265] = size, b" " * 8, kind, b"ustar\x0000"
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (header(b"\x80" + (2**50).to_bytes(11, "big")), "a size that is no octal number"),
        (header(b"77777777777\0"), "8589934591 bytes and the tar ends before"),
        (header(b"-0000000001\0"), "a size that is no octal number"),
        (header(b"77777777777\0", b"x"), "is a pax header"),
        (header(b"77777777777\0", b"L"), "is a long name"),
        (header(b"00000000002\0", b"S"), "is a sparse file"),
    ],
)
def test_a_header_that_lies_about_its_size_costs_nothing(data, content, says):
    (data / TAR).write_bytes(content + bytes(1024))
    forge(data)
    assert any(says in fault.what for fault in faults(data))
    assert bad(data) == {TAR}


@pytest.mark.parametrize("path", ["../outside/shard-000000.tar", "/etc/passwd", "train/../../x.tar"])
def test_a_path_that_leads_out_of_the_data_set_is_not_followed(data, path):
    def lead_out(split: Split) -> Split:
        return Split((dataclasses.replace(split.shards[0], path=path), *split.shards[1:]))

    rewrite(data, lead_out)
    assert path in bad(data)


def test_an_index_that_lies_is_named(data):
    from safetensors.numpy import load_file, save_file

    columns = load_file(data / INDEX)
    columns["offset"] = columns["offset"] + 2**40
    save_file(columns, data / INDEX, metadata={"version": "1"})
    forge(data)
    assert bad(data) <= {TAR, INDEX}
    assert bad(data)
    (data / INDEX).write_bytes((2**60).to_bytes(8, "little") + b"{}")
    forge(data)
    assert bad(data) == {INDEX}


# ------------------------------------------------------------------------------------------------ the commands


def test_the_command_names_bad_shards_and_exits_with_1(data):
    good = CliRunner().invoke(command, ["verify", str(data)])
    assert good.exit_code == 0
    assert "is whole" in good.output
    change(data / TAR, lambda b: flip(b, 8 * 515))
    result = CliRunner().invoke(command, ["verify", str(data)])
    assert result.exit_code == 1
    assert f"bad: {TAR}: sha256 is " in result.output
    told = json.loads(CliRunner().invoke(command, ["verify", str(data), "--json"]).output)
    assert (told["ok"], told["bad"]) == (False, [TAR])


def test_inspect_counts_what_was_built(whole):
    facts = json.loads(CliRunner().invoke(command, ["inspect", str(whole), "--json"]).output)
    train, held_out = facts["splits"]["train"], facts["splits"]["held_out"]
    assert train["documents"] + held_out["documents"] == 80
    assert sum(row["documents"] for row in train["length"]["histogram"]) == train["documents"]
    assert train["length"]["min"] <= train["length"]["median"] <= train["length"]["max"]
    assert sum(row["share"] for row in train["frequent"]) <= 1
    assert "document" in train["examples"][0]["begins"]
    drawn = CliRunner().invoke(command, ["inspect", str(whole)]).output
    assert "█" in drawn
    assert f"{train['documents']} documents" in drawn
