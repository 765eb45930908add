"""Text as it comes: whole characters, the same as the decoding of everything, and nothing beyond a stop string."""

import functools

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from megatrain.data.tokenizer import Tokenizer
from megatrain.generate.text import StopStrings, TextStream
from tests.generate.toy import tokenizer

TEXT = st.text(st.sampled_from("ab (é日🙂ö\u0308\ufffd\n") | st.characters(codec="utf-8"), max_size=12)


@functools.cache
def byte_fallback() -> Tokenizer:
    """As Llama's: a space is a visible letter of its word, the first one is dropped, and rare letters are bytes."""
    words = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "▁b", "é"]
    merges = [("▁", "a"), ("▁", "b")]
    backend = tokenizers.Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens(["</s>"])
    return Tokenizer.parse(backend.to_str().encode(), "toy")


def streamed(of: Tokenizer, ids: list[int], context: list[int] | None = None) -> tuple[list[str], str]:
    stream = TextStream(of, context or [])
    return [stream.push(i) for i in ids], stream.finish()


@pytest.mark.parametrize("of", [tokenizer, byte_fallback])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_pieces_of_any_tokens_are_the_decoding_of_all_of_them(of, data):
    """Any tokens: those of a text, and those that no text has, such as half of a character."""
    of = of()
    ids = data.draw(st.lists(st.integers(0, of.vocab_size - 1), max_size=12) | TEXT.map(of.encode))
    pieces, rest = streamed(of, ids)
    assert "".join(pieces) + rest == of.decode(ids)


@pytest.mark.parametrize("of", [tokenizer, byte_fallback])
@settings(max_examples=100, deadline=None)
@given(before=TEXT, after=TEXT)
def test_a_prompt_and_the_pieces_after_it_are_one_text(of, before, after):
    of = of()
    ids = of.encode(before + after)
    for border in range(len(ids) + 1):
        shown = of.decode(ids[:border])
        if "\ufffd" in shown:
            continue  # a prompt ends with a whole character
        pieces, rest = streamed(of, ids[border:], ids[:border])
        assert shown + "".join(pieces) + rest == of.decode(ids)


@settings(max_examples=60, deadline=None)
@given(TEXT.filter(lambda text: "\ufffd" not in text))
def test_no_piece_is_part_of_a_character(text):
    pieces, rest = streamed(tokenizer(), tokenizer().encode(text))
    assert not any("\ufffd" in piece for piece in pieces)
    assert rest == ""


def test_text_comes_with_its_token_and_not_later():
    ids = tokenizer().encode("def main(x)")
    assert streamed(tokenizer(), ids)[0] == [tokenizer().decode([i]) for i in ids]


def test_a_character_cut_off_by_the_end_is_shown_as_such():
    ids = tokenizer().encode("a日")[:-1]
    pieces, rest = streamed(tokenizer(), ids)
    assert "".join(pieces) == "a"
    assert rest == "\ufffd"


# ------------------------------------------------------------------------------------------------ stop strings


def up_to_stop(text: str, stops: list[str]) -> str:
    """A character at a time: what stands before the stop string that is complete first."""
    for end in range(len(text) + 1):
        if ending := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - len(max(ending, key=len))]
    return text


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_string_however_it_is_cut_into_pieces(pieces, stops):
    stream = StopStrings(stops)
    shown = "".join(stream.push(piece) for piece in pieces)
    if not stream.found:
        shown += stream.finish()
    text = "".join(pieces)
    assert shown == up_to_stop(text, stops)
    assert stream.found == any(stop in text for stop in stops)


def test_what_cannot_begin_a_stop_string_is_not_held_back():
    stream = StopStrings(["\n\n"])
    assert [stream.push(piece) for piece in ("a", "b\n", "c", "\n", "\nd", "e")] == ["a", "b", "\nc", "", "", ""]
    assert stream.found
