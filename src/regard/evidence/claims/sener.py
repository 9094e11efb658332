"""SeNER: pairs of words in a band take a fraction of the memory of the whole grid; and what waits."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu

from regard.evidence.claim import Measured, Settings, claim, later, verdict
from regard.evidence.peak_memory import peak_bytes
from regard.layers.span_grid import SpanGridAttention
from regard.patterns.arrow import SENER

CHANNELS, REACH = 32, 128


@claim(
    "sener/memory",
    paper=SENER,
    statement="attention over the pairs of words near the diagonal takes far less memory than over all of them",
    figure="1.3M cells in place of 26.2M at 5120 words, 20 × fewer",
    measurement="peak of memory beyond input and weights of one forward of the layer, 32 channels, float32, on the "
    "CPU: the band of 128 words to both sides at 4096 words, and the same modules over the whole grid at 512 and 1024 "
    "words, taken to 4096 by the square of the length (which the two lengths have to bear out to 10 %)",
    unit="× less at 4096 words",
    tolerance="at least 10 ×, and the band's memory linear in the length (1024 to 4096 words: 4 × to 10 %); partly: at "
    "least 5 ×",
    needs="cpu",
    minutes=1.5,
)
@torch.no_grad()
def memory(settings: Settings) -> Measured:
    reach, words, small = settings.pick((REACH, 4096, (512, 1024)), (4, 64, (16, 32)))
    layer = SpanGridAttention(CHANNELS, reach=reach).eval()
    band = {}
    for n in (words // 4, words):
        cells = torch.randn(1, n * (2 * reach + 1), CHANNELS)
        band[n] = peak_bytes(partial(layer, cells))
    grid = {n: peak_bytes(partial(_whole_grid, layer, torch.randn(1, n, n, CHANNELS))) for n in small}
    quadratic = abs(grid[small[1]] / grid[small[0]] / 4 - 1) <= 0.1
    taken = grid[small[1]] * (words / small[1]) ** 2
    less, linear = taken / band[words], abs(band[words] / band[words // 4] / 4 - 1) <= 0.1
    word = verdict(reproduced=less >= 10 and linear and quadratic, partly=less >= 5 and quadratic)
    why = (
        f"band: {', '.join(f'{size / 2**20:.0f} MiB at {n}' for n, size in band.items())} words; whole grid: "
        f"{', '.join(f'{size / 2**20:.0f} MiB at {n}' for n, size in grid.items())}, so {taken / 2**20:.0f} at {words}"
    )
    return Measured(less, word, why, {"band": band, "grid": grid})


def _whole_grid(layer: SpanGridAttention, grid: Tensor) -> Tensor:
    """The same layer where all pairs (B, n, n, C) are cells: attention along rows and columns, then convolutions."""
    n = grid.shape[1]
    real = torch.ones(grid.shape[:3], dtype=torch.bool)
    later = torch.arange(n) >= torch.arange(n)[:, None]
    grid = grid + layer.side[later.long()]
    rows = layer.along_row(grid, real)
    columns = layer.along_column(grid.transpose(1, 2).contiguous(), real).transpose(1, 2)
    grid = layer.attended(grid + layer.join(torch.cat([rows, columns], -1)))
    del rows, columns
    hidden = gelu(layer.first(grid.movedim(-1, 1)))
    out: Tensor = layer.convolved(grid + layer.second(hidden).movedim(1, -1))
    return out


later(
    "sener/long-entities",
    paper=SENER,
    statement="arrow attention and the band find long entities in long texts better than earlier methods",
    figure="best F1 on data sets of long named entities",
    needs="training of a small encoder with this layer on synthetic documents of 2000 words (3 types of entity, up to "
    "60 words long; to reach an F1 of 0.95)",
)
