"""Softmax that knows empty rows and learned sinks, with its log-sum-exp, forward and backward without NaN."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_with_lse(logits: Tensor, visible: Tensor | None, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights (B, Hq, n, m) and log-sum-exp (B, Hq, n) of float32 or float64 logits (B, Hq, n, m).

    visible: bool, broadcastable to logits; where False the weight is 0. sinks (Hq,) or (B, Hq): one more logit per
    head, whose share of the softmax is dropped and which the log-sum-exp counts. A row that sees nothing gets
    weights 0 and −inf (with sinks: the sink).
    """
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    largest = logits.detach().amax(-1, keepdim=True)
    extra = None
    if sinks is not None:
        extra = sinks.to(logits.dtype)[..., None, None]
        largest = torch.maximum(largest, extra.detach())
    shift = torch.where(largest == -torch.inf, 0.0, largest)
    powers = torch.exp(logits - shift)
    total = powers.sum(-1, keepdim=True)
    if extra is not None:
        total = total + torch.exp(extra - shift)
    seen = total > 0
    safe = torch.where(seen, total, 1.0)
    return powers / safe, torch.where(seen, shift + safe.log(), -torch.inf).squeeze(-1)
