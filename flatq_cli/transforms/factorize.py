"""How a width is split into the two sizes of a Kronecker product. The reasons: docs/decisions/0001-factorization.md."""

from __future__ import annotations

from math import isqrt

TILE = 16  # sizes of a matrix are rounded up to this by tensor cores, and so by what they cost


def factor(width: int) -> tuple[int, int]:
    """Split `width` into (n1, n2), n1 ≤ n2, n1 · n2 = width, for the cheapest product; of equals, the most square one.

    The cost counted is ⌈n1⌉ + ⌈n2⌉, each rounded up to a multiple of 16. Any width ≥ 1 works; a prime gives (1,
    width), a dense matrix: correct, but 2·width² FLOP a row.

    Raises:
        ValueError: if width < 1.
    """
    if width < 1:
        raise ValueError(f"a width must be at least 1, not {width}")
    pairs = [(n1, width // n1) for n1 in range(isqrt(width), 0, -1) if width % n1 == 0]  # most square first
    return min(pairs, key=lambda pair: _padded(pair[0]) + _padded(pair[1]))


def _padded(size: int) -> int:
    return -(-size // TILE) * TILE
