"""Our tars are webdataset's, byte for byte; tars of others are read as tarfile reads them, and never trusted."""

import io
import tarfile

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.base.errors import DataError
from megatrain.data import tar


@given(st.lists(st.binary(max_size=1100), max_size=25))
@settings(deadline=None, max_examples=60)
def test_members_and_end_are_those_of_webdataset(contents):
    theirs = io.BytesIO()
    with webdataset.TarWriter(theirs, user="", group="", mtime=0, encoder=False) as writer:
        for number, content in enumerate(contents):
            writer.write({"__key__": f"{number:09d}", "tokens": content, "json": b"{}"})
    ours = b""
    for number, content in enumerate(contents):
        ours += tar.member(b"%09d.json" % number, b"{}") + tar.member(b"%09d.tokens" % number, content)
    assert ours + tar.end(len(ours)) == theirs.getvalue()


def test_what_a_plain_header_cannot_say_is_refused():
    with pytest.raises(ValueError, match="needs more than a plain header"):
        tar.member(b"x" * 101, b"")


NAMES = st.text(alphabet="aé/.東 ", min_size=1, max_size=160).filter(lambda name: name.strip("/. ") and name[-1] != "/")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@given(found=st.lists(st.tuples(NAMES, st.binary(max_size=1100)), max_size=8), data=st.data())
@settings(deadline=None, max_examples=40)
def test_members_of_any_tar_lie_where_tarfile_finds_them(tmp_path_factory, format, found, data):
    path = tmp_path_factory.getbasetemp() / "any.tar"
    with tarfile.open(path, "w", format=format) as written:
        for name, content in found:
            info = tarfile.TarInfo(
                name if format != tarfile.USTAR_FORMAT else name.encode()[:50].decode("utf-8", "ignore")
            )
            info.type = data.draw(st.sampled_from([tarfile.REGTYPE] * 3 + [tarfile.SYMTYPE, tarfile.DIRTYPE]))
            info.linkname = "x" * 150 if format != tarfile.USTAR_FORMAT else "x"
            info.size = len(content) if info.isreg() else 0
            written.addfile(info, io.BytesIO(content))
    with tarfile.open(path) as theirs, open(path, "rb") as file:
        expected = [(m.name, m.offset_data, m.size, m.isreg()) for m in theirs]
        ours = [(m.name.rstrip("/"), m.offset, m.size, m.plain) for m in tar.members(file, "any.tar")]
    assert ours == expected


def raw(name: bytes, size: bytes, kind: bytes) -> bytes:
    header = bytearray(512)
    header[: len(name)], header[124:136], header[148:156], header[156:157] = name, size.ljust(12, b"\0"), b" " * 8, kind
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "ends at byte 0 without an end"),
        (raw(b"a", b"5", b"0"), "ends at byte 512|is cut"),
        (raw(b"a", b"77777777777", b"0") + bytes(1024), "is cut: a member at byte 0 has 8589934591 bytes"),
        (raw(b"a", b"\x80" + b"\xff" * 11, b"0") + bytes(1024), "is cut"),
        (raw(b"a", b"77777777777", b"x") + bytes(1024), "no honest tar needs"),
        (raw(b"a", b"77777777777", b"L") + bytes(1024), "no honest tar needs"),
        (raw(b"a", b"20", b"x") + b"999999 path=x\n".ljust(1536, b"\0"), "damaged extended header"),
        (raw(b"a", b"20", b"x") + b"0 path=xxxxxxxx\n".ljust(1536, b"\0"), "damaged extended header"),
        (raw(b"a", b"-7", b"0") + bytes(1024), "no sound tar header"),
        (raw(b"a", b"5", b"0").replace(b"a", b"b", 1) + bytes(1024), "no sound tar header"),
        (b"not a tar" * 100, "no sound tar header"),
    ],
)
def test_a_tar_that_lies_is_refused_and_costs_nothing(tmp_path, content, says):
    (tmp_path / "a.tar").write_bytes(content)
    with open(tmp_path / "a.tar", "rb") as file, pytest.raises(DataError, match=says):
        list(tar.members(file, "a.tar"))
