"""Random bits as a pure function of a counter, on any device: the same under every layout and recomputation."""

from torch import Tensor


def mix(x: Tensor) -> Tensor:
    """int64 -> int64: the finaliser of splitmix64 (Steele et al. 2014), in wrapping arithmetic."""
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as a signed number
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


def _shift(x: Tensor, n: int) -> Tensor:
    """Logical shift right: torch's own copies the sign."""
    return (x >> n) & ((1 << (64 - n)) - 1)
