"""Combiner: full attention with a sparse cost, by summaries of regions (Ren et al. 2021, arXiv 2107.05768)."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from regard.errors import UnknownNameError, require
from regard.layers.base import Context, Example, Layer, Output, Padding, Tokens, without_padding
from regard.layers.checks import flags, sizes
from regard.layers.combiner_regions import Pool, Pooling, Summaries, axial, axial_rows, fixed, logsparse
from regard.patterns import Pattern, causal, full
from regard.registry import Paper, mechanism

PAPER = Paper("Combiner: Full Attention Transformer with Sparse Computation Cost", "Ren et al.", 2021, "2107.05768")
Regions = Literal["fixed", "logsparse", "axial", "axial-rows"]
Map = Literal["identity", "relu", "dense"]


class NoState(NamedTuple):
    """What regions without a state hand on, to be refused: None would silently begin a new sequence."""


class CombinerState(NamedTuple):
    """The open segment and a summary of every finished one (regions="fixed").

    q, k, v (B, H, W, D): the open segment's tokens, in front; opened (B,) long: how many they are.
    finished_k, finished_v (B, H, R, D), in float32 at least; finished (B,) long: how many segments are finished.
    segment_size: of how many tokens each.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    opened: Tensor
    finished_k: Tensor
    finished_v: Tensor
    finished: Tensor
    segment_size: int


