"""Quantities with units, as people write them in run files: "4B tokens", "80GiB", 1_000_000, "2e6"."""

import re
from decimal import Decimal

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BYTES |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}

_LARGEST = 27
"""Decimal digits of the largest quantity, less one: far above any run, and all within Decimal's exact precision."""

_NUMBER = re.compile(r"\s*(\d[\d_,]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*([A-Za-z]*)\s*([A-Za-z]*)\s*")


def count(text: str | int | float, unit: str = "tokens") -> int:
    """A whole number of things.

    Args:
        text: a number, or text such as "4B tokens", "1.5M", "2_000 steps".
        unit: the word that may follow the number.

    Raises:
        ValueError: it is not a whole number of `unit`; the message says what is allowed.

    >>> count("1.5M tokens")
    1500000
    """
    return _whole(text, _DECIMAL, unit)


def n_bytes(text: str | int | float) -> int:
    """A number of bytes: "80GiB" is 80 * 2**30, "80GB" is 80 * 10**9, a bare number is bytes.

    >>> n_bytes("2KiB")
    2048
    """
    return _whole(text, {"": 1, **_BYTES}, "bytes")


def _whole(text: str | int | float, suffixes: dict[str, int], unit: str) -> int:
    example = "80GiB" if unit == "bytes" else f'"4B {unit}"'
    refusal = ValueError(f"{text!r} is not a number of {unit}: write a whole number or a quantity such as {example}")
    if isinstance(text, bool):
        raise refusal
    if isinstance(text, int | float):
        value = Decimal(text)
    else:
        match = _NUMBER.fullmatch(text)
        if not match:
            raise refusal
        digits, suffix, word = match.groups()
        if suffix.lower() in (unit, unit.rstrip("s")) and not word:
            suffix, word = "", suffix
        if word.lower() not in ("", unit, unit.rstrip("s")) or suffix.lower() not in suffixes:
            raise refusal
        value = Decimal(digits.replace("_", "").replace(",", "")) * suffixes[suffix.lower()]  # exact, unlike floats
    if not value.is_finite() or value < 0 or value.adjusted() > _LARGEST or value != value.to_integral_value():
        raise refusal
    return int(value)


def show_bytes(n: float) -> str:
    """`n` bytes for people.

    >>> show_bytes(3 * 2**30)
    '3.0GiB'
    """
    for suffix in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f}{suffix}" if suffix == "B" else f"{n:.1f}{suffix}"
        n /= 1024
    return f"{n:.1f}TiB"


def show_count(n: float) -> str:
    """`n` things for people.

    >>> show_count(1_234_567)
    '1.23M'
    """
    for size, suffix in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if abs(n) >= 0.9995 * size and abs(n) >= 1000:  # 999,999 rounds to 1M, not to 1e+03k
            return f"{n / size:.3g}{suffix}"
    return f"{n:.3g}" if n != int(n) else str(int(n))


def show_seconds(seconds: float) -> str:
    """A duration for people.

    >>> show_seconds(3725)
    '1h02m'
    """
    whole = int(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    if whole >= 60:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{seconds:.1f}s"
