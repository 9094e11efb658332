"""Based's linear attention: the second-order Taylor expansion of softmax (Arora et al. 2024, arXiv 2402.18668)."""

from __future__ import annotations

from torch import Tensor, float64, nn, randn

from regard.errors import require
from regard.layers.base import Example
from regard.layers.checks import from_zero, sizes
from regard.layers.recurrent import Read, RecurrentLayer, RecurrentState, at_real_tokens, join_heads, split_heads
from regard.recurrence import DiagonalInputs
from regard.recurrence.diagonal import accumulation_dtype
from regard.recurrence.feature_maps import taylor_2_compressed
from regard.recurrence.normalized import NormalisedLinearAttention
from regard.registry import Paper, mechanism

PAPER = Paper(
    "Simple linear attention language models balance the recall-throughput tradeoff", "Arora et al.", 2024, "2402.18668"
)


@mechanism(
    "based",
    paper=PAPER,
    families=("recurrent",),
    cost="O(N·heads·F·(C + D)) time, F = 1 + D' + D'(D' + 1)/2; a state of heads·F·(D + 1) in float32",
    causal=True,
    bidirectional=False,
    cross=False,
    patterns=False,
    gqa=False,
    steps=True,
    compiles=False,
    example=lambda: Example(settings={"feature_dim": 3}),
)
class Based(RecurrentLayer):
    """o_i = Σ_{j ≤ i} p(s_ij) v_j / Σ_{j ≤ i} p(s_ij), p(s) = 1 + s + s²/2, s_ij = q_i·k_j / √D'.

    q, k (dim → heads·D'), v (dim → dim), an output projection, no bias, no positions, no gate. feature_dim: D', the
    state grows with D'²/2; the scale is that of D', not of the values' D = dim / heads. p ≥ 1/2, so the denominator is
    at least half the number of tokens; eps is added to it. The features are the compressed ones (153 for D' = 16).

    One of the three mixers of the Based stack; the others are multi-head-attention under sliding_window(64) & causal()
    (`Mixer(..., within=...)`) and base-conv, at about 20 % / 20 % / 60 % of the layers (`regard.models.stack.placed`).
    """

    def __init__(
        self, dim: int, heads: int, *, feature_dim: int = 16, eps: float = 1e-12, chunk_size: int = 64
    ) -> None:
        super().__init__(dim, heads)
        require(dim % heads == 0, "heads", heads, f"a divisor of dim={dim}")
        sizes(feature_dim=feature_dim, chunk_size=chunk_size)
        from_zero("eps", eps)
        self.mixer: NormalisedLinearAttention = NormalisedLinearAttention(eps, chunk_size)
        self.feature_dim = feature_dim
        self.q_proj, self.k_proj = (nn.Linear(dim, heads * feature_dim, bias=False) for _ in range(2))
        self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(2))

    def read(self, x: Tensor, key_padding: Tensor | None, state: RecurrentState | None) -> Read:
        """Taylor features of queries and keys; those of keys are 0 at padding."""
        q, k, v = (split_heads(project(x), self.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        dtype = accumulation_dtype(q, k)  # products of rounded features would not add up to a polynomial ≥ 1/2
        q, k = (taylor_2_compressed(t.to(dtype)) for t in (q, k))
        return Read(DiagonalInputs(q, at_real_tokens(k, key_padding), v))

    def write(self, mixed: Tensor, x: Tensor) -> Tensor:
        """The output projection."""
        return self.o_proj(join_heads(mixed))

    @classmethod
    def identity(cls) -> tuple[Tensor, Tensor]:
        """No features are needed: the polynomial of the scores, masked, its rows over their sums."""
        layer = cls(8, 2, feature_dim=3, chunk_size=4).double()
        x = randn(2, 11, 8, dtype=float64)
        q, k = (project(x).view(2, 11, 2, 3).transpose(1, 2) for project in (layer.q_proj, layer.k_proj))
        s = q @ k.mT / 3**0.5
        weight = (1 + s + s**2 / 2).tril()
        out = weight / weight.sum(-1, keepdim=True) @ layer.v_proj(x).view(2, 11, 2, 4).transpose(1, 2)
        return layer(x).out, layer.o_proj(out.transpose(1, 2).reshape(2, 11, 8))
