"""One token of a recurrence with a matrix state, for decoding: the state is read once and written once.

S' = diag(e^{g}) S ,   S ← S' + k vᵀ   or, by the delta rule,   S ← S' + β k (v − S'ᵀ k)ᵀ ,   o = Sᵀ q
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _step(
    Q, K, V, G, Beta, State, Out, Next,
    sqb, sqh, skb, skh, svb, svh, sgb, sgh, sgd, sbb, sbh, heads, DK, DV,
    BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """One head, BV value columns. State, Next (B, H, DK, DV) float32 and Out (B, 1, H, DV), contiguous."""
    block, h, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    dk, dv = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    place, inside = row * heads + h, (dk < DK)[:, None] & (dv < DV)[None]
    entry = place * DK * DV + dk[:, None] * DV + dv[None]
    state = tl.load(State + entry, mask=inside, other=0.0)
    q = tl.load(Q + row * sqb + h * sqh + dk, mask=dk < DK, other=0.0).to(tl.float32)
    k = tl.load(K + row * skb + h * skh + dk, mask=dk < DK, other=0.0).to(tl.float32)
    v = tl.load(V + row * svb + h * svh + dv, mask=dv < DV, other=0.0).to(tl.float32)
    if DECAY:
        g = tl.load(G + row * sgb + h * sgh + dk * sgd, mask=dk < DK, other=0.0).to(tl.float32)
        state = state * tl.exp(g)[:, None]
    if DELTA:
        beta = tl.load(Beta + row * sbb + h * sbh).to(tl.float32)
        v = beta * (v - tl.sum(k[:, None] * state, 0))
    state = state + k[:, None] * v[None]
    tl.store(Next + entry, state, mask=inside)
    tl.store(Out + place * DV + dv, tl.sum(q[:, None] * state, 0).to(Out.dtype.element_ty), mask=dv < DV)


@torch.compiler.disable  # its launches are Python's; torch.compile goes on around it
def step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor | None = None, beta: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out (B, H, 1, Dv) in v's dtype and the next state (B, H, Dk, Dv) float32. Without a gradient.

    q, k (B, H, 1, Dk), v (B, H, 1, Dv), log_decay None or four axes that broadcast to (B, H, 1, Dk), beta (B, H, 1) for
    the delta rule; checked by the caller."""
    batch, heads, _, rows = q.shape
    columns = v.shape[3]
    state, q, k, v = state.float().contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty(batch, heads, 1, columns, dtype=v.dtype, device=v.device)
    after = torch.empty_like(state)
    g = q if log_decay is None else log_decay.expand(batch, heads, 1, rows)
    b = q if beta is None else beta
    width = min(32, triton.next_power_of_2(columns))
    with torch.cuda.device_of(q):  # kernels are launched on the current device, wherever their tensors lie
        _step[(triton.cdiv(columns, width), heads, batch)](
            q, k, v, g, b, state, out, after, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            g.stride(0), g.stride(1), g.stride(3), b.stride(0), b.stride(1), heads, rows, columns,
            BK=triton.next_power_of_2(rows), BV=width, DECAY=log_decay is not None, DELTA=beta is not None, num_warps=4,
        )  # fmt: skip
    return out, after
