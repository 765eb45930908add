"""Our tars are webdataset's, byte for byte."""

import io

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

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
