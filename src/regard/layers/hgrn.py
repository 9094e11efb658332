"""HGRN: a gated vector state with no key and no query (Qin et al. 2023, arXiv 2311.04823)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from regard.errors import require
from regard.layers.forget_gate import ForgetGate
from regard.layers.recurrent import (
    RECURRENT,
    Read,
    RecurrentLayer,
    RecurrentState,
    at_real_tokens,
    join_heads,
    split_heads,
)
from regard.recurrence.hgrn import HGRN, PAPER, HGRNInputs, HGRNState
from regard.registry import mechanism


@mechanism("hgrn", paper=PAPER, cost="O(N·D) time and memory; a state of D", compiles=False, **RECURRENT)
class HGRNLayer(RecurrentLayer):
    """h_t = f_t ⊙ h_{t−1} + (1 − f_t) ⊙ SiLU(W_i x_t) ; y_t = W_o(RMSNorm(h_t) ⊙ SiLU(W_g x_t)).

    f = l + (1 − l) ⊙ σ(W_f x) with the lower bound l of `ForgetGate`: `layer` of `layers`, or `lower_bound`. Real
    throughout: the first paper's learned complex phase is left out, as in the hybrid study (arXiv 2507.06457).
    heads: any divisor of dim; a vector state has none, and the result does not depend on it.

    The state's inner one is an HGRNState of dim numbers in float32.
    """

    inner_state = HGRNState
    mixer: HGRN

    def __init__(
        self, dim: int, heads: int, *, layer: int = 0, layers: int = 1, lower_bound: float | None = None
    ) -> None:
        super().__init__(dim, heads)
        require(dim % heads == 0, "heads", heads, f"a divisor of dim={dim}")
        self.mixer = HGRN()
        self.forget_gate = ForgetGate(layer, layers, lower_bound)
        self.i_proj, self.f_proj, self.g_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.norm = nn.RMSNorm(dim, eps=1e-5)

    def read(self, x: Tensor, key_padding: Tensor | None, state: RecurrentState | None) -> Read:
        """What is added and log f."""
        log_f, write = self.forget_gate(self.f_proj(x))
        added = (silu(self.i_proj(x)) * write).to(x.dtype)
        u, g = (at_real_tokens(split_heads(t, self.heads), key_padding) for t in (added, log_f))
        return Read(HGRNInputs(u, g))

    def write(self, mixed: Tensor, x: Tensor) -> Tensor:
        """Norm over all channels, gate, projection."""
        return self.o_proj(self.norm(join_heads(mixed)) * silu(self.g_proj(x)))

    @classmethod
    def identity(cls) -> tuple[Tensor, Tensor]:
        """It is the loop over the tokens, with f itself instead of its logarithm."""
        layer = cls(8, 2, layer=1, layers=4).double()
        x = torch.randn(2, 11, 8, dtype=torch.float64)
        f = 0.25 + 0.75 * layer.f_proj(x).sigmoid()
        u = silu(layer.i_proj(x)) * (1 - f)
        h, out = torch.zeros(2, 8, dtype=torch.float64), []
        for t in range(11):
            h = f[:, t] * h + u[:, t]
            out.append(h)
        return layer(x).out, layer.o_proj(layer.norm(torch.stack(out, 1)) * silu(layer.g_proj(x)))
