"""One chunk of a diagonal recurrence: what `scan_scalar` and `scan_channel` share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile(base, at, step, index, dims, count, width):
    """(index, dims): rows at + index of a matrix, `step` apart; zeros from row `count` and from column `width` on."""
    inside = ((at + index) < count)[:, None] & (dims < width)[None]
    return tl.load(base + at.to(tl.int64) * step + index[:, None] * step + dims[None], mask=inside, other=0.0)


@triton.jit
def advance(
    q, k, v, kept, read, state, index,
    READ: tl.constexpr, REVERSE: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of inputs that carry their decays, e^{b_i − b_j} split between them: (outputs, next state).

    kept: what the chunk leaves of the state; read: what outputs are multiplied with (READ). Both broadcast."""
    if REVERSE:
        state = state * kept
    acc = tl.zeros([q.shape[0], v.shape[1]], tl.float32)
    if OUT:
        seen = (index[:, None] <= index[None]) if REVERSE else (index[:, None] >= index[None])
        logits = tl.where(seen, tl.dot(q, tl.trans(k), input_precision=PRECISION), 0.0)
        acc = tl.dot(q, state.to(q.dtype), input_precision=PRECISION)
        acc = tl.dot(logits.to(v.dtype), v, acc, input_precision=PRECISION)
        if READ:
            acc = acc * read
    state = tl.dot(tl.trans(k), v, state, input_precision=PRECISION)
    if not REVERSE:
        state = state * kept
    return acc, state
