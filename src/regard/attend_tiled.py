"""Attention on a grid of tokens, computed tile by tile and given back in the caller's order."""

from __future__ import annotations

from regard.attend import AttendOptions, attend
from regard.errors import require
from regard.patterns.algebra import Pattern
from regard.patterns.permutation import Tiling, best_tile, grid_of, permuted
from regard.shapes import Heads, Keys, LogSumExp, Queries, Sinks, Values, check_qkv

BLOCK = 128  # tokens of a tile, as the block-sparse kernels have them


def tiling_of(pattern: Pattern, block: int = BLOCK) -> Tiling:
    """The tiling of the pattern's grid that touches the fewest tiles of `block` tokens.

    Raises ArgumentError for a pattern without a grid, or on several.
    """
    grid = grid_of(pattern)
    return Tiling(grid.layout, best_tile(pattern, block), before=grid.before, after=grid.after)


def attend_tiled(
    q: Queries,
    k: Keys,
    v: Values,
    *,
    pattern: Pattern,
    tiling: Tiling | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Sinks | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    validate: bool = False,
) -> Heads | tuple[Heads, LogSumExp]:
    """`attend` under a pattern on a grid, with tokens reordered so that a block is a box of the grid.

    The same result as `attend(q, k, v, pattern=pattern)`, in the caller's order; a block-sparse executor visits fewer
    tiles. The pattern and all tensors are in the caller's order: q (B, Hq, N, D), k (B, Hkv, N, D), v (B, Hkv, N, Dv),
    N the tokens of the tiling.

    tiling: None takes `tiling_of(pattern)`; choose it once where the same pattern is used again.
    The others as in `attend`. There is no key_padding: a grid has no padding, and what a tiling adds nobody sees.
    Raises what `attend` raises, and ArgumentError where tiling, pattern and tensors differ in N.
    """
    check_qkv(q, k, v)
    tiling = tiling_of(pattern) if tiling is None else tiling
    require(isinstance(tiling, Tiling), "tiling", repr(tiling), "a Tiling, or None")
    for name, x in (("q", q), ("k", k)):
        require(x.shape[2] == tiling.tokens, name, f"{x.shape[2]} tokens", f"{tiling.tokens}, as the tiling has")
    order, inverse = tiling.order(q.device), tiling.inverse(q.device)
    q, k, v = (x.index_select(2, order) for x in (q, k, v))
    options: AttendOptions = {
        "pattern": permuted(pattern, tiling),
        "scale": scale,
        "softcap": softcap,
        "sinks": sinks,
        "backend": backend,
        "validate": validate,
    }
    if not return_lse:
        return attend(q, k, v, **options).index_select(2, inverse)
    out, lse = attend(q, k, v, return_lse=True, **options)
    return out.index_select(2, inverse), lse.index_select(2, inverse)
