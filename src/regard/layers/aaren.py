"""Aaren: attention as an RNN, by a learned query that is the same at every position (Feng et al. 2024, 2405.13956)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from regard.errors import require
from regard.layers.checks import sizes
from regard.layers.recurrent import Read, RecurrentLayer, RecurrentState, join_heads, split_heads
from regard.recurrence.diagonal import accumulation_dtype
from regard.recurrence.prefix_softmax import PAPER, PrefixInputs, PrefixSoftmax, SoftmaxState
from regard.registry import mechanism


@mechanism(
    "aaren",
    paper=PAPER,
    families=("recurrent",),
    cost="O(N·dim·(dim + C)) time, O(N·dim) memory; a state of dim + 2·heads in float32",
    causal=True,
    bidirectional=False,
    cross=False,
    patterns=False,
    gqa=False,
    steps=True,
    compiles=False,
)
class Aaren(RecurrentLayer):
    """o_i = Σ_{j ≤ i} softmax_j(q·k_j / √D) v_j with a learned query q, not one computed from token i.

    k = x W_k, v = x W_v, q = t W_q of a learned token t (dim), drawn from N(0, 0.02²): one for the layer (ours: it is
    not established whether the paper's is updated from layer to layer). D = dim / heads. All tokens are read at once by
    a prefix scan, one more by an update of (m, u, w), the state's inner SoftmaxState.

    What is asked does not depend on the token that asks: one such layer cannot look anything up (it fails on MQAR).
    """

    inner_state: ClassVar[type] = SoftmaxState

    def __init__(self, dim: int, heads: int, *, chunk_size: int = 64) -> None:
        super().__init__(dim, heads)
        require(dim % heads == 0, "heads", heads, f"a divisor of dim={dim}")
        sizes(chunk_size=chunk_size)
        self.mixer: PrefixSoftmax = PrefixSoftmax(chunk_size)
        self.token = nn.Parameter(0.02 * torch.randn(dim))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def query(self) -> Tensor:
        """(H, D): what the layer asks of every prefix, over √D."""
        return self.q_proj(self.token).unflatten(-1, (self.heads, -1)) * (self.heads / self.dim) ** 0.5

    def read(self, x: Tensor, key_padding: Tensor | None, state: RecurrentState | None) -> Read:
        """Scores (B, H, N), −∞ at padding, and values."""
        k, v = (split_heads(project(x), self.heads) for project in (self.k_proj, self.v_proj))
        query = self.query()
        dtype = accumulation_dtype(k, query)
        scores = (k.to(dtype) * query[:, None].to(dtype)).sum(-1)
        if key_padding is not None:
            scores = scores.masked_fill(~key_padding[:, None], -torch.inf)
        return Read(PrefixInputs(scores, v))

    def write(self, mixed: Tensor, x: Tensor) -> Tensor:
        """The output projection."""
        return self.o_proj(join_heads(mixed))

    @classmethod
    def identity(cls) -> tuple[Tensor, Tensor]:
        """It is torch's causal softmax attention with one query everywhere."""
        layer = cls(8, 2, chunk_size=4).double()
        layer.token.data *= 100  # so that the weights differ
        x = torch.randn(2, 11, 8, dtype=torch.float64)
        k, v = (project(x).view(2, 11, 2, 4).transpose(1, 2) for project in (layer.k_proj, layer.v_proj))
        q = layer.q_proj(layer.token).view(1, 2, 1, 4).expand_as(k)
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
        return layer(x).out, layer.o_proj(out.transpose(1, 2).reshape(2, 11, 8))
