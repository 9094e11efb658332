"""The diagonal-decay recurrence on a GPU, forward and backward, with the same gate for all channels from `scan_scalar`.

    S_t = diag(e^{g_t}) S_{t−1} + k_t v_tᵀ ,   o_t = S_tᵀ q_t

Where the decay is the same for all channels, every gradient is itself such a scan with the roles exchanged, dO the
gradient of the output and dS that of the final state, "reverse" meaning pairs i ≥ j from the end:

    dq = scan(dO, v, k; Sᵀ)     dk = reverse scan(v, dO, q; dSᵀ)     dv = reverse scan(k, q, dO; dS)

and the state that the last one ends with is the gradient of the initial state. The gradient of the gates needs no
further scan: a decay e^{g_s} is met by the pairs i ≥ s > j, so dg_s = Σ_{i ≥ s} q_i·dq_i − Σ_{j ≥ s} k_j·dk_j +
⟨S_N, dS_N⟩. A gate per channel is `diagonal_channel`'s.

Few heads and a long sequence leave a GPU idle: the sequence is then cut into pieces (`cuts`), whose states are found
first, without outputs, and chained (`diagonal_chain`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.kernels.triton.aligned import aligned, missing, widened
from regard.kernels.triton.diagonal_chain import chained
from regard.kernels.triton.diagonal_channel import ChannelDecay
from regard.kernels.triton.diagonal_channel import chunk_size as channel_chunk_size
from regard.kernels.triton.diagonal_gates import gates
from regard.kernels.triton.diagonal_scalar import running_sums, scan_scalar
from regard.kernels.triton.pieces import Pieces, documents, even

PROCESSORS = 132  # an H100's multiprocessors; two programs of this scan fit on each
WHOLE = 16384  # tokens whose walk takes as long as what a cut adds to a call, four launches
PIECE = 1024  # tokens that a piece has at least


@dataclass(frozen=True)
class Launch:
    """columns: of the state, per program; warps; pipeline stages."""

    columns: int
    warps: int
    stages: int


@lru_cache(maxsize=256)
def launch(rows: int, columns: int, programs: int, dtype: torch.dtype) -> Launch:
    """programs: heads × pieces, each of which walks its tokens.

    Measured on an H100 with a state of 128 × 128 in bfloat16: 64 columns a program take 4.1 ms where 32 take 5.3, as
    long as there are more programs than processors; with 128 programs they take 5.9 ms and 32 columns, 256 programs,
    5.3. Three stages instead of two spill: 6.2 ms. States of 256 rows spill five times as much with 64 columns as those
    of 128, and do not fit into shared memory in three stages."""
    few = programs * -(-columns // 64) <= PROCESSORS
    if few or rows > 128 or dtype == torch.float32:
        return Launch(32, 4, 2)
    return Launch(min(64, max(32, triton.next_power_of_2(columns))), 4, 2)


def cuts(n: int, programs: int) -> int:
    """Into how many pieces sequences of n tokens are cut that `programs` would walk otherwise.

    A cut costs a walk without outputs over what is before it, so it is made where there is room for half as many
    programs again: up to `few`. It also costs launches, so what the idle part of the GPU could have walked meanwhile
    is to be more than WHOLE. Then it is made often enough for the work to come out even. Measured on an H100 (262,144
    tokens × 32 heads, ms uncut or cut in 2, 4, 8, 16): 128 programs 5.9, 4.8, 4.6, –, –; 64 programs –, –, 4.8, 4.6,
    4.7; 256 programs or more, uncut, 4.1. With 128 programs of 8,192 tokens, a cut doubled the time of a call."""
    few = 4 * PROCESSORS // 3
    if n * (few - programs) < WHOLE * few:
        return 1
    return min(4 * PROCESSORS // max(programs, 1), n // PIECE)


def chunk_size(dtype: torch.dtype) -> int:
    """Tokens at a time. Fewer than 64 rows leave Hopper's large matrix instructions (and, mixed with them, gave wrong
    numbers with Triton 3.6); float32 products are exact and slow."""
    return 64 if dtype.itemsize == 2 else 32


@dataclass(frozen=True)
class Work:
    """What all scans of a call share. sums: of the log decays, (chunks, H, C), or None where there are none."""

    pieces: Pieces
    chunk: int
    sums: Tensor | None = None


def prepare(q: Tensor, g: Tensor | None, pieces: Pieces, chunk: int) -> Work:
    """One pass over the decays (B, H, N), parallel in all chunks."""
    if g is None:
        return Work(pieces, chunk)
    heads = q.shape[1]
    sums = torch.empty(pieces.chunks, heads, chunk, dtype=torch.float32, device=q.device)
    if pieces.chunks * heads:
        running_sums[(pieces.chunks, heads)](g, sums, pieces.each, *g.stride(), heads, C=chunk, num_warps=1)
    return Work(pieces, chunk, sums)


def scan(
    q: Tensor, k: Tensor, v: Tensor, work: Work, starts: Tensor | None, out: Tensor,
    *, reverse: bool = False, beside: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Fills out (B, H, N, Dv), from the states that the pieces start from. The state at the other end (sequences, H,
    Dk, Dv) float32, and None or, in parts that are to be added, Σ_d out·beside (parts, B, H, N) float32."""
    table = work.pieces.table
    how = launch(q.shape[3], v.shape[3], q.shape[1] * table.shape[0], q.dtype)
    parts = -(-v.shape[3] // how.columns)
    dots = None if beside is None else torch.empty(parts, *q.shape[:3], dtype=torch.float32, device=v.device)
    final = _run(q, k, v, work, table, reverse, how, starts, out=out, beside=beside, dots=dots)
    return work.pieces.last(final, reverse), dots


def starting(k: Tensor, v: Tensor, work: Work, state: Tensor | None, *, reverse: bool = False) -> Tensor | None:
    """The state that each piece of `scan` starts from, (pieces, H, Dk, Dv) float32, None for zeros; `state` is that of
    each sequence."""
    pieces, heads = work.pieces, k.shape[1]
    if pieces.split == 1:
        return None if state is None else state.float().contiguous()
    table = pieces.feeding(reverse)
    how = launch(k.shape[3], v.shape[3], heads * table.shape[0], k.dtype)
    left = torch.empty(table.shape[0], heads, 1, dtype=torch.float32, device=v.device)
    local = _run(k, k, v, work, table, reverse, how, None, left=left)
    return chained(local, left, state, pieces, reverse)


def _run(
    q: Tensor, k: Tensor, v: Tensor, work: Work, table: Tensor, reverse: bool, how: Launch, start: Tensor | None,
    *, out: Tensor | None = None, beside: Tensor | None = None, dots: Tensor | None = None, left: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The state at the other end of each piece in `table`, (pieces, H, Dk, Dv) float32; fills `out` and `dots`, or,
    without outputs, `left`."""
    (_, heads, n, rows), columns, count = q.shape, v.shape[3], table.shape[0]
    final = torch.empty(count, heads, rows, columns, dtype=torch.float32, device=v.device)
    there, x = v if out is None else out, v if beside is None else beside
    part_step, row_step = (0, 0) if dots is None else dots.stride()[:2]
    # Products of fewer than 64 rows go another way through the compiler, one that does not mix with wide ones.
    least = 64 if q.dtype.itemsize == 2 else 16
    scan_scalar[(-(-columns // how.columns), heads, count)](
        q, k, v, final if work.sums is None else work.sums, there, final if start is None else start,
        final, final if left is None else left, x, final if dots is None else dots, table,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *there.stride()[:3], *x.stride()[:3], part_step, row_step,
        heads, n, rows, columns, C=work.chunk, BK=max(least, triton.next_power_of_2(rows)), BV=how.columns,
        DECAY=work.sums is not None, REVERSE=reverse, OUT=out is not None, START=start is not None,
        DOTS=dots is not None, PRECISION="ieee" if q.dtype == torch.float32 else "tf32", STAGES=how.stages,
        num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    return final


class _Diagonal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None, pieces: Pieces, chunk: int
    ) -> tuple[Tensor, Tensor]:
        work = prepare(q, g, pieces, chunk)
        starts = starting(k, v, work, state)
        batch, heads, n, columns = v.shape
        out = torch.empty(batch, n, heads, columns, dtype=v.dtype, device=v.device).transpose(1, 2)
        final, _ = scan(q, k, v, work, starts, out)
        ctx.save_for_backward(q, k, v, starts, final, work.sums)
        ctx.pieces, ctx.chunk = pieces, chunk
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
        q, k, v, starts, final, sums = ctx.saved_tensors
        pieces = ctx.pieces
        work = Work(pieces, ctx.chunk, sums)
        dout = torch.zeros_like(v) if dout is None else aligned(dout.to(v.dtype))
        gated = ctx.needs_input_grad[3]
        beside = (q, k) if gated else (None, None)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        dstarts = starting(q, dout, work, dfinal, reverse=True)
        turned = [None if s is None else s.mT.contiguous() for s in (starts, dstarts)]
        _, q_dots = scan(dout, v, k, work, turned[0], dq, beside=beside[0])
        _, k_dots = scan(v, dout, q, work, turned[1], dk, reverse=True, beside=beside[1])
        dstate, _ = scan(k, q, dout, work, dstarts, dv, reverse=True)
        dg = None
        if gated:
            assert q_dots is not None and k_dots is not None
            dg = gates(q_dots, k_dots, None if dfinal is None else (final * dfinal).sum((-1, -2)), pieces)
        return dq, dk, dv, dg, dstate if ctx.needs_input_grad[4] else None, None, None


@torch.compiler.disable  # its launches are Python's; torch.compile goes on around it
def diagonal(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None,
    *, ends: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, H, N, Dv) in v's dtype and the final state (B, H, Dk, Dv) float32, differentiable in all tensors.

    q, k (B, H, N, Dk), v (B, H, N, Dv), log_decay None or four axes that broadcast to (B, H, N, Dk), state (B, H, Dk,
    Dv), checked by the caller. ends (0, …, N): documents packed into one row (B = 1); states are then one per document.
    """
    batch, heads, n, dim = q.shape
    columns = v.shape[3]
    more = missing(dim), missing(columns)  # channels of zeros: they neither read nor write anything
    q, k, v = (aligned(x) for x in (q, k, v))
    g = log_decay
    if g is not None and g.shape[3] > 1:
        g = aligned(g.expand(batch, heads, n, dim))
    elif g is not None:
        g = g.squeeze(3).expand(batch, heads, n)  # an index instead would have a copy for its gradient
    if state is not None:
        state = widened(state, *more)
    per_channel = g is not None and g.ndim == 4
    chunk = channel_chunk_size(q.shape[3], q.dtype) if per_channel else chunk_size(q.dtype)
    if ends is not None:
        pieces = documents(ends, chunk, q.device)
    else:
        wide = 32 if per_channel else 64  # its programs, of 64 columns, have a processor each: they count twice
        pieces = even(batch, n, cuts(n, batch * heads * -(-columns // wide)), chunk, q.device)
    with torch.cuda.device_of(q):  # kernels are launched on the current device, wherever their tensors lie
        out, final = (ChannelDecay if per_channel else _Diagonal).apply(q, k, v, g, state, pieces, chunk)
    return (out[..., :columns], final[:, :, :dim, :columns]) if any(more) else (out, final)
