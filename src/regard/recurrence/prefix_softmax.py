"""Softmax attention as an associative scan: what a query knows of a set of keys is three numbers' worth of state.

For a set A of keys with scores s and values v:  m_A = max s,  u_A = Σ e^{s − m_A},  w_A = Σ e^{s − m_A} v, and the
attention over A is w_A / u_A. Two sets merge by rescaling to the larger maximum (`merge`): associative, commutative,
identity (−∞, 0, 0). All prefixes at once are a prefix scan, one after the other an RNN cell, blocks of keys in any
order the merge of flash and of distributed attention (Feng et al. 2024, Attention as an RNN, arXiv 2405.13956).

The query is not in here: scores (B, H, N) are one number per key, since Aaren's query is the same at every position.
Scores are finite or −inf, which leaves the key out (padding); where no key is left the output is 0. m is held constant
in the backward: it cancels in w / u, and in that ratio only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from regard.errors import require
from regard.recurrence.contract import check_floating, check_one_token, check_state
from regard.recurrence.diagonal import accumulation_dtype
from regard.registry import Paper, register

PAPER = Paper("Attention as an RNN", "Feng et al.", 2024, "2405.13956")


class PrefixInputs(NamedTuple):
    """scores (B, H, N), finite or −inf; v (B, H, N, Dv)."""

    scores: Tensor
    v: Tensor

    @property
    def length(self) -> int:
        return self.v.shape[2]

    def tokens(self, start: int, stop: int) -> Self:
        """Tokens [start, stop)."""
        return self._replace(scores=self.scores[:, :, start:stop], v=self.v[:, :, start:stop])


class SoftmaxState(NamedTuple):
    """m, u (…): the largest score and the sum of e^{s − m}; w (…, Dv): the sum of e^{s − m} v. At least float32."""

    m: Tensor
    u: Tensor
    w: Tensor


def merge(a: SoftmaxState, b: SoftmaxState) -> SoftmaxState:
    """The state of both sets of keys. Shapes broadcast."""
    m = torch.maximum(a.m, b.m)
    from_a, from_b = _rescale(a.m, m), _rescale(b.m, m)
    return SoftmaxState(m, a.u * from_a + b.u * from_b, a.w * from_a[..., None] + b.w * from_b[..., None])


def fold(scores: Tensor, v: Tensor) -> SoftmaxState:
    """A whole block of keys: scores (…, M) and v (…, M, Dv), M ≥ 1, broadcast against each other. Sums over M."""
    scores, v = _held(scores, v)
    m = scores.detach().amax(-1)
    weight = _rescale(scores, m[..., None])
    return SoftmaxState(m, weight.sum(-1), (weight[..., None, :] @ v)[..., 0, :])


def read(state: SoftmaxState) -> Tensor:
    """w / u (…, Dv): the attention over the set; 0 where the set is empty."""
    empty = (state.u == 0)[..., None]
    return torch.where(empty, 0.0, state.w / torch.where(empty, 1.0, state.u[..., None]))


def recurrent(scores: Tensor, v: Tensor, state: SoftmaxState | None = None) -> tuple[Tensor, SoftmaxState]:
    """The RNN cell, one token after the other: (out (B, H, N, Dv) in v's dtype, final state). O(N·Dv) time."""
    state = empty_state(scores, v) if state is None else state
    out = []
    for t in range(v.shape[2]):
        state = merge(state, _token(scores[:, :, t], v[:, :, t]))
        out.append(read(state))
    return (torch.stack(out, 2) if out else v).to(v.dtype), state


def parallel(scores: Tensor, v: Tensor, state: SoftmaxState | None = None) -> tuple[Tensor, SoftmaxState]:
    """The prefix scan over tokens: O(N·Dv) work in a depth of 2·log₂ N merges. Same results as `recurrent`."""
    state = empty_state(scores, v) if state is None else state
    prefix = _prefixes(SoftmaxState(*(x[:, :, None] for x in state)), _token(scores, v))
    return read(_span(prefix, slice(1, None))).to(v.dtype), SoftmaxState(*(x[:, :, -1] for x in prefix))


def chunked(
    scores: Tensor, v: Tensor, state: SoftmaxState | None = None, *, chunk_size: int = 64
) -> tuple[Tensor, SoftmaxState]:
    """Matrix products within chunks, the prefix scan over the chunks' totals. Same results as `recurrent`.

    Within a chunk W_ij = e^{s_j − m_i} for j ≤ i, m_i the largest score so far: all exponents ≤ 0. O(N·chunk_size·Dv)
    time, O(N·(chunk_size + Dv)) memory."""
    require(chunk_size >= 1, "chunk_size", chunk_size, "an int ≥ 1")
    state = empty_state(scores, v) if state is None else state
    dtype, n = v.dtype, v.shape[2]
    if n == 0:
        return v, state
    scores, v = _held(scores, v)
    size = min(chunk_size, n)
    missing = -n % size
    if missing:  # keys with score −inf: nothing
        scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
        v = torch.nn.functional.pad(v, (0, 0, 0, missing))
    scores, v = scores.unflatten(2, (-1, size)), v.unflatten(2, (-1, size))  # (B, H, chunks, size, ·)
    m = scores.detach().cummax(-1).values
    later = torch.ones(size, size, dtype=torch.bool, device=v.device).triu(1)
    weight = _rescale(scores[..., None, :].masked_fill(later, -torch.inf), m[..., None])
    within = SoftmaxState(m, weight.sum(-1), weight @ v)
    totals = SoftmaxState(*(x[:, :, :, -1] for x in within))
    before = _prefixes(SoftmaxState(*(x[:, :, None] for x in state)), totals)
    carried = SoftmaxState(*(x[:, :, :-1, None] for x in before))
    out = read(merge(carried, within)).flatten(2, 3)[:, :, :n]
    return out.to(dtype), SoftmaxState(*(x[:, :, -1] for x in before))


def empty_state(scores: Tensor, v: Tensor) -> SoftmaxState:
    """The identity of `merge`, (−∞, 0, 0), for scores (B, H, N) and v (B, H, N, Dv). Raises for other shapes."""
    check_floating(v=v)
    require(v.ndim == 4, "v", tuple(v.shape), "(B, H, N, Dv)")
    require(scores.shape == v.shape[:3], "scores", tuple(scores.shape), f"{tuple(v.shape[:3])}: (B, H, N)")
    w = torch.zeros(*v.shape[:2], v.shape[3], dtype=accumulation_dtype(scores, v), device=v.device)
    return SoftmaxState(torch.full_like(w[..., 0], -torch.inf), torch.zeros_like(w[..., 0]), w)


def _token(scores: Tensor, v: Tensor) -> SoftmaxState:
    """Single keys, (s, 1, v), or the identity where s = −inf. The 1 is e^{s − m}: the gradient of s goes through it."""
    scores, v = _held(scores, v)
    m = scores.detach()
    u = _rescale(scores, m)
    return SoftmaxState(m, u, u[..., None] * v)


def _held(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(scores, v)
    return scores.to(dtype), v.to(dtype)


def _rescale(m: Tensor, new: Tensor) -> Tensor:
    """e^{m − new} for new ≥ m; 0, not NaN, where both are −inf."""
    return (m - new.masked_fill(new == -torch.inf, 0.0)).exp()


def _span(state: SoftmaxState, span: slice) -> SoftmaxState:
    return SoftmaxState(*(x[:, :, span] for x in state))


def _prefixes(first: SoftmaxState, rest: SoftmaxState) -> SoftmaxState:
    """first, first∘rest₁, first∘rest₁∘rest₂, … along axis 2."""
    return _scan(SoftmaxState(*(torch.cat([a.to(b.dtype), b], 2) for a, b in zip(first, rest, strict=True))))


def _scan(x: SoftmaxState) -> SoftmaxState:
    """Inclusive prefix scan along axis 2 in O(N) work: merge neighbours, scan the pairs, fill in what lies between."""
    n = x.m.shape[2]
    if n == 1:
        return x
    even, odd = _span(x, slice(0, None, 2)), _span(x, slice(1, None, 2))
    pairs = _scan(merge(_span(even, slice(0, n // 2)), odd))  # the prefixes that end at odd places
    between = merge(_span(pairs, slice(0, (n - 1) // 2)), _span(even, slice(1, None)))
    joined = []
    for first, e, o in zip(x, between, pairs, strict=True):
        full = torch.empty_like(first)
        full[:, :, :1], full[:, :, 2::2], full[:, :, 1::2] = first[:, :, :1], e, o
        joined.append(full)
    return SoftmaxState(*joined)


@dataclass(frozen=True)
class PrefixSoftmax:
    """o_i = Σ_{j ≤ i} e^{s_j} v_j / Σ_{j ≤ i} e^{s_j}: softmax attention of one fixed query over every prefix.

    chunk_size: tokens worked on together by `scan`; the result does not depend on it."""

    chunk_size: int = 64

    def init(self, inputs: PrefixInputs) -> SoftmaxState:
        """(−∞, 0, 0)."""
        return empty_state(inputs.scores, inputs.v)

    def step(self, state: SoftmaxState, inputs: PrefixInputs) -> tuple[SoftmaxState, Tensor]:
        """One token, inputs of length 1."""
        state = self._checked(inputs, state)
        check_one_token(inputs)
        out, state = recurrent(inputs.scores, inputs.v, state)
        return state, out

    def scan(self, inputs: PrefixInputs, state: SoftmaxState | None = None) -> tuple[Tensor, SoftmaxState]:
        """The chunked form. Returns (out (B, H, N, Dv) in v's dtype, final state)."""
        return chunked(inputs.scores, inputs.v, self._checked(inputs, state), chunk_size=self.chunk_size)

    def _checked(self, inputs: PrefixInputs, state: SoftmaxState | None) -> SoftmaxState:
        start = self.init(inputs)
        if state is None:
            return start
        check_state(state, SoftmaxState)
        shapes = [tuple(x.shape) for x in state]
        wanted = [tuple(x.shape) for x in start]
        require(shapes == wanted, "state", shapes, f"{wanted}: m and u (B, H), w (B, H, Dv)")
        return state


def _example() -> tuple[PrefixSoftmax, PrefixInputs]:
    scores, v = 3 * torch.randn(2, 3, 21, dtype=torch.float64), torch.randn(2, 3, 21, 4, dtype=torch.float64)
    scores[1, :, :2] = -torch.inf  # two tokens of padding
    return PrefixSoftmax(chunk_size=8), PrefixInputs(scores, v)


register(
    "prefix-softmax",
    kind="recurrence",
    paper=PAPER,
    families=("recurrent",),
    cost="O(N·C·Dv) time in log₂(N/C) steps, a state of Dv + 2 per head",
    example=_example,
)(PrefixSoftmax)
