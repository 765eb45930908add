"""The tokenizer loses nothing, and is the same whenever it is trained on the same text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.base.errors import DataError
from megatrain.data.tokenizer import END_OF_DOCUMENT, Tokenizer, train_tokenizer

CORPUS = [
    "the cat sat on the mat, the hat and the bat\n" * 4,
    "naïve café, 東京, 12345 + 67890\n" * 4,
    "def f(x):\n    return x\n",
]


@pytest.fixture(scope="module")
def content() -> bytes:
    return train_tokenizer(CORPUS, 300)


@pytest.fixture(scope="module")
def tokenizer(content) -> Tokenizer:
    return Tokenizer.parse(content, "test")


def test_training_twice_gives_the_same_file(content):
    assert train_tokenizer(iter(CORPUS), 300) == content


@settings(deadline=None)
@given(text=st.text())
def test_any_text_decodes_to_itself(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None)
@given(text=st.text())
def test_a_document_is_its_encoding_and_one_end(tokenizer, text):
    (ids,) = tokenizer.encode_documents([text + END_OF_DOCUMENT])
    assert ids.tolist() == [*tokenizer.encode(text + END_OF_DOCUMENT), tokenizer.end_of_document]
    assert (ids == tokenizer.end_of_document).sum() == 1


def test_every_id_is_below_the_vocabulary_size(tokenizer):
    ids = tokenizer.backend.get_vocab().values()
    assert sorted(ids) == list(range(tokenizer.vocab_size)) == list(range(300))


def test_frequent_words_become_single_tokens(tokenizer):
    assert len(tokenizer.encode(" the")) == 1


def test_a_file_that_truncates_and_pads_still_encodes_whole_documents(content):
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(content.decode())
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    crippled = Tokenizer.parse(backend.to_str().encode(), "test")
    plain = Tokenizer.parse(content, "test")
    assert crippled.encode(CORPUS[0]) == plain.encode(CORPUS[0])
    assert crippled.encode("the") == plain.encode("the")


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(DataError, match=r"vocab_size=256 is too small.*at least 257"):
        train_tokenizer(CORPUS, 256)


def test_an_end_of_document_that_is_no_token_is_refused_with_the_nearest(content):
    with pytest.raises(DataError, match=r"no token '<\|endoftxt\|>'.*did you mean <\|endoftext\|>"):
        Tokenizer.parse(content, "t.json", "<|endoftxt|>")


@pytest.mark.parametrize("content", [b"{}", b"not json", b"\xff\xfe", b""])
def test_what_is_no_tokenizer_is_refused(content):
    with pytest.raises(DataError, match=r"t.json is not a tokenizer"):
        Tokenizer.parse(content, "t.json")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read .No such file"):
        Tokenizer.open(tmp_path / "tokenizer.json")
