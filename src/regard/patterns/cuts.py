"""Where a row of tokens may be cut: no query before the cut sees a key behind it."""

from __future__ import annotations

import torch

from regard.errors import require
from regard.patterns.algebra import Pattern, a_pattern, at_least


def crosses(pattern: Pattern, n: int, cut: int) -> bool:
    """Does some query before `cut` see a key at or after it (of n)? Then a prefill in chunks must not be cut there.

    Exact for patterns whose tile answers are exact, sound (True at worst) for others. Raises ArgumentError.
    """
    a_pattern("pattern", pattern)
    at_least("n", n, 2)
    if pattern.extent is not None:
        require(n <= pattern.extent, "n", n, f"at most {pattern.extent}, as many as the pattern has ids")
    at_least("cut", cut, 1)
    require(cut < n, "cut", cut, f"a position from 1 to {n - 1}")
    return cut_off(pattern, n, cut)


def cut_off(pattern: Pattern, n: int, cut: int) -> bool:
    """The same, unchecked, on the pattern's device (for which it waits)."""
    tensors = pattern.tensors()
    device = tensors[0].device if tensors else torch.device("cpu")
    b = torch.arange(pattern.rows or 1, device=device)[:, None, None]
    h = torch.arange(pattern.heads or 1, device=device)[:, None]
    first, last, start, end = (torch.tensor([x], device=device) for x in (0, cut - 1, cut, n - 1))
    return bool((pattern.tiles(b, h, first, last, start, end) > 0).any())
