import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.base import errors, random, units
from megatrain.base.units import count, n_bytes, show_bytes, show_count, show_seconds


@pytest.mark.parametrize("module", [units, errors, random])
def test_the_examples_in_docstrings_hold(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0, 0),
        (7, 7),
        (7.0, 7),
        (1e9, 10**9),
        ("7", 7),
        ("1_000_000", 10**6),
        ("1,000", 1000),
        ("2e6", 2 * 10**6),
        ("4B", 4 * 10**9),
        ("4b tokens", 4 * 10**9),
        ("4 G tokens", 4 * 10**9),
        ("1.5M", 1_500_000),
        ("0.1k", 100),
        ("12 tokens", 12),
        ("1 token", 1),
        (2**60 + 1, 2**60 + 1),
        (f"{2**60 + 1}", 2**60 + 1),
    ],
)
def test_a_count_is_read_exactly(text, expected):
    assert count(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "B", "-5", "4X", "4B steps", "1.5", 1.5, -1, True, float("inf"), float("nan"), "1e999", "4 B B", "0x10"],
)
def test_what_is_no_count_is_refused_in_one_sentence(text):
    with pytest.raises(
        ValueError, match='is not a number of tokens: write a whole number or a quantity such as "4B tokens"'
    ):
        count(text)


def test_the_unit_named_in_the_file_must_be_the_one_expected():
    assert count("2_000 steps", "steps") == 2000
    with pytest.raises(ValueError, match="is not a number of steps"):
        count("4B tokens", "steps")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80GiB", 80 * 2**30),
        ("80GB", 80 * 10**9),
        ("1.5 KiB", 1536),
        ("512", 512),
        ("512 bytes", 512),
        ("3b", 3),
        (12, 12),
    ],
)
def test_bytes_know_binary_and_decimal_prefixes(text, expected):
    assert n_bytes(text) == expected


def test_a_byte_count_refuses_other_units():
    with pytest.raises(ValueError, match=r"'80 tokens' is not a number of bytes: .* 80GiB"):
        n_bytes("80 tokens")


@given(st.integers(0, 10**15), st.sampled_from(["", "k", "M", "B", "T"]))
def test_integers_with_a_suffix_are_exact_however_large(n, suffix):
    factor = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}[suffix]
    assert count(f"{n}{suffix} tokens") == n * factor


@given(st.integers(0, 999 * 10**12))
def test_what_is_shown_is_within_half_a_percent_of_the_truth(n):
    assert abs(count(show_count(n)) - n) <= 0.005 * n
    assert "e" not in show_count(n)


def test_quantities_are_shown_for_people():
    assert [show_count(n) for n in (0, 0.5, 999, 999_999, 1000, 4 * 10**12)] == ["0", "0.5", "999", "1M", "1k", "4T"]
    assert [show_bytes(n) for n in (0, 1023, 1024, 80 * 2**30, 2**41)] == ["0B", "1023B", "1.0KiB", "80.0GiB", "2.0TiB"]
    assert [show_seconds(s) for s in (0.26, 61, 3725)] == ["0.3s", "1m01s", "1h02m"]
