"""How many numbers attention moves to and from slow memory: FlashAttention's claim about IO, counted over its loop.

With S numbers of fast memory, D channels, N queries and keys (Dao et al. 2022, arXiv 2205.14135): the dense algorithm
moves Θ(N·D + N²), the tiled one Θ(N²·D² / S) for D ≤ S ≤ N·D, and with a share s of its blocks Θ(N·D + s·N²·D² / S).
"""

from __future__ import annotations

from regard.errors import require
from regard.patterns import Pattern
from regard.patterns.tiles import EMPTY


def flash_blocks(head_dim: int, sram: int) -> tuple[int, int]:
    """Queries and keys of a block: Bc = ⌈S / 4D⌉, Br = min(Bc, D), as the paper sets them."""
    _check(head_dim=head_dim, sram=sram)
    columns = -(-sram // (4 * head_dim))
    return min(columns, head_dim), columns


def dense_traffic(n: int, m: int | None = None, *, head_dim: int) -> int:
    """Numbers read and written for one head, S and P going through slow memory."""
    m = n if m is None else m
    _check(n=n, m=m, head_dim=head_dim)
    logits = (n + m) * head_dim + n * m  # read Q, K; write S
    weights = 2 * n * m  # read S, write P
    values = n * m + m * head_dim + n * head_dim  # read P, V; write O
    return logits + weights + values


def flash_traffic(n: int, m: int | None = None, *, head_dim: int, sram: int, pattern: Pattern | None = None) -> int:
    """Numbers read and written for one head by the paper's Algorithm 1, with `sram` numbers of fast memory.

    Keys are the outer loop: a block of K and V is read once, and for it every block of Q, O, l and m is read, and O, l
    and m written again. Blocks that a pattern leaves EMPTY are skipped (its first row and head count). Raises
    ArgumentError.

    >>> flash_traffic(1024, head_dim=64, sram=49_152) < dense_traffic(1024, head_dim=64)
    True
    """
    m = n if m is None else m
    _check(n=n, m=m, head_dim=head_dim)
    rows, columns = flash_blocks(head_dim, sram)
    kinds = None if pattern is None else pattern.block_map(n, m, block=(rows, columns)).kinds[0, 0]
    moved = n * (head_dim + 2)  # O, l and m are written once to begin with
    for c, start in enumerate(range(0, m, columns)):
        heights = [
            min(rows, n - top) for a, top in enumerate(range(0, n, rows)) if kinds is None or kinds[a, c] != EMPTY
        ]
        if heights:
            moved += 2 * min(columns, m - start) * head_dim  # K and V
        moved += sum(h * (2 * head_dim + 2) + h * (head_dim + 2) for h in heights)
    return moved


def _check(**sizes: int) -> None:
    for name, value in sizes.items():
        require(isinstance(value, int) and value >= 1, name, value, "an int ≥ 1")