@mechanism(
    "combiner",
    paper=PAPER,
    families=("static-pattern",),
    cost="O(N·(S + N/S)·D) fixed and axial, O(N·log N·D) logsparse; a cache of S tokens and N/S summaries",
    causal=True,
    bidirectional=True,
    cross=False,
    patterns=False,
    gqa=False,
    steps=True,
    compiles=False,
    example=lambda: Example(settings={"segment_size": 3}),
)
class Combiner(Layer):
    """Each query sees a few tokens directly and all others through summaries of regions; every weight stays above zero.

    regions: "fixed" — directly its own segment of `segment_size` tokens, and every other segment as one region;
    "logsparse" — itself, and blocks of 1, 2, 4, … tokens before it; "axial" — its row of `segment_size` tokens and its
    column, and the other columns as regions; "axial-rows" — its row, and the earlier rows as regions. The last three
    are causal only and have no state: what they hand on is refused. The paper's mixture is not offered: its summaries
    overlap. pool: how a region's q and k are pooled, None = "max"; the rows of "axial-rows" are pooled by attention
    within them, and take no other. summary: what q and k pass before, "dense" being a linear map of each head's
    channels, shared by all heads (ours), and a ReLU. own_region: without a causal mask, the own segment is a region as
    well (the public code). weigh_by_size: a region counts as many slots as it has tokens (not the paper's model).

    Segments count real tokens: padding takes no place in them. Softmax and summaries are held in at least float32.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        segment_size: int = 32,
        regions: Regions = "fixed",
        pool: Pool | None = None,
        summary: Map = "identity",
        own_region: bool = False,
        weigh_by_size: bool = False,
    ) -> None:
        super().__init__(dim, heads)
        require(dim % heads == 0, "heads", heads, f"a divisor of dim={dim}")
        sizes(segment_size=segment_size)
        flags(own_region=own_region, weigh_by_size=weigh_by_size)
        if pool is not None and regions == "axial-rows":
            raise self.refuse(f"pool={pool!r} with regions='axial-rows': rows are pooled by attention")
        pool = "max" if pool is None else pool
        for name, value, known in (("regions", regions, Regions), ("pool", pool, Pool), ("summary", summary, Map)):
            if value not in get_args(known):
                raise UnknownNameError(name, str(value), get_args(known))
        self.segment_size, self.regions, self.own_region = segment_size, regions, own_region
        self.pool, self.summary, self.weigh_by_size = pool, summary, weigh_by_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        width = dim // heads
        self.q_summary, self.k_summary = (self._map(width) for _ in range(2))

    def _map(self, width: int) -> nn.Module:
        if self.summary == "dense":
            return nn.Sequential(nn.Linear(width, width), nn.ReLU())
        return nn.ReLU() if self.summary == "relu" else nn.Identity()

    def forward(
        self,
        x: Tokens,
        context: Context | None = None,
        *,
        pattern: Pattern | None = None,
        key_padding: Padding | None = None,
        state: CombinerState | None = None,
    ) -> Output:
        """See `Layer.forward`. pattern: None, `full()` or `causal()`. The state is a CombinerState, or a NoState."""
        if context is not None:
            raise self.refuse("context: its regions are of one sequence")
        is_causal = pattern == causal()
        if not is_causal and pattern is not None and pattern != full():
            raise self.refuse(f"pattern {pattern!r}: None or causal()")
        if not is_causal and self.regions != "fixed":
            raise self.refuse(f"regions={self.regions!r} without causal(): these regions lie before the query")
        self.check_tokens(x, context, key_padding)
        if state is not None and self.regions != "fixed":
            raise self.refuse(f"state with regions={self.regions!r}: only regions='fixed' has one")
        self.check_state(state, CombinerState)
        q, k, v = (self._split(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if key_padding is None else key_padding
        if state is not None:
            self._check_fits(state, k)
            if not is_causal:
                raise self.refuse("state without causal()")
            held = torch.arange(state.k.shape[2], device=x.device) < state.opened[:, None]
            q, k, v = (torch.cat(pair, 2) for pair in ((state.q, q), (state.k, k), (state.v, v)))
            real = torch.cat([held, real], 1)
        if key_padding is None and state is None:
            out, following = self._mix(q, k, v, real, is_causal, None)
        else:
            order = (~real).long().argsort(dim=-1, stable=True)  # real tokens first, in their order
            q, k, v = (_along(t, order) for t in (q, k, v))
            out, following = self._mix(q, k, v, real.gather(1, order), is_causal, state)
            out = _along(out, order.argsort(-1))[:, :, out.shape[2] - x.shape[1] :]
        out = self.o_proj(out.transpose(1, 2).flatten(2).to(x.dtype))
        return Output(without_padding(out, key_padding), following)

    def _split(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _mix(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor, is_causal: bool, state: CombinerState | None
    ) -> tuple[Tensor, CombinerState | NoState | None]:
        """Real tokens first; the outputs (B, H, T, D) in at least float32, and the next state, None if not causal."""
        wide = torch.promote_types(k.dtype, torch.float32)
        given = (q, k, v)
        q, k, v = (t.to(wide) for t in given)
        pooling = Pooling(self.pool, self._wide(self.q_summary), self._wide(self.k_summary), self.weigh_by_size)
        if self.regions == "logsparse":
            return logsparse(q, k, v, real, pooling), NoState()
        if self.regions in ("axial", "axial-rows"):
            over = axial if self.regions == "axial" else axial_rows
            return over(q, k, v, real, self.segment_size, pooling), NoState()
        past = None
        if state is not None:
            there = torch.arange(state.finished_k.shape[2], device=k.device) < state.finished[:, None]
            past = Summaries(state.finished_k, state.finished_v, there.long() * self.segment_size)
        out, regions = fixed(
            q, k, v, real, self.segment_size, pooling, causal=is_causal, own_region=self.own_region, past=past
        )
        return out, self._next(given, real, regions, past) if is_causal else None

    def _next(
        self, given: tuple[Tensor, Tensor, Tensor], real: Tensor, regions: Summaries, past: Summaries | None
    ) -> CombinerState:
        """Whole segments become summaries, what is left of each row is its open segment. Waits for the device."""
        whole = regions.size == self.segment_size
        keys, values, done = regions.k, regions.v, whole
        if past is not None:
            keys, values = torch.cat([past.k, keys], 2), torch.cat([past.v, values], 2)
            done = torch.cat([past.size > 0, done], 1)
        finished = done.sum(1)
        first = (~done).long().argsort(dim=-1, stable=True)[:, : _most(finished)]
        opened = real.sum(1) - whole.sum(1) * self.segment_size
        start = whole.sum(1, keepdim=True) * self.segment_size
        at = (start + torch.arange(_most(opened), device=real.device)).clamp(max=real.shape[1] - 1)
        q, k, v = (_along(t, at) for t in given)
        held = (_along(keys, first), _along(values, first), finished)
        return CombinerState(q, k, v, opened, *held, self.segment_size)

    def _wide(self, module: nn.Module) -> nn.Module:
        """The map of a summary in the dtype that summaries are held in."""
        weight = next(module.parameters(), None)
        if weight is None or torch.promote_types(weight.dtype, torch.float32) == weight.dtype:
            return module
        return _InOwnDtype(module, weight.dtype)

    def _check_fits(self, state: CombinerState, k: Tensor) -> None:
        shape, wanted = tuple(state.k.shape), (k.shape[0], k.shape[1], k.shape[3])
        fits = len(shape) == 4 and (shape[0], shape[1], shape[3]) == wanted
        require(fits, "state", shape, f"(B, H, W, D) with B, H, D = {wanted}")
        mine = f"segments of {self.segment_size}"
        require(state.segment_size == self.segment_size, "state", f"segments of {state.segment_size}", mine)

    @classmethod
    def identity(cls) -> tuple[Tensor, Tensor]:
        """With segments of one token every region is a token, and it is dense causal attention of the same weights."""
        layer = cls(8, 2, segment_size=1).double()
        x = torch.randn(2, 9, 8, dtype=torch.float64)
        q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
        dense = (q @ k.mT / 2.0).masked_fill(hidden, -torch.inf).softmax(-1) @ v
        return layer(x, pattern=causal()).out, layer.o_proj(dense.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        """What is not a parameter."""
        names = ("regions", "segment_size", "pool", "summary")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class _InOwnDtype(nn.Module):
    """A module that is given its own dtype and gives back that of its input."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x.to(self.dtype)).to(x.dtype)
        return out


def _most(counts: Tensor) -> int:
    """The largest of counts (B,), 0 of none."""
    return int(counts.max()) if len(counts) else 0


def _along(x: Tensor, index: Tensor) -> Tensor:
    """(B, H, K, D) from x (B, H, T, D) and index (B, K)."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
