"""Pictures of patterns: the rule as pixels, coloured by what the tile answers say of them."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from torch import Tensor

from regard.errors import UnsupportedError, require
from regard.patterns.block_map import Grid, build_block_map, distinct_heads
from regard.patterns.checks import at_least
from regard.patterns.tiles import EMPTY, FULL, PARTIAL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from regard.patterns.algebra import Pattern

LARGEST = 4096
FORMATS = (".png", ".svg", ".pdf")
COLOURS = {
    "allowed, in a FULL tile": "#1f5a96",
    "allowed, in a PARTIAL tile": "#e0861a",
    "not allowed, in a PARTIAL tile": "#fbe5c8",
    "in an EMPTY tile": "#f3f3f3",
}


def draw(pattern: Pattern, grid: Grid, *, row: int, refine: bool, path: str | Path | None) -> Figure:
    """One panel per distinct head; queries downwards, keys to the right, thin lines between tiles.

    Raises UnsupportedError without matplotlib, ArgumentError for more than 4096 positions a side, a batch row that is
    not there, or a file name that does not end in .png, .svg or .pdf.
    """
    largest, rows = max(grid.n, grid.m), pattern.rows or 1
    require(
        largest <= LARGEST,
        "n, m",
        largest,
        f"at most {LARGEST} positions a side in a picture; block_map() has no limit",
    )
    at_least("row", row, 0)
    require(row < rows, "row", row, f"a batch row from 0 to {rows - 1}")
    named = path is None or Path(path).suffix.lower() in FORMATS
    require(named, "path", path, f"a file name ending in {', '.join(FORMATS)}")
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise UnsupportedError("pictures of patterns need the package matplotlib: pip install matplotlib") from None

    different, index = distinct_heads(pattern, pattern.heads or 1)
    kinds = build_block_map(pattern, grid, heads=pattern.heads or 1, refine=refine).kinds
    dense = pattern.dense(grid.n, grid.m, q_offset=grid.q_offset)
    height = 4.2 * min(max(grid.n / grid.m, 0.2), 2.0) + 1.6  # the panel, then title, axis and legend
    figure = Figure(figsize=(4.6 * len(different), height), layout="compressed")
    for g, (axes, p) in enumerate(zip(figure.subplots(1, len(different), squeeze=False)[0], different, strict=True)):
        rule = dense[row if dense.shape[0] > 1 else 0, index.index(g)]
        first, last = grid.q_offset - 0.5, grid.q_offset + grid.n - 0.5
        axes.imshow(
            _pixels(rule, kinds[row if kinds.shape[0] > 1 else 0, g], grid).numpy(),
            cmap=ListedColormap(list(COLOURS.values())),
            vmin=0,
            vmax=len(COLOURS) - 1,
            extent=(-0.5, grid.m - 0.5, last, first),
            interpolation="nearest",
        )
        axes.hlines([first + y for y in range(grid.bq, grid.n, grid.bq)], -0.5, grid.m - 0.5, "#b8b8b8", linewidth=0.4)
        axes.vlines([x - 0.5 for x in range(grid.bk, grid.m, grid.bk)], first, last, "#b8b8b8", linewidth=0.4)
        heads = [h for h, own in enumerate(index) if own == g]
        which = f"head {', '.join(map(str, heads))}: " if pattern.heads else ""
        axes.set_title(fill(which + repr(p), 44), fontsize=9)
        axes.set_xlabel("key position")
        axes.set_ylabel("query position")
    patches = [Patch(facecolor=colour, edgecolor="#b8b8b8", label=label) for label, colour in COLOURS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    if path is not None:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    return figure


def _pixels(rule: Tensor, kinds: Tensor, grid: Grid) -> Tensor:
    """uint8 (n, m): the number of its colour for every entry. Where a tile answer were untrue, the rule is drawn."""
    tile = kinds.repeat_interleave(grid.bq, 0)[: grid.n].repeat_interleave(grid.bk, 1)[:, : grid.m]
    out = tile.new_full(rule.shape, 3)
    out[(tile == PARTIAL) | ((tile == FULL) & ~rule)] = 2
    out[rule & ((tile == PARTIAL) | (tile == EMPTY))] = 1
    out[rule & (tile == FULL)] = 0
    return out
