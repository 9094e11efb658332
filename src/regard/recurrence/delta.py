"""The (gated) delta rule, in three forms of one function.

    S' = e^{g_t} S_{t-1} ,   S_t = S' + β_t k_t (v_t − S'ᵀ k_t)ᵀ ,   o_t = S_tᵀ q_t

The state first decays; then what it holds at k_t is read, and replaced by v_t to the share β_t: all of it at β = 1 for
‖k‖ = 1, nothing at β = 0, a reflection at β = 2. Equal to S_t = e^{g_t} (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ. It
serves DeltaNet (g = 0; Yang et al., 2024, arXiv 2406.06484) and Gated DeltaNet (Yang et al., 2024, arXiv 2412.06464).

Within a chunk of C tokens, with γ_r = e^{g_1 + … + g_r} and Γ_ri = γ_r / γ_i for i ≤ r, else 0, and S_0 the state
before it, what the tokens write (their "pseudo-values" U, (C, Dv)) solves one unit lower triangular system:

    (I + strict_tril(diag(β) (K Kᵀ ⊙ Γ))) U = diag(β) (V − diag(γ) K S_0)
    O = diag(γ) Q S_0 + (Q Kᵀ ⊙ Γ) U ,   S_C = γ_C S_0 + (diag(γ_C / γ) K)ᵀ U

It is solved for V and for diag(γ) K apart, so that no chunk's solve waits for the chunk before.

Shapes: q, k (B, H, N, Dk); v (B, H, N, Dv); beta β (B, H, N), in [0, 2] for a state that cannot grow; state
(B, H, Dk, Dv). log_decay g ≤ 0, natural logarithms: None for no decay, (H,) fixed per head, or three axes that
broadcast to (B, H, N). −inf forgets exactly: no NaN, forward or backward; set at the first token of each packed
document it keeps documents apart. States, sums and solves are held in at least float32; outputs come back in v's dtype.
No scale is applied to q, and k is not normalised here: the rule is stable where β‖k‖² ≤ 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.errors import require
from regard.recurrence.contract import check_floating
from regard.recurrence.decay import between, from_start, to_end
from regard.recurrence.diagonal import accumulation_dtype
from regard.recurrence.precision import outside_autocast
from regard.recurrence.spans import spans


@outside_autocast
def recurrent(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, one token after the other. Returns (out (B, H, N, Dv), final state). O(N·Dk·Dv) time."""
    dtype = v.dtype
    q, k, v, beta, g, state = prepare(q, k, v, beta, log_decay, state)
    out = []
    for t in range(q.shape[2]):
        key = k[:, :, t, None, :]
        state = g[:, :, t if g.shape[2] > 1 else 0, :, None].exp() * state
        wrong = v[:, :, t, None, :] - key @ state
        state = state + key.mT @ (beta[:, :, t, None] * wrong)
        out.append(q[:, :, t, None, :] @ state)
    return (torch.cat(out, 2) if out else v).to(dtype), state


