"""Multi-head attention (Vaswani et al. 2017, arXiv 1706.03762), grouped queries (Ainslie et al. 2023, 2305.13245)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from regard.attend import attend
from regard.errors import require
from regard.layers.base import Context, Layer, Output, Padding, Tokens, without_padding
from regard.layers.checks import flags, positive, sizes
from regard.layers.rotary import rotate
from regard.patterns import Pattern
from regard.registry import Paper, mechanism

PAPER = Paper("Attention Is All You Need", "Vaswani et al.", 2017, "1706.03762")


class KVState(NamedTuple):
    """Keys and values of all tokens so far: k, v (B, Hkv, M, D), k already rotated.

    real (B, M) bool: which of them are tokens and not padding; None = all.
    """

    k: Tensor
    v: Tensor
    real: Tensor | None


class Attending(NamedTuple):
    """What `attend` is to be given: q (B, H, N, D), k, v (B, Hkv, M, D), key_padding (B, M).

    positions (B, N) long: the number of each query among its row's real tokens. own: whether they have to be stated,
    since the queries are not the last tokens of what k and v hold.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_padding: Tensor | None
    positions: Tensor
    own: bool


@mechanism(
    "multi-head-attention",
    paper=PAPER,
    families=("dense",),
    cost="O(N²·D) time, O(N·D) memory; a cache of 2·M·Hkv·D",
    causal=True,
    bidirectional=True,
    cross=True,
    patterns=True,
    gqa=True,
    steps=True,
    compiles=True,
)
class MultiHeadAttention(Layer):
    """Softmax attention in H heads, keys and values in Hkv heads: softmax(q kᵀ / √D) v under any pattern.

    kv_heads: number of key/value heads, a divisor of `heads`; None = heads. head_dim: D, None = dim / heads.
    bias: of the four projections. rotary: turn q and k by their positions (not with a context); D must be even.

    With a state, the new tokens attend to all before them and to one another as the pattern says: decoding step by step
    equals the full forward under the same causal pattern.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        rotary: bool = False,
        rotary_base: float = 10000.0,
    ) -> None:
        super().__init__(dim, heads)
        kv_heads = heads if kv_heads is None else kv_heads
        sizes(kv_heads=kv_heads)
        flags(bias=bias, rotary=rotary)
        positive(rotary_base=rotary_base)
        require(heads % kv_heads == 0, "kv_heads", kv_heads, f"a divisor of heads={heads}")
        if head_dim is None:
            require(dim % heads == 0, "heads", heads, f"a divisor of dim={dim}, or give head_dim")
            head_dim = dim // heads
        sizes(head_dim=head_dim)
        require(not rotary or head_dim % 2 == 0, "rotary", f"head_dim {head_dim}", "an even head_dim")
        self.kv_heads, self.head_dim, self.bias = kv_heads, head_dim, bias
        self.rotary, self.rotary_base = rotary, rotary_base
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=bias)

    def forward(
        self,
        x: Tokens,
        context: Context | None = None,
        *,
        pattern: Pattern | None = None,
        key_padding: Padding | None = None,
        state: KVState | None = None,
    ) -> Output:
        """See `Layer.forward`. The state is a KVState."""
        asked, state = self.project(x, context, key_padding, state)
        q_positions = asked.positions if asked.own else None
        out = attend(asked.q, asked.k, asked.v, pattern=pattern, key_padding=asked.key_padding, q_positions=q_positions)
        out = self.o_proj(out.transpose(1, 2).flatten(2))
        return Output(without_padding(out, key_padding if context is None else None), state)

    def project(
        self, x: Tensor, context: Tensor | None, key_padding: Tensor | None, state: KVState | None
    ) -> tuple[Attending, KVState | None]:
        """Check the input; queries of x, keys and values of the context, or of all tokens so far; the next state."""
        self.check_tokens(x, context, key_padding)
        self.check_state(state, KVState)
        q = self._split(self.q_proj(x), self.heads)
        source = x if context is None else context
        k, v = (self._split(project(source), self.kv_heads) for project in (self.k_proj, self.v_proj))
        if context is not None:
            if state is not None:
                raise self.refuse("state together with a context: the context holds all keys")
            if self.rotary:
                raise self.refuse("context with rotary=True: a context's tokens have no position beside the queries'")
            return Attending(q, k, v, key_padding, _count(x, None, 0), True), None
        if state is not None:
            self._check_fits(state, k)
        positions = _count(x, key_padding, _seen(state))
        if self.rotary:
            q, k = (rotate(t, positions, self.rotary_base) for t in (q, k))
        if state is None:
            state = KVState(k, v, key_padding)
        else:
            real = _joined(state, key_padding, x)
            state = KVState(torch.cat([state.k, k], 2), torch.cat([state.v, v], 2), real)
        return Attending(q, state.k, state.v, state.real, positions, False), state

    def _split(self, projected: Tensor, heads: int) -> Tensor:
        return projected.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)

    def _check_fits(self, state: KVState, k: Tensor) -> None:
        shape, wanted = tuple(state.k.shape), (k.shape[0], k.shape[1], "M", k.shape[3])
        fits = len(shape) == 4 and all(w in ("M", s) for s, w in zip(shape, wanted, strict=True))
        require(fits and state.v.shape == state.k.shape, "state", shape, f"{wanted}: (B, Hkv, M, D)")

    @classmethod
    def identity(cls) -> tuple[Tensor, Tensor]:
        """With one key/value head per query head it is `torch.nn.MultiheadAttention` of the same weights."""
        layer = cls(8, 2, bias=True).double()
        torch_layer = nn.MultiheadAttention(8, 2, bias=True, batch_first=True).double()
        torch_layer.in_proj_weight.data = torch.cat([p.weight for p in (layer.q_proj, layer.k_proj, layer.v_proj)])
        torch_layer.in_proj_bias.data = torch.cat([p.bias for p in (layer.q_proj, layer.k_proj, layer.v_proj)])
        torch_layer.out_proj.load_state_dict(layer.o_proj.state_dict())
        x = torch.randn(2, 5, 8, dtype=torch.float64)
        return layer(x).out, torch_layer(x, x, x, need_weights=False)[0]


def _seen(state: KVState | None) -> Tensor | int:
    """How many real tokens each row has had: (B, 1), or a number where there is no padding."""
    if state is None:
        return 0
    return state.k.shape[2] if state.real is None else state.real.sum(-1, keepdim=True)


def _count(x: Tensor, real: Tensor | None, seen: Tensor | int) -> Tensor:
    """(B, N) long: the number of each token among its row's real tokens; padding gets that of a neighbour."""
    if real is None:
        counted = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    else:
        counted = (real.long().cumsum(-1) - 1).clamp(min=0)
    return counted + seen


def _joined(state: KVState, key_padding: Tensor | None, x: Tensor) -> Tensor | None:
    if state.real is None and key_padding is None:
        return None
    before = torch.ones(state.k.shape[::2], dtype=torch.bool, device=x.device) if state.real is None else state.real
    now = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if key_padding is None else key_padding
    return torch.cat([before, now], 1)
