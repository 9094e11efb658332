"""FlashAttention's algorithm, to be read: exact attention by tiles, both ways (Dao et al. 2022, arXiv 2205.14135).

One query block at a time goes over key blocks and keeps, per row, the largest logit m, the sum l of exp(S − m) and the
weighted values; nothing of size N × M is ever held, and the backward computes each tile's weights again from the saved
log-sum-exp L. Tiles that a pattern says are EMPTY are skipped in both directions (its block-sparse form).

It shows what the fused kernels do and is held against dense attention in float64; `regard.attend` is the function to
use, and its executors the fast ones. Query blocks are the outer loop (FlashAttention-2); `regard.kernels.traffic`
counts what the first paper's order moves. Attention dropout is not offered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.errors import require
from regard.patterns import Pattern
from regard.patterns.tiles import EMPTY, FULL
from regard.shapes import check_qkv


class Online(NamedTuple):
    """What is known of a softmax after some of its keys: m, l (..., n, 1), acc (..., n, Dv), in at least float32."""

    m: Tensor
    l: Tensor
    acc: Tensor

    @classmethod
    def empty(cls, q: Tensor, width: int) -> Online:
        """Before any key, for queries (..., n, D)."""
        column = q.new_zeros(*q.shape[:-1], 1)
        return cls(column - torch.inf, column, q.new_zeros(*q.shape[:-1], width))

    def absorb(self, logits: Tensor, v: Tensor) -> Online:
        """After more keys: logits (..., n, m), −inf where a key is not seen, and their values (..., m, Dv)."""
        m = torch.maximum(self.m, logits.amax(-1, keepdim=True))
        at = m.masked_fill(m == -torch.inf, 0.0)  # nothing seen so far: exp(−inf − 0) = 0, not NaN
        p, shrink = (logits - at).exp(), (self.m - at).exp()
        return Online(m, shrink * self.l + p.sum(-1, keepdim=True), shrink * self.acc + p @ v)

    def result(self) -> tuple[Tensor, Tensor]:
        """out (..., n, Dv) and log-sum-exp (..., n): zeros and −inf for a query that saw no key."""
        blind = self.l == 0
        out = (self.acc / self.l.masked_fill(blind, 1.0)).masked_fill(blind, 0.0)
        return out, (self.m + self.l.log())[..., 0]


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | None = None,
    scale: float | None = None,
    block: tuple[int, int] = (64, 64),
    order: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q·kᵀ) · v under a pattern, by tiles of `block` queries × keys; with gradients to q, k and v.

    q (B, Hq, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv), Hq a multiple of Hkv; returns out (B, Hq, N, Dv) in q's dtype
    and the log-sum-exp (B, Hq, N), which carries no gradient. Keys are positions 0 … M − 1, the queries the last N of
    them. order: in which order key blocks are visited; all orders give the same result. Raises ArgumentError.
    """
    check_qkv(q, k, v)
    n, m = q.shape[2], k.shape[2]
    require(pattern is None or n <= m, "q", f"{n} queries", f"at most {m}, as many as keys, under a pattern")
    for size in block:
        require(isinstance(size, int) and size >= 1, "block", block, "two sizes ≥ 1")
    visits = _visits(pattern, q, m, block, order)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    out, lse = _Tiled.apply(q, k, v, pattern, scale, visits)
    return out, lse


class _Visit(NamedTuple):
    """A tile: its queries, its keys, and whether somebody may not see somebody in it."""

    rows: slice
    keys: slice
    masked: bool


