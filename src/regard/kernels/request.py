"""One attention problem, already checked and normalised: the only thing an executor sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from regard.patterns import Pattern

ScoreFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Normalizer = Callable[[Tensor, Tensor], Tensor]
Keys = slice | Tensor
"""Some of the keys: a range, or long indices."""


@dataclass(frozen=True, eq=False)
class Request:
    """q (B, Hq, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv) and everything that decides their attention.

    pattern: None = every query may see every key. normalizer: None = softmax.
    q_positions (B or 1, N) and kv_positions (B or 1, Hkv or 1, M), long, ≥ 0 wherever a key exists.
    exists (B or 1, Hkv or 1, M) bool: False = padding or an unused slot, whose memory may hold anything; None = all
    exist.
    aligned: True when key m stands at position m and query n at position M − N + n, in every row.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    q_positions: Tensor
    kv_positions: Tensor
    pattern: Pattern | None = None
    score: ScoreFunction | None = None
    normalizer: Normalizer | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    exists: Tensor | None = None
    aligned: bool = False
    return_lse: bool = False

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def statistics(self) -> torch.dtype:
        """What softmax statistics are held in: float64 for float64 inputs, float32 for everything else."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def needs_grad(self) -> bool:
        """Whether a backward may follow."""
        tensors = (self.q, self.k, self.v) + (() if self.sinks is None else (self.sinks,))
        return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)

    def clean_kv(self) -> tuple[Tensor, Tensor]:
        """k and v with zeros where nothing exists: a weight of zero does not stop a NaN (0 · NaN = NaN)."""
        if self.exists is None:
            return self.k, self.v
        missing = ~self.exists[..., None]
        return self.k.masked_fill(missing, 0), self.v.masked_fill(missing, 0)

    def indices(self, rows: slice, keys: Keys) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """b (B,1,1,1), h (1,Hq,1,1), i (B or 1,1,n,1), j (B or 1,Hq or 1,1,m): what rules and scores are asked with."""
        device = self.q.device
        b = torch.arange(self.q.shape[0], device=device)[:, None, None, None]
        h = torch.arange(self.q.shape[1], device=device)[None, :, None, None]
        j = self.per_query_head(self.kv_positions[:, :, keys])
        return b, h, self.q_positions[:, None, rows, None], j[:, :, None, :]

    def per_query_head(self, x: Tensor) -> Tensor:
        """(B or 1, Hkv or 1, m) → (B or 1, Hq or 1, m)."""
        return x if x.shape[1] == 1 or self.group == 1 else x.repeat_interleave(self.group, dim=1)

    def visible(self, rows: slice = slice(None), keys: Keys = slice(None)) -> Tensor | None:
        """bool (B or 1, Hq or 1, n, m): may these queries see these keys? None when all of them may."""
        seen = None if self.exists is None else self.per_query_head(self.exists[:, :, keys])[:, :, None, :]
        if self.pattern is not None:
            b, h, i, j = self.indices(rows, keys)
            allowed = self.pattern.rule(
                b if self.pattern.batched else b[:1], h if self.pattern.heads is not None else h[:, :1], i, j
            )
            allowed = allowed.expand(torch.broadcast_shapes(allowed.shape, i.shape, j.shape))
            seen = allowed if seen is None else allowed & seen
        return None if seen is None else seen.expand(*seen.shape[:2], self.q_positions[:, rows].shape[1], -1)
