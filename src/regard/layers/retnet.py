"""RetNet's multi-scale retention (Sun et al. 2023, arXiv 2307.08621)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from regard.errors import require
from regard.layers.base import Example
from regard.layers.checks import flags, positive, sizes
from regard.layers.recurrent import (
    RECURRENT,
    Read,
    RecurrentLayer,
    RecurrentState,
    at_real_tokens,
    join_heads,
    positions,
    share_of,
    split_heads,
)
from regard.layers.rotary import rotate
from regard.recurrence import DiagonalDecay, DiagonalInputs
from regard.registry import Paper, mechanism

PAPER = Paper(
    "Retentive Network: A Successor to Transformer for Large Language Models", "Sun et al.", 2023, "2307.08621"
)


def retention_log_decay(heads: int, *, like: Tensor) -> Tensor:
    """(H,): log γ_h = log(1 − 2^{−5−h}), h = 0 … H−1, on the device of `like` and in at least float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(heads, device=like.device, dtype=dtype)))


@mechanism(
    "retnet",
    paper=PAPER,
    cost="O(N·(C·(Dk+Dv) + Dk·Dv)) time per head; a state of H·Dk·Dv, that is 2·dim²/H by default",
    compiles=False,
    example=lambda: Example(settings={"value_dim": 3}),
    **RECURRENT,
)
class RetNet(RecurrentLayer):
    """S_t = γ_h S_{t−1} + k_t v_tᵀ ; o_t = S_tᵀ q_t · Dk^{−1/2} ; y_t = W_o(RMSNorm_head(o_t) ⊙ SiLU(W_g x_t)).

    γ_h = 1 − 2^{−5−h} is fixed. q and k are linear, then rotated (RoPE), positions going on from call to call.
    key_dim: Dk, even, None = dim/heads; value_dim: Dv, None = 2·dim/heads. The paper's size has 8 heads.
    rotary=False leaves the rotation out. chunk_size does not change the result.
    """

    mixer: DiagonalDecay

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        rotary: bool = True,
        rotary_base: float = 10000.0,
        chunk_size: int = 64,
    ) -> None:
        super().__init__(dim, heads)
        self.key_dim = share_of(dim, 1, 1, heads, "key_dim") if key_dim is None else key_dim
        value_dim = share_of(dim, 2, 1, heads, "value_dim") if value_dim is None else value_dim
        sizes(key_dim=self.key_dim, value_dim=value_dim, chunk_size=chunk_size)
        flags(rotary=rotary)
        positive(rotary_base=rotary_base)
        require(not rotary or self.key_dim % 2 == 0, "key_dim", self.key_dim, "an even number, for the rotation")
        self.rotary, self.rotary_base = rotary, rotary_base
        self.mixer = DiagonalDecay(chunk_size)
        self.q_proj, self.k_proj = (nn.Linear(dim, heads * self.key_dim, bias=False) for _ in range(2))
        self.v_proj, self.g_proj = (nn.Linear(dim, heads * value_dim, bias=False) for _ in range(2))
        self.norm = nn.RMSNorm(value_dim, eps=1e-5)
        self.o_proj = nn.Linear(heads * value_dim, dim, bias=False)

    def read(self, x: Tensor, key_padding: Tensor | None, state: RecurrentState | None) -> Read:
        """Rotated queries and keys, values, the fixed decay (1 at padding)."""
        q, k, v = (split_heads(project(x), self.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.rotary:
            at = positions(x, key_padding, state)
            q, k = rotate(q, at, self.rotary_base), rotate(k, at, self.rotary_base)
        decay = retention_log_decay(self.heads, like=x)
        if key_padding is not None:
            decay = at_real_tokens(decay[:, None, None].expand(len(x), -1, x.shape[1], 1), key_padding)
        return Read(DiagonalInputs(q * self.key_dim**-0.5, k, v, decay))

    def write(self, mixed: Tensor, x: Tensor) -> Tensor:
        """Norm of each head, gate, projection."""
        return self.o_proj(join_heads(self.norm(mixed)) * silu(self.g_proj(x)))

    @classmethod
    def identity(cls) -> tuple[Tensor, Tensor]:
        """It is attention without softmax, the rotated scores weighted by γ^{t−s}: the paper's parallel form."""
        layer = cls(8, 2, chunk_size=4).double()
        x, t = torch.randn(2, 11, 8, dtype=torch.float64), torch.arange(11)
        q, k, v = (p(x).unflatten(-1, (2, -1)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        # Channels d and d + 2 as one complex number, turned by t·base^{−d/2}.
        turn = torch.polar(torch.ones(11, 2).double(), t[:, None] * 10000.0 ** (-torch.arange(2).double() / 2))
        q, k = (torch.complex(z[..., :2], z[..., 2:]) * turn for z in (q, k))
        gamma = torch.tensor([1 - 2**-5, 1 - 2**-6], dtype=torch.float64)[:, None, None]
        weight = (q @ k.mH).real / 2 * (gamma ** (t[:, None] - t).clamp(min=0)).tril()
        out = layer.norm(weight @ v).transpose(1, 2).flatten(2)
        return layer(x).out, layer.o_proj(out * silu(layer.g_proj(x)))
