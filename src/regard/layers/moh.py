"""MoH: multi-head attention as a mixture of heads (Jin et al. 2024, arXiv 2410.11842).

Multi-head attention is a sum over heads, Σ_h O_h W_O^h. Here it is Σ_h g_h(t) O_h(t) W_O^h: the first heads are shared
and always on, of the others each token picks its top K by a router that reads the query's token only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from regard.attend import attend
from regard.errors import require
from regard.layers.base import Context, Example, Output, Padding, Tokens, without_padding
from regard.layers.checks import flags
from regard.layers.head_gathering import attend_gathered
from regard.layers.multi_head_attention import KVState, MultiHeadAttention
from regard.patterns import Pattern
from regard.patterns.checks import at_least
from regard.registry import Paper, mechanism

PAPER = Paper("MoH: Multi-Head Attention as Mixture-of-Head Attention", "Jin et al.", 2024, "2410.11842")


class MoHAux(NamedTuple):
    """load_balance: the scalar L_b to add to the task's loss (times 0.01 in the paper), summed over layers.

    selected (B, N, H) bool: which heads each token uses. gates (B, N, H): with what weight.
    """

    load_balance: Tensor
    selected: Tensor
    gates: Tensor


@mechanism(
    "moh",
    paper=PAPER,
    families=("mixture",),
    cost="attention of (shared + top_k)/H of the queries when gathered, of all when masked; all keys and values",
    causal=True,
    bidirectional=True,
    cross=True,
    patterns=True,
    gqa=True,
    steps=True,
    compiles=True,
    example=lambda: Example(settings={"shared_heads": 1, "top_k": 2}),
)
class MixtureOfHeads(MultiHeadAttention):
    """Multi-head attention in which each token uses all shared heads and its `top_k` best of the routed ones.

    With p^s = softmax(W_s x), p^r = softmax(W_r x) and [a1, a2] = softmax(W_h x), a token's gates are, rescaled by
    counts as in the public code, g = 2 a1 · S · p^s for the S shared heads and g = 2 a2 · K · p^r / Σ_selected p^r for
    the K selected: a router of zeros gives every active head the weight 1. `rescaled=False` is the paper's own
    g = a1 p^s and g = a2 p^r.

    shared_heads: S, the first heads. top_k: K, of the H − S routed heads. Without shared or without selected heads the
    factor 2a is absent. gathered: compute each routed head's attention only for the tokens that chose it (the same
    result in less work, with a wait for the device); False computes all and masks. Query heads are routed, kv_heads are
    not. Others as in MultiHeadAttention. `aux` is a MoHAux; padding is left out of its loss.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        shared_heads: int = 1,
        top_k: int = 1,
        rescaled: bool = True,
        gathered: bool = False,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        rotary: bool = False,
        rotary_base: float = 10000.0,
    ) -> None:
        super().__init__(
            dim, heads, kv_heads=kv_heads, head_dim=head_dim, bias=bias, rotary=rotary, rotary_base=rotary_base
        )
        flags(rescaled=rescaled, gathered=gathered)
        at_least("shared_heads", shared_heads, 0)
        at_least("top_k", top_k, 0)
        routed = heads - shared_heads
        require(routed >= 0, "shared_heads", shared_heads, f"0 … heads={heads}")
        require(top_k <= routed, "top_k", top_k, f"0 … {routed}, the heads that are not shared")
        require(shared_heads + top_k >= 1, "top_k", top_k, "at least one head that a token uses, shared or selected")
        self.shared_heads, self.top_k, self.rescaled, self.gathered = shared_heads, top_k, rescaled, gathered
        # A router that could decide nothing has no weights.
        self.shared_router = nn.Linear(dim, shared_heads, bias=False) if shared_heads else None
        self.head_router = nn.Linear(dim, routed, bias=False) if top_k else None
        self.type_router = nn.Linear(dim, 2, bias=False) if shared_heads and top_k else None

    def forward(
        self,
        x: Tokens,
        context: Context | None = None,
        *,
        pattern: Pattern | None = None,
        key_padding: Padding | None = None,
        state: KVState | None = None,
    ) -> Output:
        """See `Layer.forward`. The state is a KVState, aux a MoHAux."""
        asked, state = self.project(x, context, key_padding, state)
        real = key_padding if context is None else None
        aux = self.route(x, real)
        if self.gathered:
            out = attend_gathered(asked, aux.selected, pattern)
        else:
            q_positions = asked.positions if asked.own else None
            out = attend(
                asked.q, asked.k, asked.v, pattern=pattern, key_padding=asked.key_padding, q_positions=q_positions
            )
        out = out * aux.gates.transpose(1, 2)[..., None]  # after softmax·V, before W_O
        out = self.o_proj(out.transpose(1, 2).flatten(2))
        return Output(without_padding(out, real), state, aux)

    def route(self, x: Tensor, real: Tensor | None = None) -> MoHAux:
        """Which heads each token of x (B, N, C) uses and with what weight; real (B, N) bool counts in the loss."""
        shared, routed = self.shared_heads, self.heads - self.shared_heads
        gates, chosen = [], []
        loss = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        balance = (None, None) if self.type_router is None else _probabilities(self.type_router, x).split(1, -1)
        if self.shared_router is not None:
            gate = _probabilities(self.shared_router, x)
            gates.append(_weighted(gate * shared if self.rescaled else gate, balance[0], self.rescaled))
            chosen.append(torch.ones_like(gate, dtype=torch.bool))
        if self.head_router is not None:
            scores = _probabilities(self.head_router, x)
            selected = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(self.top_k, -1).indices, True)
            gate = scores.masked_fill(~selected, 0.0)
            if self.rescaled:
                gate = self.top_k * gate / gate.sum(-1, keepdim=True).clamp(min=torch.finfo(gate.dtype).tiny)
            gates.append(_weighted(gate, balance[1], self.rescaled))
            chosen.append(selected)
            loss = load_balance(scores, selected, real)
        elif routed:  # no token ever picks one
            gates.append(x.new_zeros((*x.shape[:2], routed)))
            chosen.append(torch.zeros((*x.shape[:2], routed), dtype=torch.bool, device=x.device))
        return MoHAux(loss, torch.cat(chosen, -1), torch.cat([g.to(x.dtype) for g in gates], -1))

    @classmethod
    def from_dense(
        cls, dense: MultiHeadAttention, *, shared_heads: int, top_k: int, rescaled: bool = True, gathered: bool = False
    ) -> MixtureOfHeads:
        """A MoH layer with the weights of a trained dense layer, its routers at zero, to go on training from.

        So every active head starts with weight 1, and with all heads active it is the dense layer. Routers at zero are
        not stuck: some K heads win the tie, and L_b and the task's gradient pull the scores apart from the first step.
        """
        layer = cls(
            dense.dim,
            dense.heads,
            shared_heads=shared_heads,
            top_k=top_k,
            rescaled=rescaled,
            gathered=gathered,
            kv_heads=dense.kv_heads,
            head_dim=dense.head_dim,
            bias=dense.bias,
            rotary=dense.rotary,
            rotary_base=dense.rotary_base,
        ).to(dense.q_proj.weight)
        layer.load_state_dict(dense.state_dict(), strict=False)
        for router in (layer.shared_router, layer.head_router, layer.type_router):
            if router is not None:
                nn.init.zeros_(router.weight)
        return layer.train(dense.training)

    @classmethod
    def identity(cls) -> tuple[Tensor, Tensor]:
        """With a router of zeros and every routed head selected it is dense multi-head attention."""
        dense = MultiHeadAttention(8, 4, kv_heads=2).double()
        x = torch.randn(2, 5, 8, dtype=torch.float64)
        return cls.from_dense(dense, shared_heads=1, top_k=3)(x).out, dense(x).out


def load_balance(scores: Tensor, selected: Tensor, real: Tensor | None = None) -> Tensor:
    """L_b = E² · mean_h(me_h · ce_h): me_h the mean score of head h over real tokens, ce_h the share that selected it.

    scores (B, N, E) summing to 1, selected (B, N, E) bool, real (B, N) bool. Equals K when uniform; 0 without tokens.
    """
    weight = torch.ones_like(scores[..., :1]) if real is None else real[..., None].to(scores.dtype)
    count = weight.sum().clamp(min=1)
    mean_score = (scores * weight).sum((0, 1)) / count
    share = (selected * weight).sum((0, 1)) / count
    return scores.shape[-1] ** 2 * (mean_score * share).mean()


def _probabilities(router: nn.Linear, x: Tensor) -> Tensor:
    """softmax(W x) in at least float32."""
    logits: Tensor = router(x)
    return logits.to(torch.promote_types(x.dtype, torch.float32)).softmax(-1)


def _weighted(gate: Tensor, share: Tensor | None, rescaled: bool) -> Tensor:
    """The gate times the share of its type (B, N, 1), counted by two types when rescaled."""
    return gate if share is None else gate * (2 * share if rescaled else share)
