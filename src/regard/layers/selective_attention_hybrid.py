"""Attention at selected tokens only, in a stack of convolutions: Zoology's hybrid (Arora et al. 2023, 2312.04927)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from regard.attend import attend
from regard.layers.base import Context, Layer, Output, Padding, Tokens, without_padding
from regard.layers.base_conv import PAPER
from regard.layers.checks import from_zero, sizes
from regard.layers.multi_head_attention import KVState, MultiHeadAttention
from regard.patterns import Pattern, causal
from regard.registry import mechanism


class Selected(NamedTuple):
    """loss: to be added to the training loss, 0 in evaluation. gates (B, N): f, 0 at padding. rows (B, N) bool: who
    attended."""

    loss: Tensor
    gates: Tensor
    rows: Tensor


@mechanism(
    "selective-attention-hybrid",
    paper=PAPER,
    families=("mixture",),
    cost="training O(N²·dim), evaluation O(N·dim² + rows·N·dim); a cache of 2·N·dim",
    causal=True,
    bidirectional=False,
    cross=False,
    patterns=False,
    gqa=False,
    steps=True,
    compiles=False,
)
class SelectiveAttentionHybrid(Layer):
    """y_i = x_i + f_i·Attention(x)_i, f_i = σ(x_i·θ): in training everywhere, in evaluation at a few, else y = x.

    Training (`layer.train()`): causal attention everywhere under the soft gate; aux.loss is
    loss_weight · relu(mean_i f_i − k/N), its mean over the batch, which keeps the gates within the budget.
    Evaluation: the k tokens of each row with the largest f, and only their attention is computed. rows: k; None = ⌈√N⌉
    of the row's N real tokens. What a token gets then depends on later ones, with which it competes: not causal, so a
    call with a state is refused. threshold τ instead takes every token with f_i > τ, which streams. With k = N, or
    τ = 0, evaluation is training. The state is a KVState. The residual x is part of the layer, and θ has no bias.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        rows: int | None = None,
        threshold: float | None = None,
        loss_weight: float = 1e-3,
        rotary: bool = False,
    ) -> None:
        super().__init__(dim, heads)
        if rows is not None:
            sizes(rows=rows)
        if threshold is not None:
            from_zero("threshold", threshold, below=1.0)
        from_zero("loss_weight", loss_weight)
        self.rows, self.threshold, self.loss_weight = rows, threshold, loss_weight
        self.attention = MultiHeadAttention(dim, heads, rotary=rotary)
        self.gate = nn.Linear(dim, 1, bias=False)

    def forward(
        self,
        x: Tokens,
        context: Context | None = None,
        *,
        pattern: Pattern | None = None,
        key_padding: Padding | None = None,
        state: KVState | None = None,
    ) -> Output:
        """See `Layer.forward`. Causal by nature: pattern is None or `causal()`. aux is a Selected."""
        self.check_causal(context, pattern)
        self.check_tokens(x, context, key_padding)
        self.check_state(state, KVState)
        if state is not None and not self.training and self.threshold is None:
            raise self.refuse("state in evaluation without a threshold: the top rows depend on later tokens")
        x = without_padding(x, key_padding)
        asked, state = self.attention.project(x, None, key_padding, state)
        real = torch.ones_like(x[..., 0], dtype=torch.bool) if key_padding is None else key_padding
        gates = self.gate(x)[..., 0].sigmoid().masked_fill(~real, 0.0)
        budget = self._budget(real)
        if self.training:
            out = attend(asked.q, asked.k, asked.v, pattern=causal(), key_padding=asked.key_padding)
            mixed, chosen = self._joined(out), real
            loss = self.loss_weight * (gates.sum(1) - budget).div(real.sum(1).clamp(min=1)).relu().mean()
        else:
            chosen = self._choose(gates, real, budget)
            count = int(chosen.sum(1).max()) if len(x) else 0
            index = chosen.long().argsort(dim=1, descending=True, stable=True)[:, :count]  # theirs first, in order
            q = asked.q.gather(2, index[:, None, :, None].expand(-1, self.heads, -1, asked.q.shape[3]))
            where = asked.positions.gather(1, index)
            out = attend(q, asked.k, asked.v, pattern=causal(), key_padding=asked.key_padding, q_positions=where)
            joined = self._joined(out)  # under autocast not in the dtype of x
            mixed = joined.new_zeros(x.shape).scatter(1, index[..., None].expand_as(joined), joined)
            mixed = without_padding(mixed, chosen)
            loss = gates.new_zeros(())
        out = without_padding(x + gates[..., None] * mixed, key_padding)
        return Output(out, state, Selected(loss, gates, chosen))

    def _budget(self, real: Tensor) -> Tensor:
        """(B,): how many tokens of each row may attend."""
        n = real.sum(1)
        return n.sqrt().ceil().long() if self.rows is None else n.clamp(max=self.rows)

    def _choose(self, gates: Tensor, real: Tensor, budget: Tensor) -> Tensor:
        """(B, N) bool: the rows that attend; of equal gates the earlier one."""
        if self.threshold is not None:
            return real & (gates > self.threshold)
        order = gates.masked_fill(~real, -1.0).argsort(dim=1, descending=True, stable=True)
        return real & (order.argsort(dim=1) < budget[:, None])

    def _joined(self, out: Tensor) -> Tensor:
        return self.attention.o_proj(out.transpose(1, 2).flatten(2))

    @classmethod
    def identity(cls) -> tuple[Tensor, Tensor]:
        """With a budget of all tokens, evaluation is training."""
        layer = cls(8, 2, rows=11).double()
        x = torch.randn(2, 11, 8, dtype=torch.float64)
        trained = layer(x).out
        return layer.eval()(x).out, trained
