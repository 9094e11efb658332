"""Radial attention: windows that halve whenever the distance in frames doubles (Li et al. 2025, arXiv 2506.19852)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.errors import require
from regard.patterns.algebra import Pattern, at_least, true_or_false
from regard.patterns.block_layouts import BlockLayout
from regard.patterns.grid import OnGrid
from regard.patterns.order import Box, Coordinates
from regard.registry import Paper, register

RADIAL = Paper(
    "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation",
    "Li et al.",
    2025,
    "2506.19852",
)
DENSE_COLUMN, DENSE_SHARE = (1, 3), (3, 5)  # the released code: over 1/3 of a column, in over 60 % of the columns


@dataclass(frozen=True)
class Radial(OnGrid):
    """Layout (frames, tokens of a frame s). With D frames between, p = 2^⌊log₂ max(D, 1)⌋, and places a and c:

    |a − c| + 1 ≤ s/p; or a = c and D a multiple of ⌈p/s⌉; or the key lies in frame 0 (sink).
    """

    sink: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        true_or_false("sink", self.sink)

    def grid_rule(self, q: Coordinates, k: Coordinates) -> Tensor:
        s = self.layout[1]
        apart, far = (q[0] - k[0]).abs(), (q[1] - k[1]).abs()
        p = _power_of_two(apart.clamp(min=1))
        near = far < s // p
        kept = (far == 0) & (apart % ((p + (s - 1)) // s) == 0)
        return near | kept | (k[0] == 0) if self.sink else near | kept

    def box_answers(self, q: Box, k: Box) -> tuple[Tensor, Tensor]:
        """Every distance in frames from the least to the greatest occurs, with every pair of places."""
        some, every = self._apart(q, k, k.first[0])
        if not self.sink:
            return some, every
        _, later = self._apart(q, k, k.first[0].clamp(min=1))  # keys of frame 0 are seen anyhow
        return some | (k.first[0] == 0), later | (k.last[0] == 0)

    def _apart(self, q: Box, k: Box, first_frame: Tensor) -> tuple[Tensor, Tensor]:
        """The answers without the sink, for the keys from `first_frame` on."""
        s = self.layout[1]
        least, most = _distances(q.first[0], q.last[0], first_frame, k.last[0])
        near, far = _distances(q.first[1], q.last[1], k.first[1], k.last[1])
        some = near < s // _power_of_two(least.clamp(min=1))
        every = far < s // _power_of_two(most.clamp(min=1))
        on_diagonal, all_kept = torch.zeros_like(some), torch.ones_like(some)
        for p in _powers_from(s, self.layout[0]):  # distances p..2p−1: the window is below one token
            low, high, step = least.clamp(min=p), most.clamp(max=2 * p - 1), -(-p // s)
            taken = high // step - (low - 1) // step
            on_diagonal = on_diagonal | ((low <= high) & (taken > 0))
            all_kept = all_kept & ((low > high) | (taken == high - low + 1))
        return some | ((near == 0) & on_diagonal), every | ((far == 0) & all_kept)


def _distances(q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest |q − k|."""
    ahead, behind = k1 - q0, q1 - k0
    return torch.maximum(k0 - q1, q0 - k1).clamp(min=0), torch.maximum(ahead, behind)


def _power_of_two(x: Tensor) -> Tensor:
    """The largest power of two ≤ x, for 1 ≤ x < 2³¹, in whole numbers."""
    for shift in (1, 2, 4, 8, 16):
        x = x | (x >> shift)
    return x - (x >> 1)


def _powers_from(s: int, frames: int) -> list[int]:
    """The powers of two above s and below the number of frames."""
    return [1 << e for e in range(s.bit_length(), frames.bit_length()) if s < 1 << e < frames]


@register(
    "radial-attention",
    kind="pattern",
    families=("static-pattern",),
    paper=RADIAL,
    cost="O(N·log frames) pairs of places: at most 4·s·N·(log₂ N − log₂ s) entries, and the first frame",
    example=lambda: Radial((8, 3), 0, 0, True),
    causal=False,
)
def radial_attention(frames: int, tokens: int, *, sink: bool = True, before: int = 0, after: int = 0) -> Pattern:
    """Nearby frames see each other whole; each doubling of their distance halves the window around the same place.

    frames × tokens of a frame, frame by frame; `before` and `after` them text, which sees all and is seen by all.
    With D frames between and p the largest power of two ≤ max(D, 1), place a sees place c where |a − c| + 1 ≤ tokens/p;
    where that is less than one token, only a = c and only every ⌈p / tokens⌉-th frame. Distances between places are in
    raster order, as in the paper. sink: every query sees the whole first frame.
    This is the paper's rule by tokens; `radial_blocks` is what its code runs. The first denoising steps are to be dense
    (the paper: about a quarter of them): that is the caller's. Raises ArgumentError.

    >>> radial_attention(4, 2, sink=False).dense(8).int()[0, 0, 0].tolist()
    [1, 1, 1, 1, 1, 0, 1, 0]
    """
    at_least("frames", frames, 1)
    at_least("tokens", tokens, 1)
    return Radial((frames, tokens), before, after, sink)


