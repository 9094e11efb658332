"""Hedgehog: linear attention whose feature map is learned to mimic softmax (Zhang et al. 2024, arXiv 2402.04347)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from regard.errors import UnknownNameError, require
from regard.layers.base import Context, Output, Padding, Tokens, without_padding
from regard.layers.checks import flags, from_zero, positive, sizes
from regard.layers.recurrent import (
    Read,
    RecurrentLayer,
    RecurrentState,
    at_real_tokens,
    join_heads,
    own_precision,
    positions,
    seen,
    split_heads,
)
from regard.layers.rotary import rotate
from regard.patterns import Pattern, causal, full
from regard.recurrence import DiagonalInputs
from regard.recurrence.diagonal import accumulation_dtype
from regard.recurrence.feature_maps import (
    hedgehog_exp,
    hedgehog_exp_of_queries,
    hedgehog_joint_softmax,
    hedgehog_softmax_halves,
)
from regard.recurrence.normalized import NormalisedLinearAttention
from regard.registry import Paper, mechanism

PAPER = Paper(
    "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
    "Zhang et al.",
    2024,
    "2402.04347",
)
Features = Literal["softmax-halves", "joint-softmax", "exp"]
_MAPS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "softmax-halves": (hedgehog_softmax_halves, hedgehog_softmax_halves),
    "joint-softmax": (hedgehog_joint_softmax, hedgehog_joint_softmax),
    "exp": (hedgehog_exp_of_queries, hedgehog_exp),
}


class HeadMap(nn.Module):
    """u = x W_h + b_h in each head: (B, H, N, D) → (B, H, N, D). Begins as the identity."""

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(dim).repeat(heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(heads, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        """The map of each head."""
        return x @ self.weight + self.bias


@mechanism(
    "hedgehog",
    paper=PAPER,
    families=("recurrent",),
    cost="O(N·dim·(dim + 2D + 2C)) time, D = dim/heads; a state of heads·2D·(D + 1) in float32",
    causal=True,
    bidirectional=True,
    cross=False,
    patterns=False,
    gqa=False,
    steps=True,
    compiles=False,
)
class Hedgehog(RecurrentLayer):
    """o_i = Σ_j φ_q(q_i)·φ_k(k_j) v_j / (Σ_j φ_q(q_i)·φ_k(k_j) + ε), φ learned: one map for queries, one for keys.

    With u = x W_h + b_h of each head, W_h beginning at 1 and b_h at 0, the published feature maps, three models:
    features="softmax-halves": [softmax(u), softmax(−u)], the stable default; "joint-softmax": softmax([2u, −2u]);
    "exp": [e^u, e^{−u}], the paper's equation: keys overflow float16 and, from |u| = 88 on, float32 and bfloat16. Of
    queries the largest feature is divided out, which changes nothing but what ε weighs.
    rotary: q and k are turned by their positions before φ. D = dim / heads; φ takes no 1/√D (W_h can learn it).

    pattern: None or full(): every token reads all; `causal()`: a recurrence. `feature(q, k)` are the maps alone, which
    distillation trains.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        features: Features = "softmax-halves",
        rotary: bool = False,
        rotary_base: float = 10000.0,
        eps: float = 1e-6,
        chunk_size: int = 64,
    ) -> None:
        super().__init__(dim, heads)
        require(dim % heads == 0, "heads", heads, f"a divisor of dim={dim}")
        flags(rotary=rotary)
        positive(rotary_base=rotary_base)
        require(not rotary or (dim // heads) % 2 == 0, "rotary", f"head dim {dim // heads}", "an even head dim")
        sizes(chunk_size=chunk_size)
        from_zero("eps", eps)
        if features not in _MAPS:
            raise UnknownNameError("features", str(features), get_args(Features))
        self.mixer: NormalisedLinearAttention = NormalisedLinearAttention(eps, chunk_size)
        self.features, self.rotary, self.rotary_base = features, rotary, rotary_base
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.q_map, self.k_map = HeadMap(heads, dim // heads), HeadMap(heads, dim // heads)

    def forward(
        self,
        x: Tokens,
        context: Context | None = None,
        *,
        pattern: Pattern | None = None,
        key_padding: Padding | None = None,
        state: RecurrentState | None = None,
    ) -> Output:
        """See `Layer.forward`. pattern: None, full() or causal(). The state is a RecurrentState in each case."""
        if pattern is not None and pattern not in (full(), causal()):
            raise self.refuse(f"pattern {pattern!r}: only causal(), or full(), or none")
        if context is not None or pattern == causal():
            return super().forward(x, context, pattern=pattern, key_padding=key_padding, state=state)
        self.check_tokens(x, context, key_padding)
        self.check_state(state, RecurrentState)
        if state is not None:
            self._check_fits(state, len(x))
        x = without_padding(x, key_padding)
        inputs = self.read(x, key_padding, state).inputs
        with own_precision(x):
            mixed, inner = self.mixer.mix(inputs, None if state is None else state.inner)
        out = without_padding(self.write(mixed, x), key_padding)
        return Output(out, RecurrentState(inner, (), seen(x, key_padding, state)))

    def feature(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """φ_q(q), φ_k(k): (B, H, N, D) → (B, H, N, 2D), > 0, in at least float32."""
        of_queries, of_keys = _MAPS[self.features]
        q, k = self.q_map(q), self.k_map(k)
        dtype = accumulation_dtype(q, k)
        return of_queries(q.to(dtype)), of_keys(k.to(dtype))

    def read(self, x: Tensor, key_padding: Tensor | None, state: RecurrentState | None) -> Read:
        """Features of queries and keys; those of keys are 0 at padding."""
        q, k, v = (split_heads(project(x), self.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.rotary:
            where = positions(x, key_padding, state)
            q, k = (rotate(t, where, self.rotary_base) for t in (q, k))
        q, k = self.feature(q, k)
        return Read(DiagonalInputs(q, at_real_tokens(k, key_padding), v))

    def write(self, mixed: Tensor, x: Tensor) -> Tensor:
        """The output projection."""
        return self.o_proj(join_heads(mixed))

    @classmethod
    def identity(cls) -> tuple[Tensor, Tensor]:
        """At the start the weight of a pair is 2 Σ_d cosh(q_d + k_d), here with everyone reading everyone."""
        layer = cls(8, 2, features="exp", eps=0.0).double()
        x = torch.randn(2, 11, 8, dtype=torch.float64)
        q, k, v = (p(x).view(2, 11, 2, 4).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        weight = 2 * (q[..., :, None, :] + k[..., None, :, :]).cosh().sum(-1)
        out = weight / weight.sum(-1, keepdim=True) @ v
        return layer(x).out, layer.o_proj(out.transpose(1, 2).reshape(2, 11, 8))

    def extra_repr(self) -> str:
        """What is not a parameter."""
        return f"features={self.features}, rotary={self.rotary}"
