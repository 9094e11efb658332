"""The diagonal-decay recurrence with a gate per channel (GLA, HGRN-2), forward and backward.

`channel_factors`, parallel over chunks, makes all that does not depend on the state; `scan_chunks` walks a sequence
with it; in the backward it walks twice more, for the state that each chunk meets and, from the end, for its gradient,
and `channel_gradients` is parallel again. The factors are not kept for the backward but made again. Any decay ≤ 0 is
exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.kernels.triton.aligned import aligned
from regard.kernels.triton.channel_factors import channel_factors, limit, segments
from regard.kernels.triton.channel_gradients import channel_gradients
from regard.kernels.triton.channel_scan import scan_chunks
from regard.kernels.triton.diagonal_chain import chained
from regard.kernels.triton.pieces import Pieces


@dataclass(frozen=True)
class Launch:
    """columns: how many a program holds, or takes at a time; warps; pipeline stages; registers of a thread at most."""

    columns: int
    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True)
class Launches:
    """The three kernels. What `columns` counts: channels of keys for `factors`, values for `scan` and `gradients`.

    channels: of keys that one program of `gradients` gives gradients for. rows: those that the state is held for."""

    factors: Launch
    scan: Launch
    gradients: Launch
    channels: int
    rows: int


@lru_cache(maxsize=64)
def launches(rows: int, columns: int, dtype: torch.dtype) -> Launches:
    """By the shape of the state, rows (Dk) × columns (Dv), so that tiles stay in registers. Those of 128 rows are
    measured on an H100 (bfloat16, 128 columns); wide tiles of 256 rows would not fit into shared memory three times.

    Products in half precision have at least 64 rows: smaller ones do not mix with wide ones on Hopper (Triton 3.6)."""
    if dtype == torch.float32:
        tall = max(16, triton.next_power_of_2(rows))
        short = Launch(16, 8, 1)
        return Launches(Launch(min(tall, 32), 4, 1, 168), short, short, min(tall, 32), tall)
    tall = max(64, triton.next_power_of_2(rows))
    wide = max(32, triton.next_power_of_2(columns))
    if tall == 128:
        return Launches(Launch(64, 4, 1), Launch(min(wide, 64), 4, 3), Launch(min(wide, 64), 4, 2), 32, tall)
    scan = Launch(min(wide, 64), 4, 2) if tall == 64 else Launch(32, 8, 2)
    return Launches(Launch(32, 4, 1, 168), scan, Launch(32, 4, 2), 32, tall)


def chunk_size(rows: int, dtype: torch.dtype) -> int:
    """Tokens at a time: as many rows as wide products need; exact ones keep their factors in registers."""
    return 64 if dtype.itemsize == 2 else 32 if rows <= 64 else 16


@dataclass(frozen=True)
class Factors:
    """What `channel_factors` writes: Q̂ and K̂ (chunks, H, C, BK), e^{b_C} and which chunks decay much (chunks,
    H, BK), P (chunks, H, C, C)."""

    both: tuple[Tensor, ...]
    kept: Tensor
    steep: Tensor
    p: Tensor


def _precision(q: Tensor) -> dict[str, Any]:
    exact = q.dtype == torch.float32  # half precision has but one
    return {"EXACT": exact, "LIMIT": limit(q.dtype), "PRECISION": "ieee" if exact else "tf32"}


def _segments(q: Tensor, chunk: int) -> Tensor:
    return segments(chunk.bit_length() - 1, q.dtype == torch.float32, q.device)


def factors_of(q: Tensor, k: Tensor, g: Tensor, pieces: Pieces, chunk: int, how: Launches) -> Factors:
    heads, count = q.shape[1], pieces.chunks
    both = torch.empty(2, count, heads, chunk, how.rows, dtype=q.dtype, device=q.device)
    kept, steep = (torch.empty(count, heads, how.rows, dtype=torch.float32, device=q.device) for _ in range(2))
    p = torch.empty(count, heads, chunk, chunk, dtype=q.dtype, device=q.device)
    if count * heads:
        strides = [s for x in (q, k, g) for s in x.stride()[:3]]
        channel_factors[(count, heads)](
            q, k, g, both, kept, steep, p, _segments(q, chunk), pieces.each, *strides, both.stride(0), heads,
            q.shape[3], C=chunk, LEVELS=chunk.bit_length() - 1, BK=how.rows, BD=how.factors.columns, **_precision(q),
            num_warps=how.factors.warps, num_stages=how.factors.stages, maxnreg=how.factors.registers,
        )  # fmt: skip
    return Factors(both.unbind(0), kept, steep, p)


def _scan(
    factors: Factors, v: Tensor, rows: int, start: Tensor | None, table: Tensor, how: Launches,
    *, reverse: bool = False, out: Tensor | None = None, states: Tensor | None = None, left: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The state at the other end of each piece in `table`, (pieces, H, Dk, Dv) float32; fills the last three."""
    heads, columns, count = v.shape[1], v.shape[3], table.shape[0]
    final = torch.empty(count, heads, rows, columns, dtype=torch.float32, device=v.device)
    read, write = reversed(factors.both) if reverse else factors.both
    there = v if out is None else out
    if count * heads:
        scan_chunks[(-(-columns // how.scan.columns), heads, count)](
            read, write, v, factors.p, factors.kept, there, final if start is None else start, final,
            final if left is None else left, v if states is None else states, table, *v.stride()[:3],
            *there.stride()[:3], heads, rows, columns,
            C=read.shape[2], BK=read.shape[3], BV=how.scan.columns, REVERSE=reverse, START=start is not None,
            OUT=out is not None, KEEP=states is not None, LEAVE=left is not None,
            PRECISION=_precision(v)["PRECISION"], STAGES=how.scan.stages,
            num_warps=how.scan.warps, num_stages=how.scan.stages,
        )  # fmt: skip
    return final


def _starts(
    factors: Factors, v: Tensor, rows: int, state: Tensor | None, pieces: Pieces, how: Launches, reverse: bool
) -> Tensor | None:
    """The state that each piece starts from, (pieces, H, Dk, Dv)."""
    if pieces.split == 1:
        return None if state is None else state.float().contiguous()
    table = pieces.feeding(reverse)
    left = torch.empty(table.shape[0], v.shape[1], rows, dtype=torch.float32, device=v.device)
    local = _scan(factors, v, rows, None, table, how, reverse=reverse, left=left)
    return chained(local, left, state, pieces, reverse)


class ChannelDecay(torch.autograd.Function):
    """(out, final state) of q, k, v, g (B, H, N, Dk), state, pieces, chunk: tensors are `aligned`, their sizes too."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None, pieces: Pieces, chunk: int
    ) -> tuple[Tensor, Tensor]:
        how = launches(q.shape[3], v.shape[3], q.dtype)
        factors = factors_of(q, k, g, pieces, chunk, how)
        starts = _starts(factors, v, q.shape[3], state, pieces, how, False)
        batch, heads, n, columns = v.shape
        out = torch.empty(batch, n, heads, columns, dtype=v.dtype, device=v.device).transpose(1, 2)
        final = _scan(factors, v, q.shape[3], starts, pieces.table, how, out=out)
        ctx.save_for_backward(q, k, v, g, starts)
        ctx.pieces, ctx.chunk = pieces, chunk
        ctx.set_materialize_grads(False)
        return out, pieces.last(final, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
        q, k, v, g, starts = ctx.saved_tensors
        pieces, chunk, gated = ctx.pieces, ctx.chunk, ctx.needs_input_grad[3]
        heads, rows, columns = q.shape[1], q.shape[3], v.shape[3]
        how = launches(rows, columns, q.dtype)
        factors = factors_of(q, k, g, pieces, chunk, how)
        dout = torch.zeros_like(v) if dout is None else aligned(dout.to(v.dtype))
        size = (pieces.chunks, heads, rows, columns)
        states, dstates = (torch.empty(size, dtype=q.dtype, device=q.device) for _ in range(2))
        _scan(factors, v, rows, starts, pieces.table, how, states=states)
        dstarts, dv = _starts(factors, dout, rows, dfinal, pieces, how, True), torch.empty_like(v)
        dstate = _scan(factors, dout, rows, dstarts, pieces.table, how, reverse=True, out=dv, states=dstates)
        kept, steep = factors.kept, factors.steep
        dq, dk, dg = (torch.empty_like(x) for x in (q, k, g if gated else q[:0]))
        del factors
        if pieces.chunks * heads:
            given = q, k, v, g, dout
            strides = [s for x in (*given, dq, dk, dg) for s in x.stride()[:3]]
            channel_gradients[(pieces.chunks, heads, -(-rows // how.channels))](
                *given, states, dstates, kept, steep, dq, dk, dg, _segments(q, chunk), pieces.each, *strides, heads,
                rows, columns,
                C=chunk, LEVELS=chunk.bit_length() - 1, BK=how.rows, BD=how.channels, BV=how.gradients.columns,
                GATED=gated, STAGES=how.gradients.stages, **_precision(q),
                num_warps=how.gradients.warps, num_stages=how.gradients.stages,
            )  # fmt: skip
        first = pieces.last(dstate, True) if ctx.needs_input_grad[4] else None
        return dq, dk, dv, dg if gated else None, first, None, None