def radial_blocks(
    frames: int,
    tokens: int,
    *,
    text: int = 0,
    block: int = 128,
    decay: float = 1.0,
    next_frame: int | None = None,
    device: torch.device | str | None = None,
) -> Pattern:
    """Radial attention as its released code runs it: whole blocks, by another rule than `radial_attention`.

    frames × tokens of a frame, then `text` tokens. Frames D apart see |a − c| ≤ width: the whole frame for D = 0,
    `next_frame` for D = 1 (None = tokens, as for HunyuanVideo; Wan uses tokens // 2), else the larger of `block` and
    decay · 2^bitlen(tokens) / 2^bitlen(D); where that quotient without decay is below `block`, only frames whose D is a
    multiple of block · 2^bitlen(D) / 2^bitlen(tokens). Of a pair of frames a block is kept if over 60 % of the key
    columns that hold anything are filled by over a third of the block's rows; a block of several frames is kept if any
    pair keeps it. Key blocks that hold a token of the first frame, and blocks that hold text, are always kept (ours,
    for blocks that hold others besides). Computed from block borders alone. Raises ArgumentError.

    >>> radial_blocks(4, 128).dense(512)[0, 0, 0, ::128].int().tolist()
    [1, 1, 1, 0]
    """
    for name, value, least in (("frames", frames, 1), ("tokens", tokens, 1), ("text", text, 0), ("block", block, 1)):
        at_least(name, value, least)
    number = isinstance(decay, (int, float)) and not isinstance(decay, bool) and 0 < decay <= 1
    require(number, "decay", repr(decay), "a number above 0, at most 1")
    width = tokens if next_frame is None else next_frame
    at_least("next_frame", width, 0)
    video = frames * tokens
    blocks, of_video = -(-(video + text) // block), -(-video // block)
    apart = torch.arange(frames, device=device)
    length, size = _bits(apart), tokens.bit_length()
    quotient = (1 << size) / (1 << length).double()
    widths = (decay * quotient).clamp(min=block).floor().int()  # int32: there are tables with one per pair of blocks
    widths[:2] = torch.tensor([tokens, width])[:frames]
    every = (block / quotient).long().clamp(min=1)
    every[:2] = 1
    within = torch.where(apart % every == 0, widths, -1)
    kept = torch.zeros(blocks, blocks, dtype=torch.bool, device=device)
    pieces = _pieces(torch.arange(of_video, dtype=torch.int32, device=device) * block, block, tokens, video)
    for qf, q0, q1 in pieces:
        for kf, k0, k1 in pieces:
            reach = within[(qf[:, None] - kf).abs().clamp(max=frames - 1)]
            kept[:of_video, :of_video] |= _filled(q0[:, None], q1[:, None], k0, k1, reach, block)
    kept[:, : -(-tokens // block)] = True
    if text:
        kept[video // block :] = True
        kept[:, video // block :] = True
    return BlockLayout(kept, (block, block))


def _bits(x: Tensor) -> Tensor:
    """The number of binary digits of each x ≥ 0."""
    return torch.tensor([value.bit_length() for value in x.tolist()], dtype=torch.long, device=x.device)


def _pieces(start: Tensor, block: int, tokens: int, video: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What each block holds of its first frame, of the next, and so on: frame, first and last place in it."""
    out = []
    for n in range(-(-block // tokens) + 1):
        frame = start // tokens + n
        first, end = torch.maximum(frame * tokens, start), torch.minimum((frame + 1) * tokens, start + block)
        out.append((frame, first - frame * tokens, end.clamp(max=video) - 1 - frame * tokens))
    return out


def _filled(q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, reach: Tensor, block: int) -> Tensor:
    """bool: of rows q0..q1 × columns k0..k1 under |a − c| ≤ reach, are enough columns filled enough? Empty: no.

    Column c is met by the rows in c ± reach: in any row from q0 − reach to q1 + reach, in `least` rows `least` − 1 less
    on both sides.
    """
    least = block * DENSE_COLUMN[0] // DENSE_COLUMN[1] + 1
    there = (q0 <= q1) & (k0 <= k1) & (reach >= 0)
    met = (torch.minimum(k1, q1 + reach) - torch.maximum(k0, q0 - reach) + 1).clamp(min=0)
    inner = reach - (least - 1)
    full = (torch.minimum(k1, q1 + inner) - torch.maximum(k0, q0 - inner) + 1).clamp(min=0)
    full = full * ((q1 - q0 + 1 >= least) & (2 * reach + 1 >= least))
    return there & (full * DENSE_SHARE[1] > met * DENSE_SHARE[0])
