"""HaloNet: blocks of an image attend to themselves and a halo around them (Vaswani et al. 2021, arXiv 2103.12731)."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from regard.attend import attend
from regard.errors import UnknownNameError, require
from regard.layers.base import Context, Example, Layer, Output, Padding, Tokens, without_padding
from regard.patterns import Pattern, full, halonet
from regard.patterns.algebra import at_least, true_or_false
from regard.patterns.halos import HALONET
from regard.patterns.order import check_layout
from regard.registry import mechanism

Border = Literal["mask", "zero"]


@mechanism(
    "halonet",
    paper=HALONET,
    families=("static-pattern", "vision"),
    cost="4·N·(block + 2·halo)²·D operations; keys and values (1 + 2·halo/block)² times in memory",
    causal=False,
    bidirectional=True,
    cross=False,
    patterns=False,
    gqa=False,
    steps=False,
    compiles=False,
    example=lambda: Example(settings={"layout": (3, 4), "block": 2, "halo": 2}, lengths=(12,)),
)
class HaloAttention(Layer):
    """Local attention of an image: all queries of a block share the block and its halo as keys; relative logits.

    A query at (y, x) and a key dy, dx from it have the logit q·k + q·(row[dy] + col[dx]), q scaled by 1/√D before both.
    row and col are learned, (2·block + 2·halo − 1, D) each, and shared by the heads (ours).

    layout: (height, width), to be given; x (B, height·width, C), row-major. block, halo: as in the pattern `halonet`
    (the paper: 8 and 3). A map that is no multiple of the block is filled up at bottom and right; what is filled up is
    never a query. stride: only every stride-th row and column asks, in place of a strided layer: out is
    (B, ⌈height/stride⌉·⌈width/stride⌉, C); a divisor of the block. relative: False leaves q·(row + col) out.
    border: "mask" = places outside the map are not seen (ours); "zero" = they have k = v = 0, and still take their
    share (the paper pads with zeros).
    head_dim: D, None = dim / heads (the paper: 16).

    key_padding (B, N) takes places out of the map; the others keep theirs. Keys are gathered block by block, so memory
    is linear in N. `dense_pattern` is the same set of pairs for `attend`. Any pattern but `full()` is refused.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        layout: tuple[int, int] | None = None,
        block: int = 8,
        halo: int = 3,
        stride: int = 1,
        relative: bool = True,
        border: Border = "mask",
        head_dim: int | None = None,
    ) -> None:
        super().__init__(dim, heads)
        self.layout = check_layout(layout, "layout", 2)
        at_least("block", block, 1)
        at_least("halo", halo, 0)
        at_least("stride", stride, 1)
        true_or_false("relative", relative)
        require(block % stride == 0, "stride", stride, f"a divisor of the block, {block}")
        if border not in get_args(Border):
            raise UnknownNameError("border", str(border), get_args(Border))
        if head_dim is None:
            require(dim % heads == 0, "heads", heads, f"a divisor of dim={dim}, or give head_dim")
            head_dim = dim // heads
        at_least("head_dim", head_dim, 1)
        self.block, self.halo, self.stride, self.border, self.head_dim = block, halo, stride, border, head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, heads * head_dim, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=False)
        shape = (2 * block + 2 * halo - 1, head_dim)
        self.row = nn.Parameter(torch.randn(shape) * head_dim**-0.5) if relative else None
        self.col = nn.Parameter(torch.randn(shape) * head_dim**-0.5) if relative else None

    def forward(
        self,
        x: Tokens,
        context: Context | None = None,
        *,
        pattern: Pattern | None = None,
        key_padding: Padding | None = None,
        state: Any = None,
    ) -> Output:
        """See `Layer.forward`."""
        for given, what in ((context, "context"), (state, "state")):
            if given is not None:
                raise self.refuse(what)
        if pattern is not None and pattern != full():
            raise self.refuse(f"pattern but its own, and full(): got {pattern!r}")
        self.check_tokens(x, None, key_padding)
        tokens = self.layout[0] * self.layout[1]
        require(x.shape[1] == tokens, "x", f"{x.shape[1]} tokens", f"{tokens}, the layout {self.layout}")
        q, k, v = self.project(x)
        logits = self._logits(self._queries(q), self._windows(k))
        seen = self._seen(x, key_padding)
        # the least number instead of −inf, and zero afterwards: a window without a key gives zeros, and no NaN behind
        logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
        weights = (logits.softmax(-1) * seen).to(v.dtype)
        out = self._places(torch.einsum("bhyxijw,bhyxwd->bhyxijd", weights, self._windows(v).flatten(4, 5)))
        if key_padding is not None:
            key_padding = key_padding.unflatten(1, self.layout)[:, :: self.stride, :: self.stride].flatten(1)
        return Output(without_padding(self.o_proj(out), key_padding))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (scaled), k, v (B, H, height, width, D)."""

        def split(t: Tensor) -> Tensor:
            return t.unflatten(1, self.layout).unflatten(-1, (self.heads, self.head_dim)).permute(0, 3, 1, 2, 4)

        return split(self.q_proj(x)) * self.head_dim**-0.5, split(self.k_proj(x)), split(self.v_proj(x))

    def dense_pattern(self) -> Pattern:
        """Who sees whom, over all places of the map."""
        return halonet(self.layout, self.block, self.halo)

    def relative_score(self, q: Tensor) -> Any:
        """The relative logits as a `score` for `attend`, from the scaled q (B, H, height, width, D)."""
        assert self.row is not None and self.col is not None
        by_row, by_col = (q.flatten(2, 3) @ table.to(q.dtype).mT for table in (self.row, self.col))
        last, width = self.row.shape[0] - 1, self.layout[1]

        def score(logits: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            dy, dx = j // width - i // width + last // 2, j % width - i % width + last // 2
            added = by_row[b, h, i, dy.clamp(0, last)] + by_col[b, h, i, dx.clamp(0, last)]
            return logits + added.to(logits.dtype)

        return score

    def _queries(self, q: Tensor) -> Tensor:
        """(B, H, blocks down, blocks across, block/stride, block/stride, D)."""
        q = pad(q, (0, 0, 0, -self.layout[1] % self.block, 0, -self.layout[0] % self.block))
        q = q.unflatten(3, (-1, self.block)).unflatten(2, (-1, self.block)).transpose(3, 4)
        return q[:, :, :, :, :: self.stride, :: self.stride]

    def _windows(self, x: Tensor) -> Tensor:
        """The window of each block: (B, H, h, w, D) → (B, H, blocks down, blocks across, window, window, D)."""
        halo, size = self.halo, self.block + 2 * self.halo
        right, below = (-s % self.block for s in reversed(self.layout))
        x = pad(x, (0, 0, halo, halo + right, halo, halo + below))
        return x.unfold(2, size, self.block).unfold(3, size, self.block).movedim(4, -1)

    def _seen(self, x: Tensor, key_padding: Tensor | None) -> Tensor:
        """bool, broadcastable to the logits: which places of its window a block sees."""
        real = torch.ones((1, *self.layout), dtype=torch.bool, device=x.device)
        real = real if key_padding is None else key_padding.unflatten(1, self.layout)
        if self.border == "zero":  # what is missing inside the map is not seen; all around is
            return ~self._windows((~real)[:, None, ..., None]).flatten(4)[:, :, :, :, None, None]
        return self._windows(real[:, None, ..., None]).flatten(4)[:, :, :, :, None, None]

    def _logits(self, q: Tensor, k: Tensor) -> Tensor:
        """(B, H, blocks down, blocks across, i, j, window²), in at least float32."""
        logits = torch.einsum("bhyxijd,bhyxuvd->bhyxijuv", q, k)
        if self.row is not None and self.col is not None:
            asking = torch.arange(0, self.block, self.stride, device=q.device)[:, None]
            apart = torch.arange(self.block + 2 * self.halo, device=q.device) - asking + (self.block - 1)
            logits = logits + torch.einsum("bhyxijd,iud->bhyxiju", q, self.row[apart])[..., None]
            logits = logits + torch.einsum("bhyxijd,jvd->bhyxijv", q, self.col[apart])[..., None, :]
        return logits.flatten(-2).to(torch.promote_types(q.dtype, torch.float32))

    def _places(self, out: Tensor) -> Tensor:
        """Blocks back to the map, without what was filled up: (B, places, H·D)."""
        height, width = (-(-s // self.stride) for s in self.layout)
        out = out.transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, :height, :width]
        return out.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)

    @classmethod
    def identity(cls) -> tuple[Tensor, Tensor]:
        """Keys gathered by blocks are dense attention under the pattern, with the relative logits as a score."""
        layer = cls(8, 2, layout=(5, 6), block=2, halo=1).double()
        x = torch.randn(2, 30, 8, dtype=torch.float64)
        q, k, v = layer.project(x)
        score, flat = layer.relative_score(q), (t.flatten(2, 3) for t in (q, k, v))
        out = attend(*flat, pattern=layer.dense_pattern(), score=score, scale=1.0)
        return layer(x).out, layer.o_proj(out.transpose(1, 2).flatten(2))
