"""Swap attention between a spatial and a temporal stream of a video (Wang et al. 2023, VideoFactory, arXiv 2305.10874).

Instead of being added, the two streams attend to each other inside 3-D windows, and take turns in asking.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regard.attend import attend
from regard.errors import require
from regard.kernels.request import ScoreFunction
from regard.layers.base import Context, Example, Layer, Output, Padding, Tokens, without_padding
from regard.patterns import Pattern
from regard.patterns.algebra import true_or_false
from regard.patterns.axes import Halo
from regard.patterns.grid import AxisProduct
from regard.patterns.order import check_layout
from regard.registry import Paper, mechanism

PAPER = Paper(
    "Swap Attention in Spatiotemporal Diffusions for Text-to-Video Generation (VideoFactory)",
    "Wang et al.",
    2023,
    "2305.10874",
)


@mechanism(
    "videofactory-swap-attention",
    paper=PAPER,
    families=("static-pattern", "vision"),
    cost="O(N·∏window·D) time with a layout, O(N·M·D) without; no cache",
    causal=True,
    bidirectional=True,
    cross=True,
    patterns=True,
    gqa=False,
    steps=False,
    compiles=False,
    example=lambda: Example(settings={"zero_init": False, "norm": False}),
)
class SwapAttention(Layer):
    """x + W_O softmax(LN(x)W_Q (LN(context)W_K)ᵀ / √D) LN(context)W_V inside windows: x asks, the context answers.

    layout: (frames, height, width), row-major; x and context then both have that many tokens, and attend within
    non-overlapping windows. None: one window holds everything, at any lengths. window: sizes on the three axes; None =
    all frames × 8 × 8 (ours; the paper only says 3-D). Windows at the border may be smaller. bias: a learned number per
    head and relative place inside a window, (2·wt − 1)(2·wh − 1)(2·ww − 1) of them; needs a layout.
    zero_init: W_O starts at 0, so that training starts from the model whose layers these join. norm: a LayerNorm for
    each stream, LN above; False where the streams come normalised. D = dim / heads.

    Only the asking stream has the residual. Without a context x answers itself. Windows that divide the layout are cut
    out and attended to one beside the other; with a pattern, key_padding or ragged windows they are a mask.
    A `pattern` restricts further. `swap_streams` says whose turn it is. With a layout, key_padding takes places out of
    the grid, and a pattern means places too: the others keep theirs.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        layout: tuple[int, int, int] | None = None,
        window: tuple[int, int, int] | None = None,
        bias: bool = False,
        zero_init: bool = True,
        norm: bool = True,
    ) -> None:
        super().__init__(dim, heads)
        require(dim % heads == 0, "heads", heads, f"a divisor of dim={dim}")
        for name, flag in (("bias", bias), ("zero_init", zero_init), ("norm", norm)):
            true_or_false(name, flag)
        require(layout is not None or window is None, "window", window, "no window without a layout")
        require(layout is not None or not bias, "bias", bias, "no bias without a layout")
        self.windows: AxisProduct | None = None
        self._inside: AxisProduct | None = None
        self.table: nn.Parameter | None = None
        self.window: tuple[int, ...] = ()
        if layout is not None:
            sizes = check_layout(layout, "layout", 3)
            given = (sizes[0], min(8, sizes[1]), min(8, sizes[2])) if window is None else window
            self.window = check_layout(given, "window", 3)
            axes = tuple(Halo(size, w, 0) for size, w in zip(sizes, self.window, strict=True))
            self.windows = AxisProduct(sizes, 0, 0, axes)
            self._inside = AxisProduct(self.window, 0, 0, tuple(Halo(w, w, 0) for w in self.window))
            if bias:
                self.table = nn.Parameter(torch.zeros(heads, *(2 * w - 1 for w in self.window)))
        self.x_norm, self.context_norm = (nn.LayerNorm(dim) if norm else nn.Identity() for _ in range(2))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        if zero_init:
            nn.init.zeros_(self.o_proj.weight)

    def forward(
        self,
        x: Tokens,
        context: Context | None = None,
        *,
        pattern: Pattern | None = None,
        key_padding: Padding | None = None,
        state: Any = None,
    ) -> Output:
        """See `Layer.forward`. There is no state."""
        self.check_tokens(x, context, key_padding)
        if state is not None:
            raise self.refuse("state")
        source = x if context is None else context
        self._check_layout(x, source)
        asked, answered = self.x_norm(x), self.context_norm(source)
        q, k, v = (
            self._split(self.q_proj(asked)),
            self._split(self.k_proj(answered)),
            self._split(self.v_proj(answered)),
        )
        if self.windows is not None and pattern is None and key_padding is None and self._divides():
            out = self._joined(attend(*map(self._cut, (q, k, v)), score=self._score(self._inside)))
            return Output(x + self.o_proj(out.transpose(1, 2).flatten(2)))
        if self.windows is not None:
            pattern = self.windows if pattern is None else self.windows & pattern
        on_grid = self.windows is not None and key_padding is not None
        out = attend(
            q,
            k,
            v,
            pattern=pattern,
            score=self._score(self.windows),
            key_padding=key_padding,
            q_positions=_count(x) if context is not None or on_grid else None,
            kv_positions=_count(source) if on_grid else None,
        )
        out = x + self.o_proj(out.transpose(1, 2).flatten(2))
        return Output(without_padding(out, key_padding if context is None else None))

    def _check_layout(self, x: Tensor, source: Tensor) -> None:
        if self.windows is None:
            return
        for name, t in (("x", x), ("context", source)):
            wanted = f"{self.windows.extent}, the tokens of the layout {self.windows.layout}"
            require(t.shape[1] == self.windows.extent, name, f"{t.shape[1]} tokens", wanted)

    def _divides(self) -> bool:
        assert self.windows is not None
        return not any(size % w for size, w in zip(self.windows.layout, self.window, strict=True))

    def _cut(self, x: Tensor) -> Tensor:
        """(B, H, N, D) → (B · windows, H, tokens of a window, D); both orders are row-major."""
        assert self.windows is not None
        (wt, wh, ww), (frames, height, width) = self.window, self.windows.layout
        x = x.unflatten(2, (frames // wt, wt, height // wh, wh, width // ww, ww))
        return x.permute(0, 2, 4, 6, 1, 3, 5, 7, 8).flatten(5, 7).flatten(0, 3)

    def _joined(self, x: Tensor) -> Tensor:
        """What `_cut` made, put back."""
        assert self.windows is not None
        counts = [size // w for size, w in zip(self.windows.layout, self.window, strict=True)]
        x = x.unflatten(2, self.window).unflatten(0, (-1, *counts))
        return x.permute(0, 4, 1, 5, 2, 6, 3, 7, 8).flatten(2, 7)

    def _score(self, grid: AxisProduct | None) -> ScoreFunction | None:
        """The bias as a score over the positions of a grid."""
        return None if self.table is None or grid is None else partial(self._relative, grid)

    def _relative(self, grid: AxisProduct, logits: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """The logits and the learned number of the relative place; what lies in another window is masked anyway."""
        assert self.table is not None
        q, k = grid.places(i), grid.places(j)
        apart = [(y - x).clamp(1 - w, w - 1) + (w - 1) for x, y, w in zip(q, k, self.window, strict=True)]
        return logits + self.table[h, apart[0], apart[1], apart[2]].to(logits.dtype)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    @classmethod
    def identity(cls) -> tuple[Tensor, Tensor]:
        """Windows by a pattern are dense attention inside each window cut out by hand."""
        layer = cls(8, 2, layout=(2, 4, 6), window=(1, 2, 3), zero_init=False).double()
        x, context = torch.randn(2, 3, 48, 8, dtype=torch.float64)

        def cut(t: Tensor) -> Tensor:  # (B · windows, tokens of a window, C)
            return t.view(3, 2, 1, 2, 2, 2, 3, 8).permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, 6, 8)

        whole = cls(8, 2, zero_init=False).double()
        whole.load_state_dict(layer.state_dict())
        return cut(layer(x, context).out), whole(cut(x), cut(context)).out


def swap_streams(layer: SwapAttention, spatial: Tensor, temporal: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """Block `index` of a network: in even ones the spatial stream asks, in odd ones the temporal one (ours).

    spatial, temporal (B, N, C). Returns both; only the one that asked has changed. Each block has a layer of its own.
    """
    if index % 2:
        return spatial, layer(temporal, spatial).out
    return layer(spatial, temporal).out, temporal


def _count(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
