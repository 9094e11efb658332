"""What one layer asks of attention, whatever the architecture: the only thing executors, policies and probes see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MaskRecipe:
    """A mask not yet drawn. It travels through the model in the mask's place and is evaluated where keys are known.

    mask_function(b, h, q_column, k_column) → bool, over broadcastable *columns* of the batch (padding counted).
    padding (B, columns) bool, True = real token, or None when every token is real.
    q_offset: the column of the first query of this forward.
    """

    mask_function: MaskFunction
    padding: Tensor | None
    q_offset: int


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention in one forward.

    q (B, Hq, N, D), already rotated; k (B, Hkv, M, D) and v (B, Hkv, M, Dv): what is attended to, the new tokens last.
    q_columns (N,) long: columns of the queries. k_columns (M,), (B, M) or (B, Hkv, M) long: columns of the keys.
    k_real: bool of (B, M) or (B, Hkv, M), False = padding or an unused slot; None = all real.
    q_real (B, N) bool, False = a padding query; None = all real.
    scale: multiplies q·k. softcap: logits become c·tanh(logits/c). sinks (Hq,): one learned extra logit per head.
    layer: number of the attention layer, counted in the order of calls; not the model's `layer_idx`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_columns: Tensor
    k_columns: Tensor
    k_real: Tensor | None
    q_real: Tensor | None
    recipe: MaskRecipe
    scale: float
    softcap: float | None
    sinks: Tensor | None
    layer: int

    def visible(self, rows: slice = slice(None)) -> Tensor:
        """bool, broadcastable to (B, Hkv, n, M): may these queries see these keys? Mask, padding and empty slots counted."""
        k_columns = self.k_columns
        while k_columns.ndim < 3:  # (M,) or (B, M) → (·, 1, M)
            k_columns = k_columns.unsqueeze(-2) if k_columns.ndim == 2 else k_columns[None]
        batch, heads = self.k.shape[:2]
        device = k_columns.device
        b = _index(batch, device)[:, None, None, None]
        h = _index(heads, device)[None, :, None, None] if k_columns.shape[1] > 1 else b.new_zeros((1, 1, 1, 1))
        seen = self.recipe.mask_function(b, h, self.q_columns[rows][None, None, :, None], k_columns[:, :, None, :])
        if self.k_real is not None:
            real = self.k_real if self.k_real.ndim == 3 else self.k_real[:, None]
            seen = seen & real[:, :, None, :]
        return seen


def _index(n: int, device: object) -> Tensor:
    import torch

    return torch.arange(n, device=device)  # type: ignore[call-overload]