@outside_autocast
def parallel(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All tokens at once: out = (Q Kᵀ ⊙ Γ) T V + …, with T = (I + strict_tril(diag(β) (K Kᵀ ⊙ Γ)))⁻¹ diag(β).

    O(N³) time, O(N²) memory: for short N and as an oracle."""
    dtype, n = v.dtype, v.shape[2]
    q, k, v, beta, g, state = prepare(q, k, v, beta, log_decay, state)
    if n == 0:
        return v.to(dtype), state
    g = g.expand(-1, -1, n, -1)
    weight = between(g[..., 0]).exp()
    solution = _solve(k, weight, beta, torch.diag_embed(beta[..., 0]))
    start = from_start(g).exp()
    written = solution @ (v - start * (k @ state))
    out = ((q @ k.mT) * weight) @ written + start * (q @ state)
    state = g.sum(2, keepdim=True).exp() * state + (k * to_end(g).exp()).mT @ written
    return out.to(dtype), state


@outside_autocast
def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Linear in N: one triangular system per chunk, the state between them. Same results as `recurrent`.

    All chunks' systems are solved together (on a CPU those that stay in its cache); only the states are chained.
    O(N·(chunk_size·(Dk+Dv) + Dk·Dv)) time, O(N·(Dk+Dv+chunk_size) + N/chunk_size·Dk·Dv) memory. Any N;
    chunk_size ≥ 1."""
    require(chunk_size >= 1, "chunk_size", chunk_size, "an int ≥ 1")
    dtype = v.dtype
    q, k, v, beta, g, state = prepare(q, k, v, beta, log_decay, state)
    outs = []
    for span, size in spans(q, v, chunk_size):
        gates = g[:, :, span] if g.shape[2] > 1 else g
        out, state = _whole_chunks(q[:, :, span], k[:, :, span], v[:, :, span], beta[:, :, span], gates, state, size)
        outs.append(out)
    return (torch.cat(outs, 2) if outs else v).to(dtype), state


def _whole_chunks(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """`chunked` where N is a multiple of `size`."""
    chunks = q.shape[2] // size
    q, k, v, beta = (x.unflatten(2, (chunks, size)) for x in (q, k, v, beta))  # (B, H, chunks, size, ·)
    # A decay that is fixed in time is the same in every chunk: one chunk of it is enough.
    g = g[:, :, None].expand(-1, -1, -1, size, -1) if g.shape[2] == 1 else g.unflatten(2, (chunks, size))
    weight = between(g[..., 0]).exp()  # Γ (·, ·, chunks or 1, size, size)
    start = from_start(g).exp()
    solved = _solve(k, weight, beta, torch.cat([beta * v, (beta * start) * k], -1))
    from_values, from_state = solved.split([v.shape[-1], k.shape[-1]], -1)
    keys = (k * to_end(g).exp()).mT  # (B, H, chunks, Dk, size)
    kept = g.sum(-2, keepdim=True).exp()
    before, written = [], []
    for c in range(chunks):
        before.append(state)
        written.append(from_values[:, :, c] - from_state[:, :, c] @ state)
        state = kept[:, :, c if kept.shape[2] > 1 else 0] * state + keys[:, :, c] @ written[-1]
    out = ((q @ k.mT) * weight) @ torch.stack(written, 2) + (q * start) @ torch.stack(before, 2)
    return out.flatten(2, 3), state


def _solve(k: Tensor, weight: Tensor, beta: Tensor, right: Tensor) -> Tensor:
    """X with (I + strict_tril(diag(β) (K Kᵀ ⊙ Γ))) X = right, by forward substitution in the accumulation dtype.

    `unitriangular` reads neither the diagonal nor what is above it."""
    return torch.linalg.solve_triangular(beta * (k @ k.mT) * weight, right, upper=False, unitriangular=True)


def prepare(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`check`, then everything in the accumulation dtype, β and the decay with four axes, the state present."""
    log_decay = check(q, k, v, beta, log_decay, state)
    dtype = accumulation_dtype(q, k, v)
    if log_decay is None:
        log_decay = q.new_zeros((1, 1, 1))
    if state is None:
        state = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=dtype, device=q.device)
    q, k, v, beta, log_decay, state = (x.to(dtype) for x in (q, k, v, beta, log_decay, state))
    return q, k, v, beta[..., None], log_decay[..., None], state


def check(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor | None
) -> Tensor | None:
    """The decay with three axes, or None. Raises ArgumentError naming the tensor whose shape does not fit.

    Values are not checked (that would wait for the device)."""
    check_floating(v=v)
    require(q.ndim == 4, "q", tuple(q.shape), "(B, H, N, Dk)")
    batch, heads, n, dim = q.shape
    require(k.shape == q.shape, "k", tuple(k.shape), f"the shape of q, {tuple(q.shape)}")
    require(v.ndim == 4 and v.shape[:3] == q.shape[:3], "v", tuple(v.shape), f"({batch}, {heads}, {n}, Dv)")
    require(beta.shape == q.shape[:3], "beta", tuple(beta.shape), f"({batch}, {heads}, {n}): one per token and head")
    wanted = (batch, heads, dim, v.shape[3])
    if state is not None:
        require(state.shape == wanted, "state", tuple(state.shape), f"{wanted}: (B, H, Dk, Dv)")
    if log_decay is None:
        return None
    if log_decay.ndim == 1:
        require(log_decay.shape[0] == heads, "log_decay", tuple(log_decay.shape), f"({heads},): one per head")
        log_decay = log_decay[None, :, None]
    shape = tuple(log_decay.shape)
    fits = len(shape) == 3 and all(a in (1, b) for a, b in zip(shape, (batch, heads, n), strict=True))
    require(fits, "log_decay", shape, f"({heads},), or broadcastable to {(batch, heads, n)}")
    return log_decay