def _visits(
    pattern: Pattern | None, q: Tensor, m: int, block: tuple[int, int], order: Sequence[int] | None
) -> list[_Visit]:
    n = q.shape[2]
    columns = list(range(-(-m // block[1])))
    require(
        order is None or sorted(order) == columns,
        "order",
        order,
        f"the numbers of all {len(columns)} key blocks, each once",
    )
    kinds = None
    if pattern is not None:
        kinds = pattern.block_map(n, m, block=block, heads=q.shape[1], batch=q.shape[0]).kinds.flatten(0, 1)
    visits = []
    for a in range(-(-n // block[0])):
        for c in columns if order is None else order:
            kind = torch.tensor([FULL]) if kinds is None else kinds[:, a, c]
            if bool((kind != EMPTY).any()):
                rows, keys = slice(a * block[0], (a + 1) * block[0]), slice(c * block[1], (c + 1) * block[1])
                visits.append(_Visit(rows, keys, not bool((kind == FULL).all())))
    return visits


def _seen(pattern: Pattern, q: Tensor, kv_heads: int, m: int, visit: _Visit) -> Tensor:
    """bool (B or 1, Hkv or 1, G or 1, n, m) of one tile."""
    offset = m - q.shape[2]
    i = torch.arange(m, device=q.device)[offset:][visit.rows][:, None]
    j = torch.arange(m, device=q.device)[visit.keys]
    b = torch.arange(q.shape[0] if pattern.rows else 1, device=q.device)[:, None, None, None]
    h = torch.arange(q.shape[1] if pattern.heads else 1, device=q.device)[:, None, None]
    seen = pattern.rule(b, h, i, j).expand(b.shape[0], h.shape[0], len(i), len(j))
    return seen.unflatten(1, (kv_heads, -1)) if pattern.heads else seen[:, :, None]


class _Tiled(torch.autograd.Function):
    @staticmethod
    def _logits(q: Tensor, k: Tensor, pattern: Pattern | None, scale: float, visit: _Visit, shape: Tensor) -> Tensor:
        """(B, Hkv, G, n, m) of one tile; q (B, Hkv, G, N, D), k (B, Hkv, 1, M, D); shape: q as it was given."""
        logits = q[..., visit.rows, :] @ k[..., visit.keys, :].mT * scale
        if visit.masked and pattern is not None:
            logits = logits.masked_fill(~_seen(pattern, shape, k.shape[1], k.shape[3], visit), -torch.inf)
        return logits

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern | None, scale: float, visits: list[_Visit]
    ) -> tuple[Tensor, Tensor]:
        wide, wide_k, wide_v = _grouped(q, k, v)
        states = {visit.rows.start: Online.empty(wide[..., visit.rows, :], v.shape[3]) for visit in visits}
        for visit in visits:
            logits = _Tiled._logits(wide, wide_k, pattern, scale, visit, q)
            states[visit.rows.start] = states[visit.rows.start].absorb(logits, wide_v[..., visit.keys, :])
        out = wide.new_zeros(*wide.shape[:-1], v.shape[3])
        lse = wide.new_full(wide.shape[:-1], -torch.inf)
        for visit in visits:
            out[..., visit.rows, :], lse[..., visit.rows] = states[visit.rows.start].result()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.about = pattern, scale, visits
        lse_out = lse.flatten(1, 2)
        ctx.mark_non_differentiable(lse_out)
        return out.flatten(1, 2).to(q.dtype), lse_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        pattern, scale, visits = ctx.about
        wide, wide_k, wide_v = _grouped(q, k, v)
        d_out = gradients[0].to(wide.dtype).view_as(out)
        delta = (d_out * out).sum(-1, keepdim=True)  # of the final output, not of a tile's
        at = lse.masked_fill(lse == -torch.inf, 0.0)[..., None]
        d_q, d_k, d_v = torch.zeros_like(wide), torch.zeros_like(wide_k), torch.zeros_like(wide_v)
        for visit in visits:
            rows, keys = visit.rows, visit.keys
            p = (_Tiled._logits(wide, wide_k, pattern, scale, visit, q) - at[..., rows, :]).exp()
            d_tile = d_out[..., rows, :]
            d_logits = p * (d_tile @ wide_v[..., keys, :].mT - delta[..., rows, :])
            d_q[..., rows, :] += scale * d_logits @ wide_k[..., keys, :]
            # keys and values collect over the query heads of their group
            d_k[..., keys, :] += scale * (d_logits.mT @ wide[..., rows, :]).sum(2, keepdim=True)
            d_v[..., keys, :] += (p.mT @ d_tile).sum(2, keepdim=True)
        return d_q.flatten(1, 2).to(q.dtype), d_k[:, :, 0].to(k.dtype), d_v[:, :, 0].to(v.dtype), None, None, None


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In at least float32: q (B, Hkv, G, N, D), k and v (B, Hkv, 1, M, …)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.to(dtype).unflatten(1, (k.shape[1], -1)), k.to(dtype)[:, :, None], v.to(dtype)[:, :, None]
