"""What one layer asks of attention, whatever the architecture: the only thing executors, policies and probes see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.errors import ArgumentError
from regard.patterns import causal
from regard.patterns.algebra import Pattern

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MaskRecipe:
    """A mask not yet drawn. It travels through the model in the mask's place and is evaluated where the keys are known.

    mask_function(b, h, q_column, k_column) → bool, over *columns* of the batch, padding counted.
    by_element: the function takes one index quadruple at a time (a user's own overlay), so it is mapped with vmap.
    padding (B, columns) bool, True = real token; None = every token is real.
    q_offset, k_offset: columns of the first query of this forward and of the first key that the model means.
    causal: the function is exactly `k_column ≤ q_column`.
    """

    mask_function: MaskFunction
    by_element: bool = False
    padding: Tensor | None = None
    q_offset: int = 0
    k_offset: int = 0
    causal: bool = False

    def contiguous(self) -> MaskRecipe:
        """`generate()` asks this of a mask that it draws ahead, which it does for static (compiled) caches alone."""
        raise ArgumentError("cache_implementation", "static", "none: the attached model keeps a store of its own")

    def __call__(self, b: Tensor, h: Tensor, q_column: Tensor, k_column: Tensor) -> Tensor:
        """bool, broadcast over the four; padding is not applied here."""
        if not self.by_element:
            return self.mask_function(b, h, q_column, k_column)
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

        each = torch.broadcast_tensors(b, h, q_column, k_column)
        with TransformGetItemToIndex():
            flat = torch.vmap(self.mask_function)(*(x.reshape(-1) for x in each))
        return flat.view(each[0].shape)


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention in one forward.

    q (B, Hq, N, D), already rotated; k (B, Hkv, M, D) and v (B, Hkv, M, Dv): what is attended to.
    q_columns (N,) long: columns of the queries. k_columns (M,), (B, M) or (B, Hkv, M) long: columns of the keys.
    k_real, shaped (B, M) or (B, Hkv, M) bool: False = padding or an unused slot; None = all real.
    q_real (B, N) bool: False = a padding query; None = all real.
    scale multiplies q·k; softcap: logits become c·tanh(logits/c); sinks (Hq,): one learned extra logit per head.
    layer: number of the caching attention layer. pattern: what the plan's prefill part allows, over real positions.
    position_of (B, columns) long: a column's position among its row's real tokens; None = the column itself.
    fresh: k and v are exactly this forward's tokens, padding included.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_columns: Tensor
    k_columns: Tensor
    recipe: MaskRecipe
    scale: float
    layer: int
    k_real: Tensor | None = None
    q_real: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    pattern: Pattern | None = None
    position_of: Tensor | None = None
    fresh: bool = True

    @property
    def plainly_causal(self) -> bool:
        """Nothing but `k ≤ q` over this forward's own, unpadded tokens: what every fused kernel does by itself."""
        return self.pattern is None and self._causal_and_whole

    @property
    def plain_pattern(self) -> Pattern | None:
        """What the plan's prefill part allows, causally, of this forward's own, unpadded tokens; None for other calls.

        Unlike a mask of transformers it answers for whole tiles, so that kernels skip what it forbids."""
        return causal() & self.pattern if self.pattern is not None and self._causal_and_whole else None

    @property
    def _causal_and_whole(self) -> bool:
        return self.fresh and self.recipe.causal and self.k_real is None

    @property
    def k_positions(self) -> Tensor:
        """Positions of the keys among their row's real tokens, shaped like k_columns or (B, M)."""
        if self.position_of is None:
            return self.k_columns
        if self.k_columns.ndim == 1:
            return self.position_of[:, self.k_columns]
        rows = torch.arange(len(self.position_of), device=self.position_of.device)
        return self.position_of[rows.view(-1, *[1] * (self.k_columns.ndim - 1)), self.k_columns]

    def visible(self, rows: slice = slice(None)) -> Tensor:
        """bool, broadcastable to (B, Hq, n, M): may these queries see these keys? Padding and empty slots count."""
        batch, hq = self.q.shape[:2]
        hkv = self.k.shape[1]
        k_columns = _per_head(self.k_columns)
        heads = self.pattern is not None and self.pattern.heads is not None
        b = torch.arange(batch, device=k_columns.device).view(-1, 1, 1, 1)
        h = torch.arange(hq if heads else 1, device=k_columns.device).view(1, -1, 1, 1)
        i = self.q_columns[rows].view(1, 1, -1, 1)
        j = k_columns[:, :, None, :]
        if j.shape[1] > 1:
            j = j.repeat_interleave(hq // hkv, 1)
        seen = CallPattern(self).rule(b, h, i, j)
        if self.k_real is not None:
            real = _per_head(self.k_real)
            seen = seen & (real.repeat_interleave(hq // hkv, 1) if real.shape[1] > 1 else real)[:, :, None, :]
        return seen


@dataclass(frozen=True, eq=False)
class CallPattern(Pattern):
    """The recipe and the plan's pattern of a call as one pattern over columns, so that `attend` can execute it."""

    call: AttentionCall

    def rule(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Transformers sees one mask for all heads, so its function is asked for head 0; ours is asked per head."""
        call = self.call
        seen = call.recipe(b, torch.zeros((), dtype=torch.long, device=h.device), i, j)
        if call.pattern is not None:
            if call.position_of is not None:
                i, j = call.position_of[b, i], call.position_of[b, j]
            seen = seen & call.pattern.rule(b, h, i, j)
        return seen

    @property
    def heads(self) -> int | None:
        return None if self.call.pattern is None else self.call.pattern.heads

    @property
    def batched(self) -> bool:
        return True


def _per_head(index: Tensor) -> Tensor:
    """(M,), (B, M) or (B, H, M) → (1 or B, 1 or H, M)."""
    if index.ndim == 3:
        return index
    return index[:, None] if index.ndim == 2 else index[None, None]
