"""The diagonal-decay recurrence, in three forms of one function.

    S_t = diag(e^{g_t}) S_{t-1} + k_t v_tᵀ ,   o_t = S_tᵀ q_t        (token t itself included with weight 1)

It serves plain linear attention (g = 0), a fixed decay per head (RetNet, Lightning Attention), a scalar gate per token
(Mamba-2) and a gate per channel (GLA, HGRN-2).

Shapes: q, k (B, H, N, Dk); v (B, H, N, Dv); state (B, H, Dk, Dv). log_decay g ≤ 0, natural logarithms: None for no
decay, (H,) fixed per head, or four axes that broadcast to (B, H, N, Dk) — (B, H, N, 1) is one gate per token. −inf
forgets exactly: no NaN, forward or backward; set at the first token of each packed document it keeps documents apart.
Statistics and states are held in at least float32; outputs come back in v's dtype. No scale is applied to q.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.errors import require
from regard.recurrence.contract import check_floating
from regard.recurrence.decay import between, from_start, to_end
from regard.recurrence.precision import outside_autocast
from regard.recurrence.spans import spans


@outside_autocast
def recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, one token after the other. Returns (out (B, H, N, Dv), final state). O(N·Dk·Dv) time."""
    dtype = v.dtype
    q, k, v, g, state = prepare(q, k, v, log_decay, state)
    out = []
    for t in range(q.shape[2]):
        gate = g[:, :, t if g.shape[2] > 1 else 0].exp()
        state = gate[..., None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append(q[:, :, t, None, :] @ state)
    return (torch.cat(out, 2) if out else v).to(dtype), state


@outside_autocast
def parallel(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All tokens at once: o_i = Σ_{j ≤ i} (Σ_d q_id k_jd Π_{j<s≤i} e^{g_sd}) v_j, as one masked N×N product.

    O(N²) time; O(N²) memory, O(N²·Dk) for a gate per channel: for short N and as an oracle."""
    dtype, n = v.dtype, v.shape[2]
    q, k, v, g, state = prepare(q, k, v, log_decay, state)
    if n == 0:
        return v.to(dtype), state
    g = g.expand(-1, -1, n, -1)
    weight = between(g.transpose(-1, -2)).exp()  # (·, ·, 1 or Dk, N, N)
    scores = (q @ k.mT) * weight[:, :, 0] if g.shape[-1] == 1 else torch.einsum("bhid,bhjd,bhdij->bhij", q, k, weight)
    out = scores @ v + (q * from_start(g).exp()) @ state
    state = g.sum(2, keepdim=True).exp().mT * state + (k * to_end(g).exp()).mT @ v
    return out.to(dtype), state


@outside_autocast
def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Linear in N: the parallel form within chunks, the state between them. Same results as `recurrent`.

    All chunks are worked on together (on a CPU those that stay in its cache); only the states are chained. Matrix
    products throughout, for a gate per channel too (`_within_by_merging`); no exponent is ever positive.
    O(N·(chunk_size·(Dk+Dv) + Dk·Dv)) time, O(N·(Dk+Dv+chunk_size) + N/chunk_size·Dk·Dv) memory. Any N;
    chunk_size ≥ 1."""
    require(chunk_size >= 1, "chunk_size", chunk_size, "an int ≥ 1")
    dtype = v.dtype
    q, k, v, g, state = prepare(q, k, v, log_decay, state)
    outs = []
    for span, size in spans(q, v, chunk_size):
        gates = g[:, :, span] if g.shape[2] > 1 else g
        out, state = _whole_chunks(q[:, :, span], k[:, :, span], v[:, :, span], gates, state, size)
        outs.append(out)
    return (torch.cat(outs, 2) if outs else v).to(dtype), state


def _whole_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`chunked` where N is a multiple of `size`."""
    n = q.shape[2]
    q, k, v = (x.unflatten(2, (n // size, size)) for x in (q, k, v))  # (B, H, chunks, size, ·)
    # A decay that is fixed in time is the same in every chunk: one chunk of it is enough.
    g = g[:, :, None].expand(-1, -1, -1, size, -1) if g.shape[2] == 1 else g.unflatten(2, (n // size, size))
    within = _within_scalar if g.shape[-1] == 1 else _within_by_merging
    out, reads, keys, kept = within(q, k, v, g)
    added = keys.mT @ v  # (B, H, chunks, Dk, Dv): what each chunk adds to the state
    kept = kept.mT  # (·, ·, chunks or 1, 1 or Dk, 1): what it leaves of the state before it
    before = []
    for c in range(n // size):
        before.append(state)
        state = kept[:, :, c if kept.shape[2] > 1 else 0] * state + added[:, :, c]
    out = out + reads @ torch.stack(before, 2)
    return out.flatten(2, 3), state


def _within_scalar(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One gate for all channels: the masked product of the parallel form in each chunk. Inputs (B, H, chunks, C, ·).

    Returns what a chunk reads from itself, q decayed from its start, k decayed to its end, and its whole decay."""
    out = ((q @ k.mT) * between(g[..., 0]).exp()) @ v
    return out, q * from_start(g).exp(), k * to_end(g).exp(), g.sum(-2, keepdim=True).exp()


def _within_by_merging(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A gate per channel, without a (C, C, Dk) tensor and without a positive exponent. Returns as `_within_scalar`.

    A block knows its q decayed from its start and its k decayed to its end. Of two neighbours, what the second reads
    from the first is one product of these, the cut between them as common reference point; then they are one block,
    and what lies on the far side of a block is decayed by the whole of it. From single tokens up to the chunk: log2(C)
    products, together as many operations as the triangle. Decays only ever multiply, so 0 (g = −inf) is one of them."""
    size = q.shape[-2]
    full = 1 << (size - 1).bit_length()
    if full != size:  # zeros at the end: no key, no decay; the rows are cut off again
        q, k, v, g = (torch.nn.functional.pad(x, (0, 0, 0, full - size)) for x in (q, k, v, g))
    kept = g.exp()
    out, reads, keys = (q * k).sum(-1, keepdim=True) * v, q * kept, k  # each token reads itself
    half = 1
    while half < full:
        first, second = _pairs(reads, half)
        past, last = _pairs(keys, half)
        kept_first, kept_second = _pairs(kept, 1)
        ours, theirs = _pairs(out, half)
        theirs = theirs + (second @ past.mT) @ _pairs(v, half)[0]
        out = _joined(ours, theirs)
        reads, keys = _joined(first, kept_first * second), _joined(past * kept_second, last)
        kept = (kept_first * kept_second).flatten(-3, -2)
        half *= 2
    return out[..., :size, :], reads[..., :size, :], keys[..., :size, :], kept


def _pairs(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """(…, C, D) → first and second of every two neighbouring blocks, (…, C / 2 half, half, D) each."""
    first, second = x.unflatten(-2, (-1, 2, half)).unbind(-3)
    return first, second


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """The inverse of `_pairs`."""
    return torch.stack([first, second], -3).flatten(-4, -2)


def prepare(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`check`, then everything in the accumulation dtype, the decay with four axes, the state present."""
    log_decay = check(q, k, v, log_decay, state)
    dtype = accumulation_dtype(q, k, v)
    if log_decay is None:
        log_decay = q.new_zeros((1, 1, 1, 1))
    if state is None:
        state = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=dtype, device=q.device)
    return q.to(dtype), k.to(dtype), v.to(dtype), log_decay.to(dtype), state.to(dtype)


def check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None) -> Tensor | None:
    """The decay with four axes, or None. Raises ArgumentError naming the tensor whose shape does not fit.

    Values of log_decay are not checked (that would wait for the device)."""
    check_floating(v=v)
    require(q.ndim == 4, "q", tuple(q.shape), "(B, H, N, Dk)")
    batch, heads, n, dim = q.shape
    require(k.shape == q.shape, "k", tuple(k.shape), f"the shape of q, {tuple(q.shape)}")
    require(v.ndim == 4 and v.shape[:3] == q.shape[:3], "v", tuple(v.shape), f"({batch}, {heads}, {n}, Dv)")
    wanted = (batch, heads, dim, v.shape[3])
    if state is not None:
        require(state.shape == wanted, "state", tuple(state.shape), f"{wanted}: (B, H, Dk, Dv)")
    if log_decay is None:
        return None
    if log_decay.ndim == 1:
        require(log_decay.shape[0] == heads, "log_decay", tuple(log_decay.shape), f"({heads},): one per head")
        log_decay = log_decay[None, :, None, None]
    shape = tuple(log_decay.shape)
    fits = len(shape) == 4 and all(a in (1, b) for a, b in zip(shape, (batch, heads, n, dim), strict=True))
    require(fits, "log_decay", shape, f"({heads},), or broadcastable to {(batch, heads, n, dim)}")
    return log_decay


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that states and sums are held in: at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
